"""Runs on a pretended GPU (`pretended`): nothing meets across devices, and the results are the CPU's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import OnDevice, pretended_cuda
from safetensors.torch import load_file
from torch import Tensor

from vlprune import load, pipeline
from vlprune.data import open_data
from vlprune.pruning import InputNorms, Layer, prune_layers, prune_layers_at
from vlprune.training import loop
from vlprune.training.finetune import FinetuneOptions, finetune
from vlprune.training.upop import SearchOptions, search


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
        **{"ratios": [0.4], "samples": 1, **TRAINING, **options},
    )  # fmt: skip


RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {  # what it is -> model, its tasks, options
    "multiflow": ("blip", "retrieval vqa", {"gradient_checkpointing": True}),
    "2:4": ("clip", "retrieval zero-shot", {"ratios": [0.5], "pattern": "2:4", "permute": True}),
    "blocks": ("vit", "classification", {"pattern": "4x1"}),
    "lamp": ("vit", "classification", {"method": "lamp"}),
    "flow of units": ("siglip", "retrieval", {"method": "multiflow-structured"}),
    "isomorphic": ("vit", "classification", {"method": "isomorphic"}),
    "mope": ("clip", "retrieval", {"method": "mope", "distill": [1.0, 1000.0, 1.0]}),
    "mope of BLIP": ("blip", "captioning", {"method": "mope", "max_steps": 1}),
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
def test_runs(what: str, request_of: Any, tmp_path: Path) -> None:
    with pretended_cuda():
        report = compress(**request_of(what), output=tmp_path / "run", device="cuda")
    assert {row["task"] for row in report["metrics"]} == set(RUNS[what][1].split())
    assert any(row["finetuned"] and row["ratio"] for row in report["variants"])
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(torch.isfinite(x).all() for x in load_file(file).values() if x.is_floating_point())


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["multiflow", "omp", "lamp", "random"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_masks_are_the_cpus_and_stay_on_the_device(duals: Any, method: str, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [
        Layer(x.name, x.modality, x.weight.detach(), torch.rand(x.weight.shape[1], generator=generator))
        for x in load(str(duals("clip").folder)).layers()
    ]
    ratios = None if pattern == "2:4" else [0.5, 0.9]
    expected = [pruned.masks for _, pruned in prune_layers_at(layers, method, ratios, pattern)]
    with pretended_cuda():
        there = [Layer(x.name, x.modality, x.weight.to("cuda"), x.input_norm) for x in layers]
        found = [pruned.masks for _, pruned in prune_layers_at(there, method, ratios, pattern)]
        assert all(mask.is_cuda for masks in found for mask in masks.values())
        equal = [{name: mask.cpu() for name, mask in masks.items()} for masks in found]
    for mine, other in zip(equal, expected, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_statistics_are_the_cpus(duals: Any, photos: Path) -> None:
    """Though the device sums by another function."""
    data = open_data("retrieval", str(photos), "train", False)

    def collected(model: Any) -> dict[str, Tensor]:
        norms = InputNorms({x.name: (x.modules, x.tokens) for x in model.layers()})
        with norms.collect():
            model.calibrate(model.caption_batch(data.images, [x[0] for x in data.captions], range(8)), norms.valid)
        return norms.result()

    model: Any = load(str(duals("clip").folder))
    expected = collected(model)
    with pretended_cuda():
        found = collected(model.to("cuda"))
        assert all(not x.is_cuda for x in found.values())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# --- training ---------------------------------------------------------------------------------------------------------


class Interrupt(Exception):
    """Ends a training."""


@pytest.mark.parametrize("kind", ["fixed masks", "search"])
def test_a_training_goes_on_where_it_was_interrupted(
    kind: str, duals: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data("retrieval", str(photos), "train", False)
    options = FinetuneOptions(max_steps=4, batch_size=4, lr=1e-3, precision="bf16", device="cuda")

    def train(state: Path | None) -> dict[str, Tensor]:
        model: Any = load(str(duals("clip").folder)).for_task("retrieval")
        if kind == "search":
            search(model, "retrieval", data, 0.4, SearchOptions(options, round_to=1), state_dir=state, save_seconds=0)
        else:
            layers = [Layer(x.name, x.modality, x.weight.detach()) for x in model.layers()]
            masks = prune_layers(layers, "local-magnitude", 0.5).masks
            finetune(model, "retrieval", data, masks, options, state_dir=state, save_seconds=0)
        return {name: x.cpu() for name, x in model.state_dict().items()}

    with pretended_cuda():
        whole = train(None)
        monkeypatch.setattr(loop._State, "due", lambda self, every: True)
        step, save = [], loop._State.save

        def stop(self: Any, *args: Any) -> None:
            save(self, *args)
            step.append(args)
            if len(step) == 2:
                raise Interrupt

        monkeypatch.setattr(loop._State, "save", stop)
        with pytest.raises(Interrupt):
            train(tmp_path)
        assert all(isinstance(x, OnDevice) for x in torch.load(tmp_path / "state.pt", "cuda")["parameters"].values())
        resumed = train(tmp_path)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


# --- the pretended device itself --------------------------------------------------------------------------------------


def _here() -> Tensor:
    return torch.ones(2, 3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + _here(),
        lambda x: _here() - x.sum(),
        lambda x: x @ torch.ones(3),
        lambda x: torch.cat([x, _here()]),
        lambda x: torch.stack([x.sum(), torch.ones(())]),
        lambda x: _here()[x[:, 0] > 0],
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda x: x.masked_fill_(_here().bool(), 0.0),
        lambda x: torch.zeros(()).add_(x.sum()),
        lambda x: torch.nn.functional.embedding(torch.tensor([1]), x),
        lambda x: torch.nn.functional.linear(_here(), x),
        lambda x: torch.where(x > 0, x, _here()),
    ],
)  # fmt: skip
def test_what_mixes_devices_is_refused(mix: Any) -> None:
    with pretended_cuda(), pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(2, 3, device="cuda"))


def test_what_cuda_allows_is_allowed() -> None:
    before = torch.cuda.is_available()
    with pretended_cuda():
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert (x * torch.tensor(2.0))[[1, 0]].tolist() == [[6, 8, 10], [0, 2, 4]]
        assert x[torch.tensor([True, False])].tolist() == [[0, 1, 2]]
        x[0, 1:] = 7
        assert x.to("cuda") is x and x.cpu().tolist() == [[0, 7, 7], [3, 4, 5]]
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with torch.autocast("cuda", torch.bfloat16):
            assert (x @ x.T).dtype == torch.bfloat16
    assert torch.cuda.is_available() == before and torch.zeros(1).device.type == "cpu"
