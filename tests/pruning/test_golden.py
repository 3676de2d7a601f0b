"""Masks equal those of the MULTIFLOW authors' own program: at most one weight of a layer differs.

The part in data/ runs everywhere (make_golden_part.py wrote it); the full sets run where the shared folder stands
beside the repository. The authors turn a ratio into a count twice and so may prune one weight of a layer less.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vlprune.pruning import InputNorms, Layer, prune_layers_at
from vlprune.pruning.multiflow import score


PART = Path(__file__).parent / "data" / "golden_part.npz"


def collected(golden: Mapping[str, np.ndarray], names: list[str], batches: int) -> dict[str, torch.Tensor]:
    """Stream the recorded inputs through modules of the same width, the padding of each batch named."""
    norms = {}
    for name in names:
        out_features, in_features = golden[f"weight/{name}"].shape
        module = nn.Linear(in_features, out_features)
        of_text = golden[f"input/{name}/0"].shape[1] == golden["attention_mask/0"].shape[1]
        collector = InputNorms({name: ([module], "text" if of_text else "vision")})
        with collector.collect():
            for batch in range(batches):
                with collector.valid(text=torch.from_numpy(golden[f"attention_mask/{batch}"])):
                    module(torch.from_numpy(golden[f"input/{name}/{batch}"]))
        norms |= collector.result()
    return norms


def assert_masks(golden: Mapping[str, np.ndarray], about: dict[str, Any], layers: list[Layer], method: str) -> None:
    total = 0
    for ratio, pruned in prune_layers_at(layers, method.replace("_", "-"), about["sparsities"]):
        for layer in layers:
            bits = np.unpackbits(golden[f"mask/{method}/{ratio}/{layer.name}"], count=layer.weight.numel())
            differing = int((pruned.masks[layer.name].flatten().numpy() != bits.astype(bool)).sum())
            assert differing <= 1, f"{method} at {ratio}: {differing} weights of {layer.name}"
            total += differing
    assert total <= len(layers) * len(about["sparsities"]) / 4


@pytest.fixture(scope="module")
def part() -> tuple[Any, dict[str, Any], list[Layer]]:
    golden = np.load(PART)
    about = json.loads(str(golden["about"]))
    layers = [
        Layer(
            layer["name"],
            layer["modality"],
            torch.from_numpy(golden[f"weight/{layer['name']}"]),
            torch.from_numpy(golden[f"input_norm/{layer['name']}"]),
        )
        for layer in about["layers"]
    ]
    return golden, about, layers


@pytest.mark.parametrize("method", ["multiflow", "local_magnitude", "modal_magnitude"])
def test_masks_of_the_part(part, method):
    assert_masks(*part, method)


def test_norms_of_the_part(part):
    golden, about, layers = part
    names = sorted({key.split("/")[1] for key in golden.files if key.startswith("input/")})
    assert len(names) == 2
    for name, norm in collected(golden, names, about["batches"]).items():
        expected = next(layer.input_norm for layer in layers if layer.name == name)
        assert expected is not None
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module", params=["golden_a", "golden_b"])
def full(request, shared) -> tuple[dict[str, np.ndarray], dict[str, Any], list[Layer]]:
    with np.load(shared / "golden" / f"{request.param}.npz") as file:
        golden = {name: file[name] for name in file.files}
    about = json.loads((shared / "golden" / f"{request.param}.json").read_text())
    names = [layer["name"] for layer in about["layers"]]
    norms = collected(golden, names, about["batches"])
    layers = [
        Layer(x["name"], x["modality"], torch.from_numpy(golden[f"weight/{x['name']}"]), norms[x["name"]])
        for x in about["layers"]
    ]
    return golden, about, layers


@pytest.mark.parametrize("method", ["multiflow", "omp", "local_magnitude", "modal_magnitude", "l2", "lamp"])
def test_masks_of_the_full_sets(full, method):
    assert_masks(*full, method)


def test_scores_of_the_full_sets(full):
    golden, _, layers = full
    for layer in layers:
        reference = golden[f"score/multiflow/{layer.name}"].astype(np.float64)
        assert layer.input_norm is not None
        ratio = score(layer.weight, layer.input_norm).double().numpy() / reference
        assert ratio.max() / ratio.min() - 1 < 1e-5, layer.name  # one constant per layer cancels
