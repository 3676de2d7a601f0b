"""From layers to masks: score every layer once, cut it at every ratio."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning.budgets import checked_ratio, count_of, layer_counts
from vlprune.pruning.layers import Layer, Pruned, checked
from vlprune.pruning.masks import pack, unpack
from vlprune.pruning.methods import Method, get_method
from vlprune.pruning.parallel import side_by_side
from vlprune.pruning.patterns import Pattern


DEFAULT_RATIO = 0.9


def prune_layers(
    layers: Sequence[Layer],
    method: str = "multiflow",
    ratio: float | None = None,
    pattern: str = "unstructured",
    seed: int = 0,
) -> Pruned:
    """Choose which weights to remove; the layers are left as they are.

    The masks depend on the layers, their order and the arguments alone: they are bit-identical on every device and for
    every number of threads. Among equal scores the earlier weight (layer order, then row by row) is removed first.

    Args:
        layers: the prunable layers, each with a unique name.
        method: a name from `METHODS`.
        ratio: fraction of the prunable weights to remove, more than 0 and less than 1; None = 0.9, or what an n:m
            pattern implies. Counts are rounded down to whole units per budget group.
        pattern: "unstructured", "n:m" (n kept of m along the input dimension) or "rxc" (blocks).
        seed: for the methods that draw; a non-negative integer.

    Returns:
        Pruned: the masks [out, in], True = kept, on the device of each weight.

    Raises:
        RequestError: a wrong option, a layer that cannot be pruned, NaN or infinity.
    """
    return next(prune_layers_at(layers, method, None if ratio is None else [ratio], pattern, seed))[1]


def prune_layers_at(
    layers: Sequence[Layer],
    method: str = "multiflow",
    ratios: Sequence[float] | None = None,
    pattern: str = "unstructured",
    seed: int = 0,
) -> Iterator[tuple[float, Pruned]]:
    """Prune at several ratios for little more than the price of one.

    Everything is checked before this returns; the scoring happens when the first result is asked for. Only one ratio's
    masks exist unpacked at a time (the others wait as bits), provided the caller lets go of the last.

    Args:
        layers: as in `prune_layers`.
        method: as in `prune_layers`.
        ratios: the fractions to remove, in any order; None as in `prune_layers`.
        pattern: as in `prune_layers`.
        seed: as in `prune_layers`.

    Returns:
        Iterator[tuple[float, Pruned]]: each ratio, in the order given, with its masks.

    Raises:
        RequestError: a wrong option, a layer that cannot be pruned, NaN or infinity.
    """
    chosen, shape = get_method(method), Pattern.parse(pattern)
    if ratios is None:
        ratios = [shape.fixed_ratio or DEFAULT_RATIO]
    if not ratios:
        raise RequestError("no ratio given: name at least one, such as 0.9")
    ratios = [checked_ratio(ratio) for ratio in ratios]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RequestError(f"seed {seed!r:.40} is not a non-negative integer")
    for ratio in ratios:
        shape.check_ratio(ratio)
    ready = checked(layers, chosen.needs)
    for layer in ready:
        shape.check_shape(layer.name, layer.weight.shape)
    return _prune(ready, chosen, ratios, shape, seed)


def _prune(
    layers: list[Layer], method: Method, ratios: list[float], pattern: Pattern, seed: int
) -> Iterator[tuple[float, Pruned]]:
    counts = _counts(layers, method, ratios, pattern, seed)

    def cut(index: int) -> list[NDArray[np.uint8]]:
        scores = method.score(layers[index], seed)
        return [pack(mask) for mask in pattern.masks(scores, [count[index] for count in counts])]

    packed = side_by_side(cut, range(len(layers)))  # per layer, per ratio
    for r, ratio in enumerate(ratios):
        masks = {x.name: unpack(bits[r], x.weight.shape) for x, bits in zip(layers, packed, strict=True)}
        yield ratio, Pruned({x.name: masks.pop(x.name).to(x.weight.device) for x in layers})


def _counts(layers: list[Layer], method: Method, ratios: list[float], pattern: Pattern, seed: int) -> list[list[int]]:
    """Per ratio, per layer: units to remove."""
    rows, columns = pattern.block
    units = [layer.weight.numel() // (rows * columns) for layer in layers]
    counts = [[count_of(ratio, number) for number in units] for ratio in ratios]
    if method.budget == "layer" or pattern.kept is not None:
        return counts

    groups: dict[str, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        groups[layer.modality if method.budget == "modality" else ""].append(index)

    def shared(index: int) -> Tensor:
        return pattern.units(method.shared(layers[index], seed))

    for members in groups.values():
        total = sum(units[index] for index in members)
        readers = [partial(shared, index) for index in members]
        shares = layer_counts(readers, [count_of(ratio, total) for ratio in ratios], method.across)
        for row, share in zip(counts, shares, strict=True):
            for index, count in zip(members, share, strict=True):
                row[index] = count
    return counts
