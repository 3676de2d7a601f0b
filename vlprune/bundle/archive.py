"""The archive: one zstd frame around a ustar archive that can be written in one way only.

The header of a member is a function of its name and size, so the reader knows each header, byte by byte, before it
reads it. Links, devices, folders, extended headers, other owners and times are all simply not that header. tar reads
these archives, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from ..errors import RequestError
from .limits import MAX_WINDOW, SIGNATURE


BLOCK = 512
PIECE = 1 << 18  # bytes read at a time
FEED = 1 << 10  # bytes decompressed at a time: a block of zstd may turn 4 of them into 128 KiB
LEVEL = 12  # most of the gain is that of the entropy coder, which all levels have
_KINDS = {
    b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe",
    b"L": "an extended header", b"K": "an extended header", b"x": "an extended header", b"g": "an extended header",
    b"S": "a sparse file",
}  # fmt: skip


def header(name: str, size: int) -> bytes:
    """Write the header of a member.

    Args:
        name: at most 100 characters of ASCII.
        size: bytes.

    Returns:
        bytes: 512 of them.
    """
    fields = bytearray(BLOCK)
    for at, value in (
        (0, name.encode("ascii")),
        (100, b"0000644\0" + b"0000000\0" * 2),  # mode, owner, group
        (124, b"%011o\0" % size),
        (136, b"00000000000\0"),  # time
        (148, b" " * 8),  # the checksum is summed with spaces in its place
        (156, b"0"),  # a plain file
        (257, b"ustar\00000"),
    ):
        fields[at : at + len(value)] = value
    fields[148:156] = b"%06o\0 " % sum(fields)
    return bytes(fields)


def write(path: Path, members: Iterable[tuple[str, bytes | Path]]) -> None:
    """Write an archive; the same members give the same bytes.

    Args:
        path: the file.
        members: names with contents, in their order.
    """
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, threads=0)
    with path.open("wb") as file, compressor.stream_writer(file, closefd=False) as out:
        for name, content in members:
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            out.write(header(name, size))
            if isinstance(content, bytes):
                out.write(content)
            else:
                with content.open("rb") as source:
                    while piece := source.read(PIECE):
                        out.write(piece)
            out.write(b"\0" * (-size % BLOCK))
        out.write(b"\0" * (2 * BLOCK))


class Reader:
    """Reads an archive from front to back; memory is that of a piece, of zstd's window, and 64 MiB at worst.

    Args:
        path: the file, for messages.
        file: opened at its start.

    Attributes:
        size: of the file, in bytes.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        self._waiting = b""  # read from the file, not decompressed yet
        self._ready = bytearray()  # decompressed, not asked for yet

    def first(self, name: str, most: int) -> bytes:
        """Read the first member, whose size nobody has told yet.

        Args:
            name: it must have.
            most: bytes it may have.

        Returns:
            bytes: its content.

        Raises:
            RequestError: it is another, or too large.
        """
        found = self._read(BLOCK)
        try:
            size = int(found[124:135], 8)
        except ValueError:
            size = -1
        if size < 0 or found != header(name, size):
            raise self._unlike(found, name)
        if size > most:
            raise self.refusal(f"{name} claims {size:,} bytes, more than {most:,}")
        return b"".join(self._content(size))

    def member(self, name: str, size: int) -> Iterator[bytes]:
        """Read the next member.

        Args:
            name: it must have.
            size: it must have.

        Yields:
            bytes: its content, piece by piece.

        Raises:
            RequestError: it is another, or cut short.
        """
        found = self._read(BLOCK)
        if found != header(name, size):
            raise self._unlike(found, name)
        yield from self._content(size)

    def end(self) -> None:
        """Make sure that nothing follows, and that the archive is whole.

        Raises:
            RequestError: something does, or it is not.
        """
        found = self._read(2 * BLOCK)
        if any(found):
            raise self._unlike(found[:BLOCK], None)
        while not self._decoder.eof:  # its checksum comes last
            if not self._pull():
                raise self.refusal("it is cut short")
        if self._ready or self._decoder.unused_data or self._waiting or self._file.read(1):
            raise self.refusal("data follow its end")

    def refusal(self, what: str) -> RequestError:
        """Make the error that refuses the file.

        Args:
            what: is wrong.

        Returns:
            RequestError: one line.
        """
        return RequestError(f"{self.path} is no intact bundle: {what}; get it again, or make it again")

    def _content(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            piece = self._read(min(left, PIECE))
            left -= len(piece)
            yield piece
        if any(self._read(-size % BLOCK)):
            raise self.refusal("there are data between its members")

    def _read(self, size: int) -> bytes:
        while len(self._ready) < size:
            if not self._pull():
                raise self.refusal("it is cut short")
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def _pull(self) -> bool:
        """Decompress a little more; tell whether there was more."""
        if self._decoder.eof:
            return False
        if not self._waiting:
            self._waiting = self._file.read(PIECE)
        fed, self._waiting = self._waiting[:FEED], self._waiting[FEED:]
        try:
            self._ready += self._decoder.decompress(fed)
        except zstandard.ZstdError as error:
            text = " ".join(str(error).split())[:200]
            raise self.refusal("it is no zstd file" if "Unknown frame" in text else f"zstd says {text}") from error
        return bool(fed)

    def _unlike(self, found: bytes, wanted: str | None) -> RequestError:
        """Say what stands where a member should be."""
        name = found[:100].split(b"\0")[0].decode("ascii", "backslashreplace")
        place = f"where {wanted} should be" if wanted else "where it should end"
        if found[257:262] != b"ustar":
            return self.refusal(f"there is no header of a file {place}")
        if kind := _KINDS.get(found[156:157]):
            return self.refusal(f"{name!r} is {kind}")
        if name != wanted:
            hint = f" (its manifest tells of no {SIGNATURE})" if name == SIGNATURE else ""
            return self.refusal(f"{name!r} stands {place}{hint}")
        return self.refusal(f"the header of {name!r} is not what it should be")


@contextmanager
def opened(path: Path | str) -> Iterator[Reader]:
    """Open an archive for reading.

    Args:
        path: the file.

    Yields:
        Reader: valid inside the block.

    Raises:
        RequestError: there is no such file, or it is a folder, a device or a pipe.
    """
    path = Path(path)
    if not path.is_file():
        folder = f" ({path.name} is a folder)" if path.is_dir() else ""
        raise RequestError(f"there is no file {path}{folder}: check the path")
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror})") from error
    with file:
        yield Reader(path, file)
