"""Rewrite a plain ONNX graph so that it stores and multiplies only the weights that are left, and back.

`pack` replaces each Linear that is sparse enough by one vlprune.SparseLinear, which takes the LayerNorm before it, the
bias, the activation and the residual with it, and each attention by one vlprune.Attention; everything else stays as it
is. Linears that give the query, key and value of one attention become one node, and so do two of which only the second
reads the first (vlprune.SparseMlp). With fp16 values the tables that a Gather reads, word embeddings above all, are
stored as fp16 too, and an output layer that shares its weight with one becomes a vlprune.HalfLinear. `unpack` writes
standard operators again, with the weights under their names: exactly those packed as fp32, the rounded ones of fp16.

Only onnx and numpy are imported here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from vlprune.errors import RequestError
from vlprune.exporters.fusion import Attention, Linear, Nodes, attributes, reads
from vlprune.exporters.layout import Arrays, beyond_half, choose, decode, encode
from vlprune.exporters.simplify import TRANSPOSED
from vlprune.runtime.operators import DOMAIN


__all__ = ["THRESHOLDS", "decode", "encode", "is_packed", "load", "pack", "resolve_target", "save", "unpack"]

# Share of zeros from which a packed Linear counts as faster than a dense one, per instruction set. Measured for AVX-512
# from 16 tokens on (docs/results/sparse_cpu.md); estimates for the others.
THRESHOLDS = {"avx512": 0.45, "avx2": 0.5, "portable": 0.6}
SMALLEST = 64 * 64  # weights; smaller Linears stay dense, smaller tables fp32
VALUES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")
LIMIT = 2**31 - 2**20  # bytes of weights from which a file's weights go beside it: protobuf ends at 2 GiB
OPSETS = range(13, 24)  # what Softmax, Split and Squeeze are written for
_NOTES = ("packed", "values", "target", "layers")  # keys of a packed file's metadata, after "vlprune."
_INPUTS = ("x", "values", "indices", "rows", "counts", "bias", "residual")
_NORM = {"SparseLinear": 7, "SparseMlp": 12}  # where the inputs norm_scale and norm_bias stand
_SIZES = ("block_columns", "panel_rows", "group_rows")
_ATTRIBUTES = ("in_features", "out_features", *_SIZES)


def pack(
    model: ModelProto, *, values: str = "fp32", target: str = "auto", threshold: float | None = None
) -> tuple[ModelProto, list[dict[str, Any]]]:
    """Pack a plain graph.

    Args:
        model: as vlprune exports it, or alike; not optimised by ONNX Runtime. It is not changed.
        values: how weights are stored, "fp32" or "fp16" (half the size, rounded).
        target: instruction set the thresholds are for, a key of `THRESHOLDS`, "auto" = this machine's.
        threshold: share of zeros from which a Linear is packed, None = the target's of `THRESHOLDS`.

    Returns:
        tuple[ModelProto, list[dict[str, Any]]]: the packed graph, and for every Linear `name`, `shape` [N, K],
            `sparsity`, `packed`, `group_rows`, `bytes` of the weight in the packed file, `dense_bytes`, and the
            `reason` where it stays dense. Linears made one node are one row.

    Raises:
        RequestError: an option is unknown, or the graph is packed already or of an unsuitable opset.
        MachineError: target "auto", and the operator library is not there to tell.
    """
    if values not in VALUES:
        raise RequestError(f"values {values!r} are unknown: fp32 or fp16")
    target = resolve_target(target)
    limit = THRESHOLDS[target] if threshold is None else threshold
    if not 0 <= limit <= 1:
        raise RequestError(f"pack threshold {limit} is no share of zeros: give a number from 0 to 1")
    if is_packed(model):
        raise RequestError("the graph is packed already: give the plain one")
    opset = _opset(model)
    if opset not in OPSETS:
        raise RequestError(f"opset {opset} cannot be packed: export with 17 to 20")
    packer = _Packer(model, values, limit)
    packer.fuse_attentions()
    packer.fuse_linears()
    packer.fuse_mlps()
    packer.fuse_norms()
    if values == "fp16" and packer.packed():
        packer.halve_tables()
    notes = {"packed": "sparse", "values": values, "target": target, "layers": json.dumps(packer.layers)}
    return packer.model(notes), packer.rows


def resolve_target(target: str) -> str:
    """Tell which instruction set "auto" is.

    Args:
        target: "auto", or a key of `THRESHOLDS`.

    Returns:
        str: a key of `THRESHOLDS`.

    Raises:
        RequestError: the target is unknown.
    """
    if target == "auto":
        from vlprune.runtime import operators

        target = operators.isa()
    if target not in THRESHOLDS:
        raise RequestError(f"target {target!r} is unknown: auto, {', '.join(THRESHOLDS)}")
    return target


def is_packed(model: ModelProto) -> bool:
    """Tell whether a graph has packed nodes.

    Args:
        model: any.

    Returns:
        bool: it has.
    """
    return any(node.domain == DOMAIN for node in model.graph.node)


def load(path: Path | str) -> ModelProto:
    """Read an ONNX file with its external data.

    Args:
        path: the file.

    Returns:
        ModelProto: its content.

    Raises:
        RequestError: it is no readable ONNX file.
    """
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's exceptions share no public base class
        raise RequestError(f"{path} is no readable ONNX file ({(str(error).splitlines() or [''])[0]})") from error


def save(model: ModelProto, path: Path) -> int:
    """Write an ONNX file; weights of packed graphs, and weights beyond 2 GiB, go beside it, to `<file>.data`.

    ONNX Runtime copies weights out of an ONNX file, but maps those beside it: SparseLinear then computes from the file.

    Args:
        model: what to write; its weights are where they were written afterwards.
        path: where to.

    Returns:
        int: bytes written.
    """
    beside = is_packed(model) or sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LIMIT
    data = path.with_name(f"{path.name}.data")
    onnx.save_model(model, path, save_as_external_data=beside, location=data.name)
    if not data.exists():
        return path.stat().st_size
    data.chmod(path.stat().st_mode)  # onnx lets nobody else read it
    return path.stat().st_size + data.stat().st_size


# --- packing ----------------------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    """Whether the Linears of one node are packed.

    Attributes:
        linears: one, or query, key, value.
        sparsity: share of zeros.
        dense: why they stay dense; "" = they are packed.
    """

    linears: list[Linear]
    sparsity: float
    dense: str


class _Packer:
    """A graph on its way from plain to packed.

    Args:
        plain: the plain model.
        values: a key of `VALUES`.
        threshold: share of zeros from which a Linear is packed.
    """

    def __init__(self, plain: ModelProto, values: str, threshold: float) -> None:
        self.plain = plain
        self.values = values
        self.threshold = threshold
        self.graph = Nodes(plain)
        self.layers: dict[str, dict[str, Any]] = {}  # node -> what `unpack` needs to know
        self.rows: list[dict[str, Any]] = []
        self.made: list[onnx.TensorProto] = []
        self.attentions: list[tuple[NodeProto, Attention]] = []
        self._encoded: dict[Any, tuple[list[str], dict[str, Any]]] = {}
        self._names = _Names(plain)

    def fuse_attentions(self) -> None:
        """Replace every attention."""
        for node in self.graph:
            found = self.graph.attention(node)
            if found is not None:
                self.graph.replace(found.nodes, self._attention(found, node.name or found.output))
        self.graph.drop_unused()

    def _attention(self, found: Attention, name: str) -> NodeProto:
        inputs = [*found.inputs, "", ""][:3] + [found.bias]
        name = self._names.node(name.rsplit("/", 1)[0] + "/Attention")
        node = _node("Attention", inputs, found.output, name, found.heads, found.scale, found.heads_first)
        self.attentions.append((node, found))
        self.layers[name] = {"width": found.width}
        return node

    def fuse_linears(self) -> None:
        """Replace the Linears that are sparse enough."""
        found = [linear for node in self.graph if (linear := self.graph.linear(node)) is not None]
        together = self._together({linear.output: linear for linear in found})
        done: set[str] = set()
        for linear in found:
            trio = together.get(linear.output)
            if trio is not None:
                choice = self._choose(trio[1])
                if not choice.dense:
                    if linear.output not in done:
                        self._replace_trio(*trio, choice)
                        done.update(other.output for other in trio[1])
                    continue
            self._replace(self._choose([linear]))
        self.graph.drop_unused()

    def fuse_mlps(self) -> None:
        """Join each two packed Linears of which only the second reads the first."""
        for first in list(self.graph):
            if not _is_sparse_linear(first):
                continue
            hidden, makers = first.output[0], self.graph.makers
            if hidden not in makers or makers[hidden] is not first:
                continue  # the second of a pair has gone into it already
            second = self.graph.only_reader(hidden)
            if second is None or not _is_sparse_linear(second):
                continue
            given, after = attributes(first), attributes(second)
            inputs = [[*node.input, "", ""][:7] for node in (first, second)]
            if inputs[0][6] or list(second.input).count(hidden) != 1 or second.input[0] != hidden:
                continue
            if after["activation"] != b"none":
                continue
            name = self._names.node(f"{first.name.removesuffix('/SparseLinear')}/SparseMlp")
            joint = [*inputs[0][:6], *inputs[1][1:]]
            while not joint[-1]:
                joint.pop()
            sizes = {size: given[size] for size in ("in_features", *_SIZES)}
            sizes |= {"hidden_features": given["out_features"], "out_features": after["out_features"]}
            sizes |= {f"hidden_{size}": after[size] for size in _SIZES}
            more = {"domain": DOMAIN, "activation": given["activation"], **sizes}
            node = helper.make_node("SparseMlp", joint, [second.output[0]], name, **more)
            self.graph.replace([first, second], node)
            self.layers[name] = {"linears": [first.name, second.name], "hidden": hidden}

    def fuse_norms(self) -> None:
        """Let packed nodes compute the LayerNorm that only they read."""
        for node in list(self.graph):
            if node.domain != DOMAIN or node.op_type not in _NORM:
                continue
            norm = self.graph.layer_norm(node.input[0])
            alone = list(node.input).count(node.input[0]) == 1 and self.graph.only_reader(node.input[0]) is node
            if norm is None or not alone:
                continue
            new = NodeProto()
            new.CopyFrom(node)
            del new.input[:]
            place = _NORM[node.op_type]
            new.input.extend([norm.input[0], *[*node.input, *[""] * place][1:place], *norm.input[1:3]])
            new.attribute.append(helper.make_attribute("norm_epsilon", attributes(norm).get("epsilon", 1e-5)))
            self.graph.replace([norm, node], new)
            self.layers[node.name]["norm"] = [norm.name, norm.output[0]]

    def packed(self) -> bool:
        """Tell whether anything was replaced."""
        return any(node.domain == DOMAIN for node in self.graph)

    def halve_tables(self) -> None:
        """Store the tables that only Gathers, and Linears tied to them, read as fp16."""
        for name, tensor in list(self.graph.tensors.items()):
            readers = self.graph.readers.get(name, [])
            gathers = [node for node in readers if _is_gather_of(node, name)]
            tied = [node for node in readers if not _is_gather_of(node, name)]
            linears = [linear for node in tied if (linear := self.graph.linear(node)) is not None and linear.as_is]
            if not gathers or len(linears) != len(tied) or name in self.graph.results:
                continue
            if any(linear.weight != name or linear.x == name or linear.factor != 1 for linear in linears):
                continue
            table = self.graph.array(name)
            if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2 or table is None:
                continue
            if table.size < SMALLEST or beyond_half(table):
                continue
            half = self._tensor(table.astype(np.float16), f"{name}/half")
            for node in gathers:
                self._gather_half(node, half, name)
            for linear in linears:
                self._half_linear(linear, half)

    def _gather_half(self, old: NodeProto, half: str, table: str) -> None:
        gather = NodeProto()
        gather.CopyFrom(old)
        gather.name = self._names.node(f"{old.name or old.output[0]}/half")
        gather.input[0] = half
        gather.output[0] = self._names.value(f"{old.output[0]}/half")
        place = self.graph.place(old)
        self.graph.replace([old], gather)
        cast = self._names.node(f"{old.name or old.output[0]}/Cast")
        widen = helper.make_node("Cast", [gather.output[0]], [old.output[0]], cast, to=onnx.TensorProto.FLOAT)
        self.graph.add(widen, place)
        self.layers[gather.name] = {"table": table, "gather": old.name}

    def _half_linear(self, linear: Linear, half: str) -> None:
        outputs, inputs = linear.shape
        bias = [] if linear.bias is None else [self._bias(linear)]
        name = self._names.node(f"{_base(linear.weight)}/HalfLinear")
        sizes = {"in_features": inputs, "out_features": outputs}
        node = helper.make_node("HalfLinear", [linear.x, half, *bias], [linear.output], name, domain=DOMAIN, **sizes)
        self.graph.replace(linear.nodes, node)
        self.layers[name] = {"weights": [_part(linear)], "product": linear.product}
        row = next(row for row in self.rows if row["name"] == _base(linear.weight))
        row |= {"bytes": 2 * outputs * inputs, "reason": "Gather reads the weight, too: stored as fp16"}

    def _together(self, linears: Mapping[str, Linear]) -> dict[str, tuple[int, list[Linear]]]:
        """Find the Linears that give query, key and value of one attention from the same input."""
        found: dict[str, tuple[int, list[Linear]]] = {}
        for index, (node, attention) in enumerate(self.attentions):
            trio = [linears[name] for name in attention.inputs if name in linears]
            alone = all(self.graph.only_reader(linear.output) is node for linear in trio)
            outputs = {linear.output for linear in trio}
            same = len({(linear.x, linear.product) for linear in trio}) == 1
            if len(outputs) == 3 and alone and same and not attention.heads_first:
                found |= dict.fromkeys(outputs, (index, trio))
        return found

    def _choose(self, linears: list[Linear]) -> _Choice:
        weights = [self.graph.array(linear.weight) for linear in linears]
        total = sum(math.prod(linear.shape) for linear in linears)
        zeros = total - sum(int(np.count_nonzero(weight)) for weight in weights if weight is not None)
        choice = _Choice(linears, zeros / total, "")
        others = {kind for linear in linears if (kind := self._other_reader(linear.weight))}
        outputs, inputs = linears[0].shape
        if others:
            choice.dense = f"{min(others)} reads the weight, too"
        elif total < SMALLEST:
            choice.dense = f"it is small: {outputs} x {inputs}"
        elif choice.sparsity < self.threshold:
            choice.dense = f"{choice.sparsity:.1%} of its weights are zero, below {self.threshold:.0%}"
        elif self.values == "fp16" and any(beyond_half(weight) for weight in weights if weight is not None):
            choice.dense = "a weight is beyond the range of fp16"
        return choice

    def _other_reader(self, weight: str) -> str:
        """Name an operator, other than the products of Linears, that reads a weight."""
        if weight in self.graph.results:
            return "the graph's result"
        for node in self.graph.readers.get(weight, []):
            linear = self.graph.linear(node)
            if linear is None or linear.weight != weight or linear.x == weight:
                return str(node.op_type)
        return ""

    def _replace_trio(self, index: int, linears: list[Linear], choice: _Choice) -> None:
        """Let one node compute q|k|v."""
        old, attention = self.attentions[index]
        biases = [linear.bias for linear in linears]
        bias = None
        if any(part is not None for part in biases):
            pairs = zip(biases, linears, strict=True)
            bias = np.concatenate([np.zeros(n.shape[0], np.float32) if b is None else b for b, n in pairs])
        joint = self._names.value(f"{attention.output}/qkv")
        leading = (self.graph.dims.get(linears[0].output) or [])[:-1]
        self.graph.dims[joint] = [*leading, sum(linear.shape[0] for linear in linears)] if leading else []
        nodes = [node for linear in linears for node in linear.nodes]
        tensor = "" if bias is None else self._tensor(bias, f"{attention.output}/qkv/bias")
        new = self._sparse_linear(choice, [tensor], joint, "none")
        self.graph.replace(nodes, new)
        node = NodeProto()
        node.CopyFrom(old)
        del node.input[:]
        node.input.extend([joint, "", "", attention.bias] if attention.bias else [joint])
        self.graph.replace([old], node)
        self.attentions[index] = (node, attention)

    def _replace(self, choice: _Choice) -> None:
        """Let one node compute a Linear and what follows it; or leave it dense."""
        linear = choice.linears[0]
        if choice.dense:
            self._add_row(choice, None)
            return
        output, nodes, activation, residual = linear.output, list(linear.nodes), "none", ""
        if (after := self.graph.activation(output)) is not None:
            activation, output = after[:2]
            nodes += after[2]
        if (added := self.graph.residual(output)) is not None:
            residual, output = added[:2]
            nodes.append(added[2])
        bias = "" if linear.bias is None else self._bias(linear)
        self.graph.replace(nodes, self._sparse_linear(choice, [bias, residual], output, activation))

    def _bias(self, linear: Linear) -> str:
        """Name a Linear's bias as a vector of its own: the graph's, if it is one."""
        assert linear.bias is not None
        stored = {tensor.name: list(tensor.dims) for tensor in self.plain.graph.initializer}
        own = self.graph.array(linear.bias_name)
        same = own is not None and np.array_equal(own, linear.bias)
        reuse = same and stored.get(linear.bias_name) == [linear.shape[0]]
        return linear.bias_name if reuse else self._tensor(linear.bias, f"{_base(linear.weight)}/bias")

    def _sparse_linear(self, choice: _Choice, more: Sequence[str], output: str, activation: str) -> NodeProto:
        linears = choice.linears
        key = tuple((linear.weight, linear.as_is, linear.factor) for linear in linears)
        if key not in self._encoded:
            self._encoded[key] = self._encode(choice)
        names, sizes = self._encoded[key]
        name = self._names.node(f"{'+'.join(_base(linear.weight) for linear in linears)}/SparseLinear")
        inputs = [linears[0].x, *names, *more]
        while not inputs[-1]:
            inputs.pop()
        self.layers[name] = {"weights": [_part(linear) for linear in linears], "product": linears[0].product}
        return helper.make_node("SparseLinear", inputs, [output], name, domain=DOMAIN, **sizes, activation=activation)

    def _encode(self, choice: _Choice) -> tuple[list[str], dict[str, Any]]:
        parts = []
        for linear in choice.linears:
            weight = self.graph.array(linear.weight)
            assert weight is not None
            weight = weight if linear.as_is else weight.T
            parts.append(weight if linear.factor == 1 else weight * np.float32(linear.factor))
        weight = parts[0] if len(parts) == 1 else np.concatenate(parts)
        sizes = choose(weight)
        arrays = encode(np.ascontiguousarray(weight), **sizes, dtype=VALUES[self.values])
        base = "+".join(_base(linear.weight) for linear in choice.linears)
        names = [self._tensor(arrays[name], f"{base}/{name}") for name in _INPUTS[1:5]]
        outputs, inputs = weight.shape
        sizes = {"in_features": inputs, "out_features": outputs, **sizes}
        self._add_row(choice, arrays, sizes["group_rows"])
        return names, sizes

    def _add_row(self, choice: _Choice, arrays: Arrays | None, group: int | None = None) -> None:
        outputs = sum(linear.shape[0] for linear in choice.linears)
        inputs = choice.linears[0].shape[1]
        dense = 4 * outputs * inputs
        row = {
            "name": " + ".join(_base(linear.weight) for linear in choice.linears),
            "shape": [outputs, inputs],
            "sparsity": choice.sparsity,
            "packed": arrays is not None,
            "group_rows": group,
            "bytes": dense if arrays is None else sum(array.nbytes for array in arrays.values()),
            "dense_bytes": dense,
            "reason": choice.dense,
        }
        if row not in self.rows:  # a weight that two Linears share
            self.rows.append(row)

    def _tensor(self, array: np.ndarray, name: str) -> str:
        name = self._names.value(name)
        self.made.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def model(self, notes: Mapping[str, str]) -> ModelProto:
        """Build the packed model."""
        nodes = self.graph.sorted()
        model = _rebuilt(self.plain, nodes, self.made)
        del model.opset_import[:]
        model.opset_import.extend(entry for entry in self.plain.opset_import if entry.domain != DOMAIN)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        known = {value.name for value in [*model.graph.value_info, *model.graph.output]}
        for node in nodes:
            dims = self.graph.dims.get(node.output[0])
            if node.domain == DOMAIN and dims and node.output[0] not in known:
                sizes = [None if isinstance(size, str) and size.startswith("unk__") else size for size in dims]
                info = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, sizes)
                model.graph.value_info.append(info)
        _set_notes(model, notes)
        return model


# --- unpacking --------------------------------------------------------------------------------------------------------


def unpack(model: ModelProto) -> ModelProto:
    """Rebuild the plain graph from a packed one.

    Args:
        model: as `pack` makes it, or any other with its operators. It is not changed.

    Returns:
        ModelProto: the same function in standard operators; weights have the names they had.

    Raises:
        RequestError: the graph is not packed, or what it holds is malformed.
    """
    if not is_packed(model):
        raise RequestError("the graph is not packed: there is nothing to unpack")
    if _opset(model) not in OPSETS:
        raise RequestError(f"opset {_opset(model)} cannot be unpacked: {OPSETS.start} to {OPSETS.stop - 1} can")
    model = _without_mlps(_without_norms(model))
    unpacker = _Unpacker(model)
    nodes: list[NodeProto] = []
    halved = _halved(model)
    gone = {gather.output[0] for gather in halved.values()}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            nodes += unpacker.replace(node)
        elif node.output and node.output[0] in halved:
            nodes.append(unpacker.gather(halved[node.output[0]], node.output[0]))
        elif not node.output or node.output[0] not in gone:
            nodes.append(node)
    plain = _rebuilt(model, nodes, unpacker.made)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del plain.opset_import[:]
    plain.opset_import.extend(kept)
    values = {entry.key: entry.value for entry in model.metadata_props}.get("vlprune.values", "fp32")
    _set_notes(plain, {"rounded": values} if values != "fp32" else {})
    return plain


def _halved(packed: ModelProto) -> dict[str, NodeProto]:
    """Find the Gathers that packing made read a table as fp16: what the Cast behind one makes -> that Gather."""
    layers, tensors = _layers(packed), {tensor.name for tensor in packed.graph.initializer}
    read = Counter(name for node in packed.graph.node for name in reads(node))
    read.update(value.name for value in packed.graph.output)
    gathers = {
        node.output[0]: node
        for node in packed.graph.node
        if node.op_type == "Gather" and not node.domain and "table" in layers.get(node.name, {})
        if len(node.input) == 2 and len(node.output) == 1 and node.input[0] in tensors and read[node.output[0]] == 1
    }
    casts = [node for node in packed.graph.node if node.op_type == "Cast" and not node.domain and len(node.output) == 1]
    return {
        cast.output[0]: gathers[cast.input[0]]
        for cast in casts
        if cast.input and cast.input[0] in gathers and attributes(cast).get("to") == onnx.TensorProto.FLOAT
    }


def _without_norms(packed: ModelProto) -> ModelProto:
    """Write the LayerNorms that packed nodes compute as nodes of their own."""
    layers, names = _layers(packed), _Names(packed)
    model = ModelProto()
    model.CopyFrom(packed)
    del model.graph.node[:]
    for node in packed.graph.node:
        place = _NORM.get(node.op_type, len(node.input)) if node.domain == DOMAIN else len(node.input)
        given = [*node.input[place:], "", ""][:2]
        if any(given):
            epsilon = attributes(node).get("norm_epsilon")
            if not all(given) or not isinstance(epsilon, float) or _opset(packed) < 17:
                raise RequestError(
                    f"the node {node.name} has a norm without scale, bias or epsilon, or before opset 17"
                )
            name, value = layers.get(node.name, {}).get("norm") or [f"{node.name}/norm"] * 2
            inputs, output = [node.input[0], *given], names.value(value)
            norm = helper.make_node("LayerNormalization", inputs, [output], names.node(name), axis=-1, epsilon=epsilon)
            rest = [output, *node.input[1:place]]
            node = _with_inputs(node, rest)
            model.graph.node.append(norm)
        model.graph.node.append(node)
    return model


def _with_inputs(node: NodeProto, inputs: Sequence[str]) -> NodeProto:
    """Copy a packed node with other inputs, and without a norm."""
    new = NodeProto()
    new.CopyFrom(node)
    del new.input[:], new.attribute[:]
    new.input.extend(inputs)
    new.attribute.extend(attribute for attribute in node.attribute if attribute.name != "norm_epsilon")
    return new


def _without_mlps(packed: ModelProto) -> ModelProto:
    """Write every SparseMlp as the two SparseLinears it was made of."""
    if not any(node.domain == DOMAIN and node.op_type == "SparseMlp" for node in packed.graph.node):
        return packed
    layers, names = _layers(packed), _Names(packed)
    model = ModelProto()
    model.CopyFrom(packed)
    del model.graph.node[:]
    for node in packed.graph.node:
        if node.domain != DOMAIN or node.op_type != "SparseMlp":
            model.graph.node.append(node)
            continue
        given, inputs = attributes(node), [*node.input, *[""] * 12][:12]
        activation = given.get("activation", b"none")
        wanted = ("in_features", "hidden_features", "out_features", *_SIZES, *(f"hidden_{size}" for size in _SIZES))
        if any(not isinstance(given.get(name), int) for name in wanted) or not isinstance(activation, bytes):
            raise RequestError(f"the node {node.name} lacks an attribute of {', '.join(wanted)}")
        if len(node.output) != 1:
            raise RequestError(f"the node {node.name} has {len(node.output)} outputs instead of one")
        layer = layers.get(node.name, {})
        linears = layer.get("linears") or [f"{node.name}/{part}" for part in ("first", "second")]
        hidden = names.value(layer.get("hidden") or f"{node.name}/hidden")
        sizes = {size: given[size] for size in _SIZES}
        first = {"in_features": given["in_features"], "out_features": given["hidden_features"], **sizes}
        sizes = {size: given[f"hidden_{size}"] for size in _SIZES}
        second = {"in_features": given["hidden_features"], "out_features": given["out_features"], **sizes}
        model.graph.node.append(_linear_node(inputs[:6], hidden, linears[0], activation, first))
        second_inputs = [hidden, *inputs[6:]]
        model.graph.node.append(_linear_node(second_inputs, node.output[0], linears[1], b"none", second))
    return model


def _linear_node(inputs: Sequence[str], output: str, name: str, activation: Any, sizes: Mapping[str, int]) -> NodeProto:
    inputs = list(inputs)
    while inputs and not inputs[-1]:
        inputs.pop()
    return helper.make_node("SparseLinear", inputs, [output], name, domain=DOMAIN, activation=activation, **sizes)


class _Unpacker:
    """Writes standard operators for packed ones.

    Args:
        packed: the packed model.
    """

    def __init__(self, packed: ModelProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
        self.layers = _layers(packed)
        self.made: list[onnx.TensorProto] = []
        self.parts: dict[str, list[str]] = {}  # q|k|v -> q, k, v
        self._names = _Names(packed)
        self._weights: dict[Any, str] = {}
        self._constants: dict[Any, str] = {}
        self._read_whole = {value.name for value in packed.graph.output}
        for node in packed.graph.node:
            joint = node.domain == DOMAIN and node.op_type == "Attention"
            self._read_whole.update(node.input[1:] if joint and not any(node.input[1:3]) else node.input)

    def replace(self, node: NodeProto) -> list[NodeProto]:
        """Give the nodes that compute what one packed node does."""
        replacements = {
            "Attention": self._attention, "SparseLinear": self._sparse_linear, "HalfLinear": self._half_linear
        }  # fmt: skip
        if node.op_type not in replacements or len(node.output) != 1:
            raise RequestError(f"the node {node.name} is no operator of vlprune known here: {node.op_type}")
        builder = _Builder(self._names, node.name or node.output[0], self._constant)
        replacements[node.op_type](node, builder)
        return builder.nodes

    def gather(self, half: NodeProto, output: str) -> NodeProto:
        """Give the node that reads a table as fp32 instead of as fp16."""
        layer = self.layers[half.name]
        table = self._widened(half.input[0], layer["table"])
        name = self._names.node(layer.get("gather") or half.name.removesuffix("/half"))
        options = {"axis": attributes(half).get("axis", 0)}
        return helper.make_node("Gather", [table, half.input[1]], [output], name, **options)

    def _widened(self, half: str, name: str) -> str:
        if half not in self._weights:
            self._weights[half] = self._tensor(self._array(half).astype(np.float32), name)
        return self._weights[half]

    def _half_linear(self, node: NodeProto, builder: _Builder) -> None:
        given, (x, half, bias) = attributes(node), [*node.input, "", ""][:3]
        sizes = [given.get(name) for name in ("out_features", "in_features")]
        if half not in self.tensors or (bias and bias not in self.tensors):
            raise RequestError(f"the node {node.name} has weights that are no constants")
        if list(self.tensors[half].dims) != sizes or (bias and list(self.tensors[bias].dims) != sizes[:1]):
            raise RequestError(f"the node {node.name} has weights of other sizes than its attributes {sizes}")
        layer = self.layers.get(node.name, {})
        part = (layer.get("weights") or [{}])[0]
        weight = self._widened(half, part.get("name") or f"{half}/wide")
        if bias and part.get("bias", bias) != bias:
            bias = self._tensor(self._array(bias), part["bias"] or f"{weight}/bias")
        gemm = layer.get("product") == "Gemm"
        if not gemm:
            weight = builder("Transpose", [weight], perm=[1, 0])
        builder.name_last(self._product(builder, x, weight, bias, gemm, True), node.output[0])

    def _sparse_linear(self, node: NodeProto, builder: _Builder) -> None:
        inputs = dict(zip(_INPUTS, node.input, strict=False))
        given = attributes(node)
        activation = given.get("activation", b"none")
        if any(not isinstance(given.get(name), int) for name in _ATTRIBUTES) or not isinstance(activation, bytes):
            raise RequestError(f"the node {node.name} lacks an attribute of {', '.join(_ATTRIBUTES)}")
        if activation.decode("utf-8", "replace") not in ACTIVATIONS:
            raise RequestError(f"the node {node.name} has the unknown activation {activation!r}")
        names, bias = node.input[1:5], inputs.get("bias", "")
        missing = [name for name in (*names, bias) if name and name not in self.tensors]
        if len(names) < 4 or "" in names or missing:
            raise RequestError(f"the node {node.name} has weights that are no constants")
        outputs = int(given["out_features"])
        biases = self._array(bias) if bias else None
        if biases is not None and biases.shape != (outputs,):
            raise RequestError(f"the node {node.name} has a bias of {list(biases.shape)}, not [{outputs}]")
        layer = self.layers.get(node.name, {})
        parts = layer.get("weights") or [{"name": f"{node.name}.weight{TRANSPOSED}", "rows": outputs}]
        if sum(part["rows"] for part in parts) != outputs:
            raise RequestError(f"the metadata of the node {node.name} do not fit its {outputs} rows")
        gemm = layer.get("product") == "Gemm"
        key = (*names, *(given[name] for name in _ATTRIBUTES))
        results, start = [], 0
        for part in parts:
            rows = slice(start, start + part["rows"])
            start = rows.stop
            whole = len(parts) == 1
            as_is = gemm and bool(part.get("as_is"))
            name = self._weight((*key, rows.start, as_is), part, rows, given, names, as_is)
            part_bias = bias
            if biases is not None and not whole and not part.get("bias") and not biases[rows].any():
                part_bias = ""  # one of q, k, v had none
            elif biases is not None and (not whole or part.get("bias", bias) != bias):
                part_bias = self._tensor(biases[rows], part.get("bias") or f"{name}/bias")
            results.append(self._product(builder, inputs["x"], name, part_bias, gemm, as_is))
        residual = inputs.get("residual", "")
        if len(results) > 1 and activation == b"none" and not residual:
            self.parts[node.output[0]] = results
            if node.output[0] not in self._read_whole:
                return
        y = results[0] if len(results) == 1 else builder("Concat", results, axis=-1)
        y = _ACTIVATIONS[activation.decode()](builder, y)
        if residual:
            y = builder("Add", [y, residual])
        builder.name_last(y, node.output[0])

    def _product(self, builder: _Builder, x: str, weight: str, bias: str, gemm: bool, as_is: bool) -> str:
        if gemm:
            return builder("Gemm", [x, weight, bias] if bias else [x, weight], transB=int(as_is))
        product = builder("MatMul", [x, weight])
        return builder("Add", [product, bias]) if bias else product

    def _weight(
        self,
        key: Any,
        part: Mapping[str, Any],
        rows: slice,
        given: Mapping[str, Any],
        names: Sequence[str],
        as_is: bool,
    ) -> str:
        if key not in self._weights:
            sizes = {name: int(given[name]) for name in _ATTRIBUTES}
            values, indices, counted, counts = (self._array(name) for name in names)
            weight = decode(values, indices, counted, counts, **sizes)[rows]
            self._weights[key] = self._tensor(weight if as_is else weight.T, part["name"])
        return self._weights[key]

    def _array(self, name: str) -> np.ndarray:
        try:
            return numpy_helper.to_array(self.tensors[name])
        except Exception as error:  # onnx and numpy raise what they like
            raise RequestError(f"the tensor {name} is malformed ({(str(error).splitlines() or [''])[0]})") from error

    def _tensor(self, array: np.ndarray, name: str) -> str:
        name = self._names.value(name)
        self.made.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _constant(self, value: Any) -> str:
        """A small constant, stored once: a float, or a list of sizes."""
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._tensor(array, f"/constant/unpacked/{len(self._constants)}")
        return self._constants[key]

    def _attention(self, node: NodeProto, builder: _Builder) -> None:
        given = attributes(node)
        heads, scale = given.get("num_heads"), given.get("scale")
        if not isinstance(heads, int) or heads < 1 or not isinstance(scale, float):
            raise RequestError(f"the node {node.name} lacks the attributes num_heads and scale")
        width = self.layers.get(node.name, {}).get("width", -1)
        q, k, v, bias = [*node.input, "", "", ""][:4]
        sizes, first = [0, 0, heads, width], bool(given.get("kv_heads_first", 0))
        if bool(k) != bool(v) or (first and not k):
            raise RequestError(f"the node {node.name} has a key without a value, or the reverse")
        if not k and q in self.parts and len(self.parts[q]) == 3:
            q, k, v = self.parts[q]
        if k:
            q = builder("Transpose", [builder("Reshape", [q, sizes])], perm=[0, 2, 1, 3])
            if not first:
                k = builder("Reshape", [k, sizes])
                v = builder("Transpose", [builder("Reshape", [v, sizes])], perm=[0, 2, 1, 3])
            keys = builder("Transpose", [k], perm=[0, 1, 3, 2] if first else [0, 2, 3, 1])
        else:
            split = builder("Transpose", [builder("Reshape", [q, [0, 0, 3, heads, width]])], perm=[2, 0, 3, 1, 4])
            parts = builder.many("Split", [split, [1, 1, 1]], 3, axis=0)
            q, k, v = (builder("Squeeze", [part, [0]]) for part in parts)
            keys = builder("Transpose", [k], perm=[0, 1, 3, 2])
        scores = builder("MatMul", [builder("Mul", [q, float(scale)]), keys])
        if bias:
            scores = builder("Add", [scores, bias])
        context = builder("MatMul", [builder("Softmax", [scores], axis=-1), v])
        merged = [0, 0, heads * width if width > 0 else -1]
        y = builder("Reshape", [builder("Transpose", [context], perm=[0, 2, 1, 3]), merged])
        builder.name_last(y, node.output[0])


@dataclass
class _Builder:
    """Makes the nodes that replace one.

    Attributes:
        names: of the whole graph.
        base: begins the names of values and nodes.
        constant: makes constants.
        nodes: made so far.
    """

    names: _Names
    base: str
    constant: Any
    nodes: list[NodeProto] = field(default_factory=list)

    def __call__(self, kind: str, inputs: Sequence[Any], **options: Any) -> str:
        """Add a node with one output; numbers and lists among the inputs become constants."""
        return self.many(kind, inputs, 1, **options)[0]

    def many(self, kind: str, inputs: Sequence[Any], outputs: int, **options: Any) -> list[str]:
        """Add a node with several outputs."""
        read = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        base = self.base.removesuffix("/SparseLinear").removesuffix("/Attention")
        made = [self.names.value(f"{base}/{kind}") for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, read, made, self.names.node(f"{base}/{kind}"), **options))
        return made

    def name_last(self, name: str, wanted: str) -> None:
        """Give the last node's output the name the graph knows."""
        if self.nodes[-1].output[0] != name:
            raise AssertionError("the value is not the last one made")
        self.nodes[-1].output[0] = wanted


