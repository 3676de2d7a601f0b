"""How much memory pruning takes on a device, counted on the CPU: every tensor that an operation makes."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vlprune.pruning import Layer, budgets, layers, parallel, prune, selection
from vlprune.pruning.prune import prune_layers_at


class Counting(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block that are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()  # storage -> tensors that hold it
        self.sizes: dict[int, int] = {}
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.seen:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if not key or (key in given and key not in self.sizes):  # empty, or a view of what was there before
                    continue
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    self.peak = max(self.peak, self.now)
                self.users[key] += 1
                self.seen.add(id(tensor))
                weakref.finalize(tensor, self.gone, id(tensor), key)
        return result

    def gone(self, tensor: int, key: int) -> None:
        self.seen.discard(tensor)
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= self.sizes.pop(key)


@contextmanager
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One layer after the other, so that all is counted; scores are picked as on a device."""

    def picked(scores: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return scores[(scores >= low) & (scores < high)]

    with monkeypatch.context() as patched:
        for module in (budgets, layers, prune):
            patched.setattr(module, "side_by_side", lambda function, items: [function(item) for item in items])
        for module in (budgets, selection):
            patched.setattr(module, "between", picked)
        yield


def drawn(number: int, shape: tuple[int, int]) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    return [
        Layer(
            f"layer{i}",
            "vision" if i % 2 else "text",
            torch.randn(shape, generator=generator),
            torch.rand(shape[1], generator=generator),
        )
        for i in range(number)
    ]


# As on BLIP-base: 226 million weights, and at most four layers of up to 3072 x 768 in work at a time.
@pytest.mark.parametrize("method", ["multiflow", "omp", "l2", "lamp"])
def test_pruning_takes_less_than_a_third_beside_the_weights(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn(2, (768, 384))
    layer, factor = given[0].weight.nbytes, (3072 * 768) / (768 * 384)
    with as_on_a_device(monkeypatch), Counting() as counting:
        _, pruned = next(prune_layers_at(given, method, [0.63, 0.9]))
    weights, masks = 226.5e6 * 4, 226.5e6
    assert sum(mask.nbytes for mask in pruned.masks.values()) == 2 * layer / 4
    # The layers in work hold their copies while no mask is there yet: masks wait as bits in the memory of the host.
    in_work = parallel.WORKERS * counting.peak * factor
    assert weights + max(masks, in_work) < 1.3 * weights


def test_a_large_layer_is_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(3_000_000, generator=torch.Generator().manual_seed(1))
    expected = [mask.clone() for mask in selection.lowest(scores, [1000, 2_500_000])]
    whole = selection.sizes_of(scores)
    monkeypatch.setattr(selection, "PIECE", 2**18)
    with Counting() as counting:
        np.testing.assert_array_equal(selection.sizes_of(scores), whole)
    assert counting.peak < scores.nbytes
    for mask, wanted in zip(selection.lowest(scores, [1000, 2_500_000]), expected, strict=True):
        assert torch.equal(mask, wanted)
