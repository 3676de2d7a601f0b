"""The graphs of a model with two encoders, CLIP's and SigLIP's alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlprune.errors import RequestError
from vlprune.exporters.graphs import Axes, Graph, as_function
from vlprune.models.dual import DualEncoder
from vlprune.runtime.generate import Graph as GraphFunction
from vlprune.tasks import get_task


class ImageEncoder(Graph):
    """Images to unit vectors."""

    def __init__(self, model: DualEncoder) -> None:
        size = model.processor.image_size
        inputs: dict[str, Axes] = {"pixel_values": ("batch", 3, size, size)}
        parts = [name for name, _ in model.named_children() if name.startswith("vis")]
        super().__init__(model, parts, inputs, {"image_embeds": ("batch", model.width)})

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Encode.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            dict[str, Tensor]: image_embeds [B, E].
        """
        return {"image_embeds": self.model.image_embeds(pixel_values)}


class TextEncoder(Graph):
    """Texts to unit vectors."""

    def __init__(self, model: DualEncoder) -> None:
        # SigLIP reads texts of one length only: its last position stands for the text.
        length: str | int = model.processor.length if model.family == "siglip" else "length"
        inputs: dict[str, Axes] = {"input_ids": ("batch", length), "attention_mask": ("batch", length)}
        parts = [name for name, _ in model.named_children() if name.startswith("text")]
        super().__init__(model, parts, inputs, {"text_embeds": ("batch", model.width)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].

        Returns:
            dict[str, Tensor]: text_embeds [B, E].
        """
        return {"text_embeds": self.model.text_embeds(input_ids, attention_mask)}


def graphs(model: DualEncoder, task: str) -> dict[str, Graph]:
    """Make the graphs of a task, the same for all: arrays in and out, int64 for ids and masks, float32 for the rest.

        image_encoder     pixel_values -> image_embeds
        text_encoder      input_ids, attention_mask -> text_embeds

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
    model.eval()
    return {"image_encoder": ImageEncoder(model).eval(), "text_encoder": TextEncoder(model).eval()}


def torch_graphs(model: DualEncoder, task: str) -> dict[str, GraphFunction]:
    """Run the graphs of a task in PyTorch, on the model's device.

    Args:
        model: put in eval mode; later changes of its weights show in the results.
        task: one of `model.tasks`.

    Returns:
        dict[str, GraphFunction]: callables from named arrays to named arrays, as onnxruntime's of the exported files.
    """
    return {name: as_function(graph) for name, graph in graphs(model, task).items()}


def task_spec(model: DualEncoder, task: str, **options: Any) -> dict[str, Any]:
    """Make the task.json of a model.

    Args:
        model: its processor tells the token ids and the length of texts.
        task: one of `model.tasks`.
        **options: of the task's `make_spec` (vlprune.tasks).

    Returns:
        dict[str, Any]: the spec.
    """
    options = {"max_length": model.processor.length, **options}
    if task == "retrieval":
        options["rerank"] = 0  # there is no matching head
    return get_task(task).make_spec(model.processor, **options)
