"""Zero-shot classification: an image is of the class whose name, put into texts, it is most like.

Radford et al., Learning transferable visual models from natural language supervision, ICML 2021, section 3.1: the
embeddings of a class's texts are averaged and made unit length again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlprune.data.classes import match_labels
from vlprune.data.sets import ClassData
from vlprune.progress import track
from vlprune.runtime import predict
from vlprune.tasks.common import Graphs, Processor, Spec, base_spec, batches
from vlprune.tasks.metrics import Scores, class_scores, match_rank


# The first is CLIP's own; with the others, the seven that its authors picked for ImageNet out of their eighty.
TEMPLATES = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def make_spec(
    processor: Processor, classes: Sequence[str] = (), templates: Sequence[str] = (), max_length: int = 64
) -> dict[str, Any]:
    """Make the task.json of zero-shot classification.

    Args:
        processor: turns images and texts into model inputs.
        classes: names of the classes; none = they are to be filled in later.
        templates: texts with "{}" for the name of the class; none = `TEMPLATES`.
        max_length: texts are cut to this many tokens, or to what the model reads if that is less.

    Returns:
        dict[str, Any]: the spec.
    """
    spec = base_spec("zero-shot", processor, max_length)
    return {**spec, "classes": list(classes), "templates": list(templates or TEMPLATES)}


def evaluate(
    graphs: Graphs, spec: Spec, processor: Processor, data: ClassData, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Classify all images.

    Args:
        graphs: image_encoder and text_encoder.
        spec: task.json; classes, templates and max_length are used. The classes of the data are found among those of
            the spec (see `match_labels`), and compete with all of them.
        processor: turns images and texts into model inputs.
        data: images with classes.
        batch_size: images, or texts, per call of a graph.
        seed: of the bootstrap.

    Returns:
        Scores: top1 and, of more than five classes, top5; per image an output with the `class` given and the `rank` of
            the true one (1 = first).
    """
    place = match_labels(spec["classes"], data)
    classes = class_embeds(graphs, spec, processor, batch_size)
    outputs = []
    for batch in track(batches(len(data.images), batch_size), "classifying"):
        pixels = processor.images([data.images[i] for i in batch])
        similarity = graphs["image_encoder"]({"pixel_values": pixels})["image_embeds"] @ classes.T
        for i, row in zip(batch, similarity, strict=True):
            rank = match_rank(row, [place[data.labels[i]]])
            outputs.append({"class": spec["classes"][int(np.argmax(row))], "rank": rank})
    ranks = np.array([output["rank"] for output in outputs])
    return replace(class_scores(ranks, len(classes), seed), outputs=outputs)


def class_embeds(graphs: Graphs, spec: Spec, processor: Processor, batch_size: int = 32) -> np.ndarray:
    """Embed the classes: what a runner computes once and keeps.

    Args:
        graphs: text_encoder.
        spec: task.json.
        processor: turns texts into model inputs.
        batch_size: texts per call.

    Returns:
        np.ndarray: unit vectors [classes, E].
    """
    return predict.class_embeds(graphs, spec, processor, batch_size, lambda parts: track(parts, "encoding classes"))
