"""The tasks a model is scored on: retrieval, captioning, question answering, classification, reasoning.

Evaluation sees only graphs (callables from named arrays to named arrays), so the same code scores PyTorch modules and
exported ONNX files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from vlprune.errors import RequestError
from vlprune.tasks import captioning, classification, nlvr, retrieval, vqa, zero_shot
from vlprune.tasks.common import Graphs, Processor, Spec
from vlprune.tasks.metrics import Scores


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as on the command line.
        summary: one line for listings.
        primary: the metric that stands for the task where one number is needed.
        make_spec: builds its task.json from a processor and options.
        evaluate: scores graphs on data.
    """

    name: str
    summary: str
    primary: str
    make_spec: Callable[..., dict[str, Any]]
    evaluate: Callable[..., Scores]


TASKS = {
    task.name: task
    for task in (
        Task(
            "retrieval",
            "find the text of an image and the image of a text",
            "mean_r1",
            retrieval.make_spec,
            retrieval.evaluate,
        ),
        Task("captioning", "describe an image", "cider", captioning.make_spec, captioning.evaluate),
        Task("vqa", "answer a question about an image", "accuracy", vqa.make_spec, vqa.evaluate),
        Task(
            "zero-shot",
            "tell the class of an image from the classes' names",
            "top1",
            zero_shot.make_spec,
            zero_shot.evaluate,
        ),
        Task(
            "classification",
            "tell which of the classes it was trained on an image is of",
            "top1",
            classification.make_spec,
            classification.evaluate,
        ),
        Task("nlvr", "tell whether a sentence is true of two images", "accuracy", nlvr.make_spec, nlvr.evaluate),
    )
}
PRIMARY = {task.name: task.primary for task in TASKS.values()}

__all__ = ["PRIMARY", "TASKS", "Scores", "Task", "evaluate", "get_task"]


def get_task(name: str) -> Task:
    """Look a task up.

    Args:
        name: of the task.

    Returns:
        Task: the task.

    Raises:
        RequestError: there is no such task.
    """
    if name not in TASKS:
        close = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(TASKS)}"
        raise RequestError(f"unknown task {name!r}: {hint}")
    return TASKS[name]


def evaluate(
    task: str, graphs: Graphs, spec: Spec, processor: Processor, data: Any, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Score a model on a task.

    Args:
        task: name of the task.
        graphs: the graphs of the task, by name.
        spec: its task.json.
        processor: turns images and texts into model inputs.
        data: what the task reads, see `vlprune.data.KINDS`.
        batch_size: samples per call of a graph.
        seed: of the bootstrap.

    Returns:
        Scores: values, intervals and per-sample outputs.

    Raises:
        RequestError: unknown task, or no samples.
    """
    chosen = get_task(task)
    if not data.samples:
        raise RequestError(f"{data.name} has no samples to score {task} on: check its file")
    return chosen.evaluate(graphs, spec, processor, data, batch_size=batch_size, seed=seed)
