"""BLIP's graphs per task (names and shapes: see `graphs`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlprune.errors import RequestError
from vlprune.exporters.graphs import Axes, Graph, as_function, indexed
from vlprune.models.blip import Blip, KeysValues, cross_keys_values, run_text
from vlprune.runtime.generate import Graph as GraphFunction
from vlprune.tasks import get_task


TEXT: dict[str, Axes] = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length")}


class ImageEncoder(Graph):
    """Images to states [B, P, D], and with `embeds` to unit vectors [B, E]."""

    def __init__(self, model: Blip, embeds: bool) -> None:
        outputs: dict[str, Axes] = {"image_states": _states_axes(model)}
        if embeds:
            outputs["image_embeds"] = ("batch", model.vision_proj.out_features)
        parts = ("vision_model", "vision_proj") if embeds else ("vision_model",)
        super().__init__(model, parts, _pixel_axes(model), outputs)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Encode.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            dict[str, Tensor]: image_states [B, P, D] and, where declared, image_embeds [B, E].
        """
        states = self.model.image_states(pixel_values)
        outputs = {"image_states": states}
        if "image_embeds" in self.outputs:
            outputs["image_embeds"] = self.model.image_embeds(states)
        return outputs


class ImageKeysValues(Graph):
    """Images to what the decoder's cross-attention reads."""

    def __init__(self, model: Blip) -> None:
        outputs = indexed(("cross_key", "cross_value"), _cross_axes(model, _image_tokens(model)))
        super().__init__(model, ("vision_model", "text_decoder"), _pixel_axes(model), outputs)

    def forward(self, pixel_values: Tensor) -> dict[str, list[Tensor]]:
        """Encode.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            dict[str, list[Tensor]]: cross_key and cross_value per layer, [B, H, P, K] each.
        """
        states = self.model.image_states(pixel_values)
        return _listed("cross", cross_keys_values(self.model.text_decoder.bert, states))


