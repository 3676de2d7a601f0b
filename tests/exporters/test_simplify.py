"""The rewrites on graphs made by hand, each run before and after."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vlprune.exporters.simplify import _apply, _reshape_to, simplify


def build(nodes, inputs, outputs, values):
    def info(name, axes):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(axes))

    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes],
        "made",
        [info(*item) for item in inputs.items()],
        [info(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def check(nodes, inputs, outputs, values, sizes=({"b": 2}, {"b": 3})):
    """Simplify, run both, and give the new model."""
    before = build(nodes, inputs, outputs, values)
    onnx.checker.check_model(before)
    copy = onnx.ModelProto.FromString(before.SerializeToString())
    after = simplify(copy, inputs, outputs)
    onnx.checker.check_model(after, full_check=True)
    assert not copy.graph.node, "the given model is emptied, as documented"
    rng = np.random.default_rng(0)
    for size in sizes:
        feeds = {n: rng.normal(size=[size.get(a, a) for a in axes]).astype(np.float32) for n, axes in inputs.items()}
        expected, got = (ReferenceEvaluator(model).run(None, feeds) for model in (before, after))
        for one, other in zip(expected, got, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-6)
    return after


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def tensors(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


W = np.arange(6, dtype=np.float32).reshape(2, 3)
W[0, 1] = 0
X = {"x": ("b", 3)}


def test_a_transposed_weight_is_stored_transposed():
    nodes = [("Transpose", ["a.weight"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["y"], {})]
    model = check(nodes, X, {"y": ("b", 2)}, {"a.weight": W})
    assert operators(model) == {"MatMul": 1}
    assert list(tensors(model)) == ["a.weight.T"]
    assert tensors(model)["a.weight.T"].tobytes() == np.ascontiguousarray(W.T).tobytes()


def test_a_weight_used_by_two_products_is_stored_once():
    nodes = [
        ("Transpose", ["w"], ["t"], {"perm": [1, 0]}),
        ("Transpose", ["w"], ["u"], {"perm": [1, 0]}),
        ("MatMul", ["x", "t"], ["y"], {}),
        ("Sigmoid", ["x"], ["s"], {}),
        ("MatMul", ["s", "u"], ["z"], {}),
    ]
    assert list(tensors(check(nodes, X, {"y": ("b", 2), "z": ("b", 2)}, {"w": W}))) == ["w.T"]


def test_equal_parameters_keep_their_names_and_equal_constants_are_joined():
    nodes = [
        ("Identity", ["a.bias"], ["b.bias"], {}),
        ("Constant", [], ["one"], {"value": numpy_helper.from_array(np.float32(2))}),
        ("Constant", [], ["two"], {"value": numpy_helper.from_array(np.float32(2))}),
        ("Add", ["x", "a.bias"], ["p"], {}),
        ("Mul", ["p", "one"], ["q"], {}),
        ("Add", ["q", "b.bias"], ["r"], {}),
        ("Mul", ["r", "two"], ["y"], {}),
    ]
    model = check(nodes, X, {"y": ("b", 3)}, {"a.bias": np.ones(3, np.float32)})
    assert sorted(tensors(model)) == ["/constant/0", "a.bias", "b.bias"]
    assert operators(model) == {"Add": 2, "Mul": 2}


@pytest.mark.parametrize("bias", [True, False])
def test_a_table_read_both_ways_is_stored_once(bias):
    nodes = [
        ("MatMul", ["x", "table"], ["m"], {}),
        ("Transpose", ["table"], ["t"], {"perm": [1, 0]}),
        ("MatMul", ["m", "t"], ["p"], {}),
        ("Add", ["p", "bias"], ["y"], {}) if bias else ("Identity", ["p"], ["y"], {}),
    ]
    values = {"table": W} | ({"bias": np.ones(2, np.float32)} if bias else {})
    model = check(nodes, {"x": ("b", "t", 2)}, {"y": ("b", "t", 2)}, values, [{"b": 2, "t": 4}, {"b": 1, "t": 1}])
    assert operators(model)["Gemm"] == 1
    assert operators(model)["Transpose"] == 0
    assert sum(array.size == W.size for array in tensors(model).values()) == 1


def reshape_nodes(kept, new):
    """What a reshape of the last axis becomes: sizes looked up one by one."""
    pieces = []
    nodes = [("Shape", ["x"], ["shape"], {})]
    for axis in kept:
        nodes += [
            ("Constant", [], [f"i{axis}"], {"value": numpy_helper.from_array(np.array(axis))}),
            ("Gather", ["shape", f"i{axis}"], [f"g{axis}"], {}),
            ("Constant", [], [f"z{axis}"], {"value": numpy_helper.from_array(np.array([0]))}),
            ("Unsqueeze", [f"g{axis}", f"z{axis}"], [f"u{axis}"], {}),
        ]
        pieces.append(f"u{axis}")
    nodes += [
        ("Constant", [], ["new"], {"value": numpy_helper.from_array(np.array(new))}),
        ("Concat", [*pieces, "new"], ["to"], {"axis": 0}),
        ("Reshape", ["x", "to"], ["y"], {}),
    ]
    return nodes


def test_a_reshape_that_keeps_sizes_needs_no_lookup():
    axes = {"x": ("b", "t", 6)}
    sizes = [{"b": 2, "t": 5}, {"b": 4, "t": 1}]
    model = check(reshape_nodes([0, 1], [2, 3]), axes, {"y": ("b", "t", 2, 3)}, {}, sizes)
    assert operators(model) == {"Reshape": 1}
    assert [array.tolist() for array in tensors(model).values()] == [[0, 0, 2, 3]]


def test_a_reshape_that_swaps_sizes_keeps_its_lookup():
    axes = {"x": ("b", "t", 6)}
    model = check(reshape_nodes([1, 0], [6]), axes, {"y": ("t", "b", 6)}, {}, [{"b": 2, "t": 5}, {"b": 4, "t": 1}])
    assert operators(model)["Shape"] == 1


def test_fixed_sizes_are_constants():
    nodes = [
        ("Shape", ["x"], ["shape"], {}),
        ("Gather", ["shape", "last"], ["n"], {}),
        ("Unsqueeze", ["n", "zero"], ["end"], {}),
        ("Slice", ["table", "zero", "end", "zero"], ["s"], {}),
        ("Add", ["x", "s"], ["y"], {}),
    ]
    values = {"table": np.arange(3, dtype=np.float32), "last": np.array(1), "zero": np.array([0])}
    model = check(nodes, X, {"y": ("b", 3)}, values)
    assert operators(model) == {"Add": 1}
    assert list(tensors(model)) == ["table"], "the whole of a parameter is the parameter"


def test_sizes_as_numbers_keep_their_type():
    nodes = [
        ("Shape", ["x"], ["shape"], {"start": 1}),
        ("Cast", ["shape"], ["n"], {"to": TensorProto.FLOAT}),
        ("Div", ["x", "n"], ["y"], {}),
    ]
    model = check(nodes, X, {"y": ("b", 3)}, {})
    assert operators(model) == {"Div": 1}
    assert tensors(model)["/constant/0"].dtype == np.float32


def test_results_keep_their_names():
    nodes = [("Relu", ["x"], ["r"], {}), ("Identity", ["r"], ["y"], {}), ("Relu", ["x"], ["z"], {})]
    model = check(nodes, X, {"y": ("b", 3), "z": ("b", 3)}, {})
    assert [value.name for value in model.graph.output] == ["y", "z"]


def test_comparisons_with_sizes_are_decided_only_when_certain():
    assert _apply("Equal", [["b", 1, -1], [-1, -1, -1]]) == [0, 0, 1]
    assert _apply("Equal", [["b", 1], [3, 1]]) is None
    assert _apply("Equal", [["b"], ["c"]]) is None
    assert _apply("Where", [[0, 1], ["b", 2], [3, 4]]) == [3, 2]
    assert _apply("Slice", [["b", 1, 2, 3], [1], [9223372036854775807], [0], [2]]) == [1, 3]


def test_reshape_constants():
    assert _reshape_to(["b", "t", 6], ["b", "t", 2, 3]) == [0, 0, 2, 3]
    assert _reshape_to(["b", "t", 2, 3], ["b", "t", "rest"]) == [0, 0, -1]
    assert _reshape_to(["b", "t"], ["t", "b"]) is None
    assert _reshape_to(["b", 0], ["b", 0]) is None  # 0 would mean "as before"
    assert _reshape_to(None, ["b"]) is None
