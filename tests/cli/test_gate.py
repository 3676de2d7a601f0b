"""The verbs gate and compare: files, options, exit codes."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vlprune.cli.main import main


VARIANT = {"method": "omp", "ratio": 0.5, "pattern": "unstructured", "finetuned": False, "parameters": 10}
REPORT: dict[str, Any] = {
    "schema_version": 1,
    "model": {
        "name": "m", "family": "blip", "checkpoint": "c", "parameters": 10, "prunable_parameters": 8,
        "random_weights": False,
    },
    "seed": 0,
    "variants": [
        {**VARIANT, "id": "omp-0.5", "sparsity": {"achieved": 0.5, "per_modality": {"vision": 0.5}, "per_layer": {}}}
    ],
    "metrics": [], "graphs": [], "throughput": [], "samples": [], "stages": [],
    "environment": {
        "python": "3", "torch": None, "onnxruntime": None, "providers": [], "cpu": "c", "gpu": None, "driver": None,
        "threads": 1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(REPORT))
    return tmp_path / "run"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "run", "--min-sparsity", "0.5"]) == 0
    assert "gate passed: 1 check" in capsys.readouterr().out
    assert main(["gate", "run/report.json", "--min-sparsity", "0.6"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "error: gate failed, 1 of 1 check: min_sparsity of omp-0.5 (all prunable layers): 0.5000; "
        "allowed: at least 0.6\n"
    )
    assert "FAIL" in captured.out and "\x1b" not in captured.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "no limit in the command line"),
        (["--min-sparsity", "2"], "min_sparsity 2 is no share"),
        (["--min-sparsity", "nan"], "min_sparsity nan is no share"),
        (["--max-bytes", "1 apple"], "max_bytes '1 apple' is no size"),
        (["--min-sparsity", "0.5", "--variant", "omp-0.6"], "unknown variant 'omp-0.6': did you mean omp-0.5?"),
        (["--min-sparsity", "0.5", "--baseline", "run"], "no limit is held against it"),
        (["--min-sparsity", "0.5", "--baseline", "absent"], "absent: no such file"),
        (["--max-metric-drop", "1", "--against", "baseline"], "give --baseline"),
        (["--limits", "absent.yaml"], "absent.yaml: no such file"),
        (["--min-sparsity", "0.5", "--junit", "run"], "run is a folder"),
        (["--min-sparsity", "0.5", "--junit", "run/report.json/x"], "cannot write"),
        (["--min-sparsty", "0.5"], "did you mean --min-sparsity?"),
        (["--max-metric-drop", "vqa=1,vqa=2"], "twice"),
        (["--required-providers", "cpu,,cuda", "--min-sparsity", "0"], "empty entry"),
    ],
)
def test_wrong_requests(capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    assert main(["gate", "run", *options]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_problems_of_a_limits_file_get_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    Path("gate.yaml").write_text("{min_sparsty: 0.5, max_bytes: -1, against: dens}")
    assert main(["gate", "run", "--limits", "gate.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: gate.yaml has 3 problems" and len(lines) == 4


@pytest.mark.parametrize("content", ["", "[" * 60_000, "a: &a [*a]", "!!python/name:os.system", "\x00", "[1]", "3"])
def test_hostile_limits(capsys: pytest.CaptureFixture[str], content: str) -> None:
    Path("gate.yaml").write_text(content)
    assert main(["gate", "run", "--limits", "gate.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_outputs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("before\n")
    command = ["gate", "run", "--min-sparsity", "vision=0.4,default=0.5", "--junit", "out/gate.xml", "--json"]
    assert main(command) == 0
    assert main([*command, "--max-abs-diff", "1"]) == 1  # there is no graph
    captured = capsys.readouterr().out
    second = json.loads(captured[captured.index("}\n{") + 2 :])
    assert (second["passed"], second["broken"], len(second["checks"])) == (False, 1, 3)
    assert second["checks"][2]["status"] == "missing"
    assert len(list(ElementTree.parse("out/gate.xml").iter("testcase"))) == 3
    summary = Path("summary.md").read_text()
    assert summary.startswith("before\n## vlprune gate: 2 checks passed\n") and "1 of 3 checks failed" in summary
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "run")
    assert main(command) == 2
    assert "named by $GITHUB_STEP_SUMMARY" in capsys.readouterr().err


def test_compare(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "run", "run/report.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"][0]["a"] == 0.5
    assert main(["compare", "run", "run"]) == 0
    assert "Sparsity" in capsys.readouterr().out
    assert main(["compare", "run", "run", "--markdown"]) == 0
    assert "| omp-0.5 | all prunable layers | 0.5000 | 0.5000 | +0.0000 |" in capsys.readouterr().out
    assert main(["compare", "run", "run", "--markdown", "--json"]) == 2
    assert main(["compare", "run", "absent"]) == 2
    (run / "report.json").write_text("{}")
    assert main(["compare", "run", "run"]) == 2
