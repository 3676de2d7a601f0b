"""Pruning: tensors in, masks out. This room knows no model.

    layers = [Layer("encoder.0.fc1", "vision", weight, input_norm), ...]
    pruned = prune_layers(layers, method="multiflow", ratio=0.9)
    pruned.masks["encoder.0.fc1"]      # [out, in] bool, True = kept

`statistics.py` collects the input norms in one calibration pass, `masks.py` keeps masks in files.
"""

from vlprune.pruning.layers import Layer, Pruned
from vlprune.pruning.masks import load_masks, save_masks, sparsity_summary
from vlprune.pruning.methods import METHODS, Method, get_method
from vlprune.pruning.prune import prune_layers, prune_layers_at
from vlprune.pruning.statistics import InputNorms, load_statistics, save_statistics


__all__ = [
    "METHODS",
    "InputNorms",
    "Layer",
    "Method",
    "Pruned",
    "get_method",
    "load_masks",
    "load_statistics",
    "prune_layers",
    "prune_layers_at",
    "save_masks",
    "save_statistics",
    "sparsity_summary",
]
