"""How many units each layer loses. A ratio becomes a whole number once per budget group and stays one.

A unit is a weight, or a block of weights (`patterns.py`). The budget group is one layer, the layers of one modality, or
all layers. In a group of several layers one threshold cuts all of them; the layers' counts add up to the group's count
exactly. Equal scores are counted against the earlier layer first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning.exact import grid
from vlprune.pruning.parallel import side_by_side
from vlprune.pruning.selection import BUCKETS, EDGES, PIECE, between, buckets_of, sizes_of


Floats = NDArray[np.float64]
# (magnitude [n], tail [n], total) -> what layers are compared by; must grow with the magnitude. See l2.py and lamp.py.
Across = Callable[[Floats, Floats, float], Floats]


def checked_ratio(ratio: object) -> float:
    """Refuse what is no fraction of weights to remove.

    Args:
        ratio: what the user gave.

    Returns:
        float: the ratio, more than 0 and less than 1.

    Raises:
        RequestError: no number, NaN, or outside.
    """
    if isinstance(ratio, Real) and 0 < float(ratio) < 1:  # True and False are 1 and 0
        return float(ratio)
    raise RequestError(
        f"ratio {ratio!r:.40} is not a number between 0 and 1: give the fraction of weights to remove, such as 0.9"
    )


def count_of(ratio: float, units: int) -> int:
    """Turn a ratio into a whole number of units, rounded down.

    Args:
        ratio: fraction to remove; read as the decimal it prints as, so that 0.29 of 100 are 29 (0.29 * 100 is below).
        units: size of the budget group.

    Returns:
        int: units to remove.
    """
    return floor(Fraction(repr(float(ratio))) * units)


def layer_counts(
    magnitudes: Sequence[Callable[[], Tensor]], counts: Sequence[int], across: Across | None = None
) -> list[list[int]]:
    """Share the counts of one budget group among its layers, by one threshold over the whole group.

    A histogram per layer brackets the threshold; only the units in the bracket are looked at one by one. So the group
    is never held in memory at once, and is read twice however many counts are asked for.

    Args:
        magnitudes: per layer, a function that returns its unit magnitudes [n], float32 and non-negative.
        counts: how many units the group loses, each in [0, units of the group].
        across: what makes magnitudes of different layers comparable; None = they are.

    Returns:
        list[list[int]]: per count, per layer, how many units it loses.
    """
    spreads = side_by_side(lambda magnitude: _Spread.of(magnitude(), across), magnitudes)
    brackets = [_bracket(spreads, count) for count in counts if count]

    def inside(pair: tuple[_Spread, Callable[[], Tensor]]) -> list[tuple[int, Floats]]:
        spread, values = pair[0], pair[1]()
        return [spread.inside(values, *bracket) for bracket in brackets]

    per_layer = side_by_side(inside, zip(spreads, magnitudes, strict=True))
    per_count = iter(zip(*per_layer, strict=True))
    return [_share(next(per_count), count) if count else [0] * len(magnitudes) for count in counts]


def _bracket(spreads: Sequence["_Spread"], count: int) -> tuple[float, float]:
    """Find low <= threshold <= high, where the threshold is the count-th lowest score of the group."""
    sizes = np.concatenate([spread.sizes for spread in spreads])
    low, high = (np.concatenate(bounds) for bounds in zip(*((s.starts, s.ends) for s in spreads), strict=True))
    bracket = []
    for bound in (low, high):
        order = np.argsort(bound, kind="stable")
        bracket.append(float(bound[order[np.searchsorted(np.cumsum(sizes[order]), count)]]))
    return bracket[0], bracket[1]


def _share(insides: Sequence[tuple[int, Floats]], count: int) -> list[int]:
    below, candidates = zip(*insides, strict=True)
    rank = count - sum(below)
    threshold = np.partition(np.concatenate(candidates), rank - 1)[rank - 1]
    less = [int(np.searchsorted(scores, threshold, "left")) for scores in candidates]
    ties = rank - sum(less)
    shares = []
    for scores, surely, lower in zip(candidates, below, less, strict=True):
        equal = min(int(np.searchsorted(scores, threshold, "right")) - lower, ties)
        ties -= equal
        shares.append(surely + lower + equal)
    return shares


@dataclass(frozen=True, eq=False)
class _Squares:
    """Sums of squares of one layer, in whole steps, so that no order of adding changes a bit."""

    tail: Floats  # [BUCKETS + 1], sum over this bucket and all larger ones
    steps: float  # steps that make up 1

    @classmethod
    def of(cls, magnitude: Tensor) -> "_Squares":
        steps = grid(magnitude.max().double().square(), magnitude.numel())
        sums = torch.zeros(BUCKETS, dtype=torch.float64, device=magnitude.device)
        for part in magnitude.split(PIECE):
            terms = part.double().square_().mul_(steps).round_()
            sums += torch.bincount(buckets_of(part), weights=terms, minlength=BUCKETS)
        found = sums.cpu().numpy()
        return cls(np.append(np.cumsum(found[::-1])[::-1], 0.0), steps)

    def compare(self, across: Across, magnitude: Floats, tail: Floats) -> Floats:
        """Apply `across`; at least one step in the denominators keeps 0/0 out where all weights are zero."""
        return across(magnitude, np.maximum(tail, 1) / self.steps, max(float(self.tail[0]), 1.0) / self.steps)


@dataclass(frozen=True, eq=False)
class _Spread:
    """Where the scores of one layer lie: for each used bucket of magnitudes its size and the range of its scores."""

    buckets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: Floats
    ends: Floats
    across: Across | None
    squares: _Squares | None

    @classmethod
    def of(cls, magnitude: Tensor, across: Across | None) -> "_Spread":
        sizes = sizes_of(magnitude)
        bounds, squares = EDGES, None
        if across:
            squares = _Squares.of(magnitude)
            bounds = squares.compare(across, EDGES, squares.tail)
        used = np.flatnonzero(sizes)
        return cls(used, sizes[used], bounds[used], bounds[used + 1], across, squares)

    def inside(self, magnitude: Tensor, low: float, high: float) -> tuple[int, Floats]:
        """Count the units surely below the bracket; score those that may lie in it, ascending."""
        surely = int(self.sizes[self.ends <= low].sum())
        chosen = self.buckets[(self.ends > low) & (self.starts < high)]
        if not len(chosen):
            return surely, np.empty(0)
        first, last = int(chosen[0]), int(chosen[-1])
        x = np.sort(between(magnitude, EDGES[first], EDGES[last + 1]).cpu().numpy()).astype(np.float64)
        if not (self.across and self.squares):
            return surely, x
        steps = np.rint(x**2 * self.squares.steps)
        tail = np.cumsum(steps[::-1])[::-1] + self.squares.tail[last + 1]
        # Equal magnitudes share the tail that starts at the first of them.
        return surely, self.squares.compare(self.across, x, tail[np.searchsorted(x, x)])
