"""Structured methods through the whole pipeline: plans, cut checkpoints, smaller graphs, the report; bad requests."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlprune import exporters, pipeline, stages
from vlprune.cli.main import main
from vlprune.errors import RequestError
from vlprune.models import loading
from vlprune.report.manifest import verify_manifest
from vlprune.report.schema import validate_report
from vlprune.structured import STRUCTURED, Plan, cut, load_plan, mope, removed, save_plan, sizes


TASKS = ("retrieval", "captioning", "vqa")
TRAINING = {"max_steps": 2, "lr": 3e-3, "batch_size": 4}
HERE: dict[str, Any] = {"device": "cpu", "threads": 1}
PLAIN: dict[str, Any] = {"family": None, "image_size": None, "seed": 0}
RATIOS = [0.2, 0.45]
TUNED = ("retrieval", "vqa")  # by the run below


@contextmanager
def short_timing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BENCH_SECONDS", 0.02)
        yield


def compress(model: Path, output: Path, photos: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    data = {task: str(photos) for task in tasks or TASKS}
    options = {"ratios": [0.45], "calibration": str(photos), "bench_batches": [1], **TRAINING, **HERE, **options}
    with short_timing():
        return pipeline.compress(str(model), output=output, data=data, **options)


def read(run: Path) -> dict[str, Any]:
    verify_manifest(run)
    return validate_report(json.loads((run / "report.json").read_text()))  # type: ignore[return-value]


def stamps(run: Path) -> dict[str, str]:
    return {str(p.relative_to(run)): json.loads(p.read_text())["id"] for p in (run / "stages").rglob("*.json")}


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in report["variants"] if row["id"] == name)


@pytest.fixture(scope="module")
def dense(small_models: dict[str, Path]):
    return loading.load(str(small_models["pretraining"]), **PLAIN)


@pytest.fixture(scope="module")
def finished(small_models: dict[str, Path], photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through the command line: two tasks, two ratios, fine-tuned, exported; not to be changed."""
    run = tmp_path_factory.mktemp("structured") / "run"
    command = ["compress", str(small_models["pretraining"]), "-o", str(run), "--json", "--ratio", "0.2,0.45"]
    command += ["--method", "multiflow-structured", "--calibration", str(photos), "--export", "onnx"]
    command += ["--bench-batch", "1", "--max-steps", "2", "--lr", "3e-3", "--batch-size", "4"]
    command += ["--device", "cpu", "--threads", "1"]
    for task in TUNED:
        command += ["--data", f"{task}={photos}"]
    with short_timing(), redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    assert json.loads(out.getvalue()) == read(run)
    return run


# --- one plan for all tasks -------------------------------------------------------------------------------------------


def test_rows_of_the_report(finished: Path, dense: Any) -> None:
    report = read(finished)
    bases = ["dense", *(f"multiflow-structured-{ratio}" for ratio in RATIOS)]
    assert [v["id"] for v in report["variants"]] == [*bases, *(f"{base}-finetuned" for base in bases)]
    groups, towers = dense.groups(), dense.towers()
    for ratio in RATIOS:
        name = f"multiflow-structured-{ratio}"
        plan, metadata = load_plan(finished / "masks" / f"{name}.safetensors", groups, towers)
        assert (metadata["method"], metadata["pattern"]) == ("multiflow-structured", "structured")
        found, told = removed(plan, groups, towers), row(report, name)
        assert told["pattern"] == "structured" and told["ratio"] == ratio
        assert told["sparsity"]["achieved"] == found["achieved"] == pytest.approx(ratio, abs=0.03)
        assert told["sparsity"]["per_modality"] == found["per_modality"]
        small = loading.load(str(finished.parent / "run" / "checkpoints" / f"{name}-finetuned" / "vqa"), **PLAIN)
        left = {x: layer.weight.numel() for layer in small.layers() for x in layer.names}
        for layer in dense.layers():  # of the dense model's layers
            if layer.name in left:
                gone = 1 - left[layer.name] / layer.weight.numel()
                assert told["sparsity"]["per_layer"][layer.name] == pytest.approx(gone)
        assert set(told["sparsity"]["per_layer"]) == {layer.name for layer in dense.layers()}
        twin = {key: told[key] for key in ("sparsity", "parameters", "flops", "ratio", "pattern")}
        assert twin.items() <= row(report, f"{name}-finetuned").items()
    first, second = (row(report, f"multiflow-structured-{ratio}") for ratio in RATIOS)
    whole = row(report, "dense")
    assert whole["parameters"] == report["model"]["parameters"] > first["parameters"] > second["parameters"]
    for task in TASKS:
        assert whole["flops"][task] > first["flops"][task] > second["flops"][task] > 0
    text = (finished / "report.md").read_text()
    assert "## Parameters and FLOPs" in text and "removes whole heads" in text and "Unstructured zeros" not in text


