"""Text generation over a decoder graph, in numpy: beam search, and ranking of given answers.

A graph is a callable from named arrays to named arrays, run by PyTorch or ONNX Runtime alike. The decoder graph takes

    input_ids [B, T], attention_mask [B, past + T], cross_mask [B, S]          int64, 1 = read, 0 = padding
    past_key.{l}, past_value.{l} [B, H, past, K]                               past may be 0
    cross_key.{l}, cross_value.{l} [B, H, S, K]                                what cross-attention reads, computed once

and gives logits [B, T, V], present_key.{l}, present_value.{l} [B, H, past + T, K]. H and K may differ between layers.
Only numpy is imported here, so that runners without PyTorch can use it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


Arrays = dict[str, np.ndarray]
Graph = Callable[[Arrays], Arrays]


@dataclass
class _CachedDecoder:
    """A decoder graph with what it reads: cross states, and the keys and values of the tokens so far."""

    decoder: Graph
    cross: Arrays  # cross_key.{l}, cross_value.{l} [B, H, S, K], cross_mask [B, S]
    past: Arrays  # past_key.{l}, past_value.{l} [B, H, past, K]

    def read(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Read tokens [B, T] (mask [B, T], all valid by default) and give the logits [B, T, V] after each."""
        mask = np.ones_like(ids) if mask is None else mask
        before = np.ones((len(ids), self.past["past_key.0"].shape[2]), np.int64)  # nothing continues after padding
        mask = np.concatenate([before, mask], axis=1)
        outputs = self.decoder({"input_ids": ids, "attention_mask": mask, **self.cross, **self.past})
        self.past = {name: outputs[name.replace("past", "present")] for name in self.past}
        return outputs["logits"]

    def take(self, rows: np.ndarray, same_cross: bool = False) -> "_CachedDecoder":
        """Make a decoder whose row r continues row rows[r]; `same_cross` = both rows read the same cross states."""
        cross = self.cross if same_cross else {name: array[rows] for name, array in self.cross.items()}
        return _CachedDecoder(self.decoder, cross, {name: array[rows] for name, array in self.past.items()})


def _start(
    decoder: Graph,
    cross_feeds: Mapping[str, np.ndarray],
    cross_mask: np.ndarray,
    past_shapes: Sequence[Sequence[int]],
) -> _CachedDecoder:
    """Make a decoder that has read nothing yet."""
    rows, dtype = len(cross_mask), cross_feeds["cross_key.0"].dtype
    past = {
        f"past_{kind}.{layer}": np.zeros((rows, heads, 0, width), dtype)
        for layer, (heads, width) in enumerate(past_shapes)
        for kind in ("key", "value")
    }
    return _CachedDecoder(decoder, {**cross_feeds, "cross_mask": cross_mask}, past)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in float32."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns [rows, k] of the k largest values of each row, largest first, ties by the lower column."""
    columns = np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]
    order = np.lexsort((columns, -np.take_along_axis(values, columns, 1)), axis=1)
    return np.take_along_axis(columns, order, 1)


def beam_search(
    decoder: Graph,
    cross_feeds: Mapping[str, np.ndarray],
    cross_mask: np.ndarray,
    prompt_ids: Sequence[int],
    past_shapes: Sequence[Sequence[int]],
    *,
    eos_token_id: int,
    beams: int = 3,
    min_length: int = 0,
    max_length: int = 20,
) -> list[list[int]]:
    """Continue a prompt by beam search, one result per row of the batch.

    The results are those of transformers' `generate(num_beams, min_length, max_length)` with its defaults: sequence
    score = sum of log-probabilities / number of generated tokens; a row ends when no running beam, at its present
    length, beats the worst of its `beams` finished sequences. One beam is greedy search. Rows do not influence each
    other, and a row that has ended is dropped from the batch.

    Cross feeds are repeated per beam: memory is B x beams x their size per row.

    Args:
        decoder: decoder graph (see the module).
        cross_feeds: cross_key.{l}, cross_value.{l} [B, H, S, K].
        cross_mask: int64 [B, S].
        prompt_ids: the tokens every sequence starts with, [DEC] first.
        past_shapes: (H, K) of the decoder's self-attention, per layer.
        eos_token_id: the token that ends a sequence.
        beams: number of beams.
        min_length: a sequence with fewer tokens than this, prompt included, cannot end.
        max_length: number of tokens at which a sequence is cut, prompt included.

    Returns:
        list[list[int]]: per row the best sequence: prompt, generated tokens, `eos_token_id` unless it was cut.

    Raises:
        ValueError: no room after the prompt, or too few words for the beams.
    """
    prompt, batch = list(prompt_ids), len(cross_mask)
    if not prompt or len(prompt) >= max_length:
        raise ValueError(f"prompt of {len(prompt)} tokens: it must have 1 to max_length - 1 = {max_length - 1}")
    state = _start(decoder, cross_feeds, cross_mask, past_shapes)
    logits = state.read(np.tile(np.array(prompt, np.int64), (batch, 1)))[:, -1]  # [B, V]
    vocabulary, choices = logits.shape[-1], 2 * beams
    if vocabulary < choices:
        raise ValueError(f"{beams} beams need a vocabulary of at least {choices} tokens, not {vocabulary}")

    live = np.arange(batch)  # rows of the batch that still run
    tokens = np.zeros((batch, 1, max_length), np.int64)  # [live, running beams, max_length]; one beam at first
    tokens[:, :, : len(prompt)] = prompt
    running = np.zeros((batch, 1), np.float32)  # [live, running beams]: sums of log-probabilities
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]  # per row (score, tokens), best first

    for length in range(len(prompt) + 1, max_length + 1):  # of the sequences made in this step
        generated = np.float32(length - len(prompt))
        log_probs = _log_softmax(logits).reshape(len(live), -1, vocabulary)
        if length - 1 < min_length:
            log_probs[:, :, eos_token_id] = -np.inf
        totals = (log_probs + running[:, :, None]).reshape(len(live), -1)
        # At most `beams` of twice as many candidates end here, so that enough are left to run on.
        best = _largest(totals, choices)  # [live, 2 beams]
        scores = np.take_along_axis(totals, best, 1)
        parents, words = np.divmod(best, vocabulary)
        candidates = np.take_along_axis(tokens, parents[:, :, None], 1)
        candidates[:, :, length - 1] = words
        ends = words == eos_token_id
        for row, rank in zip(*np.nonzero((ends | (length == max_length))[:, :beams]), strict=True):
            sequence = candidates[row, rank, :length].tolist()
            finished[live[row]].append((float(scores[row, rank] / generated), sequence))
        for row in live:
            finished[row] = sorted(finished[row], key=lambda hypothesis: -hypothesis[0])[:beams]
        if length == max_length:
            break

        onward = np.argsort(ends, axis=1, kind="stable")[:, :beams]  # the best that did not end, in order
        running = np.take_along_axis(scores, onward, 1)
        tokens = np.take_along_axis(candidates, onward[:, :, None], 1)
        parents = np.take_along_axis(parents, onward, 1) + np.arange(len(live))[:, None] * log_probs.shape[1]

        hopes = running[:, 0] / generated
        stays = np.array(
            [len(finished[row]) < beams or hope > finished[row][-1][0] for row, hope in zip(live, hopes, strict=True)]
        )
        if not stays.any():
            break
        live, running, tokens, parents = live[stays], running[stays], tokens[stays], parents[stays].ravel()
        same_rows = bool(stays.all()) and log_probs.shape[1] == beams  # beams only change places within their row
        state = state.take(parents, same_cross=same_rows)
        logits = state.read(tokens[:, :, length - 1].reshape(-1, 1))[:, -1]
    return [hypotheses[0][1] for hypotheses in finished]


