"""Layer-normalised magnitude: weights are compared across layers after division by their layer's L2 norm.

    S_ij = |W_ij| / ||W||_F,   one threshold over all layers

Within a layer the order is that of |W|, so only the comparison between layers needs the formula.
"""

import numpy as np
from numpy.typing import NDArray


def across(magnitude: NDArray[np.float64], tail: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """Score magnitudes so that they compare across layers.

    Args:
        magnitude: |w|, [n].
        tail: not used.
        total: sum of the squares of the whole layer, ||W||_F^2.

    Returns:
        NDArray[np.float64]: the square of S, [n], which has the same order and needs no root.
    """
    return magnitude**2 / total
