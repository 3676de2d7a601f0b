"""What structured pruning keeps: plans, how they are chosen from scores, and their files.

A plan file is a safetensors file of kind "vlprune-plan-1":

    units/<group>     U8 [ceil(units / 8)]: one bit per unit, first unit in the highest bit, 1 = kept; an attention's
                      units are the dimensions of its heads, head by head; the bits after the last unit are 0
    layers/<tower>    U8 [ceil(L / 8)]: one bit per layer
    header            {"units": {group: [H, K] or [N]}, "layers": {tower: L},
                       "metadata": {method, ratio, pattern = "structured", seed, model, ...}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning import tensorfile
from vlprune.pruning.budgets import checked_ratio
from vlprune.pruning.masks import check_metadata, pack, unpack


if TYPE_CHECKING:
    from vlprune.models.family import Group, Tower

KIND = "vlprune-plan-1"
PATTERN = "structured"
ROUND_TO = 8  # widths that matrix kernels of every provider like


@dataclass(frozen=True, eq=False)
class Plan:
    """What is kept of a model.

    Attributes:
        units: group name -> bool [H, K] or [N], True = kept; a group that is missing keeps all.
        layers: tower name -> bool [L], True = kept; a tower that is missing keeps all.
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)

    def keeps(self, group: Group) -> bool:
        """Tell whether the layer of a group stays.

        Args:
            group: of the model the plan is for.

        Returns:
            bool: False when its whole layer goes.
        """
        return group.tower not in self.layers or bool(self.layers[group.tower][group.layer])

    def shape(self, group: Group) -> tuple[int, ...]:
        """Tell what is left of a group.

        Args:
            group: of the model the plan is for; the plan fits it (`check_plan`).

        Returns:
            tuple[int, ...]: (H, K) or (N,); zeros where the layer goes.
        """
        if not self.keeps(group):
            return (0,) * len(group.shape)
        if group.name not in self.units:
            return group.shape
        kept = self.units[group.name]
        if kept.ndim == 1:
            return (int(kept.sum()),)
        return (int(kept.any(1).sum()), int(kept.sum(1).max()))


def unit_cost(group: Group) -> int:
    """Count the weights that go with one unit: its rows and columns in every Linear, shared ones once, no biases.

    Args:
        group: any.

    Returns:
        int: weights per head dimension or neuron; times the units it is all prunable weights of the group.
    """
    rows = {(id(linear.weight), offset): linear.in_features for linear, offset in group.inner}
    columns = {id(linear.weight): linear.out_features for linear in group.outer}
    return sum(rows.values()) + sum(columns.values())


def check_plan(plan: Plan, groups: Sequence[Group], towers: Sequence[Tower]) -> None:
    """Refuse a plan that does not fit a model or leaves a part of it empty.

    Args:
        plan: any.
        groups: of the model.
        towers: of the model.

    Raises:
        RequestError: a name or shape is not the model's, a tower loses all its layers, a kept group all its units, or
            the heads of a group keep different numbers of dimensions.
    """
    depths: dict[str, tuple[int, ...]] = {tower.name: (tower.depth,) for tower in towers}
    shapes = {group.name: tuple(group.shape) for group in groups}
    for what, masks, expected in (("tower", plan.layers, depths), ("group", plan.units, shapes)):
        for name, kept in masks.items():
            if name not in expected:
                raise RequestError(f"the plan belongs to another model: it names the {what} {name!r:.120}")
            if kept.dtype != torch.bool or tuple(kept.shape) != expected[name]:
                raise RequestError(
                    f"the plan belongs to another model: {name!r:.120} is {str(kept.dtype)[6:]} {list(kept.shape)} "
                    f"there, bool {list(expected[name])} is needed"
                )
    for name, kept in plan.layers.items():
        if not kept.any():
            raise RequestError(f"the plan removes every layer of the {name} tower: keep one at least")
    for group in groups:
        if group.name not in plan.units or not plan.keeps(group):
            continue
        kept = plan.units[group.name]
        if not kept.any():
            raise RequestError(f"the plan removes every unit of {group.name}: keep one at least, or remove the layer")
        if kept.ndim == 2 and len(set(kept.sum(1)[kept.any(1)].tolist())) > 1:
            raise RequestError(f"the plan leaves heads of different widths in {group.name}: they must be equal")


