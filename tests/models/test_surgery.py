"""Cutting: the cut model is the masked model, saves, reloads, trains; what a config claims is not believed."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlprune import exporters
from vlprune.data.scenes import scenes_captions, scenes_vqa
from vlprune.errors import RequestError
from vlprune.models import load
from vlprune.models.blip import cross_keys_values, run_text
from vlprune.models.family import fingerprint
from vlprune.models.loading import load_folder
from vlprune.structured import Plan, cut, removed, reshape, sizes, zero
from vlprune.training.finetune import FinetuneOptions, finetune


BLIPS = ("tied", "tied-vqa", "retrieval", "captioning", "vqa")
MODELS = (*BLIPS, "nlvr", "clip", "siglip")  # image classifiers: test_vit.py
TEXTS = ["a red circle", "a small blue square left of the large green triangle", "a", "two", "the small red square"]


@pytest.fixture(scope="session")
def loaded(hugging_face, duals, checkpoints, tmp_path_factory):
    """Name -> model with 2 to 4 heads per attention and random biases; not to be changed."""
    tied = checkpoints.pretraining_model(heads=4)
    models = {"tied": tied, "tied-vqa": tied.for_task("vqa")}
    for task in ("retrieval", "captioning", "vqa"):
        models[task] = load_folder(hugging_face(task)[0], task, None)
    folder = tmp_path_factory.mktemp("nlvr")
    tied.save(folder)
    models["nlvr"] = load(str(folder), family="blip_nlvr")
    for kind in ("clip", "siglip"):
        models[kind] = load_folder(duals(kind).folder, kind, None)
    return models


def outputs(model: Any) -> dict[str, Tensor]:
    """All a model computes from padded texts and images."""
    rng = np.random.default_rng(0)
    side = model.processor.image_size
    pixels = torch.from_numpy(rng.normal(size=(len(TEXTS), 3, side, side)).astype(np.float32))
    found = {}
    if model.family in ("clip", "siglip"):
        batch = model.caption_batch(pixels.numpy(), TEXTS, range(len(TEXTS)))
        with torch.no_grad():
            return {"image": model.image_tower().embeds(batch), "text": model.text_tower().embeds(batch)}
    ids, mask = (torch.from_numpy(array) for array in model.processor.texts(TEXTS, "cls", 20))
    assert 0 < mask.sum() < mask.numel()
    with torch.no_grad():
        if model.family == "blip_nlvr":
            states = model.image_states(pixels)
            return {"verdicts": model.logits(ids, mask, (states, states.flip(0)))}
        states = found["states"] = model.image_states(pixels)
        if "retrieval" in model.tasks:
            found["image"], found["text"] = model.image_embeds(states), model.text_embeds(ids, mask)
            found["itm"] = model.itm_logits(ids, mask, cross_keys_values(model.text_encoder, states))
        if "captioning" in model.tasks:
            found["captions"] = model._decoder_logits(ids, mask, states, None)
        if "vqa" in model.tasks:
            cross = cross_keys_values(model.text_encoder, states)
            question, _ = run_text(model.text_encoder, ids, mask, cross=cross)
            found["answers"] = model._decoder_logits(ids, mask, question, mask)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(not torch.allclose(a[name], b[name], atol=1e-2, rtol=1e-2) for name in a)


# --- plans of every structure -----------------------------------------------------------------------------------------


def heads(model: Any, left: int | None = None) -> Plan:
    """Some heads of every attention go; which, differs from layer to layer."""
    units = {}
    for number, group in enumerate(g for g in model.groups() if g.kind == "attention"):
        kept = (torch.arange(group.shape[0]) + number) % group.shape[0] < (left or group.shape[0] // 2)
        units[group.name] = kept[:, None].expand(group.shape).clone()
    return Plan(units)


def dimensions(model: Any, left: int | None = None) -> Plan:
    """Every head keeps as many dimensions, each its own."""
    units = {}
    generator = torch.Generator().manual_seed(1)
    for group in model.groups():
        if group.kind == "attention":
            order = torch.rand(group.shape, generator=generator).argsort(1)
            units[group.name] = order < (left or group.shape[1] // 2 + 1)
    return Plan(units)


def neurons(model: Any, left: int | None = None) -> Plan:
    generator = torch.Generator().manual_seed(2)
    ffns = [group for group in model.groups() if group.kind == "ffn"]
    return Plan(
        {g.name: torch.rand(g.shape[0], generator=generator).argsort() < (left or g.shape[0] // 3) for g in ffns}
    )


def layers(model: Any) -> Plan:
    """All layers but one go, the first of a tower or the last."""
    return Plan({}, {t.name: torch.arange(t.depth) == (t.depth - 1) * (i % 2) for i, t in enumerate(model.towers())})


def everything(model: Any) -> Plan:
    units = neurons(model).units
    for a, b in zip(heads(model).units.items(), dimensions(model).units.values(), strict=True):
        units[a[0]] = a[1] & b
    return Plan(units, layers(model).layers)


STRUCTURES = {
    "heads": heads,
    "head dimensions": dimensions,
    "neurons": neurons,
    "layers": layers,
    "everything": everything,
    "one head left": lambda model: heads(model, 1),
    "one dimension left": lambda model: dimensions(model, 1),
    "one neuron left": lambda model: neurons(model, 1),
    "one neuron group left": lambda model: neurons(model, 8),
}


# --- the masked model, made a second way ------------------------------------------------------------------------------


@contextmanager
def hooked(model: Any, plan: Plan) -> Iterator[None]:
    """Mask what the Linears give, not their weights; let removed layers hand on what they read."""
    handles, patched = [], []
    for group in model.groups():
        if group.name in plan.units and plan.keeps(group):
            kept = plan.units[group.name].flatten().float()
            parts: dict = {}
            for linear, _ in group.inner:
                parts[linear] = parts.get(linear, 0) + 1
            for linear, times in parts.items():
                mask = kept.repeat(times)
                handles.append(linear.register_forward_hook(lambda m, i, out, mask=mask: out * mask))
    for group in model.groups():
        if not plan.keeps(group) and not (group.tower != "vision" and model.family.startswith("blip")):
            # Before LayerNorms a layer without its two outputs hands on what it reads.
            for linear in group.outer:
                handles.append(linear.register_forward_hook(lambda m, i, out: out * 0))
    for tower in model.towers():
        for path in tower.stacks if model.family.startswith("blip") and tower.name != "vision" else ():
            for layer, kept in zip(model.get_submodule(path), plan.layers.get(tower.name, ()), strict=False):
                if kept:
                    continue
                for block in (layer.attention, layer.crossattention):
                    block.output.forward = lambda context, x: x
                    patched.append(block.output)
                layer.feed_forward_chunk = lambda x: x
                patched.append(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in patched:
            for name in ("forward", "feed_forward_chunk"):
                module.__dict__.pop(name, None)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_the_cut_model_is_the_masked_model(loaded, name, structure):
    model = loaded[name]
    plan = STRUCTURES[structure](model)
    with hooked(model, plan):
        expected = outputs(model)
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    cut(small, plan)
    zero(masked, plan)
    same(outputs(masked), expected)
    same(outputs(small), outputs(masked))
    assert differ(outputs(small), outputs(model))
    gone = removed(plan, model.groups(), model.towers())["removed"]
    assert gone == sum(layer.weight.numel() for layer in model.layers()) - sum(
        layer.weight.numel() for layer in small.layers()
    )
    assert sum(p.numel() for p in small.parameters()) < before - gone  # biases go, too
    assert getattr(small, "tied", None) == getattr(model, "tied", None)
    for group in small.groups():
        assert group.shape == tuple(s for s in group.shape if s > 0)
        for linear, _ in group.inner:
            times = sum(other is linear for other, _ in group.inner)
            assert linear.out_features == linear.weight.shape[0] == len(linear.bias) == times * prod(group.shape)
        for linear in group.outer:
            assert linear.in_features == linear.weight.shape[1] == prod(group.shape)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_saves_and_reloads(loaded, tmp_path, name, structure):
    small = copy.deepcopy(loaded[name])
    cut(small, STRUCTURES[structure](small))
    small.save(tmp_path)
    again = load_folder(tmp_path, name, None)
    assert (
        getattr(again, "tied", None) == getattr(small, "tied", None)
        and again.tasks == small.tasks
        and sizes(again) == sizes(small)
    )
    first, second = outputs(small), outputs(again)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert fingerprint(again.layers()) == fingerprint(small.layers())
    cut(again, heads(again, 1))  # what was cut can be cut again
    outputs(again)


def test_units_of_a_tied_model_are_one_group(loaded):
    model = loaded["tied"]
    names = [name for group in model.groups() for name in group.names]
    assert len(names) == len(set(names)) == 2 * 2 + 2 * 2 * 3
    assert [tower.name for tower in model.towers()] == ["vision", "text"]
    assert [tower.name for tower in loaded["vqa"].towers()] == ["vision", "text", "decoder"]
    assert [tower.name for tower in loaded["captioning"].towers()] == ["vision", "decoder"]
    for model in (loaded[name] for name in BLIPS):  # every prunable weight belongs to one group, and to no other
        linears = [linear for g in model.groups() for linear in (*(linear for linear, _ in g.inner), *g.outer)]
        assert {id(linear.weight) for linear in linears} == {id(layer.weight) for layer in model.layers()}
        crossed = [g.name for g in model.groups() if g.cross]
        assert crossed == [g.name for g in model.groups() if ".crossattention." in g.name] and crossed


def test_shared_weights_stay_shared(loaded):
    small = copy.deepcopy(loaded["tied"])
    cut(small, everything(small))
    (encoder,), (decoder,) = small.text_encoder.encoder.layer, small.text_decoder.bert.encoder.layer
    for path in ("crossattention.self.query", "crossattention.self.key", "crossattention.output.dense"):
        assert encoder.get_submodule(path).weight is decoder.get_submodule(path).weight
        assert encoder.get_submodule(path).bias is decoder.get_submodule(path).bias
    assert encoder.intermediate.dense.weight is decoder.intermediate.dense.weight
    assert encoder.output.dense.weight is decoder.output.dense.weight
    assert encoder.attention.self.query.weight is not decoder.attention.self.query.weight


def test_the_scale_of_the_scores_is_the_original_one(loaded, tmp_path):
    small = copy.deepcopy(loaded["retrieval"])
    cut(small, dimensions(small, 1))
    small.save(tmp_path)
    for model in (small, load_folder(tmp_path, "small", None)):
        attention = model.vision_model.encoder.layers[0].self_attn
        assert (attention.num_heads, attention.head_dim, attention.scale) == (4, 1, 8**-0.5)
        attention = model.text_encoder.encoder.layer[0].crossattention.self
        assert (attention.num_attention_heads, attention.attention_head_size) == (2, 1)
        assert attention.scale == 16**-0.5


def test_towers_of_different_depth(loaded, tmp_path):
    """Encoder and decoder of a question-answering model share nothing; the config tells the deeper one."""
    for gone, (left, depth) in (("text", (1, 2)), ("decoder", (2, 1))):
        small = copy.deepcopy(loaded["vqa"])
        cut(small, Plan({}, {gone: torch.tensor([False, True])}))
        assert (len(small.text_encoder.encoder.layer), len(small.text_decoder.bert.encoder.layer)) == (left, depth)
        assert small.config.text_config.num_hidden_layers == 2
        small.save(tmp_path)
        again = load_folder(tmp_path, "small", None)
        assert all(torch.equal(a, b) for a, b in zip(outputs(small).values(), outputs(again).values(), strict=True))
        spec = exporters.task_spec(again, "vqa", answers=None)
        assert len(spec["past_shapes"]) == depth


def test_depth_of_what_is_left_of_a_model(checkpoints, tmp_path):
    model = checkpoints.pretraining_model(heads=4)
    words = model.text_decoder.bert.embeddings.word_embeddings
    words.weight = torch.nn.Parameter(words.weight + 1)  # no longer tied
    cut(model, Plan({}, {"text": torch.tensor([True, False])}))
    part = model.for_task("retrieval")
    assert part.config.text_config.num_hidden_layers == 1 and model.config.text_config.num_hidden_layers == 2
    part.save(tmp_path)
    same(outputs(load_folder(tmp_path, "part", None)), outputs(part))


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_a_cut_model_trains(loaded, tmp_path, task):
    small = loaded["tied"].for_task(task)
    cut(small, everything(small))
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    data = scenes_vqa("train", 4) if task == "vqa" else scenes_captions("train", 4)
    options = FinetuneOptions(max_steps=2, lr=1e-3, batch_size=4, device="cpu", precision="fp32")
    finetune(small, task, data, {}, options)
    moved = [name for name, p in small.named_parameters() if not torch.equal(p, before[name])]
    assert {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in before}
    if task == "vqa":
        assert small.tied
    small.save(tmp_path)
    same(outputs(load_folder(tmp_path, "small", None)), outputs(small))


def test_plans_for_other_models_change_nothing(loaded):
    small = copy.deepcopy(loaded["retrieval"])
    plan = heads(loaded["vqa"])
    for change in (cut, zero):
        with pytest.raises(RequestError, match="another model"):
            change(small, plan)
    same(outputs(small), outputs(loaded["retrieval"]))
    assert sizes(small) == {}


# --- sizes in config.json ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    small = copy.deepcopy(loaded["vqa"])
    plan = everything(small)
    plan.layers.pop("decoder")
    plan.layers.pop("vision")
    cut(small, plan)
    small.save(folder)
    return folder


ATTENTION = "vision_model.encoder.layers.0.self_attn"
MLP = "text_encoder.encoder.layer.0.intermediate"
STACK = "text_encoder.encoder.layer"


def test_what_a_config_says_of_a_cut_model(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2 and config["vision_config"]["num_hidden_layers"] == 2
    found = config["vlprune"]["sizes"]
    assert (found[ATTENTION], found[MLP], found[STACK]) == ([2, 5], [21], [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "must map module paths"),
        ("x", "must map module paths"),
        ({ATTENTION: [5, 5]}, r"shape \[5, 5\], at most \[4, 8\] fits"),
        ({ATTENTION: [2, 9]}, "at most"),
        ({ATTENTION: [2]}, "at most"),
        ({ATTENTION: [2, 4]}, "has shape"),  # no lie in itself, but the weights are another size
        ({ATTENTION: [0, 5]}, "which is none"),
        ({ATTENTION: [-2, -5]}, "which is none"),
        ({ATTENTION: [2.0, 5]}, "which is none"),
        ({ATTENTION: [True, 5]}, "which is none"),
        ({ATTENTION: 5}, "which is none"),
        ({ATTENTION: [2, 5, 1]}, "which is none"),
        ({ATTENTION: [2**70, 5]}, "which is none"),
        ({MLP: [65]}, "at most"),
        ({MLP: [22]}, "has shape"),
        ({STACK: [2]}, "holds 1 layers"),
        ({STACK: [3]}, "holds 1 layers"),
        ({"itm_head": [1]}, "does not have"),
        ({"__class__": [1]}, "does not have"),
        ({ATTENTION: None}, "which is none"),
    ],
)
def test_sizes_are_not_believed(saved, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    claimed = config["vlprune"]["sizes"]
    config["vlprune"]["sizes"] = claimed | change if isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message) as error:
        load_folder(folder, "model", None)
    assert "\n" not in str(error.value) and "model" in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "intermediate_size", 2**31 - 1),
        ("vision_config", "num_hidden_layers", 1),
        ("vision_config", "hidden_size", 2**30),
    ],
)
def test_sizes_allow_no_larger_lies_elsewhere(saved, tmp_path, part, key, value):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    config[part][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    if key == "intermediate_size":  # true of no layer that is left: nothing of that size is ever made
        load_folder(folder, "model", None)
        return
    with pytest.raises(RequestError) as error:
        load_folder(folder, "model", None)
    assert "\n" not in str(error.value)


def test_a_cut_model_without_its_sizes(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["vlprune"]["sizes"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="holds 1 layers"):
        load_folder(folder, "model", None)


def test_reshaping_needs_names(loaded):
    with pytest.raises(RequestError, match="'nothing'"):
        reshape(copy.deepcopy(loaded["vqa"]), {"nothing": [1]})
