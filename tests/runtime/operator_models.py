"""Models of one sparse operator, what they should compute, and ways to break them; also a program for subprocesses:

    python operator_models.py LIBRARY numbers MODEL... | malformed COUNT

The layout of the weights is written and read here once more, plainly, row by row: a check of exporters/layout.py and of
the kernels that shares no line with them.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper


Arrays = dict[str, np.ndarray]
NORM = ("norm_scale", "norm_bias")
INPUTS = ("x", "values", "indices", "rows", "counts", "bias", "residual", *NORM)
MLP_INPUTS = (*INPUTS[:6], *(f"hidden_{name}" for name in INPUTS[1:6]), "residual", *NORM)
EPSILON = 1e-3
SIZES_OF_LAYOUT = ("block_columns", "panel_rows", "group_rows")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")


@dataclass
class Linear:
    """A SparseLinear node to test: sizes, and what it does around the product."""

    K: int
    N: int
    block: int
    panel: int = 128
    group: int = 1
    half: bool = False
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    kept: float = 0.3
    seed: int = 0
    norm: bool = False
    weight: np.ndarray = field(init=False)  # [N, K], rounded when half
    mask: np.ndarray = field(init=False)  # [N, K], True = kept
    bias_values: np.ndarray = field(init=False)
    norm_values: np.ndarray = field(init=False)  # [2, K]: scale, bias

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        weight = rng.standard_normal((self.N, self.K)).astype(np.float32)
        self.weight = weight.astype(np.float16).astype(np.float32) if self.half else weight
        mask = rng.random((self.N // self.group, self.K)) < self.kept
        if len(mask) > 2:
            mask[1], mask[2] = False, True
        self.mask = mask.repeat(self.group, 0)
        self.bias_values = rng.standard_normal(self.N).astype(np.float32)
        self.norm_values = rng.standard_normal((2, self.K)).astype(np.float32)

    def attributes(self) -> dict[str, Any]:
        sizes = {"in_features": self.K, "out_features": self.N, "block_columns": self.block, "panel_rows": self.panel}
        sizes |= {"group_rows": self.group, "activation": self.activation}
        return sizes | ({"norm_epsilon": EPSILON} if self.norm else {})

    def arrays(self) -> Arrays:
        """The weight in its layout."""
        values: list[float] = []
        indices: list[int] = []
        rows: list[int] = []
        counts: list[int] = []
        for top in range(0, self.N, self.panel):
            height = min(self.panel, self.N - top)
            for left in range(0, self.K, self.block):
                kept = [
                    [k - left for k in range(left, min(left + self.block, self.K)) if self.mask[top + row, k]]
                    for row in range(0, height, self.group)
                ]
                for row in sorted(range(len(kept)), key=lambda row: (-len(kept[row]), row)):
                    rows.append(row)
                    counts.append(len(kept[row]))
                    for index in kept[row]:
                        indices.append(index)
                        first = top + row * self.group
                        values += [self.weight[n, left + index] for n in range(first, first + self.group)]
        arrays = {
            "values": np.array(values, np.float16 if self.half else np.float32),
            "indices": np.array(indices, np.uint8),
            "rows": np.array(rows, np.uint8),
            "counts": np.array(counts, np.uint16),
        }
        arrays |= {"bias": self.bias_values} if self.bias else {}
        return arrays | (dict(zip(NORM, self.norm_values, strict=True)) if self.norm else {})

    @property
    def ends(self) -> tuple[int, int]:
        return self.K, self.N

    def model(self) -> ModelProto:
        return linear_model(self.arrays(), self.attributes(), self.residual)

    def expected(self, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
        """The result in float64: only kept weights meet x, so that 0 * inf does not arise where nothing is kept."""
        with np.errstate(invalid="ignore", over="ignore"):
            if self.norm:
                apart = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
                x = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + EPSILON)
                x = x * self.norm_values[0] + self.norm_values[1]
            if np.isfinite(x).all():
                y = x.astype(np.float64) @ (self.weight * self.mask).T.astype(np.float64)
            else:
                products = x[..., None, :].astype(np.float64) * self.weight
                y = np.where(self.mask, products, 0).sum(-1)
            y = activate(self.activation, y + self.bias_values if self.bias else y)
        return y if residual is None else y + residual


@dataclass
class Mlp:
    """A SparseMlp node to test: two layers, the second without activation, the first without residual."""

    first: Linear
    second: Linear

    @property
    def ends(self) -> tuple[int, int]:
        return self.first.K, self.second.N

    @property
    def residual(self) -> bool:
        return self.second.residual

    def attributes(self) -> dict[str, Any]:
        return joined(self.first.attributes(), self.second.attributes())

    def arrays(self) -> Arrays:
        return self.first.arrays() | {f"hidden_{name}": array for name, array in self.second.arrays().items()}

    def model(self) -> ModelProto:
        return mlp_model(self.arrays(), self.attributes(), self.residual)

    def expected(self, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
        return self.second.expected(self.first.expected(x), residual)


@dataclass
class HalfLinear:
    """A HalfLinear node to test."""

    K: int
    N: int
    bias: bool = True
    residual: bool = field(default=False, init=False)
    weight: np.ndarray = field(init=False)  # [N, K]
    bias_values: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.K + self.N)
        self.weight = rng.standard_normal((self.N, self.K)).astype(np.float16)
        self.bias_values = rng.standard_normal(self.N).astype(np.float32)

    @property
    def ends(self) -> tuple[int, int]:
        return self.K, self.N

    def attributes(self) -> dict[str, Any]:
        return {"in_features": self.K, "out_features": self.N}

    def arrays(self) -> Arrays:
        return {"weight": self.weight} | ({"bias": self.bias_values} if self.bias else {})

    def model(self) -> ModelProto:
        return half_model(self.arrays(), self.attributes())

    def expected(self, x: np.ndarray, residual: None = None) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            if np.isfinite(x).all() and np.isfinite(self.weight).all():
                y = x.astype(np.float64) @ self.weight.T.astype(np.float64)
            else:
                y = (x[..., None, :].astype(np.float64) * self.weight).sum(-1)
        return y + self.bias_values if self.bias else y


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a SparseMlp from those of its layers."""
    given = first | {"hidden_features": first["out_features"], "out_features": second["out_features"]}
    return given | {f"hidden_{name}": second[name] for name in SIZES_OF_LAYOUT}