def removed(plan: Plan, groups: Sequence[Group], towers: Sequence[Tower]) -> dict[str, Any]:
    """Count the weights a plan removes; biases and what stands outside the groups are not counted.

    Args:
        plan: fits the model.
        groups: of the model.
        towers: of the model.

    Returns:
        dict[str, Any]: "parameters" and "removed" (weights); fractions removed: "achieved", "per_modality"
            {modality: s}, "per_group" {group: s}.
    """
    check_plan(plan, groups, towers)
    totals: dict[str, int] = {}
    gone: dict[str, int] = {}
    per_group = {}
    for group in groups:
        units = prod(group.shape)
        lost = units - prod(plan.shape(group))
        cost = unit_cost(group)
        totals[group.modality] = totals.get(group.modality, 0) + units * cost
        gone[group.modality] = gone.get(group.modality, 0) + lost * cost
        per_group[group.name] = lost / units
    total = sum(totals.values())
    return {
        "parameters": total,
        "removed": sum(gone.values()),
        "achieved": sum(gone.values()) / total,
        "per_modality": {modality: gone[modality] / totals[modality] for modality in totals},
        "per_group": per_group,
    }


# --- choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Units of a group that go together: one step of the greedy choice."""

    group: int
    rank: int  # how many steps of the group come before
    weights: int
    density: float  # score per weight


def choose(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    pools: Mapping[str, str] | None = None,
    round_to: int = ROUND_TO,
) -> Plan:
    """Keep the units with the highest score per weight, at an exact share of the weights.

    Units go in ascending order of their score per weight, step by step: a head at a time, `round_to` neurons or
    dimensions at a time (the first step of a group takes what makes its width a multiple). The cut falls between two
    steps, where the share removed is nearest to the ratio. A group keeps one head, or `round_to` units, at least.

    Each pool of groups loses the ratio by itself. What rounding, or groups that cannot shrink further, leave of one
    pool's share goes to the next one, pools with the coarsest steps first, so that the whole model meets the ratio.

    Args:
        groups: of the model.
        scores: group name -> float64 [H] (heads go whole), [H, K] (each head loses as many dimensions, its own lowest
            first) or [N]; a step's score is the sum of its units'. Groups that are missing stay
            whole, and count for the ratio.
        ratio: fraction of the groups' weights to remove.
        pools: group name -> pool; None = all are one.
        round_to: widths become multiples of it; 1 = any width.

    Returns:
        Plan: units of every group that has scores.

    Raises:
        RequestError: the ratio is out of range, or leaves nothing of some group, or is less than half a step.
    """
    ratio = checked_ratio(ratio)
    pools = pools or {}
    members = [group for group in groups if group.name in scores]
    steps: list[list[list[int]]] = []  # per group, per step: units (heads, neurons, or ranks of dimensions)
    found: dict[str, list[_Block]] = {pools.get(group.name, ""): [] for group in groups}
    for index, group in enumerate(members):
        made, blocks = _steps(index, group, scores[group.name], round_to)
        steps.append(made)
        found[pools.get(group.name, "")] += blocks
    totals = dict.fromkeys(found, 0)
    for group in groups:
        totals[pools.get(group.name, "")] += prod(group.shape) * unit_cost(group)

    taken = [0] * len(members)
    due, gone = 0.0, 0
    by_size = sorted(found, key=lambda pool: -max((block.weights for block in found[pool]), default=0))
    waiting = {pool: sorted(found[pool], key=lambda block: (block.density, block.group, block.rank)) for pool in found}
    for turn in (totals, dict.fromkeys(totals, 0)):  # the second turn: what later pools could not take
        for pool in by_size:
            due += ratio * turn[pool]
            while waiting[pool] and gone + waiting[pool][0].weights / 2 <= due:
                block = waiting[pool].pop(0)
                gone += block.weights
                taken[block.group] = block.rank + 1
    finest = min((block.weights for blocks in found.values() for block in blocks), default=0)
    if due - gone > finest / 2 and not any(waiting.values()):
        raise RequestError(
            f"ratio {ratio} leaves nothing: at most {gone / sum(totals.values()):.4f} of the weights can go, "
            f"as every layer keeps one head and {round_to} neurons"
        )
    if not gone:
        raise RequestError(f"ratio {ratio} is less than the smallest step of this model: nothing would be removed")
    units = {}
    for group, made, count in zip(members, steps, taken, strict=True):
        units[group.name] = _kept(group, made[:count], scores[group.name])
    return Plan(units)


