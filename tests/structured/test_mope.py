"""MoPE's table: its file, read without trust, and the plans that follow from it, for any ratio."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlprune.errors import RequestError
from vlprune.models.family import Group, Tower
from vlprune.structured import check_plan, removed, unit_cost
from vlprune.structured.mope import Table, load_table, plan_from, save_table


METADATA = {"model": "abc", "dataset": "scenes", "pairs": 8, "seed": 0, "stage": "task", "recall": 0.5, "loss": 1.5}


def attention(tower: str, layer: int, heads: int = 2, width: int = 4, hidden: int = 8) -> Group:
    """4 x 8 weights per head dimension: 128 per head."""
    name = f"{tower}.{layer}.attn"
    inner = tuple((nn.Linear(hidden, heads * width), 0) for _ in range(3))
    outer = (nn.Linear(heads * width, hidden),)
    return Group(name, (name,), "attention", tower, tower, layer, (nn.Identity(),), inner, outer, (heads, width))


def ffn(tower: str, layer: int, neurons: int = 32, hidden: int = 8) -> Group:
    """2 x 8 weights per neuron: 512 in all."""
    name = f"{tower}.{layer}.mlp"
    inner, outer = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden)
    return Group(name, (name,), "ffn", tower, tower, layer, (nn.Identity(),), ((inner, 0),), (outer,), (neurons,))


TOWERS = [Tower("vision", "vision", ("v",), 3), Tower("text", "text", ("t",), 2)]
GROUPS = [make(tower.name, layer) for tower in TOWERS for layer in range(tower.depth) for make in (attention, ffn)]
TOTAL = 5 * (2 * 128 + 512)


def table(seed: int = 0, **errors: list[float]) -> Table:
    """Random errors; `errors` replaces those of single modules, "." written as "_"."""
    generator = torch.Generator().manual_seed(seed)
    given = {name.replace("_", "."): values for name, values in errors.items()}

    def draw(name: str, count: int) -> torch.Tensor:
        found = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        if name in given:
            found[:, 0] = torch.tensor(given[name])
        return found

    units = {g.name: draw(g.name, 2 if g.kind == "attention" else 4) for g in GROUPS}
    members = {g.name: list(torch.randperm(32, generator=generator).split(8)) for g in GROUPS if g.kind == "ffn"}
    return Table(units, members, {t.name: draw(t.name, t.depth) for t in TOWERS}, METADATA)


def every(error: float) -> dict[str, list[float]]:
    """The same error for all heads and neuron groups."""
    return {g.name.replace(".", "_"): [error] * (2 if g.kind == "attention" else 4) for g in GROUPS}


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["global", "modality"])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_any_ratio_is_met_by_one_table(ratio, seed, budget):
    plan = plan_from(table(seed), GROUPS, TOWERS, ratio, budget=budget)
    check_plan(plan, GROUPS, TOWERS)
    found = removed(plan, GROUPS, TOWERS)
    # 8 neurons, 128 weights, are the smallest step
    parts = found["per_modality"] if budget == "modality" else {"all": found["achieved"]}
    for modality, achieved in parts.items():
        whole = {"vision": TOTAL * 3 / 5, "text": TOTAL * 2 / 5, "all": TOTAL}[modality]
        assert ratio - 128 / whole <= achieved <= ratio
    for group in GROUPS:
        shape = plan.shape(group)
        assert not plan.keeps(group) or shape[0] >= (8 if group.kind == "ffn" else 1)
        assert group.kind != "ffn" or shape[0] % 8 == 0
        assert group.kind == "ffn" or shape[1] in (0, 4)  # heads go whole


def test_width_takes_at_most_its_share_before_layers_go():
    for ratio in (0.1, 0.3, 0.5):
        assert not plan_from(table(), GROUPS, TOWERS, ratio).layers
    for ratio in (0.7, 0.8):
        plan = plan_from(table(), GROUPS, TOWERS, ratio)
        assert plan.layers
    plan = plan_from(table(), GROUPS, TOWERS, 0.4, width=0.0)  # depth alone: two layers of five
    assert sum(int((~kept).sum()) for kept in plan.layers.values()) == 2
    assert not plan.units
    assert not plan_from(table(), GROUPS, TOWERS, 0.6, width=1.0).layers


def test_the_lowest_error_per_weight_goes_first():
    errors = every(9.0) | {"vision_1_attn": [0.4, 9.0], "text_0_mlp": [9.0, 0.3, 9.0, 0.2]}
    plan = plan_from(table(0, **errors), GROUPS, TOWERS, 3 * 128 / TOTAL + 1e-9)
    assert set(plan.units) == {"vision.1.attn", "text.0.mlp"}
    assert plan.units["vision.1.attn"].any(1).tolist() == [False, True]
    members = table(0, **errors).members["text.0.mlp"]
    gone = (~plan.units["text.0.mlp"]).nonzero().flatten().tolist()
    assert set(gone) == set(torch.cat([members[1], members[3]]).tolist())
    # of a layer with the lowest error, whatever its modules' are
    plan = plan_from(table(0, vision=[5.0, 0.1, 5.0], text=[4.0, 4.0]), GROUPS, TOWERS, 0.21, width=0.0)
    assert plan.layers["vision"].tolist() == [True, False, True]
    assert "text" not in plan.layers


def test_equal_errors_are_told_apart_by_the_loss():
    found = table(3, **every(0.0))
    losses = {(g.name, i): float(found.units[g.name][i, 1]) for g in GROUPS for i in range(len(found.units[g.name]))}
    name, index = min(losses, key=lambda key: losses[key])  # all modules here have 128 weights
    plan = plan_from(found, GROUPS, TOWERS, 128 / TOTAL + 1e-9)
    gone = found.members[name][index] if name.endswith("mlp") else torch.tensor([index])
    assert set(plan.units) == {name}
    kept = plan.units[name]
    assert set((~(kept if kept.ndim == 1 else kept.any(1))).nonzero().flatten().tolist()) == set(gone.tolist())


def test_a_recall_that_is_better_without_a_module_is_no_reason_to_remove_it_first():
    found = table(3, **every(0.0))
    worst = max((float(e[:, 1].max()), name) for name, e in found.units.items())[1]
    index = int(found.units[worst][:, 1].argmax())
    before = plan_from(found, GROUPS, TOWERS, 0.3)
    found.units[worst][index, 0] = -0.1
    after = plan_from(found, GROUPS, TOWERS, 0.3)
    assert all(torch.equal(before.units[name], after.units[name]) for name in before.units | after.units)


def test_the_rest_of_the_ratio_goes_by_the_least_important_neurons():
    group = ffn("vision", 0, neurons=64)  # two groups of 32 neurons: 512 weights each
    other = ffn("text", 0, neurons=64)
    towers = [Tower("vision", "vision", ("v",), 1), Tower("text", "text", ("t",), 1)]
    order = torch.arange(64).flip(0)
    units = {group.name: torch.tensor([[0.9, 0.0], [0.1, 0.0]]), other.name: torch.ones(2, 2)}
    members = {name: list(order.split(32)) for name in units}
    found = Table(units, members, {"vision": torch.ones(1, 2), "text": torch.ones(1, 2)}, METADATA)
    plan = plan_from(found, [group, other], towers, (512 + 2 * 128 + 60) / 2048)
    # the second group whole (neurons 31..0), then the last 16 of the first: neurons 32..47
    assert (~plan.units[group.name]).nonzero().flatten().tolist() == list(range(48))
    plan = plan_from(found, [group, other], towers, (512 + 3 * 16 + 1) / 2048, round_to=1)
    assert (~plan.units[group.name]).nonzero().flatten().tolist() == list(range(35))


@pytest.mark.parametrize("ratio", [0.95, 0.999])
def test_a_ratio_that_leaves_nothing_is_refused_in_one_line(ratio):
    with pytest.raises(RequestError, match="at most 0.8") as error:
        plan_from(table(), GROUPS, TOWERS, ratio)
    assert "\n" not in str(error.value)


def test_the_largest_ratio_keeps_one_head_and_some_neurons_of_one_layer():
    least = 2 * (128 + 8 * 16)  # of two towers
    plan = plan_from(table(), GROUPS, TOWERS, 1 - least / TOTAL)
    assert [sum(kept.tolist()) for kept in plan.layers.values()] == [1, 1]
    assert sorted(plan.shape(g) for g in GROUPS if plan.keeps(g)) == [(1, 4), (1, 4), (8,), (8,)]


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.0}, {"ratio": float("nan")}, {"width": 1.5}])
def test_wrong_settings_are_refused(wrong):
    arguments = {"ratio": 0.5} | wrong
    with pytest.raises(RequestError):
        plan_from(table(), GROUPS, TOWERS, **arguments)


def test_every_unit_costs_what_surgery_counts():
    assert {unit_cost(g) * (4 if g.kind == "attention" else 8) for g in GROUPS} == {128}


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mope-table.safetensors"
    save_table(path, table())
    return path


def test_a_table_comes_back_as_it_was(file):
    found, written = load_table(file, GROUPS, TOWERS, "abc"), table()
    assert found.metadata == METADATA
    assert list(found.units) == list(written.units) and list(found.layers) == list(written.layers)
    assert all(torch.equal(found.units[name], written.units[name]) for name in written.units)
    assert all(torch.equal(found.layers[name], written.layers[name]) for name in written.layers)
    for name, groups in written.members.items():
        assert [group.tolist() for group in found.members[name]] == [group.tolist() for group in groups]
    plans = [plan_from(t, GROUPS, TOWERS, 0.6) for t in (found, written)]
    assert all(torch.equal(plans[0].units[n], kept) for n, kept in plans[1].units.items())


def test_the_same_table_has_the_same_bytes(file, tmp_path):
    save_table(tmp_path / "again.safetensors", load_table(file))
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def rewrite(path, change) -> None:
    """Change tensors and header in place."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors, header = load_file(path), json.loads(metadata["header"])
    change(tensors, header)
    save_file(tensors, path, {"kind": metadata["kind"], "header": json.dumps(header)})


