"""What packing looks for in a plain ONNX graph: Linears, the activation and residual after them, and attentions.

A pattern is replaced only when nothing else reads what it computes on the way. Only onnx and numpy are imported here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlprune.errors import RequestError
from vlprune.runtime.operators import DOMAIN


MICROSOFT = "com.microsoft"  # domain of onnxruntime's own operators
SAME_SHAPE = {"Erf", "Gelu", "Identity", "LayerNormalization", "Relu", "Sigmoid", "Tanh"}  # as their first input
_ELEMENTWISE = {"Add", "Div", "Mul", "Pow", "Sub"}
_SMALL = 1024  # elements; of larger tensors shape inference needs no values
_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # of the tanh form of GELU
_QUICK = 1.702

Dims = list[int | str | None]  # None = unknown; equal names mean equal sizes


@dataclass
class Linear:
    """A matrix product with a constant weight, and what belongs to it.

    Attributes:
        x: the value multiplied, [..., K].
        weight: name of the initializer.
        output: name of the result, [..., N].
        nodes: what computes it.
        shape: (N, K).
        as_is: the initializer is [N, K] (Gemm with transB), not [K, N].
        factor: of the product (Gemm's alpha).
        bias: [N].
        bias_name: its initializer.
        product: operator of the product, MatMul or Gemm.
    """

    x: str
    weight: str
    output: str
    nodes: list[NodeProto]
    shape: tuple[int, int]
    as_is: bool = False
    factor: float = 1.0
    bias: np.ndarray | None = None
    bias_name: str = ""
    product: str = "MatMul"


@dataclass
class Attention:
    """softmax(scale q k^T + bias) v over H heads.

    Attributes:
        inputs: q, k, v, or q|k|v alone.
        bias: "" = none.
        output: [B, Tq, H * D].
        heads: H.
        width: D.
        scale: of the scores.
        heads_first: k and v are [B, H, Tk, D].
        nodes: what computes it from the scores on.
    """

    inputs: list[str]
    bias: str
    output: str
    heads: int
    width: int
    scale: float
    heads_first: bool
    nodes: list[NodeProto] = field(default_factory=list)


class Nodes:
    """The nodes of a graph, with who makes and who reads each value.

    Args:
        model: is not changed.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.results = {value.name for value in graph.output}
        given = {value.name for value in graph.input}  # a caller may replace an initializer that is also an input
        self.tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
        self.makers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = {}
        self._places: dict[int, float] = {}
        self._nodes: dict[int, NodeProto] = {}
        self._roots: dict[str, str] = {}  # value -> another of the same leading sizes, see _form
        self.dims = _infer(model)
        for place, node in enumerate(graph.node):
            copy = NodeProto()
            copy.CopyFrom(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.tensors[node.output[0]] = copy.attribute[0].t
            self.add(copy, place)

    def __iter__(self) -> Iterator[NodeProto]:
        return iter(sorted(self._nodes.values(), key=lambda node: self._places[id(node)]))

    def add(self, node: NodeProto, place: float) -> None:
        """Add a node.

        Args:
            node: whose outputs nothing else makes.
            place: the lower, the earlier it runs, as far as its inputs allow.
        """
        self._nodes[id(node)] = node
        self._places[id(node)] = place
        for name in node.output:
            self.makers[name] = node
        for name in reads(node):
            self.readers.setdefault(name, []).append(node)

    def place(self, node: NodeProto) -> float:
        """Tell where a node stands.

        Args:
            node: of this graph.

        Returns:
            float: see `add`.
        """
        return self._places[id(node)]

    def replace(self, nodes: Iterable[NodeProto], node: NodeProto) -> None:
        """Put one node in the place of others.

        Args:
            nodes: at least one.
            node: makes the outputs of theirs that are still read.
        """
        gone = list(nodes)
        place = max(self._places[id(old)] for old in gone)
        for old in gone:
            self._remove(old)
        self.add(node, place)

    def _remove(self, node: NodeProto) -> None:
        del self._nodes[id(node)]
        for name in node.output:
            self.makers.pop(name, None)
        for name in reads(node):
            self.readers[name] = [reader for reader in self.readers[name] if reader is not node]

    def drop_unused(self) -> None:
        """Remove the nodes whose outputs nobody reads."""
        waiting = list(self)
        while waiting:
            node = waiting.pop()
            if id(node) not in self._nodes or any(n in self.results or self.readers.get(n) for n in node.output):
                continue
            before = [self.makers[name] for name in reads(node) if name in self.makers]
            self._remove(node)
            waiting += before

    def sorted(self) -> list[NodeProto]:
        """Give the nodes in an order in which they can run, as near to the original one as that allows.

        Returns:
            list[NodeProto]: all nodes.
        """
        missing = {key: len({n for n in reads(node) if n in self.makers}) for key, node in self._nodes.items()}
        ready = [(self._places[key], key) for key, count in missing.items() if not count]
        heapq.heapify(ready)
        order = []
        while ready:
            _, key = heapq.heappop(ready)
            node = self._nodes[key]
            order.append(node)
            for reader in {id(reader): reader for name in node.output for reader in self.readers.get(name, [])}:
                missing[reader] -= len({n for n in reads(self._nodes[reader]) if n in node.output})
                if not missing[reader]:
                    heapq.heappush(ready, (self._places[reader], reader))
        return order

    def array(self, name: str) -> np.ndarray | None:
        """Give the value of a constant.

        Args:
            name: of any value.

        Returns:
            np.ndarray | None: None where it is no constant.
        """
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def scalar(self, name: str) -> float | None:
        """Give the value of a constant that scales without changing shapes.

        Args:
            name: of any value.

        Returns:
            float | None: None where it is no such constant.
        """
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor.dims) > 1 or math.prod(tensor.dims) != 1:
            return None
        array = numpy_helper.to_array(tensor)
        return float(array.reshape(-1)[0]) if array.dtype.kind == "f" else None

    def only_reader(self, name: str) -> NodeProto | None:
        """Give the one node that reads a value, None where others do or it is a result of the graph.

        Args:
            name: of the value.

        Returns:
            NodeProto | None: the node.
        """
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.results else None

    def maker(self, name: str, *kinds: str) -> NodeProto | None:
        """Give the node that makes a value, if it is of one of some operators.

        Args:
            name: of the value.
            *kinds: operators of ONNX.

        Returns:
            NodeProto | None: the node.
        """
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds and node.domain in ("", "ai.onnx") else None

    # --- shapes ----------------------------------------------------------------------------------------------------

    def same_shape(self, a: str, b: str) -> bool:
        """Tell whether two values are known to have the same shape in every run.

        Args:
            a: a value.
            b: another.

        Returns:
            bool: False where it is not certain.
        """
        known = [self.dims.get(name) for name in (a, b)]
        if known[0] is not None and known[0] == known[1] and None not in known[0]:
            return True
        return self._form(a) == self._form(b)

    def _form(self, name: str) -> tuple[str, int | str]:
        """A value whose leading sizes are this one's, as far up the graph as certain, and the size of the last axis."""
        last = (self.dims.get(name) or [None])[-1]
        path = [name]
        while path[-1] not in self._roots and (before := self._like(path[-1])) is not None:
            path.append(before)
        root = self._roots.get(path[-1], path[-1])
        self._roots.update(dict.fromkeys(path, root))
        return root, f"last of {name}" if last is None else last

    def _like(self, name: str) -> str | None:
        """Name an input of a value's node with the same leading sizes as the value."""
        node = self.makers.get(name)
        if node is None:
            return None
        first = node.input[0] if node.input else ""
        if node.domain in (DOMAIN, MICROSOFT):  # of those that are put in here, see `vlprune.exporters.fuse`
            return first
        if node.op_type == "Split" and attributes(node).get("axis", 0) == -1:
            return first
        if node.op_type == "Softmax" or node.op_type in SAME_SHAPE:
            return first if name == node.output[0] else None
        if node.op_type == "MatMul":
            weight = self.tensors.get(node.input[1])
            return first if weight is not None and len(weight.dims) == 2 else None
        if node.op_type in _ELEMENTWISE:
            a, b = node.input
            if self.scalar(b) is not None or self._vector(b, a):
                return a
            if self.scalar(a) is not None or self._vector(a, b):
                return b
            if self._form(a) == self._form(b):
                return str(a)
        return None

    def _vector(self, name: str, other: str) -> bool:
        """Whether a constant vector is as long as the last axis of another value."""
        tensor, dims = self.tensors.get(name), self.dims.get(other)
        return tensor is not None and dims is not None and len(dims) > 0 and list(tensor.dims) == dims[-1:]

    # --- Linear ----------------------------------------------------------------------------------------------------

    def linear(self, node: NodeProto) -> Linear | None:
        """Read a node as the product of a Linear.

        Args:
            node: any node of the graph.

        Returns:
            Linear | None: None if it is none.
        """
        if node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            return None
        tensor = self.tensors.get(node.input[1])
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT or 0 in tensor.dims:
            return None
        if node.op_type == "MatMul":
            return self._matmul(node, tensor)
        return self._gemm(node, tensor) if node.op_type == "Gemm" else None

    def _matmul(self, node: NodeProto, tensor: TensorProto) -> Linear:
        inputs, outputs = tensor.dims
        found = Linear(node.input[0], node.input[1], node.output[0], [node], (outputs, inputs))
        add = self.only_reader(found.output)
        if add is not None and self._is(add, "Add"):
            other = add.input[1] if add.input[0] == found.output else add.input[0]
            bias = self.array(other)
            rank = len(self.dims.get(found.output) or [0])
            if bias is not None and bias.ndim <= rank and bias.shape[-1:] == (outputs,) and bias.size == outputs:
                found.bias, found.bias_name = bias.reshape(-1), other
                found.output, found.nodes = add.output[0], [node, add]
        return found

    def _gemm(self, node: NodeProto, tensor: TensorProto) -> Linear | None:
        options = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | attributes(node)
        if options["transA"]:
            return None
        as_is = bool(options["transB"])
        outputs, inputs = tensor.dims if as_is else tensor.dims[::-1]
        found = Linear(node.input[0], node.input[1], node.output[0], [node], (outputs, inputs), as_is)
        found.factor, found.product = float(options["alpha"]), "Gemm"
        if len(node.input) > 2 and node.input[2]:
            bias = self.array(node.input[2])
            if bias is None or bias.dtype != np.float32 or any(size != 1 for size in bias.shape[:-1]):
                return None
            found.bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), outputs))
            if options["beta"] != 1:
                found.bias = found.bias * np.float32(options["beta"])
            found.bias_name = node.input[2]
        return found

    # --- what follows a Linear -------------------------------------------------------------------------------------

    def activation(self, value: str) -> tuple[str, str, list[NodeProto]] | None:
        """Find the activation that is applied to a value, and nothing else.

        Args:
            value: the output of a Linear.

        Returns:
            tuple[str, str, list[NodeProto]] | None: gelu, gelu_tanh, quick_gelu or relu; its output; its nodes.
        """
        readers = self.readers.get(value, [])
        if not readers or value in self.results:
            return None
        if len(readers) == 1 and self._is(readers[0], "Relu"):
            return "relu", readers[0].output[0], readers
        if len(readers) == 1 and self._is(readers[0], "Gelu"):
            tanh = attributes(readers[0]).get("approximate", b"none") == b"tanh"
            return "gelu_tanh" if tanh else "gelu", readers[0].output[0], readers
        for end in self._products_after(value):
            nodes: dict[int, NodeProto] = {}
            name = self._activation(end.output[0], value, nodes)
            inside = all(
                self._only_read_by(n, nodes) for node in nodes.values() if node is not end for n in node.output
            )
            if name and inside and self._only_read_by(value, nodes):
                return name, end.output[0], list(nodes.values())
        return None

    def _products_after(self, value: str) -> list[NodeProto]:
        """The multiplications within ten steps of a value."""
        found: dict[int, NodeProto] = {}
        edge = [value]
        for _ in range(10):
            nodes = [node for name in edge for node in self.readers.get(name, []) if id(node) not in found]
            nodes = [node for node in nodes if self._is(node, *_ELEMENTWISE, "Erf", "Tanh", "Sigmoid")]
            found |= {id(node): node for node in nodes}
            edge = [name for node in nodes for name in node.output]
        return [node for node in found.values() if node.op_type == "Mul"]

    def _activation(self, end: str, value: str, nodes: dict[int, NodeProto]) -> str | None:
        """Name the activation of `value` that `end` is, and collect its nodes."""
        factor, factors = self._product(end, value, nodes)
        if sorted(name == value for name in factors) != [False, True]:
            return None
        other = next(name for name in factors if name != value)
        if sigmoid := self._take(other, nodes, "Sigmoid"):
            quick = self._product(sigmoid.input[0], value, nodes)
            return "quick_gelu" if _near(factor, 1) and _near(quick[0], _QUICK) and quick[1] == [value] else None
        curve = self._one_plus(other, nodes)
        if curve is None or not _near(factor, 0.5):
            return None
        if erf := self._take(curve, nodes, "Erf"):
            inner = self._product(erf.input[0], value, nodes)
            return "gelu" if _near(inner[0], _SQRT_HALF) and inner[1] == [value] else None
        if tanh := self._take(curve, nodes, "Tanh"):
            return "gelu_tanh" if self._is_tanh_argument(tanh.input[0], value, nodes) else None
        return None

    def _is_tanh_argument(self, name: str, value: str, nodes: dict[int, NodeProto]) -> bool:
        """Whether a value is sqrt(2 / pi) (x + 0.044715 x^3)."""
        factor, factors = self._product(name, value, nodes)
        if not _near(factor, _TANH_SCALE):
            return False
        rest = [factor for factor in factors if factor != value]
        if len(rest) != 1 or len(factors) > 2:
            return False
        if len(factors) == 2:  # x (1 + 0.044715 x^2)
            square = self._one_plus(rest[0], nodes)
            return square is not None and self._is_power(square, value, 2, nodes)
        add = self._take(rest[0], nodes, "Add")
        if add is None or value not in add.input:
            return False
        cube = add.input[1] if add.input[0] == value else add.input[0]
        return self._is_power(cube, value, 3, nodes)

    def _is_power(self, name: str, value: str, power: int, nodes: dict[int, NodeProto]) -> bool:
        factor, factors = self._product(name, value, nodes)
        return _near(factor, _TANH_CUBE) and factors == [value] * power

    def _product(self, name: str, value: str, nodes: dict[int, NodeProto]) -> tuple[float, list[str]]:
        """Take a product apart: its constant, and its factors; `value` is not looked into."""
        node = None if name == value else self.maker(name, "Mul", "Div", "Pow")
        if node is None:
            constant = self.scalar(name)
            return (1.0, [name]) if constant is None else (constant, [])
        a, b = node.input
        constant = self.scalar(b)
        if node.op_type == "Div" and not constant:
            return 1.0, [name]
        if node.op_type == "Pow" and constant not in (2, 3):
            return 1.0, [name]
        nodes[id(node)] = node
        first = self._product(a, value, nodes)
        if node.op_type == "Div":
            return first[0] / float(constant or 1), first[1]
        if node.op_type == "Pow":
            power = int(constant or 1)
            return first[0] ** power, first[1] * power
        second = self._product(b, value, nodes)
        return first[0] * second[0], first[1] + second[1]

    def _one_plus(self, name: str, nodes: dict[int, NodeProto]) -> str | None:
        """What is added to 1."""
        add = self._take(name, nodes, "Add")
        if add is None:
            return None
        for one, other in (add.input, add.input[::-1]):
            constant = self.scalar(one)
            if constant is not None and _near(constant, 1):
                return str(other)
        return None

    def _take(self, name: str, nodes: dict[int, NodeProto], kind: str) -> NodeProto | None:
        node = self.maker(name, kind)
        if node is not None:
            nodes[id(node)] = node
        return node

    def _only_read_by(self, name: str, nodes: dict[int, NodeProto]) -> bool:
        return name not in self.results and all(id(reader) in nodes for reader in self.readers.get(name, []))

    def layer_norm(self, value: str) -> NodeProto | None:
        """Find the LayerNorm over the last axis that makes a value.

        Args:
            value: any.

        Returns:
            NodeProto | None: with scale and bias that are constant vectors as long as the axis.
        """
        node = self.maker(value, "LayerNormalization")
        if node is None or len(node.input) < 3 or len([name for name in node.output if name]) != 1:
            return None
        dims = self.dims.get(node.input[0]) or [None]
        axis = attributes(node).get("axis", -1)
        vectors = [self.tensors.get(name) for name in node.input[1:3]]
        constant = all(v is not None and v.data_type == TensorProto.FLOAT for v in vectors)
        if not constant or axis not in (-1, len(dims) - 1) or dims[-1] is None:
            return None
        return node if all(list(v.dims) == dims[-1:] for v in vectors if v is not None) else None

    def residual(self, value: str) -> tuple[str, str, NodeProto] | None:
        """Find what is added to a value of the same shape.

        Args:
            value: what nothing but the addition reads.

        Returns:
            tuple[str, str, NodeProto] | None: the other addend, the sum, the addition.
        """
        add = self.only_reader(value)
        if add is None or not self._is(add, "Add"):
            return None
        other = add.input[1] if add.input[0] == value else add.input[0]
        if other in self.tensors or not self.same_shape(value, other):
            return None
        return other, add.output[0], add

    # --- attention -------------------------------------------------------------------------------------------------

    def attention(self, node: NodeProto) -> Attention | None:
        """Read a Softmax as that of an attention.

        Args:
            node: any node of the graph.

        Returns:
            Attention | None: None if it is none.
        """
        if not self._is(node, "Softmax") or attributes(node).get("axis", -1) not in (-1, 3):
            return None
        product = self.only_reader(node.output[0])
        if product is None or not self._is(product, "MatMul") or product.input[0] != node.output[0]:
            return None
        transpose = self.only_reader(product.output[0])
        if transpose is None or not self._is(transpose, "Transpose") or _permutation(transpose) != [0, 2, 1, 3]:
            return None
        merge = self.only_reader(transpose.output[0])
        if merge is None or not self._is(merge, "Reshape"):
            return None
        value = product.input[1]
        after = [node, product, transpose, merge]
        for scores, bias, nodes in self._scores(node.input[0]):
            found = self._heads(scores, bias, value, merge)
            if found is not None:
                found.nodes = [*nodes, *after]
                return found
        return None

    def _scores(self, name: str) -> Iterator[tuple[tuple[NodeProto, float], str, list[NodeProto]]]:
        """Yield the ways to read what softmax gets: (product, factor), bias, nodes."""
        nodes: list[NodeProto] = []
        inner, factor = self._scaled(name, nodes)
        product = self.maker(inner, "MatMul")
        if product is not None and all(self.only_reader(n.output[0]) is not None for n in [product, *nodes]):
            yield (product, factor), "", [product, *nodes]
        add = self.maker(name, "Add")
        if add is None or self.only_reader(name) is None:
            return
        for scores, bias in (add.input, add.input[::-1]):
            nodes = []
            inner, factor = self._scaled(scores, nodes)
            product = self.maker(inner, "MatMul")
            if product is not None and all(self.only_reader(n.output[0]) is not None for n in [product, *nodes]):
                yield (product, factor), bias, [product, *nodes, add]

    def _heads(self, scores: tuple[NodeProto, float], bias: str, value: str, merge: NodeProto) -> Attention | None:
        product, scale = scores
        first, factor = self._scaled(product.input[0])
        keys, key_factor = self._scaled(product.input[1])
        transpose = self.maker(keys, "Transpose")
        if transpose is None:
            return None
        permutation = _permutation(transpose)
        key, inner_factor = self._scaled(transpose.input[0])
        scale *= factor * key_factor * inner_factor
        if not math.isfinite(scale) or (bias and not self._fits(bias, product.output[0])):
            return None
        if permutation == [0, 1, 3, 2] and (packed := self._packed(first, key, value)):
            x, heads, width = packed
            found = Attention([x], bias, merge.output[0], heads, width, scale, False)
            return found if self._merges(merge, first, heads, width) else None
        query = self._split(first)
        if query is None:
            return None
        x, heads, width, query_factor = query
        scale *= query_factor
        if not self._merges(merge, first, heads, width) or not self._same_batch(first, key, value):
            return None
        flat_value = self._split(value)
        flat_key = self._split(key, transposed=permutation == [0, 2, 3, 1]) if permutation in _TO_KEYS else None
        if flat_key and flat_value and flat_key[1:3] == flat_value[1:3] == (heads, width) and flat_value[3] == 1:
            inputs = [x, flat_key[0], flat_value[0]]
            return Attention(inputs, bias, merge.output[0], heads, width, scale * flat_key[3], False)
        shapes = [self.dims.get(name) or [] for name in (key, value)]
        if permutation == [0, 1, 3, 2] and all(len(d) == 4 and [d[1], d[3]] == [heads, width] for d in shapes):
            return Attention([x, key, value], bias, merge.output[0], heads, width, scale, True)
        return None

    def _scaled(self, name: str, nodes: list[NodeProto] | None = None) -> tuple[str, float]:
        """Step over multiplications by constants: the value before, and their product."""
        factor = 1.0
        while (node := self.maker(name, "Mul", "Div")) is not None:
            a, b = node.input
            constant = self.scalar(b)
            if node.op_type == "Div" and constant:
                name, factor = a, factor / constant
            elif node.op_type == "Mul" and constant is not None:
                name, factor = a, factor * constant
            elif node.op_type == "Mul" and (constant := self.scalar(a)) is not None:
                name, factor = b, factor * constant
            else:
                break
            if nodes is not None:
                nodes.append(node)
        return name, factor

    def _split(self, name: str, transposed: bool = False) -> tuple[str, int, int, float] | None:
        """Read [B, H, T, D] as the heads of [B, T, H * D]: that value, H, D, and a factor on the way.

        With `transposed`, `name` is [B, T, H, D] already.
        """
        factor = 1.0
        if not transposed:
            node = self.maker(name, "Transpose")
            if node is None or _permutation(node) != [0, 2, 1, 3]:
                return None
            name, factor = self._scaled(node.input[0])
        node = self.maker(name, "Reshape")
        if node is None:
            return None
        before, after = self.dims.get(node.input[0]) or [], self.dims.get(name) or []
        shape = self._sizes(node)
        if len(before) != 3 or len(after) != 4 or len(shape) != 4:
            return None
        heads, width = after[2:]
        if not isinstance(heads, int) or not isinstance(width, int) or before[2] != heads * width:
            return None
        if not (_keeps(shape[0], before[0]) or _keeps(shape[1], before[1])):  # one kept size fixes the other
            return None
        flat, more = self._scaled(node.input[0])
        return flat, heads, width, factor * more

    def _packed(self, query: str, key: str, value: str) -> tuple[str, int, int] | None:
        """Read q, k, v as the three parts of [B, T, 3 * H * D]: that value, H, D."""
        parts = [self._part(name) for name in (query, key, value)]
        if None in parts or len({part[0] for part in parts if part}) > 1:
            return None
        if [part[1] for part in parts if part] != [0, 1, 2]:
            return None
        transpose = self.maker(parts[0][0] if parts[0] else "", "Transpose")
        if transpose is None or _permutation(transpose) != [2, 0, 3, 1, 4]:
            return None
        reshape = self.maker(transpose.input[0], "Reshape")
        if reshape is None:
            return None
        before, after = self.dims.get(reshape.input[0]) or [], self.dims.get(reshape.output[0]) or []
        shape = self._sizes(reshape)
        if len(before) != 3 or len(after) != 5 or len(shape) != 5:
            return None
        three, heads, width = after[2:]
        if not isinstance(heads, int) or not isinstance(width, int):
            return None
        if three != 3 or before[2] != 3 * heads * width:
            return None
        if not (_keeps(shape[0], before[0]) or _keeps(shape[1], before[1])):
            return None
        return reshape.input[0], heads, width

    def _part(self, name: str) -> tuple[str, int] | None:
        """Read a value as one slice along the first axis: of what, and which."""
        gather = self.maker(name, "Gather")
        if gather is not None:
            index = self.array(gather.input[1])
            if attributes(gather).get("axis", 0) == 0 and index is not None and index.ndim == 0:
                return gather.input[0], int(index)
            return None
        squeeze = self.maker(name, "Squeeze")
        if squeeze is None or len(squeeze.input) < 2 or (axes := self.array(squeeze.input[1])) is None:
            return None
        split = self.maker(squeeze.input[0], "Split")
        if axes.tolist() != [0] or split is None or attributes(split).get("axis", 0) != 0 or len(split.output) != 3:
            return None
        return split.input[0], list(split.output).index(squeeze.input[0])

    def _merges(self, merge: NodeProto, query: str, heads: int, width: int) -> bool:
        """Whether a Reshape joins the heads of [B, T, H, D]."""
        shape, dims = self._sizes(merge), self.dims.get(query) or []  # dims are [B, H, T, D]
        if len(shape) != 3 or len(dims) != 4 or shape[2] not in (heads * width, -1):
            return False
        kept = [_keeps(shape[0], dims[0]), _keeps(shape[1], dims[2])]
        return all(kept) if shape[2] == -1 else any(kept)

    def _fits(self, bias: str, scores: str) -> bool:
        """Whether a bias has four axes, and none that is known to stretch the scores'; the operator checks the rest."""
        dims, full = self.dims.get(bias) or [], self.dims.get(scores) or []
        if len(dims) != 4 or len(full) != 4:
            return False
        return all(a in (1, b) or (not isinstance(a, int) and b != 1) for a, b in zip(dims, full, strict=True))

    def _same_batch(self, *names: str) -> bool:
        """Whether no value is known to be repeated over the batch of another."""
        sizes = {(self.dims.get(name) or [None])[0] for name in names}
        fixed = {size for size in sizes if isinstance(size, int)}
        return len(fixed) < 2 and (1 not in fixed or len(sizes) == 1)

    def _sizes(self, node: NodeProto) -> list[int]:
        """The constant shape that a Reshape gets, [] where it is computed."""
        shape = self.array(node.input[1])
        return [] if shape is None or attributes(node).get("allowzero", 0) else [int(size) for size in shape]

    @staticmethod
    def _is(node: NodeProto, *kinds: str) -> bool:
        return node.op_type in kinds and node.domain in ("", "ai.onnx")


