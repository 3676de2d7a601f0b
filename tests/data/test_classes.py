"""Images by class: what a good folder gives, and the one line that each broken one gives."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlprune.data import ClassData, check_images, match_labels, open_data, open_images
from vlprune.data.classes import read_classes
from vlprune.data.scenes import CLASSES, SIZES, TEMPLATES, scene, single
from vlprune.errors import RequestError


def draw(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (grey,) * 3).save(path)


def greys(data):
    return [int(np.asarray(image)[0, 0, 0]) for image in data.images]


def refusal(function, *args, **options):
    with pytest.raises(RequestError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture
def folder(tmp_path):
    """Two classes: three and one images to train, one and two to test; grey levels tell them apart."""
    root = tmp_path / "pets"
    for place, grey in enumerate((10, 11, 12)):
        draw(root / "train" / "n1_cat" / f"{place}.PNG", grey)
    draw(root / "train" / "n2_dog" / "a.jpeg", 20)
    draw(root / "test" / "n1_cat" / "x.png", 110)
    draw(root / "test" / "n2_dog" / "y.png", 120)
    draw(root / "test" / "n2_dog" / "deep" / "er" / "z.png", 121)
    return root


@pytest.fixture
def flat(tmp_path):
    for place, name in enumerate(("cat", "dog")):
        draw(tmp_path / "flat" / name / "0.png", 10 * place)
    return tmp_path / "flat"


# Good folders.


def test_both_splits_of_a_folder(folder):
    train, test = (open_data("classification", str(folder), split) for split in ("train", "test"))
    assert isinstance(train, ClassData) and train.name == test.name == "pets"
    assert train.classes == test.classes == ["n1 cat", "n2 dog"]
    assert (greys(train), train.labels) == ([10, 20, 11, 12], [0, 1, 0, 0])  # classes take turns
    assert (sorted(greys(test)), sorted(test.labels)) == ([110, 120, 121], [0, 1, 1])
    assert train.skipped == 0 and train.templates == ()


def test_a_limit_leaves_images_of_all_classes(folder):
    assert open_data("zero-shot", str(folder), "train", limit=2).labels == [0, 1]
    assert open_data("zero-shot", str(folder), "train", limit=9).labels == [0, 1, 0, 0]


def test_keep_takes_labels_along_and_leaves_the_classes(folder):
    kept = open_data("classification", str(folder), "train").keep([2, 0])
    assert (greys(kept), kept.labels, kept.classes) == ([11, 10], [0, 0], ["n1 cat", "n2 dog"])


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_other_names_of_the_test_split(folder, name):
    (folder / "test").rename(folder / name)
    assert len(open_data("classification", str(folder), "test").images) == 3


def test_a_test_folder_without_classes_gives_way_to_val(folder):
    """ImageNet's layout."""
    (folder / "test").rename(folder / "val")
    draw(folder / "test" / "unlabelled.png", 5)
    assert sorted(greys(open_data("classification", str(folder), "test"))) == [110, 120, 121]


def test_one_split_is_for_scoring(flat):
    data = open_data("zero-shot", str(flat), "test")
    assert (greys(data), data.labels, data.classes) == ([0, 10], [0, 1], ["cat", "dog"])
    assert "one split only" in refusal(open_data, "classification", str(flat), "train")


def test_a_class_may_be_called_train(flat):
    draw(flat / "train" / "ice.png", 30)
    assert open_data("classification", str(flat), "test").classes == ["cat", "dog", "train"]


def test_a_pair_of_folders(folder):
    pair = f"{folder / 'train'},{folder / 'test'}"
    train, test = (open_data("classification", pair, split) for split in ("train", "test"))
    assert (greys(train), sorted(greys(test))) == ([10, 20, 11, 12], [110, 120, 121])
    assert train.classes == test.classes