def _steps(index: int, group: Group, score: Tensor, round_to: int) -> tuple[list[list[int]], list[_Block]]:
    """List what a group can lose, step by step; the densities ascend, so that steps are taken in order."""
    if score.shape not in (group.shape[:1], group.shape) or not score.isfinite().all():
        raise RequestError(f"the scores of {group.name} are not finite, or not as many as it has units")
    cost, width = unit_cost(group), round_to
    if group.kind == "attention" and score.ndim == 1:
        cost, width = cost * group.shape[1], 1
    elif group.kind == "attention":  # one step takes dimensions of every head
        cost, score = cost * group.shape[0], score.sort(1).values.sum(0)
    values, ranked = score.double().sort(stable=True)
    count = len(ranked)
    edges = [0, *range(count % width or width, count, width)]  # without the last step, which would leave nothing
    steps = [ranked[a:b].tolist() for a, b in pairwise(edges)]
    blocks, density = [], -inf
    for rank, (a, b) in enumerate(pairwise(edges)):
        density = max(density, float(values[a:b].sum()) / ((b - a) * cost))  # rounding changes no order
        blocks.append(_Block(index, rank, (b - a) * cost, density))
    return steps, blocks


def _kept(group: Group, steps: Iterable[list[int]], score: Tensor) -> Tensor:
    kept = torch.ones(group.shape, dtype=torch.bool)
    gone = [unit for step in steps for unit in step]
    if group.kind == "attention" and score.ndim == 2:
        lowest = score.sort(dim=1, stable=True).indices[:, gone]  # of each head its own
        return kept.scatter(1, lowest, False)
    kept[gone] = False
    return kept


# --- files ------------------------------------------------------------------------------------------------------------


def save_plan(path: Path | str, plan: Plan, metadata: Mapping[str, Any]) -> None:
    """Write a plan, atomically.

    Args:
        path: the file.
        plan: what is kept.
        metadata: method, ratio, seed, model (a fingerprint of the dense model); more is kept as it is.

    Raises:
        RequestError: one of these is missing or of a wrong type.
    """
    metadata = check_metadata(Path(path), {**metadata, "pattern": PATTERN})
    masks = {f"units/{name}": kept for name, kept in plan.units.items()}
    masks |= {f"layers/{name}": kept for name, kept in plan.layers.items()}
    header = {
        "units": {name: list(kept.shape) for name, kept in plan.units.items()},
        "layers": {name: len(kept) for name, kept in plan.layers.items()},
        "metadata": metadata,
    }
    tensorfile.write(path, KIND, {name: torch.from_numpy(pack(kept)) for name, kept in masks.items()}, header)


def load_plan(
    path: Path | str, groups: Sequence[Group] | None = None, towers: Sequence[Tower] | None = None
) -> tuple[Plan, dict[str, Any]]:
    """Read a plan; nothing in the file is believed before it is checked.

    Args:
        path: the file.
        groups: of the model at hand; None accepts any.
        towers: of the model at hand; None accepts any.

    Returns:
        tuple[Plan, dict[str, Any]]: the plan, on the CPU, and the metadata.

    Raises:
        RequestError: the file is missing, damaged, contradicts itself, or belongs to another model.
    """
    path = Path(path)
    with tensorfile.opened(path, KIND) as file:
        metadata = check_metadata(path, file.header.get("metadata"))
        units, layers = file.header.get("units"), file.header.get("layers")
        if not isinstance(units, dict) or not isinstance(layers, dict):
            raise RequestError(f"{path}: its header names no units: make it again")
        shapes = {f"units/{name}": shape for name, shape in units.items()}
        shapes |= {f"layers/{name}": [depth] for name, depth in layers.items()}
        for name, shape in shapes.items():
            sound = isinstance(shape, list) and len(shape) in (1, 2)
            if not sound or not all(type(size) is int and 0 < size < 2**31 for size in shape):
                raise RequestError(f"{path}: {name!r:.120} claims the shape {shape!r:.60}: make it again")
        if stray := file.names - shapes.keys():
            raise RequestError(f"{path} holds {min(stray)!r:.120}, which is no part of a plan: make it again")
        masks = {}
        for name, shape in shapes.items():
            bits = file.read(name, ("U8",), (ceil(prod(shape) / 8),)).numpy()
            if prod(shape) % 8 and bits[-1] & (0xFF >> prod(shape) % 8):
                raise RequestError(f"{path}: {name!r:.120} has bits behind its last unit: make it again")
            masks[name] = unpack(bits, shape)
    plan = Plan(
        {name: masks[f"units/{name}"] for name in units},
        {name: masks[f"layers/{name}"] for name in layers},
    )
    if groups is not None and towers is not None:
        try:
            check_plan(plan, groups, towers)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error
    return plan, metadata
