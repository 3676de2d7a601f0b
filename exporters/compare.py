"""Compare exported graphs with PyTorch on real images and texts, with padding, for one sample and for several.

Each graph gets what PyTorch's graphs before it computed, so that a difference is charged to the graph that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlprune.data.sets import ClassData, Data, NlvrData, VqaData
from vlprune.errors import MachineError, RequestError
from vlprune.runtime.generate import Arrays, Graph


BATCHES = (1, 5)
PADDING = 2  # columns of padding that every text gets, so that texts of one length are padded, too
STEPS = (1, 1, 3)  # tokens the decoder reads one call after the other, before it reads the rest

Run = Callable[[str, Arrays], Arrays]  # runs a graph on both sides, gives PyTorch's outputs


@dataclass
class Difference:
    """How far a graph is from PyTorch.

    Attributes:
        max_abs_diff: largest |difference| over all outputs and calls.
        relative: the same, of each output divided by its largest value where that is above 1.
        scale: largest value of all outputs, at least 1.
        cosine_min: smallest cosine between the two, over outputs and samples.
    """

    max_abs_diff: float = 0.0
    relative: float = 0.0
    scale: float = 1.0
    cosine_min: float = 1.0

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Compare one output.

        Args:
            reference: [B, ...] of PyTorch.
            other: the same of the exported graph.

        Raises:
            ValueError: shapes differ, or values are not finite.
        """
        if reference.shape != other.shape:
            raise ValueError(f"shape {list(other.shape)} instead of {list(reference.shape)}")
        a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, other))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError("NaN or infinity")
        difference = float(np.abs(a - b).max(initial=0))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = np.where(lengths > 0, (a * b).sum(1) / np.where(lengths > 0, lengths, 1), (a == b).all(1))
        self.max_abs_diff = max(self.max_abs_diff, difference)
        scale = max(1.0, float(np.abs(a).max(initial=0)))
        self.scale = max(self.scale, scale)
        self.relative = max(self.relative, difference / scale)
        self.cosine_min = min(self.cosine_min, float(cosines.min(initial=1)))


def compare(
    reference: Mapping[str, Graph],
    exported: Mapping[str, Graph],
    spec: Mapping[str, Any],
    processor: Any,
    data: Data,
    tolerance: float = 1e-4,
) -> dict[str, Difference]:
    """Compare all graphs of a task.

    Args:
        reference: PyTorch's, by name.
        exported: the same names.
        spec: task.json.
        processor: turns images and texts into inputs.
        data: at least one image and one text; a few samples all over it are taken.
        tolerance: largest difference allowed, relative to the largest value of an output where that is above 1.

    Returns:
        dict[str, Difference]: by graph.

    Raises:
        RequestError: there is no sample.
        MachineError: a graph differs by more than `tolerance`.
    """
    differences = {name: Difference() for name in reference}

    def run(name: str, feeds: Arrays) -> Arrays:
        expected, got = reference[name](feeds), exported[name](feeds)
        for output, array in expected.items():
            try:
                differences[name].add(array, got[output])
            except ValueError as error:
                raise MachineError(f"{name}.onnx gives {error} in {output}: it is not used") from error
        return expected

    if not data.samples:
        raise RequestError(f"{data.name} has no samples to compare the graphs on: check its file")
    for _ in walk(run, spec, processor, data, BATCHES):
        pass
    for name, difference in differences.items():
        if difference.relative > tolerance:
            raise MachineError(
                f"{name}.onnx differs from PyTorch by {difference.max_abs_diff:.1e} "
                f"(relative {difference.relative:.1e}, allowed {tolerance:.0e}): it is not used"
            )
    return differences


