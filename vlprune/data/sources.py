"""From what the user types after `--data` or `--calibration` to a data set."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlprune.data.captions import caption_split, is_caption_record, read_captions
from vlprune.data.classes import read_classes, read_pair
from vlprune.data.nlvr import is_nlvr_record, read_nlvr, scenes_nlvr
from vlprune.data.records import MissingSplitError, read_records
from vlprune.data.scenes import QUESTIONS_PER_SCENE, scenes_captions, scenes_classes, scenes_vqa
from vlprune.data.sets import KINDS, CaptionData, ClassData, Data, NlvrData, VqaData
from vlprune.data.vqa import is_vqa_record, read_vqa, vqa_split
from vlprune.errors import RequestError


SPLITS = ("train", "test")
CAPTION_SOURCES = (
    "a folder with *train*.json and *test*.json (BLIP's caption JSON: image, caption), a folder with captions.jsonl, "
    "TRAIN.json,TEST.json, or one such file"
)
VQA_SOURCES = (
    "a folder with *train*.json and *test*.json (BLIP's VQA JSON: image, question, answer), TRAIN.json,TEST.json, "
    "or one such file"
)
CLASS_SOURCES = (
    "a folder with train/<class>/ and test/<class>/ (or val) of images, TRAIN_FOLDER,TEST_FOLDER, or, to be scored on "
    "only, a folder with <class>/"
)
IMAGE_SOURCES = "a folder of images, by class (DIR/<class>/, DIR/train/<class>/) or not, or captioned images"
NLVR_SOURCES = (
    "a folder with *train*.json and *test*.json (BLIP's NLVR2 JSON: images, sentence, label), TRAIN.json,TEST.json, or "
    "one such file"
)
SCENES = {"train": 10_000, "test": 500}  # how many of the embedded scenes when no limit is given

# "train" as a word of a file name, also in train2014; "val" serves as test where there is no "test".
_WORDS = {
    split: [re.compile(rf"(?<![a-z]){word}(?![a-z])") for word in words]
    for split, words in {"train": ["train"], "test": ["test", "(?:val|valid|validation|dev)"]}.items()
}


_ACCEPTED: dict[type, str] = {
    CaptionData: CAPTION_SOURCES,
    VqaData: VQA_SOURCES,
    ClassData: CLASS_SOURCES,
    NlvrData: NLVR_SOURCES,
}


def accepted(task: str) -> str:
    """Say what a task reads.

    Args:
        task: one of `KINDS`.

    Returns:
        str: for messages.
    """
    return _ACCEPTED[KINDS[task]]


def accepted_by(tasks: Iterable[str]) -> str:
    """Say what each of several tasks reads.

    Args:
        tasks: some of `KINDS`.

    Returns:
        str: for messages, as in "for retrieval and captioning a folder with ...; for vqa a folder with ...".
    """
    named: dict[str, list[str]] = {}
    for task in tasks:
        named.setdefault(accepted(task), []).append(task)
    return "; ".join(f"for {' and '.join(names)} {text}" for text, names in named.items())


def open_data(task: str, source: str, split: str, skip_broken: bool = False, limit: int | None = None) -> Data:
    """Open a split of a data set for a task.

    Args:
        task: one of `KINDS`, which tells what it reads.
        source: "scenes" (embedded; "./scenes" is a folder), or one of `accepted(task)`.
        split: "train" or "test".
        skip_broken: leave broken records out and count them in `reasons`, instead of refusing the file.
        limit: at most this many images, questions for vqa, or pairs for nlvr, from the start; of the embedded scenes
            exactly this many.

    Returns:
        Data: images that exist but have not been decoded, see `check_images`.

    Raises:
        RequestError: there is no such task, split or source, it is broken, or it has no such split.
    """
    if task not in KINDS:
        raise RequestError(f"unknown task {task!r}: choose from {', '.join(KINDS)}")
    if split not in SPLITS:
        raise RequestError(f"unknown split {split!r}: choose train or test")
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} leaves no data: give at least 1")
    if source == "scenes":
        if KINDS[task] is VqaData:
            return scenes_vqa(split, limit or SCENES[split] * QUESTIONS_PER_SCENE)
        if KINDS[task] is ClassData:
            return scenes_classes(split, limit or SCENES[split])
        if KINDS[task] is NlvrData:
            return scenes_nlvr(split, limit or SCENES[split])
        return scenes_captions(split, limit or SCENES[split])
    if KINDS[task] is VqaData:
        return _first_questions(_open_vqa(source, split, skip_broken), limit)
    if KINDS[task] is NlvrData:
        return _first_pairs(_open_nlvr(source, split, skip_broken), limit)
    if KINDS[task] is ClassData:
        data = _open_classes(source, split, skip_broken)
        return data if limit is None or limit >= len(data.images) else data.keep(range(limit))
    return _first_images(_open_captions(source, split, skip_broken), limit)


def open_calibration(source: str, skip_broken: bool = False, limit: int | None = None) -> CaptionData:
    """Open captioned images to calibrate with: the train split, or one caption JSON of either form.

    Args:
        source: as for `open_data`.
        skip_broken: leave broken records out and count them in `reasons`, instead of refusing the file.
        limit: at most this many images, from the start.

    Returns:
        CaptionData: images that exist but have not been decoded, see `check_images`.

    Raises:
        RequestError: there is no such source, it is broken, or it holds no captions.
    """
    path = Path(source)
    if source == "scenes" or path.is_dir() or path.suffix == ".jsonl" or not path.exists():
        data = open_data("captioning", source, "train", skip_broken, limit)
        assert isinstance(data, CaptionData)
        return data
    return _first_images(read_captions(path, None, skip_broken, records=_caption_records(path)), limit)


def open_images(source: str, skip_broken: bool = False, limit: int | None = None) -> CaptionData | ClassData:
    """Open images to calibrate a model with that reads no text: of class folders, of any folder, or with captions.

    Args:
        source: a folder with images by class (of its train split, if it has one) or with images only; or as for
            `open_calibration`.
        skip_broken: see `open_calibration`.
        limit: see `open_calibration`.

    Returns:
        CaptionData | ClassData: images that exist but have not been decoded, see `check_images`.

    Raises:
        RequestError: there is no such source, or it is broken.
    """
    path = Path(source)
    annotations = path.is_dir() and [p for p in path.glob("*.json*") if p.name != "classes.json"]
    if source == "scenes" or not path.is_dir() or annotations:
        return open_calibration(source, skip_broken, limit)
    data = read_classes(path, None, skip_broken)
    return data if limit is None or limit >= len(data.images) else data.keep(range(limit))


def _first_images(data: CaptionData, limit: int | None) -> CaptionData:
    return data if limit is None or limit >= len(data.images) else data.keep(range(limit))


def _first_questions(data: VqaData, limit: int | None) -> VqaData:
    if limit is None or limit >= len(data.questions):
        return data
    data = replace(data, questions=data.questions[:limit])
    return data.keep(list(dict.fromkeys(question.image for question in data.questions)))


def _first_pairs(data: NlvrData, limit: int | None) -> NlvrData:
    if limit is None or limit >= len(data.pairs):
        return data
    data = replace(data, pairs=data.pairs[:limit])
    return data.keep(list(dict.fromkeys(image for pair in data.pairs for image in (pair.left, pair.right))))


def _open_captions(source: str, split: str, skip_broken: bool) -> CaptionData:
    pair = _pair(source)
    if pair:
        path = _existing(pair[SPLITS.index(split)], CAPTION_SOURCES)
        return read_captions(path, None, skip_broken, records=_caption_records(path))
    path = _existing(source, CAPTION_SOURCES)
    if path.is_dir():
        name = path.resolve().name
        lines = path / "captions.jsonl"
        if lines.is_file():
            return read_captions(lines, split, skip_broken, name)
        file, records = _in_folder(path, split, is_caption_record, "captions", CAPTION_SOURCES)
        return read_captions(file, None, skip_broken, name, records)
    records = _caption_records(path)
    if path.suffix == ".jsonl":
        return read_captions(path, split, skip_broken, records=records)
    _must_be(split, caption_split(records), path)
    return read_captions(path, None, skip_broken, records=records)


def _open_vqa(source: str, split: str, skip_broken: bool) -> VqaData:
    pair = _pair(source)
    if pair:
        path = _existing(pair[SPLITS.index(split)], VQA_SOURCES)
        return read_vqa(path, skip_broken, records=_vqa_records(path))
    path = _existing(source, VQA_SOURCES)
    if path.is_dir():
        file, records = _in_folder(path, split, is_vqa_record, "questions", VQA_SOURCES)
        return read_vqa(file, skip_broken, path.resolve().name, records)
    records = _vqa_records(path)
    _must_be(split, vqa_split(records), path)
    return read_vqa(path, skip_broken, records=records)


def _open_nlvr(source: str, split: str, skip_broken: bool) -> NlvrData:
    pair = _pair(source)
    path = _existing(pair[SPLITS.index(split)] if pair else source, NLVR_SOURCES)
    if path.is_dir():
        file, records = _in_folder(path, split, is_nlvr_record, "sentences about two images", NLVR_SOURCES)
        return read_nlvr(file, skip_broken, path.resolve().name, records)
    if not pair:
        _must_be(split, "train" if any(w.search(path.stem.lower()) for w in _WORDS["train"]) else "test", path)
    return read_nlvr(path, skip_broken)


def _open_classes(source: str, split: str, skip_broken: bool) -> ClassData:
    pair = _pair(source)
    if pair:
        train, test = (_folder(part) for part in pair)
        return read_pair(train, train if split == "train" else test, train, train.resolve().name, skip_broken)
    return read_classes(_folder(source), split, skip_broken)


def _folder(source: str) -> Path:
    path = _existing(source, CLASS_SOURCES)
    if not path.is_dir():
        raise RequestError(f"{source} is no folder of images by class: give {CLASS_SOURCES}")
    return path


def _pair(source: str) -> tuple[str, str] | None:
    if "," not in source or Path(source).exists():
        return None
    parts = [part.strip() for part in source.split(",")]
    if len(parts) != 2 or not all(parts):
        raise RequestError(f"{source!r} names {len(parts)} files: give two, TRAIN.json,TEST.json")
    return parts[0], parts[1]


def _existing(source: str, accepted: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise RequestError(f"there is no file or folder {source}: give {accepted}")
    return path


def _caption_records(path: Path) -> list[Any]:
    records = read_records(path)
    if any(map(is_vqa_record, records)) and not any(map(is_caption_record, records)):
        raise RequestError(f"{path} holds questions, but captions are needed: give {CAPTION_SOURCES}")
    return records


def _vqa_records(path: Path) -> list[Any]:
    records = read_records(path)
    if any(map(is_caption_record, records)) and not any(map(is_vqa_record, records)):
        raise RequestError(f"{path} holds captions, but questions are needed: give {VQA_SOURCES}")
    return records


def _must_be(split: str, found: str, path: Path) -> None:
    if found != split:
        raise MissingSplitError(
            f"{path} is of the {found} form, so the {split} split is missing: "
            "give TRAIN.json,TEST.json or a folder with both"
        )


def _in_folder(folder: Path, split: str, is_record: Any, kind: str, accepted: str) -> tuple[Path, list[Any]]:
    """Find the one JSON file of a folder whose name has the split in it and whose records are of the kind."""
    files = sorted(folder.glob("*.json"))
    for word in _WORDS[split]:
        named = [(file, read_records(file)) for file in files if word.search(file.stem.lower())]
        found = [(file, records) for file, records in named if any(map(is_record, records))]
        if len(found) > 1:
            names = " and ".join(file.name for file, _ in found[:2])
            raise RequestError(f"{folder} has several files of {kind} for {split}, {names}: give TRAIN.json,TEST.json")
        if found:
            return found[0]
    raise MissingSplitError(f"{folder} has no file of {kind} for the {split} split: give {accepted}")
