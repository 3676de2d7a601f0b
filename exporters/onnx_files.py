"""Write a task's graphs as ONNX files through Optimum, and prove that each computes what PyTorch computes."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from optimum.exporters.onnx import OnnxConfig, export_models, validate_models_outputs
from optimum.utils import DummyInputGenerator, NormalizedConfig

from vlprune import __version__
from vlprune.data.sets import Data
from vlprune.errors import MachineError, RequestError
from vlprune.exporters.compare import compare
from vlprune.exporters.graphs import INTEGERS, Axes, Graph, as_function, nest
from vlprune.exporters.pack import LIMIT
from vlprune.exporters.simplify import TRANSPOSED, simplify
from vlprune.files import write_json
from vlprune.models.family import Model
from vlprune.progress import track
from vlprune.runtime.session import OnnxGraph, session


OPSETS = range(17, 21)  # LayerNormalization exists from 17 on; torch's TorchScript exporter ends at 20

# Sizes for tracing. None is 1 or 0, which would be taken for fixed, and no two are equal.
TRACED = {"batch": 2, "length": 5, "past": 3, "past + length": 8, "states": 7}


class _Inputs(DummyInputGenerator):
    """Makes the inputs a graph is traced and first checked with."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def supports_input(self, input_name: str) -> bool:
        """Tell whether the graph has this input."""
        return input_name in self.graph.inputs

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Any:
        """Make one input; masks are all ones, ids small."""
        shape = [TRACED[size] if isinstance(size, str) else size for size in self.graph.inputs[input_name]]
        if input_name in INTEGERS:
            low, high = (1, 1) if input_name.endswith("mask") else (0, 3)
            return self.random_int_tensor(shape, high + 1, low, framework=framework, dtype=int_dtype)
        return self.random_float_tensor(shape, -1, 1, framework=framework, dtype=float_dtype)


class _Config(OnnxConfig):
    """Tells Optimum the names and axes of a graph."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        super().__init__(graph.config)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Varying axes of each input."""
        return {name: _varying(axes) for name, axes in self.graph.inputs.items()}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Varying axes of each output."""
        return {name: _varying(axes) for name, axes in self.graph.outputs.items()}

    def _create_dummy_input_generator_classes(self, **shapes: Any) -> list[DummyInputGenerator]:
        return [_Inputs(self.graph)]

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        """Make all inputs, the layers of a list joined as `forward` takes them."""
        return nest(super().generate_dummy_inputs(framework, **shapes))


def export(
    model: Model,
    task: str,
    spec: Mapping[str, Any],
    folder: Path,
    data: Data,
    *,
    variant: str = "dense",
    opset: int = 18,
    tolerance: float = 1e-4,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Write everything a runner without PyTorch needs for a task: graphs, task.json, tokenizer, image preprocessing.

    Files are written in place: give a temporary folder and rename it. Weights beyond 2 GiB lie beside their graph in
    `<graph>.onnx.data`.

    Args:
        model: computes on the CPU meanwhile, and is put in eval mode.
        task: one of `model.tasks`.
        spec: task.json, made by `task_spec`.
        folder: an existing folder.
        data: real images and texts; each graph is compared with PyTorch on six of them.
        variant: name of the model, noted in the files.
        opset: ONNX operator set, 17 to 20.
        tolerance: largest difference allowed between PyTorch and ONNX Runtime, relative to the largest value of an
            output where that is above 1.
        threads: CPU threads of ONNX Runtime, None = all.

    Returns:
        list[dict[str, Any]]: per graph its name (`graph`), its `file` in the folder, `bytes`, `nonzero_fraction` of the
            prunable weights in it, `max_abs_diff` and `cosine_min` against PyTorch.

    Raises:
        RequestError: the model does not offer the task, or the opset is not supported.
        MachineError: a graph differs from PyTorch.
    """
    if opset not in OPSETS:
        raise RequestError(f"opset {opset} is not supported: choose {OPSETS.start} to {OPSETS.stop - 1}")
    graphs = import_module(f"vlprune.exporters.{model.family}").graphs(model, task)
    prunable = prunable_weights(model)
    rows, exported = [], {}
    with _on_cpu(model):
        for name, graph in track(graphs.items(), f"Exporting {variant} {task}", len(graphs)):
            notes = {"variant": variant, "family": model.family, "task": task, "graph": name}
            fraction = _write(name, graph, folder, opset, prunable, notes)
            exported[name] = OnnxGraph(session(folder / f"{name}.onnx", threads=threads), name)
            size = sum(path.stat().st_size for path in folder.glob(f"{name}.onnx*"))
            rows.append({"graph": name, "file": f"{name}.onnx", "bytes": size, "nonzero_fraction": fraction})
        reference = {name: as_function(graph) for name, graph in graphs.items()}
        differences = compare(reference, exported, spec, model.processor, data, tolerance)
        _validate(graphs, folder, tolerance * max(difference.scale for difference in differences.values()))
    for row in rows:
        difference = differences[row["graph"]]
        row |= {"max_abs_diff": difference.max_abs_diff, "cosine_min": difference.cosine_min}
    write_json(folder / "task.json", dict(spec))
    model.processor.save(folder)
    return rows


