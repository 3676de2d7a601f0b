"""Write a task's graphs in another precision, or joined, and tell how far that takes each from PyTorch.

fp16 is written by `vlprune.exporters.half`, int8-static and int8-dynamic by `vlprune.exporters.quantize`. Whatever a
graph loses, it is written and the loss reported; only one that gives NaN or infinity is refused. Graphs in fp32 and
fp16 may have their nodes joined (`vlprune.exporters.fuse`): that must change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper

from vlprune.data.sets import Data
from vlprune.exporters.compare import compare, walk
from vlprune.exporters.fuse import Fused
from vlprune.exporters.fuse import fuse as join
from vlprune.exporters.graphs import as_function
from vlprune.exporters.half import kept_nodes, rounding, to_half
from vlprune.exporters.onnx_files import prunable_weights
from vlprune.exporters.pack import load, save
from vlprune.exporters.packed_files import copy_others
from vlprune.exporters.quantize import NOISE, QUANTIZED, static, with_noise, write_dynamic
from vlprune.exporters.ranges import Ranges, open_model
from vlprune.exporters.simplify import TRANSPOSED
from vlprune.files import read_json
from vlprune.models.family import Model
from vlprune.names import COSINES
from vlprune.progress import track
from vlprune.runtime.generate import Arrays, Graph
from vlprune.runtime.session import OnnxGraph, session


NOISE_BATCHES = (4, 4)  # samples that the sensitivity of products is measured on


def convert_task(
    model: Model,
    plain: Path,
    folder: Path,
    precision: str,
    data: Data,
    inputs: Data,
    ranges: Mapping[str, Ranges],
    *,
    fuse: bool = False,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Write the graphs of a task in another form into a folder that is complete by itself.

    Files are written in place: give a temporary folder and rename it.

    Args:
        model: what the graphs were exported from, on the CPU.
        plain: folder of the plain graphs.
        folder: an existing, empty folder.
        precision: "fp16", "int8-static" or "int8-dynamic"; "fp32" for graphs that are only joined.
        data: real images and texts; each graph is compared with PyTorch on six of them.
        inputs: those that the ranges were measured on; they decide what int8-static leaves in fp32.
        ranges: graph -> ranges of its values (`vlprune.exporters.ranges.measure`), for fp16 and int8-static.
        fuse: join nodes into ONNX Runtime's larger ones, in fp32 and fp16.
        threads: CPU threads of ONNX Runtime, None = all.

    Returns:
        list[dict[str, Any]]: per graph its name (`graph`), its `file` in the folder, `precision`, `bytes`,
            `nonzero_fraction` of the prunable weights in it, `max_abs_diff` and `cosine_min` against PyTorch, and
            `kept_fp32`, the nodes left in fp32 and why. Figures of fp16 are with every result rounded to fp16. Where
            nodes were joined: `fused`, how many operators of each kind were made (`fusions`), and `not_fused`.

    Raises:
        RequestError: a plain graph is missing or broken.
        MachineError: a graph gives NaN or infinity, or one that is only joined differs from PyTorch.
    """
    spec = read_json(plain / "task.json")
    graphs = import_module(f"vlprune.exporters.{model.family}").graphs(model, spec["task"])
    prunable = prunable_weights(model)
    kept: dict[str, dict[str, str]] = {name: {} for name in graphs}
    label = f"Writing {plain.parent.name} {plain.name} in {precision}"
    if precision == "int8-static":
        kept = _sensitive(plain, spec, model.processor, inputs, ranges, threads)
    rows, opened = [], {}
    for name in track(graphs, label, len(graphs)):
        file, graph = folder / f"{name}.onnx", load(plain / f"{name}.onnx")
        joined = join(graph) if fuse else Fused(graph)
        if precision == "fp16":
            kept[name] = kept_nodes(joined.model, ranges[name], joined.inside)
        names = {node.output[0]: node.name or node.output[0] for node in joined.model.graph.node}
        runs = _write(joined.model, file, precision, ranges.get(name, {}), kept[name], threads)
        opened[name] = OnnxGraph(runs, name)
        row = {"graph": name, "file": file.name, "precision": precision}
        row |= {"bytes": sum(path.stat().st_size for path in folder.glob(f"{name}.onnx*"))}
        row |= {"nonzero_fraction": _nonzero(load(file), prunable)}
        if precision != "fp32":
            row |= {"kept_fp32": [f"{names[output]}: {reason}" for output, reason in kept[name].items()]}
        if fuse:
            row |= {"fused": True, "fusions": joined.taken, "not_fused": joined.missed}
        rows.append(row)
    reference = {name: as_function(graph) for name, graph in graphs.items()}
    differences = compare(reference, opened, spec, model.processor, data, 1e-4 if precision == "fp32" else math.inf)
    for row in rows:
        difference = differences[row["graph"]]
        row |= {"max_abs_diff": difference.max_abs_diff, "cosine_min": difference.cosine_min}
    copy_others(plain, folder)
    return rows


