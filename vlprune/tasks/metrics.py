"""Task metrics with bootstrap intervals. Higher is better in all of them.

i2t_r1, i2t_r5, i2t_r10  share of images with one of their captions among the best 1, 5, 10 texts
t2i_r1, t2i_r5, t2i_r10  share of captions with their image among the best 1, 5, 10 images
mean_r1                  mean of i2t_r1 and t2i_r1
bleu_1 .. bleu_4         corpus BLEU, 0 to 1 (Papineni et al., 2002, as in pycocoevalcap)
cider                    CIDEr-D, 0 to 10: "133.3" in papers is 1.333 (Vedantam et al., 2015, as in pycocoevalcap)
exact                    share of captions equal, word for word, to a reference
accuracy                 official VQA accuracy, or share of sentences judged rightly, 0 to 1
top1, top5               share of images whose class is the best, or among the best 5
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlprune.tasks.ptb import caption_words


RECALL_AT = (1, 5, 10)
RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        values: metric -> value (units: see the module).
        ci95: metric -> bounds of the 95 % bootstrap interval.
        n: number of samples: images (retrieval, captioning) or questions (vqa).
        outputs: one small JSON-able dict per sample, in the order of the data.
    """

    values: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    n: int
    outputs: list[dict[str, Any]] = field(default_factory=list)


