"""Clean up what torch.onnx writes, so that a file shows the model: its weights under their names, and no bookkeeping.

torch.onnx keeps parameter names only when it folds nothing. Left over are then: weights that a node transposes at run
time, copies of equal tensors, constants computed from constants, and for each reshape a chain of nodes that looks up
sizes. Here the weights of matrix products are stored as the product reads them, [in, out], under the PyTorch name with
".T" appended (the transpose, as in PyTorch); everything that does not depend on the inputs is computed once; a reshape
whose sizes are known or kept gets a constant. Weights are moved, never computed with: zeros stay zeros.

Only onnx and numpy are imported here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from vlprune.errors import RequestError


TRANSPOSED = ".T"  # appended to the name of a weight stored as [in, out]
_CONSTANT = "/constant/"  # names of tensors that are no parameters begin so
_SMALL = 1024  # elements; of larger tensors shape inference needs no values, and equal ones are not looked for
_SIZE_OPERATORS = {"Cast", "Concat", "Equal", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze", "Where"}

Dims = Sequence[str | int]  # sizes of a tensor's axes; a name stands for a size that varies between calls


def parameters(path: Path | str) -> dict[str, tuple[str, bool]]:
    """Tell how an exported file names the parameters of the PyTorch model.

    Args:
        path: a file written by `vlprune.exporters.export`; its external data is not read.

    Returns:
        dict[str, tuple[str, bool]]: PyTorch name -> initializer, and whether that holds the transpose. Of parameters
            that share their memory only one name is listed.

    Raises:
        RequestError: the file is no ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's exceptions share no public base class
        raise RequestError(f"{path} is no readable ONNX file ({str(error).splitlines()[0]})") from error
    names = [tensor.name for tensor in model.graph.initializer if not tensor.name.startswith(_CONSTANT)]
    return {name.removesuffix(TRANSPOSED): (name, name.endswith(TRANSPOSED)) for name in names}


def simplify(model: ModelProto, inputs: Mapping[str, Dims], outputs: Mapping[str, Dims]) -> ModelProto:
    """Rewrite a model as the module says.

    Args:
        model: what torch.onnx wrote without constant folding, opset 15 or later, no subgraphs. It is emptied, to save
            memory.
        inputs: axes of all inputs.
        outputs: axes of all outputs.

    Returns:
        ModelProto: an equivalent model with exactly these axes.
    """
    graph = _Graph(model, inputs, outputs)
    model.Clear()
    before = None
    while before != (before := (len(graph.nodes), len(graph.values))):
        graph.fold_constants()
        graph.fold_sizes()
        graph.share()
        graph.drop_unused()
    graph.multiply_in_place()
    graph.drop_unused()
    return graph.model()


