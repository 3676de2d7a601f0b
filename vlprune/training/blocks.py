"""Options that change what the layers of a tower cost in training, and not what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlprune.errors import MachineError
from vlprune.models.family import Model


BACKEND = "inductor"  # of torch.compile


@contextmanager
def recomputed(model: Model) -> Iterator[None]:
    """Gradient checkpointing: keep only what goes into a layer, and compute the rest again in the backward pass.

    The random numbers of dropout are the same both times, so results are, too.

    Args:
        model: any; layers that run without gradients run once.

    Yields:
        None: nothing.
    """
    with _replaced(model, lambda function: partial(_checkpoint, function)):
        yield


@contextmanager
def compiled(model: Model) -> Iterator[None]:
    """torch.compile every layer: code is generated when the first batch comes, and again for other text lengths.

    Sums are added in another order, and dropout draws other numbers.

    Args:
        model: any; what is compiled must not be watched by hooks that change.

    Yields:
        None: nothing.

    Raises:
        MachineError: no code can be generated here.
    """
    try:
        with _replaced(model, lambda function: torch.compile(function, backend=BACKEND)):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        line = " ".join(str(error).split())[:300]
        raise MachineError(f"--compile: torch.compile fails here ({line}): leave it out, or install g++") from error


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


@contextmanager
def _replaced(model: Model, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put other functions in the place of those that run the layers."""
    methods = list(_methods(model))
    before = [module.__dict__.get(name) for module, name in methods]
    try:
        for module, name in methods:
            setattr(module, name, change(getattr(module, name)))
        yield
    finally:
        for (module, name), earlier in zip(methods, before, strict=True):
            if earlier is None:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, earlier)


def _methods(model: Model) -> Iterator[tuple[nn.Module, str]]:
    """The functions by which a forward pass runs the layers: BLIP's text layers are run in parts."""
    for path in dict.fromkeys(path for tower in model.towers() for path in tower.stacks):
        layers: Any = model.get_submodule(path)
        for layer in layers:
            if not hasattr(layer, "feed_forward_chunk"):
                yield layer, "forward"
                continue
            yield layer, "feed_forward_chunk"
            for module in layer.modules():
                if hasattr(module, "keys_values"):  # an attention
                    yield module, "forward"
