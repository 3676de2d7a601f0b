"""The mask file: its exact bytes, the way back, and files made to harm."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vlprune.errors import RequestError
from vlprune.pruning import Pruned, load_masks, save_masks, sparsity_summary
from vlprune.pruning.masks import pack, unpack


METADATA = {
    "method": "omp",
    "ratio": 0.5,
    "pattern": "unstructured",
    "seed": 0,
    "model": "sha256:0",
    "sparsity": {"a": 1},
}
PRUNED = Pruned(
    {"b": torch.tensor([[True, False, True], [False, False, True], [True, True, True]]), "a": torch.ones(1, 8) > 0}
)


def test_exact_bytes(tmp_path):
    path = tmp_path / "m.safetensors"
    save_masks(path, Pruned({"l": PRUNED.masks["b"]}), METADATA)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {
            "kind": "vlprune-masks-1",
            "header": json.dumps({"shapes": {"l": [3, 3]}, "metadata": METADATA}),
        },
        "mask/l": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
    }
    assert content[8 + length :] == bytes([0b10100111, 0b10000000])


def test_the_same_masks_are_the_same_bytes(tmp_path):
    metadata = {**METADATA, "note": "\x7f\t\u2028 é"}
    written = set()
    for number in range(12):  # safetensors orders metadata at random
        save_masks(tmp_path / f"{number}.safetensors", PRUNED, metadata)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1
    assert load_masks(tmp_path / "0.safetensors")[1] == metadata


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6))
def test_packing_there_and_back(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(mask)
    assert len(bits) == -(-rows * columns // 8)
    assert torch.equal(unpack(bits, mask.shape), mask)
    assert torch.equal(unpack(pack(mask.T), (columns, rows)), mask.T)


def test_file_round_trip(tmp_path):
    path = tmp_path / "m.safetensors"
    save_masks(path, PRUNED, METADATA)
    loaded, metadata = load_masks(path, {"a": (1, 8), "b": (3, 3)})
    assert metadata == METADATA and list(loaded.masks) == ["b", "a"] and loaded.weights == {}
    assert all(torch.equal(loaded.masks[name], PRUNED.masks[name]) for name in PRUNED.masks)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_weights_travel_too(tmp_path, dtype):
    weight = torch.randn(3, 3).to(dtype)
    save_masks(tmp_path / "m.safetensors", Pruned(PRUNED.masks, {"b": weight}), METADATA)
    loaded, _ = load_masks(tmp_path / "m.safetensors")
    assert list(loaded.weights) == ["b"] and torch.equal(loaded.weights["b"], weight)


def test_a_weight_without_mask_is_refused(tmp_path):
    with pytest.raises(RequestError, match="'c' has a new weight but no mask"):
        save_masks(tmp_path / "m.safetensors", Pruned(PRUNED.masks, {"c": torch.ones(1)}), METADATA)


@pytest.mark.parametrize(
    "expected", [{}, {"b": (3, 3)}, {"b": (3, 3), "a": (8, 1)}, {"b": (3, 3), "a": (1, 8), "c": (1, 1)}]
)
def test_masks_of_another_model(tmp_path, expected):
    save_masks(tmp_path / "m.safetensors", PRUNED, METADATA)
    with pytest.raises(RequestError, match="belongs to another model: layer '[abc]' is") as error:
        load_masks(tmp_path / "m.safetensors", expected)
    assert "\n" not in str(error.value)


def test_summary():
    modality = {"a": "vision", "b": "text", "c": "text"}
    masks = {"a": torch.ones(2, 2) > 0, "b": torch.zeros(1, 4) > 0, "c": torch.tensor([[True, False]])}
    assert sparsity_summary(masks, modality) == {
        "achieved": 0.5,
        "per_modality": {"vision": 0.0, "text": 5 / 6},
        "per_layer": {"a": 0.0, "b": 1.0, "c": 0.5},
    }


# Attacks: each file is wrong in one way and must be answered by one line.


def refused(path, message):
    with pytest.raises(RequestError, match=message) as error:
        load_masks(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and path.name in text


def forged(tmp_path, *, header=None, tensors=None, kind="vlprune-masks-1"):
    path = tmp_path / "m.safetensors"
    header = {"shapes": {"l": [3, 3]}, "metadata": METADATA} if header is None else header
    tensors = {"mask/l": torch.tensor([0xA7, 0x80], dtype=torch.uint8)} if tensors is None else tensors
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {"kind": kind, "header": text})
    return path


def test_the_forger_can_also_make_a_good_file(tmp_path):
    assert torch.equal(load_masks(forged(tmp_path))[0].masks["l"], PRUNED.masks["b"])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -2])
def test_truncated(tmp_path, size):
    path = forged(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "is damaged or no safetensors file|cannot read")


def test_bytes_appended(tmp_path):
    path = forged(tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "is damaged")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x04." * 10, b"\xff" * 100, b"{}" * 50, struct.pack("<Q", 2**63)]
)
def test_other_content(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path, "is damaged or no safetensors file|cannot read")


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "absent", "cannot read|is damaged")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "cannot read|is damaged")


def test_another_kind(tmp_path):
    refused(forged(tmp_path, kind="vlprune-statistics-1"), "is no vlprune-masks-1 file")
    save_file({"x": torch.ones(1)}, tmp_path / "plain")
    refused(tmp_path / "plain", "is no vlprune-masks-1 file .it says None")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"l": [3, 4]}, None),  # 12 bits in 2 bytes: the lie shows in nothing but the trailing bits, which are zero
        ({"l": [3, 2]}, r"is U8 \[2\], expected U8 \[1\]"),
        ({"l": [1, 9]}, None),
        ({"l": [100, 100]}, r"is U8 \[2\], expected U8 \[1250\]"),
        ({"l": [2**31, 2**31]}, "expected U8 .576460752303423488"),
        ({"l": [10**4000, 1]}, "claims the shape"),
        ({"l": [-3, -3]}, "claims the shape"),
        ({"l": [0, 9]}, "claims the shape"),
        ({"l": [9]}, "claims the shape"),
        ({"l": [3, 3, 1]}, "claims the shape"),
        ({"l": [3.0, 3]}, "claims the shape"),
        ({"l": [True, 9]}, "claims the shape"),
        ({"l": "3x3"}, "claims the shape"),
        ({"l": {"0": 3}}, "claims the shape"),
        ({"l": None}, "claims the shape"),
        ({}, "names no layers"),
        ([], "names no layers"),
        (None, "names no layers"),
        ({"k": [3, 3]}, "mask/l.*which is no mask of its layers"),
        ({"l": [3, 3], "k": [3, 3]}, "has no tensor 'mask/k'"),
        ({"l\nk" * 500: [3, 3]}, "which is no mask"),
    ],
)
def test_shapes_that_lie(tmp_path, shapes, message):
    path = forged(tmp_path, header={"shapes": shapes, "metadata": METADATA})
    if message:
        refused(path, message)
    else:
        with pytest.raises(RequestError, match="belongs to another model"):
            load_masks(path, {"l": (3, 3)})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([0xA7, 0x81], dtype=torch.uint8), "bits behind its last weight"),
        (torch.tensor([0xA7, 0xC0], dtype=torch.uint8), "bits behind its last weight"),
        (torch.tensor([0xA7], dtype=torch.uint8), r"is U8 \[1\]"),
        (torch.tensor([0xA7, 0x80, 0], dtype=torch.uint8), r"is U8 \[3\]"),
        (torch.tensor([[0xA7, 0x80]], dtype=torch.uint8), r"is U8 \[1, 2\]"),
        (torch.tensor([1, 1], dtype=torch.int8), "is I8"),
        (torch.ones(2), "is F32"),
    ],
)
def test_bits_that_lie(tmp_path, tensor, message):
    refused(forged(tmp_path, tensors={"mask/l": tensor}), message)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(9), r"weight/l' is F32 \[9\]"),
        (torch.ones(3, 3, dtype=torch.int32), "weight/l' is I32"),
        (torch.full((3, 3), np.nan), "weight of 'l' holds NaN"),
    ],
)
def test_weights_that_lie(tmp_path, weight, message):
    tensors = {"mask/l": torch.tensor([0xA7, 0x80], dtype=torch.uint8), "weight/l": weight}
    refused(forged(tmp_path, tensors=tensors), message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("[]", "no JSON object"),
        ("7", "no JSON object"),
        ("9" * 10_000, "not valid JSON"),
        ('{"shapes": {"l": [3, 3]}, "metadata": {"ratio": Infinity}}', "Infinity is not JSON"),
        ('{"shapes": {"l": [3, 3]}}', "metadata is no JSON object"),
        ('{"shapes": {"l": [3, 3]}, "metadata": []}', "metadata is no JSON object"),
    ],
)
def test_headers_that_are_no_metadata(tmp_path, header, message):
    refused(forged(tmp_path, header=header), message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", None),
        ("ratio", "0.5"),
        ("ratio", True),
        ("pattern", 3),
        ("seed", 1.5),
        ("model", {}),
        ("seed", -1),
        ("ratio", 0.0),
        ("ratio", 1.5),
    ],
)
def test_metadata_of_wrong_types(tmp_path, key, value):
    metadata = {**METADATA, key: value}
    if value is None:
        del metadata[key]
    refused(forged(tmp_path, header={"shapes": {"l": [3, 3]}, "metadata": metadata}), f"has {key} = ")
    with pytest.raises(RequestError, match=f"has {key} = "):
        save_masks(tmp_path / "out.safetensors", PRUNED, metadata)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_huge_claim_is_refused_before_anything_is_allocated(tmp_path):
    # The safetensors header itself claims 2^40 bytes that are not there.
    header = json.dumps(
        {
            "__metadata__": {
                "kind": "vlprune-masks-1",
                "header": json.dumps({"shapes": {"l": [2**20, 2**23]}, "metadata": METADATA}),
            },
            "mask/l": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]},
        }
    ).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    refused(path, "is damaged")


def test_the_file_is_small(tmp_path):
    mask = torch.rand(512, 512) < 0.1
    save_masks(tmp_path / "m.safetensors", Pruned({"l": mask}), METADATA)
    assert (tmp_path / "m.safetensors").stat().st_size < 512 * 512 / 8 + 1000
    assert load_file(tmp_path / "m.safetensors")["mask/l"].numel() == 512 * 512 // 8
