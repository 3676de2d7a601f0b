import copy
import json
import math
from typing import Any

import pytest

from vlprune.errors import RequestError
from vlprune.report.schema import validate_report


def test_a_complete_report_passes_and_survives_json(report: dict[str, Any]) -> None:
    assert validate_report(json.loads(json.dumps(report))) == report


def _set(path: list[Any], value: Any) -> Any:
    def change(report: dict[str, Any]) -> None:
        for step in path[:-1]:
            report = report[step]
        report[path[-1]] = value

    return change


def _drop(path: list[Any]) -> Any:
    def change(report: dict[str, Any]) -> None:
        for step in path[:-1]:
            report = report[step]
        del report[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(["schema_version"], 2), "schema_version is 2"),
        (_drop(["seed"]), "seed is missing"),
        (_drop(["graphs", 0, "bytes"]), "graphs[0].bytes is missing"),
        (_set(["extra"], 1), "extra is unknown"),
        (_set(["seed"], True), "seed is True"),
        (_set(["model", "parameters"], 3.5), "model.parameters is 3.5"),
        (_set(["metrics", 0, "values", "accuracy"], math.nan), "metrics[0].values.accuracy is nan"),
        (_set(["throughput", 0, "ratio"], math.inf), "throughput[0].ratio is inf"),
        (_set(["throughput", 0, "verdict"], "quick"), "throughput[0].verdict is 'quick'"),
        (_set(["metrics", 0, "variant"], "nobody"), "metrics[0] names the unknown variant 'nobody'"),
        (_set(["metrics", 0, "ci95", "accuracy"], [0.9, 0.1]), "metrics[0].ci95.accuracy is not [low, high]"),
        (_set(["metrics", 0, "ci95", "cider"], [0.1, 0.9]), "interval for cider but no value"),
        (_set(["variants", 2, "sparsity", "achieved"], 1.2), "multiflow-0.9 has a sparsity outside 0 to 1"),
        (_set(["variants", 1, "id"], "dense"), "variant dense is there twice"),
        (_set(["graphs", 0, "file"], "../outside.onnx"), "graphs[0].file leaves the run directory"),
        (_set(["graphs", 0, "file"], "/etc/passwd"), "graphs[0].file leaves the run directory"),
        (_set(["model", "random_weights"], True), "although the weights are random"),
        (_set(["metrics"], {}), "metrics is no list"),
        (_set(["metrics", 0], []), "metrics[0] is no object"),
    ],
)
def test_what_is_wrong_is_named(report: dict[str, Any], change: Any, says: str) -> None:
    broken = copy.deepcopy(report)
    change(broken)
    with pytest.raises(RequestError) as caught:
        validate_report(broken, "r.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("r.json is not a valid report: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [None, [], "report", 3])
def test_junk_is_refused(junk: Any) -> None:
    with pytest.raises(RequestError, match="it is no object"):
        validate_report(junk)


def test_many_problems_are_counted_not_listed(report: dict[str, Any]) -> None:
    report["model"] = {}
    report["environment"] = {}
    with pytest.raises(RequestError, match="and 9 more"):
        validate_report(report)


def test_skipped_records_may_be_told(report: dict[str, Any]) -> None:
    report["metrics"][0]["skipped"] = 3
    validate_report(report)
