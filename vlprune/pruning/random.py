"""Random pruning, the floor that every method has to beat: S_ij ~ U(0, 1), one threshold over all layers."""

import zlib

import numpy as np
import torch
from torch import Tensor


def score(weight: Tensor, name: str, seed: int) -> Tensor:
    """Draw a score for every weight; always on the CPU, so that one seed gives one mask on every device.

    Args:
        weight: [out, in], only its shape and device matter.
        name: name of the layer; each has its own stream, so its draws do not depend on the other layers.
        seed: seed of the run.

    Returns:
        Tensor: S, [out, in] float32 in [0, 1).
    """
    stream = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    return torch.from_numpy(stream.random(tuple(weight.shape), dtype=np.float32)).to(weight.device)
