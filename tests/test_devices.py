"""Runs on a pretended GPU (`pretended`): nothing meets across devices, and the results are the CPU's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import OnDevice, pretended_cuda
from safetensors.torch import load_file

from vlprune import pipeline


TRAINING = {"max_steps": 2, "lr": 3e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def pairs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `photos` in pairs, 8 sentences to train and 4 to test."""
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(12):
        (folder / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    records = [
        {"images": [f"{i}.png", f"{(i + 1) % 12}.png"], "sentence": "what color is it", "label": str(i % 2 == 0)}
        for i in range(12)
    ]
    (folder / "nlvr_train.json").write_text(json.dumps(records[:8]))
    (folder / "nlvr_dev.json").write_text(json.dumps(records[8:]))
    return folder


def compress(model: Path, output: Path, data: dict[str, Path], device: str, **options: Any) -> dict[str, Any]:
    """A run without graphs."""
    return pipeline.compress(
        str(model), output=output, data={task: str(folder) for task, folder in data.items()}, device=device, threads=1,
        **{"ratios": [0.4], **TRAINING, **options},
    )  # fmt: skip


RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {  # what it is -> model, its tasks, options
    "multiflow": ("blip", "retrieval captioning vqa", {"ratios": [0.5, 0.9], "gradient_checkpointing": True}),
    "2:4": ("clip", "retrieval zero-shot", {"ratios": [0.5], "pattern": "2:4", "permute": True}),
    "blocks": ("vit", "classification", {"pattern": "4x1"}),
    "lamp": ("siglip", "retrieval", {"method": "lamp"}),
    "flow of units": ("blip", "vqa", {"method": "multiflow-structured"}),
    "isomorphic": ("vit", "classification", {"method": "isomorphic"}),
    "mope": ("clip", "retrieval", {"method": "mope", "distill": [1.0, 1000.0, 1.0]}),
    "mope of BLIP": ("blip", "retrieval captioning", {"method": "mope", "mope": {"stage": "task"}}),
    "upop": ("blip_nlvr", "nlvr", {"method": "upop"}),
}


@pytest.fixture
def request_of(small_models: dict[str, Path], duals: Any, vits: Any, photos: Path, animals: Path, pairs: Path) -> Any:
    """What a run -> arguments of `compress`."""

    def make(what: str) -> dict[str, Any]:
        model, tasks, options = RUNS[what]
        folder = small_models["pretraining"] if model.startswith("blip") else None
        folder = folder or (vits("teacher") if model == "vit" else duals(model)).folder
        of = {"classification": animals, "zero-shot": animals, "nlvr": pairs}
        data = {task: of.get(task, photos) for task in tasks.split()}
        family = {"family": "blip_nlvr"} if model == "blip_nlvr" else {}
        calibrated = {} if model == "blip_nlvr" else {"calibration": str(next(iter(data.values())))}
        return {"model": folder, "data": data, **family, **calibrated, **options}

    return make


@pytest.mark.parametrize("what", RUNS)
def test_runs_like_on_the_cpu(what: str, request_of: Any, tmp_path: Path) -> None:
    there = compress(**request_of(what), output=tmp_path / "cpu", device="cpu")
    with pretended_cuda():
        here = compress(**request_of(what), output=tmp_path / "cuda", device="cuda")
    assert here["metrics"]
