"""Plans: what they must satisfy, how they are chosen (against brute force), and their files."""

import json
import struct
from itertools import product
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlprune.errors import RequestError
from vlprune.models.family import Group, Tower
from vlprune.structured import Plan, check_plan, choose, load_plan, removed, save_plan, unit_cost


METADATA = {"method": "isomorphic", "ratio": 0.5, "seed": 0, "model": "sha256:0", "note": [1]}


def attention(name: str, heads: int, width: int, hidden: int = 6, modality: str = "vision", layer: int = 0) -> Group:
    """Three Linears in, one out: 4 x hidden weights per head dimension."""
    inner = tuple((nn.Linear(hidden, heads * width), 0) for _ in range(3))
    outer = (nn.Linear(heads * width, hidden),)
    return Group(name, (name,), "attention", modality, modality, layer, (nn.Identity(),), inner, outer, (heads, width))


def ffn(name: str, neurons: int, hidden: int = 6, modality: str = "vision", layer: int = 0) -> Group:
    inner, outer = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden)
    return Group(name, (name,), "ffn", modality, modality, layer, (nn.Identity(),), ((inner, 0),), (outer,), (neurons,))


def scores_of(groups, seed: int = 0, heads: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: torch.rand(g.shape[:1] if heads else g.shape, generator=generator, dtype=torch.float64) for g in groups
    }


TOWERS = [Tower("vision", "vision", ("v",), 2), Tower("text", "text", ("t",), 1)]
GROUPS = [attention("a", 3, 4), ffn("b", 10, layer=1), attention("c", 2, 3, modality="text")]


def test_units_and_weights_are_counted_by_hand():
    # 4 Linears x 6 weights per dimension, 2 x 6 per neuron
    assert [unit_cost(group) for group in GROUPS] == [24, 12, 24]
    plan = Plan({"a": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]) > 0, "b": torch.arange(10) > 3})
    assert [plan.shape(group) for group in GROUPS] == [(2, 2), (6,), (2, 3)]
    found = removed(plan, GROUPS, TOWERS)
    assert (found["parameters"], found["removed"]) == (12 * 24 + 120 + 6 * 24, 8 * 24 + 4 * 12)
    assert found["per_modality"] == {"vision": 240 / 408, "text": 0.0}
    assert found["per_group"] == {"a": 8 / 12, "b": 0.4, "c": 0.0}
    assert found["achieved"] == 240 / 552


def test_units_of_removed_layers_are_counted_once():
    plan = Plan({"a": torch.zeros(3, 4) > 0}, {"vision": torch.tensor([False, True])})
    assert plan.shape(GROUPS[0]) == (0, 0) and plan.shape(GROUPS[1]) == (10,)
    assert removed(plan, GROUPS, TOWERS)["removed"] == 12 * 24


def test_shared_weights_cost_once():
    group = attention("a", 2, 3)
    twin = nn.Linear(6, 6)
    twin.weight = group.inner[0][0].weight
    out = nn.Linear(6, 6)
    out.weight = group.outer[0].weight
    shared = Group(**{**vars(group), "inner": (*group.inner, (twin, 0)), "outer": (*group.outer, out)})
    assert unit_cost(shared) == unit_cost(group) == 24
    fused = nn.Linear(6, 18)
    one = Group(**{**vars(group), "inner": tuple((fused, part) for part in range(3))})
    assert unit_cost(one) == 24


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({"z": torch.ones(3) > 0}), "another model.*'z'"),
        (Plan({}, {"z": torch.ones(3) > 0}), "another model.*'z'"),
        (Plan({"b": torch.ones(11) > 0}), r"another model.*\[11\]"),
        (Plan({"b": torch.ones(10)}), "float32.*bool"),
        (Plan({"a": torch.ones(12) > 0}), r"\[12\] there, bool \[3, 4\]"),
        (Plan({}, {"vision": torch.zeros(2) > 0}), "every layer of the vision"),
        (Plan({"b": torch.zeros(10) > 0}), "every unit of b"),
        (Plan({"a": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]) > 0}), "different widths in a"),
    ],
)
def test_plans_that_do_not_fit(plan, message):
    with pytest.raises(RequestError, match=message) as error:
        check_plan(plan, GROUPS, TOWERS)
    assert "\n" not in str(error.value)


# --- choosing ---------------------------------------------------------------------------------------------------------


