"""MoPE (Lin et al., MoPE-CLIP, CVPR 2024): the table of module-wise errors in a file, and from a table to a plan.

The error of a module is what the whole model loses without it, error(m) = Z[f] - Z[f without m], Z being its recall on
calibration pairs (see `vlprune.training.mope`, which measures). Modules whose error is the same are told apart by how
much the loss grows. One table, measured once, serves every ratio.

From a table to a plan the paper prunes "consecutively from width to depth". It publishes no rule for the share of each;
ours:

1. Width: heads and neuron groups of all towers in one ranking by error per weight are removed up to the ratio, but at
   most `width` (two thirds) of the weights. Every attention keeps a head, every feed-forward network a neuron group. A
   module without which recall is better, by chance as a rule, counts as one without error.
2. Depth: when the ratio asks for more, layers are removed in the order of error per weight that width left in them.
   Every tower keeps a layer.
3. What whole layers cannot hit exactly is made up by width in the layers that stay, at last by single neurons (the
   least important of a group first, `round_to` at a time). Where width leaves no layers that fit, it takes less.

A table is a safetensors file of kind "vlprune-mope-1":

    units/<group>     F64 [U, 2]: per head or neuron group the error, and by how much the loss grew
    members/<group>   I32 [N]: the neurons of a feed-forward network, its groups one after another, most important first
    layers/<tower>    F64 [L, 2]: the same as for units, per layer
    header            {"units": {group: U}, "sizes": {feed-forward group: [neurons of each neuron group]},
                      "layers": {tower: L}, "metadata": {model, dataset, pairs, seed, stage, recall, loss, ...}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning import tensorfile
from vlprune.pruning.budgets import checked_ratio
from vlprune.structured.plan import ROUND_TO, Plan, unit_cost


if TYPE_CHECKING:
    from vlprune.models.family import Group, Tower


KIND = "vlprune-mope-1"
WIDTH = 2 / 3  # a tower of few layers can spare few; blip-tiny did better with two thirds than with a half
_LARGEST = 2**20  # units of one module, layers of one tower: more is no model

_METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, str),
    "dataset": lambda value: isinstance(value, str),
    "pairs": lambda value: type(value) is int and value > 0,
    "seed": lambda value: type(value) is int and value >= 0,
    "stage": lambda value: value in ("pretraining", "task"),
    "recall": lambda value: isinstance(value, float) and 0 <= value <= 1,
    "loss": lambda value: isinstance(value, float),
}


@dataclass(frozen=True)
class Table:
    """Errors of all modules.

    Attributes:
        units: group name -> float64 [U, 2], per head or neuron group the recall lost and the loss gained without it.
        members: name of a feed-forward group -> per neuron group its neurons, int64, most important first.
        layers: tower name -> float64 [L, 2], per layer.
        metadata: model (fingerprint), dataset, pairs, seed, stage ("pretraining": the model as it was given, "task":
            fine-tuned), recall and loss with all modules; more is kept as it is.
    """

    units: dict[str, Tensor]
    members: dict[str, list[Tensor]]
    layers: dict[str, Tensor]
    metadata: dict[str, Any]


# --- files ------------------------------------------------------------------------------------------------------------


def save_table(path: Path | str, table: Table) -> None:
    """Write a table, atomically.

    Args:
        path: the file.
        table: what to write.

    Raises:
        RequestError: its metadata lacks something.
    """
    metadata = _check_metadata(Path(path), table.metadata)
    tensors = {f"units/{name}": errors.double() for name, errors in table.units.items()}
    tensors |= {f"members/{name}": torch.cat(groups).int() for name, groups in table.members.items()}
    tensors |= {f"layers/{name}": errors.double() for name, errors in table.layers.items()}
    header = {
        "units": {name: len(errors) for name, errors in table.units.items()},
        "sizes": {name: [len(group) for group in groups] for name, groups in table.members.items()},
        "layers": {name: len(errors) for name, errors in table.layers.items()},
        "metadata": metadata,
    }
    tensorfile.write(path, KIND, tensors, header)


def load_table(
    path: Path | str,
    groups: Sequence[Group] | None = None,
    towers: Sequence[Tower] | None = None,
    model: str | None = None,
) -> Table:
    """Read a table; nothing in the file is believed before it is checked.

    Args:
        path: the file.
        groups: those of the model at hand; None accepts any.
        towers: those of the model at hand; None accepts any.
        model: its fingerprint; None accepts any.

    Returns:
        Table: on the CPU.

    Raises:
        RequestError: the file is missing, damaged, contradicts itself, or belongs to another model.
    """
    path = Path(path)
    with tensorfile.opened(path, KIND) as file:
        metadata = _check_metadata(path, file.header.get("metadata"))
        if model is not None and metadata["model"] != model:
            raise RequestError(f"{path} was measured on another model (or other weights): measure this one")
        counts = _counts(path, file.header.get("units"), "module")
        depths = _counts(path, file.header.get("layers"), "tower")
        sizes = _sizes(path, file.header.get("sizes"), counts)
        known = {f"units/{n}" for n in counts} | {f"members/{n}" for n in sizes} | {f"layers/{n}" for n in depths}
        if unknown := file.names - known:
            raise RequestError(f"{path} holds {min(unknown)!r:.120}, which is no part of a table: make it again")
        units = {name: _errors(file, f"units/{name}", count) for name, count in counts.items()}
        layers = {name: _errors(file, f"layers/{name}", depth) for name, depth in depths.items()}
        members = {}
        for name, parts in sizes.items():
            order = file.read(f"members/{name}", ("I32",), (sum(parts),)).long()
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise RequestError(f"{path}: the neuron groups of {name!r:.120} do not hold every neuron once")
            members[name] = list(order.split(parts))
    table = Table(units, members, layers, metadata)
    if groups is not None and towers is not None:
        _check_model(path, table, groups, towers)
    return table


def is_table(path: Path) -> bool:
    """Tell whether a file says that it is a table.

    Args:
        path: the file.

    Returns:
        bool: False for anything else, and for what cannot be read.
    """
    try:
        with tensorfile.opened(path, KIND):
            return True
    except RequestError:
        return False


def _check_metadata(path: Path, metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise RequestError(f"{path}: the table's metadata is no JSON object: make it again")
    for key, sound in _METADATA_CHECKS.items():
        if not sound(metadata.get(key)):
            raise RequestError(f"{path}: the table's metadata has {key} = {metadata.get(key)!r:.60}: make it again")
    return dict(metadata)


def _counts(path: Path, claimed: Any, what: str) -> dict[str, int]:
    if not isinstance(claimed, dict) or not claimed:
        raise RequestError(f"{path}: its header names no {what}: make it again")
    for name, count in claimed.items():
        if type(count) is not int or not 0 < count <= _LARGEST:
            raise RequestError(f"{path}: {what} {name!r:.120} claims {count!r:.60} entries: make it again")
    return claimed


def _sizes(path: Path, claimed: Any, counts: Mapping[str, int]) -> dict[str, list[int]]:
    if not isinstance(claimed, dict):
        raise RequestError(f"{path}: its header names no neuron groups: make it again")
    for name, sizes in claimed.items():
        sound = isinstance(sizes, list) and all(type(s) is int and 0 < s <= _LARGEST for s in sizes)
        if not sound or len(sizes) != counts.get(name):
            raise RequestError(f"{path}: module {name!r:.120} claims the neuron groups {sizes!r:.60}: make it again")
    return claimed


def _errors(file: tensorfile.TensorFile, name: str, count: int) -> Tensor:
    errors = file.read(name, ("F64",), (count, 2))
    if not errors.isfinite().all():
        raise RequestError(f"{file.path}: {name!r:.120} holds NaN or infinity: make it again")
    return errors


def _check_model(path: Path, table: Table, groups: Sequence[Group], towers: Sequence[Tower]) -> None:
    mine = {group.name: group.shape[0] for group in groups} | {tower.name: tower.depth for tower in towers}
    other = {name: len(errors) for name, errors in table.units.items() if name not in table.members}
    other |= {name: sum(map(len, members)) for name, members in table.members.items()}
    other |= {name: len(errors) for name, errors in table.layers.items()}
    ffn = {group.name for group in groups if group.kind == "ffn"}
    for name in [*mine, *other]:
        if mine.get(name) != other.get(name) or (name in ffn) != (name in table.members):
            raise RequestError(
                f"{path} belongs to another model: {name!r:.120} has {other.get(name, 'no')} units or layers there, "
                f"{mine.get(name, 'none')} in the model"
            )


# --- from a table to a plan -------------------------------------------------------------------------------------------


def plan_from(
    table: Table,
    groups: Sequence[Group],
    towers: Sequence[Tower],
    ratio: float,
    *,
    width: float = WIDTH,
    budget: Literal["global", "modality"] = "global",
    round_to: int = ROUND_TO,
) -> Plan:
    """Choose what to remove, width first, then depth (the rule stands at the top of this file).

    Args:
        table: errors of this model's modules.
        groups: the model's groups.
        towers: the model's towers.
        ratio: fraction of the prunable weights to remove, in (0, 1).
        width: the largest fraction of the weights that width takes before layers go.
        budget: "global" ranks all modalities together, "modality" removes the ratio from each.
        round_to: feed-forward networks keep a multiple of this many neurons.

    Returns:
        Plan: removes the ratio, up to a few neurons less.

    Raises:
        RequestError: the ratio is out of range or leaves nothing to remove.
    """
    ratio = checked_ratio(ratio)
    if not 0 <= width <= 1:
        raise RequestError(f"mope with width {width}: give a fraction between 0 and 1")
    modalities = list(dict.fromkeys(group.modality for group in groups))
    units: dict[str, Tensor] = {}
    layers: dict[str, Tensor] = {}
    for together in [modalities] if budget == "global" else [[modality] for modality in modalities]:
        members = [group for group in groups if group.modality in together]
        stacks = [tower for tower in towers if tower.modality in together]
        part = _choose(table, members, stacks, ratio, width, round_to)
        layers |= part.layers
        for group in part.groups:
            kept = part.kept[group.name]
            if part.stays(group) and not kept.all():
                units[group.name] = kept if group.kind == "ffn" else kept[:, None].expand(group.shape).clone()
    return Plan(units, {name: kept for name, kept in layers.items() if not kept.all()})


def _choose(
    table: Table, groups: Sequence[Group], towers: Sequence[Tower], ratio: float, width: float, round_to: int
) -> _Part:
    most = 0.0
    for tenths in range(10, -1, -1):
        part = _Part(table, groups, towers, round_to)
        if part.remove(ratio, width * tenths / 10):
            return part
        most = max(most, 1 - part.left() / part.total)
    raise RequestError(
        f"ratio {ratio:g} is more than mope can remove: it keeps a head and {round_to} neurons of every layer, and a "
        f"layer of every tower; give at most {math.floor(1000 * most) / 1000}"
    )


@dataclass(frozen=True)
class _Candidate:
    """A head or a neuron group: its place in the ranking, its module, its index there, and what it costs."""

    rank: tuple[float, float, int, int]
    group: Group
    index: int
    weights: int


class _Part:
    """The choice within one budget."""

    def __init__(self, table: Table, groups: Sequence[Group], towers: Sequence[Tower], round_to: int) -> None:
        self.table = table
        self.groups = groups
        self.towers = towers
        self.round_to = round_to
        # Weights of a head, of a neuron.
        self.cost = {g.name: unit_cost(g) * (g.shape[1] if g.kind == "attention" else 1) for g in groups}
        self.kept = {group.name: torch.ones(group.shape[0], dtype=torch.bool) for group in groups}
        self.layers = {tower.name: torch.ones(tower.depth, dtype=torch.bool) for tower in towers}
        self.total = self.left()
        self.candidates = sorted(self._candidates(), key=lambda candidate: candidate.rank)

    def _candidates(self) -> list[_Candidate]:
        found = []
        for place, group in enumerate(self.groups):
            for index, (error, loss) in enumerate(self.table.units[group.name].tolist()):
                weights = len(self._units(group, index)) * self.cost[group.name]
                found.append(
                    _Candidate((max(error, 0.0) / weights, loss / weights, place, index), group, index, weights)
                )
        return found

    def _units(self, group: Group, index: int) -> Tensor:
        """Indices of what a head or neuron group is made of, most important first."""
        return self.table.members[group.name][index] if group.kind == "ffn" else torch.tensor([index])

    def stays(self, group: Group) -> bool:
        """Tell whether the layer of a group stays."""
        return bool(self.layers[group.tower][group.layer])

    def left(self) -> int:
        """Weights that are still there."""
        kept = [g for g in self.groups if self.stays(g)]
        return sum(int(self.kept[group.name].sum()) * self.cost[group.name] for group in kept)

    def remove(self, ratio: float, width: float) -> bool:
        """Remove a fraction of the weights; tell whether there was so much to remove, to the last step."""
        goal = self.total - math.floor(ratio * self.total)  # weights to be left
        self._width(max(goal, self.total - math.floor(width * self.total)))
        before = self.total + 1
        while self.left() < before:  # width may leave a layer so small that it fits the rest
            before = self.left()
            self._depth(goal)
            self._width(goal)
            self._round()
            self._trim(goal)
        step = max(self.cost[g.name] * (self.round_to if g.kind == "ffn" else 1) for g in self.groups)
        return self.left() - goal < step

    def _width(self, goal: int) -> None:
        left = self.left()
        for candidate in self.candidates:
            kept = self.kept[candidate.group.name]
            units = self._units(candidate.group, candidate.index)
            there = self.stays(candidate.group) and bool(kept[units].all())
            if there and left - candidate.weights >= goal and int(kept.sum()) > len(units):
                kept[units] = False
                left -= candidate.weights

    def _depth(self, goal: int) -> None:
        left = self.left()
        found = []
        for place, tower in enumerate(self.towers):
            for index, (error, loss) in enumerate(self.table.layers[tower.name].tolist()):
                if not self.layers[tower.name][index]:
                    continue
                members = [group for group in self.groups if (group.tower, group.layer) == (tower.name, index)]
                weights = sum(int(self.kept[group.name].sum()) * self.cost[group.name] for group in members)
                found.append(((max(error, 0.0) / weights, loss / weights, place, index), tower, index, weights))
        for _, tower, index, weights in sorted(found, key=lambda entry: entry[0]):
            if left - weights >= goal and int(self.layers[tower.name].sum()) > 1:
                self.layers[tower.name][index] = False
                left -= weights

    def _round(self) -> None:
        """Give back the most important of the removed neurons where what stays is no multiple."""
        for group in self.groups:
            kept = self.kept[group.name]
            lacking = -int(kept.sum()) % self.round_to
            if group.kind == "ffn" and lacking and not kept.all():
                order = torch.cat(self.table.members[group.name])
                gone = order[~kept[order]]
                kept[gone[:lacking]] = True

    def _trim(self, goal: int) -> None:
        """Remove the last neurons of the groups that would go next, some at a time, while the goal allows it."""
        left = self.left()
        for candidate in self.candidates:
            group = candidate.group
            if group.kind != "ffn" or not self.stays(group):
                continue
            kept, cost = self.kept[group.name], self.cost[group.name] * self.round_to
            units = self._units(group, candidate.index)
            units = units[kept[units]]
            spare = min(len(units), int(kept.sum()) - self.round_to) // self.round_to
            blocks = max(0, min(spare, (left - goal) // cost))
            if blocks:
                kept[units[len(units) - blocks * self.round_to :]] = False
                left -= blocks * cost
