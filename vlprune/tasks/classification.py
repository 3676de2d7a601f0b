"""Image classification: top-1 and top-5 accuracy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlprune.data.classes import match_labels
from vlprune.data.sets import ClassData
from vlprune.progress import track
from vlprune.tasks.common import Graphs, Processor, Spec, batches
from vlprune.tasks.metrics import Scores, class_scores, match_rank


def make_spec(processor: Processor, labels: Sequence[str]) -> dict[str, Any]:
    """Make the task.json of classification.

    Args:
        processor: turns images into model inputs.
        labels: names of the model's classes, in the order of its logits.

    Returns:
        dict[str, Any]: the spec.
    """
    return {
        "schema_version": 1,
        "family": processor.family,
        "task": "classification",
        "image_size": processor.image_size,
        "labels": list(labels),
    }


def evaluate(
    graphs: Graphs, spec: Spec, processor: Processor, data: ClassData, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Classify all images.

    Args:
        graphs: image_classifier.
        spec: task.json; `labels` is used: the classes of the data are found among them (see `match_labels`), and
            compete with all of them.
        processor: turns images into model inputs.
        data: images with classes.
        batch_size: images per call.
        seed: of the bootstrap.

    Returns:
        Scores: top1 and, of more than five labels, top5; per image an output with the `label` given and the `rank` of
            the true one (1 = first).
    """
    place = match_labels(spec["labels"], data)
    outputs = []
    for batch in track(batches(len(data.images), batch_size), "classifying"):
        pixels = processor.images([data.images[i] for i in batch])
        logits = graphs["image_classifier"]({"pixel_values": pixels})["logits"]
        for i, row in zip(batch, logits, strict=True):
            rank = match_rank(row, [place[data.labels[i]]])
            outputs.append({"label": spec["labels"][int(np.argmax(row))], "rank": rank})
    ranks = np.array([output["rank"] for output in outputs])
    return replace(class_scores(ranks, len(spec["labels"]), seed), outputs=outputs)