class TextEncoder(Graph):
    """Texts that begin with [CLS] to unit vectors."""

    def __init__(self, model: Blip) -> None:
        outputs: dict[str, Axes] = {"text_embeds": ("batch", model.text_proj.out_features)}
        super().__init__(model, ("text_encoder", "text_proj"), TEXT, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].

        Returns:
            dict[str, Tensor]: text_embeds [B, E].
        """
        return {"text_embeds": self.model.text_embeds(input_ids, attention_mask)}


class Matcher(Graph):
    """Texts that begin with [ENC], and images, to match logits."""

    def __init__(self, model: Blip) -> None:
        inputs = {**TEXT, "image_states": _states_axes(model)}
        super().__init__(model, ("text_encoder", "itm_head"), inputs, {"itm_logits": ("batch", 2)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> dict[str, Tensor]:
        """Match.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            image_states: [B, P, D].

        Returns:
            dict[str, Tensor]: itm_logits [B, 2].
        """
        cross = cross_keys_values(self.model.text_encoder, image_states)
        return {"itm_logits": self.model.itm_logits(input_ids, attention_mask, cross)}


class QuestionEncoder(Graph):
    """Questions that begin with [ENC], and images, to what the answer decoder's cross-attention reads."""

    def __init__(self, model: Blip) -> None:
        inputs = {**TEXT, "image_states": _states_axes(model)}
        outputs = indexed(("cross_key", "cross_value"), _cross_axes(model, "length"))
        super().__init__(model, ("text_encoder", "text_decoder"), inputs, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> dict[str, list[Tensor]]:
        """Encode.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            image_states: [B, P, D].

        Returns:
            dict[str, list[Tensor]]: cross_key and cross_value per layer, [B, H, T, K] each.
        """
        text = self.model.text_encoder
        states, _ = run_text(text, input_ids, attention_mask, cross=cross_keys_values(text, image_states))
        return _listed("cross", cross_keys_values(self.model.text_decoder.bert, states))


class Decoder(Graph):
    """Tokens to logits with a key/value cache: an empty cache makes it read a whole prompt at once."""

    def __init__(self, model: Blip) -> None:
        def cache(size: str) -> list[Axes]:
            return [("batch", heads, size, width) for heads, width in past_shapes(model)]

        inputs = {
            "input_ids": ("batch", "length"),
            "attention_mask": ("batch", "past + length"),
            "cross_mask": ("batch", "states"),
            **indexed(("past_key", "past_value"), cache("past")),
            **indexed(("cross_key", "cross_value"), _cross_axes(model, "states")),
        }
        outputs = {
            "logits": ("batch", "length", model.text_decoder.cls.predictions.decoder.out_features),
            **indexed(("present_key", "present_value"), cache("past + length")),
        }
        super().__init__(model, ("text_decoder",), inputs, outputs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cross_mask: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
        cross_key: list[Tensor],
        cross_value: list[Tensor],
    ) -> dict[str, Tensor | list[Tensor]]:
        """Read tokens.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T].
            cross_mask: [B, S].
            past_key: per layer [B, H, past, K].
            past_value: per layer [B, H, past, K].
            cross_key: per layer [B, H, S, K].
            cross_value: per layer [B, H, S, K].

        Returns:
            dict[str, Tensor | list[Tensor]]: logits [B, T, V]; present_key and present_value per layer,
                [B, H, past + T, K] each.
        """
        states, present = run_text(
            self.model.text_decoder.bert,
            input_ids,
            attention_mask,
            causal=True,
            cross=list(zip(cross_key, cross_value, strict=True)),
            cross_mask=cross_mask,
            past=list(zip(past_key, past_value, strict=True)),
        )
        return {"logits": self.model.lm_logits(states), **_listed("present", present)}


def graphs(model: Blip, task: str) -> dict[str, Graph]:
    """Make the graphs of a task: arrays in and out, int64 for ids and masks, float32 for the rest.

        retrieval   image_encoder     pixel_values -> image_states, image_embeds
                    text_encoder      input_ids, attention_mask -> text_embeds
                    itm               input_ids, attention_mask, image_states -> itm_logits
        captioning  image_encoder     pixel_values -> cross_key.{l}, cross_value.{l}
                    text_decoder      (see `Decoder`)
        vqa         image_encoder     pixel_values -> image_states
                    question_encoder  input_ids, attention_mask, image_states -> cross_key.{l}, cross_value.{l}
                    answer_decoder    as text_decoder

    Args:
        model: its weights are shared, not copied.
        task: one of `model.tasks`.

    Returns:
        dict[str, Graph]: by name, in eval mode (and so is the model from now on).

    Raises:
        RequestError: the model does not offer the task.
    """
    if task not in model.tasks:
        raise RequestError(f"{model.source.name} has no graphs for {task}: it offers {', '.join(model.tasks)}")
    found: dict[str, Graph]
    if task == "retrieval":
        found = {"image_encoder": ImageEncoder(model, True), "text_encoder": TextEncoder(model), "itm": Matcher(model)}
    elif task == "captioning":
        found = {"image_encoder": ImageKeysValues(model), "text_decoder": Decoder(model)}
    else:
        found = {
            "image_encoder": ImageEncoder(model, False),
            "question_encoder": QuestionEncoder(model),
            "answer_decoder": Decoder(model),
        }
    model.eval()
    return {name: graph.eval() for name, graph in found.items()}


def torch_graphs(model: Blip, task: str) -> dict[str, GraphFunction]:
    """Run the graphs of a task in PyTorch, on the model's device.

    Args:
        model: put in eval mode; later changes of its weights show in the results.
        task: one of `model.tasks`.

    Returns:
        dict[str, GraphFunction]: callables from named arrays to named arrays, as onnxruntime's of the exported files.
    """
    return {name: as_function(graph) for name, graph in graphs(model, task).items()}


def task_spec(model: Blip, task: str, **options: Any) -> dict[str, Any]:
    """Make the task.json of a model.

    Args:
        model: its processor tells the token ids, its decoder the shapes of the cache.
        task: one of `model.tasks`.
        **options: of the task's `make_spec` (vlprune.tasks); `answers` (a list, or None = generate) for vqa.

    Returns:
        dict[str, Any]: the spec.
    """
    if task != "retrieval":
        options["past_shapes"] = past_shapes(model)
    spec = get_task(task).make_spec(model.processor, **options)
    return {**spec, "image_tokens": _image_tokens(model)}


def past_shapes(model: Blip) -> list[tuple[int, int]]:
    """Number and width of the heads of the decoder's self-attention.

    Args:
        model: one with a decoder.

    Returns:
        list[tuple[int, int]]: (H, K) per layer.
    """
    attentions = [layer.attention.self for layer in model.text_decoder.bert.encoder.layer]
    return [(attention.num_attention_heads, attention.attention_head_size) for attention in attentions]


def _image_tokens(model: Blip) -> int:
    return model.vision_model.embeddings.position_embedding.shape[1]


def _pixel_axes(model: Blip) -> dict[str, Axes]:
    size = model.processor.image_size
    return {"pixel_values": ("batch", 3, size, size)}


def _states_axes(model: Blip) -> Axes:
    return ("batch", _image_tokens(model), model.vision_model.post_layernorm.normalized_shape[0])


def _cross_axes(model: Blip, tokens: str | int) -> list[Axes]:
    """Axes of the keys (and values) that the decoder's cross-attention reads, per layer."""
    attentions = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
    return [("batch", a.num_attention_heads, tokens, a.attention_head_size) for a in attentions]


def _listed(prefix: str, pairs: KeysValues) -> dict[str, list[Tensor]]:
    return {f"{prefix}_key": [key for key, _ in pairs], f"{prefix}_value": [value for _, value in pairs]}
