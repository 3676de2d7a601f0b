"""Cut the k lowest scores of a layer without sorting them.

The bits of a non-negative float32, read as an integer, have the order of the float. Its upper half is a bucket: one
counting pass finds the bucket that holds the k-th lowest score, and only that bucket (about one percent) is sorted.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


# Finite non-negative floats have bit patterns below that of infinity, 0x7F80_0000.
BUCKETS = 0x7F80
# Bucket b holds the floats from EDGES[b] (included) to EDGES[b + 1] (excluded); [BUCKETS + 1], the last is infinity.
EDGES: NDArray[np.float64] = (np.arange(BUCKETS + 1, dtype=np.int32) << 16).view(np.float32).astype(np.float64)
# Scores looked at together: the buckets of more would be a second copy of a large layer.
PIECE = 2**22


def buckets_of(scores: Tensor) -> Tensor:
    """Tell the bucket of every score.

    Args:
        scores: [n] float32, non-negative and finite, no negative zero.

    Returns:
        Tensor: [n] int32 in [0, BUCKETS).
    """
    return scores.view(torch.int32) >> 16


def sizes_of(scores: Tensor) -> NDArray[np.int64]:
    """Count the scores of every bucket.

    Args:
        scores: as in `buckets_of`.

    Returns:
        NDArray[np.int64]: [BUCKETS].
    """
    counts = [torch.bincount(buckets_of(part), minlength=BUCKETS) for part in scores.split(PIECE)]
    return torch.stack(counts).sum(0).cpu().numpy()


def between(scores: Tensor, low: float, high: float) -> Tensor:
    """Pick the scores of some buckets.

    Args:
        scores: [n] float32.
        low: edge of the first bucket.
        high: edge after the last bucket.

    Returns:
        Tensor: the scores in [low, high), in their order.
    """
    if scores.device.type != "cpu":
        return scores[(scores >= float(low)) & (scores < float(high))]
    values = scores.numpy()  # comparing and picking by a mask are several times faster in numpy than in torch
    inside = values >= np.float32(low)
    inside &= values < np.float32(high)
    return torch.from_numpy(values[inside])


def lowest(scores: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Drop the lowest scores, for several counts. Among equal scores the one with the lowest index goes first.

    Args:
        scores: [n] float32, non-negative and finite, no negative zero.
        counts: how many to drop, each in [0, n].

    Yields:
        Tensor: [n] bool, True = kept; exactly `count` are False.
    """
    cumulative = np.cumsum(sizes_of(scores))
    for count in counts:
        if count == 0:
            yield torch.ones_like(scores, dtype=torch.bool)
            continue
        b = int(np.searchsorted(cumulative, count))  # first bucket that fills the count
        rank = count - (int(cumulative[b - 1]) if b else 0)  # 1 = lowest of that bucket
        candidates = between(scores, EDGES[b], EDGES[b + 1]).sort().values
        threshold = candidates[rank - 1]
        kept = scores > threshold
        ties_kept = int((candidates <= threshold).sum()) - rank
        if ties_kept:
            kept[(scores == threshold).nonzero().flatten()[-ties_kept:]] = True
        yield kept
