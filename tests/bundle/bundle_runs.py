"""Run directories made by hand, with exported graphs of a pruned model: what `vlprune bundle` reads, in seconds."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlprune import exporters, models
from vlprune.data import open_data
from vlprune.exporters.packed_files import pack_task
from vlprune.files import write_json
from vlprune.models.family import apply_masks
from vlprune.pruning import prune_layers
from vlprune.report.environment import environment
from vlprune.report.manifest import write_manifest


VARIANT = "omp-0.9"


def write_run(
    folder: Path,
    model: str,
    task: str,
    *,
    family: str | None = None,
    data: str = "scenes",
    pack: str | None = None,
    ratio: float = 0.9,
) -> SimpleNamespace:
    """Prune a model by magnitude, export one task, note it in a report.

    Returns its folder, the pruned model, the spec, and the test data.
    """
    loaded = models.load(model, family=family)
    samples = open_data(task, data, "test", limit=6 if data == "scenes" else None)
    options = dict(loaded.options.get(task, {}))
    if task == "vqa":
        options["answers"] = samples.answer_list
    if task == "zero-shot":
        options |= {"classes": samples.classes, "templates": samples.templates}
    layers = loaded.layers()
    apply_masks(layers, prune_layers(layers, method="omp", ratio=ratio).masks, {})
    spec = exporters.task_spec(loaded, task, **options)
    plain = folder / "onnx" / VARIANT / task
    plain.mkdir(parents=True)
    rows = exporters.export(loaded, task, spec, plain, samples, variant=VARIANT, threads=1, tolerance=1e-3)
    shutil.copytree(plain, folder / "onnx" / "dense" / task)  # of the same sizes, and nothing else of it is read
    graphs = [_graph_row(row, task, False) for row in rows]
    if pack is not None:
        packed = plain / "packed"
        packed.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlprune.exporters.pack.SMALLEST", 256)  # layers of the small models are packed, too
            rows = pack_task(loaded, plain, packed, samples, values=pack, target="portable", threshold=0.3, threads=1)
        graphs += [_graph_row({"nonzero_fraction": 0.1, **row}, task, True) for row in rows]
    write_json(folder / "report.json", _report(loaded, model, task, graphs))
    (folder / "recipe.yaml").write_text(f"model: {model}\nmethod: omp\nratios: [0.9]\nseed: 0\n")
    write_manifest(folder, 0)
    return SimpleNamespace(folder=folder, model=loaded, spec=spec, data=samples, task=task)


def _graph_row(row: dict[str, Any], task: str, packed: bool) -> dict[str, Any]:
    keys = ("graph", "bytes", "nonzero_fraction", "max_abs_diff", "cosine_min")
    where = f"onnx/{VARIANT}/{task}/{'packed/' if packed else ''}{row['file']}"
    weights = {"weights": row["weights"]} if packed else {}
    made = {"variant": VARIANT, "task": task, "precision": "fp32", "packed": packed, "file": where, **weights}
    return {**{key: row[key] for key in keys}, **made, "dense_bytes": row["bytes"]}


def _report(model: Any, name: str, task: str, graphs: list[dict[str, Any]]) -> dict[str, Any]:
    def variant(identity: str, ratio: float | None) -> dict[str, Any]:
        sparsity = {"achieved": ratio or 0.0, "per_modality": {}, "per_layer": {}}
        pruned = {"method": "omp", "pattern": "unstructured"} if ratio else {"method": None, "pattern": None}
        return {"id": identity, "ratio": ratio, "finetuned": False, "sparsity": sparsity, "parameters": 1, **pruned}

    def metrics(identity: str, score: float) -> dict[str, Any]:
        where = {"runtime": "pytorch", "provider": "cpu", "precision": "fp32", "packed": False}
        scores = {"values": {"accuracy": score}, "ci95": {"accuracy": [score - 0.1, score + 0.1]}}
        return {"variant": identity, "task": task, "dataset": "scenes", "n": 6, **where, **scores}

    described = {
        "name": name,
        "family": model.family,
        "checkpoint": f"made here (SHA-256 {'ab' * 32})",
        "parameters": 1000,
        "prunable_parameters": 900,
        "random_weights": False,
    }
    return {
        "schema_version": 1,
        "model": described,
        "seed": 0,
        "variants": [variant("dense", None), variant(VARIANT, 0.9)],
        "metrics": [metrics("dense", 0.75), metrics(VARIANT, 0.5)],
        "graphs": graphs,
        "throughput": [],
        "stages": [],
        "environment": dict(environment(1)),
    }
