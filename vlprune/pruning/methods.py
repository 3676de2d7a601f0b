"""The methods by name. A method = a score inside a layer + a budget over layers + what it needs.

To add one: write its equation as a function from tensors to scores in a file of its own, add an entry here, and a test
that recomputes the score in float64 from the paper's formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning import l2, lamp, magnitude, multiflow, random
from vlprune.pruning.budgets import Across
from vlprune.pruning.layers import Layer


Score = Callable[[Layer, int], Tensor]  # (layer, seed) -> [out, in] float32, non-negative


def _magnitude(layer: Layer, seed: int) -> Tensor:
    return magnitude.score(layer.weight)


def _random(layer: Layer, seed: int) -> Tensor:
    return random.score(layer.weight, layer.name, seed)


def _multiflow(layer: Layer, seed: int) -> Tensor:
    assert layer.input_norm is not None  # "needs" has been checked
    return multiflow.score(layer.weight, layer.input_norm)


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        name: what the user types.
        summary: one line for listings.
        paper: where it comes from, with the number on arXiv.
        needs: what a layer must bring besides its weight: nothing or "input_norm".
        score: orders the weights inside a layer.
        budget: the layers that share one ratio: each for itself, those of one modality, all.
        shared: what the layers of a budget group are compared by; larger survives.
        across: makes `shared` comparable between layers, None when it is already.
    """

    name: str
    summary: str
    paper: str
    score: Score = _magnitude
    budget: Literal["layer", "modality", "global"] = "global"
    shared: Score = _magnitude
    across: Across | None = None
    needs: frozenset[str] = frozenset()


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "multiflow",
            "information flow: input neuron x weight x output neuron, budget per modality",
            "Farina et al., MULTIFLOW: Shifting Towards Task-Agnostic Vision-Language Pruning, CVPR 2024, 2404.05621",
            score=_multiflow,
            budget="modality",
            needs=frozenset({"input_norm"}),
        ),
        Method(
            "omp",
            "smallest weights of the whole model",
            "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015, 1506.02626",
        ),
        Method(
            "local-magnitude",
            "smallest weights of each layer, the same ratio everywhere",
            "Han et al., NeurIPS 2015, 1506.02626",
            budget="layer",
        ),
        Method(
            "modal-magnitude",
            "smallest weights of each modality",
            "Farina et al., CVPR 2024, 2404.05621, equation 7",
            budget="modality",
        ),
        Method(
            "l2",
            "smallest weights of the whole model after division by their layer's norm",
            "baseline of Farina et al., CVPR 2024, 2404.05621",
            across=l2.across,
        ),
        Method(
            "lamp",
            "smallest share of what their layer keeps",
            "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, 2010.07611",
            across=lamp.across,
        ),
        Method("random", "drawn by chance: the floor to beat", "none", score=_random, shared=_random),
    )
}


def get_method(name: str) -> Method:
    """Look a method up.

    Args:
        name: what the user typed.

    Returns:
        Method: the method.

    Raises:
        RequestError: there is none of that name; the nearest one is suggested.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(str(name), METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METHODS)}"
    raise RequestError(f"unknown method {name!r:.60}: {hint}")
