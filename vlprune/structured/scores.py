"""Scores of whole units, heads and neurons, from weights and input norms: no gradient, no evaluation.

A unit's score is the sum over its weights: its rows in the inner Linears, its columns in the outer ones. Every inner
matrix [units, in] counts by itself - query, key and value, whether they stand in one Linear or in three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlprune.pruning.exact import exact_sum
from vlprune.structured.plan import unit_cost


if TYPE_CHECKING:
    from vlprune.models.family import Group

Norms = Mapping[nn.Linear, Tensor]  # [in] input norm of each Linear, sqrt(sum over calibration tokens of x_j^2)


def magnitude(group: Group) -> Tensor:
    """Squared L2 norm of each unit's weights.

    Squared, so that it adds up over units and, divided by the number of weights, ranks units of any size alike.

    Args:
        group: W_in [units, in] of each inner Linear, W_out [out, units] of the outer one.

    Returns:
        Tensor: [H] or [N] float64; of a head, the sum over its dimensions.
    """
    sums = [exact_sum(weight.double().square(), 1) for weight, _ in _inner(group)]
    sums += [exact_sum(linear.weight.detach().double().square(), 0) for linear in _outer(group)]
    return _per_unit(group, torch.stack(sums).sum(0))


def flow(group: Group, norms: Norms) -> Tensor:
    """Information flow of each unit (Farina et al., MULTIFLOW, CVPR 2024, equation 6), summed over its weights.

    With a_j the norm of input j, S_ij = Imp_in(j) |W_ij| Imp_out(i) is the flow through a weight (see
    `vlprune.pruning.multiflow`). The scale of S means nothing (masks compare it inside a matrix only), so each matrix's
    flow is divided by its sum: a unit scores its shares of the flows into and out of the network.

    Args:
        group: of one model.
        norms: input norm of every Linear of the group.

    Returns:
        Tensor: [H] or [N] float64, the same bits on every device.
    """
    shares = []
    for weight, linear in _inner(group):
        importance_in, importance_out = _importances(weight, norms[linear])
        shares.append(importance_out * exact_sum(weight.abs().double() * importance_in, 1))  # rows are units
    for linear in _outer(group):
        weight = linear.weight.detach()
        importance_in, importance_out = _importances(weight, norms[linear])
        shares.append(importance_in * exact_sum(weight.abs().double() * importance_out[:, None], 0))  # columns
    whole = [share / max(float(exact_sum(share, 0)), 1e-300) for share in shares]
    return _per_unit(group, torch.stack(whole).sum(0))


def relative(group: Group, score: Tensor) -> Tensor:
    """Make scores of different groups comparable: per weight, the mean over a group becomes 1.

    Args:
        group: the units' group.
        score: [H] or [N] float64, non-negative.

    Returns:
        Tensor: the same shape.
    """
    weights = prod(group.shape) * unit_cost(group)
    return score * (weights / max(float(exact_sum(score, 0)), 1e-300))


def _importances(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Imp_in [in] and Imp_out [out], up to constants that cancel in shares; 1 is the largest of each."""
    weight, a = weight.abs().double(), norm.double()
    importance_in = a * exact_sum(weight, 0)
    importance_out = exact_sum(weight * a, 1)
    return importance_in / importance_in.max().clamp(min=1e-300), importance_out / importance_out.max().clamp(
        min=1e-300
    )


def _inner(group: Group) -> Iterator[tuple[Tensor, nn.Linear]]:
    """Matrices whose rows are units [units, in], weights that several Linears share once."""
    units, seen = group.outer[0].in_features, set()
    for linear, offset in group.inner:
        if (id(linear.weight), offset) not in seen:
            seen.add((id(linear.weight), offset))
            yield linear.weight.detach()[offset * units : (offset + 1) * units], linear


def _outer(group: Group) -> list[nn.Linear]:
    """Linears whose columns are units, weights that several share once."""
    found: dict[int, nn.Linear] = {}
    for linear in group.outer:
        found.setdefault(id(linear.weight), linear)
    return list(found.values())


def _per_unit(group: Group, score: Tensor) -> Tensor:
    return score.unflatten(0, group.shape).sum(1) if group.kind == "attention" else score
