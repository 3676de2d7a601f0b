r"""What a graph of a bundle may be: an ONNX file in its plainest form, checked on the wire, without the onnx package.

ONNX can do more than a graph needs: read any file as external data, loop, branch, call functions and operators of
other libraries. A bundle's graph has one flat list of nodes, of operators that are listed here, and tensors that
either hold their bytes or name exactly one tensor of the bundle's weights. Field numbers are those of onnx.proto:

    ModelProto  graph 7, functions 25       NodeProto       op_type 4, attribute 5, domain 7
    GraphProto  node 1, initializer 5       AttributeProto  t 5, g 6, tensors 10, graphs 11
    TensorProto dims 1, data_type 2, name 8, raw_data 9, external_data 13, data_location 14
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ..errors import RequestError
from .limits import WEIGHTS


Wire = tuple[int, int, "int | memoryview"]  # field number, wire type, value

# Standard operators: computation on tensors. No control flow, no functions, no strings, no randomness.
_NAMES = """
Abs Add And ArgMax ArgMin AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum DequantizeLinear
Div DynamicQuantizeLinear Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool Greater GreaterOrEqual HardSigmoid Identity InstanceNormalization LayerNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax MatMul MatMulInteger Max MaxPool Mean Min Mod Mul Neg Not Or Pad Pow QLinearConv
QLinearMatMul QuantizeLinear Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize Round ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt
Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
STANDARD = frozenset(_NAMES.split())
OPERATORS: Mapping[str, frozenset[str]] = {
    "": STANDARD,
    "ai.onnx": STANDARD,
    "vlprune": frozenset({"Attention", "HalfLinear", "SparseLinear", "SparseMlp"}),
    "com.microsoft": frozenset(
        {
            "BiasGelu", "FastGelu", "FusedMatMul", "Gelu", "LayerNormalization", "MultiHeadAttention", "QuickGelu",
            "SkipLayerNormalization", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeMatMul",
            "MatMulIntegerToFloat",
        }
    ),
}  # fmt: skip
# TensorProto.DataType -> bytes of an entry, and its name in a bundle's weights where it may lie there.
TYPES: Mapping[int, tuple[int, str | None]] = {
    1: (4, "float32"), 2: (1, "uint8"), 3: (1, "int8"), 4: (2, "uint16"), 6: (4, "int32"), 7: (8, "int64"),
    9: (1, None), 10: (2, "float16"), 11: (8, None),
}  # fmt: skip
MAX_VALUE = 2**31  # of sizes in constants: the product of a shape beyond this would take the machine's memory
_ENDLESS = 2**62  # "to the end" in a Slice


class _BrokenError(Exception):
    """What is wrong with a graph."""


def check_graph(data: bytes, name: str, tensors: Mapping[tuple[int, int], str]) -> None:
    """Refuse a graph that does more than compute on its inputs and the bundle's weights.

    Args:
        data: a serialised ModelProto.
        name: of the member, for the message.
        tensors: the bundle's: (offset, bytes) -> dtype.

    Raises:
        RequestError: what is wrong, one line.
    """
    try:
        graphs = _model(memoryview(data))
        if not graphs:
            raise _BrokenError("it holds no graph")
        for graph in graphs:
            _graph(graph, tensors)
    except _BrokenError as error:
        raise RequestError(f"{name} of the bundle is refused: {error}; get the bundle again") from error


def _model(data: memoryview) -> list[memoryview]:
    graphs = []
    for number, _, value in _fields(data):
        if number == 7:
            graphs.append(_bytes(value))
        elif number not in (1, 2, 3, 4, 5, 6, 8, 14):
            raise _BrokenError(f"it has functions, training steps, or more of what no bundle has (field {number})")
    return graphs


def _graph(data: memoryview, tensors: Mapping[tuple[int, int], str]) -> None:
    for number, _, value in _fields(data):
        if number == 1:
            _node(_bytes(value), tensors)
        elif number == 5:
            _tensor(_bytes(value), tensors)
        elif number not in (2, 10, 11, 12, 13, 14, 16):
            raise _BrokenError(f"its graph has sparse initializers, or more of what no bundle has (field {number})")


