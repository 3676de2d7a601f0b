"""Each formula against a slow float64 reading of its paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.pruning import Layer, magnitude, multiflow, prune_layers, random


def multiflow_by_formula(weight: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Equation 6 with means, as the paper writes it."""
    out_features, in_features = weight.shape
    importance_in = [np.mean([abs(weight[i, j]) * a[j] for i in range(out_features)]) for j in range(in_features)]
    importance_out = [np.mean([abs(weight[i, j]) * a[j] for j in range(in_features)]) for i in range(out_features)]
    return np.array(
        [
            [importance_in[j] * abs(weight[i, j]) * importance_out[i] for j in range(in_features)]
            for i in range(out_features)
        ]
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-6, 1.0, 1e6]))
def test_multiflow(seed, out_features, in_features, scale):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((out_features, in_features)).astype(np.float32) * 0.02
    a = generator.random(in_features).astype(np.float32) * np.float32(scale)
    a[generator.random(in_features) < 0.2] = 0  # neurons that never fire
    expected = multiflow_by_formula(weight.astype(np.float64), a.astype(np.float64))
    found = multiflow.score(torch.from_numpy(weight), torch.from_numpy(a)).double().numpy()
    assert (found[expected == 0] == 0).all()
    ratio = found[expected > 0] / expected[expected > 0]
    assert not len(ratio) or ratio.max() / ratio.min() - 1 < 1e-6


def test_multiflow_without_any_signal_is_zero_and_can_be_pruned():
    layer = Layer("dead", "text", torch.randn(4, 6), torch.zeros(6))
    assert multiflow.score(layer.weight, torch.zeros(6)).eq(0).all()
    assert int((~prune_layers([layer], "multiflow", 0.5).masks["dead"]).sum()) == 12


def test_multiflow_leaves_the_weight_alone():
    weight = torch.randn(5, 7)
    before = weight.clone()
    multiflow.score(weight, torch.rand(7))
    magnitude.score(weight).zero_()
    assert torch.equal(weight, before)


def test_multiflow_counts_come_from_magnitudes_of_the_modality():
    generator = torch.Generator().manual_seed(5)
    layers = [
        Layer(f"{modality}.{k}", modality, torch.randn(12, 20, generator=generator) * scale, torch.rand(20) + 0.1)
        for modality in ("vision", "text")
        for k, scale in enumerate((0.1, 0.3, 1.0))
    ]
    masks = prune_layers(layers, "multiflow", 0.6).masks
    for modality in ("vision", "text"):
        members = [layer for layer in layers if layer.modality == modality]
        pool = torch.cat([layer.weight.abs().flatten() for layer in members]).double()
        threshold = pool.kthvalue(int(0.6 * len(pool))).values
        for layer in members:
            expected = int((layer.weight.abs() <= threshold).sum())
            assert int((~masks[layer.name]).sum()) == expected
            s = torch.from_numpy(multiflow_by_formula(layer.weight.double().numpy(), layer.input_norm.double().numpy()))
            assert s[masks[layer.name]].min() >= s[~masks[layer.name]].max() * (1 - 1e-6)
        assert sum(int((~masks[layer.name]).sum()) for layer in members) == int(0.6 * len(pool))


@pytest.mark.parametrize("method", ["omp", "modal-magnitude", "local-magnitude", "l2", "lamp"])
def test_weight_only_methods(method):
    generator = torch.Generator().manual_seed(11)
    layers = [
        Layer(f"l{k}", "vision" if k < 2 else "text", torch.randn(8 + k, 30, generator=generator) * 0.1 * (k + 1))
        for k in range(4)
    ]
    masks = prune_layers(layers, method, 0.7).masks
    if method == "omp":
        scores, groups = [layer.weight.abs().double() for layer in layers], [[0, 1, 2, 3]]
    elif method == "l2":
        scores = [layer.weight.abs().double() / layer.weight.double().norm() for layer in layers]
        groups = [[0, 1, 2, 3]]
    elif method == "lamp":
        scores = []
        for layer in layers:
            w = layer.weight.double()
            tails = [(w[w.abs() >= u.abs()] ** 2).sum() for u in w.flatten()]
            scores.append(w**2 / torch.stack(tails).view_as(w))
        groups = [[0, 1, 2, 3]]
    else:
        scores = [layer.weight.abs().double() for layer in layers]
        groups = [[0, 1], [2, 3]] if method == "modal-magnitude" else [[0], [1], [2], [3]]
    for group in groups:
        pool = torch.cat([scores[k].flatten() for k in group])
        threshold = pool.kthvalue(int(0.7 * len(pool) + 1e-9)).values
        for k in group:
            assert torch.equal(masks[f"l{k}"], scores[k] > threshold)


def test_random_is_one_threshold_over_streams_that_know_only_their_layer():
    layers = [Layer(f"l{k}", "text", torch.zeros(40, 50)) for k in range(3)]
    masks = prune_layers(layers, "random", 0.75, seed=3).masks
    scores = {layer.name: random.score(layer.weight, layer.name, 3) for layer in layers}
    threshold = torch.cat([s.flatten() for s in scores.values()]).kthvalue(4500).values
    for name, s in scores.items():
        assert torch.equal(masks[name], s > threshold)
    assert len({int(mask.sum()) for mask in masks.values()}) > 1, "global: layers differ by chance"
    assert torch.equal(random.score(torch.zeros(40, 50), "l1", 3), scores["l1"])
    assert not torch.equal(random.score(torch.zeros(40, 50), "l1", 4), scores["l1"])