class _Graph:
    """The nodes and the known values of a model, and the rewrites."""

    def __init__(self, model: ModelProto, inputs: Mapping[str, Dims], outputs: Mapping[str, Dims]) -> None:
        self.name = model.graph.name
        self.ir_version = model.ir_version
        self.opsets = list(model.opset_import)
        self.inputs = [_with_axes(value, inputs[value.name]) for value in model.graph.input]
        self.outputs = [_with_axes(value, outputs[value.name]) for value in model.graph.output]
        self.results = {value.name for value in self.outputs}
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.parameters = set(self.values)
        self.nodes = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
        self.numbers = count()

    # --- constants -------------------------------------------------------------------------------------------------

    def fold_constants(self) -> None:
        """Compute every node whose inputs are all known, once and for all."""
        kept: list[NodeProto] = []
        renamed: dict[str, str] = {}
        read_as_is = {
            name for node in self.nodes if node.op_type not in ("Transpose", "Identity") for name in node.input
        }
        for node in self.nodes:
            _rename(node, renamed)
            first, output = (node.input[0] if node.input else ""), node.output[0]
            if node.op_type == "Constant":
                self.values[output] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Identity" and first in self.parameters:
                self.values[output] = self.values[first]  # parameters that happen to be equal each keep their name
                self.parameters.add(output)
            elif node.op_type == "Identity" and output not in self.results:
                renamed[output] = first
            elif any(name and name not in self.values for name in node.input):
                kept.append(node)
            elif node.op_type == "Transpose" and first in self.parameters and self.values[first].ndim == 2:
                if first in read_as_is:
                    kept.append(node)  # see multiply_in_place
                else:
                    renamed[output] = first + TRANSPOSED
                    self.values[first + TRANSPOSED] = self.values[first].T
                    self.parameters.add(first + TRANSPOSED)
            else:
                for name, value in zip(node.output, self._compute(node), strict=True):
                    same = [i for i in node.input if i in self.parameters and _equal(self.values[i], value)]
                    if same:
                        renamed[name] = same[0]
                    else:
                        self.values[name] = value
        self.nodes = kept

    def _compute(self, node: NodeProto) -> list[np.ndarray]:
        from onnx.reference import ReferenceEvaluator

        known = [numpy_helper.from_array(self.values[name], name) for name in dict.fromkeys(node.input) if name]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = helper.make_graph([node], "constant", [], outputs, known)
        computed = ReferenceEvaluator(helper.make_model(graph, opset_imports=self.opsets)).run(None, {})
        return [np.asarray(value) for value in computed]

    # --- sizes -----------------------------------------------------------------------------------------------------

    def fold_sizes(self) -> None:
        """Replace what is computed from sizes by constants, where the sizes are fixed or are an input's own."""
        dims, types = self._infer()
        sizes = _Sizes(self.nodes, self.values, dims)
        kept: list[NodeProto] = []
        renamed: dict[str, str] = {}
        for node in self.nodes:
            _rename(node, renamed)
            output = node.output[0]
            if node.op_type in _SIZE_OPERATORS and types.get(output) == TensorProto.INT64 and len(dims[output]) < 2:
                known = sizes.of(output)
                if known is not None and all(isinstance(size, int) for size in known):
                    self.values[output] = np.array(known, np.int64).reshape([len(known)] * len(dims[output]))
                    continue
            if node.op_type == "Cast" and output not in self.results and types.get(node.input[0]) == types.get(output):
                renamed[output] = node.input[0]
                continue
            if node.op_type == "Reshape" and node.input[1] not in self.values:
                shape = _reshape_to(dims.get(node.input[0]), sizes.of(node.input[1]) or dims.get(output))
                if shape is not None:
                    node.input[1] = self._constant(shape)
            elif node.op_type == "Expand":
                kept += self._expand_shape(node, sizes)
            kept.append(node)
        self.nodes = kept
        self._drop_expanded_divisors()

    def _infer(self) -> tuple[dict[str, Dims], dict[str, int]]:
        """Infer shapes and types of all values; sizes that are no input's get names of their own."""
        given = list(self.inputs)
        small = []
        for name, value in self.values.items():
            if value.size > _SMALL:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                given.append(helper.make_tensor_value_info(name, kind, value.shape))
            else:
                small.append(numpy_helper.from_array(value, name))
        graph = helper.make_graph(self.nodes, "shapes", given, self.outputs, small)
        model = helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        dims: dict[str, Dims] = {}
        types = {}
        for value in [*inferred.input, *inferred.value_info, *inferred.output]:
            tensor = value.type.tensor_type
            if tensor.HasField("shape"):
                types[value.name] = tensor.elem_type
                dims[value.name] = [
                    size.dim_value if size.HasField("dim_value") else size.dim_param or f"{value.name}[{axis}]"
                    for axis, size in enumerate(tensor.shape.dim)
                ]
        for name, value in self.values.items():
            dims[name] = value.shape
            types[name] = helper.np_dtype_to_tensor_dtype(value.dtype)
        return dims, types

    def _expand_shape(self, node: NodeProto, sizes: _Sizes) -> list[NodeProto]:
        """Give an Expand its shape without the nodes by which torch.onnx handles -1 ("keep this size")."""
        where, wanted = sizes.producers.get(node.input[1]), sizes.of(node.input[1])
        if wanted is None or where is None or where.op_type != "Where":
            return []
        pieces: list[str] = []
        made: list[NodeProto] = []
        for size in wanted:
            if isinstance(size, int):
                pieces.append(self._constant([size]))
                continue
            axes = {value.name: list(sizes.dims[value.name]) for value in self.inputs}
            source = next((name for name, names in axes.items() if size in names), None)
            if source is None:
                return []
            axis = axes[source].index(size)
            pieces.append(f"{node.output[0]}/{size}")
            made.append(helper.make_node("Shape", [source], pieces[-1:], start=axis, end=axis + 1))
        node.input[1] = f"{node.output[0]}/shape"
        return [*made, helper.make_node("Concat", pieces, node.input[1:2], axis=0)]

    def _drop_expanded_divisors(self) -> None:
        """Let a division repeat its divisor itself, instead of after the shape of the dividend."""
        producers = {name: node for node in self.nodes for name in node.output}
        none = NodeProto()
        for node in self.nodes:
            expand = producers.get(node.input[1], none) if node.op_type == "Div" else none
            shape = producers.get(expand.input[1], none) if expand.op_type == "Expand" else none
            if shape.op_type == "Shape" and shape.input[0] == node.input[0]:
                node.input[1] = expand.input[0]

    # --- sharing ---------------------------------------------------------------------------------------------------

    def share(self) -> None:
        """Hold equal constants once, and compute equal things once."""
        renamed: dict[str, str] = {}
        constants: dict[Any, str] = {}
        for name, value in self.values.items():
            if name not in self.parameters and value.size <= _SMALL:
                renamed[name] = constants.setdefault((value.dtype.str, value.shape, value.tobytes()), name)
        kept: list[NodeProto] = []
        done: dict[Any, NodeProto] = {}
        for node in self.nodes:
            _rename(node, renamed)
            attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
            same = done.setdefault((node.domain, node.op_type, *node.input, *attributes), node)
            if same is node or self.results & set(node.output):
                kept.append(node)
            else:
                renamed.update(zip(node.output, same.output, strict=True))
        self.nodes = kept

    def drop_unused(self) -> None:
        """Leave out nodes and values that nothing reads."""
        used = set(self.results)
        kept: list[NodeProto] = []
        for node in reversed(self.nodes):
            if used & set(node.output):
                kept.append(node)
                used.update(node.input)
        self.nodes = kept[::-1]
        self.values = {name: value for name, value in self.values.items() if name in used}

    # --- weights that are read both ways ---------------------------------------------------------------------------

    def multiply_in_place(self) -> None:
        """Multiply with the transpose of a matrix that other nodes read as it is, without storing it twice.

        A language model's last layer shares the table of word embeddings: Gather reads it, and, transposed, MatMul.
        Gemm transposes on the fly, but takes rank 2 only.
        """
        readers = Counter(name for node in self.nodes for name in node.input)
        producers = {name: node for node in self.nodes for name in node.output}
        taken: set[str] = set()
        kept: list[NodeProto] = []
        for node, following in zip(self.nodes, [*self.nodes[1:], NodeProto()], strict=True):
            transpose = producers.get(node.input[1]) if node.op_type == "MatMul" else None
            if transpose is None or transpose.op_type != "Transpose" or transpose.input[0] not in self.parameters:
                if node.output[0] not in taken:
                    kept.append(node)
                continue
            x, weight, product = node.input[0], transpose.input[0], node.output[0]
            width, depth = self.values[weight].shape
            factors = [f"{product}/rows", weight]
            if following.op_type == "Add" and product in following.input and readers[product] == 1:
                bias = next((name for name in following.input if name in self.parameters), "")
                if bias and self.values[bias].shape == (width,):
                    factors.append(bias)
                    product = following.output[0]
                    taken.add(product)
            kept += [
                helper.make_node("Reshape", [x, self._constant([-1, depth])], factors[:1]),
                helper.make_node("Gemm", factors, [f"{product}/flat"], name=node.name, transB=1),
                helper.make_node("Shape", [x], [f"{product}/sizes"], end=-1),
                helper.make_node("Concat", [f"{product}/sizes", self._constant([width])], [f"{product}/shape"], axis=0),
                helper.make_node("Reshape", [f"{product}/flat", f"{product}/shape"], [product]),
            ]
        self.nodes = kept

    # --- result ----------------------------------------------------------------------------------------------------

    def _constant(self, sizes: list[int]) -> str:
        name = f"{_CONSTANT}new/{next(self.numbers)}"
        self.values[name] = np.array(sizes, np.int64)
        return name

    def model(self) -> ModelProto:
        """Build the model; the values are given away one by one, to save memory."""
        constants = [name for name in self.values if name not in self.parameters]
        renamed = {name: f"{_CONSTANT}{index}" for index, name in enumerate(constants)}
        for node in self.nodes:
            _rename(node, renamed)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs)
        for name in list(self.values):
            value = np.asarray(self.values.pop(name), order="C")
            graph.initializer.append(numpy_helper.from_array(value, renamed.get(name, name)))
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)