def _drop(tensors, header):
    del tensors["units/vision.0.attn"]


def _nan(tensors, header):
    tensors["layers/text"][0, 0] = float("nan")


def _twice(tensors, header):
    tensors["members/vision.0.mlp"][0] = tensors["members/vision.0.mlp"][1]


def _beyond(tensors, header):
    tensors["members/vision.0.mlp"][0] = 2**30


def _negative(tensors, header):
    tensors["members/vision.0.mlp"][0] = -1


def _stray(tensors, header):
    tensors["units/stray"] = torch.zeros(1, 2)


def _huge(tensors, header):
    header["units"]["vision.0.attn"] = 2**40


def _no_count(tensors, header):
    header["layers"]["text"] = "2"


def _sizes(tensors, header):
    header["sizes"]["vision.0.mlp"] = [8, 8, 8]


def _sizes_zero(tensors, header):
    header["sizes"]["vision.0.mlp"] = [0, 16, 8, 8]


def _sizes_other(tensors, header):
    header["sizes"]["text.9.mlp"] = [8]


def _no_units(tensors, header):
    header["units"] = {}


def _lists(tensors, header):
    header["units"] = ["vision.0.attn"]


def _no_sizes(tensors, header):
    header["sizes"] = None


def _stage(tensors, header):
    header["metadata"]["stage"] = "later"


