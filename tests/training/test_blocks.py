"""Layers that are computed twice, or compiled, compute the same."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from vlprune.data.scenes import scenes_captions
from vlprune.errors import MachineError, RequestError
from vlprune.models.dual import DualEncoder
from vlprune.training import blocks
from vlprune.training.blocks import compiled, recomputed
from vlprune.training.distill import Teacher
from vlprune.training.finetune import FinetuneOptions, finetune


OPTIONS = FinetuneOptions(max_steps=3, lr=1e-3, batch_size=8, precision="fp32", device="cpu")


@pytest.fixture(autouse=True)
def no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run op by op: inductor would call a C++ compiler for half a minute."""
    monkeypatch.setattr(blocks, "BACKEND", "eager")


@pytest.fixture(scope="session")
def blip(small_models: dict[str, Any]) -> Any:
    from vlprune.models import load

    return load(str(small_models["pretraining"]))


def trained(model: Any, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    model = copy.deepcopy(model).for_task("retrieval")
    generator = torch.Generator().manual_seed(0)
    masks = {layer.name: torch.rand(layer.weight.shape, generator=generator) < 0.3 for layer in model.layers()}
    options = dataclasses.replace(OPTIONS, **changes)
    info = finetune(model, "retrieval", scenes_captions("train", 20), masks, options)
    for layer in model.layers():
        assert not layer.weight.detach()[~masks[layer.name]].any()
    return model, model.state_dict(), info


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"compile": True}])
@pytest.mark.parametrize("name", ["small_clip", "blip"])
def test_weights_are_those_without(name: str, changes: dict[str, bool], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    if "compile" in changes:  # which draws other numbers
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    _, plain, before = trained(model)
    tuned, state, info = trained(model, **changes)
    assert info["loss"] == pytest.approx(before["loss"], abs=1e-5)
    for key, tensor in plain.items():
        torch.testing.assert_close(state[key], tensor, atol=1e-5, rtol=1e-4)
    assert not any("forward" in vars(m) or "feed_forward_chunk" in vars(m) for m in tuned.modules())


@pytest.mark.parametrize("name", ["small_clip", "blip"])
def test_recomputed_layers_keep_less(name: str, request: pytest.FixtureRequest) -> None:
    model = copy.deepcopy(request.getfixturevalue(name)).for_task("retrieval").train()
    data = scenes_captions("train", 8)
    batch = model.caption_batch(list(data.images), [texts[0] for texts in data.captions], range(8))

    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss("retrieval", batch)
        loss.backward()
        return sum(sizes.values()) - sum(p.nbytes for p in model.parameters())

    plain = kept()
    with recomputed(model):
        assert kept() < 0.6 * plain


def test_every_layer_is_compiled_and_afterwards_none(small_clip: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = copy.deepcopy(small_clip), []
    monkeypatch.setattr(torch, "compile", lambda f, backend: lambda *args: ran.append(f.__self__) or f(*args))
    images = torch.zeros(1, 3, 32, 32)
    with compiled(model), recomputed(model):
        model.image_tower().embeds({"pixel_values": images})
    assert ran == list(model.vision_model.encoder.layers)
    model.image_tower().embeds({"pixel_values": images})
    assert len(ran) == 3


def test_what_cannot_be_compiled_is_one_line(small_clip: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(blocks, "BACKEND", broken)
    torch._dynamo.reset()
    with pytest.raises(MachineError, match="--compile: .*no compiler at all.*leave it out") as error:
        trained(small_clip, compile=True)
    assert "\n" not in str(error.value)


def test_a_teacher_and_compiled_layers_do_not_go_together(small_clip: DualEncoder) -> None:
    student = copy.deepcopy(small_clip).for_task("retrieval")
    teacher = Teacher(copy.deepcopy(small_clip))
    options = dataclasses.replace(OPTIONS, compile=True)
    with pytest.raises(RequestError, match="--compile"):
        finetune(student, "retrieval", scenes_captions("train", 8), {}, options, teacher=teacher)


def test_a_teacher_reads_recomputed_layers(small_clip: DualEncoder) -> None:
    states = []
    for again in (False, True):
        student = copy.deepcopy(small_clip).for_task("retrieval")
        options = dataclasses.replace(OPTIONS, gradient_checkpointing=again)
        finetune(student, "retrieval", scenes_captions("train", 20), {}, options, teacher=Teacher(small_clip))
        states.append(student.state_dict())
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, atol=1e-6, rtol=1e-5)