def bootstrap(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Give 95 % percentile intervals of metrics that are functions of sums over independent units.

    The same seed and number of units give the same resamples, so two models scored on the same data are comparable.

    Args:
        sums: float [units, features]: what each unit (an image with all that hangs on it) adds to the sums.
        statistic: turns sums [R, features] into metrics [R, metrics].
        seed: of the resampling.
        resamples: number of resamples R.

    Returns:
        np.ndarray: [metrics, 2], lower and upper bound.
    """
    units = len(sums)
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, 100):  # 100 at a time: the counts of many units would not fit otherwise
        counts = random.multinomial(units, np.full(units, 1 / units), size=min(100, resamples - start))
        parts.append(counts @ sums)
    return np.percentile(statistic(np.concatenate(parts)), [2.5, 97.5], axis=0).T


def _scores(
    names: Sequence[str], sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int
) -> Scores:
    values = statistic(sums.sum(0, keepdims=True))[0]
    bounds = bootstrap(sums, statistic, seed)
    return Scores(
        values={name: float(value) for name, value in zip(names, values, strict=True)},
        ci95={name: (float(low), float(high)) for name, (low, high) in zip(names, bounds, strict=True)},
        n=n,
    )


def match_rank(scores: np.ndarray, matches: Sequence[int] | np.ndarray) -> int:
    """Rank of the best true match among all candidates, 1 = first.

    Ties count against the model: a wrong candidate with the same score stands before the match, and a score that is
    not a number is the worst. A model that scores everything alike therefore never has rank 1.

    Args:
        scores: float [candidates].
        matches: indices of the true matches, at least one.

    Returns:
        int: the rank.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = scores[matches].max()
    wrong = np.ones(len(scores), bool)
    wrong[matches] = False
    return 1 + int(np.count_nonzero(wrong & (scores >= best)))


def retrieval_ranks(scores: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the true matches in both directions.

    Args:
        scores: float [N, M]: image against text.
        owners: int [M]: the image each text belongs to; every image owns at least one.

    Returns:
        tuple[np.ndarray, np.ndarray]: int [N], per image the rank of its best text; int [M], per text the rank of its
            image.
    """
    captions = captions_of(owners, len(scores))
    image_ranks = [match_rank(row, own) for row, own in zip(scores, captions, strict=True)]
    text_ranks = [match_rank(column, [owner]) for column, owner in zip(scores.T, owners, strict=True)]
    return np.array(image_ranks), np.array(text_ranks)


def captions_of(owners: np.ndarray, images: int) -> list[np.ndarray]:
    """List the texts of each image.

    Args:
        owners: int [M]: the image each text belongs to.
        images: number of images N.

    Returns:
        list[np.ndarray]: per image, the indices of its texts.
    """
    order = np.argsort(owners, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owners, minlength=images))[:-1])


def recall_scores(image_ranks: np.ndarray, text_ranks: np.ndarray, owners: np.ndarray, seed: int = 0) -> Scores:
    """Recall at 1, 5 and 10 both ways; intervals resample images together with their texts.

    Args:
        image_ranks: int [N], per image the rank of its best text (1 = first).
        text_ranks: int [M], per text the rank of its image.
        owners: int [M]: the image each text belongs to.
        seed: of the bootstrap.

    Returns:
        Scores: i2t_r1 .. t2i_r10 and mean_r1, without outputs.
    """
    images = len(image_ranks)
    image_hits = np.stack([image_ranks <= k for k in RECALL_AT], 1).astype(float)
    text_hits = [np.bincount(owners, weights=text_ranks <= k, minlength=images) for k in RECALL_AT]
    texts = np.bincount(owners, minlength=images)
    sums = np.column_stack([image_hits, *text_hits, np.ones(images), texts])

    def recalls(total: np.ndarray) -> np.ndarray:
        i2t, t2i = total[:, :3] / total[:, 6:7], total[:, 3:6] / total[:, 7:8]
        return np.column_stack([i2t, t2i, (i2t[:, 0] + t2i[:, 0]) / 2])

    names = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in RECALL_AT]
    return _scores([*names, "mean_r1"], sums, recalls, images, seed)


def class_scores(ranks: np.ndarray, classes: int, seed: int = 0) -> Scores:
    """Top-1 and top-5 accuracy; intervals resample images.

    Args:
        ranks: int [N], per image the rank of its class (1 = first).
        classes: how many there are to choose from.
        seed: of the bootstrap.

    Returns:
        Scores: top1 and, where it is not 1 anyway, top5, without outputs.
    """
    tops = [k for k in (1, 5) if k == 1 or k < classes]
    sums = np.column_stack([*(ranks <= k for k in tops), np.ones(len(ranks))]).astype(float)
    return _scores([f"top{k}" for k in tops], sums, lambda total: total[:, :-1] / total[:, -1:], len(ranks), seed)


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0) -> Scores:
    """CIDEr, BLEU and exact match of generated captions, counted over the words of the COCO evaluation.

    Intervals resample images. BLEU is recomputed from the resampled counts; CIDEr resamples the scores of the images,
    whose word weights stay those of the whole set. CIDEr of a single image is 0, since every word is in all images.

    Args:
        captions: N generated captions, empty ones allowed.
        references: per caption, at least one true caption.
        seed: of the bootstrap.

    Returns:
        Scores: cider, bleu_1 .. bleu_4, exact, without outputs.
    """
    # Not at the top: training imports this room, too, and needs neither.
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    bleu, cider = BleuScorer(n=4), CiderScorer(n=4, sigma=6.0)
    exact = []
    for caption, true in zip(captions, references, strict=True):
        words, true_words = " ".join(caption_words(caption)), [" ".join(caption_words(text)) for text in true]
        bleu += (words, true_words)
        cider += (words, true_words)
        exact.append(bool(words) and words in true_words)
    cider.compute_doc_freq()
    per_image = np.array(cider.compute_cider())
    sums = np.array([[*test["correct"], *test["guess"], test["testlen"], _closest(test)] for test in bleu.ctest], float)
    sums = np.column_stack([sums, per_image, exact, np.ones(len(exact))])

    def statistic(total: np.ndarray) -> np.ndarray:
        return np.column_stack([total[:, 10] / total[:, 12], _corpus_bleu(total), total[:, 11] / total[:, 12]])

    names = ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "exact"]
    return _scores(names, sums, statistic, len(exact), seed)


def _closest(test: dict[str, Any]) -> int:
    """Length of the reference closest to the caption's, the shorter one of two."""
    return min((abs(length - test["testlen"]), length) for length in test["reflen"])[1]


def _corpus_bleu(total: np.ndarray) -> np.ndarray:
    """BLEU-1..4 [R, 4] from sums [R, 10+]: matching n-grams (4), n-grams (4), caption length, reference length.

    The small constants are those of pycocoevalcap, so that the values are its values.
    """
    correct, guess, length, reference = total[:, :4], total[:, 4:8], total[:, 8:9], total[:, 9:10]
    precision = np.cumprod((correct + 1e-15) / (guess + 1e-9), axis=1) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (reference + 1e-9)
    return precision * np.exp(np.minimum(1 - 1 / ratio, 0))


def mean_scores(name: str, values: Iterable[float], units: Sequence[int] | np.ndarray, seed: int = 0) -> Scores:
    """Mean of a per-sample score, with an interval that resamples units.

    Args:
        name: of the metric.
        values: one score per sample.
        units: int, the unit each sample belongs to; samples of one unit (questions on one image) stay together.
        seed: of the bootstrap.

    Returns:
        Scores: the one metric, without outputs.
    """
    scores = np.fromiter(values, float)
    _, units = np.unique(units, return_inverse=True)
    sums = np.column_stack([np.bincount(units, weights=scores), np.bincount(units)])
    return _scores([name], sums, lambda total: total[:, :1] / total[:, 1:2], len(scores), seed)