def _no_metadata(tensors, header):
    del header["metadata"]


def _recall(tensors, header):
    header["metadata"]["recall"] = 7.0


MALICIOUS = [
    _drop, _nan, _twice, _beyond, _negative, _stray, _huge, _no_count, _sizes, _sizes_zero, _sizes_other, _no_units,
    _lists, _no_sizes, _stage, _no_metadata, _recall,
]  # fmt: skip


@pytest.mark.parametrize("change", MALICIOUS, ids=lambda change: change.__name__)
def test_broken_and_lying_files_are_refused_in_one_line(file, change):
    rewrite(file, change)
    with pytest.raises(RequestError) as error:
        load_table(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_table_of_another_model_is_refused(file):
    with pytest.raises(RequestError, match="another model"):
        load_table(file, GROUPS, TOWERS, "abd")
    with pytest.raises(RequestError, match="another model"):
        load_table(file, GROUPS[:-1], TOWERS)
    with pytest.raises(RequestError, match="another model"):
        load_table(file, GROUPS, [TOWERS[0], Tower("text", "text", ("t",), 3)])
    with pytest.raises(RequestError, match="another model"):
        load_table(file, [attention("vision", 0, heads=3), *GROUPS[1:]], TOWERS)
    with pytest.raises(RequestError, match="another model"):
        load_table(file, [*GROUPS[:-1], ffn("text", 1, neurons=24)], TOWERS)


def test_a_mask_file_is_no_table(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"kind": "vlprune-masks-1", "header": "{}"})
    with pytest.raises(RequestError, match="vlprune-mope-1"):
        load_table(tmp_path / "x.safetensors")


def test_metadata_must_be_complete_to_be_written(tmp_path):
    broken = replace(table(), metadata=METADATA | {"stage": None})
    with pytest.raises(RequestError, match="stage"):
        save_table(tmp_path / "x.safetensors", broken)
    assert not list(tmp_path.iterdir())
