import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BlipConfig

from vlprune.data import CaptionData, ClassData, VqaData
from vlprune.data.scenes import VOCABULARY, scenes_captions, scenes_classes, scenes_vqa
from vlprune.errors import RequestError
from vlprune.models import load
from vlprune.models.blip import Blip, new
from vlprune.models.family import Source
from vlprune.models.processor import Processor, word_tokenizer
from vlprune.structured import check_plan, cut, removed, zero
from vlprune.structured import upop as rules
from vlprune.training import upop as module
from vlprune.training.finetune import FinetuneOptions
from vlprune.training.upop import PUBLISHED, Masks, SearchOptions, _authors, multiplied, search


TASKS = ("retrieval", "captioning", "vqa")
FAST = FinetuneOptions(max_steps=6, lr=1e-3, batch_size=8, precision="fp32", device="cpu")
QUICK = SearchOptions(FAST, lr=1e-3, interval=2, round_to=4)


@pytest.fixture(scope="module")
def whole() -> Blip:
    """A tied pretraining model of two layers, 32 wide, with two heads, dropout in the text towers, and biases."""
    tokenizer = word_tokenizer(VOCABULARY)
    dec, enc = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = BlipConfig(
        vision_config={**sizes, "patch_size": 8, "image_size": 16},
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "encoder_hidden_size": 32,
            "hidden_dropout_prob": 0.1,
            "bos_token_id": dec,
            "enc_token_id": enc,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_text_hidden_size=16,
    )
    model = new(config, Processor(tokenizer, 16, dec, enc), Source("small", "test"), seed=1, biases=True)
    for layer in model.layers():
        layer.weight.data *= 8  # fresh weights hardly let the image through
        for linear in layer.modules:
            assert linear.bias is not None
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data *= 8
    return model


def data_of(task: str) -> CaptionData | VqaData:
    return scenes_vqa("train", 40) if task == "vqa" else scenes_captions("train", 20)


def batch_of(model: Blip, task: str) -> dict[str, Tensor]:
    data = data_of(task)
    if isinstance(data, VqaData):
        asked = data.questions[:6]
        images = [data.images[q.image] for q in asked]
        return model.vqa_batch(images, range(6), [q.question for q in asked], [q.answers for q in asked])
    rows = range(6)
    return model.caption_batch([data.images[i] for i in rows], [data.captions[i][0] for i in rows], rows)


