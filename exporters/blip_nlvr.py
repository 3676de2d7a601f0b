"""The graphs of BLIP for two images (names and shapes: see `graphs`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlprune.errors import RequestError
from vlprune.exporters.blip import TEXT
from vlprune.exporters.graphs import Axes, Graph, as_function
from vlprune.models.blip_nlvr import BlipNlvr
from vlprune.runtime.generate import Graph as GraphFunction
from vlprune.tasks import get_task


class ImageEncoder(Graph):
    """Images to states."""

    def __init__(self, model: BlipNlvr) -> None:
        size = model.processor.image_size
        inputs: dict[str, Axes] = {"pixel_values": ("batch", 3, size, size)}
        super().__init__(model, ("vision_model",), inputs, {"image_states": _states_axes(model)})

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Encode.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            dict[str, Tensor]: image_states [B, P, D].
        """
        return {"image_states": self.model.image_states(pixel_values)}


class PairClassifier(Graph):
    """Sentences that begin with [ENC], and two images for each, to logits."""

    def __init__(self, model: BlipNlvr) -> None:
        inputs = {**TEXT, "image_states.0": _states_axes(model), "image_states.1": _states_axes(model)}
        super().__init__(model, ("text_encoder", "cls_head"), inputs, {"logits": ("batch", 2)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_states: list[Tensor]) -> dict[str, Tensor]:
        """Judge.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            image_states: of the first and the second images, [B, P, D] each.

        Returns:
            dict[str, Tensor]: logits [B, 2], column 1 = true.
        """
        return {"logits": self.model.logits(input_ids, attention_mask, image_states)}


def graphs(model: BlipNlvr, task: str) -> dict[str, Graph]:
    """Make the graphs of reasoning about two images: arrays in and out, int64 for ids and masks, float32 for the rest.

        image_encoder    pixel_values -> image_states
        pair_classifier  input_ids, attention_mask, image_states.0, image_states.1 -> logits

    Args:
        model: its weights are shared, not copied.
        task: "nlvr".

    Returns:
        dict[str, Graph]: by name, in eval mode (and so is the model from now on).

    Raises:
        RequestError: the model does not offer the task.
    """
    if task not in model.tasks:
        raise RequestError(f"{model.source.name} has no graphs for {task}: it offers {', '.join(model.tasks)}")
    model.eval()
    return {"image_encoder": ImageEncoder(model).eval(), "pair_classifier": PairClassifier(model).eval()}


def torch_graphs(model: BlipNlvr, task: str) -> dict[str, GraphFunction]:
    """Run the graphs in PyTorch, on the model's device.

    Args:
        model: put in eval mode; later changes of its weights show in the results.
        task: "nlvr".

    Returns:
        dict[str, GraphFunction]: callables from named arrays to named arrays, as onnxruntime's of the exported files.
    """
    return {name: as_function(graph) for name, graph in graphs(model, task).items()}


def task_spec(model: BlipNlvr, task: str, **options: Any) -> dict[str, Any]:
    """Make the task.json of a model.

    Args:
        model: its processor tells the token ids.
        task: "nlvr".
        **options: of `vlprune.tasks.nlvr.make_spec`.

    Returns:
        dict[str, Any]: the spec.
    """
    options = {"max_length": model.max_length, **options}
    return {**get_task(task).make_spec(model.processor, **options), "image_tokens": _tokens(model)}


def _tokens(model: BlipNlvr) -> int:
    return model.vision_model.embeddings.position_embedding.shape[1]


def _states_axes(model: BlipNlvr) -> Axes:
    return ("batch", _tokens(model), model.vision_model.post_layernorm.normalized_shape[0])
