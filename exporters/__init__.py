"""Exporters: one file per model family; imported as `vlprune.exporters`.

`export` writes the ONNX graphs of a task and compares them with PyTorch, `convert_task` writes them in another
precision, `pack_task` packs their sparse layers, and both compare again; `unpack_files` undoes packing;
`quantize_task` writes dynamic int8 graphs to measure packed ones beside; `torch_graphs` runs the same graphs in
PyTorch, `task_spec` makes the task.json that all are scored with, `parameters` maps the names in a file to PyTorch's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from vlprune.exporters.onnx_files import export
    from vlprune.exporters.packed_files import pack_task, unpack_files
    from vlprune.exporters.precision import convert_task
    from vlprune.exporters.quantize import quantize_task
    from vlprune.exporters.simplify import parameters
    from vlprune.models.family import Model
    from vlprune.runtime.generate import Graph

__all__ = [
    "convert_task",
    "export",
    "pack_task",
    "parameters",
    "quantize_task",
    "task_spec",
    "torch_graphs",
    "unpack_files",
]

_HOMES = {
    "convert_task": "vlprune.exporters.precision",
    "export": "vlprune.exporters.onnx_files",
    "pack_task": "vlprune.exporters.packed_files",
    "parameters": "vlprune.exporters.simplify",
    "quantize_task": "vlprune.exporters.quantize",
    "unpack_files": "vlprune.exporters.packed_files",
}  # torch and Optimum are heavy


def torch_graphs(model: Model, task: str) -> dict[str, Graph]:
    """Run the graphs of a task in PyTorch, on the model's device.

    Args:
        model: put in eval mode; later changes of its weights show in the results.
        task: one of `model.tasks`.

    Returns:
        dict[str, Graph]: callables from named arrays to named arrays, as onnxruntime's of the exported files.

    Raises:
        RequestError: the model does not offer the task.
    """
    return _family(model).torch_graphs(model, task)


def task_spec(model: Model, task: str, **options: Any) -> dict[str, Any]:
    """Make the task.json of a model.

    Args:
        model: its processor tells the token ids, its decoder the shapes of the cache.
        task: one of `model.tasks`.
        **options: of the task's `make_spec` (vlprune.tasks); `answers` (a list, or None = generate) for vqa.

    Returns:
        dict[str, Any]: the spec.
    """
    return _family(model).task_spec(model, task, **options)


def _family(model: Model) -> Any:
    return import_module(f"vlprune.exporters.{model.family}")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlprune.exporters' has no attribute {name!r}")
