"""CLIP (Radford et al., ICML 2021) on transformers' modules: OpenAI's checkpoints, LAION's, and any of `CLIPModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPTextTransformer, CLIPVisionTransformer

from vlprune.errors import RequestError
from vlprune.models.attention import mask_bias
from vlprune.models.dual import DualEncoder, start, step
from vlprune.models.family import Batch, Source, State, Steps
from vlprune.models.pixels import Pixels
from vlprune.models.processor import CLIP_MEAN, CLIP_STD
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
from vlprune.models.text_processor import EncoderProcessor, load_clip_tokenizer


MAX_SCALE = math.log(100)  # the authors clip the temperature there
POSITIONS = "vision_model.embeddings.position_embedding.weight"
_LARGE: dict[str, Any] = {  # ViT-L/14, as far as it differs from transformers' defaults
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}  # fmt: skip
LEGACY_EOS = 2  # configs written before the id was right: the end token is the one with the largest id


class Clip(DualEncoder):
    """CLIP: a vision transformer and a causal text transformer whose last token stands for the text.

    Args:
        config: sizes of both towers.
        processor: tokenizer and image preprocessing.
        source: where the weights come from.
    """

    family = "clip"
    architecture = "CLIPModel"
    heads = ("visual_projection.", "text_projection.", "logit_scale")
    initial = {"logit_scale": math.log(1 / 0.07)}

    def __init__(self, config: CLIPConfig, processor: EncoderProcessor, source: Source) -> None:
        super().__init__(config, processor, source)
        vision, text = config.vision_config, config.text_config
        self.vision_model = CLIPVisionTransformer(vision)
        self.text_model = CLIPTextTransformer(text)
        self._own_layers()
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(self.initial["logit_scale"]))

    @property
    def width(self) -> int:
        """Width of the joint space, E."""
        return self.visual_projection.out_features

    def image_tower(self) -> Steps:
        """Give the image tower in pieces (see `Steps`).

        Returns:
            Steps: from `pixel_values` to what `image_embeds` gives.
        """
        vision = self.vision_model

        def begin(batch: Batch) -> State:
            patches = vision.embeddings.patch_embedding(batch["pixel_values"]).flatten(2).transpose(1, 2)
            first = vision.embeddings.class_embedding.expand(patches.shape[0], 1, -1)
            x = torch.cat([first, patches], dim=1) + vision.embeddings.position_embedding.weight
            return {"x": vision.pre_layrnorm(x)}

        def finish(state: State) -> Tensor:
            return F.normalize(self.visual_projection(vision.post_layernorm(state["x"][:, 0])), dim=-1)

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
            causal = (positions[None, :] <= positions[:, None]).to(mask.dtype)
            return {"x": x, "bias": mask_bias(mask[:, None, None, :] * causal, x.dtype), "last": self._last(ids)}

        def finish(state: State) -> Tensor:
            x, last = state["x"], state["last"]
            pooled = x[torch.arange(x.shape[0], device=x.device), last]
            return F.normalize(self.text_projection(text.final_layer_norm(pooled)), dim=-1)

        return Steps(begin, [partial(step, layer) for layer in text.encoder.layers], finish)

    def _last(self, ids: Tensor) -> Tensor:
        """Find the first end token of each text [B], which padding may repeat; 0 where there is none.

        Not by argmax: for integers ONNX Runtime has none on a GPU, and copies them to the CPU and back in every run.
        Counted in floats, which TensorRT adds up, too.
        """
        end = self.config.text_config.eos_token_id
        found = (ids == (ids.amax(1, keepdim=True) if end == LEGACY_EOS else end)).float()
        return ((found.cumsum(1) == 0).float().sum(1) * found.amax(1)).long()

    def contrastive_loss(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        """Cross entropy both ways over the batch; where several texts belong to an image they share the target.

        Args:
            image: [B, E], unit length.
            text: [B, E], unit length.
            same: bool [B, B], True where image i and text j belong together.

        Returns:
            Tensor: a scalar.
        """
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_SCALE)
        logits = self.logit_scale.exp() * image @ text.T
        share = same.float()
        to_text, to_image = share / share.sum(1, keepdim=True), share.T / share.T.sum(1, keepdim=True)
        return (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_image)) / 2


def from_folder(
    folder: Path,
    raw: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: Source,
    image_size: int | None,
    smaller: Mapping[str, Sequence[int]],
) -> Clip:
    """Make a model of what is in a Hugging Face folder.

    Args:
        folder: tokenizer and preprocessing are read from it.
        raw: its config.json.
        state: its weights.
        source: for the report.
        image_size: pixels, None = the config's.
        smaller: what was cut, see `vlprune.structured.sizes`.

    Returns:
        Clip: the model.

    Raises:
        RequestError: something is missing or broken.
    """
    config = read_config(CLIPConfig, raw, folder)
    vision, text, where = config.vision_config, config.text_config, source.checkpoint
    tower = ("image_size", "patch_size")
    check_tower(vision, "vision_config", tower, state, "vision_model.encoder.layers.", where)
    tower = ("vocab_size", "max_position_embeddings")
    check_tower(text, "text_config", tower, state, "text_model.encoder.layers.", where)
    check_sizes(config, "config", ("projection_dim",), where)
    if vision.num_channels != 3:
        raise RequestError(f"{where}: vision_config has num_channels = {vision.num_channels!r:.40}, not 3")
    tokenizer = load_clip_tokenizer(folder)
    check_vocabulary(tokenizer, text.vocab_size, folder)
    told, end = text.eos_token_id, tokenizer.eos_token_id
    found = max(tokenizer.get_vocab().values()) if told == LEGACY_EOS else told
    if type(told) is not int or found != end:
        raise RequestError(
            f"{folder}/config.json: texts end at the token {told!r:.40}, the tokenizer ends them with {end}"
        )
    size = vision.image_size
    pixels = read_square(folder, Pixels(size, size, CLIP_MEAN, CLIP_STD), image_size)
    processor = EncoderProcessor(tokenizer, pixels, text.max_position_embeddings, "clip")
    return build(config, state, processor, source, smaller)


def build(
    config: CLIPConfig,
    state: Mapping[str, Tensor],
    processor: EncoderProcessor,
    source: Source,
    smaller: Mapping[str, Sequence[int]] | None = None,
) -> Clip:
    """Make a model from a state dict in Hugging Face names.

    Args:
        config: sizes.
        state: tensors.
        processor: tokenizer and preprocessing; its image size decides, position embeddings are interpolated to it.
        source: for the report.
        smaller: what was cut, see `vlprune.structured.sizes`.

    Returns:
        Clip: in eval mode, float32.

    Raises:
        RequestError: tensors are missing, unknown or of the wrong shape.
    """
    wanted = {key: tensor for key, tensor in state.items() if not key.endswith(".position_ids")}
    resize_positions(wanted, POSITIONS, config.vision_config, processor.image_size, 1, source.checkpoint)
    model = on_meta(lambda: Clip(config, processor, source), smaller or {}, source.checkpoint)
    fill(model, wanted, source.checkpoint)
    return model.eval()


def new(config: CLIPConfig, processor: EncoderProcessor, source: Source, seed: int, biases: bool = False) -> Clip:
    """Make a model with seeded random weights.

    Args:
        config: sizes.
        processor: tokenizer and preprocessing.
        source: for the report.
        seed: of the weights.
        biases: see `vlprune.models.dual.start`.

    Returns:
        Clip: in eval mode.
    """
    with torch.device("meta"):
        model = Clip(config, processor, source)
    start(model, seed, biases)
    return model.eval()


def base_random(name: str, embedded: Path, image_size: int, seed: int) -> Clip:
    """CLIP ViT-B/16 or ViT-L/14 with seeded random weights; the tokenizer is clip-tiny's, the vocabulary of full size.

    Args:
        name: alias; for the report, too.
        embedded: folder of the embedded models.
        image_size: pixels.
        seed: of the weights.

    Returns:
        Clip: no accuracy is ever shown of it.
    """
    tokenizer = load_clip_tokenizer(embedded / "clip-tiny")
    large = _LARGE if name == "clip-large-random" else {}
    config = CLIPConfig(
        vision_config={"image_size": image_size, "patch_size": 16} | large.get("vision_config", {}),
        text_config={"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        | large.get("text_config", {}),
        projection_dim=large.get("projection_dim", 512),
    )
    pixels = Pixels(image_size, image_size, CLIP_MEAN, CLIP_STD)
    processor = EncoderProcessor(tokenizer, pixels, config.text_config.max_position_embeddings, "clip")
    return new(config, processor, Source(name, f"seed {seed}", random_weights=True), seed, biases=True)
