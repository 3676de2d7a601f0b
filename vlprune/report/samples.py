"""A few test samples with what each variant made of them, so that people see what a score means.

The outputs of the first `CANDIDATES` test samples stay in the records of the stages that scored them. Shown are those
on which models disagree (the fine-tuned ones, where there are any), in the order of the data, then the first on which
they agree: a selection with more errors than the data have, which is why every row tells on how many of how many they
disagree.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlprune.data import CaptionData, ClassData, Data, NlvrData, VqaData


CANDIDATES = 200  # of which the shown ones are chosen
SHOWN = 6  # per task
SIDE = 160  # pixels of a thumbnail's longer side
LENGTH = 300  # of a text
WHERE = ("variant", "runtime", "provider", "precision", "packed", "weights")  # keys of a row of metrics
# What retrieval is asked in turn: the text of an image, the image of a text.
VIEWS = {"retrieval": ("text", "image")}


def choose_samples(
    task: str, data: Data, scored: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Choose samples of a task and gather their outputs.

    Args:
        task: the task.
        data: its test data.
        scored: per evaluation, its row of metrics and its first outputs, as `vlprune.tasks.evaluate` gives them.

    Returns:
        tuple[list[dict[str, Any]], list[int]]: rows of `vlprune.report.schema.Sample`, which name images by
            `image_file`; the indices of these images.
    """
    count = min((len(outputs) for _, outputs in scored), default=0)
    views = VIEWS.get(task, ("",))
    rows = []
    for view in views:
        found = [_sample(task, view, data, index, scored) for index in range(count)]
        differing = sum(row["differs"] for row in found)
        found.sort(key=lambda row: not row["differs"])  # the order of the data stays
        for row in found[: SHOWN // len(views)]:
            rows.append(row | {"differing": differing, "candidates": count})
    shown = {image for row in rows for image in _images(row)}
    for row in rows:
        row["images"] = [image_file(task, image) for image in row["images"]]
        for part in (row, *row["outputs"]):
            if "image" in part:
                part["image"] = image_file(task, part["image"])
    return rows, sorted(shown)


def image_file(task: str, index: int) -> str:
    """Name the thumbnail of an image.

    Args:
        task: whose data it is of.
        index: of the image in these data.

    Returns:
        str: path inside the run directory.
    """
    return f"samples/{task}/{index}.jpg"


def write_thumbnail(image: Image.Image, path: Path) -> None:
    """Write a small JPEG of an image, with none of its metadata.

    Args:
        image: RGB.
        path: the file.
    """
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    small.info = {}  # Pillow would write a comment again
    small.save(path, "JPEG", quality=82)


def _sample(
    task: str,
    view: str,
    data: Data,
    index: int,
    scored: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
) -> dict[str, Any]:
    """One row, images by their index."""
    outputs = []
    for metrics, given in scored:
        where = {key: metrics[key] for key in WHERE if key in metrics}
        outputs.append(where | _answer(task, view, given[index]))
    tuned = [output for output in outputs if output["variant"].endswith("-finetuned")]
    wrong = [output for output in tuned or outputs if output.get("correct") != 1]
    answers = {(output["text"], output.get("image")) for output in wrong}
    return {
        "task": task,
        "dataset": data.name,
        "sample": index,
        **_question(view, data, index),
        "outputs": outputs,
        "differs": len(answers) + (len(wrong) < len(tuned or outputs)) > 1,  # a right answer is like any other
    }


def _question(view: str, data: Data, index: int) -> dict[str, Any]:
    """What the model is given, and what is right."""
    if isinstance(data, CaptionData):
        captions = [_short(caption) for caption in data.captions[index]]
        if view == "image":
            return {"images": [], "question": captions[0], "expected": [], "image": index}
        return {"images": [index], "question": "", "expected": captions}
    if isinstance(data, VqaData):
        asked = data.questions[index]
        answers = list(dict.fromkeys(_short(answer) for answer in asked.answers))
        return {"images": [asked.image], "question": _short(asked.question), "expected": answers}
    if isinstance(data, ClassData):
        return {"images": [index], "question": "", "expected": [_short(data.classes[data.labels[index]])]}
    assert isinstance(data, NlvrData)
    pair = data.pairs[index]
    return {"images": [pair.left, pair.right], "question": _short(pair.sentence), "expected": [_truth(pair.label)]}


def _answer(task: str, view: str, output: Mapping[str, Any]) -> dict[str, Any]:
    """What a model answered; `correct` where that is a matter of right and wrong."""
    if task == "captioning":
        return {"text": _short(output["caption"])}
    if task in ("vqa", "nlvr"):
        answer = output["answer"]
        text = _truth(answer) if isinstance(answer, bool) else _short(answer)
        return {"text": text, "correct": float(output["accuracy"])}
    if view == "image":
        rank = output["t2i_ranks"][0]
        return {"text": "", "image": output["image"], "correct": float(rank == 1), "rank": rank}
    found = {"retrieval": ("text", "i2t_rank"), "classification": ("label", "rank"), "zero-shot": ("class", "rank")}
    text, rank = (output[key] for key in found[task])
    return {"text": _short(text), "correct": float(rank == 1), "rank": rank}


def _images(row: Mapping[str, Any]) -> Iterable[int]:
    yield from row["images"]
    for part in (row, *row["outputs"]):
        if "image" in part:
            yield part["image"]


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _short(text: Any) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= LENGTH else text[: LENGTH - 1] + "…"
