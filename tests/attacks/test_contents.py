"""Bundles whose hashes are right and whose contents are not: manifests that lie, graphs that reach out, odd files."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vlprune.bundle.verify import verify


@pytest.fixture
def refusal(parts, refused, world):
    """Write the changed parts and read them; gives the line of the refusal."""

    def check(text=None):
        path = parts.write(world / "a.zst", text)
        return refused(lambda: verify(path, threads=1))

    return check


# --- manifests --------------------------------------------------------------------------------------------------------

KEYS = {
    "of the format 'tar'": {"format": "tar"},
    "schema version 2": {"schema_version": 2},
    "schema version 'True'": {"schema_version": "True"},
    "task = 'evil'": {"task": "evil"},
    "task = ['retrieval']": {"task": ["retrieval"]},
    "precision = 'fp8'": {"precision": "fp8"},
    "values = 'int4'": {"values": "int4"},
    "signed = 1 is neither": {"signed": 1},
    "packed = None": {"packed": None},
    "... is no short text": {"variant": "a" * 201},
    "variant = 'a\\nb' is no short text": {"variant": "a\nb"},
    "family = None": {"family": None},
    "tolerance = 1000000.0": {"tolerance": 1e6},
    "tolerance = 0 ": {"tolerance": 0},
    "tolerance = '1'": {"tolerance": "1"},
    "a row of metrics has the values {": {"metrics": [{"values": {"accuracy": 10**400}}]},
    "metrics is no list": {"metrics": {}},
    "a row of metrics has the values": {"metrics": [{"values": {"accuracy": "high"}}]},
    "a row of metrics has the values None": {"metrics": [{}]},
    "a row of metrics is no object": {"metrics": [1]},
    "files is no object": {"files": []},
    "weights is no object": {"weights": None},
    "versions is no object": {"versions": "1"},
    "recipe_sha256 = '12'": {"recipe_sha256": "12"},
    "dense_bytes is -1": {"dense_bytes": -1},
    "dense_bytes is 1.5": {"dense_bytes": 1.5},
    "dense_bytes is True": {"dense_bytes": True},
    "of another task than its manifest tells": {"family": "clip"},
}


@pytest.mark.parametrize("message", KEYS)
def test_keys_that_make_no_sense(parts, refusal, message):
    parts.change(**KEYS[message])
    assert message in refusal()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "is no object"),
        (b"null", "is no object"),
        (b'{"format": "vlprune-bundle", "format": "vlprune-bundle"}', "a key stands twice"),
        (b"1" * 10_000, "not valid JSON"),
        (b" " * (2**21 + 1), "more than 2,097,152"),
    ],
)
def test_manifests_that_are_none(refusal, text, message):
    assert message in refusal(text)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_scores_that_are_no_numbers(parts, refusal, number):
    parts.manifest["metrics"][0]["values"]["accuracy"] = 12345678
    line = refusal(parts.text().replace(b"12345678", number))
    assert "is not JSON" in line or "not finite" in line


def entry(parts, index=0):
    return parts.manifest["weights"]["tensors"][index]


def test_sizes_and_hashes_that_lie(parts, refusal):
    files, name = parts.manifest["files"], "README.md"
    size, sha = files[name]["bytes"], files[name]["sha256"]
    for change, message in (
        ({"bytes": size + 1}, "the header of 'README.md'"),
        ({"bytes": size - 1}, "the header of 'README.md'"),
        ({"bytes": -size}, "no number of bytes"),
        ({"bytes": float(size)}, "no number of bytes"),
        ({"bytes": True}, "no number of bytes"),
        ({"bytes": 2**80}, "more than"),
        ({"bytes": None}, "no number of bytes"),
        ({"sha256": sha[::-1]}, "another SHA-256"),
        ({"sha256": sha.upper()}, "is no SHA-256"),
        ({"sha256": 1}, "is no SHA-256"),
    ):
        files[name] = {"bytes": size, "sha256": sha} | change
        assert message in refusal()
    files[name] = []
    assert "is no object" in refusal()


def test_weights_that_lie(parts, refusal):
    weights = parts.manifest["weights"]
    good = json.dumps(weights)
    index = next(i for i, t in enumerate(weights["tensors"]) if t["dtype"] == "float32" and not t["masked"])
    small = next(i for i, t in enumerate(weights["tensors"]) if t["dtype"] == "uint8")
    for where, change, message in (
        (index, {"bytes": 4}, "does not fit"),
        (index, {"bytes": 7}, "is stored as"),
        (index, {"bytes": 0}, "is stored as"),
        (index, {"bytes": 2**50}, "more than"),
        (index, {"offset": 1}, "starts at 1"),
        (index, {"offset": -64}, "starts at -64"),
        (index, {"offset": 2**70}, "starts at"),
        (index, {"dtype": "float64"}, "dtype = 'float64'"),
        (index, {"dtype": "object"}, "dtype = 'object'"),
        (index, {"dtype": ["float32"]}, "dtype = "),
        (index, {"dtype": "float16"}, "is stored as"),
        (index, {"stored": "int8"}, "is stored as"),
        (index, {"stored": "float16"}, "does not fit"),
        (index, {"coding": "delta"}, "has the coding delta"),
        (index, {"coding": "pickle"}, "coding = 'pickle'"),
        (index, {"masked": 1}, "masked = 1"),
        (index, {"masked": True}, ""),
        (index, {"sha256": "0" * 64}, "no file of it"),
        (index, {"sha256": "../../evil"}, "no SHA-256"),
        (small, {"coding": "planes"}, "has the coding planes"),
        (small, {"dtype": "int8", "stored": "int8"}, "none of the bundle's weights"),
    ):
        weights.clear()
        weights |= json.loads(good)
        weights["tensors"][where] |= change
        assert message in refusal()
    for change, message in (
        ({"bytes": 2**40}, "more than"),
        ({"bytes": json.loads(good)["bytes"] + 64}, "its weights at"),
        ({"tensors": json.loads(good)["tensors"][:-1]}, "its weights at"),
        ({"tensors": json.loads(good)["tensors"] * 2}, "named twice"),
        ({"tensors": {}}, "list no tensors"),
        ({"tensors": [1]}, "is no object"),
    ):
        weights.clear()
        weights |= json.loads(good) | change
        assert message in refusal()


def test_a_tensor_that_becomes_another(parts, refusal):
    """Stored bytes and their hash are right; what they become is not what the name tells."""
    tensor = next(t for t in parts.manifest["weights"]["tensors"] if t["dtype"] == "float32" and not t["masked"])
    name = f"weights/{tensor['sha256']}"
    parts.set(name, bytes(len(parts.members[name])))
    assert "becomes another tensor" in refusal()


def test_a_mask_that_lies(parts, refusal):
    zeros = bytes(8192)
    sha = hashlib.sha256(zeros).hexdigest()
    for stored in (b"\xff" * 256 + b"\1" * 400, b"\0" * 256 + b"\1" * 400):
        _only(parts, {"sha256": sha, "bytes": 8192, "dtype": "float32", "masked": True}, stored)
        line = refusal()
        assert "than there are" in line


def _only(parts, entry, stored):
    """Leave one tensor."""
    for name in [name for name in parts.members if name.startswith("weights/")]:
        parts.drop(name)
    parts.set(f"weights/{entry['sha256']}", stored)
    made = {"offset": 0, "stored": entry["dtype"], "masked": False, "coding": "raw"} | entry
    parts.manifest["weights"] = {"bytes": entry["bytes"], "tensors": [made]}


def test_weights_that_grow_beyond_bearing(parts, refusal):
    """A mask without values is a bit per weight, and zstd packs it a thousandfold again."""
    size = 2**33
    parts.change(weights={"bytes": size, "tensors": []})
    assert "its weights claim" in refusal()


def test_a_signature_that_is_missing_or_too_much(parts, refusal):
    parts.change(signed=True)
    assert "'README.md' stands where manifest.sig should be" in refusal()
    parts.change(signed=False)
    parts.members["manifest.sig"] = bytes(64)
    assert "stands where" in refusal()


def test_signatures_that_are_wrong(parts, refused, world):
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from vlprune.bundle import archive

    key, other = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
    public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (world / "key.pub").write_bytes(public)
    parts.change(signed=True)
    text = parts.text()

    def write(signature, text=text):
        members = [("manifest.json", text), ("manifest.sig", signature), *parts.ordered()]
        archive.write(world / "a.zst", members)

    right = key.sign(text)
    write(right)
    assert verify(world / "a.zst", world / "key.pub")["signature"] == "valid"
    for signature, signed in (
        (other.sign(text), text),
        (bytes(64), text),
        (right[:-1] + bytes([right[-1] ^ 1]), text),  # the last byte of one in sixteen is 0
        (right, text + b"\n"),
        (right, text.replace(b"0.75", b"0.95")),
    ):
        write(signature, signed)
        assert "the signature of the bundle is not by" in refused(lambda: verify(world / "a.zst", world / "key.pub"))
    write(right[:63])
    refused(lambda: verify(world / "a.zst", world / "key.pub"))


# --- graphs -----------------------------------------------------------------------------------------------------------


def model(nodes=None, initializers=(), **more):
    """A graph that gives its input back, with something in it."""
    x = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])
    y = helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, None)
    nodes = nodes or [helper.make_node("Identity", ["pixel_values"], ["image_embeds"])]
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=list(initializers), **more)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("evil", 1)])
    made.ir_version = 8
    return made


def outside(location="weights.bin", offset="0", length="4096", shape=(1024,), kind=TensorProto.FLOAT, **more):
    tensor = TensorProto(name="w", data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        if value is not None:
            made = tensor.external_data.add()
            made.key, made.value = key, value
    return tensor


def inside(shape, data, kind=TensorProto.FLOAT, **more):
    return TensorProto(name="w", data_type=kind, dims=shape, raw_data=data, **more)


def branch():
    graph = model().graph
    return helper.make_node("If", ["c"], ["image_embeds"], then_branch=graph, else_branch=graph)


def with_function():
    made = model()
    made.functions.append(
        helper.make_function(
            "evil", "F", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [helper.make_opsetid("", 18)]
        )
    )
    return made


def with_sparse():
    made = model()
    values, places = (
        numpy_helper.from_array(np.ones(1, np.float32), "w"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2**40]))
    return made


def with_training():
    made = model()
    made.training_info.add().algorithm.CopyFrom(made.graph)
    return made


def constant(tensor):
    return [helper.make_node("Constant", [], ["image_embeds"], value=tensor)]


GRAPHS = {
    "wants its data from '../../../../etc/passwd'": lambda: model(initializers=[outside("../../../../etc/passwd")]),
    "wants its data from '/etc/passwd'": lambda: model(initializers=[outside("/etc/passwd")]),
    "wants its data from '../task.json'": lambda: model(initializers=[outside("../task.json")]),
    "wants its data from 'image_encoder.onnx'": lambda: model(initializers=[outside("image_encoder.onnx")]),
    "wants its data from './weights.bin'": lambda: model(initializers=[outside("./weights.bin")]),
    "wants its data from 'WEIGHTS.BIN'": lambda: model(initializers=[outside("WEIGHTS.BIN")]),
    "wants its data from ''": lambda: model(initializers=[outside("")]),
    "wants its data from None": lambda: model(initializers=[outside(None)]),
    "wants its data from '*/_ORT_MEM_ADDR_/*'": lambda: model(initializers=[outside("*/_ORT_MEM_ADDR_/*")]),
    "outside of the bundle": lambda: model(initializers=[outside(checksum="0")]),
    "outside of the bundle ": lambda: model(initializers=[outside(length=None)]),
    "none of the bundle's weights": lambda: model(initializers=[outside(offset="1")]),
    "none of the bundle's weights ": lambda: model(initializers=[outside(offset="-64")]),
    "none of the bundle's weights  ": lambda: model(initializers=[outside(offset=str(2**70))]),
    "none of the bundle's weights   ": lambda: model(initializers=[outside(offset="x")]),
    "none of the bundle's weights    ": lambda: model(initializers=[outside(length=str(2**62))]),
    "none of the bundle's weights     ": lambda: model(initializers=[outside(shape=(2**20, 2**20))]),
    "none of the bundle's weights      ": lambda: model(nodes=constant(outside())),
    "inside and outside of the graph at once": lambda: model(initializers=[_both()]),
    "claims the shape": lambda: model(initializers=[inside((2**41,), b"")]),
    "claims the shape ": lambda: model(initializers=[inside((-1,), b"")]),
    "claims the shape  ": lambda: model(initializers=[inside((1,) * 17, b"1234")]),
    "claims 4,398,046,511,104 bytes and holds 0": lambda: model(initializers=[inside((2**40,), b"")]),
    "claims 4 bytes and holds 8": lambda: model(initializers=[inside((1,), b"12345678")]),
    "claims 4,398,046,511,104 bytes and holds 4": lambda: model(nodes=constant(inside((2**20, 2**20), b"1234"))),
    "is of type 8": lambda: model(initializers=[inside((1,), b"x", TensorProto.STRING)]),
    "is of type 999": lambda: model(initializers=[inside((1,), b"x", 999)]),
    "in a way that no bundle has (field 6)": lambda: model(
        initializers=[TensorProto(name="w", data_type=8, dims=[1], string_data=[b"x"])]
    ),
    "in a way that no bundle has": lambda: model(
        initializers=[TensorProto(name="w", data_type=1, dims=[1], float_data=[1])]
    ),
    "beyond any memory": lambda: model(
        initializers=[inside((2,), struct.pack("<2q", 2**30, 2**30), TensorProto.INT64)]
    ),
    "beyond any memory ": lambda: model(initializers=[inside((1,), struct.pack("<q", -(2**40)), TensorProto.INT64)]),
    "If has a graph inside": lambda: model(nodes=[branch()]),
    "uses the operator 'Loop'": lambda: model(nodes=[helper.make_node("Loop", [], ["image_embeds"])]),
    "uses the operator 'evil::Shell'": lambda: model(nodes=[helper.make_node("Shell", [], ["y"], domain="evil")]),
    "uses the operator 'com.microsoft::EPContext'": lambda: model(
        nodes=[
            helper.make_node("EPContext", ["pixel_values"], ["y"], domain="com.microsoft", ep_cache_context="/etc/x")
        ]
    ),
    "uses the operator 'com.microsoft::PythonOp'": lambda: model(
        nodes=[helper.make_node("PythonOp", ["pixel_values"], ["y"], domain="com.microsoft")]
    ),
    "uses the operator 'ai.onnx.ml::LabelEncoder'": lambda: model(
        nodes=[helper.make_node("LabelEncoder", ["pixel_values"], ["y"], domain="ai.onnx.ml")]
    ),
    "uses the operator 'RandomNormal'": lambda: model(
        nodes=[helper.make_node("RandomNormal", [], ["y"], shape=[2**20])]
    ),
    "it has functions": with_function,
    "it has functions, training steps": with_training,
    "its graph has sparse initializers": with_sparse,
}


def _both():
    tensor = outside()
    tensor.raw_data = b"1234"
    return tensor


@pytest.mark.parametrize("message", GRAPHS)
def test_graphs_that_do_more_than_compute(parts, refusal, message):
    made = GRAPHS[message]()
    if message.startswith("If"):
        message = "uses the operator 'If'"
    parts.set("graphs/image_encoder.onnx", made.SerializeToString())
    assert message.strip() in refusal()


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"x" * 1000, b"\x3a\xff\xff\xff\xff\x7f", b"\x3a" * 1000, b"\xff" * 11, b"\x3b\x3c" * 500, b"\x08"],
)
def test_graphs_that_are_none(parts, refusal, data):
    parts.set("graphs/image_encoder.onnx", data)
    refusal()


def test_graphs_that_are_cut(parts, refusal):
    data = parts.members["graphs/image_encoder.onnx"]
    for end in range(0, len(data), len(data) // 15):
        parts.set("graphs/image_encoder.onnx", data[:end])
        refusal()


def test_graphs_that_are_others(parts, refusal):
    """They are sound, and not what the task needs."""
    parts.set("graphs/image_encoder.onnx", model().SerializeToString())
    refusal()
    parts.drop("graphs/image_encoder.onnx")
    refusal()


def test_packed_weights_that_are_malformed(parts, refusal):
    """The operators hold every array against the others when a session is created."""
    made = onnx.ModelProto.FromString(parts.members["graphs/image_encoder.onnx"])
    node = next(node for node in made.graph.node if node.op_type in ("SparseLinear", "SparseMlp"))
    for name, value in (("in_features", 2**31), ("out_features", -1), ("block_columns", 0), ("panel_rows", 10**9)):
        for attribute in node.attribute:
            if attribute.name == name:
                before, attribute.i = attribute.i, value
                parts.set("graphs/image_encoder.onnx", made.SerializeToString())
                assert "cannot be used by ONNX Runtime" in refusal()
                attribute.i = before


# --- other files ------------------------------------------------------------------------------------------------------

SPECS = [
    {"image_size": 10**6}, {"image_size": 0}, {"image_size": "32"}, {"image_size": 33}, {"max_length": -1},
    {"max_length": 10**9}, {"pad_token_id": None}, {"pad_token_id": -1}, {"task": "vqa"}, {"family": "x"},
    {"enc_token_id": 2**40},
]  # fmt: skip


@pytest.mark.parametrize("change", SPECS)
def test_task_descriptions_that_ask_too_much(parts, refusal, change):
    parts.spec(**change)
    assert "task.json" in refusal()


@pytest.mark.parametrize("name", ["task.json", "tokenizer_config.json", "preprocessor_config.json", "tokenizer.json"])
@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b'{"a": NaN', b"\xff\xff", b"[]", b"1"])
def test_files_that_are_no_json_objects(parts, refusal, name, data):
    parts.set(name, data)
    refusal()


def test_preprocessing_that_takes_all_memory(parts, refusal):
    good = json.loads(parts.members["preprocessor_config.json"])
    parts.set("preprocessor_config.json", good | {"size": {"height": 16000, "width": 16000}})
    assert "differ in the size of images" in refusal()
    parts.set("preprocessor_config.json", good | {"image_std": [0, 0, 0]})
    assert "image_std" in refusal()


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_images_that_are_bombs_or_none(parts, refusal):
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    grey = io.BytesIO()
    Image.new("L", (8, 8)).save(grey, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n(/etc/passwd) run\n"
    for data in (
        png(60_000, 60_000),
        png(2000, 2000),
        png(1000, 1000)[:60],
        gif.getvalue(),
        grey.getvalue(),
        postscript,
        b"",
    ):
        parts.set("example/image.png", data)
        assert "the stored input of the bundle is broken" in refusal()


@pytest.mark.parametrize(
    "expected",
    [
        {}, [], {"image_embeds": [1]}, {"image_embeds": "x"}, {"image_embeds": [[1]]}, {"image_embeds": [None]},
        {"image_embeds": {}}, {"image_embeds": [10**400]}, '{"image_embeds": [NaN]}', '{"image_embeds": [1e999]}',
    ],
)  # fmt: skip
def test_outputs_that_make_no_sense(parts, refusal, expected):
    parts.set("example/expected.json", expected)
    refusal()


def test_another_output_is_told(parts, refusal):
    expected = json.loads(parts.members["example/expected.json"])
    expected["itm_logits"][0] += 0.01
    parts.set("example/expected.json", expected)
    assert "computes something else here: itm_logits differs by" in refusal()


def test_text_that_is_too_long(parts, refusal):
    parts.set("example/text.txt", "a " * 10_000)
    assert "more than 10,000 characters" in refusal()
    parts.set("example/text.txt", b"\xff")
    refusal()


@pytest.mark.parametrize(
    "name", ["README.md", "task.json", "tokenizer.json", "graphs/itm.onnx", "example/expected.json"]
)
def test_members_that_are_missing(parts, refusal, name):
    parts.drop(name)
    refusal()
