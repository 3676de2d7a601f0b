"""What a task's graphs say of images and texts: captions, answers, embeddings of classes.

Scoring on PyTorch, scoring on ONNX Runtime and the edge runner all go through these functions. Only numpy is imported
here. A processor turns texts into ids and mask (`texts`) and token ids back into text (`decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .generate import Graph, beam_search, rank_answers


Graphs = Mapping[str, Graph]
Spec = Mapping[str, Any]


def captions(graphs: Graphs, spec: Spec, processor: Any, pixels: np.ndarray) -> list[str]:
    """Describe images by beam search.

    Args:
        graphs: image_encoder and the decoder that the spec names.
        spec: task.json; prompt_ids, beams, lengths, sep_token_id, decoder and past_shapes are used.
        processor: turns token ids into text.
        pixels: float32 [B, 3, side, side].

    Returns:
        list[str]: a caption per image, without the prompt.
    """
    cross = graphs["image_encoder"]({"pixel_values": pixels})
    key = cross["cross_key.0"]  # [B, H, P, K]
    sequences = beam_search(
        graphs[spec["decoder"]],
        cross,
        np.ones((len(key), key.shape[2]), np.int64),
        spec["prompt_ids"],
        spec["past_shapes"],
        eos_token_id=spec["sep_token_id"],
        beams=spec["beams"],
        min_length=spec["min_length"],
        max_length=spec["max_length"],
    )
    return [processor.decode(sequence[len(spec["prompt_ids"]) :]) for sequence in sequences]


def answers(graphs: Graphs, spec: Spec, processor: Any, states: np.ndarray, questions: Sequence[str]) -> list[str]:
    """Answer a question about each image: the likeliest answer of the spec's list, or a generated one without a list.

    Args:
        graphs: question_encoder and the decoder that the spec names.
        spec: task.json; answers, answer_ids, rank_k, beams, lengths, sep_token_id, dec_token_id, decoder and
            past_shapes are used.
        processor: turns texts into model inputs and token ids into text.
        states: [B, P, D] of the images, from image_encoder.
        questions: B texts.

    Returns:
        list[str]: B answers.
    """
    ids, mask = processor.texts(questions, first="enc", max_length=spec["max_length"])
    feeds = {"input_ids": ids, "attention_mask": mask, "image_states": states}
    cross = graphs["question_encoder"](feeds)
    decoder = graphs[spec["decoder"]]
    if spec["answers"] is not None:
        scores = rank_answers(decoder, cross, mask, spec["answer_ids"], spec["past_shapes"], k=spec["rank_k"])
        return [spec["answers"][best] for best in scores.argmax(1)]
    sequences = beam_search(
        decoder,
        cross,
        mask,
        [spec["dec_token_id"]],
        spec["past_shapes"],
        eos_token_id=spec["sep_token_id"],
        beams=spec["beams"],
        max_length=spec["max_answer_length"],
    )
    return [processor.decode(sequence[1:]) for sequence in sequences]


def class_embeds(
    graphs: Graphs,
    spec: Spec,
    processor: Any,
    batch_size: int = 32,
    track: Callable[[list[range]], Iterable[range]] = iter,
) -> np.ndarray:
    """Embed classes by the mean of their texts: what a runner computes once and keeps.

    Args:
        graphs: text_encoder.
        spec: task.json; classes, templates and max_length are used.
        processor: turns texts into model inputs.
        batch_size: texts per call.
        track: wraps the list of batches, to show progress.

    Returns:
        np.ndarray: unit vectors [classes, E].
    """
    templates = spec["templates"]
    texts = [template.replace("{}", name) for name in spec["classes"] for template in templates]
    ids, mask = processor.texts(texts, first="cls", max_length=spec["max_length"])
    lengths = mask.sum(1)
    order = np.argsort(lengths, kind="stable")  # texts of like length run together
    embeds = []
    for batch in track([range(start, min(start + batch_size, len(ids))) for start in range(0, len(ids), batch_size)]):
        rows = order[batch.start : batch.stop]
        longest = lengths[rows].max()
        feeds = {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}
        embeds.append(graphs["text_encoder"](feeds)["text_embeds"])
    every = np.concatenate(embeds)[np.argsort(order)]
    means = every.reshape(len(spec["classes"]), len(templates), -1).mean(1, dtype=np.float64)
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)
