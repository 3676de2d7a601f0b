"""SigLIP (Zhai et al., ICCV 2023) on transformers' modules: any checkpoint of `SiglipModel`.

The vision tower ends in an attention pooling: one learned query over all patches, then a small network. Like CLIP's
projection it belongs to the head: it is neither pruned nor cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipConfig
from transformers.models.siglip.modeling_siglip import SiglipTextTransformer, SiglipVisionTransformer

from vlprune.errors import RequestError
from vlprune.models.attention import attend, mask_bias
from vlprune.models.dual import DualEncoder, step
from vlprune.models.family import Batch, Source, State, Steps
from vlprune.models.pixels import Pixels
from vlprune.models.states import (
    check_sizes,
    check_tower,
    check_vocabulary,
    fill,
    on_meta,
    read_config,
    read_square,
    resize_positions,
)
from vlprune.models.text_processor import EncoderProcessor, load_siglip_tokenizer


POSITIONS = "vision_model.embeddings.position_embedding.weight"
HALF = (0.5, 0.5, 0.5)


class Siglip(DualEncoder):
    """SigLIP: a vision transformer; a text transformer that reads padding, too, and whose last token tells the text.

    Args:
        config: sizes of both towers.
        processor: tokenizer and image preprocessing.
        source: where the weights come from.
    """

    family = "siglip"
    architecture = "SiglipModel"
    heads = ("vision_model.head.", "text_model.head.", "logit_scale", "logit_bias")
    initial = {"logit_scale": math.log(10), "logit_bias": -10.0}  # the authors'

    def __init__(self, config: SiglipConfig, processor: EncoderProcessor, source: Source) -> None:
        super().__init__(config, processor, source)
        self.vision_model = SiglipVisionTransformer(config.vision_config)
        self.text_model = SiglipTextTransformer(config.text_config)
        self._own_layers()
        self.logit_scale = nn.Parameter(torch.tensor([self.initial["logit_scale"]]))
        self.logit_bias = nn.Parameter(torch.tensor([self.initial["logit_bias"]]))

    @property
    def width(self) -> int:
        """Width of the joint space, E."""
        return self.text_model.head.out_features

    def image_tower(self) -> Steps:
        """Give the image tower in pieces (see `Steps`).

        Returns:
            Steps: from `pixel_values` to what `image_embeds` gives.
        """
        vision = self.vision_model

        def begin(batch: Batch) -> State:
            patches = vision.embeddings.patch_embedding(batch["pixel_values"]).flatten(2).transpose(1, 2)
            return {"x": patches + vision.embeddings.position_embedding.weight}

        def finish(state: State) -> Tensor:
            return F.normalize(_pool(vision.head, vision.post_layernorm(state["x"])), dim=-1)

        return Steps(begin, [partial(step, layer) for layer in vision.encoder.layers], finish)

    def text_tower(self) -> Steps:
        """Give the text tower in pieces (see `Steps`).

        Returns:
            Steps: from `input_ids` and `attention_mask` to what `text_embeds` gives.
        """
        text = self.text_model

        def begin(batch: Batch) -> State:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            positions = torch.arange(ids.shape[1], device=ids.device)
            x = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(positions)
            return {"x": x, "bias": mask_bias(mask[:, None, None, :], x.dtype)}

        def finish(state: State) -> Tensor:
            return F.normalize(text.head(text.final_layer_norm(state["x"][:, -1])), dim=-1)

        return Steps(begin, [partial(step, layer) for layer in text.encoder.layers], finish)

    def contrastive_loss(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        """A sigmoid per pair: does this text belong to this image (the authors' equation 1).

        Args:
            image: [B, E], unit length.
            text: [B, E], unit length.
            same: bool [B, B], True where image i and text j belong together.

        Returns:
            Tensor: a scalar.
        """
        logits = self.logit_scale.exp() * image @ text.T + self.logit_bias
        return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)


def _pool(head: Any, x: Tensor) -> Tensor:
    """Pool tokens [B, P, D] to [B, D], as transformers does; written out, since the exported graph shows it."""
    attention, width = head.attention, x.shape[-1]

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = heads(F.linear(head.probe, weight[:width], bias[:width]))  # [1, H, 1, K]
    key = heads(F.linear(x, weight[width : 2 * width], bias[width : 2 * width]))
    value = heads(F.linear(x, weight[2 * width :], bias[2 * width :]))
    pooled = attention.out_proj(attend(query, key, value, attention.head_dim**-0.5, None))
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def from_folder(
    folder: Path,
    raw: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: Source,
    image_size: int | None,
    smaller: Mapping[str, Sequence[int]],
) -> Siglip:
    """Make a model of what is in a Hugging Face folder.

    Args:
        folder: tokenizer and preprocessing are read from it.
        raw: its config.json.
        state: its weights.
        source: for the report.
        image_size: pixels, None = the config's.
        smaller: what was cut, see `vlprune.structured.sizes`.

    Returns:
        Siglip: the model.

    Raises:
        RequestError: something is missing or broken.
    """
    config = read_config(SiglipConfig, raw, folder)
    vision, text, where = config.vision_config, config.text_config, source.checkpoint
    tower = ("image_size", "patch_size")
    check_tower(vision, "vision_config", tower, state, "vision_model.encoder.layers.", where)
    tower = ("vocab_size", "max_position_embeddings")
    check_tower(text, "text_config", tower, state, "text_model.encoder.layers.", where)
    check_sizes(text, "text_config", ("projection_size",), where)
    if vision.num_channels != 3:
        raise RequestError(f"{where}: vision_config has num_channels = {vision.num_channels!r:.40}, not 3")
    if getattr(vision, "vision_use_head", True) is not True:
        raise RequestError(f"{where} has no pooling head: it embeds no images")
    if text.projection_size != vision.hidden_size:
        raise RequestError(
            f"{where}: texts become vectors of {text.projection_size} numbers, images of {vision.hidden_size}"
        )
    tokenizer = load_siglip_tokenizer(folder)
    check_vocabulary(tokenizer, text.vocab_size, folder)
    size = vision.image_size
    pixels = read_square(folder, Pixels(size, None, HALF, HALF), image_size)
    processor = EncoderProcessor(tokenizer, pixels, text.max_position_embeddings, "siglip")
    return build(config, state, processor, source, smaller)


def build(
    config: SiglipConfig,
    state: Mapping[str, Tensor],
    processor: EncoderProcessor,
    source: Source,
    smaller: Mapping[str, Sequence[int]] | None = None,
) -> Siglip:
    """Make a model from a state dict in Hugging Face names.

    Args:
        config: sizes.
        state: tensors.
        processor: tokenizer and preprocessing; its image size decides, position embeddings are interpolated to it.
        source: for the report.
        smaller: what was cut, see `vlprune.structured.sizes`.

    Returns:
        Siglip: in eval mode, float32.

    Raises:
        RequestError: tensors are missing, unknown or of the wrong shape.
    """
    wanted = {key: tensor for key, tensor in state.items() if not key.endswith(".position_ids")}
    resize_positions(wanted, POSITIONS, config.vision_config, processor.image_size, 0, source.checkpoint)
    model = on_meta(lambda: Siglip(config, processor, source), smaller or {}, source.checkpoint)
    fill(model, wanted, source.checkpoint)
    return model.eval()
