"""BLIP for two images: the authors' function and files, starting from a pretrained BLIP, surgery, training."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.data.nlvr import scenes_nlvr
from vlprune.data.scenes import VOCABULARY, scenes_captions
from vlprune.errors import RequestError
from vlprune.models import load
from vlprune.models.blip import cross_keys_values, run_text
from vlprune.models.blip_nlvr import BlipNlvr, holds, of
from vlprune.models.family import fingerprint
from vlprune.models.processor import word_tokenizer
from vlprune.pruning.statistics import InputNorms
from vlprune.structured import Plan, check_plan, cut, removed, zero
from vlprune.training.batches import Batches
from vlprune.training.finetune import FinetuneOptions, finetune
from vlprune.training.upop import SearchOptions, search


TEXTS = ["a red circle", "a small blue square left of the large green triangle", "a", "two", "the small red square"]
FAST = FinetuneOptions(max_steps=4, lr=1e-3, batch_size=6, precision="fp32", device="cpu")


def original_state(checkpoints, width=128, seed=0) -> dict[str, Tensor]:
    """What the authors' BLIP_NLVR saves, at random: two heads 64 wide, two layers, the second merging."""
    whole = checkpoints.pretraining_model(width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    state = {}
    for key, tensor in checkpoints.original_names(whole).items():
        if key.split(".")[0] not in ("visual_encoder", "text_encoder"):
            continue
        copies = [key]
        if ".crossattention.self." in key:
            copies = [key.replace(".self.", f".self{i}.") for i in (0, 1)]
        elif ".crossattention.output.dense." in key:
            copies = [key.replace(".dense.", f".dense{i}.") for i in (0, 1)]
        for name in copies:
            state[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    more = {
        "text_encoder.encoder.layer.1.crossattention.output.merge_layer.weight": (width, 2 * width),
        "text_encoder.encoder.layer.1.crossattention.output.merge_layer.bias": (width,),
        "cls_head.0.weight": (width, width),
        "cls_head.0.bias": (width,),
        "cls_head.2.weight": (2, width),
        "cls_head.2.bias": (2,),
    }
    state |= {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in more.items()}
    return state | {"text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def write(folder, state):
    path = folder / "model_base_nlvr.pth"
    torch.save({"model": state, "epoch": 9, "config": {"image_size": 32}}, path)
    word_tokenizer(VOCABULARY).save_pretrained(folder)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory, checkpoints):
    """The authors' file and its tensors; not to be changed."""
    folder, state = tmp_path_factory.mktemp("nlvr"), original_state(checkpoints)
    return write(folder, state), state


@pytest.fixture
def model(original) -> BlipNlvr:
    return load(str(original[0]), family="blip")


def inputs(model, seed=0):
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.normal(size=(7, 3, 32, 32)).astype(np.float32))
    ids, mask = (torch.from_numpy(array) for array in model.processor.texts(TEXTS, "enc", 20))
    assert 0 < mask.sum() < mask.numel()
    return pixels, torch.tensor([[0, 1], [2, 0], [3, 3], [4, 5], [6, 2]]), ids, mask


def logits(model, pixels, pairs, ids, mask):
    with torch.no_grad():
        states = model.image_states(pixels)
        return model.logits(ids, mask, (states[pairs[:, 0]], states[pairs[:, 1]]))


# --- the authors' function --------------------------------------------------------------------------------------------


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(q, k, v, heads, allowed=None):
    """[T, D] and [S, D] of one sample."""
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed[None, None, :], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def reference(state, image0, image1, ids, mask, patch=8, heads=2):
    """BLIP_NLVR for one sentence, from the description of the paper and the names in its file."""

    def encode(image):
        conv = "visual_encoder.patch_embed.proj"
        x = F.conv2d(image[None], state[f"{conv}.weight"], state[f"{conv}.bias"], stride=patch)[0].flatten(1).T
        x = torch.cat([state["visual_encoder.cls_token"][0], x]) + state["visual_encoder.pos_embed"][0]
        for i in range(2):
            block = f"visual_encoder.blocks.{i}"
            q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + linear(state, f"{block}.attn.proj", attention(q, k, v, heads))
            hidden = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
            x = x + linear(state, f"{block}.mlp.fc2", hidden)
        return norm(state, "visual_encoder.norm", x, 1e-6)

    images = [encode(image0), encode(image1)]
    embeddings = "text_encoder.embeddings"
    words, positions = (state[f"{embeddings}.{name}_embeddings.weight"] for name in ("word", "position"))
    x = words[ids] + positions[: len(ids)]
    x = norm(state, f"{embeddings}.LayerNorm", x, 1e-12)
    for i in range(2):
        layer = f"text_encoder.encoder.layer.{i}"
        q, k, v = (linear(state, f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
        context = linear(state, f"{layer}.attention.output.dense", attention(q, k, v, heads, mask.bool()))
        x = norm(state, f"{layer}.attention.output.LayerNorm", context + x, 1e-12)
        cross, read = f"{layer}.crossattention", []
        for n, image in enumerate(images):
            q = linear(state, f"{cross}.self{n}.query", x)
            k, v = (linear(state, f"{cross}.self{n}.{name}", image) for name in ("key", "value"))
            read.append(linear(state, f"{cross}.output.dense{n}", attention(q, k, v, heads)))
        if f"{cross}.output.merge_layer.weight" in state:
            joined = linear(state, f"{cross}.output.merge_layer", torch.cat(read, dim=-1))
        else:
            joined = (read[0] + read[1]) / 2
        x = norm(state, f"{cross}.output.LayerNorm", joined + x, 1e-12)
        hidden = F.gelu(linear(state, f"{layer}.intermediate.dense", x))
        x = norm(state, f"{layer}.output.LayerNorm", linear(state, f"{layer}.output.dense", hidden) + x, 1e-12)
    return linear(state, "cls_head.2", F.relu(linear(state, "cls_head.0", x[0])))


def test_logits_are_the_authors(original, model):
    assert isinstance(model, BlipNlvr) and model.tasks == ("nlvr",) and not model.training
    pixels, pairs, ids, mask = inputs(model)
    state = {name: tensor.double() for name, tensor in original[1].items() if tensor.is_floating_point()}
    found = logits(model, pixels, pairs, ids, mask)
    for row in range(len(ids)):
        left, right = (pixels[i].double() for i in pairs[row].tolist())
        expected = reference(state, left, right, ids[row], mask[row])
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)
        length = int(mask[row].sum())  # and without its padding
        short = reference(state, left, right, ids[row, :length], mask[row, :length])
        torch.testing.assert_close(expected, short)
    swapped = logits(model, pixels, pairs.flip(1), ids, mask)
    different = (found - swapped).abs().amax(1) > 1e-3
    assert different.tolist() == [True, True, False, True, True]  # the third pair is the same image twice


def test_families_and_aliases(original, tmp_path):
    again = load(str(original[0]), family="blip_nlvr")
    assert isinstance(again, BlipNlvr) and "drawn" not in again.source.checkpoint
    with pytest.raises(RequestError, match="--family blip"):
        load(str(original[0]))
    again.options = {"nlvr": {"max_length": 30}, "finetune": {"lr": 1e-4}}
    again.save(tmp_path)
    saved = load(str(tmp_path))
    assert isinstance(saved, BlipNlvr) and saved.options == again.options
    assert fingerprint(saved.layers()) == fingerprint(again.layers())
    args = inputs(again)
    assert torch.equal(logits(saved, *args), logits(again, *args))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BlipNlvr"]
    larger = load(str(original[0]), family="blip", image_size=48)
    assert larger.image_states(torch.zeros(1, 3, 48, 48)).shape == (1, 37, 128)


BROKEN = {
    "missing": (lambda s: s.pop("cls_head.2.bias"), "lacks cls_head.2.bias"),
    "one cross-attention": (
        lambda s: s.pop("text_encoder.encoder.layer.0.crossattention.self1.key.weight"),
        "lacks text_encoder.encoder.layer.0.crossattention.self1.key.weight",
    ),
    "half a merge": (
        lambda s: s.pop("text_encoder.encoder.layer.1.crossattention.output.merge_layer.weight"),
        "unknown text_encoder.encoder.layer.1.crossattention.output.merge_layer.bias",
    ),
    "shape": (lambda s: s.update({"cls_head.0.weight": torch.zeros(3, 3)}), r"cls_head.0.weight has shape \[3, 3\]"),
    "NaN": (lambda s: s["cls_head.0.bias"].fill_(float("nan")), "cls_head.0.bias holds NaN"),
    "depth": (
        lambda s: s.update({"text_encoder.encoder.layer.7.output.dense.bias": torch.zeros(128)}),
        "text_encoder.encoder.layer.2|lacks|holds",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(original, tmp_path, case):
    change, message = BROKEN[case]
    state = {name: tensor.clone() for name, tensor in original[1].items()}
    change(state)
    with pytest.raises(RequestError, match=message) as caught:
        load(str(write(tmp_path, state)), family="blip")
    assert "\n" not in str(caught.value)


# --- from a pretrained BLIP -------------------------------------------------------------------------------------------


def test_start_from_a_pretrained_blip(whole):
    model = of(whole, seed=4)
    for layer, theirs in zip(model.text_encoder.encoder.layer, whole.text_encoder.encoder.layer, strict=True):
        for name in ("query", "key", "value"):
            for own in (layer.crossattention.self0, layer.crossattention.self1):
                weight, source = getattr(own, name).weight, getattr(theirs.crossattention.self, name).weight
                assert torch.equal(weight, source) and weight is not source
    outputs = [layer.crossattention.output for layer in model.text_encoder.encoder.layer]
    assert [hasattr(output, "merge_layer") for output in outputs] == [False, True]

    # Of the same image twice, it reads what BLIP reads of it once.
    pixels, _, ids, mask = inputs(model)
    states = whole.image_states(pixels[:5])
    expected, _ = run_text(whole.text_encoder, ids, mask, cross=cross_keys_values(whole.text_encoder, states))
    torch.testing.assert_close(model.logits(ids, mask, (states, states)), model.cls_head(expected[:, 0]))

    head = [p.clone() for p in model.cls_head.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(head, of(whole, seed=4).cls_head.parameters(), strict=True))
    assert not torch.equal(head[0], of(whole, seed=5).cls_head[0].weight)
    assert "drawn at random (seed 4)" in model.source.checkpoint
    model.vision_model.post_layernorm.weight.data.zero_()
    assert whole.vision_model.post_layernorm.weight.any()  # a copy


def test_what_cannot_be_made_a_model_for_two_images(hugging_face):
    with pytest.raises(RequestError, match="text encoder"):
        load(str(hugging_face("captioning")[0]), family="blip_nlvr")
    assert isinstance(load(str(hugging_face("retrieval")[0]), family="blip_nlvr"), BlipNlvr)
    with pytest.raises(RequestError, match="cannot do vqa"):
        load("blip-tiny", family="blip_nlvr").for_task("vqa")


def test_embedded_model():
    model = load("blip-tiny", family="blip_nlvr", seed=1)
    assert model.options == {"finetune": load("blip-tiny").options["finetune"]}
    assert holds(model.state_dict()) and not holds(load("blip-tiny").state_dict())


# --- what pruning is told ---------------------------------------------------------------------------------------------


def test_layers_and_groups(model):
    layers, groups = model.layers(), model.groups()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {layer.name for layer in layers} == {name for name in linears if not name.startswith("cls_head")}
    assert {layer.name for layer in layers if layer.tokens != layer.modality} == {
        f"text_encoder.encoder.layer.{i}.crossattention.self{n}.{name}"
        for i in (0, 1) for n in (0, 1) for name in ("key", "value")
    }  # fmt: skip
    held = {id(linear) for group in groups for linear in (*(inner for inner, _ in group.inner), *group.outer)}
    missing = [layer.name for layer in layers if id(layer.modules[0]) not in held]
    assert missing == ["text_encoder.encoder.layer.1.crossattention.output.merge_layer"]
    assert [group.cross for group in groups if group.tower == "text"] == [False, True, True, False] * 2
    assert all(model.get_submodule(group.name) is group.modules[0] for group in groups)
    assert [(tower.name, tower.depth) for tower in model.towers()] == [("vision", 2), ("text", 2)]


def test_calibration_counts_real_tokens_only(model):
    data = scenes_captions("train", 6)

    def collected(pad: int) -> dict[str, Tensor]:
        norms = InputNorms({layer.name: (layer.modules, layer.tokens) for layer in model.layers()})
        with norms.collect():
            batch = model.caption_batch(list(data.images), [c[0] for c in data.captions], range(6))
            assert batch["pairs"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]]
            for name in ("input_ids", "attention_mask"):
                batch[name] = F.pad(batch[name], (0, pad))
            model.calibrate(batch, norms.valid)
        return norms.result()

    one = collected(0)
    assert one.keys() == {layer.name for layer in model.layers()} and all(bool((n > 0).any()) for n in one.values())
    padded = collected(5)
    for name, norm_ in one.items():
        torch.testing.assert_close(norm_, padded[name], rtol=1e-5, atol=1e-6)


def random_plan(model, kept=0.5, layers=False):
    generator = torch.Generator().manual_seed(1)
    units = {}
    for group in model.groups():
        mask = torch.rand(group.shape[-1], generator=generator) < kept
        mask[0] = True
        units[group.name] = mask.expand(group.shape).clone()
    gone = {"vision": torch.tensor([True, False]), "text": torch.tensor([False, True])}
    return Plan(units, gone if layers else {})


@pytest.mark.parametrize("kept", [0.5, 0.0])
@pytest.mark.parametrize("layers", [False, True])
def test_cut_models_equal_masked_ones_and_reload(model, kept, layers, tmp_path):
    plan, args = random_plan(model, kept, layers), inputs(model)
    args, model = (args[0].double(), *args[1:]), model.double()
    dense = logits(model, *args)
    zeroed = copy.deepcopy(model)
    zero(zeroed, plan)
    cut(model, plan)
    found = logits(model, *args)
    torch.testing.assert_close(found, logits(zeroed, *args), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)
    model.save(tmp_path)
    again = load(str(tmp_path)).double()
    assert torch.equal(logits(again, *args), found)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in zeroed.parameters())
    if layers:  # the layer that is left is the second, which merges by a Linear
        assert hasattr(again.text_encoder.encoder.layer[0].crossattention.output, "merge_layer")


# --- training ---------------------------------------------------------------------------------------------------------


def test_batches_of_a_training(model):
    data = scenes_nlvr("train", 20)
    with Batches(model, data, 6, 0, range(4)) as batches:
        found = list(batches)
    pixels, seen = model.processor.images(list(data.images)), []
    for batch in found[:3]:
        assert len(batch["pixel_values"]) == 12 and batch["pairs"].shape == (6, 2)
        for pair, ids, mask, label in zip(
            batch["pairs"].tolist(), batch["input_ids"], batch["attention_mask"], batch["labels"].tolist(), strict=True
        ):
            text = model.processor.decode(ids[: int(mask.sum())].tolist())
            shown = batch["pixel_values"][pair].numpy()
            (index,) = [i for i in range(20) if np.array_equal(shown, pixels[2 * i : 2 * i + 2])]
            seen.append(index)
            assert (text, bool(label)) == (data.pairs[index].sentence, data.pairs[index].label)
            assert int(ids[0]) == model.processor.first_ids["enc"]
    assert len(set(seen)) == 18
    with Batches(model, data, 6, 0, range(2, 4)) as batches:
        for one, other in zip(found[2:], batches, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_loss(model):
    data = scenes_nlvr("train", 4)
    pairs = [(p.left, p.right) for p in data.pairs]
    batch = model.nlvr_batch(list(data.images), pairs, [p.sentence for p in data.pairs], [p.label for p in data.pairs])
    found = torch.log_softmax(model._batch_logits(batch), 1)
    expected = -found[range(4), [int(p.label) for p in data.pairs]].mean()
    loss = model.loss("nlvr", batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in model.named_parameters():  # a key's bias changes no softmax
        assert parameter.grad is not None and (bool(parameter.grad.any()) or "key.bias" in name), name


def test_a_model_learns_sentences_about_two_images(whole):
    data = scenes_nlvr("train", 8)
    model = of(whole, seed=0)
    options = dataclass_options(max_steps=60, lr=2e-3, batch_size=8)
    result = finetune(model, "nlvr", data, {}, options)
    assert result["loss"] < 0.5 * result["first_loss"] and result["steps"] == 60
    heads = of(whole, seed=0)
    before = {name: p.clone() for name, p in heads.named_parameters()}
    finetune(heads, "nlvr", data, {}, dataclass_options(max_steps=2, mode="heads"))
    changed = {name for name, p in heads.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("cls_head")}


def dataclass_options(**changes):
    return FinetuneOptions(**{**FAST.__dict__, **changes})


def test_upop_searches_both_cross_attentions(model):
    data = scenes_nlvr("train", 12)
    plan, info = search(model, "nlvr", data, 0.5, SearchOptions(FAST, interval=2, round_to=8))
    check_plan(plan, model.groups(), model.towers())
    assert plan.units.keys() == {group.name for group in model.groups()}
    assert info["achieved"] == removed(plan, model.groups(), model.towers())["achieved"] == pytest.approx(0.5, abs=0.02)
    args = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs(model.double())]
    zeroed = copy.deepcopy(model)
    zero(zeroed, plan)
    cut(model, plan)
    torch.testing.assert_close(logits(model, *args), logits(zeroed, *args), rtol=1e-9, atol=1e-9)


def test_data_of_another_task(model):
    with pytest.raises(RequestError, match="pairs of images"):
        finetune(model, "nlvr", scenes_captions("train", 8), {}, FAST)
