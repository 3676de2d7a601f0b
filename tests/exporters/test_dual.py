"""Graphs of CLIP and SigLIP: ONNX equals PyTorch and transformers; pruned, packed and cut models; scores."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import vlprune
from vlprune import exporters
from vlprune.data.sets import CaptionData
from vlprune.errors import RequestError
from vlprune.exporters import ranges
from vlprune.models.family import apply_masks
from vlprune.runtime import operators
from vlprune.runtime.session import load_graphs
from vlprune.runtime.timing import feeds_for
from vlprune.tasks import evaluate


KINDS = ("clip", "legacy", "siglip")
TEXTS = [
    "a small red circle",
    "the large green square on the left of a red cross",
    "circle",
    "a green cross above the small circle",
    "large red square",
    "the square",
]


@pytest.fixture(scope="module")
def data() -> CaptionData:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in TEXTS]
    return CaptionData("noise", images, [[text, text + " on the right"] for text in TEXTS])


@pytest.fixture(scope="module")
def exported(duals, data, tmp_path_factory):
    """Kind -> model, folder, spec, rows of the report, and the graphs in ONNX Runtime."""
    made = {}

    def make(kind):
        if kind not in made:
            model = vlprune.load(str(duals(kind).folder))
            folder = tmp_path_factory.mktemp("graphs")
            spec = exporters.task_spec(model, "retrieval")
            rows = exporters.export(model, "retrieval", spec, folder, data)
            made[kind] = model, folder, spec, rows, load_graphs(folder, "cpu", 1)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_no_integer_goes_where_cuda_has_no_kernel(kind, exported):
    """ONNX Runtime would copy it to the CPU and back in every run, and refuse to record a CUDA graph."""
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    only_floats = {"ArgMax", "ArgMin", "Einsum", "Sigmoid", "Softmax", "ReduceL1", "ReduceL2", "ReduceLogSumExp"}
    for file in sorted(exported(kind)[1].glob("*.onnx")):
        model = onnx.load(file)
        types = ranges.types_of(model)
        used = {(node.op_type, types[node.input[0]]) for node in model.graph.node}
        assert not {(name, kind) for name, kind in used if name in only_floats and kind not in floats}, file


@pytest.mark.parametrize("kind", ["clip", "legacy"])
def test_a_text_ends_at_its_first_end(kind, duals):
    model = vlprune.load(str(duals(kind).folder))
    end = model.processor.special_ids()["eos_token_id"]
    ids = torch.tensor([[0, 5, end, end], [0, end, 3, end], [end, 1, 1, 1], [0, 1, 5, 4]])
    ends = ids == (ids.amax(1, keepdim=True) if kind == "legacy" else end)
    assert torch.equal(model._last(ids), ends.int().argmax(1))  # transformers' way


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("padding", [0, 3])
def test_onnx_equals_pytorch_and_transformers(kind, batch, padding, duals, exported):
    model, _, _, _, graphs = exported(kind)
    processor = model.processor
    ids, mask = processor.texts(TEXTS[:batch])
    if kind != "siglip":  # which reads texts of one length only
        ids = np.pad(ids, ((0, 0), (0, padding)), constant_values=processor.pad_id)
        mask = np.pad(mask, ((0, 0), (0, padding)))
    pixels = np.random.default_rng(batch).normal(size=(batch, 3, 32, 32)).astype(np.float32)
    feeds = {
        "image_encoder": {"pixel_values": pixels},
        "text_encoder": {"input_ids": ids, "attention_mask": mask},
    }
    reference = exporters.torch_graphs(model, "retrieval")
    with torch.no_grad():
        theirs = duals(kind).model(**{k: torch.from_numpy(v) for f in feeds.values() for k, v in f.items()})
    for name, output in (("image_encoder", "image_embeds"), ("text_encoder", "text_embeds")):
        found = graphs[name](feeds[name])
        assert found.keys() == {output}
        np.testing.assert_allclose(found[output], reference[name](feeds[name])[output], atol=2e-6)
        np.testing.assert_allclose(found[output], theirs[output].numpy(), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found[output], axis=1), 1, atol=1e-5)
        assert len(np.unique(found[output].round(2), axis=0)) == batch


@pytest.mark.parametrize("kind", KINDS)
def test_names_axes_and_spec_are_the_contract(kind, exported):
    model, folder, spec, rows, _ = exported(kind)
    length = 16 if kind == "siglip" else "length"
    wanted = {
        "image_encoder": ({"pixel_values": ["batch", 3, 32, 32]}, {"image_embeds": ["batch", model.width]}),
        "text_encoder": (
            {"input_ids": ["batch", length], "attention_mask": ["batch", length]},
            {"text_embeds": ["batch", model.width]},
        ),
    }

    def axes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    assert sorted(path.name for path in folder.glob("*.onnx")) == ["image_encoder.onnx", "text_encoder.onnx"]
    parameters = set()
    for name, (inputs, outputs) in wanted.items():
        graph = onnx.load(folder / f"{name}.onnx").graph
        assert (axes(graph.input), axes(graph.output)) == (inputs, outputs)
        parameters |= exporters.parameters(folder / f"{name}.onnx").keys()
    assert {f"{layer.name}.weight" for layer in model.layers()} <= parameters
    written = json.loads((folder / "task.json").read_text())
    assert written == spec and (folder / "tokenizer.json").is_file()
    family = "siglip" if kind == "siglip" else "clip"
    assert (spec["family"], spec["task"], spec["rerank"]) == (family, "retrieval", 0)
    assert (spec["image_size"], spec["max_length"]) == (32, 16)
    assert spec["pad_token_id"] == spec["eos_token_id"] == model.processor.pad_id
    assert [row["graph"] for row in rows] == ["image_encoder", "text_encoder"]
    assert all(row["max_abs_diff"] < 1e-5 and row["nonzero_fraction"] == 1 for row in rows)


def test_zero_shot_has_the_same_graphs(duals):
    model = vlprune.load(str(duals("clip").folder)).for_task("zero-shot")
    spec = exporters.task_spec(model, "zero-shot", classes=["circle", "square"], templates=["a {}"])
    assert (spec["task"], spec["classes"], spec["max_length"]) == ("zero-shot", ["circle", "square"], 16)
    assert exporters.torch_graphs(model, "zero-shot").keys() == {"image_encoder", "text_encoder"}
    with pytest.raises(RequestError, match="no graphs for retrieval: it offers zero-shot"):
        exporters.torch_graphs(model, "retrieval")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_same_in_both_runtimes(kind, exported, data):
    model, _, spec, _, graphs = exported(kind)
    found = evaluate("retrieval", graphs, spec, model.processor, data, batch_size=4)
    expected = evaluate("retrieval", exporters.torch_graphs(model, "retrieval"), spec, model.processor, data)
    assert found.values == expected.values and found.outputs == expected.outputs
    # By hand, without batches.
    owners = np.repeat(np.arange(len(TEXTS)), 2)
    pixels = model.processor.images(list(data.images))
    ids, mask = model.processor.texts([text for given in data.captions for text in given])
    with torch.no_grad():
        text = model.text_embeds(torch.from_numpy(ids), torch.from_numpy(mask))
        similarity = (model.image_embeds(torch.from_numpy(pixels)) @ text.T).numpy()
    assert found.values["i2t_r1"] == np.mean(owners[similarity.argmax(1)] == np.arange(len(TEXTS)))
    assert found.values["t2i_r1"] == np.mean(similarity.argmax(0) == owners)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_can_be_timed(kind, exported):
    _, folder, spec, _, graphs = exported(kind)
    for name, graph in graphs.items():
        feeds = feeds_for(graph.session, spec, 3)
        (output,) = graph(feeds).values()
        assert output.shape[0] == 3 and np.isfinite(output).all(), name


# --- pruned, packed, cut ----------------------------------------------------------------------------------------------


@pytest.fixture
def wide(duals, tmp_path):
    """Models whose Linears are large enough to be packed, nine of ten weights zero."""

    def make(kind):
        theirs = duals(kind).model
        raw = json.loads((duals(kind).folder / "config.json").read_text())
        for part in ("vision_config", "text_config"):
            raw[part] |= {"hidden_size": 128, "intermediate_size": 192}
        if kind == "siglip":
            raw["text_config"]["projection_size"] = 128
        model = type(theirs)(type(theirs.config).from_dict(raw))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter.normal_(0.0, 0.2, generator=generator)
        for file in duals(kind).folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        model.save_pretrained(tmp_path)
        ours = vlprune.load(str(tmp_path))
        masks = {a.name: torch.rand(a.weight.shape, generator=generator) < 0.1 for a in ours.layers()}
        apply_masks(ours.layers(), masks, {})
        return ours

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_graphs_pack(kind, wide, data, tmp_path):
    try:
        operators.isa()
    except vlprune.errors.MachineError:
        pytest.skip("no operators are built")
    model = wide(kind)
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    spec = exporters.task_spec(model, "retrieval")
    rows = exporters.export(model, "retrieval", spec, plain, data)
    assert all(0.05 < row["nonzero_fraction"] < 0.15 for row in rows)
    packs = exporters.pack_task(model, plain, packed, data, values="fp32", target="portable", threshold=None)
    assert all(row["linears_packed"] == 8 and row["max_abs_diff"] < 1e-4 for row in packs)
    activation = {"clip": b"gelu", "legacy": b"quick_gelu", "siglip": b"gelu_tanh"}[kind]
    for name in ("image_encoder", "text_encoder"):
        nodes = onnx.load(packed / f"{name}.onnx").graph.node
        # Per layer: query, key and value in one, attention, projection, both Linears of the network in one.
        ours = Counter(node.op_type for node in nodes if node.domain == "vlprune")
        assert ours == {"SparseLinear": 4, "Attention": 2, "SparseMlp": 2}
        for node in nodes:
            if node.op_type == "SparseMlp":
                assert [a.s for a in node.attribute if a.name == "activation"] == [activation]
        assert (packed / f"{name}.onnx").stat().st_size < 0.7 * (plain / f"{name}.onnx").stat().st_size
    found = evaluate("retrieval", load_graphs(packed, "cpu", 1), spec, model.processor, data)
    assert found.values == evaluate("retrieval", load_graphs(plain, "cpu", 1), spec, model.processor, data).values


@pytest.mark.parametrize("kind", KINDS)
def test_cut_models_export(kind, duals, data, tmp_path):
    from vlprune.structured import Plan, cut

    model = vlprune.load(str(duals(kind).folder))
    before = sum(row["bytes"] for row in _exported(model, data, tmp_path / "whole"))
    units = {}
    for number, group in enumerate(model.groups()):  # every layer another shape
        kept = torch.zeros(group.shape, dtype=torch.bool)
        kept[: 1 + number % 3, *([slice(0, 3 + number)] if group.kind == "attention" else [])] = True
        if group.kind == "ffn":
            kept[: 8 + number] = True
        units[group.name] = kept
    cut(model, Plan(units, {"vision": torch.tensor([False, True])}))
    rows = _exported(model, data, tmp_path / "cut")  # compares with PyTorch
    assert sum(row["bytes"] for row in rows) < 0.7 * before
    assert all(row["max_abs_diff"] < 1e-5 for row in rows)


def _exported(model, data, folder):
    folder.mkdir()
    return exporters.export(model, "retrieval", exporters.task_spec(model, "retrieval"), folder, data)
