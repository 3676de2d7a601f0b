import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BlipConfig

from vlprune.data import CaptionData, Question, VqaData
from vlprune.data.scenes import COLORS, VOCABULARY, scenes_captions, scenes_vqa
from vlprune.errors import MachineError, RequestError
from vlprune.models import load
from vlprune.models.blip import Blip, Source, new
from vlprune.models.processor import Processor, word_tokenizer
from vlprune.training import batches as batches_module
from vlprune.training import loop
from vlprune.training.batches import Batches
from vlprune.training.finetune import FinetuneOptions, MaskLock, finetune, settle


TASKS = ("retrieval", "captioning", "vqa")
FAST = FinetuneOptions(max_steps=4, lr=1e-3, batch_size=8, precision="fp32", device="cpu")


@pytest.fixture(scope="session")
def whole() -> Blip:
    """A tied pretraining model of two layers, 32 wide, with dropout in the text towers."""
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
    return new(config, Processor(tokenizer, 16, dec, enc), Source("small", "test"), seed=1)


@pytest.fixture
def model(whole: Blip, request: pytest.FixtureRequest) -> Blip:
    return whole.for_task(getattr(request, "param", "retrieval"))


def data_of(task: str) -> CaptionData | VqaData:
    return scenes_vqa("train", 40) if task == "vqa" else scenes_captions("train", 20)


def random_masks(model: Blip, kept: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer.name: torch.rand(layer.weight.shape, generator=generator) < kept for layer in model.layers()}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["heads", "full"])
@pytest.mark.parametrize("model", TASKS, indirect=True)
def test_pruned_weights_are_zero_after_every_step(model, mode, precision, monkeypatch):
    (task,) = model.tasks
    masks = random_masks(model)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):  # what the step just done left behind, and the gradients of the next
        pruned = [layer.weight.detach()[~masks[layer.name]] for layer in model.layers()]
        seen.append((sum(w.numel() for w in pruned), all(bool((w == 0).all()) for w in pruned)))
        grads = [layer.weight.grad[~masks[layer.name]] for layer in model.layers() if layer.weight.grad is not None]
        assert all(bool((g == 0).all()) for g in grads)
        assert bool(grads) == (mode == "full")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    before = bits(model)
    options = dataclasses.replace(FAST, mode=mode, precision=precision, weight_decay=0.5)
    finetune(model, task, data_of(task), masks, options)
    assert seen == [(zeros, True)] * 4
    for layer in model.layers():
        mask = masks[layer.name]
        assert not layer.weight.detach()[~mask].any()
        kept = torch.equal(layer.weight.detach()[mask], before[f"{layer.name}.weight"][mask])
        assert kept == (mode == "heads"), layer.name


def test_gradients_are_clipped_by_the_kept_weights_alone(model, monkeypatch):
    masks = random_masks(model, kept=0.05)
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(self, parameters, max_norm, **kwargs):
        norms.append((torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm(), max_norm))
        for layer in model.layers():
            assert not layer.weight.grad[~masks[layer.name]].any()
        return clip(parameters, max_norm)

    monkeypatch.setattr(loop.Accelerator, "clip_grad_norm_", watched)
    finetune(model, "retrieval", data_of("retrieval"), masks, FAST)
    assert len(norms) == 4 and all(norm > 0 and limit == 1.0 for norm, limit in norms)


def test_a_revived_weight_is_noticed(model):
    masks = random_masks(model)
    lock = MaskLock(model.layers(), masks)
    with pytest.raises(AssertionError):
        lock.check()
    lock.zero_weights()
    lock.check()
    layer = model.layers()[7]
    place = tuple((~masks[layer.name]).nonzero()[0])
    for value in (1e-38, float("nan"), -1.0):
        layer.weight.data[place] = value
        with pytest.raises(AssertionError):
            lock.check()
    lock.zero_weights()  # fills NaN, too
    lock.check()


