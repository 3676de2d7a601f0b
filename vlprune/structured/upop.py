"""UPop (Shi et al., ICML 2023, arXiv 2301.13741), Algorithm 1: one update of the masks of a search.

    p_t  = p · sqrt(½ · (1 − cos(π · (t + 1) / T)))        share of the costs to be gone at step t of T    (schedule)
    G    = Σ_{i ≤ t} ∂L/∂ζ_i                               accumulated, never cleared: by the caller
    Ĝ_a  = (G_a − mean G_a) / std G_a                      attentions of all modalities together           (standardise)
    Ĝ_m  = (G_m − mean G_m) / std G_m                      feed-forward networks of all modalities
    M    = the units with the largest Ĝ, costing p_t       a large gradient: the loss falls when ζ does     (keep)
    ζ    = 1 where M keeps, 1 − p_t / p where it does not  removed units fade as p_t rises, and may return   (alphas)

At t = T − 1, p_t is p and ζ is 0 or 1: cutting the zeros changes no output.

A module's unit is one dimension of all heads of an attention, or one hidden neuron; a module is given by its name. As
in the authors' program, G is standardised as accumulated (the paper writes every step's gradient), the threshold lies
where the summed costs come nearest to p_t, and a module keeps its unit of the smallest gradient, whatever the
threshold. Their costs are 36 and 1: `head_costs` gives 3 per head, which is 36 at 12 heads. The L1 terms of the paper's
loss add one constant to all of G_a or G_m: standardising removes it, so they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.structured.plan import Plan, unit_cost


if TYPE_CHECKING:
    from vlprune.models.family import Group

Costs = Mapping[str, float]  # module -> cost of one unit


def schedule(ratio: float, step: int, steps: int) -> float:
    """Share of the costs to be gone: rises steeply at first, and is flat at the end.

    Args:
        ratio: p, at the end.
        step: t, from 0.
        steps: T, of the whole search.

    Returns:
        float: p_t.
    """
    return ratio * math.sqrt((1 - math.cos(math.pi * (step + 1) / steps)) / 2)


def standardise(gradients: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Make gradients of different structures comparable: mean 0, standard deviation 1 over all modules of a kind.

    Args:
        gradients: module -> accumulated gradient of its units [units].
        kinds: module -> its structure, "attention" or "ffn".

    Returns:
        dict[str, Tensor]: float64.
    """
    scores: dict[str, Tensor] = {}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in gradients if kinds[name] == kind]
        together = torch.cat([gradients[name].double() for name in names])
        deviation = together.std() if len(together) > 1 else torch.zeros(())
        centred = (together - together.mean()) / (deviation if deviation > 0 else 1.0)
        scores |= zip(names, centred.split([len(gradients[name]) for name in names]), strict=True)
    return {name: scores[name] for name in gradients}


def keep(scores: Mapping[str, Tensor], costs: Costs, share: float) -> dict[str, Tensor]:
    """Choose the units that are kept at one update.

    Args:
        scores: module -> standardised gradients Ĝ [units].
        costs: of a unit of each module.
        share: p_t: of all costs, to be removed.

    Returns:
        dict[str, Tensor]: module -> bool [units], True = kept, at least one.
    """
    ordered, spent = _descending(scores, costs)
    threshold = ordered[(spent - share * spent[-1]).abs().argmin()]
    return _keep(scores, threshold)


def keep_multiples(scores: Mapping[str, Tensor], costs: Costs, share: float, multiple: int) -> dict[str, Tensor]:
    """Choose the units that are kept in the end, so many that every module's number is a multiple.

    Each module keeps the best of its removed units until the multiple (or all it has) is reached; the threshold is the
    one whose costs, counted after that, come nearest to the share.

    Args:
        scores: module -> standardised gradients Ĝ [units].
        costs: of a unit of each module.
        share: p: of all costs, to be removed.
        multiple: 8, say.

    Returns:
        dict[str, Tensor]: module -> bool [units], True = kept.
    """
    ordered, spent = _descending(scores, costs)
    best: dict[str, Tensor] = {name: score.argsort(stable=True) for name, score in scores.items()}

    def at(place: int) -> tuple[float, dict[str, Tensor]]:
        kept = _keep(scores, ordered[place])
        for name, chosen in kept.items():
            count = -(-int(chosen.sum()) // multiple) * multiple
            chosen[best[name][:count]] = True
        gone = sum(costs[name] * int((~chosen).sum()) for name, chosen in kept.items())
        return gone - share * float(spent[-1]), kept

    low, high = 0, len(ordered) - 1  # lower thresholds remove more: the last place that removes too little, if any
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle)[0] <= 0 else (low, middle - 1)
    candidates = [at(place) for place in (low, min(low + 1, len(ordered) - 1))]
    return min(candidates, key=lambda candidate: abs(candidate[0]))[1]