def walk(
    run: Run, spec: Mapping[str, Any], processor: Any, data: Data, batches: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Let the graphs of a task run on real images and texts, each on what those before it made.

    Args:
        run: runs the graph of a name, gives its outputs.
        spec: task.json.
        processor: turns images and texts into inputs.
        data: at least one image and one text.
        batches: sizes; their sum is the number of samples taken, evenly all over the data.

    Yields:
        tuple[int, int]: the first sample of a batch that has run, and the one after its last.
    """
    images, texts = _samples(data, sum(batches))
    start = 0
    for size in batches:
        end = start + size
        _TASKS[spec["task"]](run, spec, processor, processor.images(images[start:end]), texts[start:end])
        yield start, end
        start = end


def _samples(data: Data, total: int) -> tuple[list[Any], list[str]]:
    """Take images with one text each, evenly over the data; small data sets repeat."""
    if isinstance(data, VqaData):
        asked = [data.questions[i] for i in np.linspace(0, len(data.questions) - 1, total).astype(int)]
        return [data.images[q.image] for q in asked], [q.question for q in asked]
    rows = np.linspace(0, data.samples - 1, total).astype(int)
    if isinstance(data, NlvrData):
        return [data.images[data.pairs[i].left] for i in rows], [data.pairs[i].sentence for i in rows]
    if isinstance(data, ClassData):
        return [data.images[int(i)] for i in rows], [f"a photo of a {data.classes[data.labels[i]]}." for i in rows]
    return [data.images[int(i)] for i in rows], [data.captions[i][0] for i in rows]


def _texts(spec: Mapping[str, Any], processor: Any, texts: list[str], first: str) -> Arrays:
    """Tokenise and pad, unless the model always reads texts of full length."""
    ids, mask = processor.texts(texts, first, spec["max_length"] - PADDING)
    if ids.shape[1] == spec["max_length"]:
        return {"input_ids": ids, "attention_mask": mask}
    right = ((0, 0), (0, PADDING))
    padded = np.pad(ids, right, constant_values=spec["pad_token_id"])
    return {"input_ids": padded, "attention_mask": np.pad(mask, right)}


def _retrieval(run: Run, spec: Mapping[str, Any], processor: Any, pixels: np.ndarray, texts: list[str]) -> None:
    outputs = run("image_encoder", {"pixel_values": pixels})
    run("text_encoder", _texts(spec, processor, texts, "cls"))
    if "image_states" in outputs:
        run("itm", {**_texts(spec, processor, texts, "enc"), "image_states": outputs["image_states"]})


def _captioning(run: Run, spec: Mapping[str, Any], processor: Any, pixels: np.ndarray, texts: list[str]) -> None:
    cross = run("image_encoder", {"pixel_values": pixels})
    tokens = cross["cross_key.0"].shape[2]
    mask = np.ones((len(pixels), tokens), np.int64)
    mask[1:, tokens // 2 :] = 0  # all images have as many tokens, but the graph promises to obey the mask
    inputs = _texts(spec, processor, [spec["prompt"] + text for text in texts], "dec")
    _decode(run, spec, {**cross, "cross_mask": mask}, inputs)


def _vqa(run: Run, spec: Mapping[str, Any], processor: Any, pixels: np.ndarray, texts: list[str]) -> None:
    states = run("image_encoder", {"pixel_values": pixels})["image_states"]
    inputs = _texts(spec, processor, texts, "enc")
    cross = run("question_encoder", {**inputs, "image_states": states})
    # The questions' tokens stand for an answer's: real text, and longer than most answers.
    _decode(run, spec, {**cross, "cross_mask": inputs["attention_mask"]}, _texts(spec, processor, texts, "dec"))


def _zero_shot(run: Run, spec: Mapping[str, Any], processor: Any, pixels: np.ndarray, texts: list[str]) -> None:
    run("image_encoder", {"pixel_values": pixels})
    run("text_encoder", _texts(spec, processor, texts, "cls"))


def _classification(run: Run, spec: Mapping[str, Any], processor: Any, pixels: np.ndarray, texts: list[str]) -> None:
    run("image_classifier", {"pixel_values": pixels})


def _nlvr(run: Run, spec: Mapping[str, Any], processor: Any, pixels: np.ndarray, texts: list[str]) -> None:
    states = run("image_encoder", {"pixel_values": pixels})["image_states"]
    both = {"image_states.0": states, "image_states.1": np.roll(states, 1, axis=0)}
    run("pair_classifier", {**_texts(spec, processor, texts, "enc"), **both})


def _decode(run: Run, spec: Mapping[str, Any], cross: Arrays, inputs: Arrays) -> None:
    """Read texts at once, and again in steps."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    empty = {
        f"past_{kind}.{layer}": np.zeros((len(ids), heads, 0, width), np.float32)
        for kind in ("key", "value")
        for layer, (heads, width) in enumerate(spec["past_shapes"])
    }
    run(spec["decoder"], {**inputs, **cross, **empty})
    past, start = empty, 0
    for end in (*np.cumsum(STEPS), ids.shape[1]):
        if start < ids.shape[1]:
            feeds = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
            outputs = run(spec["decoder"], {**feeds, **cross, **past})
            past = {name: outputs[name.replace("past", "present")] for name in past}
            start = min(int(end), ids.shape[1])


_TASKS = {
    "retrieval": _retrieval,
    "captioning": _captioning,
    "vqa": _vqa,
    "zero-shot": _zero_shot,
    "classification": _classification,
    "nlvr": _nlvr,
}