def rank_answers(
    decoder: Graph,
    cross_feeds: Mapping[str, np.ndarray],
    cross_mask: np.ndarray,
    answer_ids: Sequence[Sequence[int]],
    past_shapes: Sequence[Sequence[int]],
    *,
    k: int = 128,
    rows: int = 256,
) -> np.ndarray:
    """Score given answers by their log-likelihood, per row of the batch (BLIP's answer ranking, Li et al., 2022).

    The probability of an answer's first token picks the k candidates (ties: the earlier answer), of which the whole
    sequence is then scored: the sum of the log-probabilities of all tokens after the first ([DEC]), [SEP] included.

    Args:
        decoder: decoder graph (see the module).
        cross_feeds: cross_key.{l}, cross_value.{l} [B, H, S, K].
        cross_mask: int64 [B, S].
        answer_ids: A answers as tokens: [DEC], at least one more, [SEP] last.
        past_shapes: (H, K) of the decoder's self-attention, per layer.
        k: candidates per row; all answers when there are fewer.
        rows: candidates scored in one call; bounds the memory at `rows` x (cross feeds of a row + T x V logits).

    Returns:
        np.ndarray: float32 [B, A], -inf for answers that were no candidates; the first largest is the answer.

    Raises:
        ValueError: no answers, an answer too short, answers that do not start alike, or k < 1.
    """
    if k < 1 or not answer_ids or min(map(len, answer_ids)) < 2 or len({answer[0] for answer in answer_ids}) > 1:
        raise ValueError("ranking needs k >= 1 and answers of at least 2 tokens that all start with the same one")
    lengths = np.array([len(answer) for answer in answer_ids])
    ids = np.zeros((len(answer_ids), lengths.max()), np.int64)  # any token can be padding: the mask hides it
    for index, tokens in enumerate(answer_ids):
        ids[index, : len(tokens)] = tokens

    batch = len(cross_mask)
    state = _start(decoder, cross_feeds, cross_mask, past_shapes)
    first = _log_softmax(state.read(np.full((batch, 1), ids[0, 0]))[:, -1])[:, ids[:, 1]]  # [B, A]
    candidates = np.argsort(-first, axis=1, kind="stable")[:, :k]
    asked, answers = np.repeat(np.arange(batch), candidates.shape[1]), candidates.ravel()
    by_length = np.argsort(lengths[answers], kind="stable")  # little padding
    scores = np.full((batch, len(ids)), -np.inf, np.float32)
    for start in range(0, len(by_length), rows):
        chunk = by_length[start : start + rows]
        question, answer = asked[chunk], answers[chunk]
        end = lengths[answer].max()
        total = first[question, answer]
        if end > 2:
            valid = np.arange(2, end) < lengths[answer][:, None]  # [rows, T]: is there a token to predict
            continued = state.take(question)
            log_probs = _log_softmax(continued.read(ids[answer, 1 : end - 1], valid.astype(np.int64)))
            token_scores = np.take_along_axis(log_probs, ids[answer, 2:end, None], 2)[:, :, 0]
            total = total + np.where(valid, token_scores, 0).sum(1)
        scores[question, answer] = total
    return scores
