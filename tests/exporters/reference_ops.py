"""What the operators of a packed graph compute, in numpy and slowly: the reference for kernels and packer."""

import math

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from vlprune.exporters.layout import decode


SIZES = ("in_features", "out_features", "block_columns", "panel_rows", "group_rows")
_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(name, x):
    if name == "none":
        return x
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert name == "quick_gelu"
    return x / (1 + np.exp(-1.702 * x))


def layer(x, values, indices, rows, counts, bias, activation, sizes):
    weight = decode(values, indices, rows, counts, **sizes)
    y = x.astype(np.float64) @ weight.T.astype(np.float64)
    if bias is not None:
        assert bias.shape == y.shape[-1:]
        y = y + bias
    return activate(activation, y)


def plus(y, residual):
    if residual is not None:
        assert residual.shape == y.shape
        y = y + residual
    return (y.astype(np.float32),)


def normed(x, scale, bias, given):
    assert (scale is None) == (bias is None)
    if scale is None:
        return x
    x = x.astype(np.float64)
    apart = x - x.mean(-1, keepdims=True)
    return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + given["norm_epsilon"]) * scale + bias


class SparseLinear(OpRun):
    op_domain = "vlprune"

    def _run(self, x, values, indices, rows, counts, *rest, **given):
        bias, residual, scale, shift = [*rest, *[None] * 4][:4]
        x = normed(x, scale, shift, given)
        sizes = {name: given[name] for name in SIZES}
        return plus(layer(x, values, indices, rows, counts, bias, given["activation"], sizes), residual)


class SparseMlp(OpRun):
    op_domain = "vlprune"

    def _run(self, x, *inputs, **given):
        inputs = [*inputs, *[None] * 13][:13]
        x = normed(x, *inputs[11:], given)
        first = {name: given[name] for name in SIZES} | {"out_features": given["hidden_features"]}
        second = {name: given[f"hidden_{name}"] for name in SIZES[2:]}
        second |= {"in_features": given["hidden_features"], "out_features": given["out_features"]}
        hidden = layer(x, *inputs[:5], given["activation"], first)
        return plus(layer(hidden, *inputs[5:10], "none", second), inputs[10])


class HalfLinear(OpRun):
    op_domain = "vlprune"

    def _run(self, x, weight, bias=None, in_features=None, out_features=None):
        assert weight.dtype == np.float16 and weight.shape == (out_features, in_features)
        y = x.astype(np.float64) @ weight.T.astype(np.float64)
        return ((y if bias is None else y + bias).astype(np.float32),)


class Attention(OpRun):
    op_domain = "vlprune"
    op_schema = onnx.defs.OpSchema("Attention", "vlprune", 1)  # else that of ONNX's own Attention is taken

    def _run(self, q, k=None, v=None, bias=None, num_heads=None, scale=None, kv_heads_first=0):
        assert (k is None) == (v is None)
        if k is None:
            q, k, v = np.split(q, 3, axis=-1)
        batch, length, features = q.shape
        width = features // num_heads

        def heads(x):
            return x.reshape(batch, -1, num_heads, width).transpose(0, 2, 1, 3)

        q = heads(q).astype(np.float64)
        k, v = (k, v) if kv_heads_first else (heads(k), heads(v))
        assert k.shape == v.shape == (batch, num_heads, k.shape[2], width)
        scores = scale * (q @ k.transpose(0, 1, 3, 2))
        if bias is not None:
            assert bias.ndim == 4 and all(a in (1, b) for a, b in zip(bias.shape, scores.shape, strict=True))
            scores = scores + bias
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        context = (scores / scores.sum(-1, keepdims=True)) @ v
        return (context.transpose(0, 2, 1, 3).reshape(batch, length, features).astype(np.float32),)


def evaluate(model: onnx.ModelProto, feeds: dict) -> list:
    """Run a packed graph in numpy."""
    return ReferenceEvaluator(model, new_ops=[SparseLinear, SparseMlp, HalfLinear, Attention]).run(None, feeds)
