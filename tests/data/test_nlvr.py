"""Sentences about two images: BLIP's NLVR2 JSON, broken records of it, and sentences about drawn scenes."""

import json
import re
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from vlprune.data import MissingSplitError, NlvrData, Pair, check_images, open_data
from vlprune.data.nlvr import read_nlvr, scenes_nlvr
from vlprune.data.scenes import COLORS, SHAPES, VOCABULARY, scene
from vlprune.errors import RequestError


@pytest.fixture
def folder(tmp_path):
    """Six images, each of one grey level."""
    (tmp_path / "dev").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 10), (40 * i,) * 3).save(tmp_path / "dev" / f"{i}.png")
    return tmp_path


def write(folder, name, records):
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def record(i, j, sentence="both are grey", label="True", **more):
    return {"images": [f"dev/{i}.png", f"dev/{j}.png"], "sentence": sentence, "label": label, **more}


def shades(data):
    return [np.asarray(image)[0, 0, 0] // 40 for image in data.images]


def refusal(function, *args, **options):
    with pytest.raises(RequestError) as caught:
        function(*args, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- files ------------------------------------------------------------------------------------------------------------


def test_pairs_share_their_images(folder):
    records = [
        record(3, 1, " one is dark "),
        record(1, 5, "two", "False", identifier="dev-1"),
        record(3, 3, "x", False),
    ]
    data = read_nlvr(write(folder, "nlvr_dev.json", records))
    assert isinstance(data, NlvrData) and data.name == "nlvr_dev" and (data.samples, data.skipped) == (3, 0)
    assert shades(data) == [3, 1, 5]
    assert data.pairs == [Pair(0, 1, "one is dark", True), Pair(1, 2, "two", False), Pair(0, 0, "x", False)]


BROKEN = {
    "missing image": (record(0, 77), "missing image"),
    "one image": (record(0, 1) | {"images": ["dev/0.png"]}, "wrong images"),
    "three images": (record(0, 1) | {"images": ["dev/0.png"] * 3}, "wrong images"),
    "a text for images": (record(0, 1) | {"images": "ab"}, "wrong images"),
    "no images": ({"sentence": "a", "label": "True"}, "wrong images"),
    "a number for an image": (record(0, 1) | {"images": ["dev/0.png", 5]}, "wrong image"),
    "outside": (record(0, 1) | {"images": ["dev/0.png", "../x.png"]}, "forbidden image path"),
    "no sentence": ({k: v for k, v in record(0, 1).items() if k != "sentence"}, "wrong sentence"),
    "empty sentence": (record(0, 1, "  "), "empty sentence"),
    "no label": ({k: v for k, v in record(0, 1).items() if k != "label"}, "wrong label"),
    "other label": (record(0, 1, label="true"), "wrong label"),
    "number as label": (record(0, 1, label=1), "wrong label"),
    "list as label": (record(0, 1, label=["True"]), "wrong label"),
    "a list": ([1], "not an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records(folder, case):
    broken, reason = BROKEN[case]
    path = write(folder, "train.json", [record(1, 2), broken, record(2, 3)])
    message = refusal(read_nlvr, path)
    assert message.startswith(f"{path}, record 2: {reason}: ") and message.endswith("or pass --skip-broken")
    data = read_nlvr(path, skip_broken=True)
    assert data.reasons == {reason: 1} and data.samples == 2 and shades(data) == [1, 2, 3]


def test_a_broken_image_takes_its_pairs_along(folder):
    path = write(folder, "train.json", [record(0, 1), record(2, 1), record(2, 3, "y"), record(3, 4, "z", "False")])
    (folder / "dev" / "1.png").write_bytes(b"no image")
    data = read_nlvr(path)
    assert "record 1: broken image" in refusal(check_images, data)
    kept = check_images(data, skip_broken=True)
    assert kept.reasons == {"broken image": 1} and kept.samples == 2
    assert [(shades(kept)[p.left], shades(kept)[p.right], p.sentence) for p in kept.pairs] == [(2, 3, "y"), (3, 4, "z")]


def test_sources(folder):
    train = write(folder, "nlvr_train.json", [record(0, 1), record(4, 2)])
    test = write(folder, "nlvr_dev.json", [record(5, 3)])
    write(folder, "captions_train.json", [{"image": "dev/0.png", "caption": "a"}])  # of another task
    for source in (str(folder), f"{train},{test}"):
        assert shades(open_data("nlvr", source, "train")) == [0, 1, 4, 2]
        assert shades(open_data("nlvr", source, "test")) == [5, 3]
    assert shades(open_data("nlvr", str(train), "train", limit=1)) == [0, 1]
    assert shades(open_data("nlvr", str(test), "test")) == [5, 3]
    with pytest.raises(MissingSplitError):
        open_data("nlvr", str(train), "test")
    with pytest.raises(MissingSplitError):
        open_data("nlvr", str(test), "train")
    assert "sentences about two images" in refusal(open_data, "nlvr", str(folder / "dev"), "test")
    assert "wrong images" in refusal(open_data, "nlvr", str(folder / "captions_train.json"), "train")


def test_keep_renumbers():
    pairs = [Pair(0, 1, "a", True), Pair(1, 2, "b", False), Pair(2, 0, "c", True)]
    data = NlvrData("made", ["x", "y", "z"], pairs)
    kept = data.keep([2, 1])
    assert kept.images == ["z", "y"] and kept.pairs == [Pair(1, 0, "b", False)]


# --- scenes -----------------------------------------------------------------------------------------------------------


def truth(pair: Pair, split: str) -> bool:
    """Judge a sentence by what the scenes hold, from its words alone."""
    scenes = {"left": scene(split, pair.left), "right": scene(split, pair.right)}
    side = re.search(r"the (left|right) picture", pair.sentence)[1]
    there, other = scenes[side], scenes["right" if side == "left" else "left"]
    if found := re.fullmatch(r"the \w+ picture is of (.*)", pair.sentence):
        told = found[1]
        if " alone " in told or told.startswith("only "):
            return told in there.captions
        order = re.split(r" (left of|right of|above|below) ", told)
        names = order[::2] if order[1] in ("left of", "above") else order[::-2]
        layout = "row" if order[1] in ("left of", "right of") else "column"
        present = [f"a {item}" for item in there.items]
        places = [present.index(name) if name in present else -1 for name in names]
        return layout == there.layout and -1 not in places and places == sorted(places)
    if not (found := re.fullmatch(r"there is an? (\w+)(?: object)? only in the \w+ picture", pair.sentence)):
        color, shape = re.fullmatch(r"there is an? (\w+) (\w+) in the \w+ picture", pair.sentence).groups()
        return any((item.color, item.shape) == (color, shape) for item in there.items)
    word = found[1]
    attribute = "color" if word in COLORS else "shape"
    assert word in COLORS or word in SHAPES
    here, elsewhere = (any(getattr(item, attribute) == word for item in s.items) for s in (there, other))
    return here and not elsewhere


@pytest.mark.parametrize(("split", "n"), [("train", 1500), ("test", 400)])
def test_sentences_about_scenes_are_labelled_rightly(split, n):
    data = scenes_nlvr(split, n)
    assert data.samples == n and len(data.images) == 2 * n
    for pair in data.pairs:
        assert truth(pair, split) == pair.label, (pair, scene(split, pair.left), scene(split, pair.right))


def test_words_tell_nothing():
    votes = defaultdict(list)
    for pair in scenes_nlvr("train", 3000).pairs:
        for word in {*pair.sentence.split(), " ".join(pair.sentence.split()[:2]), ""}:
            votes[word].append(pair.label)
        assert all(word in VOCABULARY for word in pair.sentence.split())
    assert len(votes[""]) == 3000
    for word, labels in votes.items():
        if len(labels) > 100:
            assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(len(labels)), word


def test_both_pictures_matter():
    """Half of the sentences change their truth, or say something else, when one picture is exchanged."""
    flipped = 0
    pairs = scenes_nlvr("train", 600).pairs
    for pair, after in zip(pairs, pairs[1:], strict=False):
        for other in (Pair(after.left, pair.right, pair.sentence, pair.label),
                      Pair(pair.left, after.right, pair.sentence, pair.label)):  # fmt: skip
            flipped += truth(other, "train") != pair.label
    assert flipped > 0.25 * len(pairs)


def test_scenes_are_always_the_same():
    data, longer = scenes_nlvr("test", 20), scenes_nlvr("test", 40)
    assert data.pairs == longer.pairs[:20] == open_data("nlvr", "scenes", "test", limit=20).pairs
    assert data.pairs != scenes_nlvr("train", 20).pairs
    assert all((pair.left, pair.right) == (2 * i, 2 * i + 1) for i, pair in enumerate(data.pairs))
    assert data.images[3].size == (64, 64) and check_images(data) is data
