"""Magnitude pruning: small weights go. One score, three scopes.

    S_ij = |W_ij|

`omp` compares all layers with each other (one-shot magnitude pruning), `modal-magnitude` the layers of one modality,
`local-magnitude` the weights of one layer.
"""

from torch import Tensor


def score(weight: Tensor) -> Tensor:
    """Score every weight by its magnitude.

    Args:
        weight: W, [out, in] float32.

    Returns:
        Tensor: |W|, [out, in] float32.
    """
    return weight.abs()
