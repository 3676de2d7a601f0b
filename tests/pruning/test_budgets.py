"""Counts: exact, shared by one threshold, ties counted against the earlier layer."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.errors import RequestError
from vlprune.pruning import l2, lamp
from vlprune.pruning.budgets import checked_ratio, count_of, layer_counts


def scores_by_formula(layers: list[np.ndarray], method: str) -> list[np.ndarray]:
    """The papers' formulas, one weight at a time."""
    if method == "l2":
        return [np.array([w**2 / max((x**2).sum(), 1e-300) for w in x]) for x in layers]
    if method == "lamp":
        return [np.array([w**2 / max((x[x >= w] ** 2).sum(), 1e-300) for w in x]) for x in layers]
    return layers


def counts_by_sorting(scores: list[np.ndarray], count: int) -> list[int]:
    owner = np.concatenate([np.full(len(x), index) for index, x in enumerate(scores)])
    gone = owner[np.argsort(np.concatenate(scores), kind="stable")[:count]]
    return [int((gone == index).sum()) for index in range(len(scores))]


ACROSS = {"magnitude": None, "l2": l2.across, "lamp": lamp.across}


@pytest.mark.parametrize("method", ACROSS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=30), min_size=1, max_size=5), st.data())
def test_small_whole_numbers_with_many_ties(method, layers, data):
    # Sums of squares of small whole numbers are exact in any arithmetic, so ties are ties in both computations.
    x = [np.array(layer, dtype=np.float64) for layer in layers]
    total = sum(map(len, layers))
    counts = data.draw(st.lists(st.integers(0, total), min_size=1, max_size=3))
    readers = [lambda v=v: torch.from_numpy(v).float() for v in x]
    result = layer_counts(readers, counts, ACROSS[method])
    scores = scores_by_formula(x, method)
    for count, shares in zip(counts, result, strict=True):
        assert sum(shares) == count
        assert shares == counts_by_sorting(scores, count)


@pytest.mark.parametrize("method", ACROSS)
def test_layers_of_very_different_scale(method):
    generator = np.random.default_rng(3)
    x = [
        np.abs(generator.standard_normal(n)).astype(np.float32) * s for n, s in ((3000, 1e-3), (500, 1.0), (2000, 0.05))
    ]
    x.append(np.zeros(100, np.float32))
    total = sum(map(len, x))
    counts = [int(total * ratio) for ratio in (0.01, 0.3, 0.5, 0.63, 0.9, 0.99)] + [1, total]
    result = layer_counts([lambda v=v: torch.from_numpy(v) for v in x], counts, ACROSS[method])
    scores = scores_by_formula([v.astype(np.float64) for v in x], method)
    for count, shares in zip(counts, result, strict=True):
        assert sum(shares) == count
        assert shares == counts_by_sorting(scores, count)


def test_lamp_keeps_the_largest_weight_of_every_layer():
    x = [torch.rand(100) * 10.0**-k for k in range(4)]
    (shares,) = layer_counts([lambda v=v: v for v in x], [396], lamp.across)
    assert shares == [99, 99, 99, 99]


def test_equal_scores_are_counted_against_the_earlier_layer():
    x = [torch.ones(4), torch.ones(4), torch.ones(4)]
    assert layer_counts([lambda v=v: v for v in x], [6], None) == [[4, 2, 0]]


def test_each_layer_is_read_twice_for_any_number_of_counts():
    reads = []

    def reader():
        reads.append(1)
        return torch.rand(50, generator=torch.Generator().manual_seed(0))

    layer_counts([reader], [5, 10, 20, 40], lamp.across)
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("ratio", "units", "expected"), [(0.29, 100, 29), (0.7, 10, 7), (0.63, 141_557_760, 89_181_388)]
)
def test_a_ratio_is_the_decimal_it_prints_as(ratio, units, expected):
    assert count_of(ratio, units) == expected
    assert int(0.29 * 100) == 28, "what floating point would give"


@settings(deadline=None)
@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 10**12))
def test_counts_are_within_one_of_the_ratio(ratio, units):
    count = count_of(ratio, units)
    assert 0 <= count < units or (count == units == 0)
    assert abs(Fraction(ratio) * units - count) < 1 + Fraction(units, 10**15)


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, float("nan"), float("inf"), "abc", "0.5", None, True, [0.5], 2j])
def test_what_is_no_ratio(ratio):
    with pytest.raises(RequestError, match="between 0 and 1") as error:
        checked_ratio(ratio)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ratio", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_what_is_a_ratio(ratio):
    assert checked_ratio(ratio) == 0.5 and math.isfinite(checked_ratio(ratio))
