"""Visual question answering: answers ranked over a list or generated, scored by the official VQA accuracy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlprune.data.sets import VqaData
from vlprune.progress import track
from vlprune.runtime import predict
from vlprune.tasks.answers import vqa_accuracy
from vlprune.tasks.common import Graphs, Processor, Spec, base_spec, batches
from vlprune.tasks.metrics import Scores, mean_scores


def make_spec(
    processor: Processor,
    past_shapes: Sequence[Sequence[int]],
    answers: Sequence[str] | None,
    max_length: int = 35,
    rank_k: int = 128,
    beams: int = 3,
    max_answer_length: int = 10,
) -> dict[str, Any]:
    """Make the task.json of question answering; the defaults are the authors'.

    Args:
        processor: turns images and texts into model inputs.
        past_shapes: (H, K) of the decoder's self-attention, per layer.
        answers: the answers to rank; None = generate.
        max_length: questions (and answers of the list) are cut to this many tokens.
        rank_k: answers per question, picked by their first token, whose whole sequence is scored.
        beams: beams of the search when answers are generated.
        max_answer_length: greatest number of tokens of a generated answer, [DEC] included.

    Returns:
        dict[str, Any]: the spec.
    """
    answer_ids = None
    if answers is not None:
        ids, mask = processor.texts(answers, first="dec", max_length=max_length)
        answer_ids = [row[:length].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]
    return {
        **base_spec("vqa", processor, max_length),
        "answers": None if answers is None else list(answers),
        "answer_ids": answer_ids,
        "rank_k": rank_k,
        "beams": beams,
        "max_answer_length": max_answer_length,
        "decoder": "answer_decoder",
        "past_shapes": [list(shape) for shape in past_shapes],
    }


def evaluate(
    graphs: Graphs, spec: Spec, processor: Processor, data: VqaData, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Answer all questions and score the answers.

    Questions run in the order of their images, so that an image is encoded once per batch that asks about it. The
    interval resamples images with all their questions: questions on one image are not independent.

    Args:
        graphs: image_encoder, question_encoder and answer_decoder.
        spec: task.json; answers, answer_ids, rank_k, beams, lengths, sep_token_id, dec_token_id, decoder and
            past_shapes are used.
        processor: turns images and texts into model inputs and token ids into text.
        data: images with questions and answers.
        batch_size: questions per call of the encoders.
        seed: of the bootstrap.

    Returns:
        Scores: accuracy; per question an output with the `answer` given and its `accuracy`.
    """
    images = np.array([question.image for question in data.questions])
    order = np.argsort(images, kind="stable")
    outputs: list[dict[str, Any]] = [{}] * len(order)
    for batch in track(batches(len(order), batch_size), "answering"):
        rows = order[batch.start : batch.stop]
        shown, which = np.unique(images[rows], return_inverse=True)
        pixels = processor.images([data.images[int(i)] for i in shown])
        states = graphs["image_encoder"]({"pixel_values": pixels})["image_states"][which]
        questions = [data.questions[row] for row in rows]
        answers = predict.answers(graphs, spec, processor, states, [question.question for question in questions])
        for row, question, answer in zip(rows, questions, answers, strict=True):
            outputs[row] = {"answer": answer, "accuracy": vqa_accuracy(answer, question.answers)}
    scores = mean_scores("accuracy", [output["accuracy"] for output in outputs], images, seed)
    return replace(scores, outputs=outputs)
