"""The document that the benchmark on GPUs writes: what is measured, what is not, what missed its target."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pretended import pretended_cuda


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PLANNED = ["prune/a", "throughput/a/structured-0.5/image_encoder", "tensorrt/a", "finetune/a"]
MACHINE = {"python": "3.12", "gpu": "Card", "driver": "580", "cpu": "Core", "threads": 8}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(**found: Any) -> dict[str, Any]:
    where = {"command": "python benchmarks/gpu.py", "environment": MACHINE, "versions": {"torch": "2.11"}}
    return {**where, "cuda": "13.0", "took_s": 1.0, **found}


def pruned(collection: float) -> dict[str, Any]:
    row = {"images": 256, "weights": 226_000_000, "forward_s": 1.0, "collect_s": collection, "prune_s": 0.5}
    return {**row, "collection": collection, "memory": 1.25}


def timed(ratio: float) -> dict[str, Any]:
    times = {side: {"p50_ms": 2.0, "p90_ms": 2.0, "p99_ms": 2.0, "per_s": 1000.0} for side in ("dense", "compressed")}
    row = {"variant": "structured-0.5", "graph": "image_encoder", "form": "fp16", "against": "fp16", "batch": 32}
    row |= {"nodes": {"compressed": {"cuda": 90, "cpu": 10}}, "gpu": [{"throttled": ["power cap"]}]}
    return {**row, **times, "ratio": ratio, "ratio_ci95": [ratio, ratio], "verdict": "faster", "cosine_min": 0.9995}


def test_what_is_not_measured_is_said(gpu: ModuleType) -> None:
    text = gpu.document({}, PLANNED)
    assert "Nothing here is measured yet" in text and "missed" not in text and "reached" not in text
    assert all(f"* {name}\n" in text for name in PLANNED)


def test_targets_are_reached_or_missed_by_what_was_measured(gpu: ModuleType) -> None:
    parts = {
        "prune/a": part(rows=[pruned(1.2)], checks={"masks equal": True}),
        "throughput/a/structured-0.5/image_encoder": part(rows=[timed(1.7)], checks={"cosine": True, "batches": False}),
        "tensorrt/a": part(skipped="there is no TensorRT"),
        "finetune/a": part(error="RuntimeError: broken"),
    }
    text = gpu.document(parts, PLANNED)
    assert "| a: calibration pass / plain forward | <= 1.15 | 1.2 | **missed** |" in text
    assert "| a, image_encoder: 50 % structured / dense, fp16, batch 32 | >= 1.6 x | 1.7 | reached |" in text
    assert "| a, image_encoder: dense fp16 fused / fp32, batch 32 | >= 3.0 x | – | not yet measured |" in text
    assert "| a: smallest cosine in fp16 | >= 0.999 | 0.9995 | reached |" in text
    assert "10 of 100" in text and "power cap" in text and "Not measured: there is no TensorRT" in text
    assert "3 checks, 2 failed." in text and "RuntimeError: broken" in text
    assert "Card, driver 580, CUDA 13.0" in text and "2 of 4 parts" in text


def test_parts_are_written_one_by_one_and_resumed(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    plan = {
        "prune/a": lambda: ran.append("prune") or {"rows": [pruned(1.0)], "checks": {"equal": True}},
        "prune/b": lambda: ran.append("broken") or 1 / 0,
    }
    monkeypatch.setattr(gpu, "parts_of", lambda args: plan)
    args = SimpleNamespace(
        only=[], resume=True, threads=1, json=tmp_path / "gpu.json", results=tmp_path / "gpu.md", keep=False,
        work=tmp_path / "work", device="cpu",
    )  # fmt: skip
    parts: dict[str, Any] = {}
    assert not gpu.run(args, parts)
    assert "ZeroDivisionError" in parts["prune/b"]["error"]
    assert gpu.read_json(args.json).keys() == {"prune/a", "prune/b"} and "ZeroDivisionError" in args.results.read_text()
    assert not gpu.run(args, parts)
    assert ran == ["prune", "broken", "broken"]
    args.only = ["finetune"]
    with pytest.raises(gpu.MachineError, match="no part begins with finetune"):
        gpu.run(args, parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_only_pytorch_computes_is_measured_without_a_provider(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pruning and fine-tuning, on a pretended GPU; the rest says why not, and takes nothing measured away."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--threads", "1", "--work", str(tmp_path)])
    args = gpu.settings()
    args.device = args.provider = "cuda"
    args.json = tmp_path / "gpu.json"
    measured = part(rows=[], checks={"good": True})
    parts = {"tensorrt/clip-tiny": measured}
    with pretended_cuda():
        assert gpu.run(args, parts)
    assert parts["tensorrt/clip-tiny"] is measured
    (pruned,), trained = parts["prune/clip-tiny"]["rows"], parts["finetune/clip-tiny"]["rows"]
    assert pruned["memory"] is not None and [row["how"] for row in trained] == list(args.trainings)
    left_out = {name for name, found in parts.items() if "skipped" in found}
    assert left_out == {name for name in gpu.parts_of(args) if name.startswith(("throughput", "cuda-graph"))}
    assert all("provider cuda cannot run here" in parts[name]["skipped"] for name in left_out)
    assert gpu.document(parts, list(gpu.parts_of(args))).count("Not measured: provider cuda") == 2  # once per section
    assert "left out: provider" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
