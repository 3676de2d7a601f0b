"""The operators against numpy: numbers, shapes, refusals, threads; the library that holds them, and its build."""

import ctypes
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import operator_models as models
import pytest
from onnx import TensorProto, helper, numpy_helper
from operator_models import HalfLinear, Linear, Mlp

from vlprune.errors import MachineError, RequestError
from vlprune.runtime import operators
from vlprune.runtime.session import OnnxGraph, session


ROOT = Path(__file__).parents[2]
PROGRAM = Path(models.__file__)


@pytest.fixture(scope="session")
def library() -> str:
    if not operators.available():
        pytest.skip(f"the operator library is not there: {operators.BUILD}")
    return str(operators.library())


def run_program(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


# --- numbers ----------------------------------------------------------------------------------------------------------


def name_of(linear: Linear) -> str:
    flags = [name for name in ("half", "bias", "residual") if getattr(linear, name)]
    return "-".join([f"{linear.K}x{linear.N}", f"g{linear.group}", linear.activation, *flags])


@pytest.mark.parametrize("linear", list(models.linears()), ids=name_of)
def test_sparse_linear(library: str, linear: Linear) -> None:
    models.check_layers(linear, library, 1, models.leading_shapes())


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_sparse_linear_of_a_real_size(library: str, threads: int, half: bool) -> None:
    linear = Linear(768, 768, block=192, panel=128, kept=0.1, half=half, activation="gelu")
    opened = models.open_model(linear.model(), library, threads)
    rng = np.random.default_rng(0)
    for lead in [(1,), (16,), (17,), (197,), (2, 197), (8, 197)]:
        x = rng.standard_normal((*lead, 768)).astype(np.float32)
        assert models.difference(opened.run(None, {"x": x})[0], linear.expected(x)) <= 1e-5


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("half", models.half_linears(), ids=lambda half: f"{half.K}x{half.N}")
def test_half_linear(library: str, half: HalfLinear, threads: int) -> None:
    models.check_layers(half, library, threads, models.few_tokens())


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_nan_and_infinity_in_halves(library: str, rows: int) -> None:
    """Each reaches what it meets, and no other output: not those computed beside it, or for rows that are not there."""
    half = HalfLinear(71, 19)
    half.weight[3, 70], half.weight[18, 2] = np.inf, np.nan
    half.weight[7, :3] = [6e-8, -6.1e-5, 65504]  # subnormal, and the largest
    x = np.random.default_rng(3).standard_normal((rows, 71)).astype(np.float32)
    opened = models.open_model(half.model(), library)
    assert models.difference(opened.run(None, {"x": x})[0], half.expected(x)) <= 1e-5
    half.weight[[3, 18]] = 1
    opened = models.open_model(half.model(), library)
    x[rows // 2, 70] = np.nan
    y = opened.run(None, {"x": x})[0]
    assert np.isnan(y[rows // 2]).all() and np.isfinite(np.delete(y, rows // 2, 0)).all()


def name_of_mlp(mlp: Mlp) -> str:
    return f"{name_of(mlp.first)}--{name_of(mlp.second)}"


@pytest.mark.parametrize("mlp", [*models.mlps(), *models.mlps_of_every_kind()], ids=name_of_mlp)
def test_sparse_mlp(library: str, mlp: Mlp) -> None:
    models.check_layers(mlp, library, 1, models.few_tokens())
    models.check_layers(mlp, library, 2, [(2,), (17,), (2, 40)])


@pytest.mark.parametrize("mlp", list(models.mlps(models.LARGE_MLPS)), ids=name_of_mlp)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_sparse_mlp_of_many_tokens(library: str, threads: int, mlp: Mlp) -> None:
    (tokens,) = models.many_tokens()
    models.check_layers(mlp, library, threads, [(tokens,), (3, 131)])


@pytest.mark.parametrize("mlp", list(models.mlps(models.WIDE_MLPS)), ids=name_of_mlp)
def test_sparse_mlp_of_many_features(library: str, mlp: Mlp) -> None:
    models.check_layers(mlp, library, 2, [(20,), (28,), (40,), (70,)])


@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (1, 4), (4, 4)], ids=str)
def test_sparse_mlp_of_a_real_size(library: str, groups: tuple[int, int]) -> None:
    """Few tokens go through all threads together, 400 through each thread by themselves."""
    first = Linear(768, 3072, 192, 128, groups[0], half=groups[0] == 4, kept=0.1, activation="gelu", seed=1)
    second = Linear(3072, 768, 192, 128, groups[1], half=groups[1] == 1, kept=0.1, residual=True, seed=2)
    mlp = Mlp(first, second)
    model, rng = mlp.model(), np.random.default_rng(0)
    x, residual = (rng.standard_normal((400, 768)).astype(np.float32) for _ in range(2))
    expected = mlp.expected(x, residual)
    for threads in (1, 2):
        opened = models.open_model(model, library, threads)
        for tokens in (1, 2, 5, 17, 48, 197, 400):
            y = opened.run(None, {"x": x[:tokens], "residual": residual[:tokens]})[0]
            assert models.difference(y, expected[:tokens]) <= 1e-5, f"{tokens} tokens, {threads} threads"


def test_sparse_mlp_is_its_two_layers(library: str) -> None:
    """To the last bit, or nearly: the same sums in the same order."""
    first, second = Linear(300, 260, 128, 64, activation="gelu", seed=1), Linear(260, 131, 64, 32, seed=2)
    joint = models.open_model(Mlp(first, second).model(), library)
    parts = [models.open_model(linear.model(), library) for linear in (first, second)]
    x = np.random.default_rng(0).standard_normal((2000, 300)).astype(np.float32)
    for tokens in (1, 40, 2000):
        hidden = parts[0].run(None, {"x": x[:tokens]})[0]
        apart = parts[1].run(None, {"x": hidden})[0]
        assert models.difference(joint.run(None, {"x": x[:tokens]})[0], apart.astype(np.float64)) <= 1e-6


@pytest.mark.parametrize("sizes", models.ATTENTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_attention(library: str, threads: int, sizes: dict[str, int]) -> None:
    models.check_attention(library, threads, **sizes)


def test_attention_over_nothing(library: str) -> None:
    plain = models.open_model(models.attention_model(["q", "k", "v"], num_heads=2, scale=1.0), library)
    q, nothing = np.ones((2, 3, 8), np.float32), np.ones((2, 0, 8), np.float32)
    np.testing.assert_array_equal(plain.run(None, {"q": q, "k": nothing, "v": nothing})[0], np.zeros_like(q))
    assert plain.run(None, {"q": nothing, "k": q, "v": q})[0].shape == (2, 0, 8)
    packed = models.open_model(models.attention_model(["q"], num_heads=2, scale=1.0), library)
    for shape in [(0, 3, 24), (2, 0, 24)]:
        assert packed.run(None, {"q": np.ones(shape, np.float32)})[0].shape == (*shape[:2], 8)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(library: str, isa: str) -> None:
    done = run_program(library, "numbers", check=False, VLPRUNE_ISA=isa)
    if "instruction set that this processor lacks" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"done with {isa}\n"


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_what_they_meet(library: str, special: float, rows: int, group: int) -> None:
    """An input reaches the outputs that kept its weight, and no other: not the neighbours in a tile or a group."""
    linear = Linear(70, 36, 32, 16, group)
    opened = models.open_model(linear.model(), library)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, 70)).astype(np.float32)
    x[rows // 2, 5] = special
    x[rows // 2, 66] = special
    y = opened.run(None, {"x": x})[0]
    assert models.difference(y, linear.expected(x)) <= 1e-5
    reached = ~np.isfinite(y[rows // 2])
    np.testing.assert_array_equal(reached, linear.mask[:, [5, 66]].any(1))
    assert np.isfinite(np.delete(y, rows // 2, 0)).all() and not reached.all()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_nan_and_infinity_among_the_weights(library: str, half: bool) -> None:
    linear = Linear(70, 36, 32, 16, half=half)
    for row, special in [(2, np.nan), (5, np.inf), (35, -np.inf)]:
        linear.weight[row, np.flatnonzero(linear.mask[row])[0]] = special
    opened = models.open_model(linear.model(), library)
    x = np.random.default_rng(3).standard_normal((20, 70)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = np.where(linear.mask, x[:, None, :] * linear.weight.astype(np.float64), 0).sum(-1)
    assert models.difference(opened.run(None, {"x": x})[0], expected + linear.bias_values) <= 1e-5


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass_two_layers(library: str, special: float, rows: int, activation: str) -> None:
    first, second = Linear(70, 36, 32, 16, activation=activation), Linear(36, 20, 16, 8, 4, seed=1, kept=0.05)
    opened = models.open_model(Mlp(first, second).model(), library)
    x = np.random.default_rng(3).standard_normal((rows, 70)).astype(np.float32)
    x[rows // 2, 5] = special
    y = opened.run(None, {"x": x})[0]
    assert models.difference(y, Mlp(first, second).expected(x)) <= 1e-5
    assert np.isfinite(np.delete(y, rows // 2, 0)).all() and np.isfinite(y[rows // 2]).any()


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 40])
def test_activations_at_their_ends(library: str, activation: str, rows: int) -> None:
    linear = Linear(1, 1, 1, kept=1, bias=False, activation=activation)
    linear.weight[:] = 1
    x = np.concatenate([np.linspace(-30, 30, rows * 8), [-200, -88, 88, 200, 0, 1e-30, 3e38, -3e38]])
    x = x.astype(np.float32)[:, None]
    with np.errstate(over="ignore"):
        expected = linear.expected(x)
    opened = models.open_model(linear.model(), library)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in np.array_split(np.arange(len(x)), len(x) // rows):
            y = opened.run(None, {"x": x[part]})[0]
            np.testing.assert_allclose(y, expected[part], rtol=1e-5, atol=2e-6)
    assert np.isnan(opened.run(None, {"x": np.full((1, 1), np.nan, np.float32)})[0]).all()
    assert opened.run(None, {"x": np.full((1, 1), np.inf, np.float32)})[0] == np.inf


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (69,), (70, 1), (2, 71), (0, 0)])
def test_wrong_width_is_refused_at_run_time(library: str, shape: tuple[int, ...]) -> None:
    opened = models.open_model(Linear(70, 36, 32).model(), library)
    with pytest.raises(Exception, match=r"node 'linear': x has shape .* must be 70"):
        opened.run(None, {"x": np.zeros(shape, np.float32)})


def test_wrong_shapes_of_a_pair_are_refused_at_run_time(library: str) -> None:
    mlp = Mlp(Linear(70, 36, 32), Linear(36, 20, 32, residual=True))
    opened = models.open_model(mlp.model(), library)
    right, wrong = np.zeros((3, 20), np.float32), np.zeros((3, 36), np.float32)
    with pytest.raises(Exception, match=r"SparseMlp node 'mlp': x has shape \[3, 36\], its last dimension must be 70"):
        opened.run(None, {"x": wrong, "residual": right})
    with pytest.raises(Exception, match=r"SparseMlp node 'mlp': residual has shape \[3, 36\], must have \[3, 20\]"):
        opened.run(None, {"x": np.zeros((3, 70), np.float32), "residual": wrong})


@pytest.mark.parametrize("shape", [(36,), (3, 36), (2, 3, 1), (1, 2, 3, 36), (2, 3, 37)])
def test_wrong_residual_is_refused_at_run_time(library: str, shape: tuple[int, ...]) -> None:
    opened = models.open_model(Linear(70, 36, 32, residual=True).model(), library)
    with pytest.raises(Exception, match=r"node 'linear': residual has shape .* must have \[2, 3, 36\]"):
        opened.run(None, {"x": np.zeros((2, 3, 70), np.float32), "residual": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("heads_first", "shapes", "message"),
    [
        (0, {"q": (2, 8)}, r"q has shape \[2, 8\]"),
        (0, {"q": (2, 3, 9)}, r"q has shape \[2, 3, 9\], must have \[batch, tokens, 2 heads"),
        (0, {"q": (2, 3, 0)}, "q has shape"),
        (0, {"k": (1, 5, 8)}, r"k has shape \[1, 5, 8\], must have \[2, -1, 8\]"),
        (0, {"k": (2, 5, 4)}, "k has shape"),
        (0, {"k": (2, 2, 5, 4), "v": (2, 2, 5, 4)}, "k has shape"),
        (0, {"v": (2, 4, 8)}, r"v has shape \[2, 4, 8\], must have that of k, \[2, 5, 8\]"),
        (0, {"bias": (2, 3, 5)}, r"bias has shape \[2, 3, 5\], must have \[2, 2, 3, 5\] or 1"),
        (0, {"bias": (2, 2, 2, 5)}, "bias has shape"),
        (0, {"bias": (2, 2, 3, 0)}, "bias has shape"),
        (1, {}, r"k has shape \[2, 5, 8\], must have \[2, 2, -1, 4\]"),
        (1, {"k": (2, 4, 5, 2)}, "k has shape"),
    ],
)
def test_wrong_attention_shapes_are_refused(
    library: str, heads_first: int, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    names = ["q", "k", "v", "bias"]
    model = models.attention_model(names, num_heads=2, scale=1.0, kv_heads_first=heads_first)
    right = {"q": (2, 3, 8), "k": (2, 5, 8), "v": (2, 5, 8), "bias": (1, 1, 1, 1)}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in (right | shapes).items()}
    with pytest.raises(Exception, match=f"vlprune.Attention node 'attention': {message}"):
        models.open_model(model, library).run(None, feeds)


def test_shapes_are_known_before_a_run(library: str) -> None:
    """Names of dimensions survive; what is not known is not made up."""

    def inferred(shape: list[str | int | None] | None, inputs: list[str], op: str, **attributes: Any) -> Any:
        values = [helper.make_tensor_value_info(inputs[0], TensorProto.FLOAT, shape)]
        arrays = (
            {"SparseLinear": linear, "SparseMlp": mlp, "HalfLinear": half}[op].arrays() if op != "Attention" else {}
        )
        values += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in inputs[1:]
            if name and name not in arrays
        ]
        nodes = [
            helper.make_node(op, inputs, ["y"], domain="vlprune", **attributes),
            helper.make_node("Relu", ["y"], ["z"]),
        ]
        outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
        tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        return models.open_model(models.model_of(nodes, values, outputs, tensors), library).get_outputs()[0].shape

    linear, half = Linear(70, 36, 32, bias=False), HalfLinear(12, 8, bias=False)
    mlp = Mlp(Linear(70, 52, 32, bias=False), Linear(52, 36, 32, bias=False))
    five, ten = list(models.INPUTS[:5]), list(models.MLP_INPUTS[:10])
    ten[5] = ""
    cases: list[tuple[str, Linear | Mlp, list[str]]] = [("SparseLinear", linear, five), ("SparseMlp", mlp, ten)]
    for op, layers, least in cases:
        for inputs in (least, [*least, "", "residual"]):
            assert inferred(["batch", 197, 70], inputs, op, **layers.attributes()) == ["batch", 197, 36]
            assert inferred(["batch", "t", None], inputs, op, **layers.attributes()) == ["batch", "t", 36]
            assert inferred([None, 70], inputs, op, **layers.attributes()) == []
            assert inferred(None, inputs, op, **layers.attributes()) == []
    assert inferred(["b", "t", 12], ["x", "weight"], "HalfLinear", **half.attributes()) == ["b", "t", 8]
    heads = {"num_heads": 2, "scale": 1.0}
    assert inferred(["b", "t", 8], ["q", "k", "v"], "Attention", **heads) == ["b", "t", 8]
    assert inferred(["b", "t", 24], ["q"], "Attention", **heads) == ["b", "t", 8]
    assert inferred(["b", "t", 24], ["q", "", "", "bias"], "Attention", **heads) == ["b", "t", 8]
    assert inferred(["b", "t", "3d"], ["q"], "Attention", **heads) == []


# --- what is refused when a session is created ------------------------------------------------------------------------


def test_malformed_weights_are_refused(library: str) -> None:
    models.check_malformed(library, 10_000)


def test_valid_weights_are_not_refused(library: str) -> None:
    """What the check of the malformed takes for valid opens, odd as it may be."""
    rng = np.random.default_rng(11)
    for _ in range(300):
        group = int(rng.choice([1, 4]))
        linear = Linear(
            *(int(rng.integers(1, 40)), group * int(rng.integers(1, 9)), int(rng.integers(1, 257))),
            *(group * int(rng.integers(1, 64)), group),
            kept=float(rng.random()),
            seed=int(rng.integers(1 << 30)),
        )
        assert models.is_valid(linear.arrays(), linear.attributes())
        models.open_model(linear.model(), library)
        group = int(rng.choice([1, 4]))
        sizes = [linear.N, group * int(rng.integers(1, 9)), int(rng.integers(1, 257)), group * int(rng.integers(1, 64))]
        mlp = Mlp(linear, Linear(*sizes, group, half=bool(rng.random() < 0.5), kept=float(rng.random())))
        models.open_model(mlp.model(), library)


@pytest.mark.parametrize("name", ["values", "indices", "rows", "counts", "bias"])
@pytest.mark.parametrize("how", ["input", "default of an input", "computed"])
@pytest.mark.parametrize("layer", ["only", "first", "second"])
def test_weights_must_be_constant(library: str, name: str, how: str, layer: str) -> None:
    linear: Linear | Mlp = Linear(70, 36, 32)
    if layer != "only":
        linear = Mlp(Linear(70, 36, 32), Linear(36, 20, 32))
    name = f"hidden_{name}" if layer == "second" else name
    model, array = linear.model(), linear.arrays()[name]
    kind, graph = helper.np_dtype_to_tensor_dtype(array.dtype), model.graph
    if how == "default of an input":
        graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    else:
        kept = [tensor for tensor in graph.initializer if tensor.name != name]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        source = name if how == "input" else "source"
        graph.input.append(helper.make_tensor_value_info(source, kind, array.shape))
        if how == "computed":
            graph.node.insert(0, helper.make_node("Identity", [source], [name]))
    said = f"node '{graph.node[-1].name}': input {name} must be a constant of the graph"
    with pytest.raises(Exception, match=said):
        models.open_model(model, library)


@pytest.mark.parametrize(
    ("arrays", "attributes", "message"),
    [
        ({"weight": np.ones((12, 8), np.float16)}, {}, r"input weight has shape \[12, 8\], must have \[8, 12\]"),
        ({"weight": np.ones(96, np.float16)}, {}, "input weight has shape .*, must have two dimensions"),
        ({"weight": np.ones((8, 12, 1), np.float16)}, {}, "input weight has shape .*, must have two dimensions"),
        ({"weight": np.ones((8, 12), np.float32)}, {}, "Type Error"),
        ({"weight": None}, {}, "half"),
        ({"bias": np.ones(9, np.float32)}, {}, "input bias has 9 elements, must have 8"),
        ({"bias": np.ones((1, 8), np.float32)}, {}, "input bias has shape"),
        ({"bias": np.ones(8, np.float16)}, {}, "Type Error"),
        ({}, {"in_features": 0}, "attribute in_features is 0"),
        ({}, {"in_features": 2**62, "out_features": 2**62}, "input weight has shape"),
        ({}, {"out_features": None}, "attribute out_features is missing"),
    ],
)
def test_malformed_halves_are_refused(
    library: str, arrays: dict[str, Any], attributes: dict[str, Any], message: str
) -> None:
    half = HalfLinear(12, 8)
    changed = {name: array for name, array in (half.arrays() | arrays).items() if array is not None}
    given = {name: value for name, value in (half.attributes() | attributes).items() if value is not None}
    with pytest.raises(Exception, match=message):
        models.open_model(models.half_model(changed, given), library)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_halves_must_be_constant(library: str, name: str) -> None:
    half = HalfLinear(12, 8)
    model, array = half.model(), half.arrays()[name]
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    with pytest.raises(Exception, match=f"node 'half': input {name} must be a constant of the graph"):
        models.open_model(model, library)


@pytest.mark.parametrize("name", ["values", "indices", "rows", "counts"])
def test_weights_must_be_there(library: str, name: str) -> None:
    linear = Linear(70, 36, 32)
    arrays = linear.arrays()
    del arrays[name]
    with pytest.raises(Exception, match="linear"):
        models.open_model(models.linear_model(arrays, linear.attributes()), library)


@pytest.mark.parametrize("name", [name for name in models.MLP_INPUTS[1:11] if "bias" not in name])
def test_weights_of_both_layers_must_be_there(library: str, name: str) -> None:
    mlp = Mlp(Linear(70, 36, 32), Linear(36, 20, 32))
    arrays = mlp.arrays()
    del arrays[name]
    with pytest.raises(Exception, match="mlp"):
        models.open_model(models.mlp_model(arrays, mlp.attributes()), library)


@pytest.mark.parametrize("second", [False, True])
def test_messages_tell_the_layers_apart(library: str, second: bool) -> None:
    mlp, prefix = Mlp(Linear(70, 36, 32), Linear(36, 20, 32)), "hidden_" if second else ""

    def refused(name: str, change: Callable[[np.ndarray], np.ndarray], words: str) -> None:
        arrays = mlp.arrays()
        arrays[prefix + name] = change(arrays[prefix + name].copy())
        with pytest.raises(Exception, match=f"node 'mlp': {words}"):
            models.open_model(models.mlp_model(arrays, mlp.attributes()), library)

    refused("rows", lambda rows: rows[::-1], f"{prefix}rows of panel 0, block 0 are not sorted")
    refused("counts", lambda counts: counts + counts.dtype.type(99), f"{prefix}counts: [0-9]+ in block 0, which has 32")
    refused("indices", lambda indices: indices * 0, f"{prefix}indices of panel 0, block 0 do not ascend")
    refused("values", lambda values: values[1:], f"input {prefix}values has [0-9]+ elements")
    refused("bias", lambda bias: bias[:3], f"input {prefix}bias has 3 elements, must have {20 if second else 36}")
    refused("counts", lambda counts: counts[None], f"input {prefix}counts has shape")


@pytest.mark.parametrize("name", list(Mlp(Linear(1, 1, 1), Linear(1, 1, 1)).attributes()))
def test_attributes_of_both_layers_must_be_there(library: str, name: str) -> None:
    mlp = Mlp(Linear(70, 36, 32), Linear(36, 20, 32))
    attributes = mlp.attributes()
    del attributes[name]
    for wrong in (attributes, attributes | {name: 1.5}):
        with pytest.raises(Exception, match=f"vlprune.SparseMlp node 'mlp': attribute {name}"):
            models.open_model(models.mlp_model(mlp.arrays(), wrong), library)


@pytest.mark.parametrize("name", list(Linear(1, 1, 1).attributes()))
def test_attributes_must_be_there_and_of_their_type(library: str, name: str) -> None:
    linear = Linear(70, 36, 32)
    attributes = linear.attributes()
    for value in ([1.5, "1", [1]] if name != "activation" else [1, "", "Relu", "gelu\0", "x" * 300]) + [None]:
        wrong = {**attributes, name: value}
        if value is None:
            del wrong[name]
        with pytest.raises(Exception, match=f"node 'linear': attribute {name}"):
            models.open_model(models.linear_model(linear.arrays(), wrong), library)


@pytest.mark.parametrize("layers", ["linear", "mlp"])
@pytest.mark.parametrize(
    ("arrays", "attributes", "message"),
    [
        ({"norm_bias": None}, {}, "inputs norm_scale and norm_bias must be both given or both left out"),
        ({"norm_scale": None}, {}, "inputs norm_scale and norm_bias must be both given or both left out"),
        ({"norm_scale": np.ones(69, np.float32)}, {}, "input norm_scale has 69 elements, must have 70"),
        ({"norm_bias": np.ones((1, 70), np.float32)}, {}, "input norm_bias has shape"),
        ({}, {"norm_epsilon": None}, "attribute norm_epsilon is missing or not a float"),
        ({}, {"norm_epsilon": 1}, "attribute norm_epsilon is missing or not a float"),
        ({}, {"norm_epsilon": -1.0}, "attribute norm_epsilon is negative"),
        ({}, {"norm_epsilon": float("nan")}, "attribute norm_epsilon is not finite"),
    ],
)
def test_malformed_norms_are_refused(
    library: str, layers: str, arrays: dict[str, Any], attributes: dict[str, Any], message: str
) -> None:
    first = Linear(70, 36, 32, norm=True)
    node: Linear | Mlp = Mlp(first, Linear(36, 20, 16)) if layers == "mlp" else first
    make = models.mlp_model if layers == "mlp" else models.linear_model
    wrong = {name: array for name, array in (node.arrays() | arrays).items() if array is not None}
    given = {name: value for name, value in (node.attributes() | attributes).items() if value is not None}
    models.open_model(make(node.arrays(), node.attributes()), library)
    with pytest.raises(Exception, match=f"node '{layers}': {message}"):
        models.open_model(make(wrong, given), library)


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        (["q"], {"scale": 1.0}, "attribute num_heads"),
        (["q"], {"num_heads": 0, "scale": 1.0}, "attribute num_heads is 0, must be 1 to"),
        (["q"], {"num_heads": 2**62, "scale": 1.0}, "attribute num_heads is"),
        (["q"], {"num_heads": 2}, "attribute scale"),
        (["q"], {"num_heads": 2, "scale": float("nan")}, "attribute scale is not finite"),
        (["q", "k"], {"num_heads": 2, "scale": 1.0}, "inputs k and v must be both given or both left out"),
        (["q", "", "v"], {"num_heads": 2, "scale": 1.0}, "inputs k and v must be both given or both left out"),
        (["q"], {"num_heads": 2, "scale": 1.0, "kv_heads_first": 1}, "kv_heads_first needs the inputs k and v"),
        (["q", "k", "v"], {"num_heads": 2, "scale": 1.0, "kv_heads_first": 2}, "attribute kv_heads_first is 2"),
    ],
)
def test_malformed_attention_is_refused(
    library: str, inputs: list[str], attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=f"vlprune.Attention node 'attention': {message}"):
        models.open_model(models.attention_model(inputs, **attributes), library)


# --- where the weights lie, who runs them -----------------------------------------------------------------------------


def unaligned(linear: Linear | Mlp | HalfLinear, folder: Path) -> str:
    """Write a model whose weights lie in another file, each at an odd place."""
    model = linear.model()
    data = bytearray(4097)
    for tensor in model.graph.initializer:
        content = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "weights.bin", "offset": len(data), "length": len(content)}.items():
            tensor.external_data.add(key=key, value=str(value))
        data += content + b"\0" * (1 + len(content) % 2)
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(data)
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for size in ("batch", linear.ends[0]):
        dim = model.graph.input[0].type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size
    onnx.save(model, folder / "model.onnx")
    return str(folder / "model.onnx")


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_weights_may_lie_anywhere(library: str, tmp_path: Path, half: bool, layers: int) -> None:
    linear: Linear | Mlp | HalfLinear = Linear(300, 131, 128, 32, half=half)
    if layers == 0:
        linear = HalfLinear(300, 131, bias=half)
    if layers == 2:
        linear = Mlp(Linear(300, 131, 128, 32, half=half), Linear(131, 52, 32, 12, 4, half=not half))
    opened = models.open_model(unaligned(linear, tmp_path), library)
    x = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)
    for rows in (1, 40):
        assert models.difference(opened.run(None, {"x": x[:rows]})[0], linear.expected(x[:rows])) <= 1e-5


def test_weights_of_an_outer_graph(library: str) -> None:
    """A branch of If with its weights outside, as merged decoders have them."""
    linear = Linear(70, 36, 32)
    model = linear.model()
    branch = helper.make_graph([model.graph.node[0]], "branch", [], [model.graph.output[0]])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "other", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    choose = helper.make_node("If", ["yes"], ["result"], then_branch=branch, else_branch=other)
    inputs = [model.graph.input[0], helper.make_tensor_value_info("yes", TensorProto.BOOL, [])]
    result = [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)]
    opened = models.open_model(models.model_of([choose], inputs, result, model.graph.initializer), library)
    x = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    assert models.difference(opened.run(None, {"x": x, "yes": np.array(True)})[0], linear.expected(x)) <= 1e-5


def test_eight_sessions_in_eight_threads(library: str) -> None:
    """Registered, opened and run at the same time, and one session by all."""
    x = np.random.default_rng(0).standard_normal((3, 40, 200)).astype(np.float32)
    linears = [
        Linear(200, 132, 64, 32, 1 + 3 * (seed % 2), seed % 3 == 0, activation="gelu", seed=seed) for seed in range(8)
    ]
    expected = [linear.expected(x) for linear in linears]
    shared = models.open_model(linears[0].model(), library, threads=2)
    mlp = Mlp(linears[0], Linear(132, 60, 32, 16, 4, seed=9))
    pair, expected_pair = models.open_model(mlp.model(), library, threads=2), mlp.expected(x)

    def work(number: int) -> float:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(library)
        options.intra_op_num_threads = 1 + number % 2
        source = linears[number].model().SerializeToString()
        own = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        worst = 0.0
        for turn in range(40):
            rows = 1 + (turn * 7 + number) % 40
            part = x[:, :rows]
            worst = max(worst, models.difference(own.run(None, {"x": part})[0], expected[number][:, :rows]))
            worst = max(worst, models.difference(shared.run(None, {"x": part})[0], expected[0][:, :rows]))
            worst = max(worst, models.difference(pair.run(None, {"x": part})[0], expected_pair[:, :rows]))
        return worst

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) <= 2e-5


# --- the library ------------------------------------------------------------------------------------------------------


class ApiBase(ctypes.Structure):
    """ONNX Runtime's OrtApiBase."""

    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_char_p)
    _fields_ = [("GetApi", get_api), ("GetVersionString", get_version)]


def register(library: str, base: ApiBase) -> int | None:
    function = ctypes.CDLL(library).RegisterCustomOps
    function.restype = ctypes.c_void_p
    result: int | None = function(None, ctypes.byref(base))
    return result


def test_an_onnxruntime_too_old_is_told_so(library: str) -> None:
    said: list[tuple[int, bytes]] = []
    asked: list[int] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, text: bytes) -> int:
        said.append((code, text))
        return 0x5EED

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ApiBase.get_api
    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version < 17 else None

    base = ApiBase(get_api, ApiBase.get_version(lambda: b"1.16.3"))
    assert register(library, base) == 0x5EED
    assert asked[0] == 17 and len(said) == 1
    assert said[0][0] == 9 and b"need ONNX Runtime 1.17 or newer" in said[0][1]


