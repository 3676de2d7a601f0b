"""Image-text retrieval: recall at 1, 5 and 10 both ways, the best candidates re-ranked by the matching head."""

from dataclasses import replace
from typing import Any

import numpy as np

from vlprune.data.sets import CaptionData
from vlprune.progress import track
from vlprune.tasks.common import Graphs, Processor, Spec, base_spec, batches
from vlprune.tasks.metrics import Scores, captions_of, match_rank, recall_scores


def make_spec(processor: Processor, max_length: int = 35, rerank: int = 16) -> dict[str, Any]:
    """Make the task.json of retrieval.

    Args:
        processor: turns images and texts into model inputs.
        max_length: texts are cut to this many tokens (the authors' 35).
        rerank: candidates per query that the matching head re-ranks, 0 = none (the authors use 256 on COCO).

    Returns:
        dict[str, Any]: the spec.
    """
    return {**base_spec("retrieval", processor, max_length), "rerank": rerank}


def evaluate(
    graphs: Graphs, spec: Spec, processor: Processor, data: CaptionData, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Score retrieval among all images and all captions of the data.

    Candidates are ordered by cosine similarity; the `rerank` best of each query are ordered anew by similarity +
    match logit (Li et al., BLIP, 2022) and stay before all others. Ties count against the model, so of equal captions
    on two images neither finds its image alone.

    Families without a matching head have `rerank` 0.

    With re-ranking the states of all images stay in memory: N x P x D float32, which is 0.6 GB per 1,000 images for
    BLIP-base at 224 pixels.

    Args:
        graphs: image_encoder, text_encoder and, with re-ranking, itm.
        spec: task.json; `rerank`, `max_length` and `enc_token_id` are used.
        processor: turns images and texts into model inputs.
        data: images with captions.
        batch_size: images, texts, or image-text pairs per call of a graph.
        seed: of the bootstrap.

    Returns:
        Scores: the recalls; per image an output with `i2t_rank`, the rank of its best caption, `t2i_ranks`, its rank
            for each of its captions (1 = first), `text`, the text found first for it, and `image`, the index of the
            image found first for its first caption.
    """
    owners = np.repeat(np.arange(len(data.captions)), [len(captions) for captions in data.captions])
    texts = [caption for captions in data.captions for caption in captions]
    ids, mask = processor.texts(texts, first="cls", max_length=spec["max_length"])
    rerank = spec["rerank"]

    image_embeds, states = _encode_images(graphs, processor, data, batch_size, keep_states=rerank > 0)
    similarity = image_embeds @ _encode_texts(graphs, ids, mask, batch_size).T  # [N, M]

    # A pair is one number, image x M + text: the candidates of both directions overlap, and are matched once.
    best_texts = [_best(row, rerank) for row in similarity]
    best_images = [_best(column, rerank) for column in similarity.T]
    text_pairs = [image * len(texts) + best for image, best in enumerate(best_texts)]
    image_pairs = [best * len(texts) + text for text, best in enumerate(best_images)]
    pairs = np.unique(np.concatenate(text_pairs + image_pairs))
    logits = np.empty(0, np.float32)
    if rerank:
        ids[:, 0] = spec["enc_token_id"]
        logits = _match(graphs, states, ids, mask, *np.divmod(pairs, len(texts)), batch_size)

    def rank(scores: np.ndarray, best: np.ndarray, codes: np.ndarray, matches: np.ndarray) -> tuple[int, int]:
        """Rank of the match, and which candidate is the first."""
        scores = _reranked(scores, best, logits[np.searchsorted(pairs, codes)])
        return match_rank(scores, matches), int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))

    captions, own_images = captions_of(owners, len(similarity)), owners[:, None]
    of_images = [rank(*found) for found in zip(similarity, best_texts, text_pairs, captions, strict=True)]
    of_texts = [rank(*found) for found in zip(similarity.T, best_images, image_pairs, own_images, strict=True)]
    image_ranks, text_ranks = (np.array([found for found, _ in ranked]) for ranked in (of_images, of_texts))
    outputs = [
        {
            "i2t_rank": image_rank,
            "t2i_ranks": text_ranks[own].tolist(),
            "text": texts[text],
            "image": of_texts[own[0]][1],
        }
        for (image_rank, text), own in zip(of_images, captions, strict=True)
    ]
    return replace(recall_scores(image_ranks, text_ranks, owners, seed), outputs=outputs)


def _encode_images(
    graphs: Graphs, processor: Processor, data: CaptionData, batch_size: int, keep_states: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Embed all images [N, E]; also give their states [N, P, D] when they are kept, else an empty array."""
    total = len(data.captions)
    embeds, states = [], np.empty((0,), np.float32)
    for batch in track(batches(total, batch_size), "encoding images"):
        outputs = graphs["image_encoder"]({"pixel_values": processor.images([data.images[i] for i in batch])})
        embeds.append(outputs["image_embeds"])
        if keep_states:
            if not batch.start:
                states = np.empty((total, *outputs["image_states"].shape[1:]), np.float32)
            states[batch.start : batch.stop] = outputs["image_states"]
    return np.concatenate(embeds), states


def _encode_texts(graphs: Graphs, ids: np.ndarray, mask: np.ndarray, batch_size: int) -> np.ndarray:
    """Embed all texts [M, E]; texts of like length run together, so that little padding is computed."""
    lengths = mask.sum(1)
    order = np.argsort(lengths, kind="stable")
    embeds = []
    for batch in track(batches(len(ids), batch_size), "encoding texts"):
        rows = order[batch.start : batch.stop]
        longest = lengths[rows].max()
        feeds = {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}
        embeds.append(graphs["text_encoder"](feeds)["text_embeds"])
    return np.concatenate(embeds)[np.argsort(order)]


def _match(
    graphs: Graphs,
    states: np.ndarray,
    ids: np.ndarray,
    mask: np.ndarray,
    images: np.ndarray,
    texts: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Give the match logits of pairs images[i], texts[i]; pairs whose texts have like length run together."""
    lengths = mask.sum(1)
    order = np.argsort(lengths[texts], kind="stable")
    logits = np.empty(len(texts), np.float32)
    for batch in track(batches(len(texts), batch_size), "matching pairs"):
        pairs = order[batch.start : batch.stop]
        rows = texts[pairs]
        longest = lengths[rows].max()
        feeds = {
            "input_ids": ids[rows, :longest],
            "attention_mask": mask[rows, :longest],
            "image_states": states[images[pairs]],
        }
        logits[pairs] = graphs["itm"](feeds)["itm_logits"][:, 1]
    return logits


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest scores, largest first, ties by the lower index."""
    return np.argsort(-scores, kind="stable")[:k] if k else np.empty(0, np.int64)


def _reranked(scores: np.ndarray, best: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Add the match logits to the scores of the best candidates and move all others below them, in their order."""
    if not len(best):
        return scores
    lifted = scores[best].astype(np.float64) + logits
    below = scores - (scores.max() - lifted.min() + 1.0)
    below[best] = lifted
    return below
