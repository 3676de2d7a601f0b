"""How a tensor is stored: what is not zero, beside one bit per entry; bytes in the order that compresses best.

A stored tensor is, one after the other,

    mask      one bit per entry, the first in the highest bit, 1 = not zero; only where that saves something
    values    all entries, or those that the mask keeps, in one of these codings:
              raw     as they are, little-endian
              planes  the first byte of every value, then the second of every value, ...: exponents are alike
              delta   of one-byte types: each minus the one before, modulo 256: ascending columns give small numbers

Values of float32 tensors may be stored as float16, which rounds them. All else is exact: a zero is +0.0, bit by bit.
Decoding takes the memory of one piece, whatever the tensor's size. Only numpy is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal, TypedDict

import numpy as np


Coding = Literal["raw", "planes", "delta"]
CODINGS = ("raw", "planes", "delta")
DTYPES = ("float32", "float16", "uint8", "uint16", "int8", "int32", "int64")
ALIGNMENT = 64  # bytes; what vector loads like
PIECE = 1 << 19  # entries decoded at a time, a multiple of 8


class TensorEntry(TypedDict):
    """A tensor in the manifest.

    Attributes:
        sha256: of the rebuilt bytes; the member is called "weights/<sha256>".
        bytes: rebuilt.
        dtype: rebuilt, one of `DTYPES`.
        offset: in weights.bin.
        stored: type of the stored values; "float16" for a float32 tensor that was rounded, else as `dtype`.
        masked: a mask stands before the values.
        coding: of the values.
    """

    sha256: str
    bytes: int
    dtype: str
    offset: int
    stored: str
    masked: bool
    coding: Coding


def aligned(offset: int) -> int:
    """Give the next place where a tensor may start.

    Args:
        offset: bytes.

    Returns:
        int: bytes.
    """
    return -(-offset // ALIGNMENT) * ALIGNMENT


def encode(array: np.ndarray, *, size_of: Callable[[bytes], int]) -> tuple[bytes, bool, Coding]:
    """Store a tensor in the form that compresses best; never larger than it is.

    Args:
        array: of one of `DTYPES`.
        size_of: tells how small the compressor makes some bytes.

    Returns:
        tuple[bytes, bool, Coding]: what to store, whether it has a mask, and the coding.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{flat.itemsize}")
    kept = bits != 0
    forms = [(b"", bits)]
    if len(flat) // 8 + 1 + int(np.count_nonzero(kept)) * flat.itemsize < flat.nbytes:
        forms.append((np.packbits(kept).tobytes(), bits[kept]))
    codings: tuple[Coding, ...] = ("raw", "delta") if flat.itemsize == 1 else ("raw", "planes")
    found = [
        (mask + _coded(values, coding), bool(mask), coding)
        for mask, values in forms
        for coding in codings
    ]  # fmt: skip
    return min(found, key=lambda form: size_of(form[0]))


def _coded(values: np.ndarray, coding: Coding) -> bytes:
    if coding == "planes":
        values = values.view(np.uint8).reshape(-1, values.itemsize).T
    elif coding == "delta":
        values = np.diff(values, prepend=np.uint8(0))  # wraps around
    return values.tobytes()


def stored_values(entry: TensorEntry, stored_bytes: int) -> int | None:
    """Tell how many values a stored tensor holds.

    Args:
        entry: of the manifest.
        stored_bytes: size of the member.

    Returns:
        int | None: None = no number of values gives that size.
    """
    count = entry["bytes"] // np.dtype(entry["dtype"]).itemsize
    values, rest = divmod(stored_bytes - -(-count // 8) * entry["masked"], np.dtype(entry["stored"]).itemsize)
    if rest or values < 0 or values > count or (values != count and not entry["masked"]):
        return None
    return values


def decode(entry: TensorEntry, file: BinaryIO, stored_bytes: int) -> Iterator[np.ndarray]:
    """Rebuild a tensor.

    Args:
        entry: of the manifest, checked.
        file: holds what is stored, from its start.
        stored_bytes: its size; `stored_values` has accepted it.

    Yields:
        np.ndarray: a piece, flat, of the entry's `dtype`.

    Raises:
        ValueError: the mask keeps another number of values than there are, or has bits behind its end.
    """
    count = entry["bytes"] // np.dtype(entry["dtype"]).itemsize
    total = stored_values(entry, stored_bytes) or 0
    start = -(-count // 8) if entry["masked"] else 0
    values = _Values(file, start, total, np.dtype(entry["stored"]), entry["coding"])
    taken = 0
    for at in range(0, count, PIECE):
        size = min(PIECE, count - at)
        kept = None
        if entry["masked"]:
            packed = np.frombuffer(_read(file, at // 8, -(-size // 8)), np.uint8)
            if size % 8 and packed[-1] & (0xFF >> size % 8):
                raise ValueError("the mask has bits behind its end")
            kept = np.unpackbits(packed, count=size).view(bool)
        wanted = size if kept is None else int(np.count_nonzero(kept))
        taken += wanted
        if taken > total:
            raise ValueError("the mask keeps more values than there are")
        found = values.next(wanted).astype(entry["dtype"], copy=False)
        if kept is None:
            yield found
        else:
            piece = np.zeros(size, entry["dtype"])
            piece[kept] = found
            yield piece
    if taken != total:
        raise ValueError("the mask keeps fewer values than there are")


class _Values:
    """Reads coded values one after the other."""

    def __init__(self, file: BinaryIO, start: int, total: int, dtype: np.dtype, coding: Coding) -> None:
        self.file, self.start, self.total, self.dtype, self.coding = file, start, total, dtype, coding
        self.at = 0
        self.before = np.uint8(0)

    def next(self, count: int) -> np.ndarray:
        width, at = self.dtype.itemsize, self.at
        self.at += count
        if self.coding == "planes":
            planes = [_read(self.file, self.start + i * self.total + at, count) for i in range(width)]
            joined = np.empty((count, width), np.uint8)
            for i, plane in enumerate(planes):
                joined[:, i] = np.frombuffer(plane, np.uint8)
            return joined.reshape(-1).view(self.dtype)
        data = np.frombuffer(_read(self.file, self.start + at * width, count * width), self.dtype)
        if self.coding == "delta" and count:
            data = np.cumsum(data.view(np.uint8), dtype=np.uint8) + self.before
            self.before = data[-1]
            return data.view(self.dtype)
        return data


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ValueError("it is cut short")
    return data
