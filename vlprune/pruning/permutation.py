"""Put columns in an order in which an n:m pattern keeps more of the score.

Of every m neighbouring columns each row keeps n. Where many strong weights of a row meet in one group, some are lost;
apart, they stay. Which columns meet is free wherever the columns' order is: the hidden units of a feed-forward network,
the dimensions of one head. The search (after Pool and Yu, 2021, "Channel Permutations for N:M Sparsity") draws pairs of
groups, tries every exchange of one column between the two, and makes the best one that gains.

Scores are rounded to whole steps first, so that the same order is found on every machine, by any number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlprune.pruning.patterns import Pattern


ROUNDS = 20
PATIENCE = 5  # rounds with next to no gain after which the search ends
STEPS = 1 << 20  # of the largest score
CHUNK = 1 << 22  # candidates of groups looked at at once, over all rows


def arrange(
    scores: Sequence[Tensor], pattern: Pattern, heads: int = 1, seed: int = 0, rounds: int = ROUNDS
) -> tuple[Tensor, float, float]:
    """Search an order of columns.

    Args:
        scores: one or several [rows, columns], non-negative, whose columns share their order.
        pattern: n:m, whose m divides the columns of a head.
        heads: columns stay within their head, the first columns / heads being the first head's.
        seed: of the draws.
        rounds: at most; in each, every group is once looked at with another.

    Returns:
        tuple[Tensor, float, float]: the column that comes first, second, ... (int64 [columns]); the share of the score
            that the pattern keeps in the order given, and in this one.
    """
    kept, m = pattern.kept, pattern.block[1]
    assert kept is not None
    stacked = torch.cat([part.detach().float().cpu() for part in scores])
    steps = (stacked / stacked.max().clamp_min(1e-30) * STEPS).round().to(torch.int32)  # [rows, columns]
    columns = steps.t().contiguous()  # a group's rows of it are m columns
    groups = torch.arange(len(columns)).view(-1, m)  # [G, m]: columns of each group
    total = max(int(columns.sum(dtype=torch.int64)), 1)
    before = _kept(columns[groups], kept)
    found, quiet = before, 0
    generator = torch.Generator().manual_seed(seed)
    swaps = _swaps(m)
    for _ in range(rounds):
        per_head = torch.stack([torch.randperm(len(groups) // heads, generator=generator) for _ in range(heads)])
        drawn = per_head + torch.arange(heads)[:, None] * (len(groups) // heads)
        pairs = drawn[:, : drawn.shape[1] // 2 * 2].reshape(-1, 2)
        if not len(pairs):
            break
        gain = 0
        for part in pairs.split(max(1, CHUNK // (len(swaps) * columns.shape[1]))):
            gain += _exchange(columns, groups, part, swaps, kept)
        found += gain
        quiet = quiet + 1 if gain < total * 1e-5 else 0
        if quiet == PATIENCE:
            break
    return groups.flatten(), before / total, found / total


def _swaps(m: int) -> Tensor:
    """All ways to exchange one column of two groups, nothing exchanged first: [1 + m * m, 2, m] places of 2 m."""
    rows = [list(range(2 * m))]
    for a in range(m):
        for b in range(m):
            row = list(range(2 * m))
            row[a], row[m + b] = row[m + b], row[a]
            rows.append(row)
    return torch.tensor(rows).view(-1, 2, m)


def _exchange(columns: Tensor, groups: Tensor, pairs: Tensor, swaps: Tensor, kept: int) -> int:
    """Make the best exchange of every pair of groups; tell what it gains."""
    members = groups[pairs].flatten(1)  # [pairs, 2 m]
    candidates = members[:, swaps]  # [pairs, swaps, 2, m]
    values = _kept_each(columns[candidates], kept).sum(2)  # [pairs, swaps]
    best = values.argmax(1)
    chosen = candidates[torch.arange(len(pairs)), best]
    groups[pairs] = chosen
    return int((values.amax(1) - values[:, 0]).sum())


def _kept(columns: Tensor, kept: int) -> int:
    return int(_kept_each(columns, kept).sum())


def _kept_each(columns: Tensor, kept: int) -> Tensor:
    """What each group keeps: [..., m, rows] of scores -> [...]."""
    if kept == 2 and columns.shape[-2] == 4:
        a, b, c, d = columns.unbind(-2)
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        other, least = torch.maximum(c, d), torch.minimum(c, d)
        second = torch.maximum(torch.minimum(high, other), torch.maximum(low, least))
        return (torch.maximum(high, other) + second).sum(-1, dtype=torch.int64)
    return columns.topk(kept, dim=-2).values.sum((-2, -1), dtype=torch.int64)
