"""The graphs of BLIP for two images: ONNX Runtime against PyTorch, dense and cut."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlprune import exporters
from vlprune.data.sets import NlvrData, Pair
from vlprune.models.blip_nlvr import BlipNlvr, of
from vlprune.runtime.session import load_graphs, session
from vlprune.runtime.timing import feeds_for
from vlprune.structured import Plan, cut
from vlprune.tasks import evaluate

from .conftest import WORDS, make_model


@pytest.fixture(scope="module")
def model() -> BlipNlvr:
    made = of(make_model(), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():  # the two cross-attentions start alike
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made


@pytest.fixture(scope="module")
def smaller(model) -> BlipNlvr:
    made = model.for_task("nlvr")
    units = {}
    for number, group in enumerate(made.groups()):
        kept = (torch.arange(group.shape[-1]) + number) % group.shape[-1] < group.shape[-1] // 2
        units[group.name] = kept.expand(group.shape).clone()
    cut(made, Plan(units, {"text": torch.tensor([False, True])}))
    return made


@pytest.fixture(scope="module")
def data() -> NlvrData:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)) for _ in range(6)]
    pairs = [Pair(i, (i + 1) % 6, " ".join(rng.choice(WORDS, 3 + i)), bool(i % 2)) for i in range(6)]
    return NlvrData("small", images, pairs)


@pytest.mark.parametrize("which", ["model", "smaller"])
def test_onnx_equals_pytorch(which, data, tmp_path, request):
    model = request.getfixturevalue(which)
    spec = exporters.task_spec(model, "nlvr")
    assert (spec["max_length"], spec["image_tokens"], spec["task"]) == (40, 10, "nlvr")
    rows = exporters.export(model, "nlvr", spec, tmp_path, data)
    assert {row["graph"] for row in rows} == {"image_encoder", "pair_classifier"}
    assert all(row["max_abs_diff"] < 2e-5 for row in rows)
    graphs, reference = load_graphs(tmp_path, "cpu", 1), exporters.torch_graphs(model, "nlvr")
    rng = np.random.default_rng(1)
    for batch, length in ((1, 1), (2, 7), (5, 40)):
        pixels = rng.standard_normal((batch, 3, 48, 48), np.float32)
        states = reference["image_encoder"]({"pixel_values": pixels})["image_states"]
        np.testing.assert_allclose(graphs["image_encoder"]({"pixel_values": pixels})["image_states"], states, atol=2e-5)
        ids = rng.integers(0, 20, (batch, length))
        mask = np.ones((batch, length), np.int64)
        mask[1:, length // 2 :] = 0
        feeds = {"input_ids": ids, "attention_mask": mask}
        feeds |= {"image_states.0": states, "image_states.1": np.flip(states, 0).copy()}
        expected = reference["pair_classifier"](feeds)["logits"]
        assert expected.shape == (batch, 2)
        np.testing.assert_allclose(graphs["pair_classifier"](feeds)["logits"], expected, atol=2e-5)
        if length > 1:
            swapped = {**feeds, "image_states.0": feeds["image_states.1"], "image_states.1": states}
            assert not np.allclose(reference["pair_classifier"](swapped)["logits"], expected, atol=1e-3)


def test_graphs_can_be_timed(model, data, tmp_path):
    spec = exporters.task_spec(model, "nlvr")
    exporters.export(model, "nlvr", spec, tmp_path, data)
    feeds = feeds_for(session(tmp_path / "pair_classifier.onnx"), spec, batch=3)
    assert feeds["image_states.0"].shape == feeds["image_states.1"].shape == (3, 10, 32)
    assert feeds["input_ids"].shape == (3, 40)


def test_scores_are_the_same_in_both(model, data, tmp_path):
    spec = exporters.task_spec(model, "nlvr")
    exporters.export(model, "nlvr", spec, tmp_path, data)
    found = [
        evaluate("nlvr", graphs, spec, model.processor, data, batch_size=4)
        for graphs in (exporters.torch_graphs(model, "nlvr"), load_graphs(tmp_path, "cpu", 1))
    ]
    assert found[0].outputs == found[1].outputs and found[0].n == 6
