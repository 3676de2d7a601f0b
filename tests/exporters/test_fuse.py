"""Joined nodes compute what the plain ones do, for every family; what is joined and what is not is told."""

from collections import Counter

import numpy as np
import onnx
import pytest

import vlprune
from vlprune import exporters
from vlprune.data import open_data
from vlprune.errors import MachineError, RequestError
from vlprune.exporters import fuse, half, pack, precision, ranges
from vlprune.exporters.compare import compare
from vlprune.runtime.session import OnnxGraph, load_graphs, open_bytes

from .conftest import TASKS, make_data


def joined(folder):
    """Graph name -> what became of it, and the joined graphs to run."""
    found = {file.stem: fuse.fuse(pack.load(file)) for file in sorted(folder.glob("*.onnx"))}
    return found, {n: OnnxGraph(open_bytes(made.model.SerializeToString()), n) for n, made in found.items()}


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("task", TASKS)
def test_blip_graphs(small, exported, task):
    made = exported[task]
    found, graphs = joined(made.folder)
    differences = compare(made.onnx, graphs, made.spec, small.model.processor, make_data(task), 1e-4)
    assert max(difference.relative for difference in differences.values()) < 1e-5
    for name, result in found.items():
        plain, after = onnx.load(made.folder / f"{name}.onnx"), operators(result.model)
        before = operators(plain)
        assert result.taken["MultiHeadAttention"] == before["Softmax"] and not after["Softmax"]
        assert result.taken["BiasGelu"] == before["Erf"] and not after["Erf"]
        norms = result.taken["SkipLayerNormalization"]
        assert norms + after["LayerNormalization"] == before["LayerNormalization"] and norms >= before["Softmax"]
        assert len(result.missed) == after["LayerNormalization"] and all(": " in line for line in result.missed)
        assert {v.name for v in result.model.graph.input} == {v.name for v in plain.graph.input}
        weights = {t.name for t in plain.graph.initializer if not t.name.startswith("/constant")}
        assert weights <= {t.name for t in result.model.graph.initializer}


@pytest.mark.parametrize(("kind", "curve"), [("clip", "BiasGelu"), ("legacy", "QuickGelu"), ("siglip", "FastGelu")])
def test_dual_graphs(duals, photos, tmp_path, kind, curve):
    model = vlprune.load(str(duals(kind).folder))
    data = open_data("retrieval", str(photos), "test")
    spec = exporters.task_spec(model, "retrieval")
    exporters.export(model, "retrieval", spec, tmp_path, data, threads=1)
    found, graphs = joined(tmp_path)
    compare(load_graphs(tmp_path, threads=1), graphs, spec, model.processor, data, 1e-5)
    for result in found.values():
        assert result.taken["MultiHeadAttention"] >= 2 and result.taken[curve] >= 2
        assert result.taken["SkipLayerNormalization"] >= 3


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "gated"])
def test_vision_transformers(vits, animals, tmp_path, kind):
    model = vlprune.load(str(vits(kind).folder))
    data = open_data("classification", str(animals), "test")
    spec = exporters.task_spec(model, "classification")
    exporters.export(model, "classification", spec, tmp_path, data, threads=1)
    found, graphs = joined(tmp_path)
    compare(load_graphs(tmp_path, threads=1), graphs, spec, model.processor, data, 1e-5)
    assert found["image_classifier"].taken["MultiHeadAttention"] == 2


@pytest.mark.parametrize("task", TASKS)
def test_joined_graphs_in_fp16(small, exported, task, tmp_path):
    """Values that a joined node no longer shows still decide where it computes."""
    made, data = exported[task], make_data(task)
    found = ranges.measure(made.folder, made.spec, small.model.processor, data, 1)
    options = {"fuse": True, "threads": 1}
    rows = exporters.convert_task(small.model, made.folder, tmp_path, "fp16", data, data, found, **options)
    for row in rows:
        assert row["fused"] and row["fusions"]["MultiHeadAttention"] and row["cosine_min"] > 0.999
        kinds = {reason.split(": ")[1].split()[0] for reason in row["kept_fp32"]}
        assert "SkipLayerNormalization" in kinds and "Softmax" not in kinds
        model = onnx.load(tmp_path / f"{row['graph']}.onnx")
        types = ranges.types_of(model)
        attentions = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
        assert {types[value] for node in attentions for value in (*node.input, *node.output) if value} == {10}
    name = rows[0]["graph"]
    result = fuse.fuse(pack.load(made.folder / f"{name}.onnx"))
    output = next(n.output[0] for n in result.model.graph.node if n.op_type == "MultiHeadAttention")
    scores = result.inside[output][0]
    kept = half.kept_nodes(result.model, found[name] | {scores: (0.0, 1e5)}, result.inside)
    assert kept[output] == f"{scores} reaches 1e+05, fp16 ends at 65504"


def test_joined_graphs_in_fp32_must_be_equal(small, exported, tmp_path, monkeypatch):
    made, data = exported["retrieval"], make_data("retrieval")
    (tmp_path / "fused").mkdir()
    rows = exporters.convert_task(small.model, made.folder, tmp_path / "fused", "fp32", data, data, {}, fuse=True)
    assert all(row["max_abs_diff"] < 1e-4 and "kept_fp32" not in row and row["fusions"] for row in rows)
    assert {row["nonzero_fraction"] for row in rows} == {row["nonzero_fraction"] for row in made.rows}

    def wrong(model):
        result = fuse.fuse(model)
        for node in result.model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f *= 2
        return result

    monkeypatch.setattr(precision, "join", wrong)
    (tmp_path / "wrong").mkdir()
    with pytest.raises(MachineError, match="differs from PyTorch"):
        exporters.convert_task(small.model, made.folder, tmp_path / "wrong", "fp32", data, data, {}, fuse=True)


def test_a_packed_graph_is_refused(exported):
    packed, _ = pack.pack(pack.load(exported["retrieval"].folder / "image_encoder.onnx"), target="avx2")
    with pytest.raises(RequestError, match="packed graph has its own"):
        fuse.fuse(packed)


def test_the_sum_before_a_norm_is_still_there_for_others(exported):
    """A residual stream: the sum that is normed goes on, with the bias that was added on the way."""
    result = fuse.fuse(pack.load(exported["retrieval"].folder / "image_encoder.onnx"))
    norms = [node for node in result.model.graph.node if node.op_type == "SkipLayerNormalization"]
    assert any(len(node.output) == 4 for node in norms) and any(len(node.input) == 5 for node in norms)
    assert np.isclose(norms[0].attribute[0].f, 1e-6)
