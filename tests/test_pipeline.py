"""The whole way from a checkpoint to the report, on models of two layers; killed, resumed, and verb by verb."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vlprune import files, pipeline, stages
from vlprune.cli.main import main
from vlprune.errors import MachineError, RequestError
from vlprune.exporters import parameters
from vlprune.models import loading
from vlprune.pruning import METHODS
from vlprune.pruning.masks import load_masks
from vlprune.recipe import RECIPE
from vlprune.report.manifest import verify_manifest
from vlprune.report.schema import validate_report
from vlprune.training import finetune


TASKS = ("retrieval", "captioning", "vqa")
RATIOS = [0.5, 0.9]
GRAPHS = {
    "retrieval": {"image_encoder", "text_encoder", "itm"},
    "captioning": {"image_encoder", "text_decoder"},
    "vqa": {"image_encoder", "question_encoder", "answer_decoder"},
}
TRAINING = {"max_steps": 2, "lr": 3e-3, "batch_size": 4}
HERE = {"device": "cpu", "threads": 1}
BASES = ("dense", "multiflow-0.5", "multiflow-0.9")
TUNED = tuple(f"{base}-finetuned" for base in BASES)


@contextmanager
def short_timing() -> Iterator[None]:
    """Time graphs for a moment only: what the figures are is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BENCH_SECONDS", 0.02)
        yield


def compress(model: Path, output: Path, photos: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    data = {task: str(photos) for task in tasks or TASKS}
    options = {"ratios": RATIOS, "calibration": str(photos), "bench_batches": [1], **HERE, **options}
    with short_timing():
        return pipeline.compress(str(model), output=output, data=data, **options)


@pytest.fixture(scope="session")
def finished(small_models: dict[str, Path], photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run through the command line: three tasks, two ratios, fine-tuned, exported; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    command = ["compress", str(small_models["pretraining"]), "-o", str(run), "--json", "--ratio", "0.5,0.9"]
    command += ["--calibration", str(photos), "--export", "onnx", "--bench-batch", "1", "--device", "cpu"]
    command += ["--max-steps", "2", "--lr", "3e-3", "--batch-size", "4", "--threads", "1"]
    for task in TASKS:
        command += ["--data", f"{task}={photos}"]
    with short_timing(), redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    assert json.loads(out.getvalue()) == read(run)
    return run


def read(run: Path) -> dict[str, Any]:
    """report.json, checked, with a manifest that fits the folder."""
    verify_manifest(run)
    return validate_report(json.loads((run / "report.json").read_text()))  # type: ignore[return-value]


def rows_of(report: dict[str, Any], tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """What of a report does not depend on the clock."""
    return {
        "model": {key: value for key, value in report["model"].items() if key != "name"},
        "variants": report["variants"],
        "metrics": [row for row in report["metrics"] if row["task"] in tasks],
        "graphs": [row for row in report["graphs"] if row["task"] in tasks],
        "throughput": [
            (row["variant"], row["graph"], row["batch"]) for row in report["throughput"] if row["task"] in tasks
        ],
        "samples": [row for row in report["samples"] if row["task"] in tasks],
        "stages": [row["name"] for row in report["stages"] if not {*row["name"].split("/")} & {*TASKS} - {*tasks}],
    }


def masks_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "masks").iterdir())}