def nearest(groups, scores, ratio, round_to) -> list[int]:
    """Brute force: of all ways to lose the worst units of each group, those some threshold on the score per weight
    gives; of these, how many weights the one loses that is nearest to the ratio (all of them, where several are).
    """
    whole = sum(prod(g.shape) * unit_cost(g) for g in groups)
    options = []
    for group in groups:
        score, step, cost = scores[group.name], round_to, unit_cost(group)
        if group.kind == "attention" and score.ndim == 1:
            step, cost = 1, cost * group.shape[1]
        elif group.kind == "attention":
            score, cost = score.sort(1).values.sum(0), cost * group.shape[0]
        values = score.sort().values.tolist()
        kept = [len(values)] + [n for n in range(len(values) - 1, 0, -1) if n % step == 0 and n >= step]
        options.append([(cost, values, n, later) for n, later in zip(kept, [*kept[1:], None], strict=True)])
    found = []
    for state in product(*options):
        gone, worst_gone, best_left = 0, -1.0, float("inf")
        for cost, values, kept, later in state:
            lost = len(values) - kept
            gone += lost * cost
            steps = [n for c, v, n, _ in next(o for o in options if o[0][1] is values) if n >= kept]
            for a, b in zip(steps, steps[1:], strict=False):
                part = values[len(values) - a : len(values) - b]
                worst_gone = max(worst_gone, sum(part) / (len(part) * cost))
            if later is not None:
                part = values[lost : len(values) - later]
                best_left = min(best_left, sum(part) / (len(part) * cost))
        if worst_gone <= best_left:
            found.append((abs(gone - ratio * whole), gone))
    best = min(found)[0]
    return [gone for distance, gone in found if distance <= best + 1e-9]


@pytest.mark.parametrize("round_to", [1, 2, 4])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.45])
def test_choice_equals_brute_force(ratio, heads, round_to):
    for seed in range(4):
        groups = [attention("a", 3, 5 + round_to), ffn("b", 7), attention("c", 2, 2 + 2 * round_to), ffn("d", 9)]
        scores = scores_of(groups, seed, heads)
        scores["a"] = scores["a"] * 5  # in the range of the others per weight, so that all kinds compete
        plan = choose(groups, scores, ratio, round_to=round_to)
        towers = [Tower("vision", "vision", ("v",), 1)]
        assert removed(plan, groups, towers)["removed"] in nearest(groups, scores, ratio, round_to)
        for group in groups:  # the lowest go
            kept = plan.units[group.name]
            rows = [(kept.any(1) if kept.ndim == 2 else kept, scores[group.name])]
            if scores[group.name].ndim == 2:
                rows = list(zip(kept, scores[group.name], strict=True))
            for mask, score in rows:
                assert not mask.any() or mask.all() or score[~mask].max() <= score[mask].min()


def test_heads_go_whole_and_widths_are_multiples():
    groups = [attention("a", 12, 8, 32), ffn("b", 100, 32)]
    plan = choose(groups, scores_of(groups), 0.5, round_to=8)
    assert all(plan.shape(groups[0])[1] == 8 for _ in "a") and plan.shape(groups[1])[0] % 8 == 0
    exact = choose(groups, scores_of(groups), 0.5, round_to=1)
    assert exact.shape(groups[1])[0] % 8


def test_every_pool_loses_the_same_share():
    groups = [attention("a", 20, 2, 8), ffn("b", 200, 8), attention("c", 20, 2, 8, "text"), ffn("d", 200, 8, "text")]
    scores = scores_of(groups)
    scores["a"] *= 100  # a single ranking would take nothing of it
    pools = {group.name: group.name for group in groups}
    towers = [Tower("vision", "vision", ("v",), 1), Tower("text", "text", ("t",), 1)]
    share = removed(choose(groups, scores, 0.4, pools=pools, round_to=1), groups, towers)["per_group"]
    assert share == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.4, "d": 0.4})
    share = removed(choose(groups, scores, 0.4, round_to=1), groups, towers)
    assert share["per_group"]["a"] == 0 and share["achieved"] == pytest.approx(0.4, abs=0.005)
    by_modality = choose(groups, scores, 0.4, pools={group.name: group.modality for group in groups}, round_to=1)
    assert removed(by_modality, groups, towers)["per_modality"] == pytest.approx(
        {"vision": 0.4, "text": 0.4}, abs=0.005
    )


def test_what_one_pool_cannot_lose_others_do():
    groups = [attention("a", 2, 10, 8), ffn("b", 400, 8)]  # 640 weights, half of which can go, and 6400
    towers = [Tower("vision", "vision", ("v",), 1)]
    found = removed(choose(groups, scores_of(groups), 0.8, pools={"a": "a", "b": "b"}, round_to=1), groups, towers)
    assert found["per_group"]["a"] == 0.5 and found["achieved"] == pytest.approx(0.8, abs=1e-3)
    groups = [attention("a", 20, 10, 8), ffn("b", 8, 8)]  # the pool that comes last is exhausted first
    found = removed(choose(groups, scores_of(groups), 0.5, pools={"a": "a", "b": "b"}, round_to=8), groups, towers)
    assert found["per_group"]["b"] == 0 and found["achieved"] == pytest.approx(0.5, abs=0.03)


def test_equal_scores_are_cut_alike_every_time():
    groups = [ffn("a", 21), ffn("b", 21), attention("c", 3, 5)]
    scores = {g.name: torch.full(g.shape[:1], 0.1, dtype=torch.float64) * unit_cost(g) for g in groups}
    first = choose(groups, scores, 0.3, round_to=4)
    again = choose(groups, scores, 0.3, round_to=4)
    assert all(torch.equal(first.units[name], again.units[name]) for name in first.units)
    assert removed(first, groups, [Tower("vision", "vision", ("v",), 1)])["achieved"] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("ratio", "message"), [(0.97, "at most 0.6"), (1e-4, "smallest step"), (1.0, "between 0 and")])
