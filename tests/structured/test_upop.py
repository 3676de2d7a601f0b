"""The mask update equals the UPop authors' own program; final widths, costs and the rules of the search.

The part in data/ runs everywhere (make_upop_part.py wrote it); the full sets run where the shared folder stands beside
the repository.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlprune.errors import RequestError
from vlprune.models.family import Group
from vlprune.structured.plan import check_plan, removed
from vlprune.structured.upop import (
    alphas,
    check_ratio,
    head_costs,
    keep,
    keep_multiples,
    plan_of,
    schedule,
    standardise,
    weight_costs,
)


PART = Path(__file__).parent / "data" / "upop_part.npz"
Golden = tuple[dict[str, Any], dict[str, list[Tensor]], dict[str, list[Tensor]]]


@pytest.fixture(scope="module")
def part() -> Golden:
    """What there is to know, gradients of every step and masks of every update by module."""
    with np.load(PART) as file:
        about = json.loads(str(file["about"]))
        names = sorted(key.removeprefix("grad/") for key in file.files if key.startswith("grad/"))
        gradients = {name: list(torch.from_numpy(file[f"grad/{name}"])) for name in names}
        return about, gradients, {name: list(torch.from_numpy(file[f"alpha/{name}"])) for name in names}


@pytest.fixture(scope="module", params=["upop_a", "upop_b"])
def full(request, shared) -> Golden:
    about = json.loads((shared / "golden" / f"{request.param}.json").read_text())
    with np.load(shared / "golden" / f"{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    names = sorted({name.split("/", 2)[2] for name in arrays})
    gradients = {name: [arrays[f"grad/{step}/{name}"] for step in range(about["total_steps"])] for name in names}
    masks = {name: [arrays[f"alpha/{update['step']}/{name}"] for update in about["updates"]] for name in names}
    return about, gradients, masks


def kinds_of(names: Any) -> dict[str, str]:
    return {name: "attention" if name.endswith("attn") else "ffn" for name in names}


def costs_of(names: Any, attention: float = 36.0) -> dict[str, float]:
    return {name: attention if kind == "attention" else 1.0 for name, kind in kinds_of(names).items()}


def updates(golden: Golden, attention: float = 36.0) -> list[dict[str, Tensor]]:
    """Our masks at every update."""
    about, gradients, _ = golden
    found = []
    total = {name: torch.zeros_like(steps[0]) for name, steps in gradients.items()}
    for step in range(about["total_steps"]):
        for name, steps in gradients.items():
            total[name] += steps[step]
        if step in [update["step"] for update in about["updates"]]:
            share = schedule(about["p"], step, about["total_steps"])
            kept = keep(standardise(total, kinds_of(total)), costs_of(total, attention), share)
            found.append(alphas(kept, share, about["p"]))
    return found


def largest_difference(golden: Golden, found: list[dict[str, Tensor]]) -> float:
    _, _, masks = golden
    assert len(found) == len(next(iter(masks.values()))) >= 4
    return max(
        float((mask - theirs[index]).abs().max()) for index, ours in enumerate(found) for name, theirs in masks.items()
        for mask in (ours[name],)
    )  # fmt: skip


def test_masks_of_the_part(part):
    assert largest_difference(part, updates(part)) < 1e-6


def test_masks_of_the_full_sets(full):
    assert largest_difference(full, updates(full)) < 1e-6


def test_the_cost_of_attention_decides(part):
    assert largest_difference(part, updates(part, attention=24.0)) > 0.1


def test_schedule_of_the_part(part):
    about = part[0]
    for update in about["updates"]:
        assert schedule(about["p"], update["step"], about["total_steps"]) == pytest.approx(update["p_t"], abs=1e-12)


def test_units_of_the_part_fade_return_and_go(part):
    found = updates(part)
    levels = [{float(value) for mask in masks.values() for value in mask} for masks in found]
    assert [len(level) for level in levels] == [2, 2, 2, 2] and levels[-1] == {0.0, 1.0}
    assert [min(level) for level in levels] == sorted((min(level) for level in levels), reverse=True)
    names = list(found[0])
    assert any(bool(((found[0][name] < 1) & (found[-1][name] == 1)).any()) for name in names)  # removed, then back


# --- rules ------------------------------------------------------------------------------------------------------------


def random_gradients(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"v/attn": 16, "v/ffn": 40, "t/attn": 24, "t/ffn": 20}
    return {
        name: torch.randn(size, generator=generator) * (1 + index) for index, (name, size) in enumerate(sizes.items())
    }


def test_gradients_are_standardised_per_structure():
    gradients = random_gradients()
    gradients = {name: 1e4 * g + 3 if name.endswith("attn") else g for name, g in gradients.items()}
    scores = standardise(gradients, kinds_of(gradients))
    for kind in ("attn", "ffn"):
        together = torch.cat([score for name, score in scores.items() if name.endswith(kind)])
        assert float(together.mean()) == pytest.approx(0, abs=1e-9) and float(together.std()) == pytest.approx(1)
        raw = torch.cat([g for name, g in gradients.items() if name.endswith(kind)])
        assert torch.equal(together.argsort(), raw.argsort())  # across modalities


def test_a_constant_of_the_l1_terms_changes_nothing():
    gradients = random_gradients()
    more = {name: g + (7.0 if name.endswith("attn") else 0.2) for name, g in gradients.items()}
    kinds, costs = kinds_of(gradients), costs_of(gradients)
    one, other = (keep(standardise(g, kinds), costs, 0.4) for g in (gradients, more))
    assert all(torch.equal(one[name], other[name]) for name in gradients)


def test_the_largest_gradients_go_and_every_module_keeps_its_smallest():
    scores = {"a/attn": torch.tensor([5.0, 4.0]), "b/ffn": torch.tensor([3.0, -2.0, -1.0, 0.0])}
    kept = keep(scores, {"a/attn": 1.0, "b/ffn": 1.0}, 0.5)
    # nearest to 3 of 6 is the third of 5, 4, 3: what is larger than 3 goes, but for the smallest of its module
    assert kept["a/attn"].tolist() == [False, True] and kept["b/ffn"].tolist() == [True] * 4
    kept = keep(scores, {"a/attn": 1.0, "b/ffn": 1.0}, 0.999)
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a/attn": 1, "b/ffn": 1}


def test_gradients_that_do_not_differ():
    gradients = {"a/attn": torch.zeros(4), "b/ffn": torch.full((3,), 2.0), "c/ffn": torch.ones(1)}
    scores = standardise(gradients, kinds_of(gradients))
    assert all(score.isfinite().all() for score in scores.values())
    assert torch.equal(scores["a/attn"], torch.zeros(4).double())
    assert standardise({"a/attn": torch.tensor([3.0])}, {"a/attn": "attention"})["a/attn"].tolist() == [0.0]


def gone(kept: dict[str, Tensor], costs: dict[str, float]) -> float:
    return sum(costs[name] * int((~mask).sum()) for name, mask in kept.items())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_final_widths_are_multiples_and_no_threshold_comes_nearer(seed, share):
    gradients = random_gradients(seed)
    costs = costs_of(gradients, 5.0)
    scores = standardise(gradients, kinds_of(gradients))
    kept = keep_multiples(scores, costs, share, 8)
    total = sum(costs[name] * len(score) for name, score in scores.items())
    for name, mask in kept.items():
        assert int(mask.sum()) % 8 == 0 or bool(mask.all())
        assert mask.any() and (mask.all() or scores[name][mask].max() < scores[name][~mask].min())
    errors = []
    for threshold in torch.cat(list(scores.values())):  # all there are
        trial = {}
        for name, score in scores.items():
            count = max(1, int((score <= threshold).sum()))
            trial[name] = torch.zeros(len(score), dtype=torch.bool)
            trial[name][score.argsort()[: -(-count // 8) * 8]] = True
        errors.append(abs(gone(trial, costs) / total - share))
    assert abs(gone(kept, costs) / total - share) == pytest.approx(min(errors), abs=1e-12)


def test_final_widths_of_one_are_the_published_rule_to_one_unit():
    gradients = random_gradients()
    scores, costs = standardise(gradients, kinds_of(gradients)), costs_of(gradients, 1.0)
    one, other = keep(scores, costs, 0.5), keep_multiples(scores, costs, 0.5, 1)
    assert gone(other, costs) == 50 and gone(one, costs) == 49


def test_fading_ends_at_exactly_zero():
    kept = {"a": torch.tensor([True, False])}
    assert alphas(kept, schedule(0.3, 9, 10), 0.3)["a"].tolist() == [1.0, 0.0]
    assert alphas(kept, 0.15, 0.3)["a"].tolist() == [1.0, 0.5]


# --- groups -----------------------------------------------------------------------------------------------------------


def groups() -> list[Group]:
    """An attention of 4 heads 16 wide on width 64, and a feed-forward network of 96 neurons."""
    qkv, projection, fc1, fc2 = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64)
    attention = Group(
        "v.attn", ("v.attn",), "attention", "vision", "vision", 0, (),
        ((qkv, 0), (qkv, 1), (qkv, 2)), (projection,), (4, 16),
    )  # fmt: skip
    return [attention, Group("v.mlp", ("v.mlp",), "ffn", "vision", "vision", 0, (), ((fc1, 0),), (fc2,), (96,))]


def test_costs_of_groups():
    assert head_costs(groups()) == {"v.attn": 12.0, "v.mlp": 1.0}
    assert weight_costs(groups()) == {"v.attn": 4 * 4 * 64.0, "v.mlp": 2 * 64.0}
    total = sum(group.shape[-1] * weight_costs(groups())[group.name] for group in groups())
    assert total == 4 * 64 * 64 + 2 * 64 * 96


def test_plans_of_groups():
    kept = {"v.attn": torch.arange(16) < 8, "v.mlp": torch.arange(96) >= 48}
    plan = plan_of(groups(), kept)
    check_plan(plan, groups(), [])
    assert plan.units["v.attn"].shape == (4, 16) and bool((plan.units["v.attn"].sum(1) == 8).all())
    assert removed(plan, groups(), [])["achieved"] == pytest.approx(0.5)


@pytest.mark.parametrize(("ratio", "multiple"), [(0.0, 1), (1.0, 1), (-0.5, 8), (float("nan"), 1), (0.99, 1), (0.8, 8)])
def test_ratios_that_leave_nothing(ratio, multiple):
    with pytest.raises(RequestError) as caught:
        check_ratio(groups(), weight_costs(groups()), ratio, multiple)
    assert "\n" not in str(caught.value) and str(ratio) in str(caught.value)


def test_the_largest_ratio():
    # 8 of 16 dimensions and 8 of 96 neurons stay
    costs = weight_costs(groups())
    most = 1 - (8 * costs["v.attn"] + 8 * costs["v.mlp"]) / (16 * costs["v.attn"] + 96 * costs["v.mlp"])
    check_ratio(groups(), costs, most - 1e-9, 8)
    with pytest.raises(RequestError, match=f"at most {most:.3f}"):
        check_ratio(groups(), costs, most + 1e-3, 8)
