"""Metrics against published values, the library's own calls, and plain loops."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from vlprune.tasks.metrics import (
    bootstrap,
    caption_scores,
    match_rank,
    mean_scores,
    recall_scores,
    retrieval_ranks,
)


PUBLISHED = json.loads((Path(__file__).parent / "caption_metrics.json").read_text())


def test_caption_metrics_have_the_published_values(capsys):
    references = list(zip(*PUBLISHED["references"], strict=True))  # stored per reference file, not per hypothesis
    scores = caption_scores(PUBLISHED["hypotheses"], references)
    expected = PUBLISHED["expected"]
    for order in range(1, 5):
        assert scores.values[f"bleu_{order}"] == pytest.approx(expected[f"Bleu_{order}"], abs=1e-5)
    assert scores.values["cider"] == pytest.approx(expected["CIDEr"], abs=1e-5)
    assert scores.values["exact"] == 0.0
    assert scores.n == 2
    assert capsys.readouterr() == ("", "")


def random_captions(images, seed):
    random = np.random.default_rng(seed)
    words = ["a", "red", "dog", "runs", "on", "green", "grass", "with", "big", "balls", "near", "water"]
    captions = [[" ".join(random.choice(words, random.integers(0, 9))) for _ in range(4)] for _ in range(images)]
    return [row[0] for row in captions], [row[1:3] + ["a red dog runs on the grass"] for row in captions]


@pytest.mark.parametrize("seed", range(3))
def test_caption_metrics_equal_the_library(seed):
    hypotheses, references = random_captions(30, seed)
    results, truth = {i: [h] for i, h in enumerate(hypotheses)}, dict(enumerate(references))
    scores = caption_scores(hypotheses, references)
    bleu, _ = Bleu(4).compute_score(truth, results, verbose=0)
    assert [scores.values[f"bleu_{order}"] for order in range(1, 5)] == pytest.approx(bleu, rel=1e-9)
    assert scores.values["cider"] == pytest.approx(Cider().compute_score(truth, results)[0], rel=1e-9)


def test_exact_match_ignores_case_and_punctuation():
    references = [["A red dog.", "two dogs"], ["one cat"], ["..."]]
    assert caption_scores(["a red, dog", "cat", "!"], references).values["exact"] == pytest.approx(1 / 3)


def test_empty_captions_score_zero():
    scores = caption_scores(["", ""], [["a dog"], ["a cat"]])
    assert set(scores.values.values()) == {0.0}
    assert caption_scores(["", "x"], [["..."], ["!"]]).values["cider"] == 0.0  # references without a word


def test_caption_intervals():
    hypotheses, references = random_captions(60, 1)
    scores = caption_scores(hypotheses, references, seed=3)
    for name, (low, high) in scores.ci95.items():
        assert low <= scores.values[name] <= high, name
    assert scores.ci95["cider"][0] < scores.ci95["cider"][1]
    assert scores == caption_scores(hypotheses, references, seed=3)
    assert scores.ci95 != caption_scores(hypotheses, references, seed=4).ci95


def test_match_rank():
    scores = np.array([0.1, 0.9, 0.5, 0.5, 0.2])
    assert match_rank(scores, [1]) == 1
    assert match_rank(scores, [2]) == 3  # the tie at 0.5 counts against it
    assert match_rank(scores, [2, 3]) == 2  # both true: only the 0.9 is wrong
    assert match_rank(scores, [0, 4]) == 4
    assert match_rank(np.array([np.nan, 0.0]), [0]) == 2
    assert match_rank(np.full(4, np.nan), [2]) == 4
    assert match_rank(np.full(4, -np.inf), [2]) == 4


@pytest.mark.parametrize("constant", [0.0, np.nan, np.inf, -np.inf])
def test_a_constant_model_recalls_nothing(constant):
    owners = np.repeat(np.arange(20), 3)
    scores = recall_scores(*retrieval_ranks(np.full((20, 60), constant), owners), owners)
    assert set(scores.values.values()) == {0.0}


def test_retrieval_ranks_equal_a_plain_loop():
    random = np.random.default_rng(0)
    owners = random.permutation(np.concatenate([np.arange(8), random.integers(0, 8, 12)]))
    scores = random.integers(0, 6, (8, 20)).astype(float)  # many ties
    image_ranks, text_ranks = retrieval_ranks(scores, owners)
    for image in range(8):
        best = max(scores[image, text] for text in range(20) if owners[text] == image)
        assert image_ranks[image] == 1 + sum(scores[image, t] >= best and owners[t] != image for t in range(20))
    for text in range(20):
        own = scores[owners[text], text]
        assert text_ranks[text] == 1 + sum(scores[i, text] >= own and i != owners[text] for i in range(8))


def test_recall_scores():
    owners = np.array([0, 0, 0, 1, 2])
    scores = recall_scores(np.array([1, 6, 11]), np.array([1, 2, 5, 10, 11]), owners)
    assert scores.values == pytest.approx(
        {
            "i2t_r1": 1 / 3, "i2t_r5": 1 / 3, "i2t_r10": 2 / 3,
            "t2i_r1": 1 / 5, "t2i_r5": 3 / 5, "t2i_r10": 4 / 5,
            "mean_r1": (1 / 3 + 1 / 5) / 2,
        }
    )  # fmt: skip
    assert scores.n == 3
    assert scores.ci95["t2i_r1"] == (0.0, 1 / 3)  # only image 0 again and again: one of its three texts


def test_perfect_recall_has_no_interval():
    owners = np.arange(12)
    scores = recall_scores(np.ones(12, int), np.ones(12, int), owners)
    assert set(scores.ci95.values()) == {(1.0, 1.0)}


def test_bootstrap_width_is_that_of_the_normal_approximation():
    hits = np.random.default_rng(1).random(400) < 0.3
    scores = mean_scores("accuracy", hits, np.arange(400))
    low, high = scores.ci95["accuracy"]
    share = hits.mean()
    assert scores.values["accuracy"] == pytest.approx(share)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 400), rel=0.1)


def test_samples_of_one_unit_stay_together():
    """Questions that all depend on their image carry no more information than one question per image."""
    hits = np.random.default_rng(1).random(50) < 0.5
    one = mean_scores("accuracy", hits, np.arange(50))
    many = mean_scores("accuracy", np.repeat(hits, 20), np.repeat(np.arange(50) + 7, 20))
    assert many.ci95["accuracy"] == pytest.approx(one.ci95["accuracy"])
    assert many.n == 1000


def test_bootstrap_resamples_in_blocks_alike():
    sums = np.random.default_rng(0).normal(size=(30, 2))
    bounds = bootstrap(sums, lambda total: total / 30, seed=5, resamples=250)
    assert bounds.shape == (2, 2)
    assert (bounds[:, 0] < sums.mean(0)).all()
    assert (sums.mean(0) < bounds[:, 1]).all()
