"""The layout of sparse weights, what packing finds in a graph, and that packed and unpacked graphs compute the same."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vlprune.errors import RequestError
from vlprune.exporters import pack as packing
from vlprune.exporters.blip import graphs as blip_graphs
from vlprune.exporters.layout import choose, decode, encode
from vlprune.exporters.pack import THRESHOLDS, is_packed, pack, unpack
from vlprune.runtime import operators

from .conftest import TASKS, random_feeds
from .reference_ops import evaluate


# --- the layout -------------------------------------------------------------------------------------------------------


def sparse(shape, zeros=0.8, seed=0, group=1):
    """A weight with a share of zeros, in groups of rows."""
    rng = np.random.default_rng(seed)
    weight = 0.2 * rng.normal(size=shape).astype(np.float32)
    mask = rng.random((shape[0] // group, *shape[1:])) < zeros
    weight[np.repeat(mask, group, axis=0)] = 0
    return weight


def by_loops(weight, block_columns, panel_rows, group_rows):
    """The layout as its description reads."""
    outputs, inputs = weight.shape
    found = {"values": [], "indices": [], "rows": [], "counts": []}
    for panel in range(0, outputs, panel_rows):
        groups = range(panel, min(panel + panel_rows, outputs), group_rows)
        for block in range(0, inputs, block_columns):
            columns = range(block, min(block + block_columns, inputs))
            kept = {row: [k for k in columns if weight[row : row + group_rows, k].any()] for row in groups}
            for row in sorted(groups, key=lambda row: (-len(kept[row]), row)):
                found["rows"].append((row - panel) // group_rows)
                found["counts"].append(len(kept[row]))
                for column in kept[row]:
                    found["indices"].append(column - block)
                    found["values"] += list(weight[row : row + group_rows, column])
    return found


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 256), st.integers(1, 64), st.booleans())


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([0, 0.3, 0.9, 1]), st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
def test_layout_is_the_described_one_and_comes_back(sizes, zeros, seed, dtype):
    outputs, inputs, block, panel, grouped = sizes
    group = 4 if grouped else 1
    outputs, panel = outputs * group, panel * group
    weight = sparse((outputs, inputs), zeros, seed, group)
    options = {"block_columns": block, "panel_rows": panel, "group_rows": group}
    arrays = encode(weight, **options, dtype=dtype)
    assert {name: array.dtype for name, array in arrays.items()} == {
        "values": dtype, "indices": np.uint8, "rows": np.uint8, "counts": np.uint16
    }  # fmt: skip
    for name, expected in by_loops(weight, **options).items():
        np.testing.assert_array_equal(arrays[name], np.array(expected, np.float32).astype(arrays[name].dtype), name)
    back = decode(**arrays, in_features=inputs, out_features=outputs, **options)
    np.testing.assert_array_equal(back, weight.astype(dtype).astype(np.float32))
    assert back.dtype == np.float32


def test_nan_and_infinity_are_kept():
    weight = np.zeros((8, 5), np.float32)
    weight[1, 2], weight[7, 4], weight[3, 0] = np.nan, -np.inf, 1e-30
    for group in (1, 4):
        options = {"block_columns": 5, "panel_rows": 8, "group_rows": group}
        for dtype in (np.float32, np.float16):
            back = decode(**encode(weight, **options, dtype=dtype), in_features=5, out_features=8, **options)
            np.testing.assert_array_equal(back, weight.astype(dtype).astype(np.float32))


def test_sizes_are_chosen_by_the_mask():
    assert choose(sparse((256, 768), 0.9)) == {"block_columns": 192, "panel_rows": 128, "group_rows": 1}
    assert choose(sparse((256, 768), 0.75)) == {"block_columns": 128, "panel_rows": 128, "group_rows": 1}
    assert choose(sparse((256, 768), 0.75, group=4))["group_rows"] == 4
    assert choose(sparse((256, 60), 0.9))["block_columns"] == 60
    nearly = sparse((256, 768), 0.75, group=4)
    nearly[sparse(nearly.shape, 0.9, seed=1) != 0] = 0  # a tenth of the groups' weights: 1.11 times the nonzeros
    assert choose(nearly)["group_rows"] == 4
    nearly[sparse(nearly.shape, 0.9, seed=2) != 0] = 0
    assert choose(nearly)["group_rows"] == 1
    assert choose(np.zeros((256, 768), np.float32))["group_rows"] == 1
    assert choose(sparse((6, 8), 0.5, group=2))["group_rows"] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block_columns": 0}, "block_columns"),
        ({"block_columns": 257}, "block_columns"),
        ({"panel_rows": 0}, "panel_rows"),
        ({"panel_rows": 300}, "panel_rows"),
        ({"panel_rows": 6, "group_rows": 4}, "panel_rows"),
        ({"group_rows": 2}, "group_rows"),
        ({"group_rows": 4}, "group_rows 4 does not fit 6 rows"),
    ],
)
def test_sizes_out_of_range_are_refused(change, words):
    options = {"block_columns": 8, "panel_rows": 8, "group_rows": 1} | change
    with pytest.raises(RequestError, match=words):
        encode(np.ones((6 if words != "panel_rows" else 8, 8), np.float32), **options)


def test_weights_beyond_half_precision_are_refused():
    with pytest.raises(RequestError, match="float16"):
        encode(np.full((2, 2), 7e4, np.float32), block_columns=2, panel_rows=2, dtype=np.float16)
    with pytest.raises(RequestError, match="no matrix"):
        encode(np.zeros(3, np.float32), block_columns=2, panel_rows=2)
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(RequestError, match="1 or more"):
            encode(np.zeros(shape, np.float32), block_columns=2, panel_rows=2)


def packed_arrays():
    """A weight of 12 x 20 in panels of 8 rows and blocks of 8 columns: the last of each is smaller."""
    options = {"block_columns": 8, "panel_rows": 8, "group_rows": 1}
    return encode(sparse((12, 20), 0.5), **options), {"in_features": 20, "out_features": 12, **options}


def set_at(name, position, value):
    def change(arrays, sizes):
        arrays[name][position] = value

    return change


def cut(name):
    def change(arrays, sizes):
        arrays[name] = arrays[name][:-1]

    return change


def cast(name, dtype):
    def change(arrays, sizes):
        arrays[name] = arrays[name].astype(dtype)

    return change


def resize(**changes):
    def change(arrays, sizes):
        sizes.update(changes)

    return change


def swap_indices(arrays, sizes):
    start = int(np.cumsum(arrays["counts"])[np.argmax(arrays["counts"] >= 2)]) - 2
    arrays["indices"][start : start + 2] = arrays["indices"][start : start + 2][::-1]


def repeat_index(arrays, sizes):
    start = int(np.cumsum(arrays["counts"])[np.argmax(arrays["counts"] >= 2)]) - 2
    arrays["indices"][start] = arrays["indices"][start + 1]


def grow_count(arrays, sizes):
    arrays["counts"][-1] = 5  # the last block is 4 wide


def matrix(arrays, sizes):
    arrays["values"] = arrays["values"][None]


MALFORMED = {
    "row outside its panel": (set_at("rows", 0, 8), "outside its panel"),
    "row outside the last panel": (set_at("rows", -1, 7), "outside its panel"),
    "row twice": (lambda a, s: a["rows"].__setitem__(0, a["rows"][1]), "twice in a block"),
    "index outside the block": (set_at("indices", 0, 8), "outside its block"),
    "index outside the last block": (set_at("indices", -1, 5), "outside its block"),
    "indices descend": (swap_indices, "do not ascend"),
    "index twice": (repeat_index, "do not ascend"),
    "count beyond the block": (grow_count, "larger than its block"),
    "counts do not add up": (lambda a, s: a["counts"].__setitem__(0, a["counts"][0] - 1), "do not fit"),
    "values missing": (cut("values"), "do not fit"),
    "indices missing": (cut("indices"), "do not fit"),
    "rows missing": (cut("rows"), "11 rows|35 rows|rows and"),
    "counts missing": (cut("counts"), "counts instead of"),
    "values of another type": (cast("values", np.float64), "float64"),
    "indices of another type": (cast("indices", np.int8), "int8"),
    "rows of another type": (cast("rows", np.uint16), "uint16"),
    "counts of another type": (cast("counts", np.int64), "int64"),
    "a matrix": (matrix, r"\[1, "),
    "more outputs": (resize(out_features=13), "instead of"),
    "more inputs": (resize(in_features=25), "instead of"),
    "enormous": (resize(in_features=2**60, out_features=2**60), "instead of"),
    "no outputs": (resize(out_features=0), "1 or more"),
    "negative": (resize(in_features=-20), "1 or more"),
    "no panels": (resize(panel_rows=0), "panel_rows"),
    "groups": (resize(group_rows=4), "rows and"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_weights_are_refused(name):
    change, words = MALFORMED[name]
    arrays, sizes = packed_arrays()
    assert np.array_equal(decode(**arrays, **sizes), sparse((12, 20), 0.5))
    change(arrays, sizes)
    with pytest.raises(RequestError, match=words):
        decode(**arrays, **sizes)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["indices", "rows", "counts"]), st.data())
def test_a_changed_byte_is_refused_or_harmless(name, data):
    arrays, sizes = packed_arrays()
    position = data.draw(st.integers(0, len(arrays[name]) - 1))
    arrays[name][position] = data.draw(st.integers(0, np.iinfo(arrays[name].dtype).max))
    try:
        weight = decode(**arrays, **sizes)
    except RequestError:
        return
    assert weight.shape == (12, 20)
    assert np.count_nonzero(weight) == np.count_nonzero(arrays["values"])


# --- graphs made by hand ----------------------------------------------------------------------------------------------

K, N = 96, 64
FLOAT = TensorProto.FLOAT
VOCABULARY = 120


class Graph:
    """Builds a small graph; every call adds a node and names its output."""

    def __init__(self, **inputs):
        self.inputs = inputs
        self.nodes, self.tensors = [], []

    def constant(self, value, name=None):
        array = np.asarray(value, np.float32 if np.asarray(value).dtype.kind == "f" else np.int64)
        name = name or f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def __call__(self, kind, *inputs, name=None, outputs=1, **options):
        read = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        names = [name or f"{kind}_{len(self.nodes)}"] if outputs == 1 else [
            f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)
        ]  # fmt: skip
        self.nodes.append(helper.make_node(kind, read, names, names[0], **options))
        return names[0] if outputs == 1 else names

    def linear(self, x, name="fc", shape=(N, K), bias=True, zeros=0.8, seed=0, **more):
        weight = self.constant(sparse(shape, zeros, seed).T, f"{name}.weight.T")
        product = self("MatMul", x, weight)
        return self("Add", vector(shape[0], seed, f"{name}.bias", self), product) if bias else product

    def model(self, *outputs, opset=18, **shapes):
        def info(name, shape):
            return helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "made",
            [info(name, shape) for name, shape in self.inputs.items()],
            [info(name, shapes.get(name)) for name in outputs],
            self.tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
        for value, known in zip(graph.output, inferred, strict=True):
            value.CopyFrom(known)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def vector(size, seed, name, graph):
    return graph.constant(np.random.default_rng(seed + 100).normal(size=size).astype(np.float32), name)


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if is_packed(model):
        operators.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


SIZES_OF = {"batch": 2, "length": 5, "past": 3, "past + length": 8, "other": 7}


def feeds_of(model, seed=0):
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [SIZES_OF.get(d.dim_param, d.dim_value) for d in dims]
        feeds[value.name] = rng.normal(size=shape).astype(np.float32)
    return feeds


def packed_well(model, feeds=None, **options):
    """Pack with checks: the same function before, packed, and unpacked; the input is left alone."""
    before = model.SerializeToString()
    packed, rows = pack(model, target="avx512", **options)
    assert model.SerializeToString() == before
    onnx.checker.check_model(packed)
    feeds = feeds_of(model) if feeds is None else feeds
    expected = run(model, feeds)
    for got, wanted in zip(evaluate(packed, feeds), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-5)
    if is_packed(packed) and operators.available():
        for got, wanted in zip(run(packed, feeds), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-5)
    if is_packed(packed):
        plain = unpack(packed)
        onnx.checker.check_model(plain, full_check=True)
        assert not is_packed(plain) and [entry.domain for entry in plain.opset_import] == [""]
        for got, wanted in zip(run(plain, feeds), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)
        known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for tensor in plain.graph.initializer:
            if "weight" in tensor.name and tensor.name in known:
                np.testing.assert_array_equal(numpy_helper.to_array(tensor), known[tensor.name])
    return packed, rows


def kinds(model):
    return [node.op_type for node in model.graph.node]


def only(model):
    """The one sparse node of a graph: its attributes."""
    (node,) = [node for node in model.graph.node if node.op_type == "SparseLinear"]
    return {a.name: helper.get_attribute_value(a) for a in node.attribute} | {"inputs": list(node.input)}


def x3(**more):
    return Graph(x=["batch", "length", K], **more)


@pytest.mark.parametrize("form", ["bias first", "bias last", "no bias", "bias [1, 1, N]", "rank 2", "rank 1"])
def test_matmul_is_packed_with_its_bias(form):
    graph = Graph(x={"rank 2": ["batch", K], "rank 1": [K]}.get(form, ["batch", "length", K]))
    product = graph("MatMul", "x", graph.constant(sparse((N, K)).T, "fc.weight.T"))
    if form != "no bias":
        bias = np.arange(N, dtype=np.float32)
        name = graph.constant(bias[None, None] if "1, 1" in form else bias, "fc.bias")
        product = graph("Add", *([name, product] if form == "bias first" else [product, name]))
    packed, rows = packed_well(graph.model(product))
    assert kinds(packed) == ["SparseLinear"]
    given = only(packed)
    assert (given["in_features"], given["out_features"], given["activation"]) == (K, N, b"none")
    assert len(given["inputs"]) == (5 if form == "no bias" else 6)
    (row,) = rows
    assert row["packed"] and row["name"] == "fc.weight" and row["shape"] == [N, K] and row["dense_bytes"] == 4 * N * K
    tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
    assert row["bytes"] == sum(len(tensors[name].raw_data) for name in given["inputs"][1:5])
    assert "fc.weight.T" not in tensors
    restored = {tensor.name for tensor in unpack(packed).graph.initializer}
    assert restored == {"fc.weight.T"} | ({"fc.bias"} if form != "no bias" else set())


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, "vector", "row", "scalar"])
@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 2.0)])
def test_gemm_is_packed(transposed, bias, alpha, beta):
    graph = Graph(x=["batch", K])
    weight = sparse((N, K))
    inputs = ["x", graph.constant(weight if transposed else weight.T, "fc.weight")]
    values = {"vector": np.arange(N) / N, "row": np.arange(N)[None] / N, "scalar": np.array(0.25)}
    if bias:
        inputs.append(graph.constant(values[bias].astype(np.float32), "fc.bias"))
    y = graph("Gemm", *inputs, transB=transposed, alpha=alpha, beta=beta)
    packed, _ = packed_well(graph.model(y))
    assert kinds(packed) == ["SparseLinear"]
    plain = unpack(packed)
    assert kinds(plain) == ["Gemm"]
    shapes = {tensor.name: list(tensor.dims) for tensor in plain.graph.initializer}
    if alpha == 1:
        assert shapes["fc.weight"] == ([N, K] if transposed else [K, N])


def test_gemm_that_is_no_linear_stays():
    graph = Graph(x=["batch", K], y=[K, "batch"], c=["batch", N])
    weight = graph.constant(sparse((N, K)).T, "w")
    first = graph("Gemm", "y", weight, transA=1)
    second = graph("Gemm", "x", weight, "c")
    packed, rows = pack(graph.model(first, second), target="avx512")
    assert kinds(packed) == ["Gemm", "Gemm"] and rows == []


def gelu_a(graph, h):
    curve = graph("Add", graph("Erf", graph("Div", h, np.sqrt(2.0))), 1.0)
    return graph("Mul", graph("Mul", h, curve), 0.5)


def gelu_b(graph, h):
    curve = graph("Add", 1.0, graph("Erf", graph("Mul", np.sqrt(0.5), h)))
    return graph("Mul", graph("Mul", 0.5, h), curve)


def gelu_c(graph, h):
    curve = graph("Mul", graph("Add", graph("Erf", graph("Mul", h, np.sqrt(0.5))), 1.0), 0.5)
    return graph("Mul", curve, h)


def tanh_a(graph, h):
    inner = graph("Add", h, graph("Mul", 0.044715, graph("Pow", h, 3.0)))
    curve = graph("Add", graph("Tanh", graph("Mul", inner, np.sqrt(2 / np.pi))), 1.0)
    return graph("Mul", graph("Mul", h, 0.5), curve)


def tanh_b(graph, h):
    inner = graph("Add", graph("Mul", graph("Mul", 0.044715, graph("Mul", h, h)), h), h)
    curve = graph("Add", 1.0, graph("Tanh", graph("Mul", np.sqrt(2 / np.pi), inner)))
    return graph("Mul", 0.5, graph("Mul", h, curve))


def tanh_c(graph, h):
    square = graph("Add", graph("Mul", graph("Mul", h, 0.044715), h), 1.0)
    curve = graph("Tanh", graph("Mul", graph("Mul", h, np.sqrt(2 / np.pi)), square))
    return graph("Mul", graph("Mul", h, 0.5), graph("Add", 1.0, curve))


def quick_a(graph, h):
    return graph("Mul", h, graph("Sigmoid", graph("Mul", h, 1.702)))


def quick_b(graph, h):
    return graph("Mul", graph("Sigmoid", graph("Mul", 1.702, h)), h)


def relu(graph, h):
    return graph("Relu", h)


ACTIVATIONS = {
    gelu_a: "gelu", gelu_b: "gelu", gelu_c: "gelu", tanh_a: "gelu_tanh", tanh_b: "gelu_tanh", tanh_c: "gelu_tanh",
    quick_a: "quick_gelu", quick_b: "quick_gelu", relu: "relu",
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_activations_are_fused(activation):
    graph = x3()
    packed, _ = packed_well(graph.model(activation(graph, graph.linear("x"))))
    assert kinds(packed) == ["SparseLinear"]
    assert only(packed)["activation"].decode() == ACTIVATIONS[activation]
    assert len(packed.graph.initializer) == 5  # the constants of the activation are gone


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_gelu_operator_is_fused(approximate):
    graph = x3()
    model = graph.model(graph("Gelu", graph.linear("x"), approximate=approximate), opset=20)
    packed, _ = packed_well(model)
    assert kinds(packed) == ["SparseLinear"]
    assert only(packed)["activation"] == (b"gelu_tanh" if approximate == "tanh" else b"gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_an_activation_whose_input_is_a_result_is_not_fused(activation):
    graph = x3()
    h = graph.linear("x")
    packed, _ = packed_well(graph.model(activation(graph, h), h))
    assert only(packed)["activation"] == b"none" and len(kinds(packed)) > 1


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_every_value_on_the_way_may_have_another_reader(activation):
    """Whichever value inside the activation is read elsewhere, too: nothing that computes it may vanish."""
    graph = x3()
    activation(graph, graph.linear("x"))
    for inner in [node.output[0] for node in graph.nodes[2:-1]]:
        again = x3()
        y = activation(again, again.linear("x"))
        other = again("Neg", inner)
        packed, _ = packed_well(again.model(y, other))
        assert only(packed)["activation"] == b"none"


@pytest.mark.parametrize("change", ["sqrt", "one", "half", "twice", "quick", "cube"])
def test_what_only_looks_like_an_activation_is_left(change):
    graph = x3()
    h = graph.linear("x")
    if change == "quick":
        y = graph("Mul", h, graph("Sigmoid", graph("Mul", h, 1.7)))
    elif change == "cube":
        inner = graph("Add", h, graph("Mul", 0.05, graph("Pow", h, 3.0)))
        curve = graph("Add", graph("Tanh", graph("Mul", inner, np.sqrt(2 / np.pi))), 1.0)
        y = graph("Mul", graph("Mul", h, 0.5), curve)
    else:
        curve = graph("Erf", graph("Div", h, 1.5 if change == "sqrt" else np.sqrt(2.0)))
        curve = graph("Add", curve, 1.01 if change == "one" else 1.0)
        y = graph("Mul", graph("Mul", h, curve), 0.51 if change == "half" else 0.5)
        if change == "twice":
            y = graph("Mul", y, 2.0)
    packed, _ = packed_well(graph.model(y))
    assert only(packed)["activation"] == (b"gelu" if change == "twice" else b"none")


# --- residuals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_residual_of_the_same_shape_is_fused(order):
    graph = x3(r=["batch", "length", N])
    h = relu(graph, graph.linear("x"))
    packed, _ = packed_well(graph.model(graph("Add", *([h, "r"] if order else ["r", h]))))
    assert kinds(packed) == ["SparseLinear"]
    assert only(packed)["inputs"][6] == "r" and only(packed)["activation"] == b"relu"


@pytest.mark.parametrize(
    "shape", [[N], [1, 1, N], ["batch", 1, N], ["batch", "other", N], ["batch", "length", 1], [1, "batch", "length", N]]
)
def test_a_residual_that_may_be_repeated_is_not_fused(shape):
    graph = x3(r=shape)
    model = graph.model(graph("Add", graph.linear("x"), "r"))
    sizes = {"other": 5} | SIZES_OF
    sizes["other"] = 5
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.normal(size=(2, 5, K)).astype(np.float32),
        "r": rng.normal(size=[sizes.get(size, size) for size in shape]).astype(np.float32),
    }
    packed, _ = packed_well(model, feeds)
    assert kinds(packed) == ["SparseLinear", "Add"]


def test_a_constant_or_doubled_residual_is_not_fused():
    graph = Graph(x=[2, 5, K])
    h = graph.linear("x")
    packed, _ = packed_well(graph.model(graph("Add", graph("Relu", h), np.ones((2, 5, N), np.float32))))
    assert kinds(packed) == ["SparseLinear", "Add"]
    graph = x3()
    h = graph.linear("x")
    packed, _ = packed_well(graph.model(graph("Add", h, h)))
    assert kinds(packed) == ["SparseLinear", "Add"]


def test_shapes_follow_the_residual_stream_where_inference_gives_up():
    """After a sum of two lengths nobody knows, shape inference has a new name for every value."""
    graph = Graph(x=["batch", "length", K], p=["batch", "other", K])
    stream = graph("Add", "x", "p")
    for layer in range(3):
        h = graph.linear(stream, f"{layer}.up", (N, K), seed=2 * layer)
        h = graph.linear(gelu_a(graph, h), f"{layer}.down", (K, N), seed=2 * layer + 1)
        stream = graph("Add", h, stream)
        scale, shift = (graph.constant(np.full(K, v, np.float32)) for v in (1.1, 0.1))
        stream = graph("LayerNormalization", stream, scale, shift)
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 5, K)).astype(np.float32) for name in ("x", "p")}
    packed, _ = packed_well(graph.model(stream), feeds)
    assert kinds(packed) == ["Add"] + 3 * ["SparseMlp", "LayerNormalization"]


def test_a_residual_computed_later_comes_first():
    graph = x3()
    first = graph.linear("x", "first")
    late = graph("Tanh", graph("Neg", graph.linear("x", "second", seed=1)))  # stands behind what it will feed
    packed, _ = packed_well(graph.model(graph("Add", first, late)))
    assert kinds(packed) == ["SparseLinear", "Neg", "Tanh", "SparseLinear"]
    assert packed.graph.node[-1].input[6] == late


def test_two_linears_added_are_two_nodes():
    graph = x3()
    total = graph("Add", graph.linear("x", "first"), graph.linear("x", "second", seed=1))
    packed, _ = packed_well(graph.model(total))
    assert kinds(packed) == ["SparseLinear", "SparseLinear"]


# --- which Linears are packed -----------------------------------------------------------------------------------------


def test_dense_and_small_linears_stay():
    graph = x3()
    h = graph.linear("x", "dense", (N, K), zeros=0.2)
    h = graph.linear(h, "small", (8, N), seed=1)
    packed, rows = packed_well(graph.model(h))
    assert kinds(packed) == ["MatMul", "Add"] * 2 and not is_packed(packed)
    assert [row["packed"] for row in rows] == [False, False]
    assert "of its weights are zero, below 45%" in rows[0]["reason"] and "small: 8 x 64" in rows[1]["reason"]
    assert all(row["bytes"] == row["dense_bytes"] for row in rows)
    packed, _ = packed_well(graph.model(h), threshold=0.1)
    assert kinds(packed) == ["SparseLinear", "MatMul", "Add"]


@pytest.mark.parametrize("target", THRESHOLDS)
def test_thresholds_are_the_targets(target):
    for share, expected in ((THRESHOLDS[target] - 0.02, False), (THRESHOLDS[target] + 0.02, True)):
        graph = x3()
        model = graph.model(graph.linear("x", zeros=share))
        _, rows = pack(model, target=target)
        assert rows[0]["packed"] == expected


def test_a_layer_without_weights_left_is_packed():
    graph = x3()
    packed, rows = packed_well(graph.model(graph.linear("x", zeros=1.0)))
    assert kinds(packed) == ["SparseLinear"] and rows[0]["sparsity"] == 1


def test_a_shared_weight_is_stored_once():
    graph = x3(z=["batch", "length", K])
    weight = graph.constant(sparse((N, K)).T, "shared.weight.T")
    first = graph("Relu", graph("Add", graph("MatMul", "x", weight), vector(N, 0, "first.bias", graph)))
    second = graph("Add", graph("MatMul", "z", weight), vector(N, 1, "second.bias", graph))
    packed, rows = packed_well(graph.model(first, second))
    nodes = packed.graph.node
    assert kinds(packed) == ["SparseLinear"] * 2 and len(rows) == 1
    assert nodes[0].input[1:5] == nodes[1].input[1:5] and nodes[0].input[5] != nodes[1].input[5]
    assert len({node.name for node in nodes}) == 2
    assert {t.name for t in unpack(packed).graph.initializer} == {"shared.weight.T", "first.bias", "second.bias"}


def test_a_weight_that_others_read_stays_dense():
    graph = x3()
    y = graph.linear("x")
    packed, rows = packed_well(graph.model(y, graph("Transpose", "fc.weight.T", perm=[1, 0])))
    assert not is_packed(packed) and rows[0]["reason"] == "Transpose reads the weight, too"


def test_a_weight_that_a_caller_may_replace_stays_dense():
    graph = x3(**{"fc.weight.T": [K, N]})
    y = graph.linear("x")
    packed, rows = packed_well(graph.model(y))
    assert not is_packed(packed) and rows == []


def test_readers_inside_a_subgraph_count():
    graph = x3()
    h = graph.linear("x")
    branch = helper.make_graph([helper.make_node("Neg", [h], ["n"])], "b", [], [
        helper.make_tensor_value_info("n", FLOAT, None)
    ])  # fmt: skip
    graph.tensors.append(numpy_helper.from_array(np.array(True), "yes"))
    graph.nodes.append(helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch))
    packed, _ = packed_well(graph.model(relu(graph, h), "y"))
    assert only(packed)["activation"] == b"none"


def test_half_precision_values():
    graph = x3()
    model = graph.model(graph.linear("x"))
    packed, rows = pack(model, target="avx2", values="fp16")
    feeds = feeds_of(model)
    rounded = helper.make_model(model.graph, opset_imports=model.opset_import, ir_version=8)
    for tensor in rounded.graph.initializer:
        if tensor.name == "fc.weight.T":
            array = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    np.testing.assert_allclose(evaluate(packed, feeds)[0], run(rounded, feeds)[0], atol=1e-5)
    plain = unpack(packed)
    np.testing.assert_array_equal(run(plain, feeds)[0], run(rounded, feeds)[0])
    assert {e.key: e.value for e in plain.metadata_props} == {"vlprune.rounded": "fp16"}
    assert rows[0]["bytes"] < pack(model, target="avx2")[1][0]["bytes"]


def test_weights_beyond_half_precision_stay_dense():
    graph = x3()
    weight = sparse((N, K))
    weight[0, 0] = 1e5
    packed, rows = pack(graph.model(graph("MatMul", "x", weight.T)), target="avx2", values="fp16")
    assert not is_packed(packed) and rows[0]["reason"] == "a weight is beyond the range of fp16"


def tied(graph, size=VOCABULARY, table=None, **options):
    """Words -> rows of a table -> a sparse layer -> scores of all words by the same table."""
    table = sparse((size, K), 0) if table is None else table
    words = graph.constant(table, "words.weight")
    h = graph.linear(graph("Gather", words, "ids"), shape=(K, K))
    rows = graph("Reshape", h, [-1, K])
    return graph("Gemm", rows, words, vector(size, 3, "words.bias", graph), **({"transB": 1} | options))


IDS = {"ids": np.array([[1, 5, 0], [7, 7, 99]])}


def test_a_table_tied_to_an_output_layer_is_halved():
    graph = Graph(ids=["batch", "length"])
    model = graph.model(tied(graph))
    packed, rows = pack(model, target="avx2", values="fp16")
    onnx.checker.check_model(packed)
    assert kinds(packed) == ["Gather", "Cast", "SparseLinear", "Reshape", "HalfLinear"]
    assert {t.name: t.data_type for t in packed.graph.initializer}["words.weight/half"] == TensorProto.FLOAT16
    (row,) = [row for row in rows if not row["packed"]]
    assert row["bytes"] == 2 * VOCABULARY * K and row["dense_bytes"] == 4 * VOCABULARY * K and "fp16" in row["reason"]
    plain = unpack(packed)
    onnx.checker.check_model(plain, full_check=True)
    assert kinds(plain) == ["Gather", "MatMul", "Add", "Reshape", "Gemm"]
    names = {"words.weight", "words.bias"}
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, plain))
    assert names <= set(after)
    np.testing.assert_array_equal(after["words.weight"], before["words.weight"].astype(np.float16).astype(np.float32))
    expected = run(plain, IDS)[0]
    np.testing.assert_allclose(evaluate(packed, IDS)[0], expected, atol=1e-4)
    if operators.available():
        np.testing.assert_allclose(run(packed, IDS)[0], expected, atol=1e-4)
    np.testing.assert_allclose(expected, run(model, IDS)[0], atol=5e-2)


def test_halved_tables_are_unpacked_without_their_metadata():
    graph = Graph(ids=["batch", "length"])
    packed, _ = pack(graph.model(tied(graph)), target="avx2", values="fp16")
    expected = evaluate(packed, IDS)[0]
    del packed.metadata_props[:]
    plain = unpack(packed)
    onnx.checker.check_model(plain, full_check=True)
    np.testing.assert_allclose(run(plain, IDS)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "why", ["fp32", "small", "beyond", "result", "other reader", "other axis", "scaled", "nothing"]
)
def test_a_table_that_cannot_be_halved_stays(why):
    graph = Graph(ids=["batch", "length"])
    table = sparse((VOCABULARY, K), 0)
    if why == "beyond":
        table[0, 0] = 1e5
    y = tied(graph, 40 if why == "small" else VOCABULARY, None if why == "small" else table, **(
        {"alpha": 0.5} if why == "scaled" else {}
    ))  # fmt: skip
    more = {"result": ["words.weight"], "other reader": [graph("Neg", "words.weight")],
            "other axis": [graph("Gather", "words.weight", [0, 1], axis=1)]}.get(why, [])  # fmt: skip
    model = graph.model(y, *more)
    options = {"threshold": 1.0} if why == "nothing" else {}
    packed, _ = pack(model, target="avx2", values="fp32" if why == "fp32" else "fp16", **options)
    assert is_packed(packed) == (why != "nothing") and "HalfLinear" not in kinds(packed)
    assert all(tensor.data_type != FLOAT or "half" not in tensor.name for tensor in packed.graph.initializer)
    assert "words.weight" in {tensor.name for tensor in packed.graph.initializer}


@pytest.mark.parametrize("change", ["sizes", "bias", "no constant", "no attribute", "table"])
def test_malformed_halves_are_refused(change):
    graph = Graph(ids=["batch", "length"])
    packed, _ = pack(graph.model(tied(graph)), target="avx2", values="fp16")
    node = packed.graph.node[-1]
    tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
    if change == "sizes":
        tensors["words.weight/half"].dims[:] = [K, VOCABULARY]
    elif change == "bias":
        tensors["words.bias"].dims[:] = [VOCABULARY - 1]
    elif change == "no constant":
        node.input[1] = "ids"
    elif change == "no attribute":
        del node.attribute[:]
    else:
        entry = next(entry for entry in packed.metadata_props if entry.key == "vlprune.layers")
        entry.value = entry.value.replace('"words.weight", "gather"', '7, "gather"')
    with pytest.raises(RequestError) as error:
        unpack(packed)
    assert "\n" not in str(error.value)


def test_groups_of_four_rows_are_found():
    graph = x3()
    y = graph("MatMul", "x", graph.constant(sparse((N, K), 0.75, group=4).T, "w"))
    packed, rows = packed_well(graph.model(y))
    assert rows[0]["group_rows"] == only(packed)["group_rows"] == 4


# --- two Linears in one node ------------------------------------------------------------------------------------------

WIDE = 80


def pair(graph, activation=relu, x="x", shape=(WIDE, N), zeros=(0.8, 0.8), **more):
    """Two Linears in a row: the value between them, and the result."""
    hidden = graph.linear(x, "fc1", (shape[0], K), zeros=zeros[0], **more)
    hidden = activation(graph, hidden) if activation else hidden
    return hidden, graph.linear(hidden, "fc2", shape[::-1], zeros=zeros[1], seed=1, **more)


def mlp(model):
    """The one SparseMlp of a graph: its attributes."""
    (node,) = [node for node in model.graph.node if node.op_type == "SparseMlp"]
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return given | {"inputs": list(node.input), "output": list(node.output), "name": node.name}


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=lambda f: f.__name__ if f else "none")
@pytest.mark.parametrize("values, bias, residual", [("fp32", True, False), ("fp16", True, True), ("fp32", False, True)])
def test_a_pair_becomes_one_node(activation, values, bias, residual):
    graph = x3(r=["batch", "length", N]) if residual else x3()
    hidden, y = pair(graph, activation, bias=bias)
    model = graph.model(graph("Add", y, "r") if residual else y)
    if values == "fp16":  # weights that half precision holds: packing does not round them
        for tensor in model.graph.initializer:
            if "weight" in tensor.name:
                array = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    packed, rows = packed_well(model, values=values)
    assert kinds(packed) == ["SparseMlp"] and [row["name"] for row in rows] == ["fc1.weight", "fc2.weight"]
    given = mlp(packed)
    assert given["activation"].decode() == (ACTIVATIONS[activation] if activation else "none")
    assert [given[f"{name}_features"] for name in ("in", "hidden", "out")] == [K, WIDE, N]
    assert given["output"] == [model.graph.output[0].name]
    arrays = ("values", "indices", "rows", "counts")
    names = [f"{base}.weight/{name}" for base in ("fc1", "fc2") for name in arrays]
    biases = ["fc1.bias", "fc2.bias"] if bias else ["", ""]
    expected = ["x", *names[:4], biases[0], *names[4:], biases[1], "r" if residual else ""]
    while not expected[-1]:
        expected.pop()
    assert given["inputs"] == expected

    plain = unpack(packed)
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, plain))
    constants = {name for name in after if name.startswith("/constant/")}
    read = {name for name in before if name.startswith("fc")}
    assert after.keys() - constants == read
    for name in read:
        np.testing.assert_array_equal(after[name], before[name], name)
    made = {name for node in plain.graph.node for name in node.output}
    assert hidden in made and given["output"][0] in made
    again, _ = pack(plain, target="avx512", values=values)
    assert list(again.graph.node) == list(packed.graph.node)


def test_a_pair_in_groups_of_four_rows():
    graph = x3()
    weights = [sparse((WIDE, K), 0.75, 0, group=4), sparse((N, WIDE), 0.75, 1)]
    weights += [sparse((WIDE, N), 0.75, 2), sparse((N, WIDE), 0.75, 3, group=4)]
    y = "x"
    for number, weight in enumerate(weights):
        y = graph("MatMul", y, graph.constant(weight.T, f"w{number}"))
        y = graph("Tanh", y) if number == 1 else y
    packed, _ = packed_well(graph.model(y))
    assert kinds(packed) == ["SparseMlp", "Tanh", "SparseMlp"]
    sizes = [{a.name: a.i for a in packed.graph.node[place].attribute} for place in (0, 2)]
    assert [(given["group_rows"], given["hidden_group_rows"]) for given in sizes] == [(4, 1), (1, 4)]


def test_the_residual_of_a_pair_may_be_its_input_or_come_later():
    graph = x3()
    _, y = pair(graph, gelu_a, shape=(WIDE, K))
    packed, _ = packed_well(graph.model(graph("Add", y, "x")))
    assert kinds(packed) == ["SparseMlp"] and mlp(packed)["inputs"][11] == "x"
    graph = x3()
    _, y = pair(graph, gelu_a, shape=(WIDE, K))
    late = graph("Neg", graph("Tanh", "x"))
    packed, _ = packed_well(graph.model(graph("Add", y, late)))
    assert kinds(packed) == ["Tanh", "Neg", "SparseMlp"] and mlp(packed)["inputs"][11] == late


@pytest.mark.parametrize("linears", [3, 4, 5])
def test_of_a_row_of_linears_each_goes_into_one_node(linears):
    graph, y = x3(), "x"
    for number in range(linears):
        shape = (K, N) if number % 2 else (N, K)
        y = graph.linear(y, f"fc{number}", shape, seed=number)
    packed, _ = packed_well(graph.model(y))
    assert kinds(packed) == ["SparseMlp"] * (linears // 2) + ["SparseLinear"] * (linears % 2)


@pytest.mark.parametrize(
    "why", ["result", "read by another", "read by a third Linear", "read by a branch", "residual", "its own residual",
            "second activation", "first dense", "second dense"]
)  # fmt: skip
def test_what_is_no_pair_stays_apart(why):
    graph = x3(r=["batch", "length", WIDE])
    if why == "residual":
        hidden = graph("Add", graph.linear("x", "fc1", (WIDE, K)), "r")
        y = graph.linear(hidden, "fc2", (N, WIDE), seed=1)
    else:
        zeros = (0.2, 0.8) if why == "first dense" else (0.8, 0.2) if why == "second dense" else (0.8, 0.8)
        hidden, y = pair(graph, shape=(WIDE, WIDE if why == "its own residual" else N), zeros=zeros)
    outputs = [y]
    if why == "result":
        outputs.append(hidden)
    elif why == "read by another":
        outputs.append(graph("Neg", hidden))
    elif why == "read by a third Linear":
        outputs.append(graph.linear(hidden, "fc3", (N, WIDE), seed=2))
    elif why == "read by a branch":
        info = helper.make_tensor_value_info("n", FLOAT, None)
        branch = helper.make_graph([helper.make_node("Neg", [hidden], ["n"])], "b", [], [info])
        graph.tensors.append(numpy_helper.from_array(np.array(True), "yes"))
        outputs.append(graph("If", "yes", then_branch=branch, else_branch=branch))
    elif why == "its own residual":
        outputs = [graph("Add", y, hidden)]
    elif why == "second activation":
        outputs = [relu(graph, y)]
    packed, rows = packed_well(graph.model(*outputs))
    sparse_nodes = [kind for kind in kinds(packed) if kind.startswith("Sparse")]
    assert sparse_nodes == ["SparseLinear"] * sum(row["packed"] for row in rows) and sparse_nodes


def test_linears_of_another_domain_are_no_pair():
    graph = x3()
    nodes = [
        helper.make_node("SparseLinear", ["x"], ["h"], domain="other"),
        helper.make_node("SparseLinear", ["h"], ["g"], domain="other"),
    ]
    model = graph.model(graph.linear("x"))
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_tensor_value_info("g", FLOAT, None))
    model.opset_import.append(helper.make_opsetid("other", 1))
    assert kinds(pack(model, target="avx2")[0]) == ["SparseLinear"] * 3


def test_a_pair_made_twice_from_the_same_weights():
    graph = x3(z=["batch", "other", K])
    first, second = (graph.constant(sparse(s, seed=i).T, f"w{i}") for i, s in enumerate([(WIDE, K), (N, WIDE)]))
    results = [graph("MatMul", relu(graph, graph("MatMul", x, first)), second) for x in ("x", "z")]
    packed, rows = packed_well(graph.model(*results))
    assert kinds(packed) == ["SparseMlp"] * 2 and len(rows) == 2
    nodes = packed.graph.node
    assert nodes[0].input[1:] == nodes[1].input[1:] and len({node.name for node in nodes}) == 2
    assert {t.name for t in unpack(packed).graph.initializer} == {"w0", "w1"}


def packed_pair(**more):
    graph = x3(r=["batch", "length", N])
    model = graph.model(graph("Add", pair(graph, gelu_a)[1], "r"))
    return model, pack(model, target="avx2", **more)[0]


@pytest.mark.parametrize("kept", ["nothing", "other keys", "other nodes", "no names", "names that are taken"])
def test_pairs_are_unpacked_without_their_metadata(kept):
    model, packed = packed_pair()
    name = mlp(packed)["name"]
    entry = next(entry for entry in packed.metadata_props if entry.key == "vlprune.layers")
    if kept == "nothing":
        del packed.metadata_props[:]
    elif kept == "other keys":
        packed.metadata_props.remove(entry)
    else:
        taken = {"linears": ["x", "x"], "hidden": "fc1.bias"}
        layer = {"other nodes": None, "no names": {"linears": ["", ""], "hidden": ""}, "names that are taken": taken}
        entry.value = json.dumps({name: layer[kept]} if layer[kept] else {"else": {"linears": ["a", "b"]}})
    plain = unpack(packed)
    onnx.checker.check_model(plain, full_check=True)
    assert not is_packed(plain) and kinds(plain).count("MatMul") == 2
    feeds = feeds_of(model)
    np.testing.assert_allclose(run(plain, feeds)[0], run(model, feeds)[0], atol=1e-5)
    weights = [numpy_helper.to_array(t) for t in plain.graph.initializer if len(t.dims) == 2]
    for name, got in zip(("fc1", "fc2"), weights, strict=True):
        (wanted,) = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name == f"{name}.weight.T"]
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "layer",
    [
        {"linears": ["a"]}, {"linears": ["a", "b", "c"]}, {"linears": ["a", 1]}, {"linears": "ab"}, {"linears": None},
        {"linears": {"a": 1, "b": 2}}, {"linears": [["a"], "b"]}, {"linears": 2}, {"hidden": 1}, {"hidden": None},
        {"hidden": ["h"]}, [], "ab", None,
    ],
    ids=str,
)  # fmt: skip
def test_malformed_metadata_of_pairs_are_refused(layer):
    _, packed = packed_pair()
    entry = next(entry for entry in packed.metadata_props if entry.key == "vlprune.layers")
    entry.value = json.dumps({mlp(packed)["name"]: layer})
    with pytest.raises(RequestError, match="the metadata of the packed graph are malformed"):
        unpack(packed)


# --- LayerNorm --------------------------------------------------------------------------------------------------------


def norm(graph, x="x", size=K, **options):
    rng = np.random.default_rng(3)
    vectors = [graph.constant(rng.normal(size=size).astype(np.float32), name) for name in ("scale", "shift")]
    return graph("LayerNormalization", x, *vectors, **options)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("options", [{}, {"axis": -1, "epsilon": 1e-3}, {"axis": 2}], ids=str)
def test_a_norm_goes_into_the_node_that_reads_it(layers, options):
    graph = x3()
    normed = norm(graph, **options)
    y = pair(graph, relu, normed)[1] if layers == 2 else graph.linear(normed)
    model = graph.model(graph("Add", y, "x") if layers == 2 and N == K else y)
    packed, _ = packed_well(model)
    assert kinds(packed) == ["SparseMlp" if layers == 2 else "SparseLinear"]
    (node,) = packed.graph.node
    assert list(node.input)[-2:] == ["scale", "shift"]
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert given["norm_epsilon"] == pytest.approx(options.get("epsilon", 1e-5))

    plain = unpack(packed)
    before, after = ([n for n in m.graph.node if n.op_type == "LayerNormalization"] for m in (model, plain))
    assert [(n.name, list(n.output)) for n in after] == [(n.name, list(n.output)) for n in before]
    del packed.metadata_props[:]
    nameless = unpack(packed)
    onnx.checker.check_model(nameless, full_check=True)
    np.testing.assert_allclose(run(nameless, feeds_of(model))[0], run(model, feeds_of(model))[0], atol=1e-5)


@pytest.mark.parametrize("why", ["another reader", "a result", "another axis", "no bias", "a scale that is computed"])
def test_a_norm_that_others_need_or_that_is_none_stays(why):
    graph = x3(s=[K])
    if why == "another axis":
        graph = Graph(x=["batch", 3, K])
        normed = graph("LayerNormalization", "x", *(graph.constant(np.ones((3, K), np.float32)) for _ in "sb"), axis=1)
    elif why == "no bias":
        normed = graph("LayerNormalization", "x", graph.constant(np.ones(K, np.float32)))
    elif why == "a scale that is computed":
        normed = graph("LayerNormalization", "x", "s", graph.constant(np.ones(K, np.float32)))
    else:
        normed = norm(graph)
    y = graph.linear(normed)
    if why == "another reader":
        model = graph.model(y, graph("Tanh", normed))
    else:
        model = graph.model(y, normed) if why == "a result" else graph.model(y)
    packed, _ = packed_well(model)
    assert kinds(packed).count("LayerNormalization") == 1


@pytest.mark.parametrize("change", ["no bias", "no epsilon", "an epsilon that is no float", "an old opset"])
def test_malformed_norms_of_packed_graphs_are_refused(change):
    graph = x3()
    packed, _ = pack(graph.model(graph.linear(norm(graph))), target="avx2")
    (node,) = packed.graph.node
    if change == "no bias":
        node.input.pop()
    elif change == "an old opset":
        packed.opset_import[0].version = 16
    else:
        (epsilon,) = [a for a in node.attribute if a.name == "norm_epsilon"]
        node.attribute.remove(epsilon)
        if change != "no epsilon":
            node.attribute.append(helper.make_attribute("norm_epsilon", 1))
    with pytest.raises(RequestError, match="a norm without scale, bias or epsilon, or before opset 17"):
        unpack(packed)


@pytest.mark.parametrize("layer", [{"norm": ["a"]}, {"norm": "ab"}, {"norm": ["a", ""]}, {"norm": [1, "b"]}], ids=str)
def test_malformed_metadata_of_norms_are_refused(layer):
    graph = x3()
    packed, _ = pack(graph.model(graph.linear(norm(graph))), target="avx2")
    entry = next(entry for entry in packed.metadata_props if entry.key == "vlprune.layers")
    entry.value = json.dumps({packed.graph.node[0].name: layer})
    with pytest.raises(RequestError, match="the metadata of the packed graph are malformed"):
        unpack(packed)


# --- attention --------------------------------------------------------------------------------------------------------

HEADS, WIDTH = 4, 24
WHOLE = HEADS * WIDTH


def core(graph, q, keys, v, bias=None, scale="query", merged=(0, 0, -1)):
    """Attention from q [B, H, T, D], keys [B, H, D, T], v [B, H, T, D] on."""
    if scale == "query":
        q = graph("Mul", q, WIDTH**-0.5)
    scores = graph("MatMul", q, keys)
    if scale == "scores":
        scores = graph("Div", scores, np.float32(WIDTH**0.5))
    if bias:
        scores = graph("Add", scores, bias)
    context = graph("MatMul", graph("Softmax", scores, axis=-1), v)
    return graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), list(merged))


def split(graph, x):
    return graph("Transpose", graph("Reshape", x, [0, 0, HEADS, WIDTH]), perm=[0, 2, 1, 3])


def split_keys(graph, x):
    return graph("Transpose", graph("Reshape", x, [0, 0, HEADS, WIDTH]), perm=[0, 2, 3, 1])


def packed_parts(graph, qkv, how):
    parts = graph("Transpose", graph("Reshape", qkv, [0, 0, 3, HEADS, WIDTH]), perm=[2, 0, 3, 1, 4])
    if how == "gather":
        return [graph("Gather", parts, i, axis=0) for i in range(3)]
    return [graph("Squeeze", part, [0]) for part in graph("Split", parts, [1, 1, 1], outputs=3, axis=0)]


def attention_node(model):
    (node,) = [node for node in model.graph.node if node.op_type == "Attention"]
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert given["num_heads"] == HEADS and given["scale"] == pytest.approx(WIDTH**-0.5)
    return node, given


@pytest.mark.parametrize("how", ["split", "gather"])
@pytest.mark.parametrize("scale", ["query", "scores"])
@pytest.mark.parametrize("zeros", [0.8, 0.0])
def test_packed_attention(how, scale, zeros):
    graph = x3()
    q, k, v = packed_parts(graph, graph.linear("x", "qkv", (3 * WHOLE, K), zeros=zeros), how)
    y = core(graph, q, graph("Transpose", k, perm=[0, 1, 3, 2]), v, scale=scale)
    packed, _ = packed_well(graph.model(graph.linear(y, "out", (K, WHOLE), zeros=zeros)))
    sides = (["SparseLinear"], ["SparseLinear"]) if zeros else (["MatMul", "Add"], ["MatMul", "Add"])
    assert kinds(packed) == [*sides[0], "Attention", *sides[1]]
    node, given = attention_node(packed)
    assert len(node.input) == 1 and "kv_heads_first" not in given


@pytest.mark.parametrize("bias", [None, ["batch", 1, 1, "length"], [1, HEADS, "length", "length"]])
@pytest.mark.parametrize("zeros", [0.8, 0.0])
@pytest.mark.parametrize("merged", [(0, 0, -1), (0, 0, WHOLE), (0, -1, WHOLE)])
def test_query_key_value_become_one_linear(bias, zeros, merged):
    graph = x3(**({"mask": bias} if bias else {}))
    q, k, v = (graph.linear("x", name, (WHOLE, K), zeros=zeros, seed=i) for i, name in enumerate("qkv"))
    y = core(graph, split(graph, q), split_keys(graph, k), split(graph, v), "mask" if bias else None, merged=merged)
    packed, rows = packed_well(graph.model(y))
    node, given = attention_node(packed)
    if zeros:
        assert kinds(packed) == ["SparseLinear", "Attention"]
        assert only(packed)["out_features"] == 3 * WHOLE and len(rows) == 1
        assert rows[0]["name"] == "q.weight + k.weight + v.weight"
        assert list(node.input[1:]) == (["", "", "mask"] if bias else [])
        plain = unpack(packed)
        assert {f"{n}.weight.T" for n in "qkv"} | {f"{n}.bias" for n in "qkv"} <= {
            t.name for t in plain.graph.initializer
        }
        assert "Concat" not in kinds(plain) and "Split" not in kinds(plain)
    else:
        assert kinds(packed) == ["MatMul", "Add"] * 3 + ["Attention"]
        assert list(node.input) == [q, k, v] + (["mask"] if bias else [])


def test_only_linears_of_one_input_become_one():
    graph = x3(z=["batch", "other", K])
    q = graph.linear("x", "q", (WHOLE, K))
    k, v = (graph.linear("z", name, (WHOLE, K), seed=i) for i, name in ((1, "k"), (2, "v")))
    y = core(graph, split(graph, q), graph("Transpose", split(graph, k), perm=[0, 1, 3, 2]), split(graph, v))
    packed, _ = packed_well(graph.model(y))
    assert sorted(kinds(packed)) == ["Attention"] + ["SparseLinear"] * 3
    assert list(attention_node(packed)[0].input) == [q, k, v]


def test_query_that_is_also_a_result_stays_alone():
    graph = x3()
    q, k, v = (graph.linear("x", name, (WHOLE, K), seed=i) for i, name in enumerate("qkv"))
    y = core(graph, split(graph, q), split_keys(graph, k), split(graph, v))
    packed, _ = packed_well(graph.model(y, q))
    assert sorted(kinds(packed)) == ["Attention"] + ["SparseLinear"] * 3


def test_one_dense_linear_of_three_is_judged_with_the_others():
    graph = x3()
    q, k, v = (
        graph.linear("x", n, (WHOLE, K), seed=i, zeros=z)
        for i, (n, z) in enumerate(zip("qkv", (0.1, 0.9, 0.9), strict=True))
    )
    y = core(graph, split(graph, q), split_keys(graph, k), split(graph, v))
    packed, rows = packed_well(graph.model(y))
    assert kinds(packed) == ["SparseLinear", "Attention"] and rows[0]["sparsity"] == pytest.approx(0.633, abs=0.02)
    packed, rows = packed_well(graph.model(y), threshold=0.8)
    assert kinds(packed) == ["MatMul", "Add", "SparseLinear", "SparseLinear", "Attention"]
    assert [row["packed"] for row in rows] == [False, True, True]


def test_three_biases_of_which_one_is_missing():
    graph = x3()
    q, k, v = (graph.linear("x", n, (WHOLE, K), seed=i, bias=n != "k") for i, n in enumerate("qkv"))
    y = core(graph, split(graph, q), split_keys(graph, k), split(graph, v))
    packed, _ = packed_well(graph.model(y))
    assert kinds(packed) == ["SparseLinear", "Attention"]
    names = {tensor.name for tensor in unpack(packed).graph.initializer}
    assert {"q.bias", "v.bias"} <= names and "k.bias" not in names


def decoder(graph):
    """Self-attention over a cache, and cross-attention to given keys and values, with masks."""
    q, k, v = (graph.linear("x", name, (WHOLE, K), seed=i) for i, name in enumerate("qkv"))
    key = graph("Concat", "past_key", split(graph, k), name="present_key", axis=2)
    value = graph("Concat", "past_value", split(graph, v), name="present_value", axis=2)
    y = core(graph, split(graph, q), graph("Transpose", key, perm=[0, 1, 3, 2]), value, "mask")
    y = graph("Add", graph.linear(y, "out", (K, WHOLE), seed=5), "x")
    q = graph.linear(y, "cross", (WHOLE, K), seed=6)
    return core(graph, split(graph, q), graph("Transpose", "cross_key", perm=[0, 1, 3, 2]), "cross_value")


def decoder_model():
    past, cross = (["batch", HEADS, size, WIDTH] for size in ("past", "other"))
    graph = x3(past_key=past, past_value=past, cross_key=cross, cross_value=cross, mask=["batch", 1, "length", 8])
    y = decoder(graph)
    present = ["batch", HEADS, "past + length", WIDTH]
    return graph.model(y, "present_key", "present_value", present_key=present, present_value=present)


def test_decoder_keeps_its_cache():
    model = decoder_model()
    model.graph.input[-1].type.tensor_type.shape.dim[3].dim_param = "past + length"
    packed, _ = packed_well(model)
    attentions = [node for node in packed.graph.node if node.op_type == "Attention"]
    assert [list(node.input[1:]) for node in attentions] == [
        ["present_key", "present_value", "mask"],
        ["cross_key", "cross_value"],
    ]
    for node in attentions:
        assert {a.name: helper.get_attribute_value(a) for a in node.attribute}["kv_heads_first"] == 1
    assert kinds(packed).count("SparseLinear") == 5 and kinds(packed).count("Concat") == 2
    linears = [node for node in packed.graph.node if node.op_type == "SparseLinear"]
    assert [len(node.input) for node in linears].count(7) == 1


def spoiled(change):
    """An attention that must not be replaced, and its other results."""
    more = {"flat mask": {"mask": ["length", "length"]}, "long mask": {"mask": ["batch", HEADS, 4, 1]}}
    graph = Graph(x=["batch", 1 if change == "long mask" else "length", K], **more.get(change, {}))
    q, k, v = (graph.linear("x", name, (WHOLE, K), seed=i) for i, name in enumerate("qkv"))
    q, k, v = split(graph, q), split_keys(graph, k), split(graph, v)
    scores = graph("MatMul", graph("Mul", q, 0.2), k)
    results = []
    if "mask" in change:
        scores = graph("Add", scores, "mask")
    if change == "scaled after the mask":
        scores = graph("Mul", scores, 2.0)
    weights = graph("Softmax", scores, axis=2 if change == "axis" else -1)
    if change == "read weights":
        results.append(graph("Neg", weights))
    if change == "read scores":
        results.append(graph("Neg", scores))
    if change == "weights are a result":
        results.append(weights)
    context = graph("MatMul", weights, v)
    merged = [0, 0, -1]
    if change == "other order":
        y = graph("Reshape", context, [0, 0, -1])
    elif change == "heads outside":
        y = graph("Reshape", graph("Transpose", context, perm=[0, 2, 3, 1]), merged)
    elif change == "two rows":
        y = graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), [1, -1, WHOLE])
    else:
        y = graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), merged)
    return graph, [y, *results]


@pytest.mark.parametrize(
    "change",
    ["axis", "read weights", "read scores", "weights are a result", "other order", "heads outside", "two rows",
     "flat mask", "long mask"],
)  # fmt: skip
def test_what_is_no_plain_attention_stays(change):
    graph, outputs = spoiled(change)
    packed, _ = packed_well(graph.model(*outputs))
    assert "Attention" not in kinds(packed) and "Softmax" in kinds(packed)


def test_a_scale_after_the_mask_is_not_fused():
    graph = x3(mask=["batch", 1, 1, "length"])
    q, k, v = (graph.linear("x", name, (WHOLE, K), seed=i) for i, name in enumerate("qkv"))
    scores = graph("Mul", graph("Add", graph("MatMul", split(graph, q), split_keys(graph, k)), "mask"), 0.2)
    context = graph("MatMul", graph("Softmax", scores, axis=-1), split(graph, v))
    y = graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), [0, 0, -1])
    packed, _ = packed_well(graph.model(y))
    assert "Attention" not in kinds(packed)


# --- exported graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_exported_graphs(small, exported, task, values, monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 1)
    for name, graph in blip_graphs(small.model, task).items():
        model = onnx.load(exported[task].folder / f"{name}.onnx")
        packed, rows = pack(model, target="avx512", values=values)
        onnx.checker.check_model(packed)
        assert "Softmax" not in kinds(packed)
        assert all(row["packed"] == (row["sparsity"] >= 0.45) for row in rows), rows
        plain = unpack(packed)
        onnx.checker.check_model(plain, full_check=True)
        before, after = ({t.name: t for t in m.graph.initializer} for m in (model, plain))
        dtype = np.float16 if values == "fp16" else np.float32
        stored = {tensor.name for tensor in packed.graph.initializer}
        tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"} & set(before)
        halved = {name.removesuffix("/half") for name in stored if name.endswith("_embeddings.weight/half")}
        assert halved == ({name for name in tables if "embeddings" in name} if values == "fp16" else set())
        assert kinds(packed).count("HalfLinear") == (values == "fp16" and "decoder" in name)
        for key in before:
            if not key.startswith("/constant/"):
                wanted = numpy_helper.to_array(before[key])
                if key.endswith(".weight.T"):
                    touched = any(key.removesuffix(".T") in row["name"].split(" + ") for row in rows if row["packed"])
                    wanted = wanted.astype(dtype).astype(np.float32) if touched else wanted
                if "_embeddings.weight" in key and f"{key}/half" in stored:
                    wanted = wanted.astype(np.float16).astype(np.float32)
                np.testing.assert_array_equal(numpy_helper.to_array(after[key]), wanted, key)
        close = 2e-2 if values == "fp16" else 2e-5
        for batch, length, past in ((1, 1, 0), (3, 4, 2)):
            feeds = random_feeds(graph, batch, length, past, states=7)
            expected = exported[task].onnx[name](feeds)
            order = [value.name for value in model.graph.output]
            computed = [evaluate(packed, feeds), run(plain, feeds)]
            if operators.available():
                computed.append(run(packed, feeds))
            for got in computed:
                for key, array in zip(order, got, strict=True):
                    np.testing.assert_allclose(array, expected[key], atol=close, err_msg=f"{name} {key}")


def test_metadata_and_interface(exported, monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 1)
    model = onnx.load(exported["retrieval"].folder / "itm.onnx")
    packed, _ = pack(model, target="avx2", values="fp16")
    before, after = ({e.key: e.value for e in m.metadata_props} for m in (model, packed))
    layers = json.loads(after.pop("vlprune.layers"))
    assert after == before | {"vlprune.packed": "sparse", "vlprune.values": "fp16", "vlprune.target": "avx2"}
    nodes = [node for node in packed.graph.node if node.domain == "vlprune"]
    pairs = [layers[node.name]["linears"] for node in nodes if node.op_type == "SparseMlp"]
    assert len(pairs) == 2  # one per block of the text encoder
    tables = {node.name for node in packed.graph.node if node.op_type == "Gather" and node.input[0].endswith("/half")}
    assert set(layers) == {node.name for node in nodes} | {name for pair in pairs for name in pair} | tables
    assert {entry.domain: entry.version for entry in packed.opset_import} == {"": 18, "vlprune": 1}
    for side in ("input", "output"):
        assert list(getattr(packed.graph, side)) == list(getattr(model.graph, side))
    assert packed.graph.name == model.graph.name and packed.ir_version == model.ir_version
    read = {name for node in packed.graph.node for name in node.input}
    assert {tensor.name for tensor in packed.graph.initializer} <= read
    rounded = {e.key: e.value for e in unpack(packed).metadata_props}
    assert rounded == before | {"vlprune.rounded": "fp16"}
    again, _ = pack(unpack(pack(model, target="avx2")[0]), target="avx2")
    assert is_packed(again)


def test_packing_needs_no_torch():
    code = "import sys, vlprune.exporters.pack; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- requests that are refused ----------------------------------------------------------------------------------------


def test_wrong_requests_are_refused():
    graph = x3()
    model = graph.model(graph.linear("x"))
    for options, words in (
        ({"values": "int8"}, "values 'int8' are unknown"),
        ({"target": "sse"}, "target 'sse' is unknown: auto, avx512, avx2, portable"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"threshold": float("nan")}, "threshold nan"),
    ):
        with pytest.raises(RequestError, match=words):
            pack(model, **{"target": "avx2"} | options)
    packed, _ = pack(model, target="avx2")
    with pytest.raises(RequestError, match="packed already"):
        pack(packed, target="avx2")
    with pytest.raises(RequestError, match="nothing to unpack"):
        unpack(model)
    with pytest.raises(RequestError, match="opset 11"):
        pack(graph.model("Add_1", opset=11), target="avx2")


def spoil(packed, what, layer=0):
    """Break the one node of a graph; `layer` 1 is the second of a SparseMlp."""
    node, first, prefix = packed.graph.node[0], 5 * layer, "hidden_" * layer
    tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if what in ("values", "indices", "rows", "counts"):
        name = [name for name in node.input if name.endswith(what)][layer]
        tensor = tensors[name]
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array[:-1], name))
    elif what == "raw":
        tensors[node.input[1 + first]].raw_data = b"abc"
    elif what == "constant":
        packed.graph.initializer.remove(tensors[node.input[2 + first]])
    elif what == "attribute":
        node.attribute.remove(attributes[f"{prefix}panel_rows"])
    elif what == "kind":
        node.attribute.remove(attributes[f"{prefix}panel_rows"])
        node.attribute.append(helper.make_attribute(f"{prefix}panel_rows", "128"))
    elif what == "no type":
        attributes[f"{prefix}panel_rows"].type = 0
    elif what == "activation":
        attributes["activation"].s = b"swish"
    elif what == "kind of activation":
        node.attribute.remove(attributes["activation"])
        node.attribute.append(helper.make_attribute("activation", [], attr_type=onnx.AttributeProto.INTS))
    elif what == "operator":
        node.op_type = "Linear"
    elif what == "bias":
        tensors[node.input[5 + first]].CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), node.input[5 + first]))
    elif what == "no inputs":
        del node.input[:]
    elif what == "few inputs":
        del node.input[3 + first :]
    elif what == "outputs":
        del node.output[:]
    elif what == "two outputs":
        node.output.append("more")
    else:
        entry = next(entry for entry in packed.metadata_props if entry.key == "vlprune.layers")
        pair = json.loads(entry.value)[node.name] if node.op_type == "SparseMlp" else None
        name = pair["linears"][layer] if pair else node.name
        more = {node.name: pair} if pair else {}
        texts = {
            "no json": "{",
            "list": "[]",
            "inner list": '{"a": []}',
            "no name": json.dumps(more | {name: {"weights": [{"rows": N}]}}),
            "rows": json.dumps(more | {name: {"weights": [{"name": "w", "rows": N + 1}]}}),
            "negative rows": json.dumps(more | {name: {"weights": [{"name": "w", "rows": -N}]}}),
            "deep": "[" * 100_000,
        }
        entry.value = texts[what]


@pytest.mark.parametrize("node", ["SparseLinear", "SparseMlp, first", "SparseMlp, second"])
@pytest.mark.parametrize(
    "what",
    ["values", "indices", "rows", "counts", "raw", "constant", "attribute", "kind", "no type", "activation",
     "kind of activation", "operator", "bias", "no inputs", "few inputs", "outputs", "two outputs", "no json", "list",
     "inner list", "no name", "rows", "negative rows", "deep"],
)  # fmt: skip
def test_malformed_packed_graphs_are_refused(what, node):
    graph = x3()
    packed, _ = pack(graph.model(graph.linear("x") if node == "SparseLinear" else pair(graph)[1]), target="avx2")
    assert kinds(packed) == [node.split(",")[0]]
    spoil(packed, what, int("second" in node))
    with pytest.raises(RequestError) as error:
        unpack(packed)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_metadata_cannot_take_a_bias_away():
    graph = x3()
    model = graph.model(graph.linear("x"))
    packed, _ = pack(model, target="avx2")
    name = packed.graph.node[0].name
    parts = [{"name": "a", "rows": N // 2, "bias": None}, {"name": "b", "rows": N - N // 2}]
    next(e for e in packed.metadata_props if e.key == "vlprune.layers").value = json.dumps({name: {"weights": parts}})
    feeds = feeds_of(model)
    np.testing.assert_allclose(run(unpack(packed), feeds)[0], run(model, feeds)[0], atol=1e-5)


def test_metadata_are_not_needed():
    graph = x3()
    model = graph.model(gelu_a(graph, graph.linear("x")))
    packed, _ = pack(model, target="avx2")
    del packed.metadata_props[:]
    feeds = feeds_of(model)
    np.testing.assert_allclose(run(unpack(packed), feeds)[0], run(model, feeds)[0], atol=1e-5)
