"""BLIP (Li et al., ICML 2022): vision encoder, text encoder and text decoder on transformers' modules.

One class covers the task-agnostic pretraining model (all three parts, encoder and decoder sharing everything but
self-attention) and the single-task checkpoints of Hugging Face; which tasks a model offers follows from its parts.
Parameter names are Hugging Face's. The forward passes are our own: transformers' cross-attention ignores the mask of
the encoder, and its vision attention derives head widths from the hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipAttention, BlipVisionModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextEmbeddings,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)

from vlprune.errors import RequestError
from vlprune.files import write_json
from vlprune.models.attention import attend, mask_bias
from vlprune.models.family import Batch, Group, PrunableLayer, Source, State, Steps, Tower, Valid
from vlprune.models.processor import Processor
from vlprune.structured.surgery import reshape, sizes, tell_depth


KeysValues = list[tuple[Tensor, Tensor]]  # per layer: key and value, [B, H, S, K] each

PARTS = ("vision_model", "text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head")
PROMPT = "a picture of "
TASK_PARTS = {
    "retrieval": {"vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head"},
    "captioning": {"vision_model", "text_decoder"},
    "vqa": {"vision_model", "text_encoder", "text_decoder"},
}
_CROSS_INPUTS = {"encoder": ("input_ids", "attention_mask"), "decoder": ("decoder_ids", "decoder_mask")}
ARCHITECTURES = {  # the Hugging Face class that reads a folder with exactly these parts
    "retrieval": "BlipForImageTextRetrieval",
    "captioning": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
}


def tasks_of(parts: set[str]) -> tuple[str, ...]:
    """Tell which tasks a checkpoint with these parts was trained for.

    A decoder next to an encoder without projection heads is a question-answering model, whose decoder reads questions,
    not images: it offers no captioning.

    Args:
        parts: names out of `PARTS`.

    Returns:
        tuple[str, ...]: tasks in fixed order.
    """
    tasks = [task for task, needed in TASK_PARTS.items() if needed <= parts]
    if "text_encoder" in parts and "retrieval" not in tasks and "captioning" in tasks:
        tasks.remove("captioning")
    return tuple(tasks)


class VisionAttention(BlipAttention):
    """Self-attention over image tokens whose head count and width are its own attributes."""

    def set_units(self, shape: tuple[int, ...]) -> None:
        """Tell how many heads of what width are left; the scale of the scores stays that of the original width.

        Args:
            shape: (H, K).
        """
        self.num_heads, self.head_dim = shape

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: [B, P, D].
            **unused: arguments transformers passes on (head masks are not supported).

        Returns:
            tuple[Tensor, None]: [B, P, D], and None in place of attention maps.
        """
        batch, length, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, P, K]
        return self.projection(attend(query, key, value, self.scale, None)), None