def test_ratios_that_cannot_be_met(ratio, message):
    groups = [attention("a", 3, 6), ffn("b", 24)]
    with pytest.raises(RequestError, match=message):
        choose(groups, scores_of(groups), ratio, round_to=8)


def test_scores_that_do_not_fit():
    groups = [ffn("a", 24)]
    for score in (torch.full((24,), torch.nan), torch.rand(23)):
        with pytest.raises(RequestError, match="scores of a"):
            choose(groups, {"a": score.double()}, 0.5)


# --- files ------------------------------------------------------------------------------------------------------------

PLAN = Plan(
    {"a": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]) > 0, "b": torch.arange(10) > 3},
    {"vision": torch.tensor([False, True])},
)


def test_exact_bytes(tmp_path):
    path = tmp_path / "p.safetensors"
    save_plan(path, PLAN, METADATA)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = {"units": {"a": [3, 4], "b": [10]}, "layers": {"vision": 2}}
    header["metadata"] = METADATA | {"pattern": "structured"}
    parsed = json.loads(content[8 : 8 + length])
    assert parsed.pop("__metadata__") == {"kind": "vlprune-plan-1", "header": json.dumps(header)}
    start = {name: entry["data_offsets"][0] + 8 + length for name, entry in parsed.items()}
    assert content[start["units/a"] :][:2] == bytes([0b01100000, 0b10010000])
    assert content[start["units/b"] :][:2] == bytes([0b00001111, 0b11000000])
    assert content[start["layers/vision"] :][:1] == bytes([0b01000000])


def test_there_and_back(tmp_path):
    save_plan(tmp_path / "p", PLAN, METADATA)
    for known in ((GROUPS, TOWERS), (None, None)):
        plan, metadata = load_plan(tmp_path / "p", *known)
        assert metadata == METADATA | {"pattern": "structured"}
        assert all(torch.equal(plan.units[name], PLAN.units[name]) for name in ("a", "b"))
        assert torch.equal(plan.layers["vision"], PLAN.layers["vision"])
        assert (list(plan.units), list(plan.layers)) == (["a", "b"], ["vision"])


def test_a_plan_for_another_model(tmp_path):
    save_plan(tmp_path / "p", PLAN, METADATA)
    with pytest.raises(RequestError, match=r"p: the plan belongs to another model.*\[3, 4\] there, bool \[3, 5\]"):
        load_plan(tmp_path / "p", [attention("a", 3, 5), *GROUPS[1:]], TOWERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"units": []}}, "names no units"),
        ({"header": {"layers": None}}, "names no units"),
        ({"header": {"units": {"a": [3, 4], "b": [2**40]}}}, "claims the shape"),
        ({"header": {"units": {"a": [3, -4], "b": [10]}}}, "claims the shape"),
        ({"header": {"units": {"a": [3, 4, 1], "b": [10]}}}, "claims the shape"),
        ({"header": {"units": {"a": [True, 4], "b": [10]}}}, "claims the shape"),
        ({"header": {"units": {"a": [3, 4], "b": [2**31 - 1]}}}, r"U8 \[2\], expected U8"),
        ({"header": {"layers": {"vision": "2"}}}, "claims the shape"),
        ({"header": {"units": {"a": [3, 4]}}}, "no part of a plan"),
        ({"header": {"units": {"a": [3, 4], "b": [10], "c": [1]}}}, "no tensor 'units/c'"),
        ({"header": {"metadata": {}}}, "the metadata has method = None"),
        ({"header": {"metadata": METADATA | {"ratio": 2.0, "pattern": "x"}}}, "ratio = 2.0"),
        ({"tensors": {"units/b": torch.tensor([15, 193], dtype=torch.uint8)}}, "bits behind"),
        ({"tensors": {"units/b": torch.tensor([15.0, 192.0])}}, "F32"),
        ({"kind": "vlprune-masks-1"}, "is no vlprune-plan-1 file"),
        ({"cut": 40}, "damaged"),
    ],
)
def test_files_made_to_harm(tmp_path, change, message):
    path = tmp_path / "p.safetensors"
    save_plan(path, PLAN, METADATA)
    header = {"units": {"a": [3, 4], "b": [10]}, "layers": {"vision": 2}, "metadata": METADATA | {"pattern": "x"}}
    header |= change.get("header", {})
    tensors = load_file(path) | change.get("tensors", {})
    save_file(tensors, path, {"kind": change.get("kind", "vlprune-plan-1"), "header": json.dumps(header)})
    if "cut" in change:
        path.write_bytes(path.read_bytes()[: -change["cut"]])
    with pytest.raises(RequestError, match=message) as error:
        load_plan(path, GROUPS, TOWERS)
    assert "\n" not in str(error.value) and "p.safetensors" in str(error.value)
