"""Mask files that lie: they are downloaded, too."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlprune.inspect import inspect
from vlprune.pruning.layers import Pruned
from vlprune.pruning.masks import KIND, load_masks, save_masks


METADATA = {"method": "omp", "ratio": 0.5, "pattern": "unstructured", "seed": 0, "model": "m"}
SHAPES = {"a": [4, 6], "b": [3, 5]}


def write(path: Path, tensors=None, header=None, kind=KIND) -> Path:
    """A safetensors file in the form of masks, every part of which may be another."""
    if tensors is None:
        tensors = {"mask/a": torch.full((3,), 255, dtype=torch.uint8), "mask/b": torch.tensor([255, 254]).byte()}
    header = {"shapes": SHAPES, "metadata": METADATA} if header is None else header
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {"kind": kind, "header": text})
    return path


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file that says of itself what it likes."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.fixture
def refusal(world, refused):
    def check(path: Path) -> str:
        line = refused(lambda: load_masks(path))
        assert refused(lambda: inspect(path))
        return line

    return check


def test_a_good_file_is_read(world):
    pruned, metadata = load_masks(write(world / "a.safetensors"))
    assert pruned.masks["b"].shape == (3, 5) and metadata["method"] == "omp"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "not valid JSON"),
        ("NaN", "not JSON"),
        ("[]", "no JSON object"),
        ("{}", "metadata"),
        ({"metadata": METADATA}, "names no layers"),
        ({"metadata": METADATA, "shapes": {}}, "names no layers"),
        ({"metadata": METADATA, "shapes": SHAPES | {"a": [2**39, 2**39]}}, "is U8"),
        ({"metadata": METADATA, "shapes": {"a": [2**62, 4]}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"a": [0, 4]}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"a": [-4, -6]}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"a": [4.0, 6]}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"a": [True, 24]}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"a": [4, 6, 1]}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"a": "46"}}, "claims the shape"),
        ({"metadata": METADATA, "shapes": {"../a": [4, 6]}}, "holds 'mask/"),
        ({"metadata": METADATA, "shapes": SHAPES | {"c": [1, 1]}}, "no tensor 'mask/c'"),
        ({"metadata": METADATA, "shapes": {"a": [4, 6]}}, "which is no mask of its layers"),
        ({"metadata": METADATA | {"ratio": 1e300}, "shapes": SHAPES}, "ratio"),
        ({"metadata": METADATA | {"ratio": True}, "shapes": SHAPES}, "ratio"),
        ({"metadata": METADATA | {"seed": -1}, "shapes": SHAPES}, "seed"),
        ({"metadata": METADATA | {"method": ["omp"]}, "shapes": SHAPES}, "method"),
        ({"metadata": [], "shapes": SHAPES}, "no JSON object"),
    ],
)
def test_headers_that_lie(world, refusal, header, message):
    assert message in refusal(write(world / "a.safetensors", header=header))


def test_tensors_that_lie(world, refusal):
    a, b = torch.full((3,), 255, dtype=torch.uint8), torch.tensor([255, 254]).byte()
    path = world / "a.safetensors"
    for tensors, message in (
        ({"mask/a": a}, "no tensor 'mask/b'"),
        ({"mask/a": a, "mask/b": b, "evil": a.clone()}, "which is no mask"),
        ({"mask/a": a, "mask/b": torch.tensor([255, 255]).byte()}, "bits behind its last weight"),
        ({"mask/a": a[:2], "mask/b": b}, "expected U8 [3]"),
        ({"mask/a": a.bool(), "mask/b": b}, "expected U8 [3]"),
        ({"mask/a": a.float(), "mask/b": b}, "expected U8 [3]"),
        ({"mask/a": a[:, None], "mask/b": b}, "expected U8 [3]"),
        ({"mask/a": a, "mask/b": b, "weight/a": torch.full((4, 6), torch.nan)}, "NaN or infinity"),
        ({"mask/a": a, "mask/b": b, "weight/a": torch.full((4, 6), -torch.inf)}, "NaN or infinity"),
        ({"mask/a": a, "mask/b": b, "weight/a": torch.zeros(6, 4)}, "expected F32 or"),
        ({"mask/a": a, "mask/b": b, "weight/a": torch.zeros(4, 6).long()}, "expected F32 or"),
    ):
        assert message in refusal(write(path, tensors))


def test_files_that_are_none(world, refused):
    path = world / "a.safetensors"
    good = write(world / "good.safetensors").read_bytes()
    for data in (
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\x80\x04\x95",
        b"PK\3\4" * 100,
        good[:-1],
        good[: len(good) // 2],
        good[:9],
    ):
        path.write_bytes(data)
        refused(lambda: load_masks(path))
    for made in (
        raw(path, b"{}", length=2**63),
        raw(path, b"{}", length=2**40),
        raw(path, b"[" * 100_000),
        raw(path, b'{"mask/a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}'),
        raw(path, b'{"mask/a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', b"abcevil"),
        raw(path, b'{"mask/a":{"dtype":"U8","shape":[3],"data_offsets":[3,0]}}', b"abc"),
        raw(path, b'{"mask/a":{"dtype":"F64","shape":[3],"data_offsets":[0,3]}}', b"abc"),
        raw(path, b"\xff\xfe" * 100),
    ):
        refused(lambda made=made: load_masks(made))


def test_another_kind_another_place(world, refused):
    weights = write(world / "a.safetensors", kind="weights")
    assert "is no vlprune-masks-1 file" in refused(lambda: load_masks(weights))
    (world / "folder.safetensors").mkdir()
    for path in ("folder.safetensors", "missing.safetensors"):
        refused(lambda path=path: load_masks(world / path))


def test_masks_of_another_model(world, refused):
    path = write(world / "a.safetensors")
    for expected in ({"a": (4, 6)}, {"a": (6, 4), "b": (3, 5)}, {"a": (4, 6), "b": (3, 5), "c": (1, 1)}):
        assert "belongs to another model" in refused(lambda expected=expected: load_masks(path, expected))


def test_every_changed_byte_is_refused_or_harmless(world, refused):
    rng = np.random.default_rng(0)
    path = world / "a.safetensors"
    save_masks(path, Pruned({"a": torch.rand(9, 7) > 0.5}, {"a": torch.rand(9, 7)}), METADATA)
    good = path.read_bytes()
    harmless = 0
    for at in rng.permutation(len(good))[:150]:
        data = bytearray(good)
        data[at] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(data))
        try:
            load_masks(path)
            harmless += 1  # a bit of a mask, of a weight, or of a name that nothing depends on
        except Exception as error:  # noqa: BLE001
            assert type(error).__name__ == "RequestError", error
    assert 0 < harmless < 150
