"""prune_layers: what it refuses, what it promises."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune.errors import RequestError
from vlprune.pruning import METHODS, Layer, get_method, prune_layers, prune_layers_at, sparsity_summary
from vlprune.pruning.parallel import side_by_side


def model(seed: int = 0, count: int = 6) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for k in range(count):
        shape = (
            int(torch.randint(2, 40, (1,), generator=generator)),
            int(torch.randint(2, 60, (1,), generator=generator)),
        )
        norm = torch.rand(shape[1], generator=generator) + 0.05
        weight = torch.randn(shape, generator=generator) * (0.1 + k)
        layers.append(Layer(f"layer.{k}", ("vision", "text")[k % 2], weight, norm))
    return layers


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 99))
def test_counts_are_exact_per_budget_group(method, seed, percent):
    layers, ratio = model(seed, 4), percent / 100
    masks = prune_layers(layers, method, ratio, seed=seed).masks
    assert list(masks) == [layer.name for layer in layers]
    groups = {
        "global": [layers],
        "modality": [[x for x in layers if x.modality == modality] for modality in ("vision", "text")],
        "layer": [[x] for x in layers],
    }[METHODS[method].budget]
    for group in groups:
        removed = sum(int((~masks[x.name]).sum()) for x in group)
        assert removed == percent * sum(x.weight.numel() for x in group) // 100
    for layer in layers:
        assert masks[layer.name].dtype == torch.bool and masks[layer.name].shape == layer.weight.shape


@pytest.mark.parametrize("method", METHODS)
def test_many_ratios_equal_one_at_a_time_in_the_order_given(method):
    layers, ratios = model(1), [0.9, 0.1, 0.63, 0.9]
    found = list(prune_layers_at(layers, method, ratios))
    assert [ratio for ratio, _ in found] == ratios
    for ratio, pruned in found:
        single = prune_layers(layers, method, ratio)
        assert all(torch.equal(single.masks[name], pruned.masks[name]) for name in single.masks)
        assert pruned.weights == {}
    one, more = found[1][1].masks, found[2][1].masks
    assert all((one[name] | ~more[name]).all() for name in one) or method == "multiflow", "masks are nested"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_for_any_number_of_threads(method):
    generator = torch.Generator().manual_seed(0)
    layers = [
        Layer(f"l{k}", "text", torch.randn(300, 400, generator=generator), torch.rand(400, generator=generator))
        for k in range(2)
    ]
    threads = torch.get_num_threads()
    try:
        masks = []
        for number in (1, 3):
            torch.set_num_threads(number)
            masks.append(prune_layers(layers, method, 0.8, seed=1).masks)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_number_of_threads_is_as_before():
    def seen_by_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        prune_layers(model(0))
        assert torch.get_num_threads() == 3 == seen_by_a_new_thread()
        with pytest.raises(RequestError):
            side_by_side(get_method, ["omp", "nonsense", "omp"])
        assert torch.get_num_threads() == 3 == seen_by_a_new_thread()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x4"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_on_cuda(method, pattern):
    generator = torch.Generator().manual_seed(0)
    layers = [
        Layer(f"l{k}", "text", torch.randn(768, 512, generator=generator), torch.rand(512, generator=generator))
        for k in range(3)
    ]
    there = [Layer(x.name, x.modality, x.weight.cuda(), x.input_norm) for x in layers]
    ratio = 0.5 if pattern == "2:4" else 0.8
    here, cuda = (prune_layers(x, method, ratio, pattern).masks for x in (layers, there))
    for name, mask in here.items():
        assert cuda[name].device.type == "cuda" and torch.equal(mask, cuda[name].cpu())


def test_a_power_of_two_changes_nothing():
    layers = model(4)
    scaled = [Layer(x.name, x.modality, x.weight * 2.0**-20, x.input_norm * 2.0**9) for x in layers]
    for method in METHODS:
        one, other = (prune_layers(x, method, 0.7).masks for x in (layers, scaled))
        assert all(torch.equal(one[name], other[name]) for name in one), method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_and_strides(dtype):
    layers = [Layer(x.name, x.modality, x.weight.to(dtype).T.contiguous().T, x.input_norm) for x in model(2)]
    plain = [Layer(x.name, x.modality, x.weight.float().contiguous(), x.input_norm) for x in layers]
    for pattern in ("unstructured", "1x1"):
        one, other = (prune_layers(x, "multiflow", 0.5, pattern).masks for x in (layers, plain))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_parameters_need_no_detaching_and_stay_as_they_are():
    weight = torch.nn.Linear(8, 4).weight
    before = weight.detach().clone()
    mask = prune_layers([Layer("l", "text", weight, torch.rand(8))], ratio=0.5).masks["l"]
    assert not mask.requires_grad and torch.equal(weight.detach(), before)


def test_the_default_ratio():
    masks = prune_layers(model(0)).masks
    sparsity = sparsity_summary(masks, {layer.name: layer.modality for layer in model(0)})
    assert abs(sparsity["achieved"] - 0.9) < 1e-3
    assert prune_layers_at(model(0)).__next__()[0] == 0.9


def test_a_tiny_ratio_removes_nothing():
    assert all(mask.all() for mask in prune_layers(model(0), "multiflow", 1e-9).masks.values())


good = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layers"),
        ([Layer("a", "t", good, torch.ones(3)), Layer("a", "t", good, torch.ones(3))], "'a' is given twice"),
        ([Layer("a", "t", torch.ones(6), torch.ones(3))], r"'a': the weight is torch.float32 \[6\]"),
        ([Layer("a", "t", torch.ones(2, 3, 1), torch.ones(3))], "matrix is needed"),
        ([Layer("a", "t", torch.ones(0, 3), torch.ones(3))], "matrix is needed"),
        ([Layer("a", "t", torch.ones(2, 3, dtype=torch.int64), torch.ones(3))], "torch.int64"),
        ([Layer("a", "t", np.ones((2, 3)), torch.ones(3))], "ndarray"),
        ([Layer("a", "t", torch.tensor([[1, float("nan")]]), torch.ones(2))], "'a': the weight holds NaN"),
        ([Layer("a", "t", torch.tensor([[1, float("-inf")]]), torch.ones(2))], "'a': the weight holds NaN or infinity"),
        ([Layer("a", "t", torch.tensor([[1, 1e300]], dtype=torch.float64), torch.ones(2))], "infinity in float32"),
        ([Layer("a", "t", good)], "'a' has no input norm"),
        (
            [Layer("a", "t", good, torch.ones(2))],
            r"'a': the input norm is torch.float32 \[2\], floats \[3\] are needed",
        ),
        ([Layer("a", "t", good, torch.ones(3, dtype=torch.int32))], "input norm is torch.int32"),
        ([Layer("a", "t", good, [1, 1, 1])], "input norm is list"),
        ([Layer("a", "t", good, torch.tensor([1, 1, float("nan")]))], "'a': the input norm holds NaN"),
        ([Layer("a", "t", good, torch.tensor([1, 1, -1e-3]))], "'a': the input norm is negative"),
    ],
)
def test_layers_that_are_refused_before_anything_is_scored(layers, message):
    with pytest.raises(RequestError, match=message) as error:
        prune_layers_at(layers, "multiflow", [0.5])  # not iterated: the check is not lazy
    assert "\n" not in str(error.value)


def test_norms_are_ignored_by_methods_that_need_none():
    layer = Layer("a", "t", torch.randn(4, 4), torch.full((7,), float("nan")))
    assert int(prune_layers([layer], "omp", 0.5).masks["a"].sum()) == 8


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, float("nan"), "abc"])
def test_ratios_that_are_refused(ratio):
    with pytest.raises(RequestError, match="between 0 and 1"):
        prune_layers(model(0), "omp", ratio)


def test_options_that_are_refused():
    with pytest.raises(RequestError, match="did you mean multiflow"):
        prune_layers(model(0), "multi-flow")
    with pytest.raises(RequestError, match="choose one of multiflow, omp"):
        get_method("???")
    with pytest.raises(RequestError, match="no ratio"):
        prune_layers_at(model(0), "omp", [])
    for seed in (-1, 1.5, None, True):
        with pytest.raises(RequestError, match="non-negative integer"):
            prune_layers(model(0), "random", 0.5, seed=seed)


def test_the_registry_tells_what_a_listing_shows():
    assert set(METHODS) == {"multiflow", "omp", "local-magnitude", "modal-magnitude", "l2", "lamp", "random"}
    for name, method in METHODS.items():
        assert get_method(name) is method and method.name == name
        assert method.summary and method.paper
        assert method.needs == ({"input_norm"} if name == "multiflow" else set())