@pytest.mark.parametrize("model", ["vqa"], indirect=True)
def test_a_broken_tie_is_noticed(model):
    lock = MaskLock(model.layers(), random_masks(model))
    lock.zero_weights()
    shared = next(layer for layer in model.layers() if len(layer.modules) > 1)
    shared.modules[1].weight = nn.Parameter(torch.ones_like(shared.weight))
    with pytest.raises(AssertionError):
        lock.check()


@pytest.mark.parametrize("model", ["vqa"], indirect=True)
def test_the_tied_model_stays_tied(model, tmp_path):
    masks = random_masks(model)
    layers = [layer for layer in model.layers() if len(layer.modules) == 2]
    assert layers and model.tied
    finetune(model, "vqa", data_of("vqa"), masks, FAST)
    assert model.tied and all(layer.modules[0].weight is layer.modules[1].weight for layer in layers)
    head, words = model.text_decoder.cls.predictions.decoder, model.text_decoder.bert.embeddings.word_embeddings
    assert head.weight is words.weight
    model.save(tmp_path)
    reloaded = load(str(tmp_path))
    assert reloaded.tied and same(bits(model), bits(reloaded))
    for layer in reloaded.layers():
        assert not layer.weight.detach()[~masks[layer.name]].any()


@pytest.mark.parametrize("model", TASKS, indirect=True)
def test_heads_leave_everything_else_bit_identical(model):
    (task,) = model.tasks
    before, heads = bits(model), {id(p) for p in model.head_parameters(task)}
    finetune(model, task, data_of(task), {}, dataclasses.replace(FAST, mode="heads"))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= {n for n, p in model.named_parameters() if id(p) in heads}
    assert not any(n.startswith(("vision_model", "text_encoder", "text_decoder.bert")) for n in changed)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training


def test_masks_must_fit(model):
    name = model.layers()[0].name
    with pytest.raises(RequestError, match="does not have: elsewhere"):
        finetune(model, "retrieval", data_of("retrieval"), {"elsewhere": torch.ones(2, 2)}, FAST)
    with pytest.raises(RequestError, match=r"shape \[2, 2\]"):
        finetune(model, "retrieval", data_of("retrieval"), {name: torch.ones(2, 2)}, FAST)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", TASKS, indirect=True)
def test_an_interrupted_training_ends_in_the_same_bits(whole, model, precision, tmp_path, monkeypatch):
    (task,) = model.tasks
    data, masks = data_of(task), random_masks(model)
    options = dataclasses.replace(FAST, max_steps=7, precision=precision)
    result = finetune(model, task, data, masks, options)

    again = whole.for_task(task)
    loss, calls = Blip.loss, []

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(Blip, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(again, task, data, masks, options, state_dir=tmp_path / "state", save_seconds=0)
    monkeypatch.setattr(Blip, "loss", loss)
    assert all(p.requires_grad for p in again.parameters())
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.pt"]

    again = whole.for_task(task)
    resumed = finetune(again, task, data, masks, options, state_dir=tmp_path / "state")
    assert 1 <= resumed.pop("resumed_from") <= 5 and result.pop("resumed_from") == 0
    assert resumed.pop("seconds") > 0 and result.pop("seconds") > 0
    assert resumed == result
    assert same(bits(model), bits(again))


def test_a_state_of_another_training_is_not_continued(whole, model, tmp_path):
    data, masks = data_of("retrieval"), random_masks(model)
    options = dataclasses.replace(FAST, max_steps=3)

    def resumed_from(options=options, data=data, masks=masks) -> int:
        path = tmp_path / "state.pt"
        kept = path.read_bytes()
        fresh = whole.for_task("retrieval")
        result = finetune(fresh, "retrieval", data, masks, options, state_dir=tmp_path)
        path.write_bytes(kept)
        return result["resumed_from"]

    finetune(model, "retrieval", data, masks, options, state_dir=tmp_path, save_seconds=0)
    assert resumed_from() > 0
    assert resumed_from(options=dataclasses.replace(options, lr=2e-3)) == 0
    assert resumed_from(options=dataclasses.replace(options, max_steps=4)) == 0
    assert resumed_from(masks={}) == 0
    assert resumed_from(data=scenes_captions("train", 21)) == 0
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:5000])
    assert resumed_from() == 0


