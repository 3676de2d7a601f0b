"""What CLIP and SigLIP have in common: two towers of the same layers, whose outputs meet in one space.

Parameter names are Hugging Face's. The forward pass of a layer is our own: structured pruning changes how many heads an
attention has and how wide they are.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from vlprune.errors import RequestError
from vlprune.files import write_json
from vlprune.models.attention import attend
from vlprune.models.family import Batch, Group, PrunableLayer, Source, State, Steps, Tower, Valid
from vlprune.models.text_processor import EncoderProcessor
from vlprune.structured.surgery import sizes


Modality = Literal["vision", "text"]
MODALITIES: tuple[Modality, ...] = ("vision", "text")
INNER = ("q_proj", "k_proj", "v_proj")


class Attention(CLIPAttention):
    """Self-attention whose head count and width are its own attributes; SigLIP's has the same parts as CLIP's."""

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None, **unused: Any) -> Tensor:
        """Attend.

        Args:
            hidden_states: [B, T, D].
            bias: added to the scores, broadcastable to [B, H, T, T], or None.
            **unused: arguments of transformers.

        Returns:
            Tensor: [B, T, D].
        """
        query, key, value = (
            getattr(self, name)(hidden_states).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for name in INNER
        )
        return self.out_proj(attend(query, key, value, self.scale, bias))

    def set_units(self, shape: tuple[int, ...]) -> None:
        """Tell the forward pass how many heads and dimensions are left; the softmax keeps its scale.

        Args:
            shape: (H, K).
        """
        self.num_heads, self.head_dim = shape


class EncoderLayer(CLIPEncoderLayer):
    """One layer of either tower: attention and feed-forward network, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None, **unused: Any) -> Tensor:
        """Compute the layer.

        Args:
            hidden_states: [B, T, D].
            bias: see `Attention`.
            **unused: arguments of transformers.

        Returns:
            Tensor: [B, T, D].
        """
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), bias)
        return x + self.mlp(self.layer_norm2(x))


def step(layer: nn.Module, state: State) -> State:
    """Run one layer of a tower (see `Steps`).

    Args:
        layer: an `EncoderLayer`.
        state: "x" [B, T, D] and, for texts, "bias".

    Returns:
        State: the next one.
    """
    return {**state, "x": layer(state["x"], state.get("bias"))}


