"""Floating-point operations of a model's graphs, counted by torch.utils.flop_counter.

The counter sees matrix products, convolutions and fused attention; a multiplication and an addition are two operations.
What it leaves out (softmax, GELU, LayerNorm, additions) is small beside them. Shapes decide, values do not: the model
is copied to the meta device, where nothing is computed or allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlprune.exporters.graphs import INTEGERS, Axes, nest
from vlprune.models.family import Model


LENGTH = 35  # tokens of a text, as in fine-tuning


def flops(model: Model, task: str) -> dict[str, int]:
    """Count the operations of one run of each graph of a task, at batch size 1.

    Texts have `LENGTH` tokens, prompts included, where a graph does not fix their number; a decoder reads its text at
    once, without a cache.

    Args:
        model: of any family; it is not changed.
        task: one of `model.tasks`.

    Returns:
        dict[str, int]: per graph. A multiply-add counts two.
    """
    light = meta_copy(model).for_task(task)
    family = import_module(f"vlprune.exporters.{model.family}")
    # What a decoder's cross-attention reads: the image, or the question.
    states = LENGTH if task == "vqa" else int(family.task_spec(light, task).get("image_tokens", LENGTH))
    sizes = {"batch": 1, "length": LENGTH, "past": 0, "past + length": LENGTH, "states": states}
    found = {}
    for name, graph in family.graphs(light, task).items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            graph(**nest(_inputs(graph.inputs, sizes)))
        found[name] = counter.get_total_flops()
    return found


def meta_copy(model: Model) -> Model:
    """Copy a model without its values.

    Args:
        model: of any family.

    Returns:
        Model: on the meta device; what is shared stays shared.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _inputs(axes: Mapping[str, Axes], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(
            [sizes[size] if isinstance(size, str) else size for size in shape],
            dtype=torch.int64 if name in INTEGERS else torch.float32,
            device="meta",
        )
        for name, shape in axes.items()
    }
