"""Cutting: what a plan does not keep is removed for good, and matrices become smaller.

A unit goes with its rows in the inner Linears (and the bias of these rows) and its columns in the outer ones; biases of
the outer ones, LayerNorms and the residual stream stay. Removed units of the masked model (`zero`) contribute exactly
nothing - zero query, key and value rows, or zero into an activation with f(0) = 0 - so that both models compute the
same function; the softmax scale stays 1/sqrt(K) of the original width K, which the attention modules keep themselves.

A layer is removed whole: the next one reads what it would have read. In pre-LayerNorm towers (vision) this equals
zeroing both of its outputs; in BERT's post-LayerNorm towers its LayerNorms go as well.

The surgery is our own. Torch-Pruning (1.6.1, tried on BLIP) traces a forward pass and finds the heads in fused
query-key-value rows. But it splits Parameters that modules share: cut in BLIP's text encoder, a feed-forward network
stayed whole in the decoder. Head counts, softmax scales, whole layers and saved shapes are left to the caller. Given
`Group`s, which know what is shared, all it could do is select rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlprune.errors import RequestError
from vlprune.structured.plan import Plan, check_plan


if TYPE_CHECKING:
    from vlprune.models.family import Group, Model, Tower


def cut(model: Model, plan: Plan) -> None:
    """Remove what a plan does not keep, in place. Weights that modules share stay shared.

    Layers behind a removed one move up: their parameters' names change, and nothing else's.

    Args:
        model: any family; gradients are dropped, an optimizer must be made anew.
        plan: for this model as it is now.

    Raises:
        RequestError: the plan does not fit the model.
    """
    groups, towers = model.groups(), model.towers()
    check_plan(plan, groups, towers)
    parameters: dict[tuple[int, int], nn.Parameter] = {}  # old one and dimension -> new one, for all that share it
    old: list[Tensor] = []  # alive as long as their ids are used
    for group in groups:
        if not plan.keeps(group) or plan.shape(group) == group.shape:
            continue
        kept = plan.units[group.name].flatten()
        for linear, rows in _rows(group, kept).items():
            old += [p for p in (linear.weight, linear.bias) if p is not None]
            linear.weight = _selected(linear.weight, 0, rows, parameters)
            if linear.bias is not None:
                linear.bias = _selected(linear.bias, 0, rows, parameters)
            linear.out_features = len(rows)
        columns = kept.nonzero().flatten()
        for linear in group.outer:
            old.append(linear.weight)
            linear.weight = _selected(linear.weight, 1, columns, parameters)
            linear.in_features = len(columns)
        _tell(group, plan.shape(group))
    _remove_layers(model, towers, plan.layers)


def zero(model: Model, plan: Plan) -> None:
    """Make the masked model, in place: removed units get zero rows and biases, removed layers are skipped.

    Args:
        model: any family.
        plan: for this model as it is now.

    Raises:
        RequestError: the plan does not fit the model.
    """
    groups, towers = model.groups(), model.towers()
    check_plan(plan, groups, towers)
    with torch.no_grad():
        for group in groups:
            if plan.keeps(group) and group.name in plan.units:
                kept = plan.units[group.name].flatten().to(group.inner[0][0].weight.device)
                for linear, offset in group.inner:
                    rows = slice(offset * len(kept), (offset + 1) * len(kept))
                    linear.weight[rows].masked_fill_(~kept[:, None], 0.0)
                    if linear.bias is not None:
                        linear.bias[rows].masked_fill_(~kept, 0.0)
    _remove_layers(model, towers, plan.layers)


def _tell(group: Group, shape: tuple[int, ...]) -> None:
    """Tell the modules how many units are left; transformers' own feed-forward modules need not know."""
    for module in group.modules:
        if set_units := getattr(module, "set_units", None):
            set_units(shape)


def _rows(group: Group, kept: Tensor) -> dict[nn.Linear, Tensor]:
    """The rows that each inner Linear keeps, in order; one Linear may hold the units several times over."""
    found: dict[nn.Linear, list[Tensor]] = {}
    for linear, offset in sorted(group.inner, key=lambda entry: entry[1]):
        found.setdefault(linear, []).append(kept.nonzero().flatten() + offset * len(kept))
    return {linear: torch.cat(rows) for linear, rows in found.items()}


def _selected(parameter: Tensor, dim: int, index: Tensor, known: dict[tuple[int, int], nn.Parameter]) -> nn.Parameter:
    key = (id(parameter), dim)
    if key not in known:
        chosen = parameter.detach().index_select(dim, index.to(parameter.device))
        known[key] = nn.Parameter(chosen, requires_grad=parameter.requires_grad)
    return known[key]