def loss_of(model: nn.Module, task: str, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.loss(task, batch)


def outputs(model: Blip, task: str, batch: dict[str, Tensor]) -> list[Tensor]:
    """What the model computes on its way to the loss, without drawing."""
    with torch.no_grad():
        states = model.image_states(batch["pixel_values"])
        found = [states, loss_of(model, task, batch)]
        if task == "retrieval":
            ids, mask = batch["input_ids"], batch["attention_mask"]
            found += [model.image_embeds(states), model.text_embeds(ids, mask)]
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- masks on a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_masks_of_zeros_and_ones_equal_the_cut_model(whole, task):
    model = whole.for_task(task)
    generator = torch.Generator().manual_seed(3)
    groups = model.groups()
    kept = {g.name: torch.rand(g.shape[-1], generator=generator) < 0.4 for g in groups}
    for mask in kept.values():
        mask[0] = True
    plan, batch = rules.plan_of(groups, kept), batch_of(model, task)
    with multiplied(groups, {name: mask.float() for name, mask in kept.items()}):
        masked = outputs(model, task, batch)
    dense = outputs(model, task, batch)
    zeroed = whole.for_task(task)
    zero(zeroed, plan)
    cut(model, plan)
    for one, two, three, whole_one in zip(
        masked, outputs(model, task, batch), outputs(zeroed, task, batch), dense, strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one, whole_one, rtol=1e-3, atol=1e-3)  # the hooks are gone, and did something


@pytest.mark.parametrize("task", TASKS)
def test_gradients_of_the_masks_are_those_of_scaled_weights(whole, task, monkeypatch):
    """The same factor written into the weights: its derivative by finite differences, in float64."""
    model = whole.for_task(task).double().eval()
    batch = batch_of(model, task)
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    groups = model.groups()
    masks = Masks(groups, rules.weight_costs(groups), 0.5, 10, 2, 1)
    masks.alphas = {name: alpha.detach().double().requires_grad_() for name, alpha in masks.alphas.items()}
    with monkeypatch.context() as patch, multiplied(groups, masks.alphas):
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the hooks compute in float32
        torch.manual_seed(0)
        model.loss(task, batch).backward()
    step = 1e-4
    for group in groups[:: max(1, len(groups) // 5)]:
        unit = 1
        change = []
        for sign in (1, -1):
            copy = whole.for_task(task).double().eval()
            inner = next(g for g in copy.groups() if g.name == group.name).inner
            heads = group.shape[0] if group.kind == "attention" else 1
            done = set()
            with torch.no_grad():
                for linear, part in inner:
                    rows = torch.arange(heads) * group.shape[-1] + unit + part * heads * group.shape[-1]
                    for tensor in (linear.weight, linear.bias):
                        if (id(tensor), part) not in done:  # encoder and decoder share it: scaled once
                            tensor[rows] *= 1 + sign * step
                            done.add((id(tensor), part))
            change.append(float(loss_of(copy, task, batch)))
        expected = (change[0] - change[1]) / (2 * step)
        assert float(masks.alphas[group.name].grad[unit]) == pytest.approx(expected, rel=1e-4, abs=1e-7), group.name


def test_one_mask_for_what_encoder_and_decoder_share(whole):
    groups = whole.groups()
    shared = [g for g in groups if len(g.names) == 2]
    assert {g.name.split(".")[-2] for g in shared if g.kind == "attention"} == {"crossattention"}
    alphas = {g.name: torch.ones(g.shape[-1]) for g in groups}
    with multiplied(groups, alphas):
        for group in shared:
            assert all(len(linear._forward_hooks) == 1 for linear, _ in group.inner)
    assert not any(m._forward_hooks for m in whole.modules())


# --- searches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_a_search_ends_where_cutting_changes_nothing(whole, task, precision, monkeypatch):
    made = []
    monkeypatch.setattr(module, "Masks", lambda *args: made.append(Masks(*args)) or made[-1])
    model = whole.for_task(task)
    before = bits(model)
    options = dataclasses.replace(QUICK, training=dataclasses.replace(FAST, precision=precision))
    plan, info = search(model, task, data_of(task), 0.5, options)
    (masks,) = made
    groups = model.groups()
    check_plan(plan, groups, model.towers())
    assert {float(value) for alpha in masks.alphas.values() for value in alpha.detach()} == {0.0, 1.0}
    for group in groups:
        kept = plan.units[group.name]
        assert torch.equal(kept, (masks.alphas[group.name] == 1).expand(group.shape))
        assert int(kept.sum(-1).flatten()[0]) % 4 == 0
    assert info["achieved"] == removed(plan, groups, model.towers())["achieved"] == pytest.approx(0.5, abs=0.02)
    assert (info["interval"], info["updates"], info["steps"], info["lr"]) == (2, 4, 6, 1e-3)  # steps 0, 2, 4, 5
    assert not same(before, bits(model)) and not model.training

    batch = batch_of(model, task)
    with multiplied(groups, masks.alphas):
        masked = outputs(model, task, batch)
    cut(model, plan)
    for one, other in zip(masked, outputs(model, task, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def watch(monkeypatch) -> list[dict[str, Tensor]]:
    """The gradients of the masks at every step, as autograd gives them."""
    seen = []
    after = Masks.after_backward

    def watched(self):
        seen.append({name: alpha.grad.clone() for name, alpha in self.alphas.items()} | {"": self})
        assert all(alpha.grad.dtype == torch.float32 for alpha in self.alphas.values())
        after(self)

    monkeypatch.setattr(Masks, "after_backward", watched)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_add_up_and_are_never_cleared(whole, monkeypatch, precision):
    seen = watch(monkeypatch)
    model = whole.for_task("retrieval")
    options = dataclasses.replace(QUICK, training=dataclasses.replace(FAST, precision=precision))
    plan, _ = search(model, "retrieval", data_of("retrieval"), 0.5, options)
    assert len(seen) == 6
    masks = seen[0].pop("")
    total = {name: torch.zeros_like(gradient) for name, gradient in seen[0].items()}
    for step in seen:
        step.pop("", None)
        assert all(bool(gradient.any()) for gradient in step.values())  # no tower is left out
        for name, gradient in step.items():
            total[name] += gradient
    assert masks.gradients.keys() == total.keys() == {group.name for group in model.groups()}
    for name, gradient in masks.gradients.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, total[name])
    scores = rules.standardise(total, masks.kinds)
    final = rules.keep_multiples(scores, masks.costs, 0.5, 4)
    assert all(torch.equal(plan.units[name], kept.expand(plan.units[name].shape)) for name, kept in final.items())
    last = rules.keep_multiples(rules.standardise(seen[-1], masks.kinds), masks.costs, 0.5, 4)
    assert any(not torch.equal(final[name], last[name]) for name in final)  # the last step alone would say otherwise


def test_masks_fade_by_the_schedule(whole, monkeypatch):
    seen = []
    original = Masks._set

    def watched(self, values):
        seen.append(min(float(value.min()) for value in values.values()))
        original(self, values)

    monkeypatch.setattr(Masks, "_set", watched)
    search(whole.for_task("captioning"), "captioning", data_of("captioning"), 0.4, QUICK)
    assert seen == pytest.approx([1 - rules.schedule(0.4, step, 6) / 0.4 for step in (0, 2, 4, 5)]) and seen[-1] == 0.0


def test_weights_of_removed_units_learn_while_they_fade(whole):
    """The rate is constant, all weights are trained, and the gradient norm of the masks clips nothing."""
    model = whole.for_task("retrieval")
    before = bits(model)
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append({group["lr"] for group in self.param_groups})
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        assert float(norm) <= 1.0 + 1e-4
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        search(model, "retrieval", data_of("retrieval"), 0.5, QUICK)
    assert rates == [{1e-3}] * 6
    changed = [name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])]
    assert {f"{layer.name}.weight" for layer in model.layers()} <= set(changed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_search_ends_in_the_same_bits(whole, task, precision, tmp_path, monkeypatch):
    options = dataclasses.replace(QUICK, training=dataclasses.replace(FAST, precision=precision))
    model = whole.for_task(task)
    plan, info = search(model, task, data_of(task), 0.5, options)

    loss, calls = Blip.loss, []

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, *args)

    again = whole.for_task(task)
    monkeypatch.setattr(Blip, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(again, task, data_of(task), 0.5, options, state_dir=tmp_path / "state", save_seconds=0)
    monkeypatch.setattr(Blip, "loss", loss)
    assert not any(m._forward_hooks for m in again.modules())

    again = whole.for_task(task)
    same_plan, resumed = search(again, task, data_of(task), 0.5, options, state_dir=tmp_path / "state")
    assert 1 <= resumed.pop("resumed_from") <= 4 and info.pop("resumed_from") == 0
    assert resumed.pop("seconds") > 0 and info.pop("seconds") > 0
    assert resumed == info
    assert same(bits(model), bits(again)) and same(plan.units, same_plan.units)


def test_a_state_of_another_search_is_not_continued(whole, tmp_path):
    data = data_of("retrieval")
    search(whole.for_task("retrieval"), "retrieval", data, 0.5, QUICK, state_dir=tmp_path, save_seconds=0)
    kept = (tmp_path / "state.pt").read_bytes()

    def resumed_from(ratio: float = 0.5, **changes) -> int:
        (tmp_path / "state.pt").write_bytes(kept)
        options = dataclasses.replace(QUICK, **changes)
        return search(whole.for_task("retrieval"), "retrieval", data, ratio, options, state_dir=tmp_path)[1][
            "resumed_from"
        ]

    assert resumed_from() > 0
    assert resumed_from(ratio=0.6) == 0
    assert resumed_from(interval=3) == 0
    assert resumed_from(round_to=8) == 0
    assert resumed_from(costs="heads") == 0


def test_seeds_decide_everything(whole):
    def found(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = whole.for_task("retrieval")
        options = dataclasses.replace(QUICK, training=dataclasses.replace(FAST, seed=seed))
        return search(model, "retrieval", data_of("retrieval"), 0.5, options)[0].units, bits(model)

    (one, weights), (two, same_weights), (other, _) = found(0), found(0), found(1)
    assert same(one, two) and same(weights, same_weights) and not same(one, other)


def test_a_model_learns_while_it_is_searched(whole):
    model = whole.for_task("retrieval")
    options = SearchOptions(dataclasses.replace(FAST, max_steps=60), lr=2e-3, interval=2, round_to=1)
    plan, info = search(model, "retrieval", data_of("retrieval"), 0.3, options)
    assert info["loss"] < info["first_loss"]
    assert info["achieved"] == pytest.approx(0.3, abs=0.02)
    assert (
        len({int(kept.sum()) for kept in plan.units.values()}) > 3
    )  # widths follow the gradients, not a uniform ratio


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind"),
    [("retrieval", "clip"), ("zero-shot", "siglip"), ("classification", "vit"), ("classification", "gated")],
)
def test_every_family_is_searched(task, kind, duals, vits):
    """Of gated networks (DINOv2's SwiGLU) both halves of the first Linear are masked."""
    model = load(str((vits if task == "classification" else duals)(kind).folder)).for_task(task)
    if task == "classification":
        images = scenes_classes("train", 12).images
        data = ClassData("five", images, [i % 5 for i in range(12)], model.labels)
    else:
        data = scenes_classes("train", 12) if task == "zero-shot" else data_of(task)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Masks", lambda *args: made.append(Masks(*args)) or made[-1])
        plan, info = search(model, task, data, 0.4, dataclasses.replace(QUICK, round_to=1))
    assert info["achieved"] == pytest.approx(0.4, abs=0.03)
    assert all(bool(gradient.any()) for gradient in made[0].gradients.values())
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def outputs_of() -> list[Tensor]:
        with torch.no_grad():
            if task == "classification":
                return [model.logits(pixels)]
            ids, mask = (torch.from_numpy(array) for array in model.processor.texts(["a red circle", "two", "a"]))
            return [model.image_embeds(pixels), model.text_embeds(ids, mask)]

    groups = model.groups()
    dense = outputs_of()
    with multiplied(groups, made[0].alphas):
        masked = outputs_of()
    cut(model, plan)
    for one, other, before in zip(masked, outputs_of(), dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one, before, atol=1e-4)


# --- options ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_authors(whole):
    model = whole.for_task("retrieval")
    for ratio, epochs in ((0.3, 6), (0.5, 6), (0.75, 9), (0.625, 7.5), (0.9, 9)):
        assert _authors(ratio)["retrieval"] == {"lr": 1e-5, "epochs": epochs, "batch_size": 32}
    assert {task: p.interval for task, p in PUBLISHED.items() if task in TASKS} == {
        "retrieval": 200, "captioning": 100, "vqa": 1000
    }  # fmt: skip
    data = CaptionData("many", np.zeros(1000), [["a"] * 5] * 1000)
    seen = {}

    def stop(model, task, data, settings, *args, **kwargs):
        seen.update(settings=settings, watcher=kwargs["watcher"])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            search(model, "retrieval", data, 0.5, SearchOptions(FinetuneOptions(device="cpu"), round_to=1))
        assert (seen["settings"].lr, seen["settings"].steps) == (1e-5, round(6 * 5000 / 32))
        assert seen["watcher"].interval == round(6 * 5000 / 32) // 50  # shorter than theirs
        with pytest.raises(KeyboardInterrupt):
            search(model, "retrieval", data, 0.5, SearchOptions(FinetuneOptions(max_steps=20_000, device="cpu")))
        assert seen["watcher"].interval == 200


@pytest.mark.parametrize(
    ("lr", "of_training", "suggested", "expected"),
    [
        (None, None, None, 1e-5),  # the authors'
        (None, None, 1e-3, 3e-4),
        (None, 2e-3, 1e-3, 6e-4),
        (None, 2e-3, None, 6e-4),
        (5e-4, 2e-3, 1e-3, 5e-4),
        (5e-4, None, None, 5e-4),
    ],
)
def test_the_constant_rate_is_below_the_peak_of_fine_tuning(whole, lr, of_training, suggested, expected):
    model = whole.for_task("retrieval")
    model.options = {"finetune": {"lr": suggested}} if suggested else {}
    options = SearchOptions(dataclasses.replace(FAST, max_steps=1, lr=of_training), lr=lr, round_to=1)
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append({group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        _, info = search(model, "retrieval", data_of("retrieval"), 0.5, options)
    assert info["lr"] == pytest.approx(expected) and rates == [{info["lr"]}]


def test_costs_of_the_paper(whole):
    model = whole.for_task("retrieval")
    plan, info = search(model, "retrieval", data_of("retrieval"), 0.5, dataclasses.replace(QUICK, costs="heads"))
    groups = model.groups()
    costs = rules.head_costs(groups)
    assert set(costs.values()) == {6.0, 1.0}
    total = sum(costs[g.name] * g.shape[-1] for g in groups)
    kept = sum(
        costs[g.name] * int(plan.units[g.name].sum()) / (g.shape[0] if g.kind == "attention" else 1) for g in groups
    )
    assert 1 - kept / total == pytest.approx(0.5, abs=0.03)
    assert info["achieved"] == removed(plan, groups, model.towers())["achieved"]


@pytest.mark.parametrize(
    ("ratio", "changes"),
    [
        (0.0, {}),
        (1.0, {}),
        (0.99, {}),
        (0.8, {"round_to": 8}),
        (0.5, {"round_to": 0}),
        (0.5, {"interval": 0}),
        (0.5, {"costs": "flops"}),
        (0.5, {"training": dataclasses.replace(FAST, lr=-1.0)}),
        (0.5, {"lr": 0.0}),
        (0.5, {"lr": float("nan")}),
    ],
)
def test_wrong_requests_are_refused(whole, ratio, changes):
    with pytest.raises(RequestError) as caught:
        search(
            whole.for_task("retrieval"), "retrieval", data_of("retrieval"), ratio, dataclasses.replace(QUICK, **changes)
        )
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_ends_in_one_line(whole):
    model = whole.for_task("retrieval")
    model.text_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(RequestError, match=r"^the retrieval loss became nan at step 1 of 6"):
        search(model, "retrieval", data_of("retrieval"), 0.5, QUICK)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", TASKS)
def test_on_cuda(whole, task):
    model = whole.for_task(task)
    options = dataclasses.replace(QUICK, training=dataclasses.replace(FAST, device="cuda", precision="auto"))
    plan, info = search(model, task, data_of(task), 0.5, options)
    assert model.device.type == "cuda" and info["device"] == "cuda"
    cut(model, plan)
    assert all(list(kept.shape) for kept in plan.units.values())
    assert torch.isfinite(loss_of(model, task, batch_of(model, task)))
