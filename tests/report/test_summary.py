from typing import Any

import pytest

from vlprune.report.markdown import render_markdown
from vlprune.report.schema import validate_report
from vlprune.report.summary import STRUCTURED, ZEROS, Row, cost_table, gpu_notes, notes, side_by_side, summarize


def test_onnx_falls_back_to_the_pruned_model_when_nothing_was_trained(report: dict[str, Any]) -> None:
    report["variants"] = [variant for variant in report["variants"] if not variant["finetuned"]]
    report["metrics"] = [row for row in report["metrics"] if "finetuned" not in row["variant"]]
    report["metrics"].append(
        {**report["metrics"][1], "runtime": "onnxruntime", "values": {"accuracy": 0.3}, "ci95": {}},
    )
    assert summarize(report)[0] == Row("multiflow-0.9", "vqa", "accuracy", 0.98, None, 0.31, None, 0.3)


def test_rounded_or_packed_scores_do_not_stand_in(report: dict[str, Any]) -> None:
    for row in report["metrics"]:
        if row["runtime"] == "onnxruntime":
            row["precision"] = "int8"
    assert summarize(report)[0].onnx is None
    for row in report["metrics"]:
        row["precision"], row["packed"] = "fp32", row["runtime"] == "onnxruntime"
    assert summarize(report)[0].onnx is None


def test_a_variant_that_is_only_fine_tuned_has_a_row(report: dict[str, Any]) -> None:
    del report["variants"][2], report["metrics"][2]
    row = summarize(report)[0]
    assert (row.variant, row.pruned, row.finetuned) == ("multiflow-0.9", None, 0.95)


def test_packed_stands_beside_int8_and_tells_which_was_disturbed(report: dict[str, Any]) -> None:
    (timed,) = report["throughput"]
    packed = {**timed, "packed": True, "weights": "fp16", "ratio": 3.0, "ratio_ci95": [2.5, 3.5]}
    int8 = {**timed, "variant": "dense-finetuned", "precision": "int8-dynamic", "note": "9 of 12 rounds"}
    report["throughput"] += [packed, int8, {**int8, "batch": 1}]
    (row,) = side_by_side(report)
    assert row["packed, times faster"] == "3.000 [2.500, 3.500]"
    assert row["int8, times faster"] == "0.990 [0.970, 1.010] (disturbed)"


def test_every_ratio_has_its_rows_in_order(report: dict[str, Any]) -> None:
    report["variants"].append({**report["variants"][2], "id": "omp-0.5", "method": "omp", "ratio": 0.5})
    assert [(row.variant, row.task) for row in summarize(report)] == [
        ("multiflow-0.9", "vqa"),
        ("multiflow-0.9", "captioning"),
        ("omp-0.5", "vqa"),
        ("omp-0.5", "captioning"),
    ]


@pytest.fixture
def structured(report: dict[str, Any]) -> dict[str, Any]:
    """The same, but units were removed, by one method for all tasks and by another for one."""
    for variant in report["variants"]:
        variant["flops"] = {"vqa": 40_000_000_000, "captioning": 30_000_000_000}
        if variant["method"]:
            variant |= {"pattern": "structured", "parameters": 1_200_000, "flops": {"vqa": 9_000_000_000}}
    own = {**report["variants"][2], "id": "upop-0.9", "method": "upop"}
    task = {key: own[key] for key in ("sparsity", "parameters", "flops")} | {"dense_parameters": 2_000_000}
    report["variants"].append({**own, "per_task": {"vqa": task}})
    return report


def test_parameters_and_operations_beside_the_dense_model(structured: dict[str, Any]) -> None:
    assert cost_table(structured) == [
        {"variant": "dense", "parameters": "3.00 M", "vqa GFLOPs": "40.000", "captioning GFLOPs": "30.000"},
        {
            "variant": "multiflow-0.9",
            "parameters": "1.20 M (40.0 %)",
            "vqa GFLOPs": "9.000 (22.5 %)",
            "captioning GFLOPs": "–",
        },
        {
            "variant": "upop-0.9, vqa",
            "parameters": "1.20 M (60.0 %)",
            "vqa GFLOPs": "9.000 (22.5 %)",
            "captioning GFLOPs": "–",
        },
    ]
    assert "| upop-0.9, vqa | 1.20 M (60.0 %) | 9.000 (22.5 %) | – |" in render_markdown(structured)
    validate_report(structured)


def test_notes_tell_masks_from_removed_units(report: dict[str, Any]) -> None:
    assert notes(report) == [ZEROS] and cost_table(report) == []
    for variant in report["variants"]:
        variant["pattern"] = variant["method"] and "structured"
    assert notes(report) == [STRUCTURED]


def test_timings_on_a_gpu_tell_where_nodes_ran_and_what_tensorrt_chose(report: dict[str, Any]) -> None:
    row = report["throughput"][0]
    assert gpu_notes(report) == []
    row |= {"provider": "tensorrt", "nodes": {"dense": {"tensorrt": 1}, "compressed": {"tensorrt": 1, "cpu": 3}}}
    row |= {"gpu": [{"throttled": []}, {"throttled": ["power cap"]}], "sparse_layers": {"eligible": 48, "chosen": 0}}
    row |= {"verdict": "faster"}
    validate_report(report)
    device, nodes, clocks, sparse = gpu_notes(report)
    assert "device alone" in device and "3 of 4 nodes of the compressed graph" in nodes
    assert "(power cap)" in clocks and "0 of 48 layers" in sparse and "not faster" in sparse
    row["sparse_layers"] = {"eligible": 48, "chosen": 2}
    assert gpu_notes(report)[-1].endswith("sparse tensor cores; faster than dense.")


def test_graphs_that_were_not_scored_are_told(report: dict[str, Any]) -> None:
    assert not any("Not scored" in note for note in notes(report))
    report["metrics"] = [row for row in report["metrics"] if row["runtime"] == "pytorch"]
    (told,) = [note for note in notes(report) if "Not scored" in note]
    assert "graphs of vqa." in told and "run vlprune validate" in told
    report["model"]["random_weights"], report["metrics"] = True, []
    assert not any("Not scored" in note for note in notes(report))
