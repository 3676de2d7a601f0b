import io
from typing import Any

from rich.console import Console

from vlprune.report.terminal import print_report, table


def _print(report: Any) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=160, highlight=False))
    return file.getvalue()


def test_final_table(report: dict[str, Any]) -> None:
    text = _print(report)
    (row,) = [line.split() for line in text.splitlines() if "accuracy" in line]
    assert row == ["multiflow-0.9", "vqa", "accuracy", "98.0", "98.5", "31.0", "95.0", "95.1"]
    assert "0.900000" in text
    assert "no measurable difference" in text
    assert "do not make standard ONNX operators faster" in text
    assert "\x1b" not in text


def test_a_disturbed_timing_gets_no_verdict(report: dict[str, Any]) -> None:
    report["throughput"][0]["note"] = "other processes disturbed 9 of 12 rounds"
    text = _print(report)
    assert "no measurable difference" not in text
    assert "disturbed" in text and "Timings marked disturbed get no verdict" in text


def test_random_weights_show_no_score(report: dict[str, Any]) -> None:
    report["model"]["random_weights"] = True
    text = _print(report)
    assert "The weights are random" in text
    assert "accuracy  " not in text


def test_table_prints_brackets_and_kinds_of_values_as_they_are() -> None:
    file = io.StringIO()
    rows = [{"name": "[bold]", "n": 1234567, "x": 0.5, "ok": True}, {"name": "b", "n": None, "tags": ["u", "v"]}]
    Console(file=file, width=120).print(table("[red]caption", rows))
    text = file.getvalue()
    for piece in ("[red]caption", "[bold]", "1,234,567", "0.5", "yes", "u, v", "–"):
        assert piece in text
