"""Files that are never left half-written, and their hashes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any

from .errors import MachineError, RequestError, VlpruneError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it on failure.

    Works for a file or a folder (create whichever at the yielded path); a folder replaces the one that was there.

    Args:
        path: where the result shall stand.

    Yields:
        Path: the temporary path to write to.

    Raises:
        RequestError: the folder cannot be written to.
        MachineError: the disk is full.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except FileNotFoundError as error:  # what /proc says, where nothing can be written
            raise PermissionError(EACCES, "no file can be made there") from error
    temporary = holder / path.name
    try:
        with disk_errors(path):
            yield temporary
            if path.is_dir() and temporary.is_dir():
                os.rename(path, holder / f"{path.name}.old")  # at once, so that a kill never leaves half of it
            os.replace(temporary, path)
    except VlpruneError:
        raise
    except Exception as error:
        # Libraries report a full disk in words of their own, or none: then what was written still fills it.
        if "No space left" in str(error) or shutil.disk_usage(holder).free < 1 << 16:
            raise _no_space(path) from error
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals while writing `path` into one-line errors.

    Args:
        path: what is being written, for the message.

    Yields:
        None: nothing.

    Raises:
        RequestError: no permission, a read-only file system, or a file where a folder is needed.
        MachineError: no space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise _no_space(path) from error
        if error.errno in (EACCES, EPERM, EROFS) or isinstance(error, FileExistsError | NotADirectoryError):
            raise RequestError(f"cannot write {path} ({error.strerror}): choose another --output") from error
        raise


def _no_space(path: Path | str) -> MachineError:
    return MachineError(f"no space left while writing {path}: free some, or choose another --output")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused because JSON has neither.

    Args:
        path: the file.
        value: anything json can hold.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        Any: its content.

    Raises:
        RequestError: the file is missing, unreadable, or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON ({error})") from error


def sha256(path: Path | str) -> str:
    """Hash a file.

    Args:
        path: the file.

    Returns:
        str: SHA-256 in hexadecimal.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
