"""Reading a report that anybody may have written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlprune.errors import RequestError
from vlprune.fields import CONTROLS
from vlprune.files import read_json
from vlprune.report.schema import Report, validate_report


REPORT = "report.json"
LIMIT = 1 << 26  # bytes; a run of many variants has some megabytes
_NAMES = ("model", "variants", "metrics", "graphs", "throughput", "environment")  # samples hold texts of any kind


def read_report(source: Path | str) -> Report:
    """Read the report of a run.

    Args:
        source: a run directory, or a report.json.

    Returns:
        Report: a valid one, whose names can be printed.

    Raises:
        RequestError: there is none, or it is too large, damaged, or names something that no terminal should print.
    """
    path = Path(source)
    path = path / REPORT if path.is_dir() else path
    if not path.is_file():  # a pipe or a device might never end
        raise RequestError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give a run, or a report.json")
    if path.stat().st_size > LIMIT:
        raise RequestError(f"{path} has more than {LIMIT:,} bytes: it is no report")
    report = validate_report(read_json(path), str(path))
    for section in _NAMES:
        for text in _texts(report.get(section)):
            if CONTROLS.search(text):
                raise RequestError(f"{path} is not a valid report: {section} holds characters that cannot be printed")
    return report


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a part of a valid report, which is only as deep as its schema."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