def test_no_interface_at_all(library: str, capfd: pytest.CaptureFixture[str]) -> None:
    base = ApiBase(ApiBase.get_api(lambda version: None), ApiBase.get_version(lambda: b"?"))
    assert register(library, base) is None
    assert "need ONNX Runtime 1.17 or newer" in capfd.readouterr().err


def test_library_shows_only_its_entries(library: str) -> None:
    nm = shutil.which("nm")
    if not nm or not sys.platform.startswith("linux"):
        pytest.skip("nm is not there to list the symbols")
    listed = subprocess.run([nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == {
        "RegisterCustomOps",
        "vlprune_ops_isa",
        "vlprune_ops_version",
    }


def test_library_tells_its_version(library: str) -> None:
    import vlprune

    function = ctypes.CDLL(library).vlprune_ops_version
    function.restype = ctypes.c_char_p
    assert function().decode() == vlprune.__version__
    assert operators.isa() in ("avx512", "avx2", "portable")


def test_unknown_instruction_set_is_refused(library: str) -> None:
    done = run_program(library, "numbers", check=False, VLPRUNE_ISA="sse9")
    assert done.returncode and "VLPRUNE_ISA is not one of avx512, avx2, portable" in done.stderr


def test_session_registers_the_library_by_itself(library: str, tmp_path: Path) -> None:
    linear = Linear(70, 36, 32)
    onnx.save(linear.model(), tmp_path / "packed.onnx")
    graph = OnnxGraph(session(tmp_path / "packed.onnx", threads=1), "packed")
    x = np.ones((3, 70), np.float32)
    assert models.difference(graph({"x": x})["y"], linear.expected(x)) <= 1e-5


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_packed_graph_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(Linear(70, 36, 32).model(), tmp_path / "packed.onnx")
    monkeypatch.setattr(operators, "_SUFFIX", ".missing")
    assert not operators.available()
    with pytest.raises(MachineError, match="were not built: install a C") as error:
        session(tmp_path / "packed.onnx")
    assert "--no-cache-dir" in one_line(error) and "without --pack" in one_line(error)
    with pytest.raises(MachineError, match="were not built"):
        operators.isa()


def test_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libvlprune_ops.so"
    broken.write_bytes(b"not a library")
    onnx.save(Linear(70, 36, 32).model(), tmp_path / "packed.onnx")
    monkeypatch.setattr(operators, "library", lambda: broken)
    with pytest.raises(MachineError, match="onnxruntime cannot use the operators") as error:
        session(tmp_path / "packed.onnx")
    one_line(error)
    with pytest.raises(MachineError, match="cannot be loaded"):
        operators.isa()


def test_plain_graph_needs_no_library(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = linear()
    monkeypatch.setattr(operators, "_SUFFIX", ".missing")
    assert session(path).get_outputs()[0].name == "y"


def test_packed_graph_on_another_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA here: a session that asks for it, but opens on the CPU without the operators."""
    from vlprune.runtime import session as module

    path = tmp_path / "packed.onnx"
    onnx.save(Linear(70, 36, 32).model(), path)
    monkeypatch.setattr(module, "check_provider", lambda name: None)
    monkeypatch.setitem(module.CHAINS, "cuda", ["CPUExecutionProvider"])
    with pytest.raises(MachineError, match="packed for CPUs and does not run on provider cuda") as error:
        session(path, "cuda")
    assert "--provider cpu" in one_line(error) and "without --pack" in one_line(error)


def test_malformed_packed_graph_is_one_line(library: str, tmp_path: Path) -> None:
    linear = Linear(70, 36, 32)
    arrays = linear.arrays()
    arrays["counts"][0] += 1
    onnx.save(models.linear_model(arrays, linear.attributes()), tmp_path / "packed.onnx")
    with pytest.raises(RequestError, match="vlprune.SparseLinear node 'linear': counts: ") as error:
        session(tmp_path / "packed.onnx")
    one_line(error)


# --- the build --------------------------------------------------------------------------------------------------------


def test_library_is_there_where_a_compiler_is() -> None:
    """The other tests are skipped without the library: here an installation that lost it fails."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler to build with")
    assert operators.available(), f"{compiler} is there, but the operator library is not: {operators.BUILD}"


def configure(folder: Path, *options: str, **environment: str) -> str:
    """Run cmake; returns what it said."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not there to build with")
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path) -> None:
    done = subprocess.run(["cmake", "--build", str(folder), "-j", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    said = configure(tmp_path / "build", CXX=str(tmp_path / "no-compiler"))
    assert "no C++ compiler, installing without the operators" in said
    build(tmp_path / "build")
    subprocess.run(["cmake", "--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "to")], check=True)
    assert not list(tmp_path.rglob("libvlprune_ops*"))


@pytest.mark.parametrize(
    "missing, builds",
    [(["__builtin_shufflevector", "__builtin_shuffle"], False), (["__builtin_shufflevector"], True)],
    ids=["GCC 8", "GCC 11"],
)
def test_installs_with_an_old_compiler(tmp_path: Path, missing: list[str], builds: bool) -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not there to be made old")
    old = tmp_path / "old-g++"
    old.write_text(f'#!/bin/sh\nexec g++ {" ".join(f"-D{name}=missing" for name in missing)} "$@"\n')
    old.chmod(0o755)
    said = configure(tmp_path / "build", f"-DCMAKE_CXX_COMPILER={old}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    assert ("is not GCC 11, Clang, or newer, installing without the operators" not in said) == builds
    commands = tmp_path / "build" / "compile_commands.json"
    for file in json.loads(commands.read_text()) if builds else []:
        subprocess.run([*shlex.split(file["command"]), "-fsyntax-only"], cwd=file["directory"], check=True)


def test_clean_under_sanitizers(tmp_path: Path) -> None:
    """Numbers, malformed weights and weights at odd addresses, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not there to build with")
    configure(tmp_path, "-DVLPRUNE_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++")
    build(tmp_path)
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ has no AddressSanitizer")
    environment = {
        "LD_PRELOAD": " ".join(found),  # ahead of Python, which knows neither
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and onnxruntime leave much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    library = str(tmp_path / "libvlprune_ops.so")
    odd = []
    for half in (False, True):
        linear = Linear(300, 131, 128, 32, half=half)
        mlp = Mlp(Linear(300, 131, 128, 32, half=half), Linear(131, 52, 32, 12, 4, half=not half))
        odd += [unaligned(HalfLinear(71, 19), tmp_path / "dense")]
        odd += [unaligned(linear, tmp_path / f"half-{half}"), unaligned(mlp, tmp_path / f"pair-{half}")]
    for isa in ("avx512", "avx2", "portable"):
        done = run_program(library, "numbers", *odd, check=False, VLPRUNE_ISA=isa, **environment)
        if "instruction set that this processor lacks" not in done.stderr:
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout == f"done with {isa}\n"
    assert run_program(library, "malformed", "1000", **environment).stdout.startswith("done")


def test_from_the_source_archive(tmp_path: Path) -> None:
    """The archive builds, its wheel has the library, and the wheel works in a virtual environment of its own."""
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler to build with")
    pytest.importorskip("build", reason="the module build is not there to make an archive")
    here = importlib.util.find_spec("scikit_build_core") and shutil.which("cmake")  # what isolation would fetch
    isolated = (["--no-isolation"], ["--no-build-isolation"]) if here else ([], [])

    def run(*command: str, **environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment}, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run(sys.executable, "-m", "build", "--sdist", *isolated[0], "--outdir", str(tmp_path), str(ROOT))
    (archive,) = tmp_path.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolated[1], str(archive))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    assert "vlprune/runtime/libvlprune_ops.so" in names
    assert not [name for name in names if "csrc" in name], "the sources do not belong into the wheel"

    onnx.save(Linear(70, 36, 32).model(), tmp_path / "packed.onnx")
    run(sys.executable, "-m", "venv", "--without-pip", "fresh")
    python = str(tmp_path / "fresh" / "bin" / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", str(wheel))
    # Its dependencies come from here: as a plain folder, so that the editable install does not take over.
    code = (
        "import vlprune; from vlprune.runtime import operators; from vlprune.runtime.session import session\n"
        "print(session('packed.onnx').get_outputs()[0].name, operators.library(), vlprune.__file__)"
    )
    said = run(python, "-c", code, PYTHONPATH=sysconfig.get_path("purelib")).split()
    assert said[0] == "y"
    assert all(Path(path).is_relative_to(tmp_path) for path in said[1:]), said
