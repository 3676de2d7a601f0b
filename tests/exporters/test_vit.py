"""The graph of a vision transformer: ONNX Runtime against PyTorch and transformers."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import vlprune
from vlprune import exporters
from vlprune.data import open_data
from vlprune.errors import RequestError
from vlprune.exporters.pack import is_packed
from vlprune.models.family import apply_masks
from vlprune.runtime.session import load_graphs, session
from vlprune.runtime.timing import feeds_for
from vlprune.structured import Plan, cut
from vlprune.tasks import evaluate


KINDS = ("vit", "deit", "teacher", "dinov2", "gated")
TASK = "classification"


def export(model, folder, data):
    folder.mkdir(parents=True, exist_ok=True)
    spec = exporters.task_spec(model, TASK)
    rows = exporters.export(model, TASK, spec, folder, data, threads=1)
    onnx_graphs, torch_graphs = load_graphs(folder, threads=1), exporters.torch_graphs(model, TASK)
    return SimpleNamespace(rows=rows, onnx=onnx_graphs, torch=torch_graphs, spec=spec, folder=folder)


@pytest.fixture(scope="module")
def made(vits, animals, tmp_path_factory):
    """Kind -> what `export` gives."""
    found = {}
    data = open_data(TASK, str(animals), "test")

    def make(kind):
        if kind not in found:
            model = vlprune.load(str(vits(kind).folder))
            found[kind] = export(model, tmp_path_factory.mktemp(f"onnx-{kind}"), data)
        return found[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_equals_pytorch_and_transformers(made, vits, kind, batch):
    pixels = np.random.default_rng(batch).normal(size=(batch, 3, 32, 32)).astype(np.float32)
    feeds = {"pixel_values": pixels}
    found, expected = (graphs["image_classifier"](feeds)["logits"] for graphs in (made(kind).onnx, made(kind).torch))
    assert found.shape == (batch, 5) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with torch.no_grad():
        theirs = vits(kind).model(torch.from_numpy(pixels)).logits.numpy()
    np.testing.assert_allclose(found, theirs, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_files(made, kind):
    (row,) = made(kind).rows
    assert (row["graph"], row["file"], row["nonzero_fraction"]) == ("image_classifier", "image_classifier.onnx", 1.0)
    assert 0 <= row["max_abs_diff"] < 1e-5
    names = {path.name for path in made(kind).folder.iterdir()}
    assert names == {"image_classifier.onnx", "task.json", "preprocessor_config.json"}
    spec = json.loads((made(kind).folder / "task.json").read_text())
    assert spec == made(kind).spec
    assert (spec["task"], spec["family"], spec["image_size"]) == (TASK, "vit", 32)
    assert spec["labels"] == ["cat", "dog", "eel", "fox", "gnu"]
    operators = {node.op_type for node in onnx.load(made(kind).folder / "image_classifier.onnx").graph.node}
    assert not operators & {"Resize", "If", "Loop"}  # positions fit, nothing is left to be decided


def test_parameters_keep_their_names_and_bits(made, vits):
    path = made("vit").folder / "image_classifier.onnx"
    state = vits("vit").model.state_dict()
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    names = exporters.parameters(path)
    assert {f"{layer.name}.weight" for layer in vlprune.load(str(vits("vit").folder)).layers()} <= set(names)
    for name, (initializer, transposed) in names.items():
        array = stored[initializer].T if transposed else stored[initializer]
        np.testing.assert_array_equal(array, state[name].numpy())


def test_scores_are_the_same_in_both_runtimes(made, animals, vits):
    data = open_data(TASK, str(animals), "test")
    processor = vlprune.load(str(vits("teacher").folder)).processor
    scores = [evaluate(TASK, graphs, made("teacher").spec, processor, data, batch_size=3)
              for graphs in (made("teacher").torch, made("teacher").onnx)]  # fmt: skip
    assert scores[0].values == scores[1].values and scores[0].n == 10
    assert scores[0].outputs == scores[1].outputs


def test_made_up_inputs_for_timing(made):
    opened = session(made("vit").folder / "image_classifier.onnx", threads=1)
    feeds = feeds_for(opened, made("vit").spec, batch=3)
    assert feeds["pixel_values"].shape == (3, 3, 32, 32)


def test_pruned_graphs_pack(vits, animals, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    ViTForImageClassification(config).save_pretrained(tmp_path)  # smaller Linears stay dense
    vits("vit").processor.save_pretrained(tmp_path)
    model = vlprune.load(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    masks = {layer.name: torch.rand(layer.weight.shape, generator=generator) >= 0.75 for layer in model.layers()}
    apply_masks(model.layers(), masks, {})
    data = open_data(TASK, str(animals), "test")
    plain = export(model, tmp_path / "plain", data)
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert plain.rows[0]["nonzero_fraction"] == pytest.approx(kept)
    (tmp_path / "packed").mkdir()
    options = {"values": "fp32", "target": "portable", "threshold": 0.5, "threads": 1}
    (row,) = exporters.pack_task(model, plain.folder, tmp_path / "packed", data, **options)
    assert (row["linears"], row["linears_packed"]) == (9, 8)  # query, key and value are one
    assert row["max_abs_diff"] < 1e-5
    assert is_packed(onnx.load(tmp_path / "packed" / "image_classifier.onnx"))


@pytest.mark.parametrize("kind", KINDS)
def test_cut_models_export_smaller(made, vits, animals, tmp_path, kind):
    model = vlprune.load(str(vits(kind).folder))
    units = {}
    for group in model.groups():
        kept = torch.zeros(group.shape, dtype=torch.bool)
        kept[: group.shape[0] // 2] = True
        units[group.name] = kept
    cut(model, Plan(units, {"vision": torch.tensor([True, False])}))
    small = export(model, tmp_path, open_data(TASK, str(animals), "test"))
    assert small.rows[0]["bytes"] < 0.6 * made(kind).rows[0]["bytes"]
    assert small.rows[0]["max_abs_diff"] < 1e-5


def test_other_tasks_are_refused(vits):
    with pytest.raises(RequestError, match="no graphs for retrieval: it offers classification"):
        exporters.torch_graphs(vlprune.load(str(vits("vit").folder)), "retrieval")