def layer_names(second: bool) -> dict[str, str]:
    """What a layer's attributes are called in a SparseLinear -> in a SparseMlp."""
    if second:
        ends = {"in_features": "hidden_features", "out_features": "out_features"}
        return ends | {name: f"hidden_{name}" for name in SIZES_OF_LAYOUT}
    return {"in_features": "in_features", "out_features": "hidden_features"} | {name: name for name in SIZES_OF_LAYOUT}


def linear_model(arrays: Arrays, attributes: dict[str, Any], residual: bool = False) -> ModelProto:
    return layers_model("SparseLinear", "linear", INPUTS[1:6], arrays, attributes, residual)


def mlp_model(arrays: Arrays, attributes: dict[str, Any], residual: bool = False) -> ModelProto:
    return layers_model("SparseMlp", "mlp", MLP_INPUTS[1:11], arrays, attributes, residual)


def half_model(arrays: Arrays, attributes: dict[str, Any]) -> ModelProto:
    return layers_model("HalfLinear", "half", ("weight", "bias"), arrays, attributes, residual=False)


def layers_model(
    op: str, name: str, weights: Iterable[str], arrays: Arrays, attributes: dict[str, Any], residual: bool
) -> ModelProto:
    names = ["x", *(weight if weight in arrays else "" for weight in weights), "residual" if residual else ""]
    names += [name if name in arrays else "" for name in NORM]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, ["y"], name=name, domain="vlprune", **attributes)
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    if residual:
        inputs.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, None))
    return model_of([node], inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: Any = ()) -> ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vlprune", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def activate(name: str, y: np.ndarray) -> np.ndarray:
    if name == "gelu":
        return 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) if y.size else y
    if name == "gelu_tanh":
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if name == "quick_gelu":
        return y / (1 + np.exp(-1.702 * y))
    return np.maximum(y, 0) if name == "relu" else y


