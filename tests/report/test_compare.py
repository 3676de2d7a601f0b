import copy
import json
from typing import Any

import pytest

from vlprune.report.compare import compare, tables


TUNED = "multiflow-0.9-finetuned"


def _find(rows: list[dict[str, Any]], **which: str) -> dict[str, Any]:
    (row,) = [row for row in rows if which.items() <= row.items()]
    return row


@pytest.fixture
def pair(report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return report, copy.deepcopy(report)


def test_equal_reports(pair: tuple[Any, Any]) -> None:
    found = compare(*pair)
    assert found["notes"] == []
    assert {row["says"] for row in found["scores"] + found["throughput"] + found["sizes"]} == {"equal"}
    assert {row["difference"] for row in found["sizes"]} == {1.0}
    assert {row["difference"] for row in found["scores"]} == {0}
    json.dumps(found, allow_nan=False)


def test_scores_differ_where_the_intervals_do_not_overlap(pair: tuple[Any, Any]) -> None:
    a, b = pair
    (row,) = [row for row in b["metrics"] if row["variant"] == TUNED and row["runtime"] == "pytorch"]
    where = {"variant": TUNED, "metric": "accuracy", "measured": "pytorch cpu plain"}
    for value, interval, says in (
        (0.94, [0.92, 0.96], "no clear difference"),
        (0.90, [0.88, 0.92], "B worse"),
        (0.99, [0.98, 1.0], "B better"),
    ):
        row["values"]["accuracy"], row["ci95"]["accuracy"] = value, interval
        told = _find(compare(a, b)["scores"], **where)
        assert told["says"] == says and told["difference"] == pytest.approx(100 * value - 95)
        assert told["a_ci95"] == pytest.approx([93, 97])
    row["n"] = 100
    assert _find(compare(a, b)["scores"], **where)["says"] == "other test data (500 of scenes, 100 of scenes)"
    row["n"], row["ci95"] = 500, {}
    assert _find(compare(a, b)["scores"], **where)["says"] == "no interval"


def test_speeds_and_sizes(pair: tuple[Any, Any]) -> None:
    a, b = pair
    b["throughput"][0] |= {"ratio": 2.0, "ratio_ci95": [1.9, 2.1]}
    b["graphs"][0]["bytes"] = 2_100_000
    found = compare(a, b)
    assert found["throughput"][0]["says"] == "B faster"
    assert (found["sizes"][0]["says"], found["sizes"][0]["difference"]) == ("B smaller", 0.5)
    b["throughput"][0]["note"] = "disturbed"
    assert compare(a, b)["throughput"][0]["says"] == "disturbed: no evidence"


def test_what_only_one_has(pair: tuple[Any, Any]) -> None:
    a, b = pair
    b["metrics"] = [row for row in b["metrics"] if row["task"] == "vqa"]
    a["graphs"][0] |= {"graph": "other"}
    found = compare(a, b)
    cider = _find(found["scores"], metric="cider")
    assert (cider["b"], cider["difference"], cider["says"]) == (None, None, "only in A")
    assert [row["says"] for row in found["sizes"]] == ["only in A", "only in B"]


def test_other_models_and_machines_are_noted(pair: tuple[Any, Any]) -> None:
    a, b = pair
    b["model"]["checkpoint"], b["environment"]["threads"] = "other", 8
    first, second = compare(a, b)["notes"]
    assert "checkpoint embedded and other" in first and "threads 2 and 8" in second


def test_tables_show_the_metrics_that_stand_for_a_task(pair: tuple[Any, Any]) -> None:
    shown = tables(compare(*pair))
    assert [*shown] == ["Scores x 100", "Sparsity", "Size of graphs", "Dense time / compressed time"]
    assert {row["metric"] for row in shown["Scores x 100"]} == {"accuracy", "cider"}
    assert shown["Size of graphs"][0]["B / A"] == "x 1.000" and shown["Scores x 100"][0]["A"] == "98.0 [97.0, 99.0]"
