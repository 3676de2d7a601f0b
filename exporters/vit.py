"""The graph of a vision transformer that classifies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlprune.errors import RequestError
from vlprune.exporters.graphs import Graph, as_function
from vlprune.models.vit import Vit
from vlprune.runtime.generate import Graph as GraphFunction
from vlprune.tasks import get_task


class ImageClassifier(Graph):
    """Images to logits."""

    def __init__(self, model: Vit) -> None:
        size = model.processor.image_size
        super().__init__(
            model,
            (model.config.model_type, *model.heads),
            {"pixel_values": ("batch", 3, size, size)},
            {"logits": ("batch", len(model.labels))},
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            dict[str, Tensor]: logits [B, classes].
        """
        return {"logits": self.model.logits(pixel_values)}


def graphs(model: Vit, task: str) -> dict[str, Graph]:
    """Make the graph of classification, `image_classifier`: pixel_values -> logits.

    Args:
        model: its weights are shared, not copied.
        task: "classification".

    Returns:
        dict[str, Graph]: by name, in eval mode (and so is the model from now on).

    Raises:
        RequestError: the model does not offer the task.
    """
    if task not in model.tasks:
        raise RequestError(f"{model.source.name} has no graphs for {task}: it offers {', '.join(model.tasks)}")
    model.eval()
    return {"image_classifier": ImageClassifier(model).eval()}


def torch_graphs(model: Vit, task: str) -> dict[str, GraphFunction]:
    """Run the graph in PyTorch, on the model's device.

    Args:
        model: put in eval mode; later changes of its weights show in the results.
        task: "classification".

    Returns:
        dict[str, GraphFunction]: callable from named arrays to named arrays, as onnxruntime's of the exported file.
    """
    return {name: as_function(graph) for name, graph in graphs(model, task).items()}


def task_spec(model: Vit, task: str, **options: Any) -> dict[str, Any]:
    """Make the task.json of a model.

    Args:
        model: its processor tells the image size, its config the labels.
        task: "classification".
        **options: of `vlprune.tasks.classification.make_spec`.

    Returns:
        dict[str, Any]: the spec.
    """
    return get_task(task).make_spec(model.processor, model.labels, **options)