def attention_expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, bias: np.ndarray | None = None
) -> np.ndarray:
    """Attention in float64 over q [B, Tq, H, D], k and v [B, Tk, H, D] -> [B, Tq, H * D]."""
    scores = scale * np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k)
    scores = scores if bias is None else scores + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


@cache
def options(library: str, threads: int = 1, optimise: bool = True) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.register_custom_ops_library(library)
    made.intra_op_num_threads = threads
    made.log_severity_level = 4
    made.add_session_config_entry("session.force_spinning_stop", "1")
    # Every tensor in memory of its own, so that AddressSanitizer sees its ends.
    made.enable_cpu_mem_arena = made.enable_mem_pattern = False
    if not optimise:
        made.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return made


def open_model(
    model: ModelProto | str, library: str, threads: int = 1, optimise: bool = True
) -> onnxruntime.InferenceSession:
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options(library, threads, optimise), providers=["CPUExecutionProvider"])


def difference(y: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value; infinite when NaN or infinity stand elsewhere."""
    if y.shape != expected.shape:
        return math.inf
    for special in (np.isnan, np.isposinf, np.isneginf):
        if not np.array_equal(special(y), special(expected)):
            return math.inf
    finite = np.isfinite(expected)
    if not finite.any():
        return 0
    return float(np.abs(y[finite] - expected[finite]).max() / max(np.abs(expected[finite]).max(), 1e-20))


# --- numbers ----------------------------------------------------------------------------------------------------------

SIZES: list[dict[str, Any]] = [  # K, N, block, panel, group: nothing a multiple of anything, ends of ranges
    {"K": 70, "N": 36, "block": 32, "panel": 16},
    {"K": 1, "N": 1, "block": 1, "panel": 1},
    {"K": 5, "N": 3, "block": 1, "panel": 2},
    {"K": 53, "N": 37, "block": 3, "panel": 7},
    {"K": 256, "N": 40, "block": 256, "panel": 256, "kept": 1.0},
    {"K": 300, "N": 131, "block": 128, "panel": 32},
    {"K": 200, "N": 260, "block": 192, "panel": 128, "kept": 0.1},
    {"K": 300, "N": 20, "block": 256, "panel": 8},
    {"K": 40, "N": 11, "block": 64, "panel": 4, "kept": 0.0},
    {"K": 130, "N": 36, "block": 128, "panel": 12, "group": 4},
    {"K": 200, "N": 132, "block": 192, "panel": 128, "group": 4, "kept": 0.1},
    {"K": 9, "N": 4, "block": 3, "panel": 256, "group": 4, "kept": 1.0},
]


def linears() -> Iterator[Linear]:
    """Every size with both value types, then every activation with and without bias and residual."""
    for seed, sizes in enumerate(SIZES):
        for half in (False, True):
            yield Linear(**sizes, half=half, seed=seed, residual=half)
    for group in (1, 4):
        for number, activation in enumerate(ACTIVATIONS * 4):
            bias, residual = bool(number // 5 % 2), bool(number // 10)
            norm = number % 3 == 0
            sizes = {"K": 70, "N": 36, "block": 32, "panel": 16, "group": group}
            yield Linear(**sizes, bias=bias, residual=residual, activation=activation, seed=number, norm=norm)
    for K in (1, 7, 70, 768):
        yield Linear(K, 36, 32, 16, norm=True, residual=True)


def leading_shapes(few: bool = False) -> list[tuple[int, ...]]:
    """What stands before K: no rows, one, vectors and tiles full and not, every batch size, any rank."""
    some = [(), (0,), (1,), (2,), (3, 0), (1, 16), (1, 17), (2, 3, 5), (1, 197)]
    return some if few else [*some, *((batch, length) for batch in range(1, 10) for length in (1, 16, 17, 197))]


def few_tokens() -> list[tuple[int, ...]]:
    """Every number of tokens around the end of what goes token by token, then tiles full and not."""
    return [(), *((tokens,) for tokens in range(10)), (3, 0), (2, 3, 5), (16,), (17,), (197,)]


def half_linears() -> list[HalfLinear]:
    """Vectors, blocks of rows and parts of them, full and not."""
    sizes = [(1, 1), (5, 7), (16, 64), (17, 65), (64, 130), (300, 131), (768, 200)]
    return [HalfLinear(K, N, bias=number % 2 == 0) for number, (K, N) in enumerate(sizes)]


def check_layers(
    layers: Linear | Mlp | HalfLinear, library: str, threads: int, leads: Iterable[tuple[int, ...]]
) -> None:
    session = open_model(layers.model(), library, threads)
    rng = np.random.default_rng(1)
    K, N = layers.ends
    for lead in leads:
        feeds = {"x": rng.standard_normal((*lead, K)).astype(np.float32)}
        if layers.residual:
            feeds["residual"] = rng.standard_normal((*lead, N)).astype(np.float32)
        y = session.run(None, feeds)[0]
        assert y.dtype == np.float32
        found = difference(y, layers.expected(feeds["x"], feeds.get("residual")))
        assert found <= 1e-5, f"{layers.attributes()} on {feeds['x'].shape}: {found}"


Sizes = tuple[int, int, int]
MLPS: list[tuple[Sizes, Sizes, Sizes]] = [  # K, hidden, N; then block, panel, group of either layer
    ((70, 36, 20), (32, 16, 1), (16, 8, 1)),
    ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((5, 3, 7), (2, 2, 1), (1, 3, 1)),
    ((53, 37, 29), (7, 5, 1), (11, 13, 1)),  # the second's block and the first's panel meet nowhere before the end
    ((64, 100, 30), (33, 37, 1), (41, 30, 1)),
    ((300, 260, 131), (128, 128, 1), (192, 32, 1)),
    ((256, 300, 256), (256, 256, 1), (256, 256, 1)),
    ((40, 36, 12), (64, 12, 4), (32, 5, 1)),
    ((40, 36, 12), (9, 7, 1), (36, 8, 4)),
    ((200, 132, 68), (192, 128, 4), (128, 64, 4)),
]
# The same for so many tokens that each thread keeps to its own: the hidden features in one piece or in several.
LARGE_MLPS: list[tuple[Sizes, Sizes, Sizes]] = [
    ((40, 1500, 30), (32, 32, 1), (64, 16, 1)),  # pieces of 768
    ((40, 1500, 28), (32, 40, 4), (96, 13, 1)),  # of 480
    ((20, 1500, 28), (20, 67, 1), (5, 8, 4)),  # of 670
    ((20, 1500, 28), (7, 128, 4), (192, 128, 4)),  # of 768
    ((20, 1500, 28), (7, 128, 1), (129, 100, 1)),  # block and panel meet nowhere
    ((1600, 30, 20), (100, 9, 1), (30, 20, 1)),  # few hidden features
]
# So many hidden features that few tokens fill a cache, of which there are not enough to share them out evenly.
WIDE_MLPS: list[tuple[Sizes, Sizes, Sizes]] = [
    ((9, 12000, 8), (5, 128, 1), (192, 3, 1)),
    ((9, 12000, 8), (9, 100, 4), (128, 8, 1)),
]


def mlps(all_sizes: list[tuple[Sizes, Sizes, Sizes]] = MLPS) -> Iterator[Mlp]:
    """Every size, with fp16 in either, both or no layer, biases and residual here and there."""
    for number, ((K, hidden, N), first, second) in enumerate(all_sizes):
        for half in range(4):
            flags = [bool((number + half) >> bit & 1) for bit in range(3)]
            options = {"activation": ACTIVATIONS[(number + half) % 5], "bias": not flags[0], "seed": number}
            layer = Linear(K, hidden, *first, half=bool(half & 1), norm=flags[2], **options)
            after = {"bias": not flags[1], "residual": flags[1] != flags[2], "seed": number + 50}
            yield Mlp(layer, Linear(hidden, N, *second, half=bool(half & 2), **after))


def mlps_of_every_kind() -> Iterator[Mlp]:
    """Every activation with rows alone and in groups, in either layer."""
    for number, activation in enumerate(ACTIVATIONS * 4):
        groups = [1 + 3 * (number // 5 & 1), 1 + 3 * (number // 10 & 1)]
        layer = Linear(70, 36, 32, 16, groups[0], activation=activation, seed=number)
        residual = bool(number % 2)
        yield Mlp(layer, Linear(36, 20, 16, 8, groups[1], residual=residual, seed=number + 50))


def many_tokens() -> tuple[int]:
    """So many that they can be shared out evenly among this machine's threads."""
    return (max(min(128 * (os.cpu_count() or 1), 4096), 512),)


ATTENTIONS: list[dict[str, Any]] = [  # batch, heads, tq, tk, d
    {"B": 1, "H": 1, "Tq": 1, "Tk": 1, "D": 1},
    {"B": 2, "H": 3, "Tq": 5, "Tk": 5, "D": 7},
    {"B": 1, "H": 2, "Tq": 197, "Tk": 197, "D": 64},
    {"B": 3, "H": 2, "Tq": 1, "Tk": 35, "D": 16},
    {"B": 2, "H": 2, "Tq": 17, "Tk": 33, "D": 48},
    {"B": 1, "H": 1, "Tq": 70, "Tk": 3, "D": 20},
    {"B": 2, "H": 2, "Tq": 1, "Tk": 197, "D": 20},
]


def attention_model(inputs: list[str], **attributes: Any) -> ModelProto:
    node = helper.make_node("Attention", inputs, ["y"], name="attention", domain="vlprune", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs if name]
    return model_of([node], values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])


