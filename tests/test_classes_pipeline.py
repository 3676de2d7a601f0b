"""The whole pipeline on images by class: a classifier, without captions and without a tokenizer."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from vlprune import load, pipeline, stages
from vlprune.cli.main import main
from vlprune.errors import RequestError
from vlprune.report.manifest import verify_manifest
from vlprune.report.schema import validate_report


TASK = "classification"
TUNED = ("dense-finetuned", "multiflow-0.5-finetuned")


@contextmanager
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BENCH_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def finished(vits: Any, animals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through the command line; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    command = ["compress", str(vits("teacher").folder), "-o", str(run), "--json", "--ratio", "0.5"]
    command += ["--data", f"{TASK}={animals}", "--calibration", str(animals), "--export", "onnx", "--bench-batch", "1"]
    command += ["--max-steps", "20", "--lr", "1e-3", "--batch-size", "8", "--threads", "1", "--device", "cpu"]
    with short_timing(), redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    assert json.loads(out.getvalue()) == read(run)
    return run


def read(run: Path) -> dict[str, Any]:
    verify_manifest(run)
    return validate_report(json.loads((run / "report.json").read_text()))  # type: ignore[return-value]


def test_all_stages_ran(finished: Path) -> None:
    report = read(finished)
    assert report["model"]["family"] == "vit"
    kinds = [stage["name"].split("/")[0] for stage in report["stages"]]
    assert set(kinds) == {"statistics", "prune", "finetune", "score", "export", "validate", "samples", "bench"}
    scored = {(row["variant"], row["runtime"]) for row in report["metrics"]}
    assert scored == {(v, "pytorch") for v in ("dense", "multiflow-0.5", *TUNED)} | {(v, "onnxruntime") for v in TUNED}
    assert all(row["values"].keys() == {"top1"} and row["n"] == 10 for row in report["metrics"])
    found = {(row["variant"], row["runtime"]): row["values"]["top1"] for row in report["metrics"]}
    for variant in TUNED:
        assert found[variant, "onnxruntime"] == found[variant, "pytorch"]
        assert found[variant, "pytorch"] > found["dense", "pytorch"]  # the random model learned something
    assert {(row["variant"], row["graph"]) for row in report["graphs"]} == {(v, "image_classifier") for v in TUNED}
    assert all(row["max_abs_diff"] < 1e-5 for row in report["graphs"])
    (sparse,) = [row for row in report["variants"] if row["id"] == TUNED[1]]
    assert sparse["sparsity"]["achieved"] == 0.5 and sparse["sparsity"]["per_modality"] == {"vision": 0.5}
    assert "| multiflow-0.5 | classification | top-1 |" in (finished / "report.md").read_text()


def test_what_is_left_runs_by_itself(finished: Path) -> None:
    folder = finished / "onnx" / TUNED[1] / TASK
    assert {path.name for path in folder.iterdir()} == {
        "image_classifier.onnx",
        "preprocessor_config.json",
        "task.json",
    }
    assert json.loads((folder / "task.json").read_text())["labels"] == ["cat", "dog", "eel", "fox", "gnu"]
    model = load(str(finished / "checkpoints" / TUNED[1] / TASK))
    zeros = sum(int((layer.weight == 0).sum()) for layer in model.layers())
    assert zeros == sum(layer.weight.numel() for layer in model.layers()) / 2


def test_verbs_one_by_one(finished: Path, vits: Any, animals: Path, tmp_path: Path) -> None:
    run, here = tmp_path / "run", {"device": "cpu", "threads": 1}
    pipeline.prune(str(vits("teacher").folder), output=run, ratios=[0.5], calibration=str(animals), **here)
    for part in ("masks/multiflow-0.5.safetensors", "statistics.safetensors"):
        assert (run / part).read_bytes() == (finished / part).read_bytes()
    with pytest.raises(RequestError, match="for zero-shot and classification a folder with train/<class>/"):
        pipeline.export(run, threads=1)
    pipeline.export(run, data={TASK: str(animals)}, threads=1)
    with short_timing():
        report = pipeline.validate(run, bench_batches=[2], threads=1)
    assert {row["variant"] for row in report["metrics"]} == {"dense", "multiflow-0.5"}


def test_calibration_needs_neither_labels_nor_captions(
    finished: Path, vits: Any, animals: Path, tmp_path: Path
) -> None:
    """The same images without their folders, in the same order, give the same statistics."""
    loose = tmp_path / "loose"
    loose.mkdir()
    for i in range(3):
        for label, folder in enumerate(sorted((animals / "train").iterdir())):
            shutil.copy(folder / f"{i}.png", loose / f"{i}{label}.png")
    pipeline.prune(
        str(vits("teacher").folder), output=tmp_path / "run", ratios=[0.5], calibration=str(loose), device="cpu"
    )
    mask = "masks/multiflow-0.5.safetensors"
    assert (tmp_path / "run" / mask).read_bytes() == (finished / mask).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": None}, "for a model that reads no text, a folder of images"),
        ({"data": {}}, "for zero-shot and classification a folder"),
        ({"data": {"retrieval": "ANIMALS"}}, "cannot do retrieval: it offers classification"),
        ({"data": {TASK: "ANIMALS/nowhere"}}, "there is no file or folder"),
        ({"data": {TASK: "ANIMALS/test"}}, "pass --finetune none"),
        ({"data": {TASK: "scenes"}}, "the embedded scenes are no data"),
        ({"calibration": "ANIMALS/nowhere"}, "there is no file or folder"),
    ],
)
def test_wrong_requests_touch_nothing(options: Any, said: str, vits: Any, animals: Path, tmp_path: Path) -> None:
    filled = json.loads(json.dumps(options).replace("ANIMALS", str(animals)))
    asked = {"data": {TASK: str(animals)}, "calibration": str(animals), **filled}
    with pytest.raises(RequestError, match=said):
        pipeline.compress(str(vits("vit").folder), output=tmp_path / "run", ratios=[0.5], device="cpu", **asked)
    assert not (tmp_path / "run").exists()


def test_classes_the_model_does_not_know(vits: Any, animals: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    shutil.copytree(animals, strange)
    for split in ("train", "test"):
        (strange / split / "gnu").rename(strange / split / "yak")
        shutil.rmtree(strange / split / "cat")
    with pytest.raises(RequestError, match="strange has 4 classes, the model 5 labels, and 'yak' is none of them"):
        pipeline.compress(
            str(vits("vit").folder),
            output=tmp_path / "run",
            ratios=[0.5],
            data={TASK: str(strange)},
            calibration=str(animals),
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


def test_broken_images_are_counted(vits: Any, animals: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(animals, broken)
    (broken / "test" / "cat" / "0.png").write_bytes(b"x")
    asked = {"ratios": [0.5], "method": "omp", "data": {TASK: str(broken)}, "finetune": "none", "device": "cpu"}
    with pytest.raises(RequestError, match="broken image"):
        pipeline.compress(str(vits("vit").folder), output=tmp_path / "run", **asked)
    report = pipeline.compress(str(vits("vit").folder), output=tmp_path / "run", skip_broken=True, **asked)
    assert {row["n"] for row in report["metrics"]} == {9}
