import itertools

import pytest
import torch

from vlprune.pruning.patterns import Pattern
from vlprune.pruning.permutation import arrange


def kept_share(scores: torch.Tensor, pattern: Pattern) -> float:
    (mask,) = pattern.masks(scores, [0])
    return float((scores * mask).double().sum() / scores.double().sum())


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2"])
def test_the_order_keeps_what_it_says(text: str) -> None:
    pattern = Pattern.parse(text)
    scores = torch.rand(48, 32, generator=torch.Generator().manual_seed(0)) ** 4
    order, before, after = arrange([scores], pattern)
    assert torch.equal(order.sort().values, torch.arange(32))
    assert before == pytest.approx(kept_share(scores, pattern), abs=1e-5)
    assert after == pytest.approx(kept_share(scores[:, order], pattern), abs=1e-5)
    assert after > before + 0.01


def test_the_best_order_of_a_few_columns_is_found() -> None:
    """Two columns are strong in the same rows: they must part, or all else that is strong must go."""
    scores = torch.zeros(6, 8)
    scores[:3, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[3:, 4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    pattern = Pattern.parse("2:4")
    best = max(
        kept_share(scores[:, list(order)], pattern)
        for order in itertools.islice(itertools.permutations(range(8)), 0, None, 7)
    )
    order, _, after = arrange([scores], pattern)
    assert after == pytest.approx(max(best, 1.0))


def test_columns_stay_in_their_head_and_matrices_share_the_order() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(16, 24, generator=generator) ** 4 for _ in range(2)]
    order, before, after = arrange(scores, Pattern.parse("2:4"), heads=3)
    assert torch.equal(order // 8, torch.arange(24) // 8)
    both = torch.cat(scores)
    assert after == pytest.approx(kept_share(both[:, order], Pattern.parse("2:4")), abs=1e-5) and after > before


def test_any_number_of_threads_finds_the_same() -> None:
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(2))
    threads, orders = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            orders.append(arrange([scores], Pattern.parse("2:4"), seed=5)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*orders)
    assert not torch.equal(orders[0], arrange([scores], Pattern.parse("2:4"), seed=6)[0])


@pytest.mark.parametrize("scores", [torch.zeros(3, 8), torch.rand(3, 4)])
def test_nothing_to_gain(scores: torch.Tensor) -> None:
    order, before, after = arrange([scores], Pattern.parse("2:4"))
    assert torch.equal(order, torch.arange(scores.shape[1])) and before == after
