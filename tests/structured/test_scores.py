"""Scores of units against the formulas, weight by weight; the methods on a whole model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from vlprune import names
from vlprune.models.family import Group
from vlprune.models.loading import load_folder
from vlprune.structured import removed, unit_cost
from vlprune.structured.methods import STRUCTURED, plan_by_scores
from vlprune.structured.scores import flow, magnitude, relative


HIDDEN, HEADS, WIDTH, NEURONS = 5, 3, 4, 7


def make(kind: str, fused: bool = False) -> Group:
    """Random Linears; `fused`: the same numbers in one query-key-value matrix."""
    torch.manual_seed(0)
    shape = (HEADS, WIDTH) if kind == "attention" else (NEURONS,)
    units = int(np.prod(shape))
    inner = [nn.Linear(HIDDEN, units) for _ in range(3 if kind == "attention" else 1)]
    outer = nn.Linear(units, HIDDEN)
    entries = tuple((linear, 0) for linear in inner)
    if fused:
        qkv = nn.Linear(HIDDEN, 3 * units)
        qkv.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in inner]))
        entries = tuple((qkv, part) for part in range(3))
    return Group("g", ("g",), kind, "vision", "vision", 0, (nn.Identity(),), entries, (outer,), shape)


def norms_of(group: Group, seed: int = 3) -> dict[nn.Linear, torch.Tensor]:
    """Query, key and value read the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    read, hidden = torch.rand(HIDDEN, generator=generator), torch.rand(group.outer[0].in_features, generator=generator)
    return {**{linear: read for linear, _ in group.inner}, group.outer[0]: hidden}


def matrices(group: Group) -> list[tuple[np.ndarray, nn.Linear, int]]:
    """(W [out, in] float64, Linear, axis of the units)."""
    units = group.outer[0].in_features
    found = []
    for linear, offset in group.inner:
        found.append((linear.weight.detach()[offset * units : (offset + 1) * units].double().numpy(), linear, 0))
    return [*found, (group.outer[0].weight.detach().double().numpy(), group.outer[0], 1)]


def by_hand(group: Group, of) -> np.ndarray:
    """Sum what `of(W, Linear)` [out, in] gives over each unit's weights."""
    total = sum(of(W, linear).sum(1 - axis) for W, linear, axis in matrices(group))
    return total.reshape(HEADS, WIDTH).sum(1) if group.kind == "attention" else total


def flow_by_hand(W: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Equation 6 with its means, then the share of each weight."""
    S = np.empty_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            out = np.mean([abs(W[i, k]) * a[k] for k in range(W.shape[1])])
            into = np.mean([abs(W[k, j]) * a[j] for k in range(W.shape[0])])
            S[i, j] = into * abs(W[i, j]) * out
    return S / S.sum()


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_magnitude(kind):
    group = make(kind)
    assert magnitude(group).numpy() == pytest.approx(by_hand(group, lambda W, linear: W**2), rel=1e-12)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_flow(kind):
    group = make(kind)
    norms = norms_of(group)
    expected = by_hand(group, lambda W, linear: flow_by_hand(W, norms[linear].double().numpy()))
    assert flow(group, norms).numpy() == pytest.approx(expected, rel=1e-9)
    assert float(flow(group, norms).sum()) == pytest.approx(len(matrices(group)))
    doubled = {linear: 2 * norm for linear, norm in norms.items()}
    assert torch.allclose(flow(group, doubled), flow(group, norms), rtol=1e-12)


def test_one_matrix_or_three():
    apart, fused = make("attention"), make("attention", fused=True)
    fused = Group(**{**vars(fused), "outer": apart.outer})
    assert torch.equal(magnitude(apart), magnitude(fused))
    assert torch.equal(flow(apart, norms_of(apart)), flow(fused, norms_of(fused)))


def test_shared_weights_count_once():
    group = make("ffn")
    twins = []
    for linear in (group.inner[0][0], group.outer[0]):
        twin = copy.copy(linear)  # another module, the same Parameter
        assert twin.weight is linear.weight
        twins.append(twin)
    shared = Group(**{**vars(group), "inner": (*group.inner, (twins[0], 0)), "outer": (*group.outer, twins[1])})
    assert torch.equal(magnitude(group), magnitude(shared))
    assert torch.equal(flow(group, norms_of(group)), flow(shared, norms_of(group)))


def test_what_carries_nothing_scores_nothing():
    group = make("ffn")
    with torch.no_grad():
        group.inner[0][0].weight[2] = 0
        group.outer[0].weight[:, 2] = 0
    assert magnitude(group)[2] == 0 and flow(group, norms_of(group))[2] == 0
    silent = {linear: torch.zeros(linear.in_features) for linear in norms_of(group)}
    assert torch.equal(flow(group, silent), torch.zeros(NEURONS, dtype=torch.float64))
    assert torch.equal(relative(group, torch.zeros(NEURONS).double()), torch.zeros(NEURONS).double())


def test_relative_scores_have_mean_one_per_weight():
    for group in (make("attention"), make("ffn")):
        score = relative(group, magnitude(group))
        weights = unit_cost(group) * group.outer[0].in_features
        assert float(score.sum()) / weights == pytest.approx(1)
        assert torch.allclose(score / score.sum(), magnitude(group) / magnitude(group).sum())


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small_models):
    return load_folder(small_models["pretraining"], "small", None)


@pytest.fixture(scope="module")
def norms(model):
    generator = torch.Generator().manual_seed(0)
    read = {layer.name: torch.rand(layer.weight.shape[1], generator=generator) for layer in model.layers()}
    return {module: read[layer.name] for layer in model.layers() for module in layer.modules}


@pytest.mark.parametrize("method", [name for name, method in STRUCTURED.items() if method.finds == "scores"])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.45])
@pytest.mark.parametrize("round_to", [1, 8])
def test_one_shot_methods_meet_the_ratio(model, norms, method, ratio, round_to):
    groups, towers = model.groups(), model.towers()
    plan = plan_by_scores(STRUCTURED[method], groups, norms, ratio, round_to)
    found = removed(plan, groups, towers)
    step = max(unit_cost(g) * (g.shape[1] if g.kind == "attention" else round_to) for g in groups)
    assert abs(found["removed"] - ratio * found["parameters"]) <= step
    for group in groups:
        shape = plan.shape(group)
        assert group.kind == "ffn" or (shape[0] >= 1 and shape[1] == group.shape[1])
        assert group.kind == "attention" or (shape[0] >= round_to and shape[0] % round_to == 0)
    if method == "multiflow-structured":
        assert found["per_modality"]["vision"] == pytest.approx(ratio, abs=step / 10_000)
    again = plan_by_scores(STRUCTURED[method], groups, norms, ratio, round_to)
    assert all(torch.equal(plan.units[name], again.units[name]) for name in plan.units)


def test_isomorphic_structures_lose_alike(model, norms):
    groups, towers = model.groups(), model.towers()
    found = removed(plan_by_scores(STRUCTURED["isomorphic"], groups, norms, 0.5, 1), groups, towers)["per_group"]
    pools: dict[tuple, list[float]] = {}
    for group in groups:
        pools.setdefault((group.modality, group.kind, group.cross), []).append(found[group.name])
    assert len(pools) == 5
    for key, shares in pools.items():
        assert np.mean(shares) == pytest.approx(0.5, abs=0.1), key


def test_names_a_user_may_type():
    assert set(STRUCTURED) <= set(names.METHODS)
