"""Sums that no order changes."""

import math

import numpy as np
import pytest
import torch

from vlprune.pruning.exact import exact_sum, grid, pieces


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_close_to_the_true_sum(scale):
    x = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).abs() * scale
    for dim in (0, 1):
        true = [math.fsum(column) for column in (x.T if dim == 0 else x).double().tolist()]
        np.testing.assert_allclose(exact_sum(x, dim).numpy(), true, rtol=1e-12)


def test_the_same_bits_in_any_order_and_split():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(5000, 64, generator=generator) ** 20  # many magnitudes: float sums of these depend on the order
    first = exact_sum(x, 0)
    assert not torch.equal(x.sum(0), x.flip(0).sum(0)), "the example must be able to fail"
    for _ in range(5):
        assert torch.equal(exact_sum(x[torch.randperm(5000, generator=generator)], 0), first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(exact_sum(x, 0), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("terms", [1, 2, 3, 1000, 2**24 - 1, 2**24])
@pytest.mark.parametrize("peak", [1.0, 0.999, 3e-39, 3e38, 0.0])
def test_the_largest_possible_sum_is_below_two_to_the_53(terms, peak):
    steps = grid(torch.tensor(peak, dtype=torch.float64), terms)
    assert round(peak * steps) * terms < 2**53
    assert math.frexp(steps)[0] == 0.5, "a power of two, so that scaling rounds nothing"


def test_all_zero():
    assert torch.equal(exact_sum(torch.zeros(3, 4), 0), torch.zeros(4, dtype=torch.float64))


def test_pieces_cover_everything_once():
    for shape in ((1, 7), (1000, 3), (3, 2**18), (513, 1024)):
        x = torch.arange(math.prod(shape)).view(shape)
        assert torch.equal(torch.cat(pieces(x)), x)


def test_over_two_dimensions():
    x = torch.rand(6, 4, 5, 3)
    torch.testing.assert_close(exact_sum(x, (1, 3)), x.double().sum((1, 3)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_summed_stays_as_it_is(dtype):
    x = torch.rand(40, 30, dtype=dtype)
    before = x.clone()
    exact_sum(x, 0)
    assert torch.equal(x, before)
