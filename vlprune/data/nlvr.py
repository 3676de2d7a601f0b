"""Sentences about two images: reader of BLIP's NLVR2 JSON, and sentences about drawn scenes.

    [{"images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"], "sentence": "...", "label": "True"}, ...]

Image paths are relative to the folder of the file; the first image is the left one. All splits have the same form: the
name of the file tells which it is. Labels may be `true` and `false`, too; fields not named here are ignored.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from vlprune.data.images import ImageFiles
from vlprune.data.records import BrokenRecordError, ImageFinder, read_records, sift, text
from vlprune.data.scenes import COLORS, SHAPES, SIZES, Item, Scene, SceneImages, scene
from vlprune.data.sets import NlvrData, Pair


MAX_LENGTH = 64  # tokens of a sentence; BLIP's authors cut sentences to 40 words
_LABELS = {"True": True, "False": False, True: True, False: False}


def read_nlvr(
    path: Path, skip_broken: bool = False, name: str | None = None, records: list[Any] | None = None
) -> NlvrData:
    """Read an NLVR2 JSON.

    Args:
        path: the file.
        skip_broken: leave broken records out and count them.
        name: name of the data set; the file's when not given.
        records: the content of the file if it has been read.

    Returns:
        NlvrData: the sentences in order; their images exist but have not been decoded.

    Raises:
        RequestError: the file or one of its records is broken.
    """
    find = ImageFinder(path.parent)
    records = read_records(path) if records is None else records

    def parse(number: int, record: dict[str, Any]) -> tuple[int, list[tuple[str, Path]], str, bool]:
        images, label = record.get("images"), record.get("label")
        if not isinstance(images, list) or len(images) != 2:
            raise BrokenRecordError("wrong images", f"{short(images)} is no list of two images")
        if not isinstance(label, bool | str) or label not in _LABELS:
            raise BrokenRecordError("wrong label", f"{short(label)} is neither True nor False")
        return number, [find(image) for image in images], text(record.get("sentence"), "sentence"), _LABELS[label]

    rows, reasons = sift(path, records, parse, skip_broken)
    place: dict[str, int] = {}
    paths: list[Path] = []
    numbers: list[int] = []
    pairs: list[Pair] = []
    for number, images, sentence, label in rows:
        for image, file in images:
            if image not in place:
                place[image] = len(paths)
                paths.append(file)
                numbers.append(number)
        left, right = (place[image] for image, _ in images)
        pairs.append(Pair(left, right, sentence, label))
    return NlvrData(name or path.stem, ImageFiles(path, paths, numbers), pairs, reasons)


def is_nlvr_record(record: Any) -> bool:
    """Tell whether a record looks like one of this module's, broken or not.

    Args:
        record: anything read from JSON.

    Returns:
        bool: True when it has a sentence.
    """
    return isinstance(record, dict) and "sentence" in record


# --- drawn scenes -----------------------------------------------------------------------------------------------------
#
# Truth and kind of a sentence are drawn first, words then until they fit, so that as many sentences are true as false
# whatever their words. False ones are true of the other picture, of the pictures exchanged, or nearly true: neither the
# sentence alone nor one of the pictures will do.

_SIDES = ("left", "right")
_SEED = 20240608
_TRIES = 200  # for words that fit; two pictures that do not differ in colour have none of that kind
_CHOICES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}


def scenes_nlvr(split: str, n: int) -> NlvrData:
    """Give sentences about pairs of scenes, the first pair being the first two scenes of the split.

    Args:
        split: "train" or "test".
        n: number of pairs, one sentence each.

    Returns:
        NlvrData: half of the sentences are true.
    """
    return NlvrData("scenes", SceneImages(split, 2 * n), [_pair(split, index) for index in range(n)])


def _pair(split: str, index: int) -> Pair:
    scenes = [scene(split, 2 * index), scene(split, 2 * index + 1)]
    rng = np.random.default_rng([_SEED, len(split), index])
    label = bool(rng.integers(2))
    while True:
        kind = _SENTENCES[rng.integers(len(_SENTENCES))]
        for _ in range(_TRIES):
            side = int(rng.integers(2))
            if sentence := kind(rng, scenes[side], scenes[1 - side], _SIDES[side], label):
                return Pair(2 * index, 2 * index + 1, sentence, label)


def _caption(rng: np.random.Generator, there: Scene, other: Scene, side: str, label: bool) -> str | None:
    """All that is in one picture; false: it is in the other, in the reverse order, or one object is not like that."""
    told = there
    if not label:
        place = int(rng.integers(len(there.items)))
        changed = _altered(rng, there.items[place], ("size", "color", "shape"))
        items = (*there.items[:place], changed, *there.items[place + 1 :])
        told = (other, replace(there, items=there.items[::-1]), replace(there, items=items))[rng.integers(3)]
        kinds = {(item.color, item.shape) for item in told.items}
        if len(kinds) < len(told.items) or _shows(there, told):
            return None
    return f"the {side} picture is of {told.captions[rng.integers(2)]}"


def _presence(rng: np.random.Generator, there: Scene, other: Scene, side: str, label: bool) -> str | None:
    """One object that is in one picture; false: it is in the other, or it is not like that."""
    item = there.items[rng.integers(len(there.items))]
    if not label:
        strange = other.items[rng.integers(len(other.items))]
        item = (strange, _altered(rng, item, ("color", "shape")))[rng.integers(2)]
        if any((item.color, item.shape) == (known.color, known.shape) for known in there.items):
            return None
    return f"there is {_article(item.color)} {item.color} {item.shape} in the {side} picture"


def _only_color(rng: np.random.Generator, there: Scene, other: Scene, side: str, label: bool) -> str | None:
    word = _only(rng, there, other, "color", label)
    return word and f"there is {_article(word)} {word} object only in the {side} picture"


def _only_shape(rng: np.random.Generator, there: Scene, other: Scene, side: str, label: bool) -> str | None:
    word = _only(rng, there, other, "shape", label)
    return word and f"there is {_article(word)} {word} only in the {side} picture"


def _only(rng: np.random.Generator, there: Scene, other: Scene, attribute: str, label: bool) -> str | None:
    """A word for an object that is in one picture and not in the other; false: in both, in the other, in neither."""
    word = _word(rng, attribute)
    here, elsewhere = (any(getattr(item, attribute) == word for item in s.items) for s in (there, other))
    rare = here or elsewhere or not rng.integers(4)  # most words are true of neither picture: too easy
    return word if label == (here and not elsewhere) and rare else None


_SENTENCES = (_caption, _presence, _only_color, _only_shape)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _altered(rng: np.random.Generator, item: Item, attributes: Sequence[str]) -> Item:
    """Change size, colour or shape of an object."""
    attribute = attributes[int(rng.integers(len(attributes)))]
    changed: dict[str, Any] = {attribute: _word(rng, attribute)}
    return replace(item, **changed)


def _word(rng: np.random.Generator, attribute: str) -> str:
    return _CHOICES[attribute][rng.integers(len(_CHOICES[attribute]))]


def _shows(there: Scene, told: Scene) -> bool:
    """Whether a scene's caption is true of another: of three objects in a row, each two are in a row."""
    present = iter(str(item) for item in there.items)
    return told.layout == there.layout and all(str(item) in present for item in told.items)