def test_graphs_are_smaller_and_hold_no_zeros(finished: Path) -> None:
    report = read(finished)
    rows = [row for row in report["graphs"] if row["variant"] == "multiflow-structured-0.45-finetuned"]
    assert len(rows) == 6
    for graph in rows:
        assert graph["bytes"] < graph["dense_bytes"] and graph["nonzero_fraction"] > 0.99
        assert graph["max_abs_diff"] < 1e-3
    scores = {(row["variant"], row["task"], row["runtime"]): row["values"] for row in report["metrics"]}
    for task in TUNED:
        for ratio in RATIOS:
            name = f"multiflow-structured-{ratio}-finetuned"
            assert scores[name, task, "pytorch"] == pytest.approx(scores[name, task, "onnxruntime"], abs=0.005)
        assert ("dense-finetuned", task, "pytorch") in scores
    assert {row["variant"] for row in report["throughput"]} == {
        f"multiflow-structured-{ratio}-finetuned" for ratio in RATIOS
    }


OUTPUTS = """
import sys, numpy as np
from vlprune import load
from vlprune.exporters import torch_graphs
model = load(sys.argv[1])
pixels = np.load(sys.argv[2])
np.save(sys.argv[3], torch_graphs(model, "retrieval")["image_encoder"]({"pixel_values": pixels})["image_embeds"])
"""