def test_the_test_split_may_lack_classes(folder):
    draw(folder / "train" / "n0_ant" / "0.png", 1)
    test = open_data("classification", str(folder), "test")
    assert test.classes == ["n0 ant", "n1 cat", "n2 dog"] and set(test.labels) == {1, 2}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.txt", "tabby cat\nsheep dog\n"),
        ("classes.json", json.dumps(["tabby cat", "sheep dog"])),
        ("classes.json", json.dumps({"n2_dog": "sheep dog", "n1_cat": "tabby cat", "n9": "more"})),
    ],
)
def test_readable_names(folder, file, content):
    (folder / file).write_text(content)
    assert open_data("zero-shot", str(folder), "test").classes == ["tabby cat", "sheep dog"]


def test_own_templates(folder):
    (folder / "templates.txt").write_text("a drawing of a {}.\nthe {}\n")
    assert open_data("zero-shot", str(folder), "test").templates == ("a drawing of a {}.", "the {}")


def test_other_files_are_no_images(folder):
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (folder / "train" / "n1_cat" / name).write_text("x")
    (folder / "train" / ".cache").mkdir()
    assert len(open_data("classification", str(folder), "train").images) == 4


# Images to calibrate with.


def test_calibration_reads_the_train_split_or_any_images(folder, flat, tmp_path, photos):
    assert greys(open_images(str(folder))) == [10, 20, 11, 12]
    assert greys(open_images(str(flat), limit=1)) == [0]
    for place in range(3):
        draw(tmp_path / "loose" / f"{place}.png", place)
    loose = open_images(str(tmp_path / "loose"))
    assert (greys(loose), loose.classes) == ([0, 1, 2], ["loose"])
    assert len(open_images(str(photos)).captions) == 8  # annotated: the images to train on
    assert len(open_images("scenes", limit=5).captions) == 5


# Broken ones: refused, or left out and counted.


def broken(folder, skip=False):
    return check_images(open_data("classification", str(folder), "train", skip), skip)


def test_broken_image(folder):
    (folder / "train" / "n1_cat" / "0.PNG").write_bytes(b"no image")
    message = refusal(broken, folder)
    assert "broken image" in message and "0.PNG" in message and "--skip-broken" in message and "record" not in message
    data = broken(folder, skip=True)
    assert (greys(data), data.reasons) == ([20, 11, 12], {"broken image": 1})


def test_missing_image(folder):
    (folder / "train" / "n1_cat" / "9.png").symlink_to("nowhere.png")
    assert "missing image" in refusal(broken, folder)
    assert broken(folder, skip=True).reasons == {"missing image": 1}


def test_image_outside_the_folder(folder, tmp_path):
    draw(tmp_path / "secret.png", 99)
    (folder / "train" / "n1_cat" / "9.png").symlink_to(tmp_path / "secret.png")
    assert "leads out of" in refusal(broken, folder)
    assert broken(folder, skip=True).reasons == {"forbidden image path": 1}
    assert 99 not in greys(broken(folder, skip=True))


def test_empty_class(folder):
    (folder / "train" / "n3_eel").mkdir()
    message = refusal(broken, folder)
    assert "empty class" in message and "n3_eel" in message
    data = broken(folder, skip=True)
    assert data.reasons == {"empty class": 1} and data.classes == ["n1 cat", "n2 dog", "n3 eel"]


def test_class_unknown_in_train(folder):
    draw(folder / "test" / "n3_eel" / "0.png", 1)
    draw(folder / "test" / "n3_eel" / "1.png", 1)
    message = refusal(open_data, "classification", str(folder), "test")
    assert "unknown class" in message and "n3_eel" in message and str(folder / "train") in message
    data = open_data("classification", str(folder), "test", skip_broken=True)
    assert data.reasons == {"unknown class": 2} and data.classes == ["n1 cat", "n2 dog"]


def test_nothing_left(tmp_path):
    (tmp_path / "a").mkdir()
    assert "empty class" in refusal(open_data, "zero-shot", str(tmp_path), "test")
    assert "no usable image (1 skipped: 1 empty class)" in refusal(open_data, "zero-shot", str(tmp_path), "test", True)


def test_missing_split(folder, tmp_path):
    (folder / "test").rename(tmp_path / "elsewhere")
    assert "no test/<class>/" in refusal(open_data, "classification", str(folder), "test")
    (folder / "train").rename(folder / "val")
    assert "no train/<class>/" in refusal(open_data, "classification", str(folder), "train")


