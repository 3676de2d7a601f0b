"""A run of the embedded model is repeated from the recipe it wrote; a gate passes it, and stops it when it is worse."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from safetensors.torch import load_file, save_file

import vlprune
from vlprune import exporters, stages
from vlprune.cli.main import main
from vlprune.data import open_data
from vlprune.data.images import load_image
from vlprune.report.manifest import verify_manifest
from vlprune.runtime import predict


RECIPE = """
model: blip-tiny
ratios: 0.3
tasks: vqa
finetune: {mode: heads, max_steps: 2, lr: 1e-4}
batch_size: 4
calibration_samples: 16
samples: 30
export: onnx
bench_batches: 1
threads: 1
device: cpu
"""
LIMITS = """
min_sparsity: 0.3
max_metric_drop: {vqa: 15}
max_abs_diff: 1e-3
max_bytes: 25 MB
required_providers: cpu
"""
TUNED = "multiflow-0.3-finetuned"
INPUTS = 100


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "BENCH_SECONDS", 0.02)  # what the figures are is tested elsewhere
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("trust")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BENCH_SECONDS", 0.02)
        command = ["compress", "--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "run"), "--json"]
        assert main(command) == 0
    yield folder / "run"


def _report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_the_recipe_is_followed(run: Path) -> None:
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (written["ratios"], written["tasks"], written["bench_batches"]) == ([0.3], ["vqa"], [1])
    assert written["finetune"] == {"mode": "heads", "max_steps": 2, "epochs": None, "lr": 1e-4}
    report = _report(run)
    assert {row["variant"] for row in report["metrics"]} == {"dense", "dense-finetuned", "multiflow-0.3", TUNED}
    assert {row["n"] for row in report["metrics"]} == {30}


def test_the_written_recipe_repeats_the_run(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["compress", "--recipe", str(run / "recipe.yaml"), "-o", str(again), "--json"]) == 0
    assert (again / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()
    for file in ("statistics.safetensors", "masks/multiflow-0.3.safetensors"):
        assert (again / file).read_bytes() == (run / file).read_bytes(), file
    for folder in sorted((run / "checkpoints").rglob("model.safetensors")):
        file = folder.relative_to(run)
        assert (again / file).read_bytes() == (run / file).read_bytes(), file
    first, second = _report(run), _report(again)
    for section in ("variants", "metrics", "graphs"):
        assert first[section] == second[section], section


def test_options_win_over_the_recipe(run: Path, tmp_path: Path) -> None:
    command = ["compress", "--recipe", str(run / "recipe.yaml"), "-o", str(tmp_path / "other"), "--json"]
    assert main([*command, "--export", "none", "--finetune", "none", "--ratio", "0.5", "--seed", "3"]) == 0
    written = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())
    assert (written["export"], written["finetune"]["mode"], written["ratios"]) == (None, "none", [0.5])
    assert (written["seed"], written["calibration_samples"], written["samples"]) == (3, 16, 30)


def test_a_model_that_got_worse_is_stopped_and_the_good_one_ships(
    run: Path, edge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gate.yaml").write_text(LIMITS)
    shutil.copy(run / "report.json", tmp_path / "baseline.json")
    worse = tmp_path / "worse"
    shutil.copytree(run, worse)
    gate = ["gate", str(worse), "--limits", str(tmp_path / "gate.yaml"), "--junit", str(tmp_path / "gate.xml")]
    assert main(gate) == 0
    assert main([*gate, "--baseline", str(tmp_path / "baseline.json")]) == 0
    capsys.readouterr()

    checkpoint = worse / "checkpoints" / TUNED / "vqa" / "model.safetensors"
    weights = load_file(checkpoint)
    hurt = 0
    for name, weight in weights.items():
        if weight.ndim == 2 and "encoder" in name:
            weight[:, ::2] = 0
            hurt += 1
    assert hurt > 10
    save_file(weights, checkpoint, metadata={"format": "pt"})
    assert main(["export", str(worse), "--json"]) == 0
    assert main(["validate", str(worse), "--json", "--bench-batch", "1"]) == 0
    verify_manifest(worse)
    capsys.readouterr()

    for command in (gate, [*gate, "--baseline", str(tmp_path / "baseline.json")]):
        assert main([*command, "--json"]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: gate failed, ") and captured.err.count("\n") == 1
        assert f"max_metric_drop of {TUNED} (vqa / accuracy, onnxruntime cpu plain" in captured.err
        broken = [check for check in json.loads(captured.out)["checks"] if check["status"] != "pass"]
        assert broken and {check["limit"] for check in broken} == {"max_metric_drop"}
        failures = ElementTree.parse(tmp_path / "gate.xml").iter("failure")
        assert [failure.get("type") for failure in failures] == [check["status"] for check in broken]

    bundle = tmp_path / "good.vlp.tar.zst"
    assert main(["bundle", str(run), "--task", "vqa", "--output", str(bundle), "--json"]) == 0
    assert main(["bundle", "verify", str(bundle), "--json"]) == 0
    data = open_data("vqa", "scenes", "test", limit=INPUTS)
    images = [str(tmp_path / f"{i:03}.png") for i in range(INPUTS)]
    for path, question in zip(images, data.questions, strict=True):
        data.images[question.image].save(path)
    questions = [question.question for question in data.questions]
    case = {"task": "vqa", "bundle": str(bundle), "images": images, "texts": questions}
    (tmp_path / "job.json").write_text(json.dumps({"good": case}))
    script = Path(__file__).parent / "edge" / "edge_answers.py"
    command = [edge / "python", "-I", script, tmp_path / "job.json", tmp_path / "answers.json"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "answers.json").read_text())
    assert not {"torch", "transformers", "onnx", "vlprune"} & set(found["loaded"])

    model = vlprune.load(str(run / "checkpoints" / TUNED / "vqa"))
    graphs = exporters.torch_graphs(model, "vqa")
    spec = json.loads((run / "onnx" / TUNED / "vqa" / "task.json").read_text())
    states = graphs["image_encoder"]({"pixel_values": model.processor.images(list(map(load_image, images)))})
    expected = predict.answers(graphs, spec, model.processor, states["image_states"], questions)
    assert found["answers"]["good"]["answers"] == expected and len(set(expected)) > 3