def test_a_checkpoint_gives_the_same_outputs_in_a_new_process(finished: Path, tmp_path: Path) -> None:
    folder = finished / "checkpoints" / "multiflow-structured-0.45-finetuned" / "retrieval"
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "in.npy", pixels)
    command = [sys.executable, "-c", OUTPUTS, str(folder), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    subprocess.run(command, check=True, cwd=tmp_path)
    model = loading.load(str(folder), **PLAIN)
    assert sizes(model)
    ours = exporters.torch_graphs(model, "retrieval")["image_encoder"]({"pixel_values": pixels})["image_embeds"]
    assert np.array_equal(ours, np.load(tmp_path / "out.npy"))


def test_resuming_runs_nothing_again(
    finished: Path, small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    options: dict[str, Any] = {"method": "multiflow-structured", "ratios": RATIOS, "export": "onnx", "resume": True}
    compress(small_models["pretraining"], run, photos, *TUNED, **options)
    assert stamps(run) == stamps(finished)
    # What a kill leaves: a checkpoint is missing, and what was made from it with it.
    name = "multiflow-structured-0.45-finetuned"
    shutil.rmtree(run / "checkpoints" / name / "vqa")
    compress(small_models["pretraining"], run, photos, *TUNED, **options)
    again = {stage for stage, stamp in stamps(run).items() if stamp != stamps(finished)[stage]}
    assert again == {
        *(f"stages/{kind}/{name}/vqa.json" for kind in ("finetune", "score", "export")),
        *(f"stages/{kind}/{name}/vqa/cpu.json" for kind in ("validate", "bench")),
        "stages/samples/vqa.json",
    }
    same = load_file(run / "checkpoints" / name / "vqa" / "model.safetensors")
    other = load_file(finished / "checkpoints" / name / "vqa" / "model.safetensors")
    assert all(torch.equal(same[key], other[key]) for key in other)


def test_verb_after_verb(finished: Path, small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"method": "multiflow-structured", "ratios": [0.45], "calibration": str(photos), **HERE}
    first = pipeline.prune(str(small_models["pretraining"]), output=run, **options)
    assert first["metrics"] == [] and row(first, "multiflow-structured-0.45")["flops"].keys() == set(TASKS)
    name = "multiflow-structured-0.45"
    saved = loading.load(str(run / "checkpoints" / name / "pretrained"), **PLAIN)
    assert saved.tasks == TASKS and saved.tied and sizes(saved)
    plan = f"masks/{name}.safetensors"
    assert (run / plan).read_bytes() == (finished / plan).read_bytes()
    pipeline.finetune(run, data={"vqa": str(photos)}, **TRAINING, **HERE)
    pipeline.export(run, threads=1)
    with short_timing():
        pipeline.validate(run, bench_batches=[1], threads=1)
    ours, theirs = (
        {m["variant"]: m["values"] for m in read(r)["metrics"] if m["task"] == "vqa"} for r in (run, finished)
    )
    assert all(ours[variant] == theirs[variant] for variant in ours)
    assert f"{name}-finetuned" in ours


@pytest.mark.parametrize("method", ["magnitude-structured", "isomorphic"])
def test_methods_that_need_no_calibration(small_models: dict[str, Path], tmp_path: Path, method: str) -> None:
    report = pipeline.prune(str(small_models["vqa"]), output=tmp_path / "run", ratios=[0.4], method=method, **HERE)
    assert [stage["name"] for stage in report["stages"]] == [f"prune/{method}", f"checkpoint/{method}-0.4"]
    assert row(report, f"{method}-0.4")["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.03)


def test_widths_of_any_size(small_models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratios": [0.37], "method": "isomorphic", **HERE}
    shapes = {}
    for rounded in (True, False):
        run = tmp_path / str(rounded)
        pipeline.prune(str(small_models["vqa"]), output=run, round_widths=rounded, **options)
        assert yaml.safe_load((run / "recipe.yaml").read_text())["round_widths"] is rounded
        model = loading.load(str(run / "checkpoints" / "isomorphic-0.37" / "pretrained"), **PLAIN)
        shapes[rounded] = [group.shape[0] for group in model.groups() if group.kind == "ffn"]
    assert all(width % 8 == 0 for width in shapes[True]) and any(width % 8 for width in shapes[False])


def test_random_weights(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "isomorphic", "export": "onnx"}
    report = compress(small_models["random"], tmp_path / "run", photos, "captioning", **options)
    assert report["metrics"] == [] and [v["id"] for v in report["variants"]] == ["dense", "isomorphic-0.45"]
    assert {g["graph"] for g in report["throughput"]} == {"image_encoder", "text_decoder"}


@pytest.mark.parametrize(
    ("kind", "task"), [("clip", "retrieval"), ("siglip", "zero-shot"), ("gated", "classification")]
)
def test_other_families(
    duals: Any, vits: Any, animals: Path, photos: Path, tmp_path: Path, kind: str, task: str
) -> None:
    folder = (vits if kind == "gated" else duals)(kind).folder
    source = photos if task == "retrieval" else animals
    calibration = animals if kind == "gated" else photos
    options: dict[str, Any] = {
        "ratios": [0.3],
        "calibration": str(calibration),
        "export": "onnx",
        "max_steps": 2,
        **HERE,
    }
    with short_timing():
        report = pipeline.compress(
            str(folder), output=tmp_path / "run", data={task: str(source)}, method="multiflow-structured",
            bench_batches=[1], **options,
        )  # fmt: skip
    name = "multiflow-structured-0.3"
    assert row(report, name)["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.06)
    assert row(report, name)["parameters"] < row(report, "dense")["parameters"]
    assert all(g["bytes"] < g["dense_bytes"] for g in report["graphs"] if g["variant"] == f"{name}-finetuned")
    small = loading.load(str(tmp_path / "run" / "checkpoints" / f"{name}-finetuned" / task), **PLAIN)
    assert sizes(small)


# --- plans found by evaluating or by training -------------------------------------------------------------------------


def test_mope_measures_once_for_all_ratios(
    small_models: dict[str, Path], photos: Path, tmp_path: Path, dense: Any
) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"method": "mope", "ratios": [0.2, 0.4], "mope": {"pairs": 8, "groups": 2}}
    report = compress(small_models["pretraining"], run, photos, "retrieval", **options)
    names = [stage["name"] for stage in report["stages"]]
    assert names.count("measure") == 1 and "statistics" not in names
    groups, towers = dense.groups(), dense.towers()
    table = mope.load_table(run / "masks" / "mope-table.safetensors", groups, towers)
    assert table.metadata["pairs"] == 8 and table.metadata["stage"] == "pretraining"
    for ratio in (0.2, 0.4):
        plan, _ = load_plan(run / "masks" / f"mope-{ratio}.safetensors", groups, towers)
        expected = mope.plan_from(table, groups, towers, ratio)
        assert plan.units.keys() == expected.units.keys()
        assert all(torch.equal(plan.units[name], expected.units[name]) for name in plan.units)
        assert all(torch.equal(plan.layers[name], expected.layers[name]) for name in plan.layers)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["distill"] == [1.0, 1000.0, 1.0]
    before = stamps(run)
    compress(small_models["pretraining"], run, photos, "retrieval", **{**options, "ratios": [0.3]}, resume=True)
    assert stamps(run)["stages/measure.json"] == before["stages/measure.json"]
    assert (run / "masks" / "mope-0.3.safetensors").is_file()


def test_mope_on_fine_tuned_models(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"method": "mope", "mope": {"pairs": 8, "groups": 2, "stage": "task"}, "export": "onnx"}
    tasks = ("retrieval", "captioning")
    report = compress(small_models["pretraining"], run, photos, *tasks, **options)
    told = row(report, "mope-0.45")
    assert told["per_task"].keys() == set(tasks) == row(report, "mope-0.45-finetuned")["per_task"].keys()
    for task in tasks:
        tuned = loading.load(str(run / "checkpoints" / "dense-finetuned" / task), **PLAIN)
        groups, towers = tuned.groups(), tuned.towers()
        table = mope.load_table(run / "masks" / f"mope-table-{task}.safetensors", groups, towers)
        assert table.metadata["stage"] == "task"
        plan, _ = load_plan(run / "masks" / "mope-0.45" / f"{task}.safetensors", groups, towers)
        cut(tuned, plan)  # the weights are the fine-tuned ones
        small = loading.load(str(run / "checkpoints" / "mope-0.45" / task), **PLAIN)
        assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), small.parameters(), strict=True))
        part = told["per_task"][task]
        assert part["parameters"] == sum(p.numel() for p in small.parameters()) < part["dense_parameters"]
        assert part["sparsity"]["achieved"] == removed(plan, groups, towers)["achieved"]
    mean = np.mean([told["per_task"][task]["sparsity"]["achieved"] for task in tasks])
    assert told["sparsity"]["achieved"] == pytest.approx(mean)
    before = stamps(run)
    compress(small_models["pretraining"], run, photos, *tasks, **options, resume=True)
    assert stamps(run) == before


def test_upop_searches_per_task(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"method": "upop", "ratios": [0.3], "export": "onnx", "round_widths": False}
    tasks = ("retrieval", "vqa")
    report = compress(small_models["pretraining"], run, photos, *tasks, **options)
    told = row(report, "upop-0.3")
    assert told["per_task"].keys() == set(tasks) == told["flops"].keys()
    whole = loading.load(str(small_models["pretraining"]), **PLAIN)
    for task in tasks:
        part = whole.for_task(task)
        plan, metadata = load_plan(run / "masks" / "upop-0.3" / f"{task}.safetensors", part.groups(), part.towers())
        assert metadata["task"] == task and not plan.layers
        small = loading.load(str(run / "checkpoints" / "upop-0.3" / task), **PLAIN)
        assert small.tasks == (task,) and small.tied == (task == "vqa")
        assert {g.name: g.shape for g in small.groups()} == {g.name: plan.shape(g) for g in part.groups()}
        assert not torch.equal(  # the search trained them
            small.vision_model.post_layernorm.weight, whole.vision_model.post_layernorm.weight
        )
    assert {m["variant"] for m in report["metrics"]} == {
        "dense", "dense-finetuned", "upop-0.3", "upop-0.3-finetuned"
    }  # fmt: skip
    assert not (run / "training").exists()
    before = stamps(run)
    compress(small_models["pretraining"], run, photos, *tasks, **options, resume=True)
    assert stamps(run) == before
    alone = compress(
        small_models["pretraining"], tmp_path / "alone", photos, "vqa", method="upop", ratios=[0.3], finetune="none"
    )
    assert [v["id"] for v in alone["variants"]] == ["dense", "upop-0.3"]
    assert "vqa" in (tmp_path / "alone" / "report.md").read_text()


# --- requests that cannot be met --------------------------------------------------------------------------------------


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a command that must fail with 2; gives the one line it prints. Nothing may be left where it was to write."""

    def run(*arguments: object) -> str:
        out = tmp_path / "never"
        capfd.readouterr()
        assert main([*map(str, arguments), "-o", str(out), "--device", "cpu", "--threads", "1"]) == 2
        stdout, stderr = capfd.readouterr()
        assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1 and "Traceback" not in stderr
        assert not out.exists()
        return stderr

    return run


@pytest.mark.parametrize("method", STRUCTURED)
def test_a_ratio_that_leaves_nothing(fails: Any, small_models: dict[str, Path], photos: Path, method: str) -> None:
    said = fails(
        "compress", small_models["pretraining"], "--method", method, "--ratio", "0.98", "--calibration", photos,
        "--data", f"retrieval={photos}",
    )  # fmt: skip
    assert "0.98" in said and ("at most" in said or "leaves nothing" in said)


@pytest.mark.parametrize("method", STRUCTURED)
@pytest.mark.parametrize("pattern", ["2:4", "8x1"])
def test_a_pattern(fails: Any, small_models: dict[str, Path], photos: Path, method: str, pattern: str) -> None:
    ratio = ["--ratio", "0.5"]
    said = fails("compress", small_models["vqa"], "--method", method, "--pattern", pattern, *ratio, "--calibration",
                 photos, "--data", f"vqa={photos}")  # fmt: skip
    assert f"pattern {pattern} is for masks" in said and method in said


def test_packing(fails: Any, small_models: dict[str, Path], photos: Path) -> None:
    said = fails("compress", small_models["vqa"], "--method", "isomorphic", "--ratio", "0.5", "--export", "onnx",
                 "--pack", "sparse", "--data", f"vqa={photos}")  # fmt: skip
    assert "isomorphic leaves none" in said


def test_packing_a_finished_run(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = stamps(finished)
    assert main(["export", str(finished), "--pack", "sparse", "--threads", "1"]) == 2
    assert "multiflow-structured leaves none" in capfd.readouterr().err
    assert stamps(finished) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "upop"], "use vlprune compress"),
        (["--method", "multiflow-structured"], "needs --calibration for multiflow-structured"),
        (["--method", "mope"], "needs --calibration for mope"),
        (["--method", "mop"], "did you mean mope"),
        (["--method", "omp", "--no-round-widths"], "for structured methods"),
        (["--method", "isomorphic", "--mope-pairs", "5"], "pairs of mope cannot be chosen for isomorphic"),
    ],
)
def test_options_of_other_methods(fails: Any, small_models: dict[str, Path], options: list[str], says: str) -> None:
    assert says in fails("prune", small_models["vqa"], "--ratio", "0.5", *options)


def test_what_a_model_cannot_do(
    fails: Any, small_models: dict[str, Path], photos: Path, vits: Any, animals: Path
) -> None:
    said = fails("compress", vits("vit").folder, "--method", "mope", "--ratio", "0.3", "--calibration", animals,
                 "--data", f"classification={animals}")  # fmt: skip
    assert "mope measures cross-modal retrieval" in said and "offers only classification" in said
    data = ["--data", f"vqa={photos}", "--calibration", photos, "--ratio", "0.3"]
    said = fails("compress", small_models["vqa"], "--method", "mope", *data)
    assert "mope measures cross-modal retrieval" in said and "offers only vqa" in said
    said = fails("compress", small_models["random"], "--method", "upop", *data)
    assert "upop searches while a task is learned" in said
    said = fails("compress", small_models["pretraining"], "--method", "mope", "--mope-stage", "task",
                 "--finetune", "none", *data)  # fmt: skip
    assert "nothing is fine-tuned" in said
    said = fails("compress", small_models["pretraining"], "--method", "mope", "--mope-stage", "task", *data)
    assert "a model for vqa cannot do" in said


def test_a_plan_for_another_model(finished: Path, dense: Any, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "masks" / "multiflow-structured-0.45.safetensors"
    plan, metadata = load_plan(path)
    save_plan(path, plan, {**metadata, "model": "0" * 64})
    with pytest.raises(RequestError, match="was made for other weights than .*: prune again"):
        pipeline.finetune(run, **TRAINING, **HERE)
    fewer = {name: kept[..., :5] for name, kept in plan.units.items()}
    save_plan(path, Plan(fewer), metadata)
    with pytest.raises(RequestError, match="belongs to another model"):
        pipeline.finetune(run, **TRAINING, **HERE)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RequestError, match="damaged"):
        pipeline.finetune(run, **TRAINING, **HERE)
    shutil.copy(run / "masks" / "multiflow-structured-0.2.safetensors", path)
    path.unlink()
    with pytest.raises(RequestError, match="cannot read"):
        pipeline.finetune(run, **TRAINING, **HERE)


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed.keys() >= STRUCTURED.keys()
    assert {listed[name]["removes"] for name in STRUCTURED} == {"units"} and listed["omp"]["removes"] == "weights"
