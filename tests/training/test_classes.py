"""Fine-tuning on images by class: a classifier by number, two encoders by name."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig

import vlprune
from vlprune import exporters
from vlprune.data import ClassData, open_data
from vlprune.data.scenes import TEMPLATES as SCENES
from vlprune.data.scenes import VOCABULARY, scenes_captions, scenes_classes
from vlprune.errors import RequestError
from vlprune.models.clip import new
from vlprune.models.family import Source
from vlprune.models.pixels import Pixels
from vlprune.models.text_processor import EncoderProcessor, learn_clip_tokenizer
from vlprune.tasks import evaluate
from vlprune.tasks.zero_shot import TEMPLATES
from vlprune.training.batches import Batches
from vlprune.training.finetune import AUTHORS, FinetuneOptions, finetune, settle


FAST = FinetuneOptions(max_steps=6, lr=1e-3, batch_size=8, precision="fp32", device="cpu")


@pytest.fixture
def vit(vits):
    return vlprune.load(str(vits("teacher").folder)).for_task("classification")


@pytest.fixture(scope="module")
def whole_clip():
    tokenizer = learn_clip_tokenizer([*VOCABULARY, *TEMPLATES], 700, 24)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **ends},
        projection_dim=16,
    )
    processor = EncoderProcessor(tokenizer, Pixels(32, None, (0.5,) * 3, (0.25,) * 3), 24, "clip")
    return new(config, processor, Source("small", "test"), seed=0)


@pytest.fixture
def clip(whole_clip):
    return whole_clip.for_task("zero-shot")


def words(model, ids):
    text = model.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(text.replace("</w>", " ").split())


def animals_of(animals, split="train"):
    return open_data("classification", str(animals), split)


def score(model, data, **options):
    (task,) = model.tasks
    spec = exporters.task_spec(model, task, **options)
    return evaluate(task, exporters.torch_graphs(model, task), spec, model.processor, data).values["top1"]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_labels_become_the_models(vit, animals):
    """The data know three of five classes, under other names and in another order than the model."""
    full = animals_of(animals)
    some = [i for i, label in enumerate(full.labels) if full.classes[label] in ("gnu", "cat", "eel")]
    names = ["Gnu", "eel", "CAT"]
    labels = [names.index({"gnu": "Gnu", "cat": "CAT", "eel": "eel"}[full.classes[full.labels[i]]]) for i in some]
    data = ClassData("some", [full.images[i] for i in some], labels, names)
    with Batches(vit, data, size=3, seed=0, steps=range(6)) as batches:
        seen = list(batches)
    expected = {
        image.tobytes(): vit.labels.index(names[label].lower())
        for image, label in zip(data.images, labels, strict=True)
    }
    pixels = {vit.processor.images([image]).tobytes(): expected[image.tobytes()] for image in data.images}
    assert len(seen) == 6
    for batch in seen:
        assert batch.keys() == {"pixel_values", "labels"}
        for image, label in zip(batch["pixel_values"].numpy(), batch["labels"].tolist(), strict=True):
            assert pixels[image.tobytes()] == label
    first_pass = torch.cat([batch["labels"] for batch in seen[:3]])
    assert sorted(first_pass.tolist()) == [0, 0, 0, 2, 2, 2, 4, 4, 4]  # each image once


def test_names_become_captions_of_all_images_of_a_class(clip):
    data = scenes_classes("train", 96)  # two images of each class
    with Batches(clip, data, size=32, seed=0, steps=range(30)) as batches:
        seen = list(batches)
    texts = set()
    for batch in seen:
        for ids, owner in zip(batch["input_ids"].tolist(), batch["image_index"].tolist(), strict=True):
            text = words(clip, ids)
            assert text in {template.replace("{}", data.classes[owner]) for template in SCENES}
            texts.add(text)
    assert len(texts) > 5 * 48  # other words for a class from pass to pass
    assert any(len(batch["image_index"].unique()) < 32 for batch in seen)  # both images of a class, no negatives


def test_templates_are_the_data_sets_or_the_built_in_ones(clip):
    data = dataclasses.replace(scenes_classes("train", 8), templates=())
    with Batches(clip, data, size=8, seed=0, steps=range(8)) as batches:
        texts = {words(clip, ids).replace(" ", "") for batch in batches for ids in batch["input_ids"].tolist()}
    built_in = {template.replace("{}", name).replace(" ", "") for template in TEMPLATES for name in data.classes}
    assert texts <= built_in and len(texts) > 24


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_classifier_learns(vit, animals):
    before = score(vit, animals_of(animals, "test"))
    told = finetune(vit, "classification", animals_of(animals), {}, dataclasses.replace(FAST, max_steps=40))
    assert told["loss"] < 0.8 * told["first_loss"]
    assert score(vit, animals_of(animals, "test")) > max(before, 0.7)


def test_two_encoders_learn_names(clip):
    """Two colours, all shapes: twelve classes."""
    data = scenes_classes("train", 480)
    data = data.keep([i for i, label in enumerate(data.labels) if label < 12])
    test = scenes_classes("test", 480)
    test = test.keep([i for i, label in enumerate(test.labels) if label < 12])
    options = {"classes": data.classes, "templates": data.templates}
    before = score(clip, test, **options)
    told = finetune(clip, "zero-shot", data, {}, dataclasses.replace(FAST, max_steps=150, lr=3e-3, batch_size=24))
    assert told["loss"] < told["first_loss"]
    assert score(clip, test, **options) > max(0.1, 2 * before)  # by chance 1 of 48


@pytest.mark.parametrize("mode", ["heads", "full"])
def test_masked_weights_stay_zero(vit, animals, mode):
    generator = torch.Generator().manual_seed(0)
    masks = {layer.name: torch.rand(layer.weight.shape, generator=generator) < 0.5 for layer in vit.layers()}
    head = vit.head_parameters("classification")[0].detach().clone()
    finetune(vit, "classification", animals_of(animals), masks, dataclasses.replace(FAST, mode=mode))
    for layer in vit.layers():
        assert not layer.weight.detach()[~masks[layer.name]].any()
    assert not torch.equal(head, vit.head_parameters("classification")[0].detach())


def test_a_training_is_continued_only_with_the_same_classes(vit, animals, tmp_path, monkeypatch):
    data = animals_of(animals)
    whole = vit.for_task("classification")
    finetune(whole, "classification", data, {}, FAST)

    first = vit.for_task("classification")
    losses = []

    def loss(task, batch):  # killed after three steps
        if len(losses) == 3:
            raise KeyboardInterrupt
        losses.append(type(first).loss(first, task, batch))
        return losses[-1]

    monkeypatch.setattr(first, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        finetune(first, "classification", data, {}, FAST, state_dir=tmp_path, save_seconds=0)
    renamed = dataclasses.replace(data, labels=[(label + 1) % 5 for label in data.labels])
    other, again = vit.for_task("classification"), vit.for_task("classification")
    assert finetune(again, "classification", data, {}, FAST, state_dir=tmp_path)["resumed_from"] in (1, 2, 3)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key]), key
    assert finetune(other, "classification", renamed, {}, FAST, state_dir=tmp_path)["resumed_from"] == 0


def test_settings(vit, animals):
    settings = settle(FinetuneOptions(device="cpu"), vit, "classification", animals_of(animals))
    authors = AUTHORS["classification"]
    assert (settings.lr, settings.batch_size, settings.steps) == (authors["lr"], 15, authors["epochs"])


def test_data_of_another_kind_are_refused(vit, clip, animals):
    with pytest.raises(RequestError, match="scenes holds no classes: classification needs them"):
        finetune(vit, "classification", scenes_captions("train", 4), {}, FAST)
    with pytest.raises(RequestError, match="scenes holds no classes: zero-shot needs them"):
        finetune(clip, "zero-shot", scenes_captions("train", 4), {}, FAST)
    strange = ClassData("strange", [Image.new("RGB", (8, 8))] * 2, [0, 1], ["yak", "zebra"])
    with pytest.raises(RequestError, match="'yak' is none of them"):
        finetune(vit, "classification", strange, {}, FAST)


# --- zero-shot, exported ----------------------------------------------------------------------------------------------


def test_zero_shot_scores_alike_in_both_runtimes(clip, tmp_path):
    from vlprune.runtime.session import load_graphs

    data = scenes_classes("test", 60)
    spec = exporters.task_spec(clip, "zero-shot", classes=data.classes, templates=data.templates)
    rows = exporters.export(clip, "zero-shot", spec, tmp_path, data, threads=1)
    assert [row["graph"] for row in rows] == ["image_encoder", "text_encoder"]
    scores = [
        evaluate("zero-shot", graphs, spec, clip.processor, data, batch_size=7)
        for graphs in (exporters.torch_graphs(clip, "zero-shot"), load_graphs(tmp_path, threads=1))
    ]
    assert scores[0].n == 60 and scores[0].values.keys() == {"top1", "top5"}
    agree = np.mean([a == b for a, b in zip(scores[0].outputs, scores[1].outputs, strict=True)])
    assert agree > 0.9  # untrained, so that ranks may turn on the last bit
