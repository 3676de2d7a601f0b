"""Masks in a file: one bit per weight, beside what made them.

A mask file is a safetensors file of kind "vlprune-masks-1":

    mask/<layer>      U8 [ceil(out * in / 8)]: the mask row by row, 8 weights per byte, first weight in the highest bit,
                      1 = kept; the bits after the last weight are 0
    weight/<layer>    [out, in] new weight, only for methods that update what they keep
    header            {"shapes": {layer: [out, in]}, "metadata": {method, ratio, pattern, seed, model, sparsity ...}}
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning import tensorfile
from vlprune.pruning.layers import Pruned


KIND = "vlprune-masks-1"
_WEIGHT_TYPES = ("F32", "F16", "BF16", "F64")
_METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),
    "ratio": lambda value: isinstance(value, float) and 0 < value < 1,
    "pattern": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int and value >= 0,
    "model": lambda value: isinstance(value, str),
}


def pack(mask: Tensor) -> NDArray[np.uint8]:
    """Pack a mask into bits.

    Args:
        mask: bool, any shape and device.

    Returns:
        NDArray[np.uint8]: [ceil(numel / 8)], row by row, first element in the highest bit, zeros behind the last.
    """
    return np.packbits(mask.cpu().numpy())


def unpack(bits: NDArray[np.uint8], shape: Sequence[int]) -> Tensor:
    """Undo `pack`.

    Args:
        bits: [ceil(numel / 8)].
        shape: shape of the mask.

    Returns:
        Tensor: bool, on the CPU.
    """
    return torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape)))).view(torch.bool).view(tuple(shape))


def save_masks(path: Path | str, pruned: Pruned, metadata: Mapping[str, Any]) -> None:
    """Write masks and changed weights, atomically.

    Args:
        path: the file.
        pruned: what `prune_layers` returned.
        metadata: method, ratio, pattern, seed, model (a fingerprint of the dense model, text); more is kept as it is.

    Raises:
        RequestError: one of these is missing or of a wrong type.
    """
    metadata = check_metadata(Path(path), metadata)
    if stray := pruned.weights.keys() - pruned.masks.keys():
        raise RequestError(f"layer {min(stray)!r} has a new weight but no mask: give it one")
    tensors = {f"mask/{name}": torch.from_numpy(pack(mask)) for name, mask in pruned.masks.items()}
    tensors |= {f"weight/{name}": weight.detach().cpu() for name, weight in pruned.weights.items()}
    shapes = {name: list(mask.shape) for name, mask in pruned.masks.items()}
    tensorfile.write(path, KIND, tensors, {"shapes": shapes, "metadata": metadata})


def load_masks(path: Path | str, expected: Mapping[str, Sequence[int]] | None = None) -> tuple[Pruned, dict[str, Any]]:
    """Read masks; nothing in the file is believed before it is checked.

    Args:
        path: the file.
        expected: the layers of the model at hand and their [out, in]; None accepts any.

    Returns:
        tuple[Pruned, dict[str, Any]]: masks and weights on the CPU in the order they were saved, and the metadata.

    Raises:
        RequestError: the file is missing, damaged, contradicts itself, or belongs to another model.
    """
    path = Path(path)
    with tensorfile.opened(path, KIND) as file:
        metadata = check_metadata(path, file.header.get("metadata"))
        shapes = _checked_shapes(path, file.header.get("shapes"))
        if expected is not None:
            _check_expected(path, shapes, {name: tuple(shape) for name, shape in expected.items()})
        known = {f"{kind}/{name}" for name in shapes for kind in ("mask", "weight")}
        if unknown := file.names - known:
            raise RequestError(f"{path} holds {min(unknown)!r:.120}, which is no mask of its layers: make it again")

        masks, weights = {}, {}
        for name, shape in shapes.items():
            numel = shape[0] * shape[1]
            bits = file.read(f"mask/{name}", ("U8",), ((numel + 7) // 8,)).numpy()
            if numel % 8 and bits[-1] & (0xFF >> numel % 8):
                raise RequestError(f"{path}: the mask of {name!r:.120} has bits behind its last weight: make it again")
            masks[name] = unpack(bits, shape)
            if f"weight/{name}" in file.names:
                weights[name] = file.read(f"weight/{name}", _WEIGHT_TYPES, shape)
                if not torch.isfinite(weights[name]).all():
                    raise RequestError(f"{path}: the weight of {name!r:.120} holds NaN or infinity: make it again")
    return Pruned(masks, weights), metadata


def sparsity_summary(masks: Mapping[str, Tensor], modality_of: Mapping[str, str]) -> dict[str, Any]:
    """Count what masks remove.

    Args:
        masks: per layer, bool, True = kept.
        modality_of: per layer, its modality.

    Returns:
        dict[str, Any]: fractions removed: "achieved", "per_modality" {modality: s}, "per_layer" {layer: s}.
    """
    sizes = {name: mask.numel() for name, mask in masks.items()}
    removed = {name: sizes[name] - int(torch.count_nonzero(mask)) for name, mask in masks.items()}
    members: dict[str, list[str]] = {}
    for name in masks:
        members.setdefault(modality_of[name], []).append(name)

    def fraction(names: Sequence[str]) -> float:
        return sum(removed[name] for name in names) / max(1, sum(sizes[name] for name in names))

    return {
        "achieved": fraction(list(masks)),
        "per_modality": {modality: fraction(names) for modality, names in members.items()},
        "per_layer": {name: fraction([name]) for name in masks},
    }


def check_metadata(path: Path, metadata: Any) -> dict[str, Any]:
    """Refuse metadata that lack what made the masks; also used for plans of structured methods.

    Args:
        path: the file, for messages.
        metadata: what was read, or is to be written.

    Returns:
        dict[str, Any]: a copy.

    Raises:
        RequestError: an entry is missing or of a wrong type.
    """
    if not isinstance(metadata, Mapping):
        raise RequestError(f"{path}: the metadata is no JSON object: make it again")
    for key, sound in _METADATA_CHECKS.items():
        if not sound(metadata.get(key)):
            raise RequestError(f"{path}: the metadata has {key} = {metadata.get(key)!r:.60}: make it again")
    return dict(metadata)


def _checked_shapes(path: Path, shapes: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(shapes, dict) or not shapes:
        raise RequestError(f"{path}: its header names no layers: make it again")
    for name, shape in shapes.items():
        sound = isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and 0 < s < 2**40 for s in shape)
        if not sound:
            raise RequestError(f"{path}: layer {name!r:.120} claims the shape {shape!r:.60}: make it again")
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def _check_expected(path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in [*expected, *shapes]:
        mine, other = expected.get(name), shapes.get(name)
        if mine != other:
            raise RequestError(
                f"{path} belongs to another model: layer {name!r:.120} is {list(other) if other else 'missing'} there, "
                f"{list(mine) if mine else 'missing'} in the model"
            )