def test_seeds_decide_everything(whole):
    def trained(seed: int) -> dict[str, torch.Tensor]:
        model = whole.for_task("retrieval")
        finetune(model, "retrieval", data_of("retrieval"), {}, dataclasses.replace(FAST, seed=seed))
        return bits(model)

    torch.manual_seed(5)
    one = trained(0)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the caller's random numbers are left alone
    torch.manual_seed(99)
    assert same(one, trained(0))
    assert not same(one, trained(1))


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TASKS, indirect=True)
def test_a_sparse_model_learns(model):
    (task,) = model.tasks
    images = [Image.new("RGB", (16, 16), rgb) for rgb in COLORS.values()]
    data = CaptionData("colors", images, [[f"a {color} square"] for color in COLORS])
    if task == "vqa":
        questions = [Question(i, "what color is the square?", [color]) for i, color in enumerate(COLORS)]
        data = VqaData("colors", images, questions, list(COLORS))
    for layer in model.layers():
        layer.weight.data *= 6  # fresh weights hardly let the image through
    result = finetune(model, task, data, random_masks(model, 0.3), dataclasses.replace(FAST, max_steps=40, lr=3e-3))
    assert result["loss"] < 0.7 * result["first_loss"]
    assert result["steps"] == 40 and result["seconds"] > 0


def test_a_loss_that_is_not_finite_ends_in_one_line(model):
    model.text_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(
        RequestError, match=r"^the retrieval loss became nan at step 1 of 4: give a lower --lr than 0.001$"
    ):
        finetune(model, "retrieval", data_of("retrieval"), {}, FAST)


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(model: Blip, task: str, data: CaptionData | VqaData, start: int = 0, **options) -> list[dict]:
    settings = settle(dataclasses.replace(FAST, **options), model, task, data)
    with Batches(model, data, settings.batch_size, settings.seed, range(start, settings.steps)) as found:
        return list(found)


def test_an_epoch_shows_every_caption_once(model):
    data = CaptionData("small", [Image.new("RGB", (9, 9))] * 8, [[f"{i} {j}" for j in "abcd"] for i in range(8)])
    told = []
    model.caption_batch = lambda pixels, captions, rows: told.append((captions, rows))
    assert settle(FinetuneOptions(epochs=1, batch_size=4), model, "retrieval", data).steps == 8
    batches(model, "retrieval", data, max_steps=8, batch_size=4)
    assert Counter(c for captions, _ in told for c in captions) == Counter(c for given in data.captions for c in given)
    assert all(len(set(rows)) == 4 for _, rows in told)
    assert all(
        caption.split()[0] == str(row) for captions, rows in told for caption, row in zip(captions, rows, strict=True)
    )
    assert [rows for _, rows in told[:2]] != [rows for _, rows in told[2:4]]


@pytest.mark.parametrize("model", ["vqa"], indirect=True)
def test_questions_about_an_image_come_together_with_it(model):
    images = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(10)]
    questions = [Question(i % 10, f"{i}", [str(i % 10)]) for i in range(60)]
    told = []
    model.vqa_batch = lambda pixels, where, texts, answers: told.append((pixels, where, texts, answers))
    batches(model, "vqa", VqaData("small", images, questions, None), max_steps=5, batch_size=12)
    assert Counter(text for _, _, texts, _ in told for text in texts) == Counter(q.question for q in questions)
    red = model.processor.images(images)[:, 0, 0, 0]
    for pixels, where, texts, answers in told:
        assert len(pixels) <= 7  # 12 questions, in groups of 4 and 2
        for row, text, given in zip(where, texts, answers, strict=True):
            assert pixels[row][0, 0, 0] == red[int(text) % 10] and given == [str(int(text) % 10)]