def test_no_such_source(tmp_path, photos):
    assert "no file or folder" in refusal(open_data, "zero-shot", str(tmp_path / "nowhere"), "test")
    assert "no folder of images by class" in refusal(open_data, "zero-shot", str(photos / "captions.jsonl"), "test")
    assert "no folders of classes" in refusal(open_data, "zero-shot", str(photos), "test")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("classes.txt", "cat\n", "1 names for 2 class folders"),
        ("classes.txt", "\ndog\n", "name 1: empty name"),
        ("classes.txt", b"\xff\xfe", "not UTF-8"),
        ("classes.json", "{", "not valid JSON"),
        ("classes.json", "3", "give a list of names"),
        ("classes.json", '["cat", 3]', "is no text"),
        ("classes.json", '{"n1_cat": "cat"}', "does not name the class 'n2_dog'"),
        ("templates.txt", "a photo\n", "must hold {} once"),
        ("templates.txt", "{} and {}\n", "must hold {} once"),
        ("templates.txt", "", "is empty"),
    ],
)
def test_broken_names(folder, file, content, said):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(open_data, "zero-shot", str(folder), "test")


def test_unreadable_folder(folder, open_folder, ordinary_user):
    shutil.copytree(folder, open_folder / "pets")
    (open_folder / "pets" / "train").chmod(0)
    with ordinary_user():
        assert "cannot read" in refusal(read_classes, open_folder / "pets", "train")


# Which label of a model a class is.


def labelled(*classes):
    return ClassData("data", [], [], list(classes))


def test_labels_match_by_name():
    labels = ["tench, Tinca tinca", "goldfish", "great_white shark"]
    assert match_labels(labels, labelled("Great white  shark", "tinca tinca")) == [2, 0]
    assert match_labels(labels, labelled("goldfish", "tench", "great white shark")) == [1, 0, 2]


def test_labels_match_by_order_where_names_tell_nothing():
    assert match_labels(["LABEL_0", "LABEL_1"], labelled("cat", "dog")) == [0, 1]
    assert match_labels(["crane", "crane", "cat"], labelled("crane", "crane", "cat")) == [0, 1, 2]
    assert match_labels(["cat", "kite"], labelled("cat", "red kite")) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["a", "b", "c"], ["a", "x"]),  # unknown
        (["a", "b"], ["b", "x"]),  # as many, but b is not the first
        (["crane", "crane", "b"], ["crane"]),  # which?
        (["a, one", "b"], ["a", "one"]),  # twice the same
    ],
)
def test_labels_that_do_not_match(labels, classes):
    assert "is none of them" in refusal(match_labels, labels, labelled(*classes))


# The embedded scenes.


def test_scenes_have_all_classes_in_turns():
    data = open_data("zero-shot", "scenes", "test")
    assert len(data.images) == 500 and data.classes == list(CLASSES) and len(set(CLASSES)) == 48
    assert max(Counter(data.labels).values()) - min(Counter(data.labels).values()) == 1
    assert data.templates == TEMPLATES and len(TEMPLATES) == 10
    for index in (0, 7, 61):
        (item,) = single("test", index).items
        assert f"{item.color} {item.shape}" == data.classes[data.labels[index]]
        assert data.images[index].tobytes() == single("test", index).draw().tobytes()
    assert open_data("classification", "scenes", "train", limit=3).labels == [0, 1, 2]


def test_scenes_to_test_look_like_none_to_train():
    captions = {split: {single(split, i).captions[0] for i in range(3000)} for split in ("train", "test")}
    assert not captions["train"] & captions["test"]
    ways = len(SIZES) * 5 * len(CLASSES)
    assert len(captions["train"] | captions["test"]) == ways  # all there are
    test_captions = {c for c in (scene("test", i).captions[0] for i in range(300)) if "alone" in c}
    assert test_captions <= captions["test"]


def test_scenes_stay_as_they_are():
    """Figures are measured on them."""
    assert [single(split, 5).captions[0] for split in ("train", "test")] == [
        "a small red star alone at the top",
        "a small red star alone on the left",
    ]
