"""n:m and blocks against slow readings; what does not fit is refused."""

import numpy as np
import pytest
import torch

from vlprune.errors import RequestError
from vlprune.pruning import METHODS, Layer, prune_layers, prune_layers_at, sparsity_summary
from vlprune.pruning.multiflow import score
from vlprune.pruning.patterns import Pattern


def layers_of(*shapes: tuple[int, int], seed: int = 0) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Layer(f"l{k}", "text", torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator) + 0.1)
        for k, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "4:8", "5:6"])
@pytest.mark.parametrize("method", ["multiflow", "omp", "random"])
def test_n_of_m(pattern, method):
    n, m = map(int, pattern.split(":"))
    (layer,) = layers_of((7, 48))
    mask = prune_layers([layer], method, pattern=pattern).masks["l0"]
    assert (mask.view(7, -1, m).sum(-1) == n).all()
    if method == "omp":
        for row, kept in zip(layer.weight.abs().view(-1, m), mask.view(-1, m), strict=True):
            assert row[kept].min() > row[~kept].max()
    if method == "multiflow":
        for row, kept in zip(score(layer.weight, layer.input_norm).view(-1, m), mask.view(-1, m), strict=True):
            assert row[kept].min() > row[~kept].max()


def test_n_of_m_among_equals_the_first_go_first():
    mask = prune_layers([Layer("l", "text", torch.ones(1, 8))], "omp", pattern="2:4").masks["l"]
    assert mask.tolist() == [[False, False, True, True, False, False, True, True]]


def test_strides_do_not_matter():
    plain = Layer("l", "text", torch.randn(8, 12), torch.rand(12))
    strided = Layer("l", "text", plain.weight.T.contiguous().T, plain.input_norm)
    for pattern in ("2:4", "4x3"):
        one, other = (prune_layers([x], "multiflow", 0.5, pattern).masks["l"] for x in (plain, strided))
        assert torch.equal(one, other)


def test_n_of_m_fixes_the_ratio():
    layers = layers_of((4, 12))
    assert next(prune_layers_at(layers, "omp", None, "2:4"))[0] == 0.5
    assert sparsity_summary(prune_layers(layers, "omp", 0.5, "2:4").masks, {"l0": "text"})["achieved"] == 0.5
    assert prune_layers(layers, "omp", 0.667, "1:3").masks["l0"].sum() == 16
    for ratio in (0.9, 0.75, 0.51):
        with pytest.raises(RequestError, match=r"2:4 removes 0\.5 of the weights, not"):
            prune_layers(layers, "omp", ratio, "2:4")
    with pytest.raises(RequestError, match="removes"):
        prune_layers_at(layers, "omp", [0.5, 0.9], "2:4")


@pytest.mark.parametrize("method", ["omp", "multiflow", "l2"])
def test_blocks(method):
    layers = layers_of((8, 12), (16, 24))
    masks = prune_layers(layers, method, 0.6, "4x3").masks
    tiles = {x.name: masks[x.name].view(x.weight.shape[0] // 4, 4, x.weight.shape[1] // 3, 3) for x in layers}
    removed = 0
    for tile in tiles.values():
        kept = tile.sum((1, 3))
        assert ((kept == 0) | (kept == 12)).all(), "blocks go whole"
        removed += int((kept == 0).sum())
    assert removed == int(0.6 * (8 + 32))
    if method == "omp":
        sums, kept = [], []
        for layer in layers:
            for row, column in np.ndindex(layer.weight.shape[0] // 4, layer.weight.shape[1] // 3):
                sums.append(
                    float(layer.weight[4 * row : 4 * row + 4, 3 * column : 3 * column + 3].abs().double().sum())
                )
                kept.append(bool(tiles[layer.name][row, 0, column, 0]))
        order = np.argsort(sums)
        assert not np.array(kept)[order[:removed]].any() and np.array(kept)[order[removed:]].all()
    if method == "multiflow":
        for layer in layers:
            rows, columns = layer.weight.shape
            s = score(layer.weight, layer.input_norm).double().view(rows // 4, 4, columns // 3, 3).sum((1, 3))
            chosen = tiles[layer.name][:, 0, :, 0]
            assert s[chosen].min() >= s[~chosen].max()


@pytest.mark.parametrize("method", METHODS)
def test_one_by_one_blocks_are_unstructured(method):
    layers = layers_of((6, 10), (4, 4))
    plain, blocks = (prune_layers(layers, method, 0.5, pattern).masks for pattern in ("unstructured", "1x1"))
    assert all(torch.equal(plain[name], blocks[name]) for name in plain)


@pytest.mark.parametrize(("pattern", "shape"), [("2:4", (4, 6)), ("4x4", (6, 8)), ("4x4", (8, 6)), ("1x16", (8, 8))])
def test_a_layer_that_does_not_divide_is_named(pattern, shape):
    layers = [*layers_of((16, 16)), Layer("odd one", "text", torch.randn(shape))]
    with pytest.raises(RequestError, match=r"'odd one' is \[.*does not divide"):
        prune_layers(layers, "omp", None, pattern)


@pytest.mark.parametrize(
    "text",
    ["", "2:2", "3:2", "0:4", "4:", "x4", "0x4", "4x0", "-2:4", "2:4\n", "2.0:4", "٢:٤", "99999x1", "dense", None, 4],
)
def test_what_is_no_pattern(text):
    with pytest.raises(RequestError, match="unknown pattern") as error:
        Pattern.parse(text)
    assert "\n" not in str(error.value)
