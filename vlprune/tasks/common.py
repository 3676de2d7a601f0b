"""What the tasks share: the types of their arguments, and the part of task.json that all tasks have."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlprune.runtime.generate import Graph


Graphs = Mapping[str, Graph]
Spec = Mapping[str, Any]


class Processor(Protocol):
    """What the tasks need of a family's processor; generating tasks need all of it."""

    family: str
    image_size: int
    pad_id: int
    sep_id: int

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Turn images into float32 [B, 3, image_size, image_size]."""

    def texts(self, texts: Sequence[str], first: Any = "cls", max_length: int = 35) -> tuple[np.ndarray, np.ndarray]:
        """Turn texts into ids and mask, int64 [B, T], padded on the right."""

    def special_ids(self) -> dict[str, int]:
        """Name the special tokens."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Turn a decoder prompt into [DEC] and its tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text without special tokens."""


def base_spec(task: str, processor: Processor, max_length: int) -> dict[str, Any]:
    """Make the part of task.json that all tasks have.

    Args:
        task: name of the task.
        processor: turns images and texts into model inputs.
        max_length: texts are cut to this many tokens.

    Returns:
        dict[str, Any]: schema version, family, task, image size, text length and special tokens.
    """
    return {
        "schema_version": 1,
        "family": processor.family,
        "task": task,
        "image_size": processor.image_size,
        "max_length": max_length,
        **processor.special_ids(),
    }


def batches(total: int, batch_size: int) -> list[range]:
    """Cut indices into batches.

    Args:
        total: number of samples.
        batch_size: samples per batch; the last may be smaller.

    Returns:
        list[range]: the indices of each batch.
    """
    return [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
