"""Vision transformers against transformers' own, on small random checkpoints that transformers wrote."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlprune
from vlprune.errors import RequestError
from vlprune.models.family import fingerprint
from vlprune.models.vit import Vit
from vlprune.pruning.statistics import InputNorms
from vlprune.structured import Plan, cut, zero


KINDS = ("vit", "deit", "teacher", "dinov2", "gated")
LABELS = ["cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def changed(vits, tmp_path):
    """Copy a checkpoint, then change files of it."""

    def make(kind="vit", file="config.json", **changes):
        shutil.copytree(vits(kind).folder, tmp_path, dirs_exist_ok=True)
        content = json.loads((tmp_path / file).read_text())
        for key, value in changes.items():
            content[key] = value
            if value is None:
                del content[key]
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.fixture(scope="module")
def images():
    """Wide, high, small, exact, of an odd size."""
    rng = np.random.default_rng(0)
    sizes = [(90, 40, 3), (37, 101, 3), (20, 20, 3), (32, 32, 3), (41, 43, 3)]
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def logits(model, pixels):
    with torch.no_grad():
        return model.logits(torch.from_numpy(pixels)).numpy()


def refused(folder, **options):
    with pytest.raises(RequestError) as caught:
        vlprune.load(str(folder), **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- the same as transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, vits, images):
    folder, theirs = vits(kind).folder, vits(kind).model
    model = vlprune.load(str(folder))
    assert isinstance(model, Vit) and model.tasks == ("classification",) and not model.training
    assert model.labels == LABELS
    pixels = model.processor.images(images)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels)).logits.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits(model, pixels), expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_transformers_to_the_last_bit(kind, vits, images):
    folder = vits(kind).folder
    expected = vits(kind).processor(images, return_tensors="np")["pixel_values"]
    found = vlprune.load(str(folder)).processor.images(images)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["vit", "deit", "teacher", "gated"])
def test_other_image_sizes_are_interpolated(kind, vits, images):
    folder, theirs = vits(kind).folder, vits(kind).model
    model = vlprune.load(str(folder), image_size=48)
    pixels = model.processor.images(images)
    assert pixels.shape == (5, 3, 48, 48) and model.config.image_size == 48
    options = {} if kind == "gated" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels), **options).logits.numpy()
    np.testing.assert_allclose(logits(model, pixels), expected, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_are_read_by_transformers_and_by_us(kind, vits, images, tmp_path):
    folder, theirs = vits(kind).folder, vits(kind).model
    model = vlprune.load(str(folder))
    model.options = {"finetune": {"lr": 1e-4}}
    model.save(tmp_path)
    pixels = model.processor.images(images)
    again = vlprune.load(str(tmp_path))
    np.testing.assert_array_equal(logits(again, pixels), logits(model, pixels))
    assert again.options == model.options and again.labels == LABELS
    np.testing.assert_array_equal(again.processor.images(images), pixels)
    by_transformers = type(theirs).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(by_transformers(torch.from_numpy(pixels)).logits, logits(model, pixels), atol=2e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    np.testing.assert_array_equal(processor(images, return_tensors="np")["pixel_values"], pixels)


@pytest.mark.parametrize(
    ("settings", "processor"),
    [
        (
            {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2},  # written before 2022
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        ),
        ({"size": 32, "image_mean": [0.5] * 3}, transformers.ViTImageProcessor(size={"height": 32, "width": 32})),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 32, "resample": 3},
            transformers.DeiTImageProcessor(size=40, crop_size=32),
        ),
        (
            {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 32}},
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        ),
        (
            {"image_processor_type": "BitImageProcessor", "size": 36, "crop_size": {"height": 32, "width": 32}},
            transformers.BitImageProcessor(size=36, crop_size=32),
        ),
    ],
)
def test_older_and_shorter_preprocessing(settings, processor, images, changed):
    folder = changed()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    found = vlprune.load(str(folder)).processor.images(images)
    np.testing.assert_array_equal(found, processor(images, return_tensors="np")["pixel_values"])


def test_half_precision_files(vits, images, tmp_path):
    model = vlprune.load(str(vits("vit").folder))
    model.save(tmp_path, torch.float16)
    again = vlprune.load(str(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    pixels = model.processor.images(images)
    np.testing.assert_allclose(logits(again, pixels), logits(model, pixels), atol=0.05)


# --- what a family tells ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_but_the_classifier_is_prunable(kind, vits):
    model = vlprune.load(str(vits(kind).folder))
    layers = model.layers()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {layer.name for layer in layers} == linears - set(model.heads)
    assert all(model.get_submodule(layer.name) is layer.modules[0] for layer in layers)
    assert {(layer.modality, layer.tokens) for layer in layers} == {("vision", "vision")}
    assert len(layers) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_groups_hold_every_prunable_weight(kind, vits):
    model = vlprune.load(str(vits(kind).folder))
    groups = model.groups()
    assert [(group.kind, group.layer) for group in groups] == [
        ("attention", 0),
        ("ffn", 0),
        ("attention", 1),
        ("ffn", 1),
    ]
    assert all(model.get_submodule(group.name) is group.modules[0] for group in groups)
    inner = {linear for group in groups for linear, _ in group.inner}
    assert inner | {linear for group in groups for linear in group.outer} == {
        layer.modules[0] for layer in model.layers()
    }
    assert {group.shape for group in groups[::2]} == {(4, 8)}
    assert {group.shape for group in groups[1::2]} == {{"dinov2": (64,), "gated": (48,)}.get(kind, (48,))}
    (tower,) = model.towers()
    assert (tower.depth, tower.modality) == (2, "vision") and model.get_submodule(tower.stacks[0])


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_sees_every_row_of_every_image(kind, vits, images):
    model = vlprune.load(str(vits(kind).folder))
    norms = InputNorms({layer.name: (layer.modules, layer.tokens) for layer in model.layers()})
    seen = []
    first = model.layers()[0].modules[0]
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    with norms.collect(), torch.no_grad():
        for part in (images[:3], images[3:]):
            model.calibrate(model.class_batch(part, [0] * len(part)), norms.valid)
    hook.remove()
    found = norms.result()
    rows = torch.cat([x.flatten(0, 1) for x in seen])
    assert len(rows) == 5 * (16 + len(model.kind.first))
    torch.testing.assert_close(found[model.layers()[0].name].double(), rows.square().sum(0).sqrt(), rtol=1e-5, atol=0)
    assert found.keys() == {layer.name for layer in model.layers()} and all(bool((n > 0).any()) for n in found.values())


def test_loss_and_its_gradients(vits, images):
    model = vlprune.load(str(vits("teacher").folder))
    batch = model.class_batch(images, [4, 0, 1, 2, 3])
    loss = model.loss("classification", batch)
    log = torch.log_softmax(model.logits(batch["pixel_values"]), 1)
    picked = log[torch.arange(5), batch["labels"]]
    torch.testing.assert_close(loss, -(0.9 * picked + 0.1 * log.mean(1)).mean())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "key.bias" not in n)
    assert {id(p) for p in model.head_parameters("classification")} == {
        id(p) for n, p in model.named_parameters() if n.startswith(("cls_classifier", "distillation_classifier"))
    }


def test_copies_are_independent(vits):
    model = vlprune.load(str(vits("vit").folder))
    before = fingerprint(model.layers())
    clone = model.for_task("classification")
    with torch.no_grad():
        clone.layers()[0].weight.zero_()
    assert fingerprint(model.layers()) == before != fingerprint(clone.layers())
    with pytest.raises(RequestError, match="cannot do retrieval: it offers classification"):
        model.for_task("retrieval")


# --- surgery ----------------------------------------------------------------------------------------------------------


def plan_of(model, heads=None, width=None, neurons=None, layers=None):
    """Keep so many heads, dimensions of each, neurons, and the layers given; which, differs from group to group."""
    generator = torch.Generator().manual_seed(0)
    units = {}
    for number, group in enumerate(model.groups()):
        if group.kind == "attention":
            H, K = group.shape
            kept = torch.rand((H, K), generator=generator).argsort(1) < (width or K)
            kept &= ((torch.arange(H) + number) % H < (heads or H))[:, None]
        else:
            kept = torch.rand(group.shape, generator=generator).argsort() < (neurons or group.shape[0])
        units[group.name] = kept
    return Plan(units, {} if layers is None else {"vision": torch.tensor(layers)})


PLANS = {
    "heads": {"heads": 2},
    "one head": {"heads": 1},
    "dimensions": {"width": 5},
    "one dimension": {"width": 1},
    "neurons": {"neurons": 24},
    "one neuron": {"neurons": 1},
    "first layer": {"layers": [False, True]},
    "last layer": {"layers": [True, False]},
    "everything": {"heads": 3, "width": 4, "neurons": 16, "layers": [True, False]},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_cut_models_equal_masked_ones_and_reload(kind, plan, vits, images, tmp_path):
    model = vlprune.load(str(vits(kind).folder))
    made = plan_of(model, **PLANS[plan])
    masked, smaller = copy.deepcopy(model), copy.deepcopy(model)
    zero(masked, made)
    cut(smaller, made)
    pixels = model.processor.images(images)
    assert np.abs(logits(masked, pixels) - logits(model, pixels)).max() > 0.01
    np.testing.assert_allclose(logits(smaller, pixels), logits(masked, pixels), atol=1e-5)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    assert count[1] < count[0]
    smaller.save(tmp_path)
    again = vlprune.load(str(tmp_path))
    np.testing.assert_array_equal(logits(again, pixels), logits(smaller, pixels))
    assert [group.shape for group in again.groups()] == [group.shape for group in smaller.groups()]
    again.loss("classification", again.class_batch(images, [0] * 5)).backward()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "made", "missing"),
    [
        ("vit", transformers.ViTModel, "lacks classifier"),
        ("deit", transformers.DeiTModel, "lacks classifier or cls_classifier"),
        ("dinov2", transformers.Dinov2Model, "lacks classifier"),
    ],
)
def test_no_head_is_made_up(kind, made, missing, vits, tmp_path):
    made(vits(kind).model.config).save_pretrained(tmp_path)
    vits(kind).processor.save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert missing in message and "none is made up" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "swin"}, "model type 'swin'"),
        ({"hidden_size": -1}, "which is no size"),
        ({"hidden_size": 36}, "its config says"),
        ({"num_attention_heads": 5}, "not a multiple of its 5 heads"),
        ({"num_hidden_layers": 2**30}, "holds 2 layers"),
        ({"image_size": [32, 32]}, "which is no size"),
        ({"image_size": 40}, "its config says [1, 26, 32]"),
        ({"patch_size": 16}, "its config says [1, 5, 32]"),
        ({"num_channels": 1}, "only 3 are supported"),
        ({"hidden_act": "none"}, "unusable config"),
        ({"hidden_act": 3}, "which is no name"),
        ({"layer_norm_eps": "x"}, "no small number"),
        ({"id2label": {"0": "cat"}}, "two classes or more"),
        ({"id2label": {"0": "cat", "7": "dog"}}, "two classes or more"),
        ({"id2label": {"x": "cat", "y": "dog"}}, "cannot be used"),
        ({"id2label": None, "num_labels": 10**12}, "which is no number"),
        ({"id2label": None, "num_labels": 9}, "its config says [9"),
        ({"id2label": {str(i): "x" for i in range(9)}}, "its config says [9"),
        ({"problem_type": "multi_label_classification"}, "one class each"),
        ({"vlprune": {"sizes": {"vit.encoder.layer.0.intermediate": [99]}}}, "at most [48] fits"),
        ({"vlprune": {"sizes": {"nothing": [1]}}}, "which the model does not have"),
        ({"vlprune": {"options": {"finetune": {"lr": "high"}}}}, "named numbers"),
    ],
)
def test_broken_config(changes, said, changed):
    assert said in refused(changed(**changes))


@pytest.mark.parametrize("ratio", ["x", -1, 1e9, True])
def test_broken_ratio_of_dinov2(ratio, changed):
    assert "which is no ratio" in refused(changed("dinov2", mlp_ratio=ratio))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor': supported are ViT"),
        ({"image_processor_type": 7}, "7: supported are ViT"),
        ({"do_resize": False}, "do_resize = false is not supported"),
        ({"do_normalize": False}, "do_normalize = false is not supported"),
        ({"size": {"height": 32, "width": 40}}, "is not supported"),
        ({"image_std": [0, 1, 1]}, "image_std must be positive"),
    ],
)
def test_preprocessing_that_is_not_supported(changes, said, changed):
    assert said in refused(changed(file="preprocessor_config.json", **changes))


def test_preprocessing_must_be_told(changed):
    folder = changed()
    (folder / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(folder)


def test_image_size_must_fit_the_patches(vits):
    assert "not a multiple of the patch size 8" in refused(vits("vit").folder, image_size=33)