def _write(
    graph: ModelProto, file: Path, precision: str, ranges: Ranges, kept: Mapping[str, str], threads: int | None
) -> Any:
    """Write one graph; open what shows how far it is from PyTorch."""
    if precision == "fp16":
        half = to_half(graph, kept)
        runs = open_model(rounding(half), threads)  # before the weights go to the file
        save(half, file)
        return runs
    if precision == "int8-dynamic":
        write_dynamic(graph, file)
    else:
        save(static(graph, ranges, kept) if precision == "int8-static" else graph, file)
    return session(file, threads=threads)


def _sensitive(
    plain: Path,
    spec: Mapping[str, Any],
    processor: Any,
    inputs: Data,
    ranges: Mapping[str, Ranges],
    threads: int | None,
) -> dict[str, dict[str, str]]:
    """Find the products that a graph cannot bear to have quantised: none where its cosine is high enough with all.

    The one whose own result has most noise goes first; then two, four, eight of them and so on, until it is enough.
    """
    files = {name: plain / f"{name}.onnx" for name in ranges}
    reference: dict[str, Graph] = {n: OnnxGraph(session(file, threads=threads), n) for n, file in files.items()}
    left: dict[str, dict[str, str]] = {name: {} for name in files}
    graphs: dict[str, Graph] = {}
    noise: dict[str, dict[str, float]] = {}
    waiting = set(files)
    while waiting:
        for name in waiting:
            quantised = static(load(files[name]), ranges[name], left[name])
            graphs[name] = OnnxGraph(open_model(quantised, threads), name)
        found = compare(reference, graphs, spec, processor, inputs, math.inf)
        waiting = {name for name in waiting if found[name].cosine_min < COSINES["int8-static"]}
        if waiting and not noise:
            noise = _noise(files, spec, processor, inputs, ranges, threads)
        for name in list(waiting):
            worst = sorted(noise[name], key=lambda y, name=name: -noise[name][y])  # type: ignore[misc]
            if len(left[name]) == len(worst):
                waiting.discard(name)
            count = max(1, 2 * len(left[name]))
            left[name] = {y: f"int8 would leave noise of {noise[name][y]:.2g} of it" for y in worst[:count]}
    return left


def _noise(
    files: Mapping[str, Path],
    spec: Mapping[str, Any],
    processor: Any,
    inputs: Data,
    ranges: Mapping[str, Ranges],
    threads: int | None,
) -> dict[str, dict[str, float]]:
    """Measure for each product how large the error would be, relative to the product, if it alone were quantised."""
    graphs, products = {}, {}
    for name, file in files.items():
        noisy, products[name] = with_noise(load(file), ranges[name])
        graphs[name] = OnnxGraph(open_model(noisy, threads), name)
    sums = {name: {y: np.zeros(2) for y in products[name]} for name in files}

    def run(name: str, feeds: Arrays) -> Arrays:
        outputs = graphs[name](feeds)
        for y, total in sums[name].items():
            total += [float(outputs.pop(f"{y}{NOISE}/{part}")) for part in ("error", "signal")]
        return outputs

    for _ in walk(run, spec, processor, inputs, NOISE_BATCHES):
        pass
    return {
        name: {y: math.sqrt(error / signal) if signal else 0.0 for y, (error, signal) in found.items()}
        for name, found in sums.items()
    }


def _nonzero(model: ModelProto, prunable: set[str]) -> float:
    """Share of nonzero entries among the prunable weights of a graph."""
    total = nonzero = 0
    for tensor in model.graph.initializer:
        if tensor.name.removesuffix(QUANTIZED).removesuffix(TRANSPOSED) in prunable:
            array = numpy_helper.to_array(tensor)
            total, nonzero = total + array.size, nonzero + int(np.count_nonzero(array))
    return nonzero / total if total else 1.0
