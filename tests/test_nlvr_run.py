"""A whole run on pairs of images: a pretrained BLIP made a model for NLVR2, searched by UPop, cut, exported."""

import json
from pathlib import Path

import numpy as np
import pytest

import vlprune
from vlprune import pipeline, stages
from vlprune.models.blip_nlvr import BlipNlvr
from vlprune.runtime.session import load_graphs


@pytest.fixture(scope="module")
def pairs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `photos` in pairs, 8 sentences to train and 4 to test."""
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(12):
        (folder / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    records = [
        {"images": [f"{i}.png", f"{(i + 1) % 12}.png"], "sentence": f"what color {'is it ' * (i % 3)}", "label": label}
        for i, label in enumerate(["True", "False"] * 6)
    ]
    (folder / "nlvr_train.json").write_text(json.dumps(records[:8]))
    (folder / "nlvr_dev.json").write_text(json.dumps(records[8:]))
    return folder


def test_upop_on_pairs_of_images(
    small_models: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "BENCH_SECONDS", 0.02)  # what the times are is tested elsewhere
    report = pipeline.compress(
        str(small_models["pretraining"]), output=tmp_path / "run", ratios=[0.4], method="upop", family="blip_nlvr",
        data={"nlvr": str(pairs)}, max_steps=4, lr=3e-3, batch_size=4, export="onnx", bench_batches=[1],
        device="cpu", threads=1,
    )  # fmt: skip
    assert report["model"]["family"] == "blip_nlvr"
    variants = {row["id"]: row for row in report["variants"]}
    assert variants.keys() == {"dense", "dense-finetuned", "upop-0.4", "upop-0.4-finetuned"}
    assert variants["upop-0.4-finetuned"]["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.1)
    assert {row["task"] for row in report["metrics"]} == {"nlvr"}
    scores = {(row["variant"], row["runtime"]): row["values"] for row in report["metrics"]}
    assert scores["upop-0.4-finetuned", "pytorch"] == scores["upop-0.4-finetuned", "onnxruntime"]
    assert {row["graph"] for row in report["graphs"]} == {"image_encoder", "pair_classifier"}
    assert all(row["max_abs_diff"] < 1e-4 for row in report["graphs"])
    cut = [row for row in report["graphs"] if row["variant"] == "upop-0.4-finetuned"]
    assert all(row["bytes"] < row["dense_bytes"] for row in cut)

    model = vlprune.load(str(tmp_path / "run" / "checkpoints" / "upop-0.4-finetuned" / "nlvr"))
    assert isinstance(model, BlipNlvr)
    graphs = load_graphs(tmp_path / "run" / "onnx" / "upop-0.4-finetuned" / "nlvr", "cpu", 1)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    states = graphs["image_encoder"]({"pixel_values": pixels})["image_states"]
    own = vlprune.exporters.torch_graphs(model, "nlvr")["image_encoder"]({"pixel_values": pixels})["image_states"]
    np.testing.assert_allclose(states, own, atol=1e-4)


def test_an_embedded_model_of_another_family_is_asked_for_its_tasks() -> None:
    """Embedded data serve the tasks of the family it is taken for."""
    recipe = pipeline._recipe(
        "blip-tiny", [0.5], "upop", "unstructured", "blip_nlvr", None, None, None, None, None, "cpu", 1, 0, False
    )
    assert recipe["data"] == {"nlvr": "scenes"}