class TextAttention(BlipTextSelfAttention):
    """Self- or cross-attention of the text towers with explicit keys, values and bias."""

    def __init__(self, config: Any, is_cross_attention: bool) -> None:
        super().__init__(config, is_cross_attention)
        self.scale = 1 / math.sqrt(self.attention_head_size)

    def set_units(self, shape: tuple[int, ...]) -> None:
        """Tell how many heads of what width are left; the scale of the scores stays that of the original width.

        Args:
            shape: (H, K).
        """
        self.num_attention_heads, self.attention_head_size = shape
        self.all_head_size = shape[0] * shape[1]

    def heads(self, states: Tensor) -> Tensor:
        """Split [B, S, H * K] into [B, H, S, K].

        Args:
            states: [B, S, H * K].

        Returns:
            Tensor: [B, H, S, K].
        """
        return states.unflatten(2, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Project the states that are attended to.

        Args:
            states: [B, S, D].

        Returns:
            tuple[Tensor, Tensor]: key and value, [B, H, S, K] each.
        """
        return self.heads(self.key(states)), self.heads(self.value(states))

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            hidden_states: [B, T, D].
            key: [B, H, S, K].
            value: [B, H, S, K].
            bias: broadcastable to [B, H, T, S], or None.

        Returns:
            Tensor: [B, T, H * K].
        """
        return attend(self.heads(self.query(hidden_states)), key, value, self.scale, bias)


def cross_keys_values(text: BlipTextModel, states: Tensor) -> KeysValues:
    """Project encoder states to the keys and values of every cross-attention.

    Args:
        text: a text tower.
        states: [B, S, D].

    Returns:
        KeysValues: per layer key and value, [B, H, S, K] each.
    """
    return [layer.crossattention.self.keys_values(states) for layer in text.encoder.layer]


def run_text(
    text: BlipTextModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    causal: bool = False,
    cross: KeysValues | None = None,
    cross_mask: Tensor | None = None,
    past: KeysValues | None = None,
) -> tuple[Tensor, KeysValues]:
    """Run a text tower.

    Args:
        text: the tower.
        input_ids: [B, T].
        attention_mask: [B, past + T], 0 = padding.
        causal: True for a decoder.
        cross: keys and values of cross-attention per layer; None leaves cross-attention out.
        cross_mask: [B, S], 0 = padding; None = all allowed.
        past: keys and values of earlier tokens per layer, [B, H, past, K] each.

    Returns:
        tuple[Tensor, KeysValues]: states [B, T, D]; keys and values of all tokens, [B, H, past + T, K] each.
    """
    start = 0 if past is None else past[0][0].shape[2]
    x = text.embeddings(input_ids=input_ids, past_key_values_length=start)
    allowed = attention_mask[:, None, None, :]
    if causal:
        rows = torch.arange(input_ids.shape[1], device=x.device) + start
        columns = torch.arange(attention_mask.shape[1], device=x.device)
        allowed = allowed * (columns[None, :] <= rows[:, None]).to(allowed.dtype)
    bias = mask_bias(allowed, x.dtype)
    cross_bias = None if cross_mask is None else mask_bias(cross_mask[:, None, None, :], x.dtype)
    present: KeysValues = []
    for index, layer in enumerate(text.encoder.layer):
        key, value = layer.attention.self.keys_values(x)
        if past is not None:
            key, value = torch.cat([past[index][0], key], dim=2), torch.cat([past[index][1], value], dim=2)
        present.append((key, value))
        x = layer.attention.output(layer.attention.self(x, key, value, bias), x)
        if cross is not None:
            context = layer.crossattention.self(x, *cross[index], cross_bias)
            x = layer.crossattention.output(context, x)
        x = layer.feed_forward_chunk(x)
    return x, present


def _vision_step(layer: Any, state: State) -> State:
    return {"x": layer(state["x"], None)}


def _text_step(layer: Any, state: State) -> State:
    x, attention = state["x"], layer.attention
    x = attention.output(attention.self(x, *attention.self.keys_values(x), state["bias"]), x)
    return {**state, "x": layer.feed_forward_chunk(x)}


def _cross_step(layer: Any, state: State) -> State:
    x, attention, cross = state["x"], layer.attention, layer.crossattention
    x = attention.output(attention.self(x, *attention.self.keys_values(x), state["bias"]), x)
    key, value = cross.self.keys_values(state["images"])
    x = cross.output(cross.self(x, key[state["owner"]], value[state["owner"]], None), x)
    return {**state, "x": layer.feed_forward_chunk(x)}


class Blip(nn.Module):
    """BLIP with the parts a checkpoint has.

    Args:
        config: sizes of both towers; `text_config.bos_token_id` is [DEC], `text_config.enc_token_id` is [ENC].
        parts: names out of `PARTS`.
        processor: tokenizer and image preprocessing.
        source: where the weights come from.

    Attributes:
        options: task -> settings of its task.json, "finetune" -> settings of the fine-tuning, where this checkpoint is
            better served by others than the authors' (kept in its config.json).
    """

    family = "blip"

    def __init__(self, config: BlipConfig, parts: set[str], processor: Processor, source: Source) -> None:
        super().__init__()
        self.options: dict[str, dict[str, Any]] = {}
        vision, text = config.vision_config, config.text_config
        self.config = config
        self.processor = processor
        self.source = source
        self.tasks = tasks_of(parts)
        self.vision_model = BlipVisionModel(vision)
        for layer in self.vision_model.encoder.layers:
            layer.self_attn = VisionAttention(vision)
        if "text_encoder" in parts:
            self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        if "text_decoder" in parts:
            self.text_decoder = BlipTextLMHeadModel(text)
        for tower in self._text_towers():
            for layer in tower.encoder.layer:
                layer.attention.self = TextAttention(text, is_cross_attention=False)
                layer.crossattention.self = TextAttention(text, is_cross_attention=True)
        if "vision_proj" in parts:
            self.vision_proj = nn.Linear(vision.hidden_size, config.image_text_hidden_size)
            self.text_proj = nn.Linear(text.hidden_size, config.image_text_hidden_size)
            # Hugging Face's class has no temperature: training then starts from the authors' initial value.
            self.temp = nn.Parameter(torch.tensor(0.07))
        if "itm_head" in parts:
            self.itm_head = nn.Linear(text.hidden_size, 2)

    def _text_towers(self) -> list[BlipTextModel]:
        towers = [self.text_encoder] if hasattr(self, "text_encoder") else []
        return [*towers, self.text_decoder.bert] if hasattr(self, "text_decoder") else towers

    @property
    def parts(self) -> set[str]:
        """Names of the parts this model has."""
        return {name for name in PARTS if hasattr(self, name)}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_model.post_layernorm.weight.device

    # --- sharing ---------------------------------------------------------------------------------------------------

    def _sharable(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs (encoder, decoder) of modules the pretraining model shares: all but self-attention."""
        if not {"text_encoder", "text_decoder"} <= self.parts:
            return []
        if len(self.text_encoder.encoder.layer) != len(self.text_decoder.bert.encoder.layer):
            return []
        pairs = []
        for (name, first), (_, second) in zip(
            self.text_encoder.named_modules(), self.text_decoder.bert.named_modules(), strict=True
        ):
            if ".attention." not in name and first._parameters:
                pairs.append((first, second))
        return pairs

    @property
    def tied(self) -> bool:
        """Whether text encoder and decoder share their weights."""
        pairs = self._sharable()
        return bool(pairs) and all(a.weight is b.weight for a, b in pairs)

    def share(self, force: bool = False) -> None:
        """Share the weights of encoder and decoder where a checkpoint holds bit-equal copies, or always with `force`.

        Sharing is all or nothing: single equal tensors (zero biases, say) of two separately trained towers stay apart.

        Args:
            force: share without looking, for new models.
        """
        pairs = self._sharable()
        if force or all(
            torch.equal(p, q)
            for a, b in pairs
            for p, q in zip(a._parameters.values(), b._parameters.values(), strict=True)
            if p is not None and q is not None
        ):
            for first, second in pairs:
                for key in first._parameters:
                    second._parameters[key] = first._parameters[key]
        if hasattr(self, "text_decoder"):
            words = self.text_decoder.bert.embeddings.word_embeddings
            head = self.text_decoder.cls.predictions
            if force or torch.equal(head.decoder.weight, words.weight):
                head.decoder.weight = words.weight
            head.decoder.bias = head.bias

    # --- pruning ---------------------------------------------------------------------------------------------------

    def layers(self) -> list[PrunableLayer]:
        """List the prunable weights: every Linear of the towers (METHODS: MULTIFLOW, BLIP).

        Projection heads, the matching head and the language-model head are not pruned. A weight that encoder and
        decoder share is one layer.

        Returns:
            list[PrunableLayer]: vision first, then text, in order of execution.
        """
        found: dict[int, PrunableLayer] = {}

        def add(name: str, linear: nn.Linear, modality: Any, tokens: Any) -> None:
            known = found.get(id(linear.weight))
            names = (*known.names, name) if known else (name,)
            modules = (*known.modules, linear) if known else (linear,)
            found[id(linear.weight)] = PrunableLayer(names[0], names, modality, modules, tokens)

        for i, layer in enumerate(self.vision_model.encoder.layers):
            for path in ("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"):
                add(f"vision_model.encoder.layers.{i}.{path}", layer.get_submodule(path), "vision", "vision")
        for prefix in ("text_encoder", "text_decoder.bert"):
            if prefix.split(".")[0] not in self.parts:
                continue
            tower: Any = self.get_submodule(prefix)
            for i, layer in enumerate(tower.encoder.layer):
                for block in ("attention", "crossattention"):
                    for path in ("self.query", "self.key", "self.value", "output.dense"):
                        from_image = block == "crossattention" and path in ("self.key", "self.value")
                        add(
                            f"{prefix}.encoder.layer.{i}.{block}.{path}",
                            layer.get_submodule(f"{block}.{path}"),
                            "text",
                            "vision" if from_image else "text",
                        )
                for path in ("intermediate.dense", "output.dense"):
                    add(f"{prefix}.encoder.layer.{i}.{path}", layer.get_submodule(path), "text", "text")
        return list(found.values())

    def groups(self) -> list[Group]:
        """List the units that structured pruning may remove.

        Returns:
            list[Group]: vision first, then text, in order of execution; what encoder and decoder share is one group.
        """
        found: dict[int, Group] = {}

        def add(name: str, kind: Any, tower: str, index: int, cross: bool, inner: Any, outer: nn.Linear) -> None:
            module = self.get_submodule(name)
            known = found.get(id(outer.weight))
            if known is not None:
                known = replace(known, names=(*known.names, name), modules=(*known.modules, module))
                found[id(outer.weight)] = replace(known, inner=known.inner + inner, outer=(*known.outer, outer))
                return
            shape: tuple[int, ...] = (outer.in_features,)
            if isinstance(module, VisionAttention):
                shape = (module.num_heads, module.head_dim)
            elif isinstance(module, TextAttention):
                shape = (module.num_attention_heads, module.attention_head_size)
            modality: Any = "vision" if tower == "vision" else "text"
            found[id(outer.weight)] = Group(
                name, (name,), kind, modality, tower, index, (module,), inner, (outer,), shape, cross
            )

        layer: Any
        for i, layer in enumerate(self.vision_model.encoder.layers):
            path, qkv = f"vision_model.encoder.layers.{i}", layer.self_attn.qkv
            inner = tuple((qkv, part) for part in range(3))
            add(f"{path}.self_attn", "attention", "vision", i, False, inner, layer.self_attn.projection)
            add(f"{path}.mlp", "ffn", "vision", i, False, ((layer.mlp.fc1, 0),), layer.mlp.fc2)
        names = self._text_names()
        for prefix, tower in zip(("text_encoder", "text_decoder.bert"), names, strict=True):
            if tower is None:
                continue
            stack: Any = self.get_submodule(f"{prefix}.encoder.layer")
            for i, layer in enumerate(stack):
                path = f"{prefix}.encoder.layer.{i}"
                for block in ("attention", "crossattention"):
                    own = layer.get_submodule(block)
                    inner = tuple((linear, 0) for linear in (own.self.query, own.self.key, own.self.value))
                    cross = block == "crossattention"
                    add(f"{path}.{block}.self", "attention", tower, i, cross, inner, own.output.dense)
                inner = ((layer.intermediate.dense, 0),)
                add(f"{path}.intermediate", "ffn", tower, i, False, inner, layer.output.dense)
        return list(found.values())

    def towers(self) -> list[Tower]:
        """List the stacks of layers that structured pruning may shorten.

        Returns:
            list[Tower]: "vision"; "text"; "decoder" where the decoder shares nothing with an encoder.
        """
        found = [Tower("vision", "vision", ("vision_model.encoder.layers",), len(self.vision_model.encoder.layers))]
        stacks: dict[str, list[str]] = {}
        for prefix, tower in zip(("text_encoder", "text_decoder.bert"), self._text_names(), strict=True):
            if tower is not None:
                stacks.setdefault(tower, []).append(f"{prefix}.encoder.layer")
        for tower, paths in stacks.items():
            stack: Any = self.get_submodule(paths[0])
            found.append(Tower(tower, "text", tuple(paths), len(stack)))
        return found

    def _text_names(self) -> tuple[str | None, str | None]:
        """Names of the towers that text encoder and decoder belong to, None for a part that is missing."""
        encoder = "text" if "text_encoder" in self.parts else None
        decoder = "text" if self.tied else "decoder"
        return encoder, decoder if "text_decoder" in self.parts else None

    def calibrate(self, batch: Batch, valid: Valid) -> None:
        """Run one calibration batch: the unimodal encoders, the positive image-text match and the language model.

        For a question-answering checkpoint the caption stands in for the question and the decoder reads its states.

        Args:
            batch: made by `caption_batch`.
            valid: `InputNorms.valid`; tells which rows are padding.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with valid(text=mask):
            states = self.image_states(batch["pixel_values"])
            decoder_states = states
            if "text_encoder" in self.parts:
                if "retrieval" in self.tasks:
                    run_text(self.text_encoder, ids, mask)
                cross = cross_keys_values(self.text_encoder, states)
                matched, _ = run_text(self.text_encoder, self._first(ids, "enc"), mask, cross=cross)
                if "captioning" not in self.tasks:
                    decoder_states = matched
        if "text_decoder" in self.parts:
            from_text = decoder_states is not states
            with valid(text=mask, vision=mask if from_text else None):
                cross = cross_keys_values(self.text_decoder.bert, decoder_states)
                run_text(
                    self.text_decoder.bert,
                    self._first(ids, "dec"),
                    mask,
                    causal=True,
                    cross=cross,
                    cross_mask=mask if from_text else None,
                )

    def image_tower(self) -> Steps:
        """Give the image tower in pieces (see `Steps`); for models that offer retrieval.

        Returns:
            Steps: from `pixel_values` to what `image_embeds` gives.
        """
        vision = self.vision_model
        return Steps(
            lambda batch: {"x": vision.embeddings(batch["pixel_values"])},
            [partial(_vision_step, layer) for layer in vision.encoder.layers],
            lambda state: self.image_embeds(vision.post_layernorm(state["x"])),
        )

    def text_tower(self) -> Steps:
        """Give the text tower, without cross-attention, in pieces (see `Steps`); for models that offer retrieval.

        Returns:
            Steps: from `input_ids` and `attention_mask` to what `text_embeds` gives.
        """

        def start(batch: Batch) -> State:
            x = self.text_encoder.embeddings(input_ids=batch["input_ids"])
            return {"x": x, "bias": mask_bias(batch["attention_mask"][:, None, None, :], x.dtype)}

        return Steps(
            start,
            [partial(_text_step, layer) for layer in self.text_encoder.encoder.layer],
            lambda state: F.normalize(self.text_proj(state["x"][:, 0]), dim=-1),
        )

    def cross_tower(self, part: Literal["encoder", "decoder"]) -> Steps:
        """Give a text tower with cross-attention in pieces (see `Steps`): how well does a caption fit an image?

        Args:
            part: "encoder" ends in the matching head's logit, "decoder" in the mean log-probability of the caption's
                tokens.

        Returns:
            Steps: from a `caption_batch`, the image tower's "x" after its last layer as `image_x` [N, P, D] and the
                image `owner` [B] of each caption, to scores [B].
        """
        encoder = part == "encoder"
        text = self.text_encoder if encoder else self.text_decoder.bert

        def start(batch: Batch) -> State:
            ids, mask = (batch[name] for name in _CROSS_INPUTS[part])
            x = text.embeddings(input_ids=self._first(ids, "enc") if encoder else ids)
            allowed = mask[:, None, None, :]
            if not encoder:
                allowed = allowed * torch.ones(2 * ids.shape[1:], dtype=mask.dtype, device=x.device).tril()
                mask = mask.clone()
                mask[:, : int(batch["prompt_length"])] = 0  # the prompt is given
            images = self.vision_model.post_layernorm(batch["image_x"])
            state = {"x": x, "bias": mask_bias(allowed, x.dtype), "images": images, "owner": batch["owner"]}
            return state if encoder else state | {"ids": ids, "counted": mask}

        def finish(state: State) -> Tensor:
            if encoder:
                logits = self.itm_head(state["x"][:, 0])
                return logits[:, 1] - logits[:, 0]
            labels, counted = state["ids"][:, 1:], state["counted"][:, 1:]
            logs = self.lm_logits(state["x"])[:, :-1].log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]
            return (logs * counted).sum(1) / counted.sum(1)

        return Steps(start, [partial(_cross_step, layer) for layer in text.encoder.layer], finish)

    # --- forward ---------------------------------------------------------------------------------------------------

    def _first(self, ids: Tensor, first: str) -> Tensor:
        ids = ids.clone()
        ids[:, 0] = self.processor.first_ids[first]
        return ids

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            Tensor: [B, P, D], the [CLS] token first.
        """
        x = self.vision_model.embeddings(pixel_values)
        for layer in self.vision_model.encoder.layers:
            x = layer(x, None)
        return self.vision_model.post_layernorm(x)

    def image_embeds(self, states: Tensor) -> Tensor:
        """Project image states to the joint space.

        Args:
            states: [B, P, D].

        Returns:
            Tensor: [B, E], unit length.
        """
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts that begin with [CLS].

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].

        Returns:
            Tensor: [B, E], unit length.
        """
        states, _ = run_text(self.text_encoder, input_ids, attention_mask)
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def itm_logits(self, input_ids: Tensor, attention_mask: Tensor, cross: KeysValues) -> Tensor:
        """Match texts that begin with [ENC] with images.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            cross: image keys and values of the text encoder's layers.

        Returns:
            Tensor: [B, 2], column 1 = match.
        """
        states, _ = run_text(self.text_encoder, input_ids, attention_mask, cross=cross)
        return self.itm_head(states[:, 0])

    def lm_logits(self, states: Tensor) -> Tensor:
        """Apply the language-model head.

        Args:
            states: [B, T, D] of the text decoder.

        Returns:
            Tensor: [B, T, V].
        """
        return self.text_decoder.cls(states)

    # --- losses ----------------------------------------------------------------------------------------------------

    def pretraining_loss(self, batch: Batch, itm: bool = True) -> dict[str, Tensor]:
        """The three pretraining losses, without the authors' momentum encoder and queue (negatives are in the batch).

        Args:
            batch: made by `caption_batch`.
            itm: False leaves out the matching loss.

        Returns:
            dict[str, Tensor]: scalars "itc", "itm", "lm" (BLIP, section 3.2).
        """
        states = self.image_states(batch["pixel_values"])
        names = ("itc", "itm") if itm else ("itc",)
        losses = dict(zip(names, self._contrastive_losses(batch, states, itm), strict=True))
        return {**losses, "lm": self._caption_loss(batch, states)}

    def loss(self, task: str, batch: Batch) -> Tensor:
        """The fine-tuning loss of a task.

        Args:
            task: "retrieval" (ITC + ITM), "captioning" (LM) or "vqa" (LM of the answers given question states).
            batch: made by `caption_batch` or `vqa_batch`.

        Returns:
            Tensor: a scalar.
        """
        states = self.image_states(batch["pixel_values"])
        if task == "retrieval":
            return torch.stack(self._contrastive_losses(batch, states)).sum()
        if task == "captioning":
            return self._caption_loss(batch, states)
        return self._answer_loss(batch, states)

    def _contrastive_losses(self, batch: Batch, image_states: Tensor, itm: bool = True) -> list[Tensor]:
        ids, owner = batch["input_ids"], batch["image_index"]
        mask = batch.get("encoder_mask", batch["attention_mask"])  # pretraining may hide words from the encoder
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        similarity = self.image_embeds(image_states) @ self.text_embeds(ids, mask).T / self.temp  # [image, text]
        same = (owner[:, None] == owner[None, :]).float()  # another caption of the same image is no negative
        target = same / same.sum(1, keepdim=True)
        itc = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        if not itm or bool(same.all()):  # of one image only there is no negative to match against
            return [itc, itc.new_zeros(())] if itm else [itc]

        # One hard negative per row, drawn by similarity among the other images' (BLIP, section 3.2, ITM).
        with torch.no_grad():
            # Without NaN, which multinomial refuses: the loss tells of it.
            weight = F.softmax(similarity.float(), 1).nan_to_num() + 1e-4
            weight_t = F.softmax(similarity.float().T, 1).nan_to_num() + 1e-4
            usable = same.sum(1) < len(owner)  # rows whose image owns the whole batch have none
            negative_text = torch.multinomial((weight * (1 - same))[usable], 1).squeeze(1)
            negative_image = torch.multinomial((weight_t * (1 - same))[usable], 1).squeeze(1)
        rows = torch.arange(len(owner), device=ids.device)
        images = torch.cat([rows, rows[usable], negative_image])
        texts = torch.cat([rows, negative_text, rows[usable]])
        cross = [(k[images], v[images]) for k, v in cross_keys_values(self.text_encoder, image_states)]
        logits = self.itm_logits(self._first(ids, "enc")[texts], mask[texts], cross)
        return [itc, F.cross_entropy(logits, (torch.arange(len(texts), device=ids.device) < len(owner)).long())]

    def _decoder_logits(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor | None) -> Tensor:
        cross = cross_keys_values(self.text_decoder.bert, states)
        out, _ = run_text(self.text_decoder.bert, ids, mask, causal=True, cross=cross, cross_mask=states_mask)
        return self.lm_logits(out)

    def _caption_loss(self, batch: Batch, image_states: Tensor) -> Tensor:
        ids, mask = batch["decoder_ids"], batch["decoder_mask"]
        logits = self._decoder_logits(ids, mask, image_states, None)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : int(batch["prompt_length"])] = -100  # the prompt is given, not learned
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)

    def _answer_loss(self, batch: Batch, image_states: Tensor) -> Tensor:
        mask = batch["attention_mask"]
        images = batch["question_image"]
        cross = [(k[images], v[images]) for k, v in cross_keys_values(self.text_encoder, image_states)]
        question, _ = run_text(self.text_encoder, batch["input_ids"], mask, cross=cross)
        owner = batch["answer_question"]  # which question an answer belongs to
        ids = batch["decoder_ids"]
        logits = self._decoder_logits(ids, batch["decoder_mask"], question[owner], mask[owner])
        labels = ids.masked_fill(batch["decoder_mask"] == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", label_smoothing=0.1).sum(1)
        return (batch["answer_weight"] * loss).sum() / len(mask)

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
        max_length: int = 35,
    ) -> Batch:
        """Make the batch for pretraining, calibration, retrieval and captioning.

        Args:
            images: one per caption.
            captions: B texts.
            image_index: which image of the dataset each caption belongs to.
            max_length: tokens.

        Returns:
            Batch: tensors on the model's device.
        """
        ids, mask = self.processor.texts(captions, "cls", max_length)
        decoder_ids, decoder_mask = self.processor.texts([PROMPT + c for c in captions], "dec", max_length)
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_ids": decoder_ids,
            "decoder_mask": decoder_mask,
            "image_index": np.asarray(image_index, np.int64),
        }
        batch = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        batch["prompt_length"] = torch.tensor(len(self.processor.prompt_ids(PROMPT)))
        batch["pixel_values"] = self.pixels(images)
        return batch

    def vqa_batch(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        question_image: Sequence[int],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        max_length: int = 35,
    ) -> Batch:
        """Make the batch for question answering.

        Several answers of one question weigh as often as they were given (BLIP's VQA training).

        Args:
            images: the images asked about, each once.
            question_image: row of `images` for each question.
            questions: B texts.
            answers: one or more per question.
            max_length: tokens of a question.

        Returns:
            Batch: tensors on the model's device.
        """
        ids, mask = self.processor.texts(questions, "enc", max_length)
        texts, owner, weight = [], [], []
        for index, given in enumerate(answers):
            for answer in dict.fromkeys(given):
                texts.append(answer)
                owner.append(index)
                weight.append(list(given).count(answer) / len(given))
        decoder_ids, decoder_mask = self.processor.texts(texts, "dec", max_length)
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_ids": decoder_ids,
            "decoder_mask": decoder_mask,
            "question_image": np.asarray(question_image, np.int64),
            "answer_question": np.asarray(owner, np.int64),
            "answer_weight": np.asarray(weight, np.float32),
        }
        batch = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        batch["pixel_values"] = self.pixels(images)
        return batch

    # --- tasks and files -------------------------------------------------------------------------------------------

    def head_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that `--finetune heads` trains: those outside the towers.

        Args:
            task: one of `tasks`.

        Returns:
            list[nn.Parameter]: unique parameters; the language-model head leaves out the word embeddings it shares.
        """
        if task == "retrieval":
            modules: list[nn.Module] = [self.vision_proj, self.text_proj, self.itm_head]
            return [p for module in modules for p in module.parameters()] + [self.temp]
        words = self.text_decoder.bert.embeddings.word_embeddings.weight
        return [p for p in self.text_decoder.cls.parameters() if p is not words]

    def for_task(self, task: str) -> Blip:
        """Copy the parts a task needs.

        Args:
            task: one of `tasks`.

        Returns:
            Blip: an independent model that offers this task only; sharing is kept.

        Raises:
            RequestError: the checkpoint lacks a part the task needs.
        """
        if task not in self.tasks:
            missing = sorted(TASK_PARTS.get(task, set()) - self.parts) or [f"training for {task}"]
            raise RequestError(
                f"{self.source.name} cannot do {task}: its checkpoint lacks {', '.join(missing)}; "
                f"it offers {', '.join(self.tasks)}"
            )
        clone = copy.deepcopy(self)
        for part in self.parts - TASK_PARTS[task]:
            delattr(clone, part)
        if task != "retrieval" and hasattr(clone, "temp"):
            del clone.temp
        clone.tasks = (task,)
        tell_depth(clone)
        return clone

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config, weights (shared ones as untied copies), tokenizer and preprocessing in Hugging Face format.

        A single-task model is read by transformers' own class, too.

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
        single = len(self.tasks) == 1
        config["architectures"] = [ARCHITECTURES[self.tasks[0]] if single else "BlipForPreTraining"]
        config["vlprune"] = {
            "name": self.source.name,
            "random_weights": self.source.random_weights,
            "options": self.options,
        }
        if smaller := sizes(self):
            config["vlprune"]["sizes"] = smaller
        write_json(folder / "config.json", config)
        self.processor.save(folder)


def build(
    config: BlipConfig,
    state: Mapping[str, Tensor],
    processor: Processor,
    source: Source,
    smaller: Mapping[str, Sequence[int]] | None = None,
) -> Blip:
    """Make a model from a state dict in Hugging Face names.

    Args:
        config: sizes.
        state: tensors; keys outside BLIP's parts (momentum copies, queues) are left out.
        processor: tokenizer and preprocessing; its image size decides, position embeddings are interpolated to it.
        source: for the report.
        smaller: what was cut, as `vlprune.structured.sizes` lists it and `checked_sizes` let pass.

    Returns:
        Blip: in eval mode, float32, weights shared where the checkpoint's copies are bit-equal.

    Raises:
        RequestError: tensors are missing, unknown or of the wrong shape.
    """
    parts = {key.split(".")[0] for key in state} & set(PARTS)
    if not tasks_of(parts):
        raise RequestError(
            f"{source.checkpoint} is no BLIP checkpoint vlprune can use: "
            f"it holds {', '.join(sorted(parts)) or 'no part'} of {', '.join(PARTS)}"
        )
    wanted = {k: v for k, v in state.items() if k.split(".")[0] in parts | {"temp"}}
    wanted = {k: v.float() for k, v in wanted.items() if not k.endswith(".position_ids")}
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    head = "text_decoder.cls.predictions."
    if words in wanted:  # files written by older transformers leave out what the head shares
        wanted.setdefault(head + "decoder.weight", wanted[words])
        if head + "bias" in wanted:
            wanted.setdefault(head + "decoder.bias", wanted[head + "bias"])
    check_config(config, wanted, source.checkpoint, smaller or {})
    resize_positions(wanted, config, processor.image_size, source.checkpoint)
    try:
        with torch.device("meta"):
            model = Blip(config, parts, processor, source)
    except Exception as error:  # transformers raises many kinds for a broken config
        why = str(error).split("\n")[0] or type(error).__name__
        raise RequestError(f"{source.checkpoint}: unusable config ({why})") from error
    if smaller:
        try:
            reshape(model, smaller)
        except RequestError as error:
            raise RequestError(f"{source.checkpoint}: {error}") from error
    expected = model.state_dict()
    if "temp" in expected:
        wanted.setdefault("temp", torch.tensor(0.07))
    missing, unknown = sorted(expected.keys() - wanted.keys()), sorted(wanted.keys() - expected.keys())
    if missing or unknown:
        what, keys = ("lacks", missing) if missing else ("holds unknown", unknown)
        raise RequestError(f"{source.checkpoint} {what} {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else ""))
    for key, tensor in expected.items():
        if tensor.shape != wanted[key].shape:
            raise RequestError(
                f"{source.checkpoint}: {key} has shape {list(wanted[key].shape)}, its config says {list(tensor.shape)}"
            )
        if not wanted[key].isfinite().all():
            raise RequestError(f"{source.checkpoint}: {key} holds NaN or infinity: it is of no use")
    model.load_state_dict({k: v.clone() for k, v in wanted.items()}, assign=True)
    return _finish(model)


def check_config(
    config: BlipConfig, state: Mapping[str, Tensor], checkpoint: str, smaller: Mapping[str, Sequence[int]]
) -> None:
    """Refuse sizes that are none, or that would build more than the checkpoint holds.

    Args:
        config: any.
        state: the checkpoint's tensors.
        checkpoint: for messages.
        smaller: what was cut, see `build`.

    Raises:
        RequestError: a field is unusable.
    """
    vision, text = config.vision_config, config.text_config
    common = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = [(vision, "vision_config", name) for name in (*common, "image_size", "patch_size")]
    fields += [(text, "text_config", n) for n in (*common, "vocab_size", "max_position_embeddings", "bos_token_id")]
    fields += [(config, "config", "image_text_hidden_size"), (text, "text_config", "encoder_hidden_size")]
    for part, where, name in fields:
        value = getattr(part, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise RequestError(f"{checkpoint}: {where} has {name} = {value!r:.40}, which is no size")
    for part, where in ((vision, "vision_config"), (text, "text_config")):
        if part.hidden_size % part.num_attention_heads:
            raise RequestError(
                f"{checkpoint}: {where} has hidden_size {part.hidden_size}, "
                f"not a multiple of its {part.num_attention_heads} heads"
            )
        if not isinstance(part.hidden_act, str):
            raise RequestError(f"{checkpoint}: {where} has hidden_act = {part.hidden_act!r:.40}, which is no name")
        if not isinstance(part.layer_norm_eps, float) or not 0 < part.layer_norm_eps < 1:
            raise RequestError(
                f"{checkpoint}: {where} has layer_norm_eps = {part.layer_norm_eps!r:.40}, no small number"
            )
    deepest: dict[str, int] = {}
    for prefix, part, where in (
        ("vision_model.encoder.layers.", vision, "vision_config"),
        ("text_encoder.encoder.layer.", text, "text_config"),
        ("text_decoder.bert.encoder.layer.", text, "text_config"),
    ):
        if not any(key.startswith(prefix.split(".")[0]) for key in state):
            continue
        held = len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
        deepest[where] = max(deepest.get(where, 0), held)
        depth = smaller.get(prefix[:-1], [part.num_hidden_layers])[0]
        if held != depth:
            raise RequestError(f"{checkpoint} holds {held} layers under {prefix[:-1]}, its config says {depth}")
    for part, where in ((vision, "vision_config"), (text, "text_config")):
        if deepest.get(where, part.num_hidden_layers) != part.num_hidden_layers:
            raise RequestError(f"{checkpoint} holds {deepest[where]} layers, its {where} says {part.num_hidden_layers}")


def _finish(model: Blip, share: bool = False) -> Blip:
    """Fill the buffers that no checkpoint holds, share weights, end in eval mode."""
    for module in model.modules():
        if isinstance(module, BlipTextEmbeddings):
            positions = torch.arange(module.position_embeddings.num_embeddings)
            module.register_buffer("position_ids", positions.expand(1, -1), persistent=False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.share(force=share)
    return model.eval()


def resize_positions(state: dict[str, Tensor], config: BlipConfig, image_size: int, checkpoint: str) -> None:
    """Interpolate position embeddings to another image size (bicubic over the patch grid), in place.

    Args:
        state: the checkpoint's tensors.
        config: its image size becomes the new one.
        image_size: pixels.
        checkpoint: for messages.

    Raises:
        RequestError: the image size does not fit the patches, or the table not its config.
    """
    key = "vision_model.embeddings.position_embedding"
    vision = config.vision_config
    if image_size % vision.patch_size:
        raise RequestError(f"--image-size {image_size} is not a multiple of the patch size {vision.patch_size}")
    grid = image_size // vision.patch_size
    if key in state and state[key].ndim == 3 and state[key].shape[1] != grid * grid + 1:
        table = state[key]
        side = vision.image_size // vision.patch_size
        if side * side != table.shape[1] - 1:
            raise RequestError(
                f"{checkpoint}: {key} has {table.shape[1]} positions; its config says {side * side + 1}, "
                f"for {vision.image_size} pixels in patches of {vision.patch_size}"
            )
        patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
        state[key] = torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    vision.image_size = image_size


def new(config: BlipConfig, processor: Processor, source: Source, seed: int, biases: bool = False) -> Blip:
    """Make a tied pretraining model with seeded random weights (normal, std 0.02, as BERT and BLIP start).

    Args:
        config: sizes.
        processor: tokenizer and preprocessing.
        source: for the report.
        seed: of the weights.
        biases: draw biases at random too, so that speed work meets no zeros; LayerNorms stay at one.

    Returns:
        Blip: in eval mode.
    """
    with torch.device("meta"):
        model = Blip(config, set(PARTS), processor, source)
    model.to_empty(device="cpu")
    model = _finish(model, share=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in (m.weight,)}
        for name, parameter in model.named_parameters():
            if name == "temp":
                parameter.fill_(0.07)
            elif id(parameter) in norms:
                parameter.fill_(1.0)
            elif name.endswith("bias") and not biases:
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def start_vision(model: Blip, seed: int) -> None:
    """Start the vision tower so that it learns from few images: sine positions, Xavier matrices, in place.

    From normal weights of std 0.02 a small vision tower tells colours from shapes only after many more steps.

    Args:
        model: fresh, made by `new`.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    table = model.vision_model.embeddings.position_embedding
    side, width = math.isqrt(table.shape[1] - 1), table.shape[2]
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]  # [side * side, D / 4] each
    with torch.no_grad():
        table.zero_()
        table[0, 1:] = 0.5 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
        for module in model.vision_model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)


