"""Distillation: its losses by hand, what they read from both models, and who learns."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from vlprune.data.scenes import scenes_captions, scenes_vqa
from vlprune.errors import RequestError
from vlprune.models.loading import load
from vlprune.structured import Plan, cut
from vlprune.training.distill import DistillWeights, Teacher, feature_loss, hidden_loss, recorded, similarity_loss
from vlprune.training.finetune import FinetuneOptions, finetune


FAST = FinetuneOptions(max_steps=4, lr=1e-3, batch_size=8, precision="fp32", device="cpu")


@pytest.fixture(scope="module", params=["blip", "clip", "siglip"])
def teacher(request, small_models):
    """Not to be changed."""
    if request.param != "blip":
        return request.getfixturevalue(f"small_{request.param}").for_task("retrieval")
    whole = load(str(small_models["pretraining"]), family=None, image_size=None, seed=0)
    return whole.for_task("retrieval")


@pytest.fixture(scope="module")
def data():
    return scenes_captions("train", 20)


@pytest.fixture(scope="module")
def batch(teacher, data):
    return teacher.caption_batch([data.images[i] for i in range(6)], [c[0] for c in data.captions[:6]], range(6))


def student_of(teacher: nn.Module, noise: float = 0.05) -> nn.Module:
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return student


def terms_of(teacher: Teacher, student: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with recorded(student) as states:
        student.loss("retrieval", batch)
    return teacher.terms(student, batch, states)


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in terms.items()}


# --- losses -----------------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_losses_by_hand():
    assert float(feature_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))) == 0.5  # half of mean(1, 1)
    one, other = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 3.0], [9.0, 9.0]]])
    assert float(hidden_loss([one], [other], torch.tensor([[1, 0]]))) == 2.5  # half of mean(1, 9); padding is left out
    assert float(hidden_loss([one, one], [other, one], None)) == (5 + 81) / 4  # a mean over tokens, a sum over layers
    student, target = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    assert float(similarity_loss(student, target)) == pytest.approx(torch.tensor(2.0).log())


def test_losses_are_smallest_for_equal_models():
    target = draw(5, 5)
    entropies = [-(view.softmax(1) * view.log_softmax(1)).sum(1).mean() for view in (target, target.T)]
    same = target.clone().requires_grad_()
    loss = similarity_loss(same, target)
    assert float(torch.autograd.grad(loss, same)[0].abs().max()) < 1e-12
    loss = loss.detach()
    assert float(loss) == pytest.approx(float(sum(entropies)) / 2)
    for seed in range(1, 6):
        assert float(similarity_loss(target + 0.1 * draw(5, 5, seed=seed), target)) > float(loss)
    assert float(feature_loss(target, target)) == 0 == float(hidden_loss([draw(2, 3, 4)], [draw(2, 3, 4)], None))


def test_gradients_equal_finite_differences():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    states, others = [draw(2, 3, 4, seed=i).requires_grad_() for i in range(2)], [draw(2, 3, 4, seed=9)] * 2
    assert torch.autograd.gradcheck(lambda *mine: hidden_loss(mine, others, mask), states)
    assert torch.autograd.gradcheck(lambda mine: similarity_loss(mine, draw(4, 4, seed=5)), draw(4, 4).requires_grad_())
    assert torch.autograd.gradcheck(lambda mine: feature_loss(mine, draw(4, 3, seed=5)), draw(4, 3).requires_grad_())


# --- models -----------------------------------------------------------------------------------------------------------


def test_what_is_recorded_are_the_states_of_the_towers(teacher, batch):
    with recorded(teacher) as states:
        teacher.loss("retrieval", batch)
    for name in ("image", "text"):
        steps = getattr(teacher, f"{name}_tower")()
        state = steps.start(batch)
        assert len(states[name]) == len(steps.layers)
        for layer, seen in zip(steps.layers, states[name], strict=True):
            state = layer(state)
            assert torch.equal(state["x"], seen)
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_model_has_nothing_to_learn_from_itself(teacher, batch):
    terms = values(terms_of(Teacher(teacher), teacher, batch))
    assert terms["feat"] == terms["hid"] == 0
    others = [values(terms_of(Teacher(teacher), student_of(teacher, noise), batch)) for noise in (0.02, 0.1)]
    for name in ("sim", "feat", "hid"):
        assert terms[name] < others[0][name] < others[1][name]


def test_the_loss_is_the_weighted_sum(teacher, batch):
    student = student_of(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of BLIP's negatives
        task = student.loss("retrieval", batch).detach()
        torch.manual_seed(0)
        found = Teacher(teacher, weights=DistillWeights(2.0, 30.0, 0.5)).loss(student, batch).detach()
        torch.manual_seed(0)
        assert float(Teacher(teacher, weights=DistillWeights(0, 0, 0)).loss(student, batch).detach()) == float(task)
    terms = values(terms_of(Teacher(teacher), student, batch))
    assert float(found) == pytest.approx(float(task) + 2 * terms["sim"] + 30 * terms["feat"] + 0.5 * terms["hid"])
    assert DistillWeights() == DistillWeights(1.0, 1000.0, 1.0)


def test_only_the_student_learns(teacher, batch):
    student = student_of(teacher)
    for name in ("sim", "feat", "hid"):
        student.zero_grad()
        terms_of(Teacher(teacher), student, batch)[name].backward()
        grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        towers = [n for n in grads if "encoder.layer" in n]
        assert any("vision" in n for n in towers) and any("text" in n for n in towers), name
        assert any("proj" in n for n in grads if n not in towers) == (name != "hid"), name
        assert ({"temp", "logit_scale"} & grads.keys() != set()) == (name == "sim")
        assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_layers_are_compared_with_those_they_were(teacher, batch):
    depth = {tower.name: tower.depth for tower in teacher.towers()}
    keep = {name: [i for i in range(count) if i != 0] for name, count in depth.items()}
    layers = {name: torch.tensor([i in keep[name] for i in range(count)]) for name, count in depth.items()}
    student = copy.deepcopy(teacher)
    cut(student, Plan(layers=layers))
    guide = Teacher(teacher, keep)
    guide.check(student, "retrieval")
    with recorded(student) as mine:
        student.loss("retrieval", batch)
    with recorded(teacher) as others:
        teacher.loss("retrieval", batch)
    expected = 0.0
    for name, tower in (("image", "vision"), ("text", "text")):
        kept = [others[name][i] for i in keep[tower]]
        expected += float(hidden_loss(mine[name], kept, batch["attention_mask"] if name == "text" else None))
    assert expected > 0
    assert float(terms_of(guide, student, batch)["hid"]) == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_compared(teacher, batch):
    padding = batch["attention_mask"] == 0
    assert padding.any() == (teacher.family != "siglip")  # which reads it
    student = student_of(teacher)
    terms = terms_of(Teacher(teacher), student, batch)["hid"]
    with recorded(student) as states:
        student.loss("retrieval", batch)
    states["text"] = [x.masked_fill(padding[:, :, None], 7.0) for x in states["text"]]
    assert float(Teacher(teacher).terms(student, batch, states)["hid"]) == pytest.approx(float(terms))


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_student_becomes_like_its_teacher(teacher, batch, data):
    student = student_of(teacher)
    guide = Teacher(teacher)
    before, weights = values(terms_of(guide, student, batch)), {n: p.clone() for n, p in teacher.state_dict().items()}
    finetune(student, "retrieval", data, {}, dataclasses.replace(FAST, max_steps=40), teacher=guide)
    after = values(terms_of(guide, student, batch))
    assert after["feat"] < 0.5 * before["feat"]
    assert after["hid"] < before["hid"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training


def test_training_with_a_teacher_resumes_in_the_same_bits(teacher, data, tmp_path, monkeypatch):
    straight, halted = student_of(teacher), student_of(teacher)
    finetune(straight, "retrieval", data, {}, FAST, teacher=Teacher(teacher))
    loss, calls = Teacher.loss, []

    def failing(self, student, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, student, batch)

    monkeypatch.setattr(Teacher, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        finetune(halted, "retrieval", data, {}, FAST, teacher=Teacher(teacher), state_dir=tmp_path, save_seconds=0)
    monkeypatch.undo()

    def again(guide: Teacher):
        model = student_of(teacher)
        told = finetune(model, "retrieval", data, {}, FAST, teacher=guide, state_dir=tmp_path, save_seconds=1e9)
        return model, told["resumed_from"]

    other = student_of(teacher, 0.01)
    for guide in (Teacher(other), Teacher(teacher, weights=DistillWeights(sim=2.0)), None):
        assert again(guide)[1] == 0
    resumed, step = again(Teacher(teacher))
    assert step >= 1  # how many of two steps were saved depends on the time a save takes
    assert all(torch.equal(p, dict(straight.named_parameters())[n]) for n, p in resumed.named_parameters())


# --- requests that cannot be served -----------------------------------------------------------------------------------


def test_layers_that_do_not_match_are_refused_in_one_line(teacher, data):
    student = copy.deepcopy(teacher)
    depth = student.towers()[0].depth
    cut(student, Plan(layers={"vision": torch.arange(depth) > 0}))
    for kept in ({}, {"vision": []}, {"vision": [depth] * (depth - 1)}, {"vision": [-1] * (depth - 1)}):
        with pytest.raises(RequestError, match="vision tower") as error:
            finetune(student, "retrieval", data, {}, FAST, teacher=Teacher(teacher, kept))
        assert "\n" not in str(error.value)


def test_other_tasks_and_families_are_refused_in_one_line(small_models, small_clip, data):
    blip = load(str(small_models["pretraining"]), family=None, image_size=None, seed=0)
    with pytest.raises(RequestError, match="retrieval only"):
        finetune(blip.for_task("vqa"), "vqa", scenes_vqa("train", 20), {}, FAST, teacher=Teacher(blip))
    with pytest.raises(RequestError, match="cannot teach"):
        finetune(blip.for_task("retrieval"), "retrieval", data, {}, FAST, teacher=Teacher(small_clip))