def check_attention(library: str, threads: int, B: int, H: int, Tq: int, Tk: int, D: int) -> None:
    """Every way to give k and v, without a bias and with one that broadcasts in each way."""
    rng = np.random.default_rng(B + Tq + Tk)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = normal(B, Tq, H, D), normal(B, Tk, H, D), normal(B, Tk, H, D)
    biases = [
        None,
        *(normal(*(size if bits >> i & 1 else 1 for i, size in enumerate((B, H, Tq, Tk)))) for bits in range(16)),
    ]
    masked = np.where(rng.random((B, 1, Tq, Tk)) < 0.4, np.float32(np.finfo(np.float32).min), np.float32(0))
    flat = {"q": q.reshape(B, Tq, -1), "k": k.reshape(B, Tk, -1), "v": v.reshape(B, Tk, -1)}
    first = flat | {name: np.ascontiguousarray(flat[name].reshape(B, Tk, H, D).swapaxes(1, 2)) for name in "kv"}
    forms: list[tuple[dict[str, np.ndarray], int]] = [(flat, 0), (first, 1)]
    if Tq == Tk:
        forms.append(({"q": np.concatenate(list(flat.values()), -1)}, 0))
    for feeds, heads_first in forms:
        packed = ["q", *(name if name in feeds else "" for name in "kv")]
        plain = open_model(
            attention_model([name for name in packed if name], num_heads=H, scale=0.3, kv_heads_first=heads_first),
            library,
            threads,
        )
        biased = open_model(
            attention_model([*packed, "bias"], num_heads=H, scale=0.3, kv_heads_first=heads_first), library, threads
        )
        for bias in [*biases, masked]:
            y = plain.run(None, feeds)[0] if bias is None else biased.run(None, {**feeds, "bias": bias})[0]
            found = difference(y, attention_expected(q, k, v, 0.3, bias))
            shape = None if bias is None else bias.shape
            assert found <= 1e-5, f"{(B, H, Tq, Tk, D)}, heads first {heads_first}, bias {shape}: {found}"


