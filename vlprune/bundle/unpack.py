"""Open a bundle's archive: check all of it, rebuild its weights.

Everything is written to a folder that the caller made for it, under names from a fixed list; nothing else is touched.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import MachineError, RequestError
from . import archive, limits, signing
from .manifest import FileEntry, Manifest, identity, parse
from .protobuf import check_graph
from .tensors import TensorEntry, aligned, decode


def read_manifest(path: Path | str, public_key: Path | None = None) -> tuple[Manifest, str]:
    """Read what a bundle says of itself; its members are not looked at.

    Args:
        path: the bundle.
        public_key: of whom it must be signed by; None = by anybody or nobody.

    Returns:
        tuple[Manifest, str]: the manifest, and the bundle's identity (SHA-256 of the manifest's text).

    Raises:
        RequestError: it is no intact bundle, or the signature is missing or wrong.
        MachineError: signatures cannot be checked here.
    """
    with archive.opened(path) as reader:
        return _begin(reader, public_key)


def unpack(path: Path | str, folder: Path, public_key: Path | None = None) -> tuple[Manifest, str]:
    """Check a whole bundle and lay its files out; graphs lie in graphs/, beside the rebuilt weights.bin.

    Args:
        path: the bundle.
        folder: an existing, empty folder.
        public_key: see `read_manifest`.

    Returns:
        tuple[Manifest, str]: see `read_manifest`.

    Raises:
        RequestError: it is no intact bundle: cut short, changed, or not what its manifest tells.
        MachineError: the disk is full, or signatures cannot be checked here.
    """
    with archive.opened(path) as reader, _disk(folder):
        manifest, name = _begin(reader, public_key)
        files = manifest["files"]
        _check_space(folder, sum(entry["bytes"] for entry in files.values()) + manifest["weights"]["bytes"])
        for subfolder in ("example", "graphs"):
            (folder / subfolder).mkdir()
        small = sorted(file for file in files if not file.startswith("weights/"))
        for file in small:
            with (folder / file).open("wb") as out:
                _copy(reader, file, files[file], out)
        # Names in weights/ come last of all: the tensors' order is that of their hashes.
        _rebuild(reader, manifest, folder)
        reader.end()
    tensors = {(entry["offset"], entry["bytes"]): entry["dtype"] for entry in manifest["weights"]["tensors"]}
    for file in small:
        if file.startswith("graphs/"):
            check_graph((folder / file).read_bytes(), file, tensors)
    return manifest, name


def _begin(reader: archive.Reader, public_key: Path | None) -> tuple[Manifest, str]:
    text = reader.first(limits.MANIFEST, limits.MAX_MANIFEST)
    manifest = parse(text, reader.size)
    if manifest["signed"]:
        signature = b"".join(reader.member(limits.SIGNATURE, signing.SIZE))
        if public_key is not None:
            signing.check(text, signature, public_key)
    elif public_key is not None:
        raise RequestError(f"{reader.path} is not signed: get a signed one, or do not ask for a key")
    return manifest, identity(text)


def _copy(reader: archive.Reader, name: str, entry: FileEntry, out: BinaryIO) -> None:
    digest = hashlib.sha256()
    for piece in reader.member(name, entry["bytes"]):
        digest.update(piece)
        out.write(piece)
    if digest.hexdigest() != entry["sha256"]:
        raise reader.refusal(f"{name} has another SHA-256 than its manifest tells")


def _rebuild(reader: archive.Reader, manifest: Manifest, folder: Path) -> None:
    stored = folder / "stored"
    with (folder / "graphs" / limits.WEIGHTS).open("wb") as out:
        for entry in manifest["weights"]["tensors"]:
            name = f"weights/{entry['sha256']}"
            size = manifest["files"][name]["bytes"]
            with stored.open("wb+") as file:
                _copy(reader, name, manifest["files"][name], file)
                file.flush()
                out.write(b"\0" * (aligned(out.tell()) - out.tell()))
                try:
                    _write_tensor(entry, file, size, out)
                except ValueError as error:
                    raise reader.refusal(f"{name}: {error}") from error
    stored.unlink(missing_ok=True)


def _write_tensor(entry: TensorEntry, file: BinaryIO, size: int, out: BinaryIO) -> None:
    digest = hashlib.sha256()
    for piece in decode(entry, file, size):
        data = piece.data.cast("B")
        digest.update(data)
        out.write(data)
    if digest.hexdigest() != entry["sha256"]:
        raise ValueError("it becomes another tensor than its name tells")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"the bundle needs {needed / 1e6:,.0f} MB in {folder.parent} and there are {free / 1e6:,.0f}: free some, "
            "or set TMPDIR to a larger folder"
        )


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"no space left in {folder.parent}: free some, or set TMPDIR to a larger folder"
            ) from error
        raise
