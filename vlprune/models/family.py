"""What every model family tells the rest of the program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


Batch = dict[str, Tensor]
Valid = Callable[..., AbstractContextManager[None]]  # InputNorms.valid: which token rows of a forward pass count


@dataclass(frozen=True)
class PrunableLayer:
    """One prunable weight and every `nn.Linear` that uses it.

    Attributes:
        name: parameter path of the first use, without ".weight".
        names: parameter paths of all uses, `name` first.
        modality: "vision" or "text".
        modules: the Linear modules that hold the weight; more than one when towers share it.
        tokens: whose tokens the inputs' rows are, "vision" or "text" (cross-attention keys and values of a text layer
            read vision tokens).
    """

    name: str
    names: tuple[str, ...]
    modality: Literal["vision", "text"]
    modules: tuple[nn.Linear, ...]
    tokens: Literal["vision", "text"]

    @property
    def weight(self) -> Tensor:
        """The shared weight [out, in]."""
        return self.modules[0].weight


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: what the user asked for.
        checkpoint: file, folder or hub id the weights were read from.
        sha256: hash of the weight file, None where there is no file.
        random_weights: True when the weights were never trained: no accuracy is ever shown.
    """

    name: str
    checkpoint: str
    sha256: str | None = None
    random_weights: bool = False


def fingerprint(layers: list[PrunableLayer]) -> str:
    """Hash the prunable weights, so that masks are never applied to another model.

    Args:
        layers: the model's prunable layers.

    Returns:
        str: SHA-256 in hexadecimal over names, shapes and values.
    """
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.name} {list(layer.weight.shape)}\n".encode())
        digest.update(layer.weight.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def masks_for(part: list[PrunableLayer], whole: list[PrunableLayer], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a model's masks for a copy with some of its parts only, where a shared weight may go by another name.

    Args:
        part: prunable layers of the copy.
        whole: prunable layers of the model.
        masks: the model's masks by layer name.

    Returns:
        dict[str, Tensor]: the copy's masks by its layer names.
    """
    name_of = {alias: layer.name for layer in whole for alias in layer.names}
    return {layer.name: masks[name_of[layer.name]] for layer in part}


def apply_masks(layers: list[PrunableLayer], masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Write new weights, then set what a mask prunes to exactly zero, in place, once per shared weight.

    Args:
        layers: the model's prunable layers.
        masks: name -> bool [out, in], True = kept.
        weights: name -> changed weight [out, in], for methods that update weights.
    """
    with torch.no_grad():
        for layer in layers:
            if layer.name in weights:
                layer.weight.copy_(weights[layer.name])
            if layer.name in masks:
                # masked_fill, not a product: NaN x 0 would stay NaN
                layer.weight.masked_fill_(~masks[layer.name].to(layer.weight.device), 0.0)
