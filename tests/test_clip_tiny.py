"""The embedded CLIP: what it scores, that transformers reads it, and the whole way from weights to a report."""

import json

import numpy as np
import pytest
import torch

import vlprune
from vlprune import exporters
from vlprune.data.scenes import VOCABULARY, scenes_captions, scenes_classes
from vlprune.models import MODELS, clip, loading
from vlprune.pipeline import compress, export
from vlprune.runtime import operators
from vlprune.tasks import evaluate


WEIGHTS = loading.WEIGHTS / "clip-tiny"


@pytest.fixture(scope="module")
def model():
    return vlprune.load("clip-tiny")


def test_it_is_small_and_says_what_it_is(model):
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 6e6
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 6.5e6
    assert model.family == "clip" and model.tasks == MODELS["clip-tiny"].tasks == ("retrieval", "zero-shot")
    assert model.source.checkpoint == "clip-tiny" and not model.source.random_weights
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(len(model.processor.tokenizer(word)["input_ids"]) == 3 for word in VOCABULARY)


def test_it_finds_scenes_it_never_saw(model):
    """benchmarks/clip_tiny.py gives 96.2 / 96.3 among 500; among 100 there is less to confuse."""
    spec = exporters.task_spec(model, "retrieval", **model.options.get("retrieval", {}))
    graphs = exporters.torch_graphs(model, "retrieval")
    scores = evaluate("retrieval", graphs, spec, model.processor, scenes_captions("test", 100))
    assert scores.values["i2t_r1"] >= 0.9 and scores.values["t2i_r1"] >= 0.9
    data = scenes_classes("test", 96)
    spec = exporters.task_spec(model, "zero-shot", classes=data.classes, templates=data.templates)
    assert evaluate("zero-shot", graphs, spec, model.processor, data).values["top1"] >= 0.9


def test_transformers_reads_it(model):
    from transformers import CLIPModel, CLIPProcessor

    theirs, processor = CLIPModel.from_pretrained(WEIGHTS).eval(), CLIPProcessor.from_pretrained(WEIGHTS)
    data = scenes_captions("test", 3)
    images, texts = [data.images[i] for i in range(3)], [given[0] for given in data.captions]
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
    ids, mask = model.processor.texts(texts)
    np.testing.assert_array_equal(ids, batch["input_ids"])
    pixels = torch.from_numpy(model.processor.images(images))
    with torch.no_grad():
        expected = theirs(**batch).logits_per_image.softmax(1)
        text = model.text_embeds(torch.from_numpy(ids), torch.from_numpy(mask))
        found = (model.logit_scale.exp() * model.image_embeds(pixels) @ text.T).softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert found.argmax(1).tolist() == [0, 1, 2]


def test_the_whole_way(tmp_path):
    report = compress(
        "clip-tiny",
        output=tmp_path / "run",
        ratios=[0.9],
        calibration_samples=16,
        samples=24,
        max_steps=3,
        batch_size=16,
        export="onnx",
        bench_batches=[1],
    )
    assert report["model"]["family"] == "clip"
    pruned = next(row for row in report["variants"] if row["id"] == "multiflow-0.9")
    assert pruned["sparsity"]["achieved"] == pytest.approx(0.9, abs=1e-5)
    assert pruned["sparsity"]["per_modality"] == pytest.approx({"vision": 0.9, "text": 0.9}, abs=1e-4)
    scored = {(row["variant"], row["task"], row["runtime"]): row["values"] for row in report["metrics"]}
    variants = ("dense", "dense-finetuned", "multiflow-0.9", "multiflow-0.9-finetuned")
    assert {(v, t, "pytorch") for v in variants for t in ("retrieval", "zero-shot")} < scored.keys()
    assert (
        scored["dense", "retrieval", "pytorch"]["mean_r1"]
        > 0.9
        > scored["multiflow-0.9", "retrieval", "pytorch"]["mean_r1"]
    )
    for task in ("retrieval", "zero-shot"):
        for variant in variants[1::2]:
            assert scored[variant, task, "onnxruntime"] == scored[variant, task, "pytorch"]
            folder = tmp_path / "run" / "onnx" / variant / task
            assert sorted(path.stem for path in folder.glob("*.onnx")) == ["image_encoder", "text_encoder"]
            assert json.loads((folder / "task.json").read_text())["family"] == "clip"
    assert len(report["throughput"]) == 4
    again = vlprune.load(str(tmp_path / "run" / "checkpoints" / "multiflow-0.9-finetuned" / "retrieval"))
    zeros = sum(int((layer.weight == 0).sum()) for layer in again.layers())
    assert zeros / sum(layer.weight.numel() for layer in again.layers()) == pytest.approx(0.9, abs=1e-5)

    if operators.available():
        packed = export(tmp_path / "run", pack="sparse", tasks=["retrieval"])
        rows = [row for row in packed["graphs"] if row["packed"]]
        assert len(rows) == 2 and all(row["linears_packed"] == row["linears"] - 1 for row in rows)
        assert all(row["bytes"] < 0.35 * row["dense_bytes"] for row in rows)


def test_full_size_shapes_with_random_weights():
    model = vlprune.load("clip-base-random")
    assert model.source.random_weights and model.processor.image_size == 224
    sizes = {"vision": 0, "text": 0}
    for layer in model.layers():
        sizes[layer.modality] += layer.weight.numel()
    assert sizes == {"vision": 12 * 12 * 768**2, "text": 12 * 12 * 512**2}  # CLIP ViT-B/16
    assert model.config.text_config.vocab_size == 49408 and model.width == 512
    assert all(bool((p != 0).any()) for p in model.parameters())
    assert vlprune.load("clip-base-random", image_size=64).processor.image_size == 64


def test_large_shapes(monkeypatch):
    monkeypatch.setattr(clip, "start", lambda model, seed, biases: None)  # on the meta device: 428 million weights
    model = clip.base_random("clip-large-random", loading.WEIGHTS, 224, 0)
    sizes = {"vision": 0, "text": 0}
    for layer in model.layers():
        sizes[layer.modality] += layer.weight.numel()
    assert sizes == {"vision": 24 * 12 * 1024**2, "text": 12 * 12 * 768**2}  # CLIP ViT-L/14
    assert model.vision_model.embeddings.num_patches == 256 and model.width == 768
    assert sum(parameter.numel() for parameter in model.parameters()) == 427_616_513  # as OpenAI's