def _gelu(builder: _Builder, x: str) -> str:
    curve = builder("Add", [builder("Erf", [builder("Div", [x, math.sqrt(2)])]), 1.0])
    return builder("Mul", [builder("Mul", [x, curve]), 0.5])


def _gelu_tanh(builder: _Builder, x: str) -> str:
    cube = builder("Mul", [builder("Mul", [x, builder("Mul", [x, x])]), 0.044715])
    curve = builder("Tanh", [builder("Mul", [builder("Add", [x, cube]), math.sqrt(2 / math.pi)])])
    return builder("Mul", [builder("Mul", [x, builder("Add", [curve, 1.0])]), 0.5])


def _quick_gelu(builder: _Builder, x: str) -> str:
    return builder("Mul", [x, builder("Sigmoid", [builder("Mul", [x, 1.702])])])


_ACTIVATIONS = {
    "none": lambda builder, x: x,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": lambda builder, x: builder("Relu", [x]),
}


def _layers(model: ModelProto) -> dict[str, dict[str, Any]]:
    """Read what a packed file tells of its nodes."""
    text = {entry.key: entry.value for entry in model.metadata_props}.get("vlprune.layers", "{}")
    try:
        layers = json.loads(text)
        for layer in layers.values():
            for part in layer.get("weights", []):
                if not isinstance(part["name"], str) or not part["name"] or type(part["rows"]) is not int:
                    raise ValueError("a weight without name or rows")
                if part["rows"] < 1 or not isinstance(part.get("bias"), str | None):
                    raise ValueError("a weight without rows, or with a bias that is no name")
            linears, hidden = layer.get("linears", ["", ""]), layer.get("hidden", "")
            if type(linears) is not list or [type(name) for name in [*linears, hidden]] != [str] * 3:
                raise ValueError("two layers in one without two names")
            norm = layer.get("norm", ["", ""])
            if type(norm) is not list or [type(name) for name in norm] != [str] * 2 or "norm" in layer and not norm[1]:
                raise ValueError("a norm without two names")
            if any(type(layer.get(name, "")) is not str for name in ("table", "gather")) or layer.get("table") == "":
                raise ValueError("a table without a name")
            if type(layer.get("width", 1)) is not int or layer.get("width", 1) < 1:
                raise ValueError("heads without width")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError(f"the metadata of the packed graph are malformed ({error}): pack it again") from error
    return dict(layers)


