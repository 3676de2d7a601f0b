"""The graphs of a model as PyTorch modules: named tensors in, named tensors out, shapes declared once.

The same module is traced for ONNX, serves as the reference the exported file is compared with, and scores a model in
PyTorch through `as_function`. Names with an index ("past_key.0") are the layers of one list in `forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlprune.runtime.generate import Arrays
from vlprune.runtime.generate import Graph as GraphFunction


Axes = tuple[str | int, ...]  # sizes of a tensor's axes; a name stands for a size that varies between calls
INTEGERS = ("input_ids", "attention_mask", "cross_mask")  # int64; everything else is float32


class Graph(nn.Module):
    """One graph of a task.

    Subclasses define `forward`, whose arguments are the names in `inputs` (one list of tensors for names that differ
    only in their index) and which returns a dict, made like the arguments, of the names in `outputs`.

    Args:
        model: whose methods `forward` calls. It is no submodule: only `parts` are.
        parts: names of the submodules of `model` that hold the graph's weights; they keep their names.
        inputs: axes of every input, in order.
        outputs: axes of every output, in order.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[str], inputs: Mapping[str, Axes], outputs: Mapping[str, Axes]
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is not registered
        for part in parts:
            setattr(self, part, getattr(model, part))
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)
        self.config = SimpleNamespace()  # Optimum writes its options here

    @property
    def model(self) -> Any:
        """The model the graph belongs to."""
        return self._model[0]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Join the layers of a list: {"a": x, "b.0": y, "b.1": z} becomes {"a": x, "b": [y, z]}.

    Args:
        flat: values by name; indices of a name count up from 0.

    Returns:
        dict[str, Any]: values and lists of values by name without index.
    """
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        base, dot, _ = name.partition(".")
        if dot:
            nested.setdefault(base, []).append(value)
        else:
            nested[name] = value
    return nested


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `nest`.

    Args:
        nested: values and lists of values by name.

    Returns:
        dict[str, Any]: values by name with index.
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, list):
            flat.update({f"{name}.{index}": item for index, item in enumerate(value)})
        else:
            flat[name] = value
    return flat


def indexed(prefixes: Sequence[str], axes: Sequence[Axes]) -> dict[str, Axes]:
    """Declare lists of tensors, one per prefix, with one tensor per layer.

    Args:
        prefixes: names without index.
        axes: of each layer, the same for all prefixes.

    Returns:
        dict[str, Axes]: axes by name with index.
    """
    return {f"{prefix}.{layer}": layer_axes for prefix in prefixes for layer, layer_axes in enumerate(axes)}


def as_function(graph: Graph) -> GraphFunction:
    """Run a graph in PyTorch on arrays, on the device of its weights, without gradients.

    Args:
        graph: in eval mode.

    Returns:
        GraphFunction: callable from named arrays to named arrays.
    """
    device = next(graph.parameters()).device

    def run(feeds: Arrays) -> Arrays:
        # An array may be read-only or a view from numpy's indexing; torch wants neither.
        tensors = {
            name: torch.from_numpy(np.require(feeds[name], requirements=["C", "W"])).to(device) for name in graph.inputs
        }
        with torch.no_grad():
            outputs: dict[str, Tensor] = flatten(graph(**nest(tensors)))
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    return run
