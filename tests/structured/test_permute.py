"""A permuted model computes what it computed, keeps its shared weights shared, and is found again by later verbs."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlprune
from vlprune import exporters, pipeline
from vlprune.errors import RequestError
from vlprune.pruning import tensorfile
from vlprune.pruning.patterns import Pattern
from vlprune.structured import permute


PATTERN = Pattern.parse("2:4")


def outputs(model: Any, task: str) -> dict[str, np.ndarray]:
    graphs, spec = exporters.torch_graphs(model, task), model.processor
    pixels = np.random.default_rng(0).normal(size=(2, 3, spec.image_size, spec.image_size)).astype(np.float32)
    name = "image_classifier" if task == "classification" else "image_encoder"
    return graphs[name]({"pixel_values": pixels})


@pytest.mark.parametrize(
    ("kind", "task"), [("pretraining", "retrieval"), ("clip", "retrieval"), ("gated", "classification")]
)
def test_a_permuted_model_computes_the_same(
    small_models: dict[str, Path], duals: Any, vits: Any, kind: str, task: str
) -> None:
    folder = {"clip": lambda: duals("clip").folder, "gated": lambda: vits("gated").folder}.get(
        kind, lambda: small_models[kind]
    )()
    model = vlprune.load(str(folder))
    model = model.for_task(task) if kind == "pretraining" else model
    before = outputs(model, task)
    changed = copy.deepcopy(model)
    found = permute.search(changed, PATTERN)
    permute.permute(changed, found.orders)
    assert found.after > found.before and found.orders
    weights = [layer.weight.detach() for layer in model.layers()]
    assert any(not torch.equal(a, b.weight) for a, b in zip(weights, changed.layers(), strict=True))
    for name, array in outputs(changed, task).items():
        np.testing.assert_allclose(array, before[name], atol=2e-5)
    assert len({id(p) for p in changed.parameters()}) == len({id(p) for p in model.parameters()})


def test_a_permutation_is_kept_and_checked(small_models: dict[str, Path], tmp_path: Path) -> None:
    model = vlprune.load(str(small_models["pretraining"]))
    found, made_for = permute.search(model, PATTERN), {"model": "abc", "seed": 0}
    path = tmp_path / "permutation.safetensors"
    permute.save(path, found, made_for)
    read = permute.load(path, model, made_for)
    assert read is not None and (read.before, read.after) == (found.before, found.after)
    assert all(torch.equal(read.orders[name], order) for name, order in found.orders.items())
    assert permute.load(path, model, {"model": "other", "seed": 0}) is None
    name = f"order/{next(iter(found.orders))}"
    tensors = load_file(path)
    header = {"made_for": made_for, "before": 0.5, "after": 0.6}
    for wrong in (
        torch.zeros_like(tensors[name]),
        tensors[name].flip(0),
        tensors[name][:-1].clone(),
        tensors[name].float(),
    ):
        tensorfile.write(path, permute.KIND, tensors | {name: wrong}, header)
        if torch.equal(wrong.sort().values, torch.arange(len(wrong))) and wrong.dtype == torch.int64 and "mlp" in name:
            continue
        with pytest.raises(RequestError, match="no order of its units|expected I64"):
            permute.load(path, model, made_for)
    save_file(tensors, path)
    with pytest.raises(RequestError, match="is no vlprune.permutation file"):
        permute.load(path, model, made_for)


def test_a_run_with_permuted_units(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", str(small_models["pretraining"])
    options: dict[str, Any] = {"ratios": [0.5], "method": "omp", "pattern": "2:4", "threads": 1}
    report = pipeline.prune(model, output=run, permute=True, **options)
    pruned = next(row for row in report["variants"] if row["method"])
    assert 0.5 < pruned["permuted"]["before"] < pruned["permuted"]["after"] < 1
    assert pruned["sparsity"]["achieved"] == 0.5
    data = {"retrieval": str(photos)}
    scored = pipeline.finetune(run, finetune="none", data=data, threads=1)  # finds the order in the run
    plain = pipeline.prune(model, output=tmp_path / "plain", **options)
    other = pipeline.finetune(tmp_path / "plain", finetune="none", data=data, threads=1)
    assert "permuted" not in next(row for row in plain["variants"] if row["method"])
    dense = [next(r for r in rep["metrics"] if r["variant"] == "dense")["values"] for rep in (scored, other)]
    assert dense[0] == dense[1]
    assert json.loads((run / "manifest.json").read_text())
    again = pipeline.prune(model, output=run, permute=True, **options)
    assert again["variants"] == report["variants"]


@pytest.mark.parametrize("options", [{"pattern": "unstructured"}, {"pattern": "4x1"}, {"method": "isomorphic"}])
def test_permuting_is_for_n_of_m(small_models: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="--permute is for patterns that keep n of m"):
        pipeline.prune(
            str(small_models["pretraining"]),
            output=tmp_path / "run",
            ratios=[0.5],
            permute=True,
            **{"method": "omp"} | options,
        )