# --- both -------------------------------------------------------------------------------------------------------------


class _Names:
    """Names that a graph does not have yet.

    Args:
        model: whose names are taken.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.values = {value.name for value in [*graph.input, *graph.output, *graph.value_info]}
        self.values |= {tensor.name for tensor in graph.initializer}
        self.values |= {name for node in graph.node for name in [*node.input, *node.output]}
        self.nodes = {node.name for node in graph.node}

    def value(self, wanted: str) -> str:
        """Reserve the name of a value."""
        return _reserve(self.values, wanted)

    def node(self, wanted: str) -> str:
        """Reserve the name of a node."""
        return _reserve(self.nodes, wanted)


def _reserve(taken: set[str], wanted: str) -> str:
    name = next(name for number in count() if (name := f"{wanted}#{number}" if number else wanted) not in taken)
    taken.add(name)
    return name


def _node(
    kind: str, inputs: Sequence[str], output: str, name: str, heads: int, scale: float, heads_first: bool
) -> NodeProto:
    inputs = list(inputs)
    while not inputs[-1]:
        inputs.pop()
    more = {"kv_heads_first": 1} if heads_first else {}
    return helper.make_node(kind, inputs, [output], name, domain=DOMAIN, num_heads=heads, scale=float(scale), **more)


def _rebuilt(model: ModelProto, nodes: Sequence[NodeProto], made: Sequence[onnx.TensorProto]) -> ModelProto:
    """Copy a model with other nodes: only what is still read of its tensors, and new ones."""
    graph, old = onnx.GraphProto(), model.graph
    graph.name, graph.doc_string = old.name, old.doc_string
    graph.node.extend(nodes)
    read = {name for node in nodes for name in reads(node)} | {value.name for value in old.output}
    graph.input.extend(old.input)
    graph.output.extend(old.output)
    graph.initializer.extend(tensor for tensor in old.initializer if tensor.name in read)
    graph.initializer.extend(tensor for tensor in made if tensor.name in read)
    graph.sparse_initializer.extend(old.sparse_initializer)
    there = {name for node in nodes for name in node.output}
    graph.value_info.extend(value for value in old.value_info if value.name in there)
    new = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(new, name, getattr(model, name))
    new.opset_import.extend(model.opset_import)
    new.functions.extend(model.functions)
    new.metadata_props.extend(model.metadata_props)
    return new


def _is_sparse_linear(node: NodeProto) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == "SparseLinear")


def _is_gather_of(node: NodeProto, table: str) -> bool:
    """Whether a node takes rows of a table, and does nothing else with it."""
    alone = node.op_type == "Gather" and not node.domain and list(node.input).count(table) == 1
    return alone and node.input[0] == table and attributes(node).get("axis", 0) == 0


def _part(linear: Linear) -> dict[str, Any]:
    """What `unpack` needs to know of a Linear."""
    return {
        "name": linear.weight + (f"*{linear.factor:g}" if linear.factor != 1 else ""),
        "rows": linear.shape[0],
        "as_is": linear.as_is,
        "bias": linear.bias_name or None,
    }


def _base(weight: str) -> str:
    return weight.removesuffix(TRANSPOSED)


def _opset(model: ModelProto) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _set_notes(model: ModelProto, notes: Mapping[str, str]) -> None:
    kept = {entry.key: entry.value for entry in model.metadata_props}
    for name in _NOTES:
        kept.pop(f"vlprune.{name}", None)
    helper.set_model_props(model, kept | {f"vlprune.{name}": value for name, value in notes.items()})