# --- the authors' original files --------------------------------------------------------------------------------------

_VISION_NAMES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    ("visual_encoder.norm", "vision_model.post_layernorm"),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
)
_BLOCK_NAMES = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".proj.", ".projection."),
)


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an original BLIP `.pth` file to Hugging Face names.

    Momentum copies (`*_m.`) and queues are dropped.

    Args:
        state: the file's "model" entry.

    Returns:
        dict[str, Tensor]: renamed tensors, not copied.
    """
    renamed = {}
    for key, tensor in state.items():
        part = key.split(".")[0]
        if part.endswith("_m") or "queue" in part:
            continue
        for old, new_name in _VISION_NAMES:
            if key.startswith(old):
                key = new_name + key[len(old) :]
                if old.endswith("blocks."):
                    for inner, outer in _BLOCK_NAMES:
                        key = key.replace(inner, outer)
                break
        renamed[key] = tensor
    return renamed


def config_of(state: Mapping[str, Tensor], checkpoint: str) -> BlipConfig:
    """Read the sizes of an original checkpoint off its tensors.

    Heads are 64 wide, LayerNorm's epsilon is 1e-6 in the vision tower (the original code's value, not transformers'
    default), GELU is exact.

    Args:
        state: tensors under Hugging Face names.
        checkpoint: for error messages.

    Returns:
        BlipConfig: sizes.

    Raises:
        RequestError: a tensor that tells a size is missing or has another rank.
    """

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != rank:
            raise RequestError(f"{checkpoint} is no original BLIP checkpoint: {key} is missing or not of rank {rank}")
        return tuple(state[key].shape)

    def depth(prefix: str) -> int:
        indices = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
        return len(indices)

    tower = "text_encoder." if any(k.startswith("text_encoder.") for k in state) else "text_decoder.bert."
    positions = shape("vision_model.embeddings.position_embedding", 3)
    patch = shape("vision_model.embeddings.patch_embedding.weight", 4)
    vision_ffn = shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    words = shape(f"{tower}embeddings.word_embeddings.weight", 2)
    text_ffn = shape(f"{tower}encoder.layer.0.intermediate.dense.weight", 2)
    max_positions = shape(f"{tower}embeddings.position_embeddings.weight", 2)
    return BlipConfig(
        vision_config={
            "hidden_size": positions[2],
            "intermediate_size": vision_ffn[0],
            "num_hidden_layers": depth("vision_model.encoder.layers."),
            "num_attention_heads": max(1, positions[2] // 64),
            "patch_size": patch[3],
            "image_size": math.isqrt(max(positions[1] - 1, 1)) * patch[3],
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": words[0],
            "hidden_size": words[1],
            "intermediate_size": text_ffn[0],
            "num_hidden_layers": depth(f"{tower}encoder.layer."),
            "num_attention_heads": max(1, words[1] // 64),
            "max_position_embeddings": max_positions[0],
            "encoder_hidden_size": positions[2],
            "bos_token_id": words[0] - 2,
            "enc_token_id": words[0] - 1,
            "sep_token_id": 102,
            "eos_token_id": 102,
            "pad_token_id": 0,
            "layer_norm_eps": 1e-12,
            "label_smoothing": 0.1,
        },
        image_text_hidden_size=state["vision_proj.weight"].shape[0] if "vision_proj.weight" in state else 256,
    )
