"""The structured methods by name.

A one-shot method = scores of heads and neurons + the pools of groups that share a ratio. The others find their plan by
training or by evaluating (`vlprune.training.upop`, `vlprune.training.mope`); only what they are called stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from vlprune.structured import scores
from vlprune.structured.plan import ROUND_TO, Plan, choose


if TYPE_CHECKING:
    from vlprune.models.family import Group


def _magnitude(group: Group, norms: scores.Norms) -> Tensor:
    return scores.magnitude(group)


def _relative_magnitude(group: Group, norms: scores.Norms) -> Tensor:
    """What the authors' program ranks by when asked for magnitude (GroupNormImportance, normalizer "mean")."""
    return scores.relative(group, scores.magnitude(group))


def _flow(group: Group, norms: scores.Norms) -> Tensor:
    return scores.relative(group, scores.flow(group, norms))


def _isomorphic(group: Group) -> str:
    """Groups whose graphs are the same: one structure in one modality."""
    return f"{group.modality} {group.kind}{' across modalities' if group.cross else ''}"


@dataclass(frozen=True)
class StructuredMethod:
    """A method that removes whole units.

    Attributes:
        name: what the user types.
        summary: one line for listings.
        paper: where it comes from, with the number on arXiv.
        needs: what it needs besides the weights: nothing, "input_norm" (a calibration pass), "captions" (calibration
            pairs to evaluate on) or "training" (the data of each task).
        finds: how: "scores" in one shot, by a "search" while it trains, or by "evaluation" of what is lost.
        score: of each unit of a group, of methods that find by scores.
        pool: groups of the same pool lose the ratio together.
    """

    name: str
    summary: str
    paper: str
    needs: frozenset[str] = frozenset()
    finds: Literal["scores", "search", "evaluation"] = "scores"
    score: Callable[[Group, scores.Norms], Tensor] = _magnitude
    pool: Callable[[Group], str] = lambda group: ""


STRUCTURED: dict[str, StructuredMethod] = {
    method.name: method
    for method in (
        StructuredMethod(
            "multiflow-structured",
            "heads and neurons by information flow, budget per modality",
            "Farina et al., CVPR 2024, 2404.05621, its score summed over units",
            needs=frozenset({"input_norm"}),
            score=_flow,
            pool=lambda group: group.modality,
        ),
        StructuredMethod(
            "magnitude-structured",
            "heads and neurons with the smallest L2 norm per weight of the whole model",
            "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, 1608.08710, with the L2 norm",
        ),
        StructuredMethod(
            "isomorphic",
            "heads and neurons with the smallest L2 norm beside their layer's mean, among structures of the same kind",
            "Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, 2407.04616, with magnitude importance",
            score=_relative_magnitude,
            pool=_isomorphic,
        ),
        StructuredMethod(
            "upop",
            "head dimensions and neurons fade out while a task is learned, all towers in one search",
            "Shi et al., UPop: Unified and Progressive Pruning, ICML 2023, 2301.13741",
            needs=frozenset({"training"}),
            finds="search",
        ),
        StructuredMethod(
            "mope",
            "heads, neuron groups and layers whose removal costs least in cross-modal retrieval",
            "Lin et al., MoPE-CLIP, CVPR 2024, 2403.07839",
            needs=frozenset({"captions"}),
            finds="evaluation",
        ),
    )
}


def plan_by_scores(
    method: StructuredMethod, groups: Sequence[Group], norms: scores.Norms, ratio: float, round_to: int = ROUND_TO
) -> Plan:
    """Choose what a one-shot method keeps.

    Args:
        method: one that finds by scores.
        groups: of the model.
        norms: input norm of every Linear, where the method needs them.
        ratio: fraction of the groups' weights to remove.
        round_to: see `choose`.

    Returns:
        Plan: heads go whole.
    """
    found = {group.name: method.score(group, norms) for group in groups}
    pools = {group.name: method.pool(group) for group in groups}
    return choose(groups, found, ratio, pools=pools, round_to=round_to)
