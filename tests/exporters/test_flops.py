"""Operations against counts by hand."""

import copy

import pytest
import torch

from vlprune.exporters.flops import LENGTH, flops, meta_copy
from vlprune.models import load
from vlprune.structured import Plan, cut


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def attention(queries: int, keys: int, heads: int, width: int) -> int:
    return 2 * heads * 2 * queries * keys * width  # scores, and the weighted sum of values


WIDTH, NEURONS, HEADS, LAYERS, PROJECTED = 32, 96, 2, 2, 24
PATCHES, PIXELS = 9, 3 * 16 * 16
TOKENS = PATCHES + 1


def vision_layer(neurons: int = NEURONS, units: int = WIDTH, heads: int = HEADS) -> int:
    projections = linear(TOKENS, WIDTH, 3 * units) + linear(TOKENS, units, WIDTH)
    mlp = linear(TOKENS, WIDTH, neurons) + linear(TOKENS, neurons, WIDTH)
    return projections + attention(TOKENS, TOKENS, heads, units // heads) + mlp


def text_layer(states: int | None = None) -> int:
    own = 4 * linear(LENGTH, WIDTH, WIDTH) + attention(LENGTH, LENGTH, HEADS, WIDTH // HEADS)
    mlp = 2 * linear(LENGTH, WIDTH, NEURONS)
    crossed = 0
    if states is not None:  # keys and values are another graph's in a decoder
        crossed = 2 * linear(LENGTH, WIDTH, WIDTH) + attention(LENGTH, states, HEADS, WIDTH // HEADS)
    return own + mlp + crossed


def test_counts_by_hand(small):
    patches = linear(PATCHES, PIXELS, WIDTH)
    image = patches + LAYERS * vision_layer()
    keys_values = LAYERS * 2 * linear(TOKENS, WIDTH, WIDTH)
    words = small.model.text_decoder.cls.predictions.decoder.out_features
    head = linear(LENGTH, WIDTH, WIDTH) + linear(LENGTH, WIDTH, words)
    assert flops(small.model, "retrieval") == {
        "image_encoder": image + linear(1, WIDTH, PROJECTED),
        "text_encoder": LAYERS * text_layer() + linear(1, WIDTH, PROJECTED),
        "itm": LAYERS * text_layer(TOKENS) + keys_values + linear(1, WIDTH, 2),
    }
    assert flops(small.model, "captioning") == {
        "image_encoder": image + keys_values,
        "text_decoder": LAYERS * text_layer(TOKENS) + head,
    }
    assert flops(small.model, "vqa") == {
        "image_encoder": image,
        "question_encoder": LAYERS * text_layer(TOKENS) + keys_values + LAYERS * 2 * linear(LENGTH, WIDTH, WIDTH),
        "answer_decoder": LAYERS * text_layer(LENGTH) + head,
    }


def test_a_cut_model_needs_fewer(small):
    model = copy.deepcopy(small.model)
    units = {"vision_model.encoder.layers.0.self_attn": torch.zeros(2, 16) > 0}
    units["vision_model.encoder.layers.0.self_attn"][1, :7] = True
    units["vision_model.encoder.layers.0.mlp"] = torch.arange(NEURONS) < 10
    cut(model, Plan(units, {"vision": torch.tensor([True, False])}))
    expected = linear(PATCHES, PIXELS, WIDTH) + vision_layer(10, 7, 1)
    assert flops(model, "vqa")["image_encoder"] == expected


def test_zeros_need_as_many(small):
    other = copy.deepcopy(small.model)
    with torch.no_grad():
        for layer in other.layers():
            layer.weight.zero_()
    assert flops(other, "captioning") == flops(small.model, "captioning")


@pytest.mark.parametrize("task", [None, "vqa"])
def test_copies_without_values(small, task):
    model = small.model if task is None else small.model.for_task(task)
    light = meta_copy(model)
    assert {p.device.type for p in light.parameters()} == {"meta"} == {b.device.type for b in light.buffers()}
    assert [p.shape for p in light.parameters()] == [p.shape for p in model.parameters()]  # shared ones once
    assert light.tied == model.tied and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "gated"])
def test_other_families(duals, vits, kind):
    model = load(str((duals if kind in ("clip", "siglip") else vits)(kind).folder))
    units = {g.name: torch.arange(g.shape[0]) < g.shape[0] // 2 for g in model.groups() if g.kind == "ffn"}
    small = copy.deepcopy(model)
    cut(small, Plan(units))
    for task in model.tasks:
        whole, left = flops(model, task), flops(small, task)
        assert whole.keys() == left.keys() and all(0 < left[name] < whole[name] for name in whole)
    if kind == "gated":  # its patches are of another size
        return
    group = next(g for g in model.groups() if g.kind == "ffn")
    lost = sum(2 * linear.in_features * linear.out_features for linear, _ in group.inner) // 2
    lost += sum(2 * linear.in_features * linear.out_features for linear in group.outer) // 2
    graph = next(iter(whole))
    tokens = (whole[graph] - left[graph]) / lost / sum(g.modality == "vision" for g in model.groups()) * 2
    assert tokens == model.processor.image_size**2 // 64 + (kind != "siglip")  # patches of 8 pixels and [CLS]