def _write(name: str, graph: Graph, folder: Path, opset: int, prunable: set[str], notes: Mapping[str, str]) -> float:
    """Write one graph; tell the fraction of its prunable weights that are not zero."""
    with TemporaryDirectory(prefix=".", dir=folder) as raw, _quiet(graph):
        # Without folding, parameters keep their names; simplify folds, and sets the axes.
        export_models(
            {name: (graph, _Config(graph))},
            Path(raw),
            opset=opset,
            disable_dynamic_axes_fix=True,
            do_constant_folding=False,
        )
        model = simplify(onnx.load(Path(raw) / f"{name}.onnx"), graph.inputs, graph.outputs)
    weights = [t for t in model.graph.initializer if t.name.removesuffix(TRANSPOSED) in prunable]
    total = sum(math.prod(tensor.dims) for tensor in weights)
    nonzero = sum(int(np.count_nonzero(numpy_helper.to_array(tensor))) for tensor in weights)
    fraction = nonzero / total if total else 1.0
    model.graph.name = name
    model.producer_name, model.producer_version = "vlprune", __version__
    notes = {"version": __version__, **notes, "sparsity": f"{1 - fraction:.6f}"}
    onnx.helper.set_model_props(model, {f"vlprune.{key}": value for key, value in notes.items()})
    beside = sum(math.prod(tensor.dims) * 4 for tensor in model.graph.initializer) > LIMIT
    path = folder / f"{name}.onnx"
    onnx.save_model(model, path, save_as_external_data=beside, location=f"{path.name}.data")
    return fraction


def _validate(graphs: Mapping[str, Graph], folder: Path, atol: float) -> None:
    """Let Optimum check names, axes, shapes and values of the files on made-up inputs."""
    pairs = {name: (graph, _Config(graph)) for name, graph in graphs.items()}
    outputs = [list(graph.outputs) for graph in graphs.values()]
    try:
        with _quiet(*graphs.values()):
            validate_models_outputs(pairs, outputs, folder, atol=atol, use_subprocess=False)
    except Exception as error:  # Optimum's errors share no class of their own
        reason = " ".join(str(error).split())[:300]
        raise MachineError(f"the exported graphs do not compute what PyTorch computes ({reason})") from error


def prunable_weights(model: Model) -> set[str]:
    """Name the prunable weights, with all names of those that modules share.

    Args:
        model: any.

    Returns:
        set[str]: names of parameters.
    """
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(module)]}.weight" for layer in model.layers() for module in layer.modules}


@contextmanager
def _on_cpu(model: Model) -> Iterator[None]:
    device = model.device
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


@contextmanager
def _quiet(*graphs: Graph) -> Iterator[None]:
    """Keep torch.onnx and Optimum from printing, and from leaving their options in the model's configs."""
    configs: dict[int, Any] = {id(m.config): m.config for g in graphs for m in g.modules() if hasattr(m, "config")}
    options = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for config, use_cache in options:
            config.use_cache = use_cache


def _varying(axes: Axes) -> dict[int, str]:
    return {axis: size for axis, size in enumerate(axes) if isinstance(size, str)}
