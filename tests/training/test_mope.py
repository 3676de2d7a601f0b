"""Module-wise errors: equal to evaluations without caches, of models that are given back as they were."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vlprune.data.scenes import scenes_captions
from vlprune.data.sets import CaptionData
from vlprune.errors import RequestError
from vlprune.models.blip import PROMPT, cross_keys_values, run_text
from vlprune.models.loading import load
from vlprune.structured.mope import load_table, plan_from, save_table
from vlprune.training import mope
from vlprune.training.mope import Evaluation, MopeOptions, choose_pairs, measure, neuron_groups, neuron_importance


OPTIONS = MopeOptions(pairs=12, groups=3, candidates=3, batch_size=5, seed=1)


@pytest.fixture(scope="module")
def data() -> CaptionData:
    return scenes_captions("train", 14)


@pytest.fixture(scope="module")
def whole(small_models):
    """A BLIP with all three ways to retrieve; not to be changed."""
    return load(str(small_models["pretraining"]), family=None, image_size=None, seed=0)


@pytest.fixture(scope="module")
def table(whole, data):
    return measure(whole, data, OPTIONS)


# --- evaluation without caches ----------------------------------------------------------------------------------------


@contextmanager
def blocked(group, units):
    """Zero what units put out on its way into the Linears that read it; weights are not touched."""

    def hook(module, inputs):
        kept = torch.ones(inputs[0].shape[-1])
        width = group.shape[1] if group.kind == "attention" else 1
        for unit in units.tolist():
            kept[unit * width : (unit + 1) * width] = 0
        return (inputs[0] * kept,)

    handles = [linear.register_forward_pre_hook(hook) for linear in group.outer]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def brute_force(model, data, options, candidates=None) -> SimpleNamespace:
    """Recall and loss by the model's own functions, one image at a time where captions meet images.

    `candidates` are those found with all modules; None finds them.
    """
    pairs = choose_pairs(data, options.pairs, options.seed)
    texts = [text for _, text in pairs]
    pixels = model.pixels([data.images[i] for i, _ in pairs])
    states = model.image_states(pixels) if model.family == "blip" else pixels
    recalls, losses = [], []
    if "retrieval" in model.tasks:
        batch = model.caption_batch(pixels.numpy(), texts, range(len(texts)))
        text = model.text_embeds(batch["input_ids"], batch["attention_mask"])
        similarity = (model.image_embeds(states) @ text.T).double().numpy()
        found = []
        for view in (similarity, similarity.T):
            ranks = [sum(row >= row[i]) for i, row in enumerate(view)]
            found += [np.mean([rank <= k for rank in ranks]) for k in (1, 5, 10)]
        recalls.append(np.mean(found))
        scale = 1 / float(model.temp) if model.family == "blip" else float(model.logit_scale.exp())
        logits = torch.from_numpy(similarity) * scale
        logs = [view.log_softmax(1).diagonal().mean() for view in (logits, logits.T)]
        losses.append(-float(logs[0] + logs[1]) / 2)
        if candidates is None:
            order = np.argsort(-np.where(np.eye(len(pairs)), 9.0, similarity), axis=1, kind="stable")
            candidates = order[:, : options.candidates]
    for task, part in (("retrieval", "text_encoder"), ("captioning", "text_decoder")):
        if model.family != "blip" or task not in model.tasks:
            continue
        scores = np.empty(candidates.shape)
        for i, chosen in enumerate(candidates):
            if part == "text_encoder":
                ids, mask = map(torch.from_numpy, model.processor.texts([texts[c] for c in chosen], "enc", 35))
                logits = model.itm_logits(ids, mask, cross_keys_values(model.text_encoder, states[i : i + 1]))
                scores[i] = logits[:, 1] - logits[:, 0]
                continue
            bert, given = model.text_decoder.bert, len(model.processor.prompt_ids(PROMPT))
            ids, mask = map(torch.from_numpy, model.processor.texts([PROMPT + texts[c] for c in chosen], "dec", 35))
            out, _ = run_text(bert, ids, mask, causal=True, cross=cross_keys_values(bert, states[i : i + 1]))
            logs = model.lm_logits(out).log_softmax(-1)
            for row, length in enumerate(mask.sum(1).tolist()):
                scores[i, row] = np.mean([float(logs[row, t - 1, ids[row, t]]) for t in range(given, length)])
        recalls.append(np.mean([all(row[1:] < row[0]) for row in scores]))
        chances = torch.from_numpy(scores).log_softmax(1)[:, 0]
        losses.append(-float(chances.mean()) if part == "text_encoder" else -scores[:, 0].mean())
    return SimpleNamespace(recall=np.mean(recalls), loss=np.mean(losses), candidates=candidates)


def check_against_brute_force(model, data, options, table, every: int = 1):
    """Hold errors against evaluations without caches; `every` thins heads and neuron groups out."""
    full = brute_force(model, data, options)
    assert table.metadata["recall"] == pytest.approx(full.recall, abs=1e-6)
    assert table.metadata["loss"] == pytest.approx(full.loss, abs=1e-5)

    def compare(found, changed):
        without = brute_force(changed, data, options, full.candidates)
        assert float(found[0]) == pytest.approx(full.recall - without.recall, abs=1e-6)
        assert float(found[1]) == pytest.approx(without.loss - full.loss, abs=1e-5)

    for group in model.groups():
        parts = table.members.get(group.name) or torch.arange(group.shape[0]).split(1)
        for index in range(0, len(parts), every):
            with blocked(group, parts[index]):
                compare(table.units[group.name][index], model)
    for tower in model.towers():
        for layer in range(tower.depth):
            shorter = copy.deepcopy(model)
            for path in tower.stacks:
                del shorter.get_submodule(path)[layer]
            compare(table.layers[tower.name][layer], shorter)


def test_errors_equal_evaluations_without_caches(whole, data, table):
    assert table.metadata["ways"] == ["embeddings", "matching", "likelihood"]
    assert {(len(e), g.kind) for g in whole.groups() for e in [table.units[g.name]]} == {(2, "attention"), (3, "ffn")}
    check_against_brute_force(whole, data, OPTIONS, table)
    errors = torch.cat([*table.units.values(), *table.layers.values()])
    assert (errors[:, 0] != 0).any() and (errors[:, 1] != 0).all()  # every module takes part in some way


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_errors_of_single_task_models_equal_evaluations_without_caches(whole, data, task):
    model = whole.for_task(task)
    found = measure(model, data, OPTIONS, stage="task")
    assert found.metadata["ways"] == (["embeddings", "matching"] if task == "retrieval" else ["likelihood"])
    assert found.metadata["stage"] == "task"
    if task == "retrieval":
        check_against_brute_force(model, data, OPTIONS, found, every=2)
    errors = torch.cat([*found.units.values(), *found.layers.values()])
    assert (errors[:, 1] != 0).all()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_errors_of_dual_encoders_equal_evaluations_without_caches(family, data, request):
    model = request.getfixturevalue(f"small_{family}")
    found = measure(model, data, OPTIONS)
    assert found.metadata["ways"] == ["embeddings"]
    check_against_brute_force(model, data, OPTIONS, found)


def test_errors_of_clip_tiny_equal_evaluations_without_caches(data):
    model = load("clip-tiny", family=None, image_size=None, seed=0)
    found = measure(model, data, OPTIONS)
    check_against_brute_force(model, data, OPTIONS, found, every=2)


def test_evaluations_run_only_what_comes_after_the_change(whole, data, monkeypatch):
    evaluation = Evaluation(whole, data, OPTIONS)
    ran = []
    for name, steps in evaluation.steps.items():
        for index, layer in enumerate(steps.layers):

            def counted(state, name=name, index=index, layer=layer):
                ran.append((name, index))
                return layer(state)

            steps.layers[index] = counted
    groups = {g.name: g for g in whole.groups()}
    evaluation.enter("vision")
    assert not ran
    evaluation.advance(0)
    assert set(ran) == {("image", 0)}
    ran.clear()
    evaluation.score(1, groups["vision_model.encoder.layers.1.mlp"])
    assert set(ran) == {("image", 1)} | {(way, i) for way in ("matching", "likelihood") for i in range(2)}
    ran.clear()
    evaluation.enter("text")
    evaluation.score(0)  # without the layer
    assert set(ran) == {(name, 1) for name in ("text", "matching", "likelihood")}
    evaluation.advance(0)
    ran.clear()
    evaluation.score(1, groups["text_encoder.encoder.layer.1.crossattention.self"])
    assert set(ran) == {("matching", 1), ("likelihood", 1)}
    ran.clear()
    evaluation.score(1, groups["text_decoder.bert.encoder.layer.1.attention.self"])
    assert set(ran) == {("likelihood", 1)}
    ran.clear()
    evaluation.score(1, groups["text_encoder.encoder.layer.1.attention.self"])
    assert set(ran) == {("text", 1), ("matching", 1)}


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_model_is_given_back_as_it_was(whole, data):
    model = copy.deepcopy(whole).train()
    model.itm_head.eval()
    frozen = model.text_proj.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    measure(model, data, MopeOptions(pairs=3, groups=1, candidates=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.vision_model.training and not model.itm_head.training
    assert not frozen.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_is_restored_when_an_evaluation_fails(whole, data, monkeypatch):
    model = copy.deepcopy(whole)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(Evaluation, "score", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model, data, OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_measuring_again_gives_the_same_table(whole, data, table, tmp_path):
    again = measure(whole, data, OPTIONS)
    for name in ("a", "b"):
        save_table(tmp_path / name, again if name == "a" else table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_table_fits_the_model_it_was_measured_on(whole, data, table, tmp_path):
    save_table(tmp_path / "table", table)
    from vlprune.models.family import fingerprint

    model = fingerprint(whole.layers())
    found = load_table(tmp_path / "table", whole.groups(), whole.towers(), model)
    for ratio in (0.2, 0.5):
        assert plan_from(found, whole.groups(), whole.towers(), ratio).units
    task = whole.for_task("captioning")
    with pytest.raises(RequestError, match="another model"):
        load_table(tmp_path / "table", task.groups(), task.towers())


def test_modules_without_effect_have_no_error(whole, data):
    model = copy.deepcopy(whole)
    dead = model.vision_model.encoder.layers[1]
    with torch.no_grad():
        dead.mlp.fc2.weight[:, :40] = 0.0
        dead.self_attn.projection.weight[:, 16:] = 0.0  # of two heads the second
    found = measure(model, data, OPTIONS)
    members = found.members["vision_model.encoder.layers.1.mlp"]
    idle = [i for i, group in enumerate(members) if (group < 40).all()]
    assert idle and all(i > 0 for i in idle)  # their Taylor importance is zero: they come last
    assert (found.units["vision_model.encoder.layers.1.mlp"][idle] == 0).all()
    assert (found.units["vision_model.encoder.layers.1.self_attn"][1] == 0).all()
    assert (found.units["vision_model.encoder.layers.1.self_attn"][0] != 0).any()


def test_pairs_are_drawn_without_a_caption_twice(data):
    texts = [["a", "b"], ["a"], ["a"], ["b"], ["c", "a"], ["c"]]
    small = CaptionData("small", list(range(6)), texts)
    for seed in range(20):
        pairs = choose_pairs(small, 6, seed)
        assert len({text for _, text in pairs}) == len(pairs) == len({image for image, _ in pairs}) <= 3
        assert all(text in texts[image] for image, text in pairs)
        assert choose_pairs(small, 2, seed) == pairs[:2]
    assert len({tuple(choose_pairs(data, 5, seed)) for seed in range(3)}) == 3


def test_ties_count_against_the_model():
    vectors = torch.eye(4)
    recall, loss = mope.retrieval_score(vectors, vectors, 2.0)
    assert float(recall) == 1.0
    assert float(loss) == pytest.approx(float(np.log(3 + np.exp(2.0)) - 2.0))
    same = torch.ones(12, 1)
    recall, loss = mope.retrieval_score(same, same, 2.0)
    assert float(recall) == 0.0 and float(loss) == pytest.approx(np.log(12))
    # image 1 finds text 0 first, text 1 still its image
    texts = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    recall, _ = mope.retrieval_score(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), texts, 1.0)
    assert float(recall) == pytest.approx((1 / 2 + 1 / 2 + 4) / 6)


# --- neurons ----------------------------------------------------------------------------------------------------------


def test_importance_is_what_the_loss_changes_by_to_first_order(whole, data):
    model = copy.deepcopy(whole.for_task("captioning")).double()  # its loss draws nothing at random
    pairs = choose_pairs(data, 6, 0)
    batches = [
        model.caption_batch([data.images[i] for i, _ in part], [t for _, t in part], [i for i, _ in part])
        for part in (pairs[:4], pairs[4:])
    ]
    for batch in batches:
        batch["pixel_values"] = batch["pixel_values"].double()
    found = neuron_importance(model, batches)

    def change(linear: nn.Linear, index, bias: bool, batch) -> float:
        """The loss's derivative by a factor on some weights."""
        losses = []
        for factor in (1 + 1e-4, 1 - 1e-4):
            saved = linear.weight.detach().clone(), linear.bias.detach().clone()
            with torch.no_grad():
                linear.weight[index] *= factor
                if bias:
                    linear.bias[index[0]] *= factor
                losses.append(float(model.loss("captioning", batch)))
                linear.weight.copy_(saved[0])
                linear.bias.copy_(saved[1])
        return (losses[0] - losses[1]) / 2e-4

    groups = {group.name: group for group in model.groups() if group.kind == "ffn"}
    assert set(found) == set(groups)
    every = slice(None)
    for name in ("vision_model.encoder.layers.0.mlp", list(groups)[-1]):
        (first, _), *_ = groups[name].inner
        last = groups[name].outer[0]
        for neuron in (0, 7, 33):
            expected = sum(
                abs(change(first, (neuron, every), True, batch)) + abs(change(last, (every, neuron), False, batch))
                for batch in batches
            )
            assert float(found[name][neuron]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("neurons", "options", "sizes"),
    [
        (64, {"groups": 8}, [8] * 8),
        (64, {"groups": 3}, [24, 16, 24]),
        (32, {"groups": 8}, [8] * 4),
        (30, {"groups": 4}, [8, 7, 7, 8]),
        (64, {"neurons": 16}, [16] * 4),
        (64, {"neurons": 4}, [8] * 8),
        (30, {"neurons": 10}, [10] * 3),
        (3, {"groups": 8}, [1, 1, 1]),
    ],
)
def test_neurons_are_grouped_by_importance(neurons, options, sizes):
    importance = torch.rand(neurons, generator=torch.Generator().manual_seed(0))
    groups = neuron_groups(importance, MopeOptions(**options))
    assert [len(group) for group in groups] == sizes
    order = torch.cat(groups)
    assert sorted(order.tolist()) == list(range(neurons))
    assert (importance[order].diff() <= 0).all()


# --- requests that cannot be served -----------------------------------------------------------------------------------


def test_a_model_that_cannot_retrieve_is_refused_in_one_line(whole, data):
    with pytest.raises(RequestError, match="cannot do.*vqa") as error:
        measure(whole.for_task("vqa"), data, OPTIONS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"pairs": 1}, {"groups": 0}, {"neurons": 0}, {"candidates": 1}, {"batch_size": 0}])
def test_wrong_options_are_refused(whole, data, wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        measure(whole, data, MopeOptions(**wrong))


def test_captions_that_are_all_the_same_are_refused(whole, data):
    with pytest.raises(RequestError, match="2 pairs"):
        measure(whole, CaptionData("same", data.images, [["a red circle"]] * len(data.images)), OPTIONS)


def test_broken_weights_are_told_of(whole, data):
    model = copy.deepcopy(whole)
    with torch.no_grad():
        model.text_proj.weight[0, 0] = float("nan")
    with pytest.raises(RequestError, match="weights are broken"):
        measure(model, data, OPTIONS)
