"""What `export` writes: names, zeros, metadata, few nodes; models of other shapes; what it refuses."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from vlprune import exporters
from vlprune.errors import MachineError, RequestError
from vlprune.exporters import compare, onnx_files
from vlprune.exporters.blip import graphs as blip_graphs
from vlprune.exporters.blip import past_shapes
from vlprune.runtime.session import load_graphs

from .conftest import SPARSITY, TASKS, export, make_data, make_model, make_spec, random_feeds


def tensors(path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def files(exported):
    return [(task, path) for task in TASKS for path in sorted(exported[task].folder.glob("*.onnx"))]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_every_parameter_is_there_under_its_name(small, exported):
    state = small.model.state_dict()
    for _, path in files(exported):
        stored, names = tensors(path), exporters.parameters(path)
        assert {initializer for initializer, _ in names.values()} == {
            n for n in stored if not n.startswith("/constant/")
        }
        for name, (initializer, transposed) in names.items():
            assert initializer == name + ".T" * transposed
            array = stored[initializer].T if transposed else stored[initializer]
            assert array.tobytes() == state[name].numpy().tobytes(), f"{path.name}: {name}"


def test_every_prunable_layer_of_a_task_is_in_its_graphs(small, exported):
    """A weight that encoder and decoder share may stand under either name."""
    for task in TASKS:
        single = small.model.for_task(task)
        modules = {id(module): name for name, module in single.named_modules()}
        found = set().union(*(exporters.parameters(path) for path in exported[task].folder.glob("*.onnx")))
        for layer in single.layers():
            assert any(f"{modules[id(module)]}.weight" in found for module in layer.modules), (task, layer.name)


def test_zeros_are_exactly_the_masks(small, exported):
    modules = {id(module): name for name, module in small.model.named_modules()}
    masks = {
        f"{modules[id(module)]}.weight": small.masks[layer.name].numpy()
        for layer in small.model.layers()
        for module in layer.modules
    }
    for task in TASKS:
        for row in exported[task].rows:
            stored = tensors(exported[task].folder / row["file"])
            kept = total = 0
            for name, (initializer, transposed) in exporters.parameters(exported[task].folder / row["file"]).items():
                if name in masks:
                    array = stored[initializer].T if transposed else stored[initializer]
                    assert np.array_equal(array != 0, masks[name]), name
                    kept, total = kept + masks[name].sum(), total + masks[name].size
            assert total > 0
            assert row["nonzero_fraction"] == kept / total
            assert abs(row["nonzero_fraction"] - (1 - SPARSITY)) < 0.02


def test_a_shared_weight_is_stored_once(exported):
    """Gather and the last layer read the word embeddings; both towers read the tied cross-attention."""
    decoder = tensors(exported["captioning"].folder / "text_decoder.onnx")
    names = [name for name in decoder if "word_embeddings" in name or "cls.predictions.decoder" in name]
    assert names == ["text_decoder.bert.embeddings.word_embeddings.weight"]
    question = exporters.parameters(exported["vqa"].folder / "question_encoder.onnx")
    assert sum("crossattention.self.key.weight" in name for name in question) == 2  # layers


# --- files ------------------------------------------------------------------------------------------------------------


def test_rows_and_files(exported):
    for task in TASKS:
        made = exported[task]
        assert [row["graph"] for row in made.rows] == list(made.torch)
        for row in made.rows:
            assert row.keys() == {"graph", "file", "bytes", "nonzero_fraction", "max_abs_diff", "cosine_min"}
            assert row["bytes"] == (made.folder / row["file"]).stat().st_size
            assert 0 < row["max_abs_diff"] < 1e-5
            assert 0.999999 < row["cosine_min"] <= 1
        assert json.loads((made.folder / "task.json").read_text()) == made.spec
        names = {path.name for path in made.folder.iterdir()}
        assert {"tokenizer.json", "preprocessor_config.json", "task.json"} < names
        assert not [name for name in names if name.startswith(".")]
        assert {n for n in names if n.endswith(".onnx")} == {row["file"] for row in made.rows}


def test_files_are_valid_and_say_what_they_are(exported):
    for task, path in files(exported):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        assert [opset.version for opset in model.opset_import] == [18]
        assert model.producer_name == "vlprune"
        notes = {entry.key: entry.value for entry in model.metadata_props}
        row = next(row for row in exported[task].rows if row["file"] == path.name)
        assert float(notes.pop("vlprune.sparsity")) == pytest.approx(1 - row["nonzero_fraction"], abs=1e-6)
        assert notes.pop("vlprune.version")
        assert notes == {
            "vlprune.variant": "random-0.6",
            "vlprune.family": "blip",
            "vlprune.task": task,
            "vlprune.graph": path.stem,
        }


def test_graphs_hold_no_bookkeeping(exported):
    """Operators per layer are what the mathematics needs; sizes are looked up a few times per graph at most."""
    for _, path in files(exported):
        model = onnx.load(path)
        counts = Counter(node.op_type for node in model.graph.node)
        assert not counts.keys() & {"Constant", "Identity", "If", "Loop", "ConstantOfShape", "Where", "Equal", "Mod"}
        assert counts["Shape"] <= 4
        assert counts["Slice"] <= 1
        weights = {tensor.name for tensor in model.graph.initializer}
        assert not [n.name for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in weights]
        read = {name for node in model.graph.node for name in node.input}
        assert weights <= read
    assert sum(1 for _ in onnx.load(exported["vqa"].folder / "image_encoder.onnx").graph.node) < 75
    assert sum(1 for _ in onnx.load(exported["vqa"].folder / "answer_decoder.onnx").graph.node) < 155


def test_onnxruntime_has_nothing_to_warn_of(exported, capfd):
    import onnxruntime

    for _, path in files(exported):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 2
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("opset", [17, 20])
def test_other_opsets(small, tmp_path, opset):
    made = export(small.model, "captioning", tmp_path, opset=opset)
    path = tmp_path / "text_decoder.onnx"
    assert [entry.version for entry in onnx.load(path).opset_import] == [opset]
    onnx.checker.check_model(path, full_check=True)
    assert max(row["max_abs_diff"] for row in made.rows) < 1e-5


def test_large_weights_lie_beside_the_graph(small, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "LIMIT", 10_000)
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # and torch's own file, which Optimum then splits, too
    made = export(small.model, "retrieval", tmp_path / "first")
    moved = tmp_path / "second"
    shutil.move(tmp_path / "first", moved)  # the reference to the data must not hold the old path
    names = {path.name for path in moved.iterdir()}
    for row, inside in zip(made.rows, exported["retrieval"].rows, strict=True):
        assert {row["file"], row["file"] + ".data"} < names
        assert (moved / row["file"]).stat().st_size < inside["bytes"] / 2
        assert abs(row["bytes"] - inside["bytes"]) < 40_000  # pages are aligned
        assert exporters.parameters(moved / row["file"]) == exporters.parameters(
            exported["retrieval"].folder / row["file"]
        )
    feeds = random_feeds(blip_graphs(small.model, "retrieval")["itm"], 2, 5)
    np.testing.assert_array_equal(
        load_graphs(moved)["itm"](feeds)["itm_logits"], exported["retrieval"].onnx["itm"](feeds)["itm_logits"]
    )


def test_export_is_quiet_and_leaves_the_model_as_it_was(tmp_path, capfd, recwarn):
    model = make_model()
    config, state = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    level = logging.root.manager.disable
    export(model, "vqa", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "onnx" in str(warning.message).lower()]
    assert model.config.to_dict() == config
    assert model.tied and not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert logging.root.manager.disable == level


# --- other models -----------------------------------------------------------------------------------------------------


def narrower(linear: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    cut = nn.Linear(inputs, outputs)
    cut.weight.data = linear.weight.data[:outputs, :inputs].clone()
    cut.bias.data = linear.bias.data[:outputs].clone()
    return cut


def cut_text(layer, block: str, heads: int, width: int) -> None:
    """Keep `heads` heads of `width` in one attention of a text tower."""
    attention = getattr(layer, block).self
    attention.num_attention_heads, attention.attention_head_size = heads, width
    for name in ("query", "key", "value"):
        setattr(attention, name, narrower(getattr(attention, name), 32, heads * width))
    output = getattr(layer, block).output
    output.dense = narrower(output.dense, heads * width, 32)


@pytest.mark.parametrize("task", TASKS)
def test_layers_of_different_shapes(task, tmp_path):
    model = make_model(seed=2).for_task(task)
    vision = model.vision_model.encoder.layers
    vision[1].self_attn.num_heads = 1
    vision[1].self_attn.qkv = narrower(vision[1].self_attn.qkv, 32, 48)
    vision[1].self_attn.projection = narrower(vision[1].self_attn.projection, 16, 32)
    vision[0].mlp.fc1, vision[0].mlp.fc2 = narrower(vision[0].mlp.fc1, 32, 40), narrower(vision[0].mlp.fc2, 40, 32)
    for tower in model._text_towers():
        cut_text(tower.encoder.layer[0], "attention", 1, 16)
        cut_text(tower.encoder.layer[1], "attention", 2, 8)
        cut_text(tower.encoder.layer[1], "crossattention", 1, 12)
        dense = tower.encoder.layer[0]
        dense.intermediate.dense = narrower(dense.intermediate.dense, 32, 24)
        dense.output.dense = narrower(dense.output.dense, 24, 32)
    made = export(model, task, tmp_path)
    assert max(row["max_abs_diff"] for row in made.rows) < 1e-5
    assert all(row["nonzero_fraction"] == 1 for row in made.rows)
    if task != "retrieval":
        assert past_shapes(model) == [(1, 16), (2, 8)]
        assert made.spec["past_shapes"] == [[1, 16], [2, 8]]
        decoder = made.onnx[made.spec["decoder"]].session
        shapes = {value.name: value.shape[1::2] for value in decoder.get_inputs() if value.name[-1].isdigit()}
        assert [shapes[f"past_key.{layer}"] for layer in (0, 1)] == [[1, 16], [2, 8]]
        assert [shapes[f"cross_value.{layer}"] for layer in (0, 1)] == [[2, 16], [1, 12]]


def test_untied_towers_keep_their_own_weights(tmp_path):
    model = make_model(seed=3).for_task("vqa")
    for layer in model.text_decoder.bert.encoder.layer:
        for name in ("key", "value"):
            linear = getattr(layer.crossattention.self, name)
            setattr(layer.crossattention.self, name, narrower(linear, 32, 32))
            getattr(layer.crossattention.self, name).weight.data.mul_(-0.5)
    export(model, "vqa", tmp_path)
    names = exporters.parameters(tmp_path / "question_encoder.onnx")
    assert sum("crossattention.self.key.weight" in name for name in names) == 4


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_graph_that_computes_something_else_is_refused(small, tmp_path, monkeypatch):
    original = onnx_files.simplify

    def broken(*args):
        model = original(*args)
        for index, tensor in enumerate(model.graph.initializer):
            if tensor.name.endswith("layer_norm1.bias"):
                array = numpy_helper.to_array(tensor) + np.float32(0.01)
                model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    monkeypatch.setattr(onnx_files, "simplify", broken)
    with pytest.raises(
        MachineError, match=r"image_encoder.onnx differs from PyTorch by .* \(relative .*, allowed 1e-04\)"
    ):
        export(small.model, "captioning", tmp_path)


def test_infinite_outputs_are_refused(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.text_decoder.bert.encoder.layer[1].attention.self.value.bias[0] = float("nan")
    with pytest.raises(MachineError, match="text_decoder.onnx gives NaN or infinity in logits"):
        export(model, "captioning", tmp_path)


@pytest.mark.parametrize("opset", [16, 21])
def test_unsupported_opsets_are_refused(small, tmp_path, opset):
    with pytest.raises(RequestError, match=f"opset {opset} is not supported: choose 17 to 20"):
        export(small.model, "vqa", tmp_path, opset=opset)


def test_parameters_of_a_file_that_is_no_onnx(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"not a protobuf \xff\xff\xff")
    with pytest.raises(RequestError, match="no readable ONNX file"):
        exporters.parameters(path)
    with pytest.raises(RequestError, match="no readable ONNX file"):
        exporters.parameters(tmp_path / "missing.onnx")


# --- the comparison itself --------------------------------------------------------------------------------------------


def test_difference_counts_scale_and_direction():
    difference = compare.Difference()
    difference.add(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.5], [0.0, 0.0]]))
    assert difference.max_abs_diff == 0.5
    assert difference.relative == 0.5 / 4
    assert difference.cosine_min == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    difference.add(np.array([[0.1]]), np.array([[-0.1]]))  # small values count as they are
    assert difference.relative == pytest.approx(0.2)
    assert difference.cosine_min == pytest.approx(-1)
    difference.add(np.array([[0.0]]), np.array([[0.05]]))
    assert difference.cosine_min == pytest.approx(-1)
    with pytest.raises(ValueError, match=r"shape \[1, 2\] instead of \[1, 1\]"):
        difference.add(np.zeros((1, 1)), np.zeros((1, 2)))


@pytest.mark.parametrize("task", TASKS)
def test_every_graph_is_compared_with_padding_one_and_five_rows_and_a_cache(small, exported, task):
    calls = []

    def recorded(name):
        def run(feeds):
            calls.append((name, feeds))
            return exported[task].torch[name](feeds)

        return run

    spec = make_spec(small.model, task)
    graphs = {name: recorded(name) for name in exported[task].torch}
    compare.compare(graphs, exported[task].onnx, spec, small.model.processor, make_data(task))
    for name in graphs:
        fed = [feeds for called, feeds in calls if called == name]
        assert {len(next(iter(feeds.values()))) for feeds in fed} == {1, 5}
        if "attention_mask" in fed[0]:
            for rows in (1, 5):
                assert any((f["attention_mask"] == 0).any() for f in fed if len(f["attention_mask"]) == rows)
        if name == spec.get("decoder"):
            lengths = {(feeds["past_key.0"].shape[2], feeds["input_ids"].shape[1]) for feeds in fed}
            assert {(0, 1), (1, 1), (2, 3)} < lengths
            assert any(past == 0 and length > 3 for past, length in lengths)
            assert any(past == 5 for past, _ in lengths)
            assert any((feeds["cross_mask"] == 0).any() for feeds in fed)


def test_a_data_set_of_one_sample_is_enough(small, exported):
    data = make_data("retrieval").keep([3])
    spec = SimpleNamespace(**exported["retrieval"].spec)
    found = compare.compare(
        exported["retrieval"].torch, exported["retrieval"].onnx, vars(spec), small.model.processor, data
    )
    assert all(difference.max_abs_diff < 1e-5 for difference in found.values())


def test_an_empty_data_set_is_refused(small, exported):
    made = exported["vqa"]
    with pytest.raises(RequestError, match="drawn has no samples"):
        compare.compare(made.torch, made.onnx, made.spec, small.model.processor, make_data("vqa").keep([]))


def test_the_package_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, vlprune.exporters; print([m for m in ('torch', 'onnx', 'optimum') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert Path(exporters.__file__).name == "__init__.py"