class DualEncoder(nn.Module, ABC):
    """A vision and a text tower; families add how a tower begins and ends, and the loss.

    A family's `__init__` makes `vision_model` and `text_model` of transformers' and calls `_own_layers`.

    Args:
        config: sizes of both towers.
        processor: tokenizer and image preprocessing.
        source: where the weights come from.

    Attributes:
        options: see `vlprune.models.family.Model`.
    """

    family: str
    architecture: str  # the Hugging Face class that reads what is saved
    heads: tuple[str, ...]  # what the names of the parameters outside the towers begin with
    initial: dict[str, float]  # parameters that start from a value, and no random one
    tasks: tuple[str, ...] = ("retrieval", "zero-shot")

    def __init__(self, config: Any, processor: EncoderProcessor, source: Source) -> None:
        super().__init__()
        self.options: dict[str, dict[str, Any]] = {}
        self.config = config
        self.processor = processor
        self.source = source

    def _own_layers(self) -> None:
        """Put our own layers in place of transformers'; drop buffers that only transformers' forward passes read."""
        for modality in MODALITIES:
            tower: Any = self.get_submodule(f"{modality}_model")
            config = getattr(self.config, f"{modality}_config")
            tower.encoder.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
            del tower.embeddings.position_ids

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.get_parameter("logit_scale").device

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the joint space, E."""

    # --- pruning ---------------------------------------------------------------------------------------------------

    def layers(self) -> list[PrunableLayer]:
        """List the prunable weights: every Linear of the towers' layers.

        Projections, and the attention pooling that ends SigLIP's vision tower, are not pruned.

        Returns:
            list[PrunableLayer]: vision first, then text, in order of execution.
        """
        found = []
        for modality, prefix, layer in self._each():
            for path in (*(f"self_attn.{name}" for name in INNER), "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
                name = f"{prefix}.{path}"
                found.append(PrunableLayer(name, (name,), modality, (layer.get_submodule(path),), modality))
        return found

    def groups(self) -> list[Group]:
        """List the units that structured pruning may remove: dimensions of heads, hidden neurons.

        Returns:
            list[Group]: vision first, then text, in order of execution.
        """
        found = []
        for modality, prefix, layer in self._each():
            index = int(prefix.rsplit(".", 1)[1])
            name, block = f"{prefix}.self_attn", layer.self_attn
            inner = tuple((getattr(block, path), 0) for path in INNER)
            shape: tuple[int, ...] = (block.num_heads, block.head_dim)
            outer = (block.out_proj,)
            found.append(Group(name, (name,), "attention", modality, modality, index, (block,), inner, outer, shape))
            name, block = f"{prefix}.mlp", layer.mlp
            inner, outer, shape = ((block.fc1, 0),), (block.fc2,), (block.fc1.out_features,)
            found.append(Group(name, (name,), "ffn", modality, modality, index, (block,), inner, outer, shape))
        return found

    def towers(self) -> list[Tower]:
        """List the stacks of layers that structured pruning may shorten.

        Returns:
            list[Tower]: vision, then text.
        """
        stacks = ((modality, f"{modality}_model.encoder.layers") for modality in MODALITIES)
        return [Tower(name, name, (path,), len(self.get_submodule(path))) for name, path in stacks]  # type: ignore[arg-type]

    def _each(self) -> list[tuple[Modality, str, Any]]:
        """List all layers with their modality and path."""
        found: list[tuple[Modality, str, Any]] = []
        for modality in MODALITIES:
            stack: Any = self.get_submodule(f"{modality}_model.encoder.layers")
            found += [(modality, f"{modality}_model.encoder.layers.{i}", layer) for i, layer in enumerate(stack)]
        return found

    def calibrate(self, batch: Batch, valid: Valid) -> None:
        """Run one calibration batch through both towers.

        Args:
            batch: made by `caption_batch`.
            valid: `InputNorms.valid`; tells which rows are padding.
        """
        with valid(text=batch["attention_mask"]):
            self.image_embeds(batch["pixel_values"])
            self.text_embeds(batch["input_ids"], batch["attention_mask"])

    # --- forward ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def image_tower(self) -> Steps:
        """Give the image tower in pieces (see `Steps`).

        Returns:
            Steps: from `pixel_values` to what `image_embeds` gives.
        """

    @abstractmethod
    def text_tower(self) -> Steps:
        """Give the text tower in pieces (see `Steps`).

        Returns:
            Steps: from `input_ids` and `attention_mask` to what `text_embeds` gives.
        """

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            Tensor: [B, E], unit length.
        """
        return self.image_tower().embeds({"pixel_values": pixel_values})

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 = not read.

        Returns:
            Tensor: [B, E], unit length.
        """
        return self.text_tower().embeds({"input_ids": input_ids, "attention_mask": attention_mask})

    # --- losses ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def contrastive_loss(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        """The family's loss of a batch of pairs.

        Args:
            image: [B, E], unit length.
            text: [B, E], unit length.
            same: bool [B, B], True where image i and text j belong together.

        Returns:
            Tensor: a scalar.
        """

    def loss(self, task: str, batch: Batch) -> Tensor:
        """The fine-tuning loss of a task.

        Args:
            task: one of `tasks`; the classes of zero-shot are learned as captions of their images.
            batch: made by `caption_batch`.

        Returns:
            Tensor: a scalar.
        """
        owner = batch["image_index"]
        same = owner[:, None] == owner[None, :]  # another caption of the same image is no negative
        mask = batch.get("encoder_mask", batch["attention_mask"])  # pretraining may hide words
        text = self.text_embeds(batch["input_ids"], mask)
        return self.contrastive_loss(self.image_embeds(batch["pixel_values"]), text, same)

    def pretraining_loss(self, batch: Batch, itm: bool = True) -> dict[str, Tensor]:
        """The pretraining losses.

        Args:
            batch: made by `caption_batch`.
            itm: of no effect: there is no matching loss.

        Returns:
            dict[str, Tensor]: scalar "itc".
        """
        return {"itc": self.loss("retrieval", batch)}

    # --- batches ---------------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Preprocess images, or pass on float32 pixel values that already are.

        Args:
            images: B images, or float32 [B, 3, height, width].

        Returns:
            Tensor: [B, 3, height, width] on the model's device.
        """
        array = images if isinstance(images, np.ndarray) else self.processor.images(images)
        return torch.from_numpy(array).to(self.device)

    def caption_batch(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        captions: Sequence[str],
        image_index: Sequence[int],
        max_length: int | None = None,
    ) -> Batch:
        """Make the batch for pretraining, calibration and retrieval.

        Args:
            images: one per caption.
            captions: B texts.
            image_index: which image of the dataset each caption belongs to.
            max_length: tokens, None = all the model reads.

        Returns:
            Batch: tensors on the model's device.
        """
        ids, mask = self.processor.texts(captions, max_length=max_length)
        arrays = {"input_ids": ids, "attention_mask": mask, "image_index": np.asarray(image_index, np.int64)}
        batch = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        return {**batch, "pixel_values": self.pixels(images)}

    # --- tasks and files -------------------------------------------------------------------------------------------

    def head_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that `--finetune heads` trains: those outside the towers' embeddings and layers.

        Args:
            task: one of `tasks`.

        Returns:
            list[nn.Parameter]: what makes embeddings of the towers' outputs, and the temperature.
        """
        return [p for name, p in self.named_parameters() if name.startswith(self.heads)]

    def for_task(self, task: str) -> Self:
        """Copy the model for a task: each needs all of it.

        Args:
            task: one of `tasks`.

        Returns:
            Self: an independent model that offers this task only.

        Raises:
            RequestError: the family does not offer the task.
        """
        if task not in self.tasks:
            raise RequestError(f"{self.source.name} cannot do {task}: it offers {', '.join(self.tasks)}")
        clone = copy.deepcopy(self)
        clone.tasks = (task,)
        return clone

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config, weights, tokenizer and preprocessing in Hugging Face format.

        Args:
            folder: an existing folder.
            dtype: store weights in this type; None = as they are.
        """
        folder = Path(folder)
        state = {
            name: tensor.detach().to("cpu", dtype or tensor.dtype).clone().contiguous()
            for name, tensor in self.state_dict().items()
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_diff_dict()
        config["architectures"] = [self.architecture]
        config["vlprune"] = {
            "name": self.source.name,
            "random_weights": self.source.random_weights,
            "options": self.options,
        }
        if smaller := sizes(self):
            config["vlprune"]["sizes"] = smaller
        write_json(folder / "config.json", config)
        self.processor.save(folder)


def start(model: DualEncoder, seed: int, biases: bool = False) -> None:
    """Fill a model with seeded random weights (normal, std 0.02), in place.

    Args:
        model: may be on the meta device.
        seed: of the weights.
        biases: draw biases at random too, so that speed work meets no zeros; LayerNorms stay at one.
    """
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)
            if name in model.initial:
                parameter.fill_(model.initial[name])
            elif id(parameter) in norms:
                parameter.fill_(1.0)
            elif name.endswith("bias") and not biases:
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def start_vision(model: DualEncoder, seed: int) -> None:
    """Start the vision tower so that it learns from few images: sine positions, Xavier matrices, in place.

    Args:
        model: fresh.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    vision: Any = model.vision_model
    table = vision.embeddings.position_embedding.weight
    side, width = math.isqrt(len(table)), table.shape[1]
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]  # [side * side, D / 4] each
    with torch.no_grad():
        table.zero_()
        table[-side * side :] = 0.5 * torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)
        for module in vision.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