def _remove_layers(model: Model, towers: Sequence[Tower], layers: Mapping[str, Tensor]) -> None:
    for tower in towers:
        if tower.name not in layers or bool(layers[tower.name].all()):
            continue
        gone = (~layers[tower.name]).nonzero().flatten().tolist()
        for path in tower.stacks:
            stack: Any = model.get_submodule(path)
            for index in reversed(gone):
                del stack[index]
    tell_depth(model)


def tell_depth(model: Model) -> None:
    """Make the config say how many layers the model has: of several towers of a modality the deepest counts.

    Args:
        model: towers or layers were removed from it.
    """
    for tower in sorted(model.towers(), key=lambda tower: tower.depth):
        _config(model, tower).num_hidden_layers = tower.depth


def _config(model: Model, part: Group | Tower) -> Any:
    """The part of a configuration that tells the sizes of a modality; single towers have no parts."""
    return getattr(model.config, f"{part.modality}_config", model.config)


# --- sizes in a checkpoint's config -----------------------------------------------------------------------------------


def sizes(model: Model) -> dict[str, list[int]]:
    """List what is smaller than the model's config says, to be kept in config.json beside it.

    Args:
        model: cut or not.

    Returns:
        dict[str, list[int]]: path of an attention -> [H, K], of a feed-forward network -> [N], every use of a shared
            one; path of a stack of layers -> [L] for a tower less deep than the config's (see `tell_depth`).
    """
    found: dict[str, list[int]] = {}
    for group in model.groups():
        if group.shape != full_shape(model, group):
            found |= {name: list(group.shape) for name in group.names}
    for tower in model.towers():
        if tower.depth != _config(model, tower).num_hidden_layers:
            found |= {path: [tower.depth] for path in tower.stacks}
    return found


def full_shape(model: Model, group: Group) -> tuple[int, ...]:
    """Tell the units of a group before anything was cut, as the config keeps them.

    Args:
        model: the model.
        group: one of its groups.

    Returns:
        tuple[int, ...]: (H, K) or (N,).
    """
    config = _config(model, group)
    if group.kind == "ffn":
        return (config.intermediate_size,)
    return (config.num_attention_heads, config.hidden_size // config.num_attention_heads)


def checked_sizes(value: Any, where: str) -> dict[str, list[int]]:
    """Refuse what cannot be the result of `sizes`; whether it fits a model is for `reshape` to see.

    Args:
        value: read from a file, None = nothing was cut.
        where: the file, for messages.

    Returns:
        dict[str, list[int]]: the value.

    Raises:
        RequestError: it does not map names to one or two positive integers.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{where}: vlprune.sizes must map module paths to sizes")
    for name, shape in value.items():
        sound = isinstance(shape, list) and len(shape) in (1, 2)
        if not sound or not all(type(size) is int and 0 < size < 2**31 for size in shape):
            raise RequestError(f"{where}: vlprune.sizes gives {name!r:.120} the shape {shape!r:.60}, which is none")
    return value


def reshape(model: Model, sizes: Mapping[str, Sequence[int]]) -> None:
    """Give a model the shapes of a cut one, in place: on the meta device, before its weights are loaded.

    Args:
        model: as its config describes it, nothing shared; new values are undefined.
        sizes: result of the function of that name, checked by `checked_sizes`; not trusted beyond that.

    Raises:
        RequestError: a size names no part of the model, or is larger than the config's.
    """
    known: set[str] = set()
    for tower in model.towers():
        for path in tower.stacks:
            if path in sizes:
                _fits(path, (tower.depth,), sizes[path])
                stack: Any = model.get_submodule(path)
                del stack[sizes[path][0] :]
                known.add(path)
    for group in model.groups():
        for name in group.names:
            if name in sizes:
                _fits(name, group.shape, sizes[name])
                known.add(name)
        if group.name in sizes:
            _resize(group, tuple(sizes[group.name]))
    if unknown := sizes.keys() - known:
        raise RequestError(f"vlprune.sizes names {min(unknown)!r:.120}, which the model does not have")


def _fits(name: str, full: tuple[int, ...], size: Sequence[int]) -> None:
    if len(size) != len(full) or not all(1 <= n <= most for n, most in zip(size, full, strict=True)):
        raise RequestError(f"vlprune.sizes gives {name!r:.120} the shape {list(size)!r:.60}, at most {list(full)} fits")


def _resize(group: Group, shape: tuple[int, ...]) -> None:
    """Make the Linears of a group as large as `shape` says, their values undefined."""
    units, new = prod(group.shape), prod(shape)
    for linear in dict.fromkeys(linear for linear, _ in group.inner):
        linear.out_features = linear.out_features // units * new
        linear.weight = nn.Parameter(linear.weight.new_empty(linear.out_features, linear.in_features))
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.new_empty(linear.out_features))
    for linear in group.outer:
        linear.in_features = new
        linear.weight = nn.Parameter(linear.weight.new_empty(linear.out_features, new))
    _tell(group, shape)
