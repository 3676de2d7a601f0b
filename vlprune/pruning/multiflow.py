"""MULTIFLOW: how much information flows through an edge (Farina et al., CVPR 2024, arXiv 2404.05621).

An edge matters when its weight is large and the neurons at both its ends carry much signal. With a_j the norm of input
neuron j over the calibration tokens:

    Imp_in(j)  = mean_i |W_ij| a_j
    Imp_out(i) = mean_j |W_ij| a_j
    S_ij = Imp_in(j) |W_ij| Imp_out(i)                                         (equation 6)

How many weights a layer loses comes from a magnitude threshold over its modality (equation 7, `budgets.py`); the
layer's lowest S go (equation 8, `selection.py`). Masks are local to a layer, so constants of a layer cancel: means are
sums here, and the norm need not be divided by the number of samples.
"""

from torch import Tensor

from vlprune.pruning.exact import exact_sum


def score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score every weight by equation 6, up to one constant factor per layer.

    Args:
        weight: W, [out, in] float32.
        input_norm: a, [in] float32.

    Returns:
        Tensor: S, [out, in] float32, non-negative, bit-identical on every device.
    """
    magnitude = weight.abs()
    a = _scaled(input_norm)
    importance_in = a * exact_sum(magnitude, 0)  # [in]
    importance_out = exact_sum(magnitude * a, 1)  # [out]
    return magnitude.mul_(_scaled(importance_in)).mul_(_scaled(importance_out)[:, None])


def _scaled(factor: Tensor) -> Tensor:
    """To float32 with 1 as the largest, so that a product of factors neither overflows nor vanishes."""
    peak = factor.max()
    return (factor / peak.where(peak > 0, 1)).float()
