"""The batches of a training: which images and texts a step sees follows from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from PIL import Image

from vlprune.data.classes import match_labels
from vlprune.data.sets import ClassData, Data, NlvrData, VqaData
from vlprune.models.family import Batch, Model
from vlprune.tasks.zero_shot import TEMPLATES


_Ordered = list[tuple[int, Future[np.ndarray] | None]]  # images and what reads them, None = in memory already

PER_IMAGE = 4  # questions about one image that stand together in a batch: the image is encoded once for them
CACHE = 2 << 30  # bytes of resized images kept in memory


class Batches:
    """The batches of a training from a given step on; the images of the next are read while one is computed.

    Args:
        model: makes the batches.
        data: training data.
        size: images or questions of a batch.
        seed: of order and captions.
        steps: which steps.
    """

    def __init__(self, model: Model, data: Data, size: int, seed: int, steps: range) -> None:
        self.model = cast(Any, model)  # which batches a family makes depends on its tasks
        self.data = data
        self.size = size
        self.seed = seed
        self.steps = steps
        self.images = _Images(model, data.images)
        self.per_pass = data.samples // self.size
        self.pass_number, self.order = -1, np.empty(0, np.int64)
        self.place = match_labels(self.model.labels, data) if isinstance(data, ClassData) and self.classifies else []
        self.offsets = np.random.default_rng([self.seed, 2**32 - 1]).integers(2**31, size=len(data.images))

    @property
    def classifies(self) -> bool:
        """Whether the model learns classes by number, not by name."""
        return "classification" in self.model.tasks

    def __enter__(self) -> Iterator[Batch]:
        return self._run()

    def __exit__(self, *error: object) -> None:
        self.images.close()

    def _run(self) -> Iterator[Batch]:
        ahead = self._start(self.steps.start)
        for step in self.steps:
            rows, ordered = ahead
            if step + 1 < self.steps.stop:
                ahead = self._start(step + 1)
            yield self._batch(rows, self.model.processor.normalise(self.images.take(ordered)), step)

    def _start(self, step: int) -> tuple[np.ndarray, _Ordered]:
        rows = self._rows(step)
        return rows, self.images.order(self._shown(rows))

    def _rows(self, step: int) -> np.ndarray:
        """Choose the images or questions of a step; what a pass leaves over (less than a batch) is left out."""
        number, place = divmod(step, self.per_pass)
        if self.pass_number != number:
            self.pass_number, self.order = number, self._order(np.random.default_rng([self.seed, number]))
        return self.order[place * self.size : (place + 1) * self.size]

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """Shuffle the images, or the questions in groups of a few about the same image."""
        if not isinstance(self.data, VqaData):
            return generator.permutation(self.data.samples)
        images = np.array([question.image for question in self.data.questions])
        shuffled = generator.permutation(len(images))
        by_image = shuffled[np.argsort(images[shuffled], kind="stable")]
        starts = np.flatnonzero(np.diff(images[by_image], prepend=-1))  # where an image's questions begin
        place = np.arange(len(images)) - np.repeat(starts, np.diff(starts, append=len(images)))
        group = np.cumsum(place % PER_IMAGE == 0) - 1
        rank = generator.permutation(group[-1] + 1)[group]
        return by_image[np.argsort(rank, kind="stable")]

    def _shown(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self.data, VqaData):
            return np.unique([self.data.questions[row].image for row in rows])
        if isinstance(self.data, NlvrData):
            return np.unique([(self.data.pairs[row].left, self.data.pairs[row].right) for row in rows])
        return rows

    def _batch(self, rows: np.ndarray, pixels: np.ndarray, step: int) -> Batch:
        if isinstance(self.data, VqaData):
            questions = [self.data.questions[row] for row in rows]
            where = np.searchsorted(self._shown(rows), [question.image for question in questions])
            texts, answers = [q.question for q in questions], [q.answers for q in questions]
            return self.model.vqa_batch(pixels, where.tolist(), texts, answers)
        if isinstance(self.data, NlvrData):
            pairs = [self.data.pairs[row] for row in rows]
            where = np.searchsorted(self._shown(rows), [(pair.left, pair.right) for pair in pairs])
            return self.model.nlvr_batch(pixels, where, [p.sentence for p in pairs], [p.label for p in pairs])
        if isinstance(self.data, ClassData) and self.classifies:
            return self.model.class_batch(pixels, [self.place[self.data.labels[row]] for row in rows])
        # Pass by pass an image goes through its captions in a circle, each image from a place of its own.
        number = step // self.per_pass
        turns = (self.offsets[rows] + number).tolist()
        texts = [given[turn % len(given)] for given, turn in zip(map(self._captions, rows), turns, strict=True)]
        # Texts of one class are true of all its images.
        owners = [self.data.labels[row] for row in rows] if isinstance(self.data, ClassData) else rows.tolist()
        return self.model.caption_batch(pixels, texts, owners)

    def _captions(self, row: int) -> list[str]:
        if isinstance(self.data, ClassData):
            name = self.data.classes[self.data.labels[row]]
            return [template.replace("{}", name) for template in self.data.templates or TEMPLATES]
        assert not isinstance(self.data, VqaData | NlvrData)
        return self.data.captions[row]


class _Images:
    """Resized images, read by a few threads and kept in memory while all fit."""

    def __init__(self, model: Model, images: Sequence[Image.Image]) -> None:
        size = model.processor.image_size
        self.images = images
        self.resize = model.processor.resize
        fits = len(images) * size * size * 3 <= CACHE
        self.kept = np.empty((len(images), size, size, 3), np.uint8) if fits else None
        self.known = np.zeros(len(images), bool)
        self.pool = ThreadPoolExecutor(4)

    def close(self) -> None:
        """Stop reading."""
        self.pool.shutdown(cancel_futures=True)

    def order(self, rows: np.ndarray) -> _Ordered:
        """Start reading what is not in memory."""
        return [(row, None if self.known[row] else self.pool.submit(self._read, row)) for row in rows.tolist()]

    def take(self, ordered: _Ordered) -> np.ndarray:
        """Give the images that were ordered, uint8 [B, size, size, 3]."""
        taken = []
        for row, future in ordered:
            if future is None:
                assert self.kept is not None
                taken.append(self.kept[row])
                continue
            taken.append(future.result())
            if self.kept is not None:
                self.kept[row], self.known[row] = taken[-1], True
        return np.stack(taken)

    def _read(self, row: int) -> np.ndarray:
        return self.resize([self.images[row]])[0]
