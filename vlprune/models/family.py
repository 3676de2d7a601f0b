"""What every model family tells the rest of the program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


Batch = dict[str, Tensor]
State = dict[str, Tensor]  # what one layer of a tower hands to the next: "x" [B, T, D], and whatever else they need
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


@dataclass(frozen=True)
class Group:
    """The units of one attention or one feed-forward network: what structured pruning removes whole.

    A unit of an attention is one dimension of one head, [H, K] of them; of a feed-forward network one hidden neuron,
    [N] of them. Unit u of a network stands in row u of the `inner` Linears (behind an offset where query, key and value
    are one matrix) and in column u of the `outer` ones. Modules that share their weights (BLIP's encoder and decoder)
    are one group.

    Attributes:
        name: module path of the first use: "vision_model.encoder.layers.0.self_attn", "...layers.0.mlp".
        names: paths of all uses, `name` first.
        kind: "attention" or "ffn".
        modality: "vision" or "text".
        tower: name of the `Tower` of the first use.
        layer: index in that tower.
        modules: per use, the module whose `set_units(shape)` tells its forward pass how many units are left.
        inner: Linears of all uses whose rows are units, each with the row where the units begin as a multiple of their
            number: (qkv, 0), (qkv, 1), (qkv, 2), or (query, 0), (key, 0), (value, 0), or (fc1, 0).
        outer: Linears of all uses whose columns are units: the projection, or fc2.
        shape: (H, K) or (N,), as the Linears are now.
        cross: True for an attention whose keys and values read another tower.
    """

    name: str
    names: tuple[str, ...]
    kind: Literal["attention", "ffn"]
    modality: Literal["vision", "text"]
    tower: str
    layer: int
    modules: tuple[nn.Module, ...]
    inner: tuple[tuple[nn.Linear, int], ...]
    outer: tuple[nn.Linear, ...]
    shape: tuple[int, ...]
    cross: bool = False


@dataclass(frozen=True)
class Tower:
    """A stack of layers that can be made shallower.

    Attributes:
        name: "vision", "text", "decoder"; towers that share weights layer by layer are one.
        modality: "vision" or "text".
        stacks: paths of the `nn.ModuleList`s, one per use.
        depth: layers as of now, L.
    """

    name: str
    modality: Literal["vision", "text"]
    stacks: tuple[str, ...]
    depth: int


@dataclass(frozen=True)
class Steps:
    """A tower that can be run in pieces, so that what comes before a change need not be computed again.

    `finish(layers[-1](... layers[0](start(batch))))` are the embeddings the model itself computes, to the last bit. No
    function changes the state it is given.

    Attributes:
        start: what a batch is before the first layer.
        layers: one function per layer, in order; each reads the weights as they are when it is called.
        finish: the state after the last layer to unit vectors [B, E].
    """

    start: Callable[[Batch], State]
    layers: list[Callable[[State], State]]
    finish: Callable[[State], Tensor]

    def embeds(self, batch: Batch) -> Tensor:
        """Run all of it.

        Args:
            batch: made by `caption_batch`.

        Returns:
            Tensor: unit vectors [B, E].
        """
        state = self.start(batch)
        for layer in self.layers:
            state = layer(state)
        return self.finish(state)


class Model(Protocol):
    """A model of any family: an `nn.Module` that tells what can be pruned, how it is calibrated and trained.

    Attributes:
        family: "blip", "clip", ...: its file in `vlprune.models`, and in `vlprune.exporters`.
        tasks: what it offers.
        config: transformers' configuration.
        processor: turns images and texts into model inputs; has `image_size`, `resize`, `normalise`, `images`.
        source: where the weights come from.
        options: task -> settings of its task.json, "finetune" -> settings of the fine-tuning, where this checkpoint is
            better served by others than the authors' (kept in its config.json).
    """

    family: str
    tasks: tuple[str, ...]
    config: Any
    processor: Any
    source: Source
    options: dict[str, dict[str, Any]]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def layers(self) -> list[PrunableLayer]:
        """List the prunable weights: vision first, then text, in order of execution."""

    def groups(self) -> list[Group]:
        """List the units that structured pruning may remove: vision first, then text, in order of execution."""

    def towers(self) -> list[Tower]:
        """List the stacks of layers that structured pruning may shorten."""

    def calibrate(self, batch: Batch, valid: Valid) -> None:
        """Run one calibration batch; `valid` (`InputNorms.valid`) is told which rows are padding."""

    def loss(self, task: str, batch: Batch) -> Tensor:
        """The fine-tuning loss of a task, a scalar."""

    def head_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that `--finetune heads` trains: those outside the towers."""

    def for_task(self, task: str) -> Self:
        """Copy the parts a task needs; a RequestError names what is missing."""

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config, weights and processor in Hugging Face format into an existing folder."""

    # What every nn.Module has, as far as it is used on models of any family.

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """See `nn.Module`."""

    def cpu(self) -> Self:
        """See `nn.Module`."""

    def train(self, mode: bool = True) -> Self:
        """See `nn.Module`."""

    def eval(self) -> Self:
        """See `nn.Module`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `nn.Module`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `nn.Module`."""

    def modules(self) -> Iterator[nn.Module]:
        """See `nn.Module`."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """See `nn.Module`."""

    def get_submodule(self, target: str) -> nn.Module:
        """See `nn.Module`."""

    def state_dict(self) -> dict[str, Tensor]:
        """See `nn.Module`."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See `nn.Module`."""


class Encoders(Model, Protocol):
    """A model that embeds images and texts in one space: CLIP, SigLIP, and BLIP where it offers retrieval."""

    def caption_batch(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        captions: Sequence[str],
        image_index: Sequence[int],
        max_length: int = 35,
    ) -> Batch:
        """Make the batch for calibration and retrieval from B images, one caption of each, and their numbers."""

    def image_tower(self) -> Steps:
        """The image tower in pieces; reads `pixel_values`."""

    def text_tower(self) -> Steps:
        """The text tower in pieces; reads `input_ids` and `attention_mask`."""


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
