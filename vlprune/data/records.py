"""Reading annotation files: records one by one, each broken one refused with its number, or counted."""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from posixpath import normpath
from reprlib import repr as short
from typing import Any, TypeVar

from vlprune.errors import RequestError
from vlprune.files import read_json


T = TypeVar("T")


class MissingSplitError(RequestError):
    """A source without the train or the test split."""


class BrokenRecordError(Exception):
    """What is wrong with a record: a reason to count it under, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {one_line(detail)}")
        self.reason = reason


def one_line(message: str) -> str:
    """Escape what would break a message or play with the terminal: file names come from files.

    Args:
        message: any text.

    Returns:
        str: the text with unprintable characters written as escapes.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in message)


def read_records(path: Path) -> list[Any]:
    """Read a JSON list, or JSON lines when the name ends in `.jsonl` (an empty line is None).

    Args:
        path: the file.

    Returns:
        list[Any]: the records as they are; record number n of an error message is element n - 1, or line n.

    Raises:
        RequestError: the file is missing, empty, no JSON, or no list.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise RequestError(f"{path} is empty: give a file with records")
    if path.suffix != ".jsonl":
        records = read_json(path)
        if not isinstance(records, list):
            raise RequestError(f"{path} holds no list of records but {short(records)}")
    else:
        records = _read_lines(path)
    if not any(record is not None for record in records):
        raise RequestError(f"{path} holds no records")
    return records


def _read_lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line) if line.strip() else None)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}, record {number}: not valid JSON ({error})") from error
    return records


def sift(
    path: Path, records: list[Any], parse: Callable[[int, dict[str, Any]], T], skip_broken: bool
) -> tuple[list[T], dict[str, int]]:
    """Parse every record.

    Args:
        path: the file they come from, for messages.
        records: as `read_records` gives them.
        parse: makes something of (number, record), or raises `BrokenRecordError`.
        skip_broken: count broken records instead of refusing the file.

    Returns:
        tuple[list[T], dict[str, int]]: what was made, and why records were skipped -> how many.

    Raises:
        RequestError: a record is broken, or, when these are skipped, all are.
    """
    kept: list[T] = []
    reasons: Counter[str] = Counter()
    for number, record in enumerate(records, start=1):
        if record is None and path.suffix == ".jsonl":
            continue
        try:
            if not isinstance(record, dict):
                raise BrokenRecordError("not an object", short(record))
            kept.append(parse(number, record))
        except BrokenRecordError as error:
            if not skip_broken:
                raise RequestError(f"{path}, record {number}: {error}: correct it, or pass --skip-broken") from None
            reasons[error.reason] += 1
    if not kept:
        raise RequestError(f"{path} has no usable record ({skipped_text(reasons)}): correct it")
    return kept, dict(reasons)


def skipped_text(reasons: dict[str, int]) -> str:
    """Say what was skipped and why.

    Args:
        reasons: why -> how many.

    Returns:
        str: such as "3 skipped: 2 missing image, 1 empty caption".
    """
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda x: (-x[1], x[0])))
    return f"{sum(reasons.values())} skipped" + (f": {counts}" if counts else "")


def text(value: Any, what: str) -> str:
    """Check a text of a record.

    Args:
        value: the text as read.
        what: its name, for messages.

    Returns:
        str: the text without surrounding white space.

    Raises:
        BrokenRecordError: it is no text, or empty.
    """
    if not isinstance(value, str):
        raise BrokenRecordError(
            f"wrong {what}", "the field is missing" if value is None else f"{short(value)} is no text"
        )
    value = value.strip()
    if not value:
        raise BrokenRecordError(f"empty {what}", "there is no text")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BrokenRecordError(f"wrong {what}", f"{short(value)} is not valid Unicode")
    return value


def texts(value: Any, what: str) -> list[str]:
    """Check one or several texts of a record.

    Args:
        value: a text or a list of texts, as read.
        what: its name, for messages.

    Returns:
        list[str]: at least one text.

    Raises:
        BrokenRecordError: there is none, or one of them is no text or empty.
    """
    if not isinstance(value, list):
        return [text(value, what)]
    if not value:
        raise BrokenRecordError(f"empty {what}", "the list is empty")
    return [text("" if one is None else one, what) for one in value]


class ImageFinder:
    """Finds the image files that records name, and lets no path out of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = os.path.realpath(folder)
        self._inside: dict[str, bool] = {}  # folders, of which there are few

    def __call__(self, name: Any) -> tuple[str, Path]:
        """Find one image.

        Args:
            name: the path in the record, relative to the folder.

        Returns:
            tuple[str, Path]: the normalised name, and the file, which exists.

        Raises:
            BrokenRecordError: it is no text, leads out of the folder (absolute, by "..", by a link), or does not exist.
        """
        name = normpath(text(name, "image"))
        if name.startswith(("/", "../")) or name == "..":
            raise BrokenRecordError("forbidden image path", f"{short(name)} leads out of {self.folder}")
        path = self.folder / name
        try:
            mode = path.lstat().st_mode
        except (OSError, ValueError):
            raise BrokenRecordError("missing image", f"there is no file {path}") from None
        parent = os.path.dirname(path)
        if parent not in self._inside:
            self._inside[parent] = self._is_inside(parent)
        if not self._inside[parent] or (stat.S_ISLNK(mode) and not self._is_inside(path)):
            raise BrokenRecordError("forbidden image path", f"{short(name)} is a link that leads out of {self.folder}")
        if not path.is_file():
            raise BrokenRecordError("missing image", f"{path} is no file")
        return name, path

    def _is_inside(self, path: Path | str) -> bool:
        real = os.path.realpath(path)
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)
