"""Natural language for visual reasoning (NLVR2): is a sentence true of two images?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlprune.data.nlvr import MAX_LENGTH
from vlprune.data.sets import NlvrData
from vlprune.progress import track
from vlprune.tasks.common import Graphs, Processor, Spec, base_spec, batches
from vlprune.tasks.metrics import Scores, mean_scores


def make_spec(processor: Processor, max_length: int = MAX_LENGTH) -> dict[str, Any]:
    """Make the task.json of reasoning about two images.

    Args:
        processor: turns images and texts into model inputs.
        max_length: sentences are cut to this many tokens.

    Returns:
        dict[str, Any]: the spec.
    """
    return base_spec("nlvr", processor, max_length)


def evaluate(
    graphs: Graphs, spec: Spec, processor: Processor, data: NlvrData, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Judge all sentences.

    An image that stands in several pairs of a batch is encoded once. The interval resamples sentences with all their
    pairs: NLVR2 asks each sentence about several pairs, which are not independent.

    Args:
        graphs: image_encoder and pair_classifier.
        spec: task.json; max_length is used.
        processor: turns images and texts into model inputs.
        data: pairs of images with sentences.
        batch_size: pairs per call.
        seed: of the bootstrap.

    Returns:
        Scores: accuracy; per pair an output with the `answer` given (true or false) and its `accuracy`.
    """
    outputs = []
    for batch in track(batches(len(data.pairs), batch_size), "judging"):
        pairs = [data.pairs[i] for i in batch]
        shown, which = np.unique([[pair.left, pair.right] for pair in pairs], return_inverse=True)
        left, right = which.reshape(-1, 2).T
        states = _encode(graphs, processor, data, shown, batch_size)
        ids, mask = processor.texts([pair.sentence for pair in pairs], first="enc", max_length=spec["max_length"])
        feeds = {"input_ids": ids, "attention_mask": mask}
        feeds |= {"image_states.0": states[left], "image_states.1": states[right]}
        answers = graphs["pair_classifier"](feeds)["logits"].argmax(1) == 1
        for pair, answer in zip(pairs, answers.tolist(), strict=True):
            outputs.append({"answer": answer, "accuracy": float(answer == pair.label)})
    _, units = np.unique([pair.sentence for pair in data.pairs], return_inverse=True)
    scores = mean_scores("accuracy", [output["accuracy"] for output in outputs], units, seed)
    return replace(scores, outputs=outputs)


def _encode(
    graphs: Graphs, processor: Processor, data: NlvrData, shown: Sequence[int] | np.ndarray, batch_size: int
) -> np.ndarray:
    """States [N, P, D] of some images, at most `batch_size` at a time."""
    found = []
    for part in batches(len(shown), batch_size):
        pixels = processor.images([data.images[int(shown[i])] for i in part])
        found.append(graphs["image_encoder"]({"pixel_values": pixels})["image_states"])
    return np.concatenate(found)