def _node(data: memoryview, tensors: Mapping[tuple[int, int], str]) -> None:
    operator, domain, attributes = "", "", []
    for number, _, value in _fields(data):
        if number == 4:
            operator = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            attributes.append(_bytes(value))
        elif number not in (1, 2, 3, 6, 9):
            raise _BrokenError(f"a node has what no bundle has (field {number})")
    if operator not in OPERATORS.get(domain, ()):
        raise _BrokenError(f"it uses the operator {ascii(f'{domain}::{operator}' if domain else operator)[:100]}")
    for attribute in attributes:
        for number, _, value in _fields(attribute):
            if number in (5, 10):
                _tensor(_bytes(value), {})
            elif number not in (1, 2, 3, 4, 7, 8, 9, 13, 20):
                raise _BrokenError(f"{operator} has a graph inside, or more of what no bundle has (field {number})")


def _tensor(data: memoryview, tensors: Mapping[tuple[int, int], str]) -> None:
    dims: list[int] = []
    kind, raw, outside, location, name, seen = 0, None, [], 0, "", set()
    for number, wire, value in _fields(data):
        if number == 1:
            dims += [_integer(value)] if wire == 0 else list(_varints(_bytes(value)))
            continue
        if number == 13:
            outside.append(_bytes(value))
            continue
        if number in seen or number not in (2, 8, 9, 12, 14):
            raise _BrokenError(f"a tensor holds its values in a way that no bundle has (field {number})")
        seen.add(number)
        if number == 2:
            kind = _integer(value)
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _bytes(value)
        elif number == 14:
            location = _integer(value)
    what = f"tensor {ascii(name)[:100]}"
    if kind not in TYPES:
        raise _BrokenError(f"{what} is of type {kind}, which no bundle has")
    width, dtype = TYPES[kind]
    if len(dims) > 16 or any(not 0 <= size <= 2**40 for size in dims):
        raise _BrokenError(f"{what} claims the shape {dims[:16]}")
    size = math.prod(dims) * width
    if location == 0 and not outside:
        found = 0 if raw is None else len(raw)
        if found != size:
            raise _BrokenError(f"{what} claims {size:,} bytes and holds {found:,}")
        if dtype == "int64" and raw is not None and size <= 128:
            numbers = [abs(number) for number in raw.cast("q")] if size else []
            if math.prod(number for number in numbers if 1 < number < _ENDLESS) > MAX_VALUE:
                raise _BrokenError(f"{what} holds sizes of {numbers}, beyond any memory")
        return
    where = {key: value for entry in outside for key, value in [_entry(entry)]}
    if location != 1 or raw is not None or len(where) != len(outside):
        raise _BrokenError(f"{what} lies inside and outside of the graph at once")
    if where.get("location") != WEIGHTS or where.keys() != {"location", "offset", "length"}:
        raise _BrokenError(f"{what} wants its data from {ascii(where.get('location'))[:100]}, outside of the bundle")
    try:
        place = int(where["offset"]), int(where["length"])
    except ValueError:
        place = (-1, -1)
    if tensors.get(place) != dtype or dtype is None or place[1] != size:
        raise _BrokenError(f"{what} of {size:,} bytes is none of the bundle's weights")


def _entry(data: memoryview) -> tuple[str, str]:
    found = {number: _text(value) for number, _, value in _fields(data)}
    return found.get(1, ""), found.get(2, "")


def _fields(data: memoryview) -> Iterator[Wire]:
    """Cut a message into its fields."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _BrokenError("it is no protobuf")
        if size > len(data) - at:
            raise _BrokenError("it is cut short")
        yield number, wire, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _BrokenError("it is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _BrokenError("it is no protobuf")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _BrokenError("it is no protobuf")
    return value


def _integer(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _BrokenError("it is no protobuf")
    return value


def _text(value: int | memoryview) -> str:
    try:
        return bytes(_bytes(value)).decode()
    except UnicodeDecodeError as error:
        raise _BrokenError("a name in it is no UTF-8") from error
