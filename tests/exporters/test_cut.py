"""Cut models export: graphs equal PyTorch's, caches follow the heads that are left, decoding gives the same texts."""

import copy

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from vlprune import exporters
from vlprune.data.sets import CaptionData, Question, VqaData
from vlprune.runtime.session import load_graphs
from vlprune.structured import Plan, cut
from vlprune.tasks import evaluate


TEXTS = ["red circle", "a small blue square left of the large green triangle", "a", "two", "the red", "no", "yes"]


def data_of(task: str):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in TEXTS]
    if task == "vqa":
        questions = [Question(i, text, ["yes"]) for i, text in enumerate(TEXTS)]
        return VqaData("drawn", images, questions, ["yes", "no", "the red circle"])
    return CaptionData("drawn", images, [[text] for text in TEXTS])


@pytest.fixture(scope="module")
def cut_model(small):
    """One head of 7 dimensions in every other attention, two in the rest; odd numbers of neurons; a layer less."""
    model = copy.deepcopy(small.model)
    units = {}
    for number, group in enumerate(model.groups()):
        kept = torch.zeros(group.shape, dtype=torch.bool)
        if group.kind == "ffn":
            kept[number :: 4 + number % 3] = True
        else:
            kept[: 1 + number % 2, number % 9 : number % 9 + 7] = True
        units[group.name] = kept
    cut(model, Plan(units, {"vision": torch.tensor([False, True])}))
    return model


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_graphs_of_a_cut_model(cut_model, tmp_path, task):
    model, data = cut_model.for_task(task), data_of(task)
    options = {"answers": ["yes", "no", "the red circle"]} if task == "vqa" else {}
    spec = exporters.task_spec(model, task, **options)
    rows = exporters.export(model, task, spec, tmp_path, data, threads=1)  # on padded inputs, against PyTorch
    assert all(row["max_abs_diff"] < 1e-4 for row in rows)
    graphs = load_graphs(tmp_path, threads=1)
    if task != "retrieval":
        decoder = onnx.load(tmp_path / f"{'text' if task == 'captioning' else 'answer'}_decoder.onnx")
        sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in decoder.graph.input}
        assert len(set(map(tuple, spec["past_shapes"]))) > 1 and {width for _, width in spec["past_shapes"]} == {7}
        for layer, (heads, width) in enumerate(spec["past_shapes"]):
            assert (sizes[f"past_key.{layer}"][1], sizes[f"past_key.{layer}"][3]) == (heads, width)
            crossed = model.text_decoder.bert.encoder.layer[layer].crossattention.self
            assert sizes[f"cross_key.{layer}"][1] == crossed.num_attention_heads
    theirs = evaluate(task, graphs, spec, model.processor, data, 4, 0)
    ours = evaluate(task, exporters.torch_graphs(model, task), spec, model.processor, data, 4, 0)
    assert theirs.outputs == ours.outputs and theirs.values == ours.values


def test_files_are_as_much_smaller_as_the_model(small, cut_model, tmp_path):
    whole, part = small.model.for_task("retrieval"), cut_model.for_task("retrieval")
    sizes = []
    for name, model in (("whole", whole), ("part", part)):
        (tmp_path / name).mkdir()
        spec = exporters.task_spec(model, "retrieval")
        rows = exporters.export(model, "retrieval", spec, tmp_path / name, data_of("retrieval"), threads=1)
        sizes.append(next(row["bytes"] for row in rows if row["graph"] == "image_encoder"))

    def weights(model) -> int:
        parts = (model.vision_model, model.vision_proj)
        return 4 * sum(p.numel() for part in parts for p in part.parameters())

    graph = sizes[0] - weights(whole)  # what is no weight
    assert graph > 0 and 0 <= sizes[1] - weights(part) <= graph
