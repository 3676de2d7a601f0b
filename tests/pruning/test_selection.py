"""Cutting the lowest scores, against a stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.pruning.selection import BUCKETS, EDGES, between, buckets_of, lowest


def by_sorting(scores: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[torch.from_numpy(np.argsort(scores.numpy(), kind="stable")[:count])] = False
    return kept


floats = st.floats(0, 2.0**127, width=32) | st.sampled_from([0.0, 1.0, 1e-45, 3.4028234663852886e38])


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=1, max_size=60), st.data())
def test_equals_a_stable_sort(values, data):
    scores = torch.tensor(values, dtype=torch.float32).abs()
    counts = data.draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=4))
    for count, kept in zip(counts, lowest(scores, counts), strict=True):
        assert torch.equal(kept, by_sorting(scores, count))


@pytest.mark.parametrize("levels", [1, 2, 7, 10**9])
def test_large_and_tied(levels):
    scores = torch.randint(levels, (20_000,), generator=torch.Generator().manual_seed(levels)).float()
    counts = [0, 1, 4999, 18_000, 19_999, 20_000]
    for count, kept in zip(counts, lowest(scores, counts), strict=True):
        assert torch.equal(kept, by_sorting(scores, count))


def test_among_equals_the_first_go_first():
    (kept,) = lowest(torch.full((5,), 2.0), [2])
    assert kept.tolist() == [False, False, True, True, True]


def test_between_includes_the_low_edge_only():
    values = torch.tensor([1.0, 0.5, 2.0, 1.5, 1.0])
    assert between(values, 1.0, 2.0).tolist() == [1.0, 1.5, 1.0]
    assert between(values, 0.0, float("inf")).tolist() == values.tolist()


def test_edges_enclose_their_bucket():
    values = torch.tensor([0.0, 1e-45, 0.02, 1.0, 1.0078124, 3.4028234663852886e38])
    bucket = buckets_of(values).numpy()
    assert bucket.max() < BUCKETS
    assert (EDGES[bucket] <= values.double().numpy()).all() and (values.double().numpy() < EDGES[bucket + 1]).all()
    assert EDGES[0] == 0 and np.isinf(EDGES[-1]) and (np.diff(EDGES) > 0).all()
