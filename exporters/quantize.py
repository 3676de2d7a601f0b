"""Write graphs in int8 by ONNX Runtime's tools: the weights of matrix products, per output channel, zeros stay zeros.

Dynamic: what the weights are multiplied with is quantised in each run, by what it is. Static: by what it was on real
inputs, as QuantizeLinear and DequantizeLinear before the products (QDQ), which every provider understands. Products of
two computed values (in attentions), convolutions, and tables of embeddings stay in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlprune.exporters.pack import load
from vlprune.exporters.ranges import Ranges
from vlprune.progress import track
from vlprune.runtime.session import refusals


QUANTIZED = "_quantized"  # appended by ONNX Runtime to the name of a weight
NOISE = "/noise"  # ends the names of the outputs that `with_noise` adds


def quantize_task(plain: Path, folder: Path) -> None:
    """Quantise a task's graphs dynamically.

    Args:
        plain: folder of the plain graphs.
        folder: an existing folder for the quantised ones; nothing else of the task is copied.

    Raises:
        RequestError: a plain graph is broken, or ONNX Runtime cannot quantise it.
    """
    files = sorted(plain.glob("*.onnx"))
    for file in track(files, f"Quantising {plain.parent.name} {plain.name}"):
        write_dynamic(load(file), folder / file.name)


def write_dynamic(model: ModelProto, path: Path) -> None:
    """Quantise a graph dynamically and write it.

    Args:
        model: a plain graph; it is changed.
        path: where to.

    Raises:
        RequestError: ONNX Runtime cannot quantise it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _untie(model)
    note = model.metadata_props.add()  # exported graphs are simple already: no advice to simplify them
    note.key, note.value = "onnx.quant.pre_process", "onnxruntime.quant"
    with refusals(f"{path.name} cannot be quantised by ONNX Runtime"):
        # given a path, ONNX Runtime would write a second file beside the first
        quantize_dynamic(model, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)


def static(model: ModelProto, ranges: Ranges, excluded: Collection[str] = ()) -> ModelProto:
    """Quantise a graph statically.

    Args:
        model: a plain graph; it is changed.
        ranges: of its values on real inputs.
        excluded: outputs of the products that stay in fp32.

    Returns:
        ModelProto: the quantised graph; a weight `w` is called `w_quantized`.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData

    _untie(model)
    products = [node for node in constant_products(model) if node.output[0] not in excluded]
    for index, node in enumerate(products):
        node.name = node.name or f"/product/{index}"  # by which the quantiser knows it
    known = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    kinds = ["MatMul", "Gemm"]
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, known),
        nodes_to_quantize=[node.name for node in products] or ["none"],  # an empty list means all
        nodes_to_exclude=[],
        op_types_to_quantize=kinds,
        # What is added to a product (bias, residual) meets it in fp32.
        extra_options={
            "WeightSymmetric": True,
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": kinds,
            "QuantizeBias": False,
        },
    )
    quantizer.quantize_model()
    return quantizer.model.model


def constant_products(model: ModelProto) -> list[NodeProto]:
    """Find the products with a constant weight.

    Args:
        model: a plain graph.

    Returns:
        list[NodeProto]: its MatMul and Gemm nodes whose second factor is an initializer.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = (node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.domain == "")
    return [node for node in nodes if node.input[1] in weights]


def with_noise(model: ModelProto, ranges: Ranges) -> tuple[ModelProto, list[str]]:
    """Let a graph tell how much noise it would make of each product to quantise that product alone.

    Args:
        model: a plain graph; it is changed.
        ranges: of its values on real inputs.

    Returns:
        tuple[ModelProto, list[str]]: the graph with two more outputs per product `y`, `y/noise/error` and
            `y/noise/signal`, the sums of squares of the error and of the product; and the outputs of the products.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = constant_products(model)
    for node in products:
        x, y = node.input[0], node.output[0]
        base = f"{y}{NOISE}"
        weight = numpy_helper.to_array(weights[node.input[1]])
        by_row = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        largest = np.abs(weight).max(1 if by_row else 0, keepdims=True)
        step = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        low, high = ranges[x]
        scale = np.float32(max((high - low) / 255, 1e-12))
        zero = np.uint8(np.clip(np.round(-low / scale), 0, 255))
        tensors = {"weight": np.round(weight / step) * step, "scale": scale, "zero": zero}
        graph.initializer.extend(numpy_helper.from_array(np.asarray(a), f"{base}/{n}") for n, a in tensors.items())
        factors = [f"{base}/{name}" for name in ("scale", "zero")]
        graph.node.append(helper.make_node("QuantizeLinear", [x, *factors], [f"{base}/int8"]))
        graph.node.append(helper.make_node("DequantizeLinear", [f"{base}/int8", *factors], [f"{base}/x"]))
        twin = NodeProto()
        twin.CopyFrom(node)
        twin.name = ""
        twin.input[0], twin.input[1], twin.output[0] = f"{base}/x", f"{base}/weight", f"{base}/y"
        graph.node.append(twin)
        graph.node.append(helper.make_node("Sub", [f"{base}/y", y], [f"{base}/difference"]))
        for value, name in ((f"{base}/difference", "error"), (y, "signal")):
            graph.node.append(helper.make_node("ReduceSumSquare", [value], [f"{base}/{name}"], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(f"{base}/{name}", TensorProto.FLOAT, []))
    return model, [node.output[0] for node in products]


def _untie(model: ModelProto) -> None:
    """Give each Gemm weights of its own.

    ONNX Runtime makes it a MatMul by transposing them in place, whoever else reads them (microsoft/onnxruntime#25890):
    a decoder's last layer shares them with the word embeddings.
    """
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for index, node in enumerate(graph.node):
        if node.op_type == "Gemm" and readers[node.input[1]] > 1 and node.input[1] in weights:
            copy = graph.initializer.add()
            copy.CopyFrom(weights[node.input[1]])
            copy.name = node.input[1] = f"{copy.name}/gemm/{index}"
