"""Sums whose result depends on no order, so that scores are bit-identical on every device and thread count.

Floating-point addition is not associative: a GPU, one thread and eight threads each round a sum differently. Here every
term is first rounded to a grid so coarse that all partial sums are integers below 2^53 grid steps, which float64 adds
without any rounding; then every order gives the same bits. All other arithmetic in this room is elementwise (+, *, /,
sqrt: correctly rounded by IEEE 754 on CPU and CUDA alike).
"""

import math

import torch
from torch import Tensor


def grid(peak: Tensor, terms: int) -> float:
    """Choose how many grid steps make up 1: a power of two, fine enough for float64 accuracy of the sum.

    Args:
        peak: the largest term, finite.
        terms: the most numbers that will be added up.

    Returns:
        float: factor after which `terms` rounded terms add up to less than 2^53.
    """
    _, exponent = math.frexp(float(peak))  # all terms < 2^exponent (0 when all are zero)
    return 2.0 ** (53 - terms.bit_length() - exponent)


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Split along the first dimension into pieces whose float64 copy stays in the cache of a CPU.

    Args:
        x: any shape, not empty.

    Returns:
        tuple[Tensor, ...]: views; larger ones on a GPU, where starting a kernel costs more.
    """
    elements = 2**17 if x.device.type == "cpu" else 2**24
    return x.split(max(1, elements * x.shape[0] // x.numel()))


def exact_sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum over `dim`, the same bits whatever the order of the additions.

    Args:
        x: non-negative and finite, any floating type.
        dim: dimensions to sum over.

    Returns:
        Tensor: float64 sums; each term is off by at most terms * 2^-52 of the largest.
    """
    dims = (dim,) if isinstance(dim, int) else dim
    steps = grid(x.max(), math.prod(x.shape[d] for d in dims))
    sums = [part.to(torch.float64, copy=True).mul_(steps).round_().sum(dims) for part in pieces(x)]
    whole = torch.stack(sums).sum(0) if 0 in dims else torch.cat(sums)
    return whole / steps
