"""How large the values inside a graph become on real inputs: what decides about fp16 and int8.

The graphs of a task run on images and texts as `vlprune.exporters.compare` lets them, decoders with their caches, and
each value's smallest and largest element is kept; the values themselves are not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vlprune.data.sets import Data
from vlprune.exporters import pack
from vlprune.exporters.compare import walk
from vlprune.exporters.fusion import light
from vlprune.exporters.pack import load
from vlprune.progress import track
from vlprune.runtime.generate import Arrays
from vlprune.runtime.session import OnnxGraph, open_bytes, refusals, session


SAMPLES = 64  # images, each with a text
BATCH = 4  # images at once; small, because a graph that shows all its values keeps many of them

Ranges = dict[str, tuple[float, float]]  # value -> its smallest and largest element, 0 included


def measure(
    plain: Path, spec: Mapping[str, Any], processor: Any, data: Data, threads: int | None = None
) -> dict[str, Ranges]:
    """Run the plain graphs of a task on real inputs and keep the range of every float value in them.

    Args:
        plain: folder of the graphs.
        spec: its task.json.
        processor: turns images and texts into inputs.
        data: images and texts; at most `SAMPLES` of them are taken, evenly.
        threads: CPU threads, None = all.

    Returns:
        dict[str, Ranges]: graph -> ranges of its inputs, of what its nodes make, and of its float weights.

    Raises:
        RequestError: a graph is broken.
    """
    files = {file.stem: file for file in sorted(plain.glob("*.onnx"))}
    watched = {name: _Watched(load(file), name, threads) for name, file in files.items()}

    def run(name: str, feeds: Arrays) -> Arrays:
        return watched[name](feeds)

    count = min(SAMPLES, data.samples)
    batches = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    label = f"Measuring {plain.parent.name} {plain.name}"
    for _ in track(walk(run, spec, processor, data, batches), label, len(batches)):
        pass
    return {name: graph.ranges for name, graph in watched.items()}


def types_of(model: ModelProto) -> dict[str, int]:
    """Tell the types of the values in a graph.

    Args:
        model: any; what operators of other domains make must be noted in it.

    Returns:
        dict[str, int]: value -> `TensorProto.FLOAT`, INT64 and so on, as far as inference knows it.
    """
    graph = onnx.shape_inference.infer_shapes(light(model)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def open_model(model: ModelProto, threads: int | None = None) -> Any:
    """Open a graph that is in memory, by a file where it is larger than protobuf can write at once.

    Args:
        model: its weights included; where they went to the file, they are changed.
        threads: CPU threads, None = all.

    Returns:
        Any: onnxruntime.InferenceSession.

    Raises:
        RequestError: ONNX Runtime refuses the graph.
    """
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= pack.LIMIT:
        return open_bytes(model.SerializeToString(), threads=threads)
    with tempfile.TemporaryDirectory() as folder:  # the session holds on to the files that it has mapped
        path = Path(folder) / "graph.onnx"
        pack.save(model, path)
        return session(path, threads=threads)


class _Watched:
    """A graph that also tells the range of every float value.

    Args:
        model: the plain graph; is changed.
        name: of the graph.
        threads: CPU threads.
    """

    def __init__(self, model: ModelProto, name: str, threads: int | None) -> None:
        self.ranges: Ranges = {}
        types = types_of(model)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        for key, tensor in weights.items():
            if tensor.data_type == TensorProto.FLOAT:
                self._widen(key, numpy_helper.to_array(tensor))
        graph = model.graph
        self._results = [value.name for value in graph.output]
        made = [value.name for value in graph.input] + [value for node in graph.node for value in node.output]
        self._watched = [value for value in made if value and types.get(value) == TensorProto.FLOAT]
        flat, none = "/range/flat", "/range/none"  # a cache may be empty, and of nothing there is no largest
        graph.initializer.append(numpy_helper.from_array(np.array([-1]), flat))
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), none))
        for index, value in enumerate(self._watched):
            names = [f"/range/{index}/{part}" for part in ("flat", "all", "low", "high")]
            graph.node.append(helper.make_node("Reshape", [value, flat], names[:1]))
            graph.node.append(helper.make_node("Concat", [names[0], none], names[1:2], axis=0))
            graph.node.append(helper.make_node("ReduceMin", names[1:2], names[2:3], keepdims=0))
            graph.node.append(helper.make_node("ReduceMax", names[1:2], names[3:4], keepdims=0))
            graph.output.extend(helper.make_tensor_value_info(part, TensorProto.FLOAT, []) for part in names[2:])
        with refusals(f"graph {name} cannot be measured"):
            self._graph = OnnxGraph(open_model(model, threads), name)

    def __call__(self, feeds: Arrays) -> Arrays:
        outputs = self._graph(feeds)
        for index, value in enumerate(self._watched):
            self._widen(value, outputs[f"/range/{index}/low"], outputs[f"/range/{index}/high"])
        return {name: outputs[name] for name in self._results}

    def _widen(self, name: str, *arrays: np.ndarray) -> None:
        low, high = self.ranges.get(name, (0.0, 0.0))
        for array in arrays:
            if array.size:
                low, high = float(np.minimum(low, array.min())), float(np.maximum(high, array.max()))  # NaN stays
        self.ranges[name] = (low, high)
