"""Reading caption and VQA annotations: what good files give, and the one line that each broken one gives."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlprune.data import CaptionData, VqaData, check_images, open_calibration, open_data, skipped_text
from vlprune.data.captions import read_captions
from vlprune.data.vqa import read_vqa
from vlprune.errors import RequestError


SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    """Six images, each of one grey level."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 10), (40 * i,) * 3).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write(folder, name, records):
    path = folder / name
    path.write_text(json.dumps(records) if isinstance(records, list) else records, encoding="utf-8")
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def caption(i, text="a dog"):
    return {"image": f"images/{i}.png", "caption": text, "image_id": f"x_{i}"}


def question(i, identifier=0, answer="dog"):
    return {
        "question_id": identifier,
        "question": "what is it?",
        "answer": answer,
        "image": f"images/{i}.png",
        "dataset": "vqa",
    }


def shades(data):
    return [np.asarray(image)[0, 0, 0] // 40 for image in data.images]


def refusal(function, *args, **options):
    with pytest.raises(RequestError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


# Good files.


def test_train_form_joins_the_captions_of_an_image(folder):
    path = write(folder, "train.json", [caption(3, "one"), caption(1, " two "), caption(3, "three")])
    data = read_captions(path)
    assert isinstance(data, CaptionData) and data.name == "train"
    assert data.captions == [["one", "three"], ["two"]]
    assert shades(data) == [3, 1]
    assert data.skipped == 0 and data.reasons == {}


def test_test_form_keeps_one_list_per_image(folder):
    path = write(folder, "test.json", [{"image": "./images/2.png", "caption": ["a", "b"]}, caption(0, ["c"])])
    data = read_captions(path)
    assert data.captions == [["a", "b"], ["c"]] and shades(data) == [2, 0]


def test_vqa_questions_point_to_their_images(folder):
    records = [question(4, 0, ["dog", "dog", "cat"]), question(2, 1), question(4, 2)]
    data = read_vqa(write(folder, "vqa_train.json", records))
    assert isinstance(data, VqaData)
    assert shades(data) == [4, 2]
    assert [(q.image, q.question, q.answers) for q in data.questions] == [
        (0, "what is it?", ["dog", "dog", "cat"]),
        (1, "what is it?", ["dog"]),
        (0, "what is it?", ["dog"]),
    ]
    assert data.answer_list is None
    write(folder, "answer_list.json", ["dog", "cat"])
    assert read_vqa(folder / "vqa_train.json").answer_list == ["dog", "cat"]


def test_question_ids_may_repeat_in_another_dataset_or_be_absent(folder):
    other = question(1) | {"dataset": "vg"}
    bare = {key: value for key, value in question(2).items() if key != "question_id"}
    assert len(read_vqa(write(folder, "q.json", [question(0), other, bare, bare])).questions) == 4


def test_json_lines_in_both_spellings(folder):
    records = lines({"image": "images/0.png", "caption": "a"}, {"file_name": "images/1.png", "captions": ["b", "c"]})
    data = read_captions(write(folder, "captions.jsonl", records + "\n"))
    assert data.captions == [["a"], ["b", "c"]] and shades(data) == [0, 1]


def test_json_lines_split_by_field(folder):
    records = [caption(i) | {"split": "test" if i in (1, 4) else "train"} for i in range(6)]
    write(folder, "captions.jsonl", lines(*records))
    assert shades(open_data("retrieval", str(folder), "test")) == [1, 4]
    assert shades(open_data("retrieval", str(folder), "train")) == [0, 2, 3, 5]
    assert shades(open_calibration(str(folder))) == [0, 2, 3, 5]
    assert shades(open_data("captioning", str(folder / "captions.jsonl"), "test")) == [1, 4]


def test_json_lines_split_by_hash_when_no_field_tells(tmp_path):
    image = Image.new("RGB", (1, 1))
    for i in range(300):
        image.save(tmp_path / f"{i}.png")
    records = [{"image": f"{i}.png", "caption": text} for text in ("a", "b") for i in range(300)]
    write(tmp_path, "captions.jsonl", lines(*records))
    train, test = (open_data("retrieval", str(tmp_path), split) for split in ("train", "test"))
    names = [{path.name for path in data.images.paths} for data in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 300
    assert 15 <= len(names[1]) <= 45
    assert all(texts == ["a", "b"] for texts in train.captions + test.captions)
    # Which images are test images depends on their names only.
    write(tmp_path, "captions.jsonl", lines(*reversed(records[:200])))
    fewer = {path.name for path in open_data("retrieval", str(tmp_path), "test").images.paths}
    assert fewer == {name for name in names[1] if int(name.split(".")[0]) < 200}


# Sources.


def test_folder_takes_the_file_of_the_split_and_the_kind(folder):
    write(folder, "retrieval_train2014.json", [caption(0)])
    write(folder, "retrieval_Val.json", [caption(1, ["x"])])
    write(folder, "vqa_train.json", [question(2, answer=["dog"])])
    write(folder, "vqa_val.json", [question(3)])
    write(folder, "vqa_test.json", [question(4)])
    write(folder, "answer_list.json", ["dog"])
    assert shades(open_data("retrieval", str(folder), "train")) == [0]
    assert shades(open_data("captioning", str(folder), "test")) == [1]
    assert shades(open_data("vqa", str(folder), "train")) == [2]
    assert shades(open_data("vqa", str(folder), "test")) == [4]
    assert open_data("vqa", str(folder), "test").answer_list == ["dog"]
    assert open_data("vqa", str(folder), "test").name == folder.name


def test_folder_with_two_files_for_a_split(folder):
    write(folder, "a_train.json", [caption(0)])
    write(folder, "b_train.json", [caption(0)])
    message = refusal(open_data, "retrieval", str(folder), "train")
    assert "a_train.json and b_train.json" in message and "TRAIN.json,TEST.json" in message


def test_folder_without_what_is_asked_for(folder):
    write(folder, "vqa_train.json", [question(0)])
    message = refusal(open_data, "retrieval", str(folder), "train")
    assert "no file of captions for the train split" in message and "captions.jsonl" in message
    assert "no file of questions for the test split" in refusal(open_data, "vqa", str(folder), "test")


def test_pair_of_files_of_any_form(folder):
    train = write(folder, "a.json", [caption(0, ["x", "y"])])
    test = write(folder, "b.json", [caption(1)])
    source = f"{train},{test}"
    assert shades(open_data("retrieval", source, "train")) == [0]
    assert shades(open_data("retrieval", source, "test")) == [1]
    assert shades(open_calibration(source)) == [0]
    questions = f"{write(folder, 'q.json', [question(2)])}, {write(folder, 'r.json', [question(3)])}"
    assert shades(open_data("vqa", questions, "test")) == [3]
    assert "there is no file or folder c.json" in refusal(open_data, "retrieval", f"{train},c.json", "test")
    assert "names 3 files" in refusal(open_data, "retrieval", f"{train},{test},{test}", "test")
    assert "TRAIN.json,TEST.json" in refusal(open_data, "retrieval", f"{train},", "test")


def test_one_file_serves_the_split_of_its_form(folder):
    train = str(write(folder, "a.json", [caption(0)]))
    test = str(write(folder, "b.json", [caption(1, ["x", "y"])]))
    assert shades(open_data("retrieval", train, "train")) == [0]
    assert shades(open_data("retrieval", test, "test")) == [1]
    assert "the train split is missing" in refusal(open_data, "retrieval", test, "train")
    assert "the test split is missing" in refusal(open_data, "retrieval", train, "test")
    assert shades(open_calibration(train)) == [0]
    assert shades(open_calibration(test)) == [1]
    vqa = str(write(folder, "c.json", [question(2, answer=["dog"])]))
    assert shades(open_data("vqa", vqa, "train")) == [2]
    assert "the test split is missing" in refusal(open_data, "vqa", vqa, "test")


def test_captions_and_questions_are_not_mistaken(folder):
    captions = str(write(folder, "a.json", [caption(0)]))
    questions = str(write(folder, "b.json", [question(0)]))
    assert "holds questions, but captions are needed" in refusal(open_data, "retrieval", questions, "test")
    assert "holds questions, but captions are needed" in refusal(open_calibration, questions)
    assert "holds captions, but questions are needed" in refusal(open_data, "vqa", captions, "train")


def test_embedded_scenes_as_a_source():
    assert len(open_data("retrieval", "scenes", "test").images) == 500
    assert len(open_data("vqa", "scenes", "test").images) == 500
    assert len(open_data("captioning", "scenes", "train", limit=30).captions) == 30
    assert len(open_data("vqa", "scenes", "train", limit=30).questions) == 30
    assert len(open_calibration("scenes", limit=7).images) == 7
    data = open_data("vqa", "scenes", "test", limit=9)
    assert check_images(data) is data


def test_limit_takes_the_first(folder):
    captions = str(write(folder, "a.json", [caption(i) for i in (5, 4, 3)] + [caption(5, "again")]))
    assert open_data("retrieval", captions, "train", limit=2).captions == [["a dog", "again"], ["a dog"]]
    assert shades(open_calibration(captions, limit=1)) == [5]
    assert len(open_data("retrieval", captions, "train", limit=99).images) == 3
    questions = str(write(folder, "b.json", [question(i, n) for n, i in enumerate((3, 1, 3, 2))]))
    data = open_data("vqa", questions, "test", limit=3)
    assert shades(data) == [3, 1] and [q.image for q in data.questions] == [0, 1, 0]
    assert "at least 1" in refusal(open_data, "vqa", questions, "test", limit=0)


def test_wrong_requests(folder):
    assert "choose from retrieval, captioning, vqa" in refusal(open_data, "segmentation", str(folder), "train")
    assert "choose train or test" in refusal(open_data, "vqa", str(folder), "val")
    assert "there is no file or folder" in refusal(open_data, "vqa", str(folder / "nothing"), "train")
    assert "there is no file or folder" in refusal(open_calibration, str(folder / "nothing"))


# Broken files.

BROKEN_FILES = {
    "empty": ("", "is empty"),
    "no JSON": ("[{", "is not valid JSON"),
    "no list": ('{"image": 1}', "holds no list of records"),
    "no records": ("[]", "holds no records"),
    "deep": ("[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("reader", [read_captions, read_vqa])
@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_file(folder, reader, case):
    content, expected = BROKEN_FILES[case]
    path = write(folder, "train.json", content)
    for skip in (False, True):
        message = refusal(reader, path, skip_broken=skip)
        assert message.count(str(path)) == 1 and expected in message


def test_unreadable_file(folder):
    (folder / "bytes.json").write_bytes(b'["\xff\xfe"]')
    assert "not UTF-8" in refusal(read_captions, folder / "bytes.json")
    assert "cannot read" in refusal(read_captions, folder / "nothing.json")
    (folder / "captions.jsonl").write_bytes(b"\xff")
    assert "not UTF-8" in refusal(read_captions, folder / "captions.jsonl")


def test_broken_line_is_named(folder):
    path = write(folder, "captions.jsonl", lines(caption(0)) + "\n{broken\n")
    assert f"{path}, record 3: not valid JSON" in refusal(read_captions, path)
    assert "holds no records" in refusal(read_captions, write(folder, "captions.jsonl", "\n\n"))


def test_line_numbers_count_empty_lines(folder):
    path = write(folder, "captions.jsonl", "\n\n" + lines(caption(0, "")))
    assert f"{path}, record 3: empty caption" in refusal(read_captions, path)


BROKEN_CAPTIONS = {
    "missing image": (caption(77), "missing image"),
    "folder as image": (caption(0) | {"image": "images"}, "missing image"),
    "no image field": ({"caption": "a"}, "wrong image"),
    "image of another type": (caption(0) | {"image": ["images/0.png"]}, "wrong image"),
    "null byte": (caption(0) | {"image": "images/0.png\0"}, "missing image"),
    "long name": (caption(0) | {"image": "x" * 5000}, "missing image"),
    "empty caption": (caption(0, ""), "empty caption"),
    "blank caption": (caption(0, " \n"), "empty caption"),
    "blank among captions": (caption(0, ["a", " "]), "empty caption"),
    "null among captions": (caption(0, ["a", None]), "empty caption"),
    "no captions": (caption(0, []), "empty caption"),
    "caption is null": (caption(0, None), "wrong caption"),
    "caption is a number": (caption(0, 5), "wrong caption"),
    "number among captions": (caption(0, ["a", 5]), "wrong caption"),
    "lone surrogate": (caption(0, "a \ud800 b"), "wrong caption"),
    "no caption field": ({"image": "images/0.png"}, "wrong caption"),
    "control characters": (caption(0) | {"image": "a\n\x1b[31mb.png"}, "missing image"),
    "a list": ([1], "not an object"),
    "null": (None, "not an object"),
    "parent folder": (caption(0) | {"image": "../secret.png"}, "forbidden image path"),
    "parent folder inside": (caption(0) | {"image": "images/../../secret.png"}, "forbidden image path"),
    "absolute path": (caption(0) | {"image": "/etc/hostname"}, "forbidden image path"),
}


@pytest.mark.parametrize("case", BROKEN_CAPTIONS)
def test_broken_caption_record(folder, case):
    broken, reason = BROKEN_CAPTIONS[case]
    path = write(folder, "train.json", [caption(1), broken, caption(2)])
    message = refusal(read_captions, path)
    assert message.startswith(f"{path}, record 2: {reason}: ") and message.endswith("or pass --skip-broken")
    assert len(message) < 600 or case == "long name"
    data = read_captions(path, skip_broken=True)
    assert data.skipped == 1 and data.reasons == {reason: 1}
    assert shades(data) == [1, 2]


BROKEN_QUESTIONS = {
    "missing image": (question(77, 9), "missing image"),
    "empty question": (question(0, 9) | {"question": ""}, "empty question"),
    "question of another type": (question(0, 9) | {"question": ["what?"]}, "wrong question"),
    "no answer": ({k: v for k, v in question(0, 9).items() if k != "answer"}, "wrong answer"),
    "empty answer": (question(0, 9, ""), "empty answer"),
    "no answers": (question(0, 9, []), "empty answer"),
    "answer of another type": (question(0, 9, {"dog": 1}), "wrong answer"),
    "duplicate id": (question(0, 1), "duplicate question_id"),
    "id of another type": (question(0, [9]), "wrong question_id"),
    "a text": ("what is it?", "not an object"),
}


@pytest.mark.parametrize("case", BROKEN_QUESTIONS)
def test_broken_question_record(folder, case):
    broken, reason = BROKEN_QUESTIONS[case]
    path = write(folder, "train.json", [question(1, 1), broken, question(2, 2)])
    assert refusal(read_vqa, path).startswith(f"{path}, record 2: {reason}: ")
    data = read_vqa(path, skip_broken=True)
    assert data.reasons == {reason: 1} and [q.image for q in data.questions] == [0, 1] and shades(data) == [1, 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('["dog", ""]', "record 2: empty answer"),
        ('["dog", 3]', "record 2: wrong answer"),
        ('["dog", "cat", "dog"]', "lists the answer 'dog' twice"),
        ("{}", "holds no list"),
        ("[]", "holds no records"),
    ],
)
def test_broken_answer_list(folder, content, expected):
    path = write(folder, "train.json", [question(1)])
    write(folder, "answer_list.json", content)
    for skip in (False, True):
        message = refusal(read_vqa, path, skip_broken=skip)
        assert str(folder / "answer_list.json") in message and expected in message


def test_all_records_broken(folder):
    path = write(folder, "train.json", [caption(77), caption(0, ""), caption(78)])
    assert "no usable record (3 skipped: 2 missing image, 1 empty caption)" in refusal(
        read_captions, path, skip_broken=True
    )


def test_broken_split_field(folder):
    for broken, expected in ((caption(1), "None"), (caption(1) | {"split": "val"}, "'val'")):
        write(folder, "captions.jsonl", lines(caption(0) | {"split": "test"}, broken))
        message = refusal(open_data, "retrieval", str(folder), "test")
        assert "record 2: wrong split" in message and expected in message
    write(folder, "captions.jsonl", lines(*(caption(0) | {"split": split} for split in ("test", "train"))))
    assert "in train and in test" in refusal(open_data, "retrieval", str(folder), "test")
    write(folder, "captions.jsonl", lines(caption(0) | {"split": "test"}))
    assert "no record for the split 'train'" in refusal(open_data, "retrieval", str(folder), "train")


# Links.


def test_links_may_not_lead_out_of_the_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (4, 4)).save(outside / "secret.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "dir").symlink_to(outside)
    (folder / "inner.png").symlink_to(folder / "images" / "3.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name, reason in (
        ("link.png", "forbidden image path"),
        ("dir/secret.png", "forbidden image path"),
        ("loop.png", "missing image"),
    ):
        path = write(folder, "train.json", [caption(0) | {"image": name}])
        assert refusal(read_captions, path).startswith(f"{path}, record 1: {reason}: "), name
    assert shades(read_captions(write(folder, "train.json", [caption(0) | {"image": "inner.png"}]))) == [3]


def test_the_folder_itself_may_be_a_link(folder, tmp_path_factory):
    write(folder, "train.json", [caption(3)])
    link = tmp_path_factory.mktemp("other") / "link"
    link.symlink_to(folder)
    assert shades(open_data("retrieval", str(link), "train")) == [3]


def test_a_pipe_is_no_image(folder):
    os.mkfifo(folder / "pipe.png")
    path = write(folder, "train.json", [caption(0) | {"image": "pipe.png"}])
    assert "missing image" in refusal(read_captions, path)


# Broken images.


def break_image(folder, i):
    """Cut a photograph-like JPEG in the middle of its data."""
    noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = folder / "images" / f"{i}.png"
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-600])


def test_check_finds_broken_images(folder):
    break_image(folder, 2)
    path = write(folder, "train.json", [caption(i) for i in (0, 1, 2, 3)])
    data = read_captions(path)
    message = refusal(check_images, data)
    assert message.startswith(f"{path}, record 3: broken image {folder / 'images' / '2.png'} (")
    assert "truncated" in message and message.endswith("--skip-broken")
    with pytest.raises(RequestError, match="record 3: broken image"):
        data.images[2]
    kept = check_images(data, skip_broken=True)
    assert shades(kept) == [0, 1, 3] and len(kept.captions) == 3
    assert kept.reasons == {"broken image": 1} and skipped_text(kept.reasons) == "1 skipped: 1 broken image"
    assert check_images(kept) is kept


def test_check_adds_to_what_reading_skipped_and_moves_the_questions(folder):
    break_image(folder, 0)
    records = [question(i, n) for n, i in enumerate((0, 1, 77, 2, 0, 1))]
    data = check_images(read_vqa(write(folder, "q.json", records), skip_broken=True), skip_broken=True)
    assert shades(data) == [1, 2] and [q.image for q in data.questions] == [0, 1, 0]
    assert data.reasons == {"missing image": 1, "broken image": 1} and data.skipped == 2


def test_broken_image_with_an_odd_name(folder):
    (folder / "a\nb.png").write_bytes(b"")
    data = read_captions(write(folder, "train.json", [caption(0) | {"image": "a\nb.png"}]))
    assert "a\\nb.png" in refusal(check_images, data)


def test_check_with_nothing_left(folder):
    break_image(folder, 0)
    data = read_captions(write(folder, "train.json", [caption(0)]))
    assert "all 1 images are broken" in refusal(check_images, data, skip_broken=True)


# The real sets.


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measuring data beside the repository are absent")
def test_real_sets():
    train, test = (open_data("retrieval", str(SHARED / "flickr8k"), split) for split in ("train", "test"))
    assert len(train.images) == 6000 and sum(map(len, train.captions)) == 30_000
    assert len(test.images) == 1000 and Counter(map(len, test.captions)) == {5: 1000}
    assert train.images[0].size == (224, 224) and train.skipped == 0
    data = open_data("vqa", str(SHARED / "easy_vqa"), "test")
    assert (len(data.images), len(data.questions), len(data.answer_list)) == (1000, 9673, 13)
    assert all(set(q.answers) <= set(data.answer_list) for q in data.questions)
    few = open_data("vqa", str(SHARED / "easy_vqa"), "train", limit=100)
    assert len(few.questions) == 100 and check_images(few) is few
