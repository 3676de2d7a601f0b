"""Join nodes of a plain graph into ONNX Runtime's own larger operators, which all its GPU and CPU kernels know.

    attention (products, scale, mask, softmax, reshapes) -> MultiHeadAttention
    residual addition, LayerNormalization                -> SkipLayerNormalization
    bias addition, activation                            -> BiasGelu, FastGelu, QuickGelu; Gelu where there is no bias

all of the domain com.microsoft. The patterns are those that packing looks for (`vlprune.exporters.fusion`), since
onnxruntime's optimizer finds no attention in these exports. Dense and compressed graphs are joined alike.

Only onnx and numpy are imported here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlprune.errors import RequestError
from vlprune.exporters.fusion import MICROSOFT, Attention, Linear, Nodes, attributes, rebuild
from vlprune.exporters.ranges import types_of
from vlprune.runtime.operators import DOMAIN


_CURVES = {"gelu": ("Gelu", "BiasGelu"), "gelu_tanh": ("FastGelu", "FastGelu"), "quick_gelu": ("QuickGelu", "")}
_LEFT = {"Softmax": "no attention known here", "Erf": "no GELU known here", "Tanh": "no GELU known here"}


@dataclass
class Fused:
    """A graph with joined nodes.

    Attributes:
        model: the graph.
        taken: operator -> how many of it were made.
        missed: what was looked at and not joined, with the reason.
        inside: output of a joined node -> the values that it computes without showing them.
    """

    model: ModelProto
    taken: dict[str, int] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    inside: dict[str, list[str]] = field(default_factory=dict)


def fuse(model: ModelProto) -> Fused:
    """Join what can be joined.

    Args:
        model: a plain graph, as vlprune exports it; is not changed.

    Returns:
        Fused: the same function, and what became of it.

    Raises:
        RequestError: the graph is packed.
    """
    if any(node.domain == DOMAIN for node in model.graph.node):
        raise RequestError("a packed graph has its own joined nodes: give the plain one")
    fuser = _Fuser(model)
    fuser.join_attentions()
    fuser.join_activations()
    fuser.join_norms()
    return fuser.result()


class _Fuser:
    """A graph on its way.

    Args:
        plain: the plain model.
    """

    def __init__(self, plain: ModelProto) -> None:
        self.plain = plain
        self.graph = Nodes(plain)
        self.types = types_of(plain)
        self.made: dict[str, TensorProto] = {}
        self.missed: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self._repeated: dict[tuple[str, str], str] = {}

    # --- attention -------------------------------------------------------------------------------------------------

    def join_attentions(self) -> None:
        """Replace every attention."""
        for node in self.graph:
            found = self.graph.attention(node)
            if found is not None:
                self._join(found.nodes, self._attention(found, node))
        self.graph.drop_unused()

    def _attention(self, found: Attention, softmax: NodeProto) -> NodeProto:
        place = self.graph.place(softmax)
        inputs = list(found.inputs)
        if len(inputs) == 1:  # q|k|v of all heads side by side; the operator wants them apart
            width = self._constant([found.heads * found.width] * 3)
            inputs = [f"{found.output}/{name}" for name in "qkv"]
            split = helper.make_node("Split", [found.inputs[0], width], inputs, f"{found.output}/split", axis=-1)
            self._add(split, place)
        if found.bias:
            inputs += ["", "", self._bias(found, inputs[0], softmax)]
        return self._node(
            "MultiHeadAttention", inputs, found.output, softmax, num_heads=found.heads, scale=float(found.scale)
        )

    def _bias(self, found: Attention, query: str, softmax: NodeProto) -> str:
        """Repeat a mask that is the same for all queries: the operator does not."""
        bias = found.bias
        rows = (self.graph.dims.get(bias) or [None] * 4)[2]
        if rows != 1:
            return bias
        if (bias, query) not in self._repeated:
            name = self._repeated[bias, query] = f"{found.output}/mask"
            place, one = self.graph.place(softmax), self._constant([1])
            parts = [f"{name}/rows", f"{name}/shape"]
            self._add(helper.make_node("Shape", [query], parts[:1], start=1, end=2), place, TensorProto.INT64)
            self._add(
                helper.make_node("Concat", [one, one, parts[0], one], parts[1:], axis=0), place, TensorProto.INT64
            )
            self._add(helper.make_node("Expand", [bias, parts[1]], [name]), place)
        return self._repeated[bias, query]

    # --- activations -----------------------------------------------------------------------------------------------

    def join_activations(self) -> None:
        """Replace the activations after Linears, with the addition of the bias where there is one."""
        for node in self.graph:
            linear = self.graph.linear(node)
            after = self.graph.activation(linear.output) if linear else None
            if linear is None or after is None or after[0] not in _CURVES:
                continue
            kind, output, nodes = after
            alone, with_bias = _CURVES[kind]
            if with_bias and self._bias_is_vector(linear):
                add = linear.nodes[1]
                inputs = [linear.nodes[0].output[0], linear.bias_name]
                self._join([add, *nodes], self._node(with_bias, inputs, output, add))
            else:
                more = {"alpha": 1.702} if alone == "QuickGelu" else {}
                self._join(nodes, self._node(alone, [linear.output], output, nodes[-1], **more))

    def _bias_is_vector(self, linear: Linear) -> bool:
        tensor = self.graph.tensors.get(linear.bias_name)
        return len(linear.nodes) == 2 and tensor is not None and list(tensor.dims) == [linear.shape[0]]

    # --- norms -----------------------------------------------------------------------------------------------------

    def join_norms(self) -> None:
        """Replace each LayerNorm of a sum by one node, which gives the sum, too, where others read it."""
        for node in list(self.graph):
            if node.op_type != "LayerNormalization" or node.domain not in ("", "ai.onnx"):
                continue
            norm = self.graph.layer_norm(node.output[0])
            add = self.graph.maker(node.input[0], "Add")
            if norm is None or len(self.graph.dims.get(node.input[0]) or []) != 3:
                self.missed.append(f"{node.name}: not over the last axis of three")
            elif add is None:
                self.missed.append(f"{node.name}: no addition before it")
            elif any(name in self.graph.tensors for name in add.input) or not self.graph.same_shape(*add.input):
                self.missed.append(f"{node.name}: what is added has not its shape in every run")
            elif any(reader.op_type == "SkipLayerNormalization" for reader in self.graph.readers[add.output[0]]):
                self.missed.append(f"{node.name}: the sum has a norm already")
            else:
                self._join_norm(node, add)

    def _join_norm(self, norm: NodeProto, add: NodeProto) -> None:
        total = add.output[0]
        inputs, gone = [*add.input, *norm.input[1:3]], [add, norm]
        for index, name in enumerate(add.input):  # the bias of the Linear that was added, the operator adds it, too
            before = self.graph.maker(name, "Add")
            if before is not None and self.graph.only_reader(name) is add and len(inputs) == 4:
                vectors = [value for value in before.input if value in self.graph.tensors]
                rest = [value for value in before.input if value not in self.graph.tensors]
                if vectors and rest and list(self.graph.tensors[vectors[0]].dims) == self.graph.dims[norm.input[1]]:
                    inputs[index] = rest[0]
                    inputs.append(vectors[0])
                    gone.append(before)
        outputs = [norm.output[0]] if self.graph.only_reader(total) else [norm.output[0], "", "", total]
        epsilon = float(attributes(norm).get("epsilon", 1e-5))
        self._join(gone, self._node("SkipLayerNormalization", inputs, outputs, norm, epsilon=epsilon))

    # --- result ----------------------------------------------------------------------------------------------------

    def result(self) -> Fused:
        """Build the model."""
        nodes = self.graph.sorted()
        self.missed += [f"{n.name}: {_LEFT[n.op_type]}" for n in nodes if n.op_type in _LEFT and n.domain == ""]
        model = rebuild(self.plain, nodes, [*self.plain.graph.initializer, *self.made.values()])
        kept = [entry for entry in self.plain.opset_import if entry.domain != MICROSOFT]
        del model.opset_import[:]
        model.opset_import.extend([*kept, helper.make_opsetid(MICROSOFT, 1)])
        for name in (name for node in nodes for name in node.output if name in self.types):
            model.graph.value_info.append(helper.make_tensor_value_info(name, self.types[name], None))
        taken = Counter(node.op_type for node in nodes if node.domain == MICROSOFT)
        return Fused(model, dict(sorted(taken.items())), self.missed, self.inside)

    def _join(self, gone: list[NodeProto], node: NodeProto) -> None:
        outputs = set(node.output)
        self.inside[node.output[0]] = [name for old in gone for name in old.output if name not in outputs]
        self.graph.replace(gone, node)

    def _node(
        self, kind: str, inputs: list[str], outputs: str | list[str], like: NodeProto, **options: object
    ) -> NodeProto:
        outputs = [outputs] if isinstance(outputs, str) else outputs
        name = f"{(like.name or outputs[0]).rsplit('/', 1)[0]}/{kind}"
        return helper.make_node(kind, inputs, outputs, name, domain=MICROSOFT, **options)

    def _add(self, node: NodeProto, place: float, kind: int = TensorProto.FLOAT) -> None:
        self.graph.add(node, place)
        self.types |= dict.fromkeys(node.output, kind)

    def _constant(self, sizes: list[int]) -> str:
        name = f"/constant/fused/{'x'.join(map(str, sizes))}"
        self.made[name] = numpy_helper.from_array(np.array(sizes, np.int64), name)
        return name
