"""Graphs in fp16 and int8: what stays in fp32 and why, zeros, unchanged inputs and outputs, what is lost."""

import copy
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vlprune import exporters
from vlprune.errors import MachineError
from vlprune.exporters import half, precision, quantize, ranges
from vlprune.exporters.fusion import reads
from vlprune.exporters.pack import load
from vlprune.names import COSINES
from vlprune.runtime.session import OnnxGraph, load_graphs, open_bytes

from .conftest import SPARSITY, TASKS, export, make_data, make_model


HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def measured(small, exported):
    """Task -> ranges of its graphs."""
    found = {}

    def make(task):
        if task not in found:
            made = exported[task]
            found[task] = ranges.measure(made.folder, made.spec, small.model.processor, make_data(task), 1)
        return found[task]

    return make


@pytest.fixture(scope="module")
def converted(small, exported, measured, tmp_path_factory):
    """(task, precision) -> folder, and rows by graph."""
    found = {}

    def make(task, kind):
        if (task, kind) not in found:
            folder, data = tmp_path_factory.mktemp(kind), make_data(task)
            plain = exported[task].folder
            rows = exporters.convert_task(small.model, plain, folder, kind, data, data, measured(task), threads=1)
            found[task, kind] = folder, {row["graph"]: row for row in rows}
        return found[task, kind]

    return make


def small_graph(nodes, tensors=(), width=4, inputs=("x",)):
    ends = [helper.make_tensor_value_info(name, FLOAT, ["n", width]) for name in (*inputs, "y")]
    graph = helper.make_graph(nodes, "g", ends[:-1], ends[-1:], [numpy_helper.from_array(a, n) for n, a in tensors])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def run(model, **feeds):
    return OnnxGraph(open_bytes(model.SerializeToString()), "graph")(feeds)


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_values(small, exported, measured):
    """Every value of a graph, as a session shows it that is asked for all of them."""
    made = exported["retrieval"]
    found = measured("retrieval")["image_encoder"]
    model = load(made.folder / "image_encoder.onnx")
    types = ranges.types_of(model)
    values = [name for node in model.graph.node for name in node.output if types[name] == FLOAT]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in values)
    data = make_data("retrieval")
    shown = run(model, pixel_values=small.model.processor.images(list(data.images)))
    for name in values:
        np.testing.assert_allclose(found[name], (min(shown[name].min(), 0), max(shown[name].max(), 0)), rtol=1e-4)
    assert {tensor.name for tensor in model.graph.initializer if tensor.data_type == FLOAT} <= found.keys()


def test_empty_caches_have_ranges(measured):
    assert "past_key.0" in measured("captioning")["text_decoder"]


