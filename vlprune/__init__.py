"""vlprune: prune vision-language models once, fine-tune per task, deploy in ONNX Runtime, with proof.

Shape letters used in every docstring and comment of this package:

    B  batch                 D  width (hidden size)        K  width of one attention head
    N  number of images      E  projected (joint) width    L  number of layers
    T  text tokens           H  attention heads            V  vocabulary size
    P  image tokens          S  tokens of the states that cross-attention reads
       (CLS + patches)       A  answers

Importing this module is cheap: torch and its friends are imported only by what uses them.
"""

from importlib import import_module
from typing import Any


__version__ = "0.1.0"

# Public name -> module that defines it, resolved on first use so that `vlprune --help` never imports torch.
_PUBLIC = {
    "load": "vlprune.models",
    "compress": "vlprune.pipeline",
    "prune_layers": "vlprune.pruning",
    "Layer": "vlprune.pruning",
    "Pruned": "vlprune.pruning",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vlprune' has no attribute {name!r}")