def hidden(run: Path) -> list[Path]:
    return list(run.rglob(".*"))


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_every_variant_and_task_is_in_the_report(finished: Path) -> None:
    report = read(finished)
    assert [row["id"] for row in report["variants"]] == [*BASES, *TUNED]
    measured = {(row["variant"], row["task"], row["runtime"]) for row in report["metrics"]}
    assert measured == {(v, t, "pytorch") for v in (*BASES, *TUNED) for t in TASKS} | {
        (v, t, "onnxruntime") for v in TUNED for t in TASKS
    }
    assert len(report["metrics"]) == len(measured)
    graphs = {(row["variant"], row["task"], row["graph"]) for row in report["graphs"]}
    assert graphs == {(v, t, g) for v in TUNED for t in TASKS for g in GRAPHS[t]}
    timed = {(row["variant"], row["task"], row["graph"]) for row in report["throughput"]}
    assert timed == {row for row in graphs if row[0] != "dense-finetuned"}
    assert {row["provider"] for row in report["throughput"]} == {"cpu"}
    kinds = [row["name"].split("/")[0] for row in report["stages"]]
    assert list(dict.fromkeys(kinds)) == [
        "statistics", "prune", "finetune", "score", "export", "validate", "samples", "bench",
    ]  # fmt: skip
    assert report["model"]["family"] == "blip" and not report["model"]["random_weights"]
    assert all(row["n"] == (12 if row["task"] == "vqa" else 4) for row in report["metrics"])

    text = (finished / "report.md").read_text()
    assert all(f"| {variant} |" in text for variant in (*BASES, *TUNED))
    assert {row["task"] for row in report["samples"]} == set(TASKS)
    for row in report["samples"]:
        scored = {(m["variant"], m["runtime"]) for m in report["metrics"] if m["task"] == row["task"]}
        assert {(output["variant"], output["runtime"]) for output in row["outputs"]} == scored
        assert all((finished / image).is_file() for image in row["images"])
    page = (finished / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= len(TASKS) * 4 and "no image" not in page
    assert hidden(finished) == [] and not (finished / "training").exists()


def test_sparsity_is_exact_to_one_weight_per_modality(finished: Path) -> None:
    report = read(finished)
    for ratio in RATIOS:
        pruned, metadata = load_masks(finished / "masks" / f"multiflow-{ratio}.safetensors")
        assert (metadata["method"], metadata["ratio"]) == ("multiflow", ratio)
        sparsity = next(row for row in report["variants"] if row["id"] == f"multiflow-{ratio}")["sparsity"]
        assert abs(sparsity["achieved"] - ratio) < 1e-4
        for modality in ("vision", "text"):
            masks = [mask for name, mask in pruned.masks.items() if metadata["modality"][name] == modality]
            total, removed = sum(m.numel() for m in masks), sum(int((~m).sum()) for m in masks)
            assert abs(removed - ratio * total) <= 1
            assert sparsity["per_modality"][modality] == removed / total
    total = sum(mask.numel() for mask in pruned.masks.values())
    assert report["model"]["prunable_parameters"] == total
    dense = report["variants"][0]["sparsity"]
    assert dense["achieved"] == 0 and dense["per_layer"].keys() == pruned.masks.keys()


@pytest.mark.parametrize("task", TASKS)
def test_checkpoints_are_zero_where_the_masks_say(finished: Path, small_models: dict[str, Path], task: str) -> None:
    original = load_file(small_models["pretraining"] / "model.safetensors")
    uses = {layer.name: layer.names for layer in loading.load(str(small_models["pretraining"]), **PLAIN).layers()}
    for ratio in RATIOS:
        pruned, _ = load_masks(finished / "masks" / f"multiflow-{ratio}.safetensors")
        tensors = load_file(finished / "checkpoints" / f"multiflow-{ratio}-finetuned" / task / "model.safetensors")
        checked = 0
        for name, mask in pruned.masks.items():
            for alias in uses[name]:  # shared weights are saved under each of their names
                if f"{alias}.weight" in tensors:
                    weight = tensors[f"{alias}.weight"]
                    assert not weight[~mask].any()
                    assert weight[mask].ne(0).float().mean() > 0.99
                    checked += 1
        assert checked >= 8
        assert any(not torch.equal(tensor, original[name]) for name, tensor in tensors.items() if "norm" in name)
    dense = load_file(finished / "checkpoints" / "dense-finetuned" / task / "model.safetensors")
    assert all(tensor.ne(0).float().mean() > 0.99 for name, tensor in dense.items() if name.endswith("dense.weight"))
    loaded = loading.load(str(finished / "checkpoints" / "multiflow-0.9-finetuned" / task), **PLAIN)
    assert loaded.tasks == (task,) and loaded.tied == (task == "vqa")


PLAIN: dict[str, Any] = {"family": None, "image_size": None, "seed": 0}


def test_onnx_runtime_scores_as_pytorch(finished: Path) -> None:
    report = read(finished)
    scores = {(row["variant"], row["task"], row["runtime"]): row for row in report["metrics"]}
    for variant in TUNED:
        for task in TASKS:
            ours, theirs = scores[variant, task, "pytorch"], scores[variant, task, "onnxruntime"]
            assert ours["values"].keys() == theirs["values"].keys()
            for metric, value in ours["values"].items():
                assert abs(value - theirs["values"][metric]) <= 0.005, (variant, task, metric)
    assert all(row["max_abs_diff"] < 1e-3 and row["cosine_min"] > 0.999 for row in report["graphs"])


def test_graphs_hold_the_zeros_and_all_a_runner_needs(finished: Path) -> None:
    for row in read(finished)["graphs"]:
        path = finished / row["file"]
        assert row["bytes"] == path.stat().st_size
        dense = finished / "onnx" / "dense-finetuned" / row["task"] / path.name
        assert row["dense_bytes"] == dense.stat().st_size
        assert (row["nonzero_fraction"] > 0.99) == (row["variant"] == "dense-finetuned")
        weights = load_file(finished / "checkpoints" / row["variant"] / row["task"] / "model.safetensors")
        found = parameters(path)
        assert found and found.keys() <= weights.keys()
        folder = path.parent
        assert {p.name for p in folder.glob("*.onnx")} == {f"{graph}.onnx" for graph in GRAPHS[row["task"]]}
        assert {"task.json", "tokenizer.json", "preprocessor_config.json"} <= {p.name for p in folder.iterdir()}
        assert json.loads((folder / "task.json").read_text())["task"] == row["task"]


def test_pruned_weights_are_saved_where_nothing_is_trained(
    small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Prune once, transfer elsewhere: the saved model is a model to start from, and remembers its zeros."""
    run = tmp_path / "run"
    calibrated: dict[str, Any] = {"calibration": str(photos), **HERE}
    pipeline.prune(str(small_models["pretraining"]), output=run, ratios=[0.9], **calibrated)
    folder = run / "checkpoints" / "multiflow-0.9" / "pretrained"
    model = loading.load(str(folder), **PLAIN)
    assert model.tasks == TASKS and model.tied
    pruned, _ = load_masks(run / "masks" / "multiflow-0.9.safetensors")
    for layer in model.layers():
        assert torch.equal(layer.weight != 0, pruned.masks[layer.name])
    again = pipeline.prune(str(folder), output=tmp_path / "again", ratios=[0.95], **calibrated)
    assert abs(again["variants"][0]["sparsity"]["achieved"] - 0.9) < 1e-4


def test_recipe_has_every_option(finished: Path, photos: Path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["data"] == dict.fromkeys(TASKS, str(photos))
    assert recipe["finetune"] == {"mode": "full", "max_steps": 2, "epochs": None, "lr": 3e-3}
    assert (recipe["ratios"], recipe["method"], recipe["pattern"]) == (RATIOS, "multiflow", "unstructured")
    assert (recipe["batch_size"], recipe["seed"], recipe["calibration_samples"]) == (4, 0, 1024)
    assert recipe.keys() == RECIPE.keys()


def test_verb_after_verb_gives_the_same_rows(
    finished: Path, small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", {"vqa": str(photos)}
    first = pipeline.prune(str(small_models["pretraining"]), output=run, ratios=RATIOS, calibration=str(photos), **HERE)
    assert [row["id"] for row in first["variants"]] == list(BASES) and first["metrics"] == []
    pipeline.finetune(run, data=data, **TRAINING, **HERE)
    pipeline.export(run, threads=1)
    with short_timing():
        pipeline.validate(run, bench_batches=[1], threads=1)
    rows = rows_of(read(run))
    saved = [f"checkpoint/{base}" for base in BASES[1:]]  # by prune, which does not know whether anything follows
    assert [name for name in rows["stages"] if name.startswith("checkpoint/")] == saved
    rows["stages"] = [name for name in rows["stages"] if name not in saved]
    assert rows == rows_of(read(finished), ("vqa",))
    assert masks_of(run) == masks_of(finished)
    assert hidden(run) == []

    # Each verb with --resume has nothing left to do.
    before = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.json")}
    pipeline.finetune(run, **TRAINING, **HERE, resume=True)
    pipeline.export(run, threads=1, resume=True)
    pipeline.validate(run, bench_batches=[1], threads=1, resume=True)
    assert {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.json")} == before


# --- other checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_hugging_face_folders(small_models: dict[str, Path], photos: Path, tmp_path: Path, task: str) -> None:
    model = small_models[task]
    report = compress(model, tmp_path / "run", photos, task, ratios=[0.5], finetune="none", export="onnx")
    assert [row["id"] for row in report["variants"]] == ["dense", "multiflow-0.5"]
    assert abs(report["variants"][1]["sparsity"]["achieved"] - 0.5) < 1e-4
    assert {row["task"] for row in report["metrics"]} == {task}
    scores = {(row["variant"], row["runtime"]): row["values"] for row in report["metrics"]}
    for variant in ("dense", "multiflow-0.5"):
        assert scores[variant, "pytorch"] == pytest.approx(scores[variant, "onnxruntime"], abs=0.005)
    assert {row["graph"] for row in report["graphs"]} == GRAPHS[task]

    lacking = {
        "retrieval": {"captioning": "text_decoder", "vqa": "text_decoder"},
        "captioning": {"retrieval": "itm_head, text_encoder, text_proj, vision_proj", "vqa": "text_encoder"},
        "vqa": {"retrieval": "itm_head, text_proj, vision_proj", "captioning": "training for captioning"},
    }
    for other, missing in lacking[task].items():
        with pytest.raises(RequestError, match=f"cannot do {other}: its checkpoint lacks {missing}; it offers {task}"):
            compress(model, tmp_path / "other", photos, other, finetune="none")
    assert not (tmp_path / "other").exists()


def test_an_original_file(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    model, run = small_models["original"], tmp_path / "run"
    report = compress(model, run, photos, family="blip", finetune="none", ratios=[0.5])
    assert {row["task"] for row in report["metrics"]} == set(TASKS)
    assert files.sha256(model) in report["model"]["checkpoint"]
    # Encoder and decoder share all but self-attention: 6 of 10 matrices of a decoder layer are the encoder's.
    pruned, metadata = load_masks(run / "masks" / "multiflow-0.5.safetensors")
    assert sum(name.startswith("text_decoder") for name in pruned.masks) == 2 * 4
    assert len(pruned.masks) == 2 * (4 + 10 + 4)


def test_the_alias_finds_the_file_in_the_cache(
    small_models: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(small_models["original"].parent, tmp_path / "cache")
    options: dict[str, Any] = {"ratios": [0.5], "calibration": str(photos), **HERE}
    report = pipeline.prune("blip", output=tmp_path / "alias", **options)
    pipeline.prune(str(small_models["original"]), output=tmp_path / "file", family="blip", **options)
    assert masks_of(tmp_path / "alias") == masks_of(tmp_path / "file")
    assert report["model"]["name"] == "blip" and "model_base.pth" in report["model"]["checkpoint"]


def test_random_weights_show_no_accuracy(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = compress(small_models["random"], run, photos, "captioning", ratios=[0.5], export="onnx")
    assert report["model"]["random_weights"] and report["metrics"] == []
    assert [row["id"] for row in report["variants"]] == ["dense", "multiflow-0.5"]  # nothing to recover
    assert {row["graph"] for row in report["throughput"]} == GRAPHS["captioning"]
    text = (run / "report.md").read_text()
    assert "The weights are random" in text and "## Scores" not in text


def test_weights_only_methods_need_no_calibration(small_models: dict[str, Path], tmp_path: Path) -> None:
    free = [name for name, method in METHODS.items() if not method.needs]
    assert {"omp", "local-magnitude", "modal-magnitude", "l2", "lamp", "random"} <= set(free)
    seen = set()
    for method in free:
        report = pipeline.prune(str(small_models["vqa"]), output=tmp_path / method, ratios=[0.6], method=method, **HERE)
        assert abs(report["variants"][1]["sparsity"]["achieved"] - 0.6) < 1e-3
        assert [row["name"] for row in report["stages"]] == [f"prune/{method}", f"checkpoint/{method}-0.6"]
        assert not (tmp_path / method / "statistics.safetensors").exists()
        seen.add(load_file(tmp_path / method / "masks" / f"{method}-0.6.safetensors")[FIRST].numpy().tobytes())
    assert len(seen) >= 4  # methods that share a budget may agree on a layer
    with pytest.raises(RequestError, match="needs --calibration for multiflow: a folder"):
        pipeline.prune(str(small_models["vqa"]), output=tmp_path / "multiflow", ratios=[0.6], **HERE)


FIRST = "mask/vision_model.encoder.layers.0.self_attn.qkv"


def test_one_test_file_serves_where_nothing_is_trained(
    small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"ratios": [0.5], "method": "omp", "tasks": ["vqa"], **HERE}
    data = {"vqa": str(photos / "vqa_test.json")}
    with pytest.raises(RequestError, match="vqa_test.json"):
        pipeline.compress(str(small_models["vqa"]), output=tmp_path / "a", data=data, **options)
    records = json.loads((photos / "vqa_test.json").read_text())
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "vqa_test.json").write_text(json.dumps([{**record, "answer": record["answer"][0]} for record in records]))
    data = {"vqa": str(copy / "vqa_test.json")}
    with pytest.raises(RequestError, match="the train split is missing"):
        pipeline.compress(str(small_models["vqa"]), output=tmp_path / "a", data=data, **options)
    report = pipeline.compress(str(small_models["vqa"]), output=tmp_path / "a", data=data, finetune="none", **options)
    assert [row["n"] for row in report["metrics"]] == [12, 12]


# --- killed and resumed -----------------------------------------------------------------------------------------------

Hook = Callable[[], None]


def run_and_kill(work: Callable[[], object], prepare: Callable[[Hook], None]) -> None:
    """Do `work` in a copy of this process that `prepare` makes call the hook it gets: SIGKILL."""

    def child() -> None:
        prepare(lambda: os.kill(os.getpid(), signal.SIGKILL))
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, "it was to be killed on the way"


def at_rename(pattern: str, after: bool) -> Callable[[Hook], None]:
    """Kill just before, or just after, a finished file or folder gets its name."""

    def prepare(kill: Hook) -> None:
        rename = os.replace

        def replace(source: Path, target: Path) -> None:
            hit = Path(target).match(pattern)
            if hit and not after:
                kill()
            rename(source, target)
            if hit:
                kill()

        os.replace = replace  # type: ignore[assignment]

    return prepare


def whole_files_only(run: Path) -> None:
    """Every file under its final name can be read to the end."""
    for path in run.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".onnx":
            parameters(path)
    for folder in (run / "checkpoints").glob("*/*"):
        if not folder.name.startswith("."):
            loading.load(str(folder), **PLAIN)


KILLED = {
    "calibrated": at_rename("statistics.safetensors", True),
    "one mask": at_rename("masks/multiflow-0.5.safetensors", True),
    "all masks": at_rename("masks/multiflow-0.9.safetensors", True),
    "checkpoint being written": at_rename("checkpoints/multiflow-0.5-finetuned/retrieval", False),
    "checkpoint without record": at_rename("checkpoints/multiflow-0.5-finetuned/retrieval", True),
    "record": at_rename("stages/finetune/multiflow-0.9-finetuned/retrieval.json", True),
    "training": at_rename("training/multiflow-0.9-finetuned/retrieval/state.pt", True),
    "report": at_rename("report.json", False),
}


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_resumes_to_the_same_report(
    finished: Path,
    small_models: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(stages, "finetune", partial(finetune.finetune, save_seconds=0))
    work = partial(compress, small_models["pretraining"], run, photos, "retrieval", **TRAINING)
    run_and_kill(work, KILLED[moment])
    whole_files_only(run)
    kept = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.json")}
    work(resume=True)
    assert masks_of(run) == masks_of(finished)
    expected = rows_of(read(finished), ("retrieval",))
    done = rows_of(read(run))
    assert done["variants"] == expected["variants"]
    assert done["metrics"] == [row for row in expected["metrics"] if row["runtime"] == "pytorch"]
    assert hidden(run) == [] and not (run / "training").exists()
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())  # finished stages did not run again


def test_a_killed_process_resumes(finished: Path, small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The program itself, killed from outside as soon as the first model is fine-tuned."""
    run = tmp_path / "run"
    script = "import sys; from vlprune.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "compress", str(small_models["pretraining"]), "-o", str(run)]
    command += ["--ratio", "0.5,0.9", "--calibration", str(photos), "--data", f"captioning={photos}"]
    command += ["--max-steps", "2", "--lr", "3e-3", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (run / "stages" / "finetune" / "dense-finetuned" / "captioning.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (run / "report.json").exists()
    whole_files_only(run)
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == read(run)
    assert masks_of(run) == masks_of(finished)
    expected = rows_of(read(finished), ("captioning",))
    assert rows_of(read(run))["metrics"] == [row for row in expected["metrics"] if row["runtime"] == "pytorch"]
    assert hidden(run) == []


def test_an_interrupted_verb_leaves_nothing_behind(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    work = partial(pipeline.finetune, run, tasks=["retrieval"], max_steps=1, **HERE)
    run_and_kill(work, at_rename("checkpoints/dense-finetuned/retrieval", False))
    assert hidden(run)
    assert not (run / "stages" / "finetune" / "dense-finetuned" / "retrieval.json").exists()  # its result is in doubt
    whole_files_only(run)
    pipeline.finetune(run, tasks=["retrieval"], finetune="none", **HERE)
    assert hidden(run) == []
    read(run)


# --- changed requests -------------------------------------------------------------------------------------------------


def test_a_changed_option_redoes_what_depends_on_it(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = rows_of(read(run))

    pipeline.finetune(run, tasks=["captioning"], **TRAINING, **HERE, resume=True)
    assert rows_of(read(run)) == before  # the same options: nothing to do, all results stay

    changed = {**TRAINING, "lr": 1e-2}
    pipeline.finetune(run, tasks=["captioning"], **changed, **HERE, resume=True)
    after = rows_of(read(run))
    assert after["variants"] == before["variants"]
    for kind in ("metrics", "graphs"):
        others = [row for row in before[kind] if row["task"] != "captioning"]
        assert [row for row in after[kind] if row["task"] != "captioning"] == others
    of_task = [row for row in after["metrics"] if row["task"] == "captioning"]
    assert {(row["variant"], row["runtime"]) for row in of_task} == {(v, "pytorch") for v in (*BASES, *TUNED)}
    assert not any(row["task"] == "captioning" for row in after["graphs"])  # of weights that are no more
    assert {row[0] for row in after["throughput"] if row[1] == "text_decoder"} == set()
    for variant in BASES:  # one-shot scores depend on no training
        assert [r for r in of_task if r["variant"] == variant] == [
            r for r in before["metrics"] if (r["variant"], r["task"]) == (variant, "captioning")
        ]
    folder = Path("checkpoints", "dense-finetuned", "captioning", "model.safetensors")
    assert (run / folder).read_bytes() != (finished / folder).read_bytes()

    pipeline.finetune(run, tasks=["captioning"], **TRAINING, seed=1, **HERE, resume=True)
    seeded = (run / folder).read_bytes()
    pipeline.finetune(run, tasks=["captioning"], **TRAINING, **HERE, resume=True)
    assert seeded != (run / folder).read_bytes() == (finished / folder).read_bytes()
    with short_timing():
        pipeline.export(run, tasks=["captioning"], threads=1, resume=True)
        pipeline.validate(run, tasks=["captioning"], bench_batches=[1], threads=1, resume=True)
    assert rows_of(read(run)) == before


def test_a_second_run_starts_afresh(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = str(small_models["captioning"])
    pipeline.prune(model, output=run, ratios=[0.5], calibration=str(photos), **HERE)
    (run / "notes.txt").write_text("mine")

    # What is refused leaves the earlier run alone.
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for wrong in ({"data": {"captioning": "nowhere"}}, {"data": {"vqa": str(photos)}}, {"calibration": "nowhere"}):
        options: dict[str, Any] = {"calibration": str(photos), "data": {"captioning": str(photos)}, **wrong}
        with pytest.raises(RequestError):
            pipeline.compress(model, output=run, ratios=[0.7], **options, **HERE)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    report = pipeline.prune(model, output=run, ratios=[0.7], method="omp", **HERE)
    assert [row["id"] for row in report["variants"]] == ["dense", "omp-0.7"]
    assert [path.name for path in (run / "masks").iterdir()] == ["omp-0.7.safetensors"]
    assert not (run / "statistics.safetensors").exists()
    assert (run / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_refused(small_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RequestError, match="is not empty and no run directory: choose another --output"):
            pipeline.prune(str(small_models["vqa"]), output=tmp_path, ratios=[0.5], method="omp", resume=resume, **HERE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_with_other_masks_is_not_resumed_from_them(small_models: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    prune = partial(pipeline.prune, str(small_models["vqa"]), output=run, method="random", resume=True, **HERE)
    prune(ratios=[0.5])
    first = masks_of(run)
    prune(ratios=[0.5])
    assert masks_of(run) == first
    report = prune(ratios=[0.5, 0.6, 0.6000001])  # names that differ in the seventh digit only
    assert masks_of(run)["random-0.5.safetensors"] == first["random-0.5.safetensors"]
    assert [row["id"] for row in report["variants"]] == ["dense", "random-0.5", "random-0.6", "random-0.6000001"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for other in ({"seed": 1}, {"image_size": 48}, {"model": str(small_models["retrieval"])}):
        options: dict[str, Any] = {"model": str(small_models["vqa"]), "output": run, "method": "random", **other}
        with pytest.raises(
            RequestError, match=f"{run} holds a run with {next(iter(other))} = .*--resume continues only"
        ):
            pipeline.prune(ratios=[0.5], resume=True, **options, **HERE)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for wrong in ([], [0.5, 0.5]):
        with pytest.raises(RequestError, match="at least one, and none twice"):
            prune(ratios=wrong)


def test_results_of_data_that_have_changed_leave_the_report(
    small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Only the user knows that a file has changed: a verb without --resume runs again, and outdates what follows."""
    copy, run = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "run"
    report = compress(
        small_models["captioning"], run, copy, "captioning", ratios=[0.5], max_steps=1, batch_size=4, export="onnx"
    )
    assert len(report["graphs"]) == 4
    text = (copy / "captions.jsonl").read_text()
    (copy / "captions.jsonl").write_text(text.replace("color", "blue"))
    pipeline.finetune(run, max_steps=1, batch_size=4, **HERE)
    report = read(run)
    assert report["graphs"] == [] and {row["runtime"] for row in report["metrics"]} == {"pytorch"}
    with pytest.raises(RequestError, match="finetune/.* has run again since export/.*: run that stage again, too"):
        pipeline.validate(run, threads=1)


def test_other_weights_under_the_same_name(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    model, run = shutil.copytree(small_models["captioning"], tmp_path / "model"), tmp_path / "run"
    pipeline.prune(str(model), output=run, ratios=[0.5], method="omp", **HERE)
    tensors = load_file(model / "model.safetensors")
    tensors["vision_model.encoder.layers.0.mlp.fc1.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match="was made for other weights than .*: prune again"):
        pipeline.finetune(run, data={"captioning": str(photos)}, **HERE)
    assert not list((run / "stages").glob("score"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"name": "x", "key": "", "needs": {}, "stage": {}, "rows": {}}']
)
def test_a_spoiled_record_is_named(small_models: dict[str, Path], tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    prune = partial(pipeline.prune, str(small_models["vqa"]), output=run, ratios=[0.5], method="omp", **HERE)
    prune()
    record = run / "stages" / "prune" / "omp.json"
    record.write_text(content)
    with pytest.raises(RequestError) as caught:
        prune(resume=True)
    assert str(record) in str(caught.value) and "\n" not in str(caught.value)
    prune()
    read(run)


# --- reopened runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("method", "../../multiflow", "unknown method"),
        ("method", 3, "method 3 is no method"),
        ("ratios", [1.5], "1.5"),
        ("ratios", ["a"], "a"),
        ("data", [1], "data (a list of 1) is no mapping"),
        ("data", {"dancing": "x"}, "unknown task 'dancing'"),
        ("pattern", "4:2", "pattern"),
        ("model", "nowhere.pth", "unknown model 'nowhere.pth'"),
        ("finetune", None, "finetune None is no mapping"),
        ("seed", None, "is no recipe of vlprune"),
        ("samples", None, "does not tell samples"),
    ],
)
def test_a_spoiled_recipe_is_refused(
    small_models: dict[str, Path], photos: Path, tmp_path: Path, key: str, value: Any, says: str
) -> None:
    run = tmp_path / "run"
    pipeline.prune(str(small_models["vqa"]), output=run, ratios=[0.5], method="omp", **HERE)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"data": {"vqa": str(photos)}}
    if value is None and key != "finetune":
        del recipe[key]
    else:
        recipe[key] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RequestError) as caught:
        pipeline.finetune(run, finetune="none", **HERE)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_verb_needs_must_be_there(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline.prune(str(small_models["vqa"]), output=run, ratios=[0.5], method="omp", **HERE)
    with pytest.raises(RequestError, match="was pruned without data: give --data TASK=PATH"):
        pipeline.finetune(run, **HERE)
    with pytest.raises(RequestError, match="embedded scenes are no data"):
        pipeline.finetune(run, data={"vqa": "scenes"}, **HERE)
    with pytest.raises(RequestError, match="lacks the result of export"):
        pipeline.validate(run, data={"vqa": str(photos)}, threads=1)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["data"] in ({}, {"vqa": str(photos)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_made_on_cuda_is_exported_anywhere(small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline.prune(str(small_models["captioning"]), output=run, ratios=[0.5], method="omp", **HERE)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"device": "cuda"}))
    with pytest.raises(MachineError, match="CUDA"):
        pipeline.finetune(run, data={"captioning": str(photos)}, device="cuda", threads=1)
    report = pipeline.export(run, data={"captioning": str(photos)}, threads=1)
    assert {row["graph"] for row in report["graphs"]} == GRAPHS["captioning"]
