"""What goes into pruning and what comes out: a layer is two tensors, a result is masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning.parallel import side_by_side


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable linear layer. Weights shared between modules are one layer.

    Attributes:
        name: unique name, used as the key of the masks.
        modality: the part of the model it belongs to, such as "vision" or "text".
        weight: [out, in], any floating type and device; it is read, never changed.
        input_norm: [in], sqrt(sum over calibration tokens of x_j^2); None when the method needs none.
    """

    name: str
    modality: str
    weight: Tensor
    input_norm: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Pruned:
    """The result of pruning.

    Attributes:
        masks: per layer [out, in] bool, True = kept, on the device of the layer's weight.
        weights: new weights of methods that update what they keep, else empty.
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


def checked(layers: Sequence[Layer], needs: frozenset[str] = frozenset()) -> list[Layer]:
    """Refuse layers that cannot be pruned; return the others with tensors detached and in float32.

    Weights that are float32 already are not copied. A reduced precision is widened exactly; float64 is rounded.

    Args:
        layers: what shall be pruned.
        needs: what the method asks for besides the weight.

    Returns:
        list[Layer]: the same layers, ready to be scored.

    Raises:
        RequestError: no layers, a name used twice, a wrong shape or type, a missing norm, NaN or infinity.
    """
    if not layers:
        raise RequestError("no layers to prune: the model has no prunable linear layer")
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"layer {name!r} is given twice: weights shared between modules are one layer")
    return side_by_side(lambda layer: _checked(layer, "input_norm" in needs), layers)


def _checked(layer: Layer, needs_norm: bool) -> Layer:
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        found = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise RequestError(f"layer {layer.name!r}: the weight is {found}, a floating-point [out, in] matrix is needed")
    weight = weight.detach().to(torch.float32)
    _finite(weight, layer.name, "weight")
    if not needs_norm:
        return Layer(layer.name, layer.modality, weight)

    norm = layer.input_norm
    if norm is None:
        raise RequestError(f"layer {layer.name!r} has no input norm: run the calibration pass or choose another method")
    if not isinstance(norm, Tensor) or norm.shape != weight.shape[1:] or not norm.is_floating_point():
        found = f"{norm.dtype} {list(norm.shape)}" if isinstance(norm, Tensor) else type(norm).__name__
        raise RequestError(
            f"layer {layer.name!r}: the input norm is {found}, floats [{weight.shape[1]}] are needed: collect it again"
        )
    norm = norm.detach().to(weight.device, torch.float32)
    _finite(norm, layer.name, "input norm")
    if norm.min() < 0:
        raise RequestError(f"layer {layer.name!r}: the input norm is negative somewhere: collect the statistics again")
    return Layer(layer.name, layer.modality, weight, norm)


def _finite(tensor: Tensor, name: str, what: str) -> None:
    low, high = torch.aminmax(tensor)  # both are NaN as soon as one element is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise RequestError(f"layer {name!r}: the {what} holds NaN or infinity in float32: repair the checkpoint first")