@pytest.mark.parametrize("model", ["captioning", "vqa"], indirect=True)
def test_batches_from_the_middle_on(model, monkeypatch):
    (task,) = model.tasks
    data = data_of(task)
    whole = batches(model, task, data, max_steps=9)
    for start in (1, 5):
        for one, other in zip(whole[start:], batches(model, task, data, start, max_steps=9), strict=True):
            assert same(one, other)
    monkeypatch.setattr(batches_module, "CACHE", 0)  # as with images that do not fit into memory
    for one, other in zip(whole, batches(model, task, data, max_steps=9), strict=True):
        assert same(one, other)


def test_a_broken_image_is_named(model):
    class Broken(list):
        def __getitem__(self, index):
            raise RequestError(f"broken image {index}: replace it")

    with pytest.raises(RequestError, match="broken image"):
        finetune(model, "retrieval", CaptionData("small", Broken([0] * 9), [["a"]] * 9), {}, FAST)


# --- options ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_authors(model):
    data = CaptionData("many", np.zeros(1000), [["a"] * 5] * 1000)
    settings = settle(FinetuneOptions(), model, "retrieval", data)
    assert (settings.lr, settings.batch_size, settings.weight_decay, settings.mode) == (1e-5, 32, 0.05, "full")
    assert settings.steps == round(6 * 5000 / 32)


@pytest.mark.parametrize(
    ("options", "steps", "lr"),
    [
        ({}, 50, 3e-3),
        ({"max_steps": 7}, 7, 3e-3),
        ({"epochs": 2}, 250, 3e-3),
        ({"epochs": 2, "max_steps": 7, "lr": 1.0}, 7, 1.0),
        ({"epochs": 0.01}, 1, 3e-3),
        ({"max_steps": 10_000}, 10_000, 3e-3),
    ],
)
def test_the_caller_before_the_checkpoint_before_the_authors(model, options, steps, lr):
    model.options = {"finetune": {"lr": 3e-3, "max_steps": 50, "batch_size": 8}}
    data = CaptionData("many", np.zeros(1000), [["a"]] * 1000)
    settings = settle(FinetuneOptions(**options), model, "retrieval", data)
    assert (settings.steps, settings.lr, settings.batch_size) == (steps, lr, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"batch_size": 0},
        {"max_steps": -1},
        {"epochs": float("inf")},
        {"weight_decay": -0.1},
        {"mode": "half"},
        {"precision": "fp8"},
    ],
)
def test_wrong_options_are_refused(model, options):
    with pytest.raises(RequestError) as caught:
        settle(FinetuneOptions(**options), model, "retrieval", data_of("retrieval"))
    assert "\n" not in str(caught.value)


def test_wrong_suggestions_and_data_are_refused(model):
    with pytest.raises(RequestError, match="holds no captions"):
        finetune(model, "retrieval", data_of("vqa"), {}, FAST)
    with pytest.raises(RequestError, match="task"):
        finetune(model, "vqa", data_of("vqa"), {}, FAST)
    with pytest.raises(RequestError, match="nothing to fine-tune"):
        finetune(model, "retrieval", CaptionData("empty", [], []), {}, FAST)
    model.options = {"finetune": {"momentum": 1}}
    with pytest.raises(RequestError, match="momentum"):
        finetune(model, "retrieval", data_of("retrieval"), {}, FAST)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(model):
    with pytest.raises(MachineError, match="CUDA"):
        settle(dataclasses.replace(FAST, device="cuda"), model, "retrieval", data_of("retrieval"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model", TASKS, indirect=True)
def test_on_cuda(model):
    (task,) = model.tasks
    masks = random_masks(model)
    result = finetune(model, task, data_of(task), masks, dataclasses.replace(FAST, device="cuda", precision="auto"))
    assert model.device.type == "cuda" and result["device"] == "cuda"
    for layer in model.layers():
        assert not layer.weight.detach().cpu()[~masks[layer.name]].any()
