"""Readers of captioned images: the caption JSON of BLIP and X-VLM, and `captions.jsonl`.

    train form   [{"image": "images/1.jpg", "caption": "a dog", "image_id": "coco_1"}, ...]     one record per caption
    test form    [{"image": "images/1.jpg", "caption": ["a dog", "the dog", ...]}, ...]         one record per image
    JSON lines   {"file_name": "1.jpg", "captions": ["a dog", ...], "split": "train"}           also "image", "caption"

Image paths are relative to the folder of the annotation file. Records of the same image are joined.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlprune.data.images import ImageFiles
from vlprune.data.records import BrokenRecordError, ImageFinder, MissingSplitError, read_records, sift, texts
from vlprune.data.sets import CaptionData


_TEST_PERCENT = 10


def read_captions(
    path: Path,
    split: str | None = None,
    skip_broken: bool = False,
    name: str | None = None,
    records: list[Any] | None = None,
) -> CaptionData:
    """Read an annotation file in any of the three forms.

    Args:
        path: the file.
        split: keep only "train" or "test": by the field `split`, or, where no record has one, by a hash of the image's
            path that makes 10 % of the images test images. None keeps all.
        skip_broken: leave broken records out and count them.
        name: name of the data set; the file's when not given.
        records: the content of the file if it has been read.

    Returns:
        CaptionData: the images in the order of their first record, which exist but have not been decoded.

    Raises:
        RequestError: the file or one of its records is broken, or none belongs to the split.
    """
    find = ImageFinder(path.parent)
    records = read_records(path) if records is None else records
    split_field = split is not None and any(isinstance(record, dict) and "split" in record for record in records)
    split_of: dict[str, str] = {}

    def parse(number: int, record: dict[str, Any]) -> tuple[int, str, Path, list[str]]:
        image, file = find(record.get("image", record.get("file_name")))
        captions = texts(record.get("caption", record.get("captions")), "caption")
        if split_field:
            own = record.get("split")
            if own not in ("train", "test"):
                raise BrokenRecordError("wrong split", f'{own!r:.80} instead of "train" or "test"')
            if split_of.setdefault(image, own) != own:
                raise BrokenRecordError("wrong split", f"{image} is in train and in test")
        return number, image, file, captions

    rows, reasons = sift(path, records, parse, skip_broken)
    captions_of: dict[str, list[str]] = {}
    paths, numbers = [], []
    for number, image, file, captions in rows:
        if split is not None and (split_of[image] if split_field else _hash_split(image)) != split:
            continue
        if image not in captions_of:
            captions_of[image] = []
            paths.append(file)
            numbers.append(number)
        captions_of[image] += captions
    if not paths:
        raise MissingSplitError(
            f'{path} has no record for the split {split!r}: give records a field "split" ("train" or "test")'
        )
    return CaptionData(name or path.stem, ImageFiles(path, paths, numbers), list(captions_of.values()), reasons)


def _hash_split(image: str) -> str:
    draw = int.from_bytes(sha256(f"vlprune:{image}".encode()).digest()[:8], "big")
    return "test" if draw % 100 < _TEST_PERCENT else "train"


def is_caption_record(record: Any) -> bool:
    """Tell whether a record looks like one of this module's, broken or not.

    Args:
        record: anything read from JSON.

    Returns:
        bool: True when it has a caption.
    """
    return isinstance(record, dict) and ("caption" in record or "captions" in record) and "question" not in record


def caption_split(records: Sequence[Any]) -> str:
    """Tell which split a caption JSON is made for.

    Args:
        records: its content.

    Returns:
        str: "test" when every caption is a list, else "train".
    """
    captions = [record["caption"] for record in records if isinstance(record, dict) and "caption" in record]
    return "test" if captions and all(isinstance(caption, list) for caption in captions) else "train"
