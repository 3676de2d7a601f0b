from typing import Any

from vlprune.report.summary import Row, side_by_side, summarize


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