class _Sizes:
    """What is known of vectors computed from sizes: per element a number, or the name of a size."""

    def __init__(self, nodes: Sequence[NodeProto], values: Mapping[str, np.ndarray], dims: Mapping[str, Dims]) -> None:
        self.producers = {name: node for node in nodes for name in node.output}
        self.values = values
        self.dims = dims

    def of(self, name: str) -> list[str | int] | None:
        """Tell the elements of a scalar or vector; None where one is not known."""
        if name in self.values:
            value = self.values[name]
            return [int(element) for element in value.ravel()] if value.dtype.kind in "ib" and value.ndim < 2 else None
        node = self.producers.get(name)
        if node is None or node.op_type not in _SIZE_OPERATORS:
            return None
        if node.op_type == "Shape":
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            dims = self.dims.get(node.input[0])
            return None if dims is None else list(dims[bounds.get("start", 0) : bounds.get("end")])
        inputs = [self.of(input_name) for input_name in node.input]
        known = [elements for elements in inputs if elements is not None]
        return _apply(node.op_type, known) if len(known) == len(inputs) else None


def _apply(operator: str, inputs: list[list[Any]]) -> list[str | int] | None:
    """Compute one of `_SIZE_OPERATORS` on the elements of vectors."""
    first = inputs[0]
    if operator == "Concat":
        return [size for sizes in inputs for size in sizes]
    if operator == "Gather":
        return [first[index] for index in inputs[1]]
    if operator == "Slice":
        return first[inputs[1][0] : inputs[2][0] : inputs[4][0] if len(inputs) > 4 else 1]
    if operator == "Equal":  # torch.onnx compares with -1, and a named size is never negative
        named = [a if isinstance(b, str) else b for a, b in zip(*inputs, strict=True) if str in (type(a), type(b))]
        return [int(a == b) for a, b in zip(*inputs, strict=True)] if all(size == -1 for size in named) else None
    if operator == "Where":
        return [a if condition else b for condition, a, b in zip(*inputs, strict=True)]
    return first  # Cast, Reshape, Squeeze, Unsqueeze


def _reshape_to(before: Dims | None, after: Dims | None) -> list[int] | None:
    """Tell the constant that reshapes `before` to `after`: 0 keeps a size, -1 leaves one size to compute."""
    if before is None or after is None or 0 in after:
        return None
    kept = [axis < len(before) and before[axis] == size for axis, size in enumerate(after)]
    shape = [size if isinstance(size, int) else 0 if keep else -1 for size, keep in zip(after, kept, strict=True)]
    return shape if shape.count(-1) < 2 else None


def _rename(node: NodeProto, renamed: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        while renamed.get(name, name) != name:
            name = renamed[name]
        node.input[index] = name


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _with_axes(value: ValueInfoProto, axes: Dims) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, list(axes))
