"""Reorder the units of a model so that an n:m pattern keeps more; the model computes what it computed.

A unit goes with its row in the inner Linears and its column in the outer ones (see `surgery`): hidden neurons of a
feed-forward network in any order, dimensions of an attention within their head, alike in query, key and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.progress import track
from vlprune.pruning import tensorfile
from vlprune.pruning.patterns import Pattern
from vlprune.pruning.permutation import arrange


if TYPE_CHECKING:
    from vlprune.models.family import Group, Model

KIND = "vlprune.permutation"


@dataclass(frozen=True)
class Permutation:
    """An order of the units of each group.

    Attributes:
        orders: group -> the unit that comes first, second, ... (int64 [units]).
        before: mean share of the outer weights' magnitude that the pattern keeps in the model as given.
        after: the same in this order.
    """

    orders: Mapping[str, Tensor]
    before: float
    after: float


def search(model: Model, pattern: Pattern, seed: int = 0) -> Permutation:
    """Search an order for the units of every group, by the magnitudes of the outer weights.

    Args:
        model: any family; is not changed.
        pattern: n:m; groups whose units per head it does not divide keep their order.
        seed: of the search.

    Returns:
        Permutation: the same on every machine.
    """
    orders, shares = {}, [(0.0, 0.0)]
    groups = model.groups()
    for group in track(groups, "Permuting", len(groups)):
        if group.shape[-1] % pattern.block[1] == 0:
            weights = {id(linear.weight): linear.weight for linear in group.outer}
            heads = group.shape[0] if group.kind == "attention" else 1
            orders[group.name], *share = arrange([w.abs() for w in weights.values()], pattern, heads, seed)
            shares.append((share[0], share[1]))
    count = max(len(orders), 1)
    return Permutation(orders, sum(a for a, _ in shares) / count, sum(b for _, b in shares) / count)


def permute(model: Model, orders: Mapping[str, Tensor]) -> None:
    """Reorder the units, in place; weights that modules share stay shared.

    Args:
        model: the one that the orders were searched for.
        orders: see `Permutation`.
    """
    with torch.no_grad():
        for group in model.groups():
            if group.name in orders:
                _reorder(group, orders[group.name])


def save(path: Path, found: Permutation, made_for: Mapping[str, Any]) -> None:
    """Write a permutation.

    Args:
        path: the file.
        found: what `search` found.
        made_for: what it depends on, compared by `load`.
    """
    header = {"made_for": dict(made_for), "before": found.before, "after": found.after}
    tensorfile.write(path, KIND, {f"order/{name}": order for name, order in found.orders.items()}, header)


def load(path: Path, model: Model, made_for: Mapping[str, Any]) -> Permutation | None:
    """Read a permutation; nothing in the file is believed before it is checked.

    Args:
        path: the file.
        model: the one that is to be permuted.
        made_for: as given to `save`.

    Returns:
        Permutation | None: None where it was made for something else.

    Raises:
        RequestError: the file is damaged, or holds what is no order of the units.
    """
    with tensorfile.opened(path, KIND) as file:
        if file.header.get("made_for") != dict(made_for):
            return None
        before, after = file.header.get("before"), file.header.get("after")
        if not isinstance(before, float) or not isinstance(after, float):
            raise RequestError(f"{path}: its header lacks what the pattern keeps: remove the file and prune again")
        orders = {}
        for group in model.groups():
            if f"order/{group.name}" not in file.names:
                continue
            units = torch.arange(torch.Size(group.shape).numel())
            order = orders[group.name] = file.read(f"order/{group.name}", ("I64",), (len(units),))
            width = group.shape[-1] if group.kind == "attention" else len(units)
            if not torch.equal(order.sort().values, units) or not torch.equal(order // width, units // width):
                raise RequestError(f"{path}: {group.name} has no order of its units: remove the file and prune again")
        return Permutation(orders, before, after)


def _reorder(group: Group, order: Tensor) -> None:
    done: set[tuple[int, int]] = set()  # modules may share their tensors

    def move(parameter: Tensor | None, place: int, dim: int) -> None:
        if parameter is None or (id(parameter), place) in done:
            return
        done.add((id(parameter), place))
        part = parameter.narrow(dim, place * len(order), len(order))
        part.copy_(part.index_select(dim, order.to(parameter.device)))

    for linear, offset in group.inner:
        move(linear.weight, offset, 0)
        move(linear.bias, offset, 0)
    for linear in group.outer:
        move(linear.weight, 0, 1)
