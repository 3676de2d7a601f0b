"""Tensors are stored exactly, in the form that compresses best, and never larger than they are."""

import hashlib
import zlib

import numpy as np
import pytest

from vlprune.bundle import tensors
from vlprune.bundle.tensors import decode, encode, stored_values


def entry_of(array, stored, masked, coding):
    return {
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "bytes": array.nbytes,
        "dtype": array.dtype.name,
        "offset": 0,
        "stored": stored.dtype.name,
        "masked": masked,
        "coding": coding,
    }


def rebuilt(entry, data, tmp_path):
    (tmp_path / "stored").write_bytes(data)
    with (tmp_path / "stored").open("rb") as file:
        pieces = list(decode(entry, file, len(data)))
    return np.concatenate(pieces) if pieces else np.zeros(0, entry["dtype"])


def sparse(dtype, size=5003, share=0.9, seed=0):
    rng = np.random.default_rng(seed)
    array = (rng.normal(size=size) * 100).astype(dtype)
    array[rng.random(size) < share] = 0
    return array


@pytest.mark.parametrize("dtype", tensors.DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("piece", [8, 1 << 19])
def test_every_type_comes_back(dtype, share, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", piece)
    array = sparse(dtype, 203 if piece == 8 else 5003, share)
    data, masked, coding = encode(array, size_of=lambda form: len(zlib.compress(form)))
    assert len(data) <= array.nbytes
    entry = entry_of(array, array, masked, coding)
    assert stored_values(entry, len(data)) is not None
    found = rebuilt(entry, data, tmp_path)
    assert found.dtype == array.dtype and found.tobytes() == array.tobytes()


def test_forms_are_chosen_by_what_compresses(tmp_path):
    size_of = lambda form: len(zlib.compress(form))  # noqa: E731
    _, masked, coding = encode(sparse("float32"), size_of=size_of)
    assert (masked, coding) == (True, "planes")
    columns = np.sort(np.random.default_rng(0).integers(0, 190, (64, 20)).astype(np.uint8), axis=1).ravel()
    assert encode(columns, size_of=size_of)[1:] == (False, "delta")


def test_the_stored_bytes_are_these():
    array = np.array([0, 1.0, 0, 0, 0, 0, 0, 0, -2.0, 0], np.float32)
    data, masked, coding = encode(array, size_of=len)
    assert masked and coding == "raw"
    assert data.hex() == "4080" + "0000803f" + "000000c0"
    data, masked, coding = encode(np.array([3, 5, 4], np.uint8), size_of=lambda form: -form[1])
    assert (data, masked, coding) == (bytes([3, 5, 4]), False, "raw")


def test_minus_zero_and_nan_are_kept_bit_by_bit(tmp_path):
    array = np.zeros(64, np.float32)
    array.view(np.uint32)[:3] = 0x80000000, 0x7FC00001, 0xFFC12345  # -0.0 and two NaN with a payload
    data, masked, coding = encode(array, size_of=len)
    assert masked
    assert rebuilt(entry_of(array, array, masked, coding), data, tmp_path).tobytes() == array.tobytes()


def test_float16_is_expanded(tmp_path):
    array = np.random.default_rng(0).normal(size=100).astype(np.float16)
    data, masked, coding = encode(array, size_of=len)
    wide = array.astype(np.float32)
    found = rebuilt(entry_of(wide, array, masked, coding), data, tmp_path)
    assert found.dtype == np.float32 and (found == wide).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff" + b"\x01" * 3, "more values"),
        (b"\x80" + b"\x01" * 3, "fewer values"),
        (b"\xe0\xff" + b"\x01" * 3, "bits behind"),
    ],
)
def test_masks_that_lie_are_refused(data, message, tmp_path):
    count = 8 if len(data) == 4 else 12
    array = np.zeros(count, np.uint8)
    with pytest.raises(ValueError, match=message):
        rebuilt(entry_of(array, array, True, "raw"), data, tmp_path)