def alphas(kept: Mapping[str, Tensor], share: float, ratio: float) -> dict[str, Tensor]:
    """Set the masks.

    Args:
        kept: module -> bool [units].
        share: p_t.
        ratio: p.

    Returns:
        dict[str, Tensor]: module -> float32 [units]: 1 where kept, else 1 - p_t / p, which is exactly 0 at the end.
    """
    fading = 1 - share / ratio
    return {name: torch.where(mask, 1.0, fading) for name, mask in kept.items()}


def _descending(scores: Mapping[str, Tensor], costs: Costs) -> tuple[Tensor, Tensor]:
    """All scores from the first to go to the last, and what has been spent with each."""
    together = torch.cat(list(scores.values()))
    each = torch.cat([torch.full_like(score, costs[name]) for name, score in scores.items()])
    ordered, places = together.sort(descending=True, stable=True)
    return ordered, each[places].cumsum(0)


def _keep(scores: Mapping[str, Tensor], threshold: Tensor) -> dict[str, Tensor]:
    return {name: (score <= threshold) | (score <= score.min()) for name, score in scores.items()}


# --- groups of a model ------------------------------------------------------------------------------------------------


def head_costs(groups: Sequence[Group]) -> dict[str, float]:
    """The paper's costs of a unit: 3 per head of an attention (query, key, value), 1 of a feed-forward network.

    Args:
        groups: of a model.

    Returns:
        dict[str, float]: by group name.
    """
    return {group.name: 3.0 * group.shape[0] if group.kind == "attention" else 1.0 for group in groups}


def weight_costs(groups: Sequence[Group]) -> dict[str, float]:
    """The weights that go with a unit: with these costs, p is the fraction of prunable weights.

    Args:
        groups: of a model.

    Returns:
        dict[str, float]: by group name.
    """
    return {g.name: float(unit_cost(g) * (g.shape[0] if g.kind == "attention" else 1)) for g in groups}


def check_ratio(groups: Sequence[Group], costs: Costs, ratio: float, multiple: int) -> None:
    """Refuse a ratio that cannot be met: every module keeps a unit, or as many as widths are rounded to.

    Args:
        groups: of a model.
        costs: of a unit of each.
        ratio: p.
        multiple: of the final widths.

    Raises:
        RequestError: the ratio is no fraction, or too large.
    """
    if not 0 < ratio < 1:
        raise RequestError(f"ratio {ratio} is out of range: give a fraction between 0 and 1, such as 0.5")
    total = sum(group.shape[-1] * costs[group.name] for group in groups)
    least = sum(min(multiple, group.shape[-1]) * costs[group.name] for group in groups)
    if not groups or ratio > 1 - least / total:
        most = 1 - least / total if groups else 0.0
        raise RequestError(
            f"ratio {ratio} leaves nothing: upop can remove at most {most:.3f}, as every layer keeps "
            f"{multiple} dimension{'s' * (multiple > 1)} of its heads and {multiple} neuron{'s' * (multiple > 1)}"
        )


def plan_of(groups: Sequence[Group], kept: Mapping[str, Tensor]) -> Plan:
    """Say it as a plan: all heads of an attention lose the same dimensions.

    Args:
        groups: of a model.
        kept: group name -> bool [K] or [N].

    Returns:
        Plan: units [H, K] or [N]; layers all kept.
    """
    return Plan({g.name: kept[g.name].cpu().expand(g.shape).clone() for g in groups}, {})