# --- fp16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_fp16_graphs(small, exported, converted, task):
    folder, rows = converted(task, "fp16")
    for name, plain in exported[task].onnx.items():
        file = folder / f"{name}.onnx"
        model, before = onnx.load(file), onnx.load(exported[task].folder / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [(v.name, v.type) for v in model.graph.input] == [(v.name, v.type) for v in before.graph.input]
        assert [(v.name, v.type) for v in model.graph.output] == [(v.name, v.type) for v in before.graph.output]
        weights = {t.name: t for t in model.graph.initializer}
        for tensor in before.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if tensor.name in weights and array.ndim == 2 and array.dtype == np.float32:
                assert weights[tensor.name].data_type == HALF
                stored = numpy_helper.to_array(weights[tensor.name])
                np.testing.assert_array_equal(stored, array.astype(np.float16))
        types = ranges.types_of(model)
        for node in model.graph.node:
            if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2"):
                assert {types[value] for value in (*node.input[:1], *node.output)} == {FLOAT}
            if node.op_type in ("MatMul", "Gemm", "Conv"):
                assert {types[value] for value in (*reads(node), *node.output)} == {HALF}
        row = rows[name]
        assert (row["precision"], row["bytes"]) == ("fp16", file.stat().st_size)
        assert row["bytes"] < 0.7 * (exported[task].folder / f"{name}.onnx").stat().st_size
        assert COSINES["fp16"] < row["cosine_min"] <= 1 and row["max_abs_diff"] > 0
        kinds = Counter(reason.split(": ")[1].split()[0] for reason in row["kept_fp32"])
        assert kinds["LayerNormalization"] == sum(n.op_type == "LayerNormalization" for n in before.graph.node)
        assert kinds.keys() <= {"LayerNormalization", "Softmax", "ReduceL2"}
        assert (folder / "task.json").read_text() == (exported[task].folder / "task.json").read_text()
        assert plain.session.get_inputs()[0].name  # the plain graph is still there
    assert rows["image_encoder"]["nonzero_fraction"] == pytest.approx(1 - SPARSITY, abs=0.02)


def test_what_overflows_stays_in_fp32():
    """x * 300 * 300 / 300 is far from overflowing in fp32, and infinite in fp16."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["a"]),
        helper.make_node("Mul", ["a", "k"], ["b"]),
        helper.make_node("Div", ["b", "k"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["y"]),
    ]
    model = small_graph(nodes, [("k", np.float32(300))])
    x = np.linspace(1, 3, 8, dtype=np.float32).reshape(2, 4)
    found = {"x": (0, 3.0), "a": (0, 900.0), "b": (0, 270000.0), "c": (0, 900.0), "y": (0, 903.0), "k": (0, 300.0)}
    kept = half.kept_nodes(model, found)
    assert kept == {
        "b": "b reaches 2.7e+05, fp16 ends at 65504",
        "c": "b reaches 2.7e+05, fp16 ends at 65504",
    }
    safe, careless = (half.rounding(half.to_half(model, names)) for names in (kept, {}))
    expected = run(model, x=x)["y"]
    np.testing.assert_allclose(run(safe, x=x)["y"], expected, rtol=2e-3)
    assert np.isinf(run(careless, x=x)["y"]).any()
    half_model = half.to_half(model, kept)
    casts = [(n.input[0], n.output[0]) for n in half_model.graph.node if n.op_type == "Cast"]
    assert not any("b" in (before, after) for before, after in casts)  # it is never squeezed through fp16
    weights = {t.name: t.data_type for t in half_model.graph.initializer}
    assert weights == {"k": HALF, "k/fp32": FLOAT}  # read in both types


def test_nan_and_unknown_operators_stay_in_fp32():
    nodes = [helper.make_node("Cos", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    model = small_graph(nodes)
    kept = half.kept_nodes(model, {"x": (0, 1), "a": (float("nan"), float("nan")), "y": (0, 1)})
    assert kept["a"] == "Cos loses accuracy in fp16" and "nan" in kept["y"]


def test_rounding_shows_what_a_gpu_would_give():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Add", ["a", "b"], ["y"])]
    random = np.random.default_rng(0)
    w, b, x = random.normal(size=(4, 4)), random.normal(size=4), random.normal(size=(3, 4))
    w, b, x = (array.astype(np.float32) for array in (w, b, x))
    model = half.to_half(small_graph(nodes, [("w", w), ("b", b)]), {})
    got = run(half.rounding(model), x=x)["y"]
    h = lambda array: array.astype(np.float16).astype(np.float32)  # noqa: E731
    np.testing.assert_array_equal(got, h(h(h(x) @ h(w)) + h(b)))


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8-static", "int8-dynamic"])
@pytest.mark.parametrize("task", TASKS)
def test_int8_graphs(exported, converted, task, kind):
    folder, rows = converted(task, kind)
    for name, row in rows.items():
        model = onnx.load(folder / f"{name}.onnx")
        plain = onnx.load(exported[task].folder / f"{name}.onnx")
        before = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
        after = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        products = quantize.constant_products(plain)
        weights = {node.input[1] for node in products if node.op_type == "MatMul"}
        assert weights and row["kept_fp32"] == []
        for weight in weights:
            stored = after[weight + quantize.QUANTIZED]
            assert stored.dtype == np.int8 and not stored[before[weight] == 0].any()  # zeros stay zeros
            scale = after[weight + "_scale"]
            assert scale.shape == (stored.shape[1],) and not after[weight + "_zero_point"].any()  # per channel
            np.testing.assert_allclose(stored * scale, before[weight], atol=0.51 * scale.max())
        assert row["precision"] == kind and COSINES[kind] < row["cosine_min"] <= 1
        whole = next(other for other in exported[task].rows if other["graph"] == name)
        assert 0.9 * whole["nonzero_fraction"] < row["nonzero_fraction"] <= whole["nonzero_fraction"]
        assert row["bytes"] < (exported[task].folder / f"{name}.onnx").stat().st_size
        operators = Counter(node.op_type for node in model.graph.node)
        if kind == "int8-static":
            assert operators["QuantizeLinear"] and operators["DequantizeLinear"] > operators["QuantizeLinear"]
        else:
            assert operators["DynamicQuantizeLinear"] and operators["MatMulInteger"] == len(products)


def test_static_graphs_run_as_functions_of_the_same_arrays(exported, converted):
    folder, _ = converted("captioning", "int8-static")
    graphs = load_graphs(folder, threads=1)
    for name, plain in exported["captioning"].onnx.items():
        names = [[value.name for value in graph.session.get_inputs()] for graph in (plain, graphs[name])]
        assert names[0] == names[1]


def sensitive(small, tmp_path):
    """A model, one of whose layers has an input of 1000 beside small ones: int8 cannot show both."""
    model = make_model(seed=3)
    with torch.no_grad():
        norm = model.vision_model.encoder.layers[1].layer_norm2
        norm.weight.mul_(0.001)
        norm.bias.mul_(0.02)
        norm.bias[0] = 30.0
        model.vision_model.encoder.layers[1].mlp.fc1.weight[:, 0] = 0.0
    return export(model, "retrieval", tmp_path / "plain"), model


def test_a_product_that_int8_ruins_is_found_and_left_alone(small, tmp_path):
    made, model = sensitive(small, tmp_path)
    data = make_data("retrieval")
    found = ranges.measure(made.folder, made.spec, model.processor, data, 1)
    graph = load(made.folder / "image_encoder.onnx")
    noisy, products = quantize.with_noise(copy.deepcopy(graph), found["image_encoder"])
    outputs = run(noisy, pixel_values=model.processor.images(list(data.images)))
    part = {y: [outputs[f"{y}{quantize.NOISE}/{kind}"] for kind in ("error", "signal")] for y in products}
    noise = {y: np.sqrt(error / signal) for y, (error, signal) in part.items()}
    worst = max(noise, key=lambda y: noise[y])
    assert "layers.1/mlp/fc1" in worst and noise[worst] > 10 * sorted(noise.values())[-2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COSINES, "int8-static", 1.1)  # never reached: all products are left in fp32 at last
        left = precision._sensitive(made.folder, made.spec, model.processor, data, found, 1)
        assert left["image_encoder"].keys() == set(products)
    with pytest.MonkeyPatch.context() as patch:
        graphs = {}
        for excluded in ((), (worst,)):
            quantised = quantize.static(copy.deepcopy(graph), found["image_encoder"], excluded)
            graphs[excluded] = OnnxGraph(open_bytes(quantised.SerializeToString()), "image_encoder")
        pixels = {"pixel_values": model.processor.images(list(data.images))}
        expected = made.onnx["image_encoder"](pixels)["image_states"]
        errors = [float(np.abs(g(pixels)["image_states"] - expected).max()) for g in graphs.values()]
        assert errors[1] < errors[0]
        cosines = []
        for g in graphs.values():
            a, b = expected.reshape(len(expected), -1), g(pixels)["image_states"].reshape(len(expected), -1)
            cosines.append(float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()))
        patch.setitem(COSINES, "int8-static", (cosines[0] + cosines[1]) / 2)
        left = precision._sensitive(made.folder, made.spec, model.processor, data, found, 1)
        assert next(iter(left["image_encoder"])) == worst and "noise of" in left["image_encoder"][worst]
        assert len(left["image_encoder"]) < len(products)


def test_a_graph_of_nan_is_refused(small, tmp_path):
    model = make_model()
    made = export(model, "retrieval", tmp_path / "plain")
    data = make_data("retrieval")
    broken = load(made.folder / "image_encoder.onnx")
    for tensor in broken.graph.initializer:
        if tensor.name.endswith("fc1.weight.T"):
            tensor.CopyFrom(numpy_helper.from_array(np.full(list(tensor.dims), np.nan, np.float32), tensor.name))
    onnx.save(broken, made.folder / "image_encoder.onnx")
    found = ranges.measure(made.folder, made.spec, model.processor, data, 1)
    (tmp_path / "fp16").mkdir()
    with pytest.raises(MachineError, match="image_encoder.onnx gives NaN or infinity"):
        exporters.convert_task(model, made.folder, tmp_path / "fp16", "fp16", data, data, found, threads=1)


@pytest.mark.parametrize("kind", ["fp16", "int8-static"])
def test_graphs_larger_than_protobuf_writes_at_once(kind, small, exported, measured, converted, tmp_path, monkeypatch):
    """The weights go beside the graphs, and nothing else changes."""
    made, data = exported["retrieval"], make_data("retrieval")
    expected = {name: row | {"bytes": 0} for name, row in converted("retrieval", kind)[1].items()}
    monkeypatch.setattr("vlprune.exporters.pack.LIMIT", 2000)
    monkeypatch.setattr("vlprune.exporters.ranges.open_bytes", None)
    found = ranges.measure(made.folder, made.spec, small.model.processor, data, 1)
    assert found == measured("retrieval")
    rows = exporters.convert_task(small.model, made.folder, tmp_path, kind, data, data, found, threads=1)
    assert {row["graph"]: row | {"bytes": 0} for row in rows} == expected
    assert {file.stem for file in tmp_path.glob("*.onnx.data")} == {f"{name}.onnx" for name in expected}
    assert load_graphs(tmp_path, threads=1).keys() == expected.keys()
