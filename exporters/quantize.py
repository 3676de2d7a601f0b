"""Write a task's graphs in dynamic int8, as ONNX Runtime quantises them: what packed graphs are held against."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from onnx import ModelProto

from vlprune.exporters.pack import load
from vlprune.progress import track
from vlprune.runtime.session import refusals


def quantize_task(plain: Path, folder: Path) -> None:
    """Quantise the weights of every MatMul and Gemm to int8, per output channel; their inputs are as they come.

    Args:
        plain: folder of a task's plain graphs.
        folder: an existing folder for the quantised ones; nothing else of the task is copied.

    Raises:
        RequestError: a plain graph is broken, or ONNX Runtime cannot quantise it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": QuantType.QInt8}
    files = sorted(plain.glob("*.onnx"))
    for file in track(files, f"Quantising {plain.parent.name} {plain.name}"):
        model = load(file)  # given a path, ONNX Runtime would write a second file beside the first
        _untie(model)
        note = model.metadata_props.add()  # exported graphs are simple already: no advice to simplify them
        note.key, note.value = "onnx.quant.pre_process", "onnxruntime.quant"
        with refusals(f"{file} cannot be quantised by ONNX Runtime"):
            quantize_dynamic(model, folder / file.name, **options)


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