def check_numbers(library: str) -> None:
    for linear in linears():
        check_layers(linear, library, 2, leading_shapes(few=True))
    for mlp in [*list(mlps())[::3], *mlps_of_every_kind()]:  # a third has every size and every type
        check_layers(mlp, library, 2, [(), (2,), (3,), (4,), (17,), (70,)])
    for mlp in list(mlps(LARGE_MLPS))[::3]:
        check_layers(mlp, library, 2, [many_tokens()])
    for mlp in list(mlps(WIDE_MLPS))[::3]:
        check_layers(mlp, library, 2, [(20,), (40,)])
    for half in half_linears():
        check_layers(half, library, 2, few_tokens())
    for sizes in ATTENTIONS:
        check_attention(library, 2, **sizes)


# --- malformed weights ------------------------------------------------------------------------------------------------


def is_valid(arrays: Arrays, attributes: dict[str, Any]) -> bool:
    """Read a layout as its description says, believing nothing."""
    K, N, B, P, G = (
        int(attributes[f"{name}"])
        for name in ("in_features", "out_features", "block_columns", "panel_rows", "group_rows")
    )
    if min(K, N) < 1 or not (1 <= B <= 256 and 1 <= P <= 256 and G in (1, 4)) or N % G or P % G:
        return False
    types = {"values": (np.float32, np.float16), "indices": (np.uint8,), "rows": (np.uint8,), "counts": (np.uint16,)}
    if any(arrays[name].ndim != 1 or arrays[name].dtype not in kinds for name, kinds in types.items()):
        return False
    if "bias" in arrays and (arrays["bias"].shape != (N,) or arrays["bias"].dtype != np.float32):
        return False
    indices, rows, counts = (arrays[name].tolist() for name in ("indices", "rows", "counts"))
    if len(rows) != len(counts) or len(rows) != -(-K // B) * (N // G) or len(arrays["values"]) != G * len(indices):
        return False
    entry = start = 0
    for top in range(0, N, P):
        groups = min(P, N - top) // G
        for left in range(0, K, B):
            width, here = min(B, K - left), slice(entry, entry + groups)
            pairs = [(-count, row) for count, row in zip(counts[here], rows[here], strict=True)]
            if sorted(rows[here]) != list(range(groups)) or pairs != sorted(pairs):
                return False
            for count in counts[here]:
                columns = indices[start : start + count]
                if (
                    len(columns) < count
                    or columns != sorted(set(columns))
                    or any(column >= width for column in columns)
                ):
                    return False
                start += count
            entry += groups
    return start == len(indices)


EXTREMES = [-(2**63), -1, 0, 1, 2, 3, 4, 5, 8, 255, 256, 257, 2**16, 2**31 - 1, 2**32, 2**62, 2**63 - 1]
OTHER_TYPES = [np.float64, np.int8, np.int32, np.int64, np.uint16, np.uint8, np.float32, np.float16, np.bool_]


def mutate(rng: np.random.Generator, arrays: Arrays, attributes: dict[str, Any]) -> None:
    """Change one thing."""
    name = str(rng.choice(list(arrays)))
    array = arrays[name]
    match int(rng.integers(9)):
        case 0:  # the end is missing, or something follows
            arrays[name] = (
                array[: rng.integers(array.size + 1)] if rng.random() < 0.5 else np.resize(array, array.size + 1)
            )
        case 1:  # one number is another
            if array.size:
                arrays[name] = array.copy()
                info = np.iinfo(array.dtype) if array.dtype.kind == "u" else None
                arrays[name][rng.integers(array.size)] = rng.integers(info.max + 1) if info else 0
        case 2:  # off by one
            if array.size and array.dtype.kind == "u":
                arrays[name] = array.copy()
                arrays[name][rng.integers(array.size), None] += array.dtype.type(
                    rng.choice([1, np.iinfo(array.dtype).max])
                )
        case 3:  # a column moves from one row to another
            counts = arrays["counts"] = arrays["counts"].copy()
            if counts.size:
                counts[rng.integers(counts.size), None] += np.uint16(1)
                counts[rng.integers(counts.size), None] -= np.uint16(1)
        case 4:  # two numbers change places
            if array.size:
                arrays[name] = array.copy()
                one, other = rng.integers(array.size, size=2)
                arrays[name][[one, other]] = arrays[name][[other, one]]
        case 5:
            arrays[name] = array.astype(rng.choice(OTHER_TYPES))
        case 6:
            arrays[name] = array.reshape([(1, -1), (-1, 1), (1, 1, -1)][rng.integers(3)])
        case 7:
            key = str(rng.choice([key for key in attributes if key != "activation"]))
            attributes[key] = int(rng.choice(EXTREMES))
        case 8:  # arrays of noise
            arrays[name] = rng.integers(256, size=array.size).astype(array.dtype)


def small_linear(rng: np.random.Generator, K: int, N: int, group: int, **more: Any) -> Linear:
    panel = group * int(rng.integers(1, 4))
    seed = int(rng.integers(1 << 30))
    return Linear(K, N, int(rng.integers(1, 10)), panel, group, bool(rng.random() < 0.3), seed=seed, **more)


def malformed_linear(rng: np.random.Generator) -> ModelProto:
    """A SparseLinear of valid weights, changed until they are not."""
    group = int(rng.choice([1, 4]))
    linear = small_linear(rng, int(rng.integers(1, 24)), group * int(rng.integers(1, 7)), group)
    arrays, attributes = linear.arrays(), linear.attributes()
    assert is_valid(arrays, attributes)
    while is_valid(arrays, attributes):
        mutate(rng, arrays, attributes)
    return linear_model(arrays, attributes)


def layer_of(arrays: Arrays, attributes: dict[str, Any], second: bool) -> tuple[Arrays, dict[str, Any]]:
    """One layer of a SparseMlp, its parts named as a SparseLinear's."""
    names = MLP_INPUTS[6:11] if second else MLP_INPUTS[1:6]
    own = {name.removeprefix("hidden_"): arrays[name] for name in names if name in arrays}
    return own, {name: attributes[joint] for name, joint in layer_names(second).items()}


def malformed_mlp(rng: np.random.Generator) -> ModelProto:
    """A SparseMlp of two valid layers, of which one is changed until a layer is not."""
    groups = [int(group) for group in rng.choice([1, 4], 2)]
    hidden, N = groups[0] * int(rng.integers(1, 7)), groups[1] * int(rng.integers(1, 7))
    first = small_linear(rng, int(rng.integers(1, 24)), hidden, groups[0], activation=str(rng.choice(ACTIVATIONS)))
    mlp = Mlp(first, small_linear(rng, hidden, N, groups[1], bias=bool(rng.random() < 0.5)))
    arrays, attributes = mlp.arrays(), mlp.attributes()
    second = bool(rng.random() < 0.5)
    while all(is_valid(*layer_of(arrays, attributes, which)) for which in (False, True)):
        own, given = layer_of(arrays, attributes, second)
        mutate(rng, own, given)
        arrays |= {f"hidden_{name}" if second else name: array for name, array in own.items()}
        attributes |= {joint: given[name] for name, joint in layer_names(second).items()}
    return mlp_model(arrays, attributes)


def check_malformed(library: str, count: int) -> None:
    """Every second one is a SparseMlp."""
    rng = np.random.default_rng(7)
    for number in range(count):
        model = malformed_mlp(rng) if number % 2 else malformed_linear(rng)
        (node,) = model.graph.node
        try:
            open_model(model, library, optimise=False)  # saves time: there is one node
        except Exception as error:  # ONNX Runtime's own share no class
            # A wrong type is seen by ONNX Runtime itself, all else by the operator.
            assert f"vlprune.{node.op_type} node '{node.name}'" in str(error) or "Type Error" in str(error), error
        else:
            raise AssertionError(f"number {number} was not refused: {model}")


def main() -> None:
    library, what = sys.argv[1:3]
    if what == "numbers":
        check_numbers(library)
    if what == "malformed":
        check_malformed(library, int(sys.argv[3]))
    for model in sys.argv[3:] if what == "numbers" else []:
        session = open_model(model, library)
        shapes = {value.name: [2 if isinstance(n, str) else n for n in value.shape] for value in session.get_inputs()}
        session.run(None, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    function = ctypes.CDLL(library).vlprune_ops_isa
    function.restype = ctypes.c_char_p
    print("done with", function().decode())


if __name__ == "__main__":
    main()