_TO_KEYS = ([0, 1, 3, 2], [0, 2, 3, 1])  # to [B, H, D, T], from [B, H, T, D] and from [B, T, H, D]


def _keeps(size: int, dim: int | str | None) -> bool:
    return size == 0 or (isinstance(dim, int) and size == dim)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


def _permutation(node: NodeProto) -> list[int]:
    return list(attributes(node).get("perm", []))


def attributes(node: NodeProto) -> dict[str, Any]:
    """Give the attributes of a node.

    Args:
        node: any node.

    Returns:
        dict[str, Any]: by name; strings as bytes.

    Raises:
        RequestError: one is of no type.
    """
    try:
        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    except ValueError as error:
        raise RequestError(f"the node {node.name} has a broken attribute ({error}): export it again") from error


def reads(node: NodeProto) -> list[str]:
    """Give the values that a node reads, its subgraphs included.

    Args:
        node: any node.

    Returns:
        list[str]: names, repeated where they are read twice.
    """
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            names += [name for inner in graph.node for name in reads(inner)]
            names += [value.name for value in graph.output]
    return names


def rebuild(model: ModelProto, nodes: Sequence[NodeProto], tensors: Iterable[TensorProto]) -> ModelProto:
    """Copy a model with other nodes and tensors.

    Args:
        model: gives the rest: inputs, outputs, opsets, metadata.
        nodes: in an order in which they can run.
        tensors: initializers; those that nothing reads are left out.

    Returns:
        ModelProto: without notes on its values.
    """
    results = {value.name for value in model.graph.output}
    read = {name for node in nodes for name in reads(node)} | results
    kept = [tensor for tensor in tensors if tensor.name in read]
    graph = helper.make_graph(nodes, model.graph.name, model.graph.input, model.graph.output, kept)
    new = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    new.producer_name, new.producer_version = model.producer_name, model.producer_version
    new.metadata_props.extend(model.metadata_props)
    return new


def _infer(model: ModelProto) -> dict[str, Dims]:
    """Infer the shapes of all values, without copying large weights."""
    bare = light(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except Exception:  # of several classes; without shapes less is fused
        inferred = bare.graph
    dims: dict[str, Dims] = {}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        if value.type.tensor_type.HasField("shape"):
            sizes = value.type.tensor_type.shape.dim
            dims[value.name] = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in sizes]
    return dims | {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def light(model: ModelProto) -> ModelProto:
    """Copy a model without its large weights, which become inputs: enough for the inference of shapes and types.

    Args:
        model: any.

    Returns:
        ModelProto: small.
    """
    graph = model.graph
    given, small = list(graph.input), []
    known = {value.name for value in given}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            small.append(tensor)
        elif tensor.name not in known:
            given.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    shapes = helper.make_graph(graph.node, "shapes", given, graph.output, small, value_info=graph.value_info)
    bare = helper.make_model(shapes, opset_imports=model.opset_import, ir_version=model.ir_version)
    bare.functions.extend(model.functions)
    return bare
