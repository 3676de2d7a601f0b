"""LAMP: layer-adaptive magnitude (Lee et al., ICLR 2021, arXiv 2010.07611).

    S_u = w_u^2 / sum of w_v^2 over all v of the layer with |w_v| >= |w_u|,   one threshold over all layers

The score tells what share of the surviving layer a weight is, were the layer pruned up to it; the largest weight of
every layer scores 1, so no layer is emptied early. Within a layer the order is that of |W|, so only the comparison
between layers needs the formula.
"""

import numpy as np
from numpy.typing import NDArray


def across(magnitude: NDArray[np.float64], tail: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """Score magnitudes so that they compare across layers.

    Args:
        magnitude: |w|, [n].
        tail: per magnitude, the sum of the squares of all weights of the layer that are at least as large, [n].
        total: not used.

    Returns:
        NDArray[np.float64]: S, [n].
    """
    return magnitude**2 / tail
