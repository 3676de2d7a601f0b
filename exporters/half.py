"""Write a plain graph in fp16, except for what would suffer: LayerNorm, softmax, sums, and what overflows.

A node computes in fp16 if fp16 knows its operator, and if nothing it reads or makes comes near the largest number of
fp16 on real inputs. All others stay in fp32, and values pass between two of them as they are: the converters of
onnxruntime send them through fp16 on the way, where they overflow after all. Inputs and outputs of the graph keep
their types, so that nothing that runs it need change. Zeros stay zeros.

Only onnx and numpy are imported here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlprune.exporters.fusion import attributes, reads, rebuild
from vlprune.exporters.ranges import Ranges, types_of


LIMIT = 65504 / 4  # beyond it a node stays in fp32: other inputs than those measured may be larger
# Operators that compute in fp16 as well as in fp32: they move numbers, or round their result once.
SAFE = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Clip", "Where", "Erf", "Gelu", "Relu", "Sigmoid", "Tanh"),
    *("MatMul", "Gemm", "Conv", "Expand", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze", "Cast", "Shape"),
    *("MultiHeadAttention", "BiasGelu", "FastGelu", "QuickGelu"),  # of com.microsoft, as is another Gelu
}
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def kept_nodes(model: ModelProto, ranges: Ranges, inside: Mapping[str, list[str]] | None = None) -> dict[str, str]:
    """Choose the nodes that stay in fp32.

    Args:
        model: a plain or fused graph.
        ranges: of its values on real inputs.
        inside: first output of a fused node -> the values that it computes without showing them.

    Returns:
        dict[str, str]: first output of each such node -> why it is kept; nodes without floats are no such nodes.
    """
    types = types_of(model)
    found = {}
    for node in model.graph.node:
        values = [name for name in (*reads(node), *node.output) if types.get(name) == FLOAT]
        if not values:
            continue
        hidden = (inside or {}).get(node.output[0], [])
        large = {name: max(-ranges[name][0], ranges[name][1]) for name in (*values, *hidden) if name in ranges}
        worst = max(large, key=lambda name: large[name], default="")
        if node.op_type not in SAFE:
            found[node.output[0]] = f"{node.op_type} loses accuracy in fp16"
        elif worst and not large[worst] <= LIMIT:
            found[node.output[0]] = f"{worst} reaches {large[worst]:.3g}, fp16 ends at 65504"
    return found


def to_half(model: ModelProto, kept: Mapping[str, str]) -> ModelProto:
    """Rewrite a graph.

    Args:
        model: a plain or fused graph; is not changed.
        kept: first outputs of the nodes that stay in fp32.

    Returns:
        ModelProto: with float32 inputs and outputs as before.
    """
    half = _Half(model, {node.output[0] for node in model.graph.node} - kept.keys())
    for node in model.graph.node:
        half.add(node)
    new = rebuild(model, half.nodes, [*half.tensors.values(), *half.copies.values()])
    for name in (name for node in half.nodes for name in node.output if name in half.halves):
        new.graph.value_info.append(helper.make_tensor_value_info(name, HALF, None))  # inference knows only ONNX's own
    return new


def rounding(model: ModelProto) -> ModelProto:
    """Write a graph in fp32 that rounds to fp16 what a graph in fp16 holds as such.

    On a CPU ONNX Runtime computes fp16 nodes in fp32, one after the other without rounding: only this graph shows there
    what a GPU gives, which adds up in fp32 and rounds each result.

    Args:
        model: what `to_half` wrote; is not changed.

    Returns:
        ModelProto: the same inputs and outputs.
    """
    halves = {name for name, kind in types_of(model).items() if kind == HALF}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        new = NodeProto()
        new.CopyFrom(node)
        nodes.append(new)
        for index, name in enumerate(node.output):
            if name not in halves:
                continue
            rounded = f"{name}/rounded"
            if node.op_type == "Cast":
                del new.attribute[:]
                new.attribute.append(helper.make_attribute("to", HALF))
                new.output[index] = rounded
            else:
                new.output[index] = f"{name}/raw"
                nodes.append(helper.make_node("Cast", [f"{name}/raw"], [rounded], to=HALF))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=FLOAT))
    tensors = [
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        if tensor.data_type == HALF
        else tensor
        for tensor in model.graph.initializer
    ]
    return rebuild(model, nodes, tensors)


class _Half:
    """A graph on its way to fp16.

    Args:
        plain: the graph.
        chosen: first outputs of the nodes that compute in fp16, as far as they compute with floats.
    """

    def __init__(self, plain: ModelProto, chosen: set[str]) -> None:
        self.types = types_of(plain)
        self.chosen = chosen
        self.tensors = {tensor.name: tensor for tensor in plain.graph.initializer}
        self.copies: dict[str, TensorProto] = {}  # in fp32, of weights that nodes read in both types
        self.results = {value.name for value in plain.graph.output}
        self.halves: set[str] = set()  # values of fp16
        self.casts: dict[tuple[str, bool], str] = {}  # a value, and whether in fp16 -> its name as such
        self.nodes: list[NodeProto] = []
        read = {name for node in plain.graph.node if node.output[0] in chosen for name in node.input}
        self._originals = {
            name: tensor for name, tensor in self.tensors.items() if name in read and tensor.data_type == FLOAT
        }
        for name, tensor in self._originals.items():
            self.tensors[name] = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)

    def add(self, node: NodeProto) -> None:
        """Add the next node, with the casts that it needs."""
        half = node.output[0] in self.chosen
        new = NodeProto()
        new.CopyFrom(node)
        for index, name in enumerate(node.input):
            if self.types.get(name) == FLOAT:
                new.input[index] = self._read(name, half)
        if node.op_type == "Cast" and half and attributes(node)["to"] == FLOAT:
            del new.attribute[:]
            new.attribute.append(helper.make_attribute("to", HALF))
        self.nodes.append(new)
        for index, name in enumerate(node.output):
            if not half or self.types.get(name) != FLOAT:
                continue
            if name in self.results:
                new.output[index] = self.casts[name, True] = f"{name}/fp16"
                self._cast(new.output[index], name, FLOAT)
            self.halves.add(new.output[index])

    def _read(self, name: str, half: bool) -> str:
        """Name a float value in the type that a node wants."""
        if name in self.tensors:
            if half or name not in self._originals:
                return name
            copy = TensorProto()
            copy.CopyFrom(self._originals[name])
            copy.name = f"{name}/fp32"
            self.copies[name] = copy
            return str(copy.name)
        if (name in self.halves) == half:
            return name
        if (name, half) not in self.casts:
            self.casts[name, half] = f"{name}/{'fp16' if half else 'fp32'}"
            self._cast(name, self.casts[name, half], HALF if half else FLOAT)
        if half:
            self.halves.add(self.casts[name, half])
        return self.casts[name, half]

    def _cast(self, before: str, after: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [before], [after], f"{after}/cast", to=kind))
