"""Bundles of runs: what is in them, that they are always the same, that they compute the same."""

import hashlib
import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image

from vlprune.bundle.make import make_bundle
from vlprune.bundle.runner import open_bundle
from vlprune.bundle.unpack import read_manifest, unpack
from vlprune.bundle.verify import verify
from vlprune.errors import MachineError, RequestError
from vlprune.files import sha256
from vlprune.inspect import inspect


@pytest.fixture(scope="module")
def run(bundle_run, small_models):
    return bundle_run(str(small_models["pretraining"]), "retrieval", pack="fp16")


@pytest.fixture(scope="module")
def unpacked(small_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    return unpack(small_bundle, folder)[0], folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder = tmp_path_factory.mktemp("keys")
    for name, seed in (("mine", 1), ("other", 2)):
        key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture(autouse=True)
def small_tensors(monkeypatch):
    monkeypatch.setattr("vlprune.bundle.make.SMALLEST", 64)  # as in `small_bundle`


def test_the_same_run_gives_the_same_bytes(run, small_bundle, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(run.folder, copy)
    make_bundle(copy, "retrieval", tmp_path / "again.vlp.tar.zst")
    assert (tmp_path / "again.vlp.tar.zst").read_bytes() == small_bundle.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.vlp.tar.zst", "elsewhere"]


def test_every_member_and_tensor_is_in_the_manifest(unpacked):
    manifest, folder = unpacked
    for name, entry in manifest["files"].items():
        if not name.startswith("weights/"):
            assert (sha256(folder / name), (folder / name).stat().st_size) == (entry["sha256"], entry["bytes"])
    data = (folder / "graphs/weights.bin").read_bytes()
    assert len(data) == manifest["weights"]["bytes"]
    for tensor in manifest["weights"]["tensors"]:
        rebuilt = data[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
        assert hashlib.sha256(rebuilt).hexdigest() == tensor["sha256"]
        assert manifest["files"][f"weights/{tensor['sha256']}"]["bytes"] <= tensor["bytes"]
    assert manifest["recipe_sha256"] and manifest["versions"]["onnxruntime"]
    assert {(row["variant"], row["dataset"], row["n"]) for row in manifest["metrics"]} == {
        ("dense", "scenes", 6),
        ("omp-0.9", "scenes", 6),
    }


def test_graphs_hold_the_weights_of_the_run(run, unpacked):
    manifest, folder = unpacked
    seen = 0
    for path in sorted((run.folder / "onnx/omp-0.9/retrieval/packed").glob("*.onnx")):
        theirs, ours = onnx.load(path), onnx.load(folder / "graphs" / path.name)
        for a, b in zip(theirs.graph.initializer, ours.graph.initializer, strict=True):
            assert a.name == b.name
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
            seen += onnx.numpy_helper.to_array(a).nbytes >= 64
        assert [node.op_type for node in theirs.graph.node] == [node.op_type for node in ours.graph.node]
    assert seen > len(manifest["weights"]["tensors"])  # some are shared


def test_weights_that_graphs_share_are_stored_once(unpacked):
    manifest, folder = unpacked
    text, itm = (
        {
            int(entry.value)
            for tensor in onnx.load(folder / "graphs" / name, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "offset"
        }
        for name in ("text_encoder.onnx", "itm.onnx")
    )
    assert len(text & itm) > 3


def test_plain_graphs_of_a_pruned_model_are_stored_with_masks(run, tmp_path):
    found = make_bundle(run.folder, "retrieval", tmp_path / "plain.vlp.tar.zst", packed=False)
    assert found["form"] == "fp32" and max(found["differences"].values()) == 0
    shown = inspect(tmp_path / "plain.vlp.tar.zst")
    forms = {row["form"]: row for row in shown["weights"]}
    masked = forms["float32, planes, not zero only"]
    assert masked["stored"] < 0.2 * masked["rebuilt"]
    assert shown["kind"] == "bundle" and shown["packed"] is False


def test_embeddings_may_be_rounded(run, tmp_path):
    plain = make_bundle(run.folder, "retrieval", tmp_path / "plain.vlp.tar.zst", packed=False)
    found = make_bundle(run.folder, "retrieval", tmp_path / "half.vlp.tar.zst", packed=False, embeddings="fp16")
    assert found["form"] == "fp32, embeddings fp16"
    assert found["bytes"] < plain["bytes"]
    manifest, _ = read_manifest(tmp_path / "half.vlp.tar.zst")
    rounded = [t for t in manifest["weights"]["tensors"] if t["dtype"] == "float32" and t["stored"] == "float16"]
    tables = 2 if len({t["sha256"] for t in rounded}) > 1 else 1
    assert len(rounded) == tables
    with_tables = unpack_text(tmp_path / "half.vlp.tar.zst", "README.md", tmp_path)
    assert "measured before that rounding" in with_tables


def test_packed_graphs_may_have_rounded_them_already(run, small_bundle, tmp_path):
    found = make_bundle(run.folder, "retrieval", tmp_path / "half.vlp.tar.zst", embeddings="fp16")
    assert found["form"] == "packed fp16" and found["bytes"] == small_bundle.stat().st_size
    manifest, _ = read_manifest(tmp_path / "half.vlp.tar.zst")
    assert all(t["dtype"] == t["stored"] for t in manifest["weights"]["tensors"])


def unpack_text(path, name, tmp_path):
    folder = tmp_path / "for-text"
    folder.mkdir()
    unpack(path, folder)
    return (folder / name).read_text()


def test_the_card_is_one_of_hugging_face(unpacked):
    _, folder = unpacked
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["pipeline_tag"] == "feature-extraction" and "pruning" in head["tags"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.5
    assert "| omp-0.9 | pytorch cpu fp32 | scenes | 6 | 0.500 [0.400, 0.600] |" in text
    assert "| dense | pytorch cpu fp32 | scenes | 6 | 0.750 [0.650, 0.850] |" in text


def test_verify_runs_the_stored_input(small_bundle):
    found = verify(small_bundle, threads=1)
    assert found["graphs"] == ["image_encoder", "itm", "text_encoder"]
    assert found["signature"] == "none" and max(found["differences"].values()) <= 1e-6


def test_an_image_of_ones_own_is_stored(run, tmp_path):
    Image.new("CMYK", (1500, 700), (10, 200, 30, 0)).save(tmp_path / "mine.jpg")
    output = tmp_path / "mine.vlp.tar.zst"
    make_bundle(run.folder, "retrieval", output, example=tmp_path / "mine.jpg", text="what is it")
    assert read_manifest(output)[0]["example"] == "given by the maker of the bundle"
    folder = tmp_path / "unpacked"
    folder.mkdir()
    unpack(output, folder)
    with Image.open(folder / "example/image.png") as image:
        assert (image.size, image.mode) == ((512, 239), "RGB")
    assert (folder / "example/text.txt").read_text() == "what is it"
    verify(output)


def test_signatures(run, keys, tmp_path, small_bundle):
    output = tmp_path / "signed.vlp.tar.zst"
    make_bundle(run.folder, "retrieval", output, sign=keys / "mine.pem")
    first = output.read_bytes()
    make_bundle(run.folder, "retrieval", output, sign=keys / "mine.pem")
    assert output.read_bytes() == first
    assert verify(output, keys / "mine.pub")["signature"] == "valid"
    assert verify(output)["signature"] == "not checked"
    assert open_bundle(output, public_key=keys / "mine.pub").task == "retrieval"
    for path, key, message in (
        (output, "other.pub", "not by .*other.pub: do not use"),
        (output, "mine.pem", "no public key in PEM"),
        (small_bundle, "mine.pub", "is not signed"),
    ):
        with pytest.raises(RequestError, match=message):
            verify(path, keys / key)
    with pytest.raises(RequestError, match="no private key in PEM"):
        make_bundle(run.folder, "retrieval", tmp_path / "x.vlp.tar.zst", sign=keys / "mine.pub")
    assert not (tmp_path / "x.vlp.tar.zst").exists()


def test_signatures_need_a_package(run, keys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MachineError, match=r"pip install 'vlprune\[sign\]'"):
        make_bundle(run.folder, "retrieval", tmp_path / "x.vlp.tar.zst", sign=keys / "mine.pem")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "vqa"}, "has no graphs for vqa: vlprune export"),
        ({"task": "retreival"}, "did you mean retrieval"),
        ({"variant": "omp-0.8"}, "it holds dense, omp-0.9"),
        ({"precision": "int8-static"}, "vlprune export .* --precision int8-static"),
        ({"embeddings": "int8"}, "unknown embeddings"),
        ({"text": "a" * 10_001}, "more than 10,000 characters"),
    ],
)
def test_what_the_run_lacks_is_told(run, options, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        make_bundle(run.folder, **{"task": "retrieval", **options}, output=tmp_path / "x.vlp.tar.zst")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_run_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    spec = copy / "onnx/omp-0.9/retrieval/packed/task.json"
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "rerank": 99}))
    with pytest.raises(RequestError, match="task.json is not what the run wrote"):
        make_bundle(copy, "retrieval", tmp_path / "x.vlp.tar.zst")
    (copy / "manifest.json").unlink()
    with pytest.raises(RequestError, match=r"manifest\.json"):
        make_bundle(copy, "retrieval", tmp_path / "x.vlp.tar.zst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
