"""The shell lines of action.yml and of the GitLab snippet run as they stand.

Only `pip` and `python` are replaced: by a script that writes down its arguments, which are held against pyproject.toml,
so that no test installs from the network. That the gate needs nothing else is tested by what it imports.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from vlprune.report.gate import judge
from vlprune.report.limits import read_limits


ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
DOCUMENT = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
NEEDED = ("pyyaml", "rich", "typer")


def _block(verb: str) -> str:
    found = re.search(rf"<!-- tests/report/test_ci.py {verb} this block -->\n```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    return found[1]


def _gitlab() -> list[str]:
    return yaml.safe_load(_block("runs"))["gate"]["script"]


@pytest.fixture
def job(tmp_path: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a run, limits and a baseline; `pip` and `python` write down how they are called."""
    report["metrics"] = [row for row in report["metrics"] if row["task"] == "vqa"]
    (tmp_path / "run").mkdir()
    (tmp_path / "baseline").mkdir()
    for folder in ("run", "baseline"):
        (tmp_path / folder / "report.json").write_text(json.dumps(report))
    (tmp_path / "gate.yaml").write_text("{max_metric_drop: 1, min_sparsity: 0.9, max_bytes: 5 MB}")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("pip", "python"):
        (tools / name).write_text('#!/bin/sh\nfor a in "$(basename "$0")" "$@"; do echo "$a"; done >> "$CALLS"\n')
        (tools / name).chmod(0o755)
    vlprune = shutil.which("vlprune", path=str(Path(sys.executable).parent))
    assert vlprune is not None, "vlprune is not installed beside this Python"
    (tools / "vlprune").symlink_to(vlprune)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("VLPRUNE", "a folder")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path


def _spoil(job: Path) -> None:
    path = job / "run" / "report.json"
    report = json.loads(path.read_text())
    for row in report["metrics"]:
        if row["variant"] == "multiflow-0.9-finetuned":
            row["values"]["accuracy"] -= 0.05
    path.write_text(json.dumps(report))


def _step(name: str, job: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Run a step of the action as GitHub does: its inputs, or their defaults, in place of ${{ inputs.x }}."""
    step = next(step for step in ACTION["runs"]["steps"] if step.get("name") == name)
    values = {key: str(told.get("default", "")) for key, told in ACTION["inputs"].items()} | inputs
    assert inputs.keys() <= ACTION["inputs"].keys()
    context = {f"inputs.{key}": value for key, value in values.items()} | {"github.action_path": "the action"}

    def substituted(text: str) -> str:
        return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: context[found[1]], text)

    assert "${{" not in step["run"], "inputs in a script can bring commands of their own"
    (job / "step.sh").write_text(step["run"])
    environment = os.environ | {key: substituted(value) for key, value in step.get("env", {}).items()}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(job / "step.sh")]
    return subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True, timeout=300)


def _required() -> list[str]:
    """What pyproject.toml says of the packages that a gate needs."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return sorted(line for line in told if re.match("[a-z]+", line)[0] in NEEDED)  # type: ignore[index]


def test_the_action_installs_what_a_gate_needs(job: Path) -> None:
    done = _step("Install vlprune", job)
    assert done.returncode == 0, done.stderr
    pip = ["python", "-m", "pip", "install", "--quiet"]
    assert (job / "calls").read_text().splitlines() == [*pip, *_required(), *pip, "--no-deps", "the action"]


def test_a_gate_imports_nothing_else(job: Path) -> None:
    heavy = {"torch", "numpy", "PIL", "onnx", "onnxruntime", "transformers", "safetensors", "accelerate", "jinja2"}
    code = (
        "import sys; from vlprune.cli.main import main\n"
        f"code = main(sys.argv[1:]); found = {heavy} & sys.modules.keys()\n"
        "sys.exit(str(found) if found else code)"
    )
    gate = ["gate", "run", "--limits", "gate.yaml", "--baseline", "baseline"]
    for command in (gate, ["compare", "run", "baseline"]):
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=job, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_action_passes_and_fails(job: Path) -> None:
    inputs = {"report": "run", "limits": "gate.yaml", "baseline": "baseline/report.json", "junit": "gate.xml"}
    done = _step("Gate", job, **inputs)
    assert done.returncode == 0, done.stderr
    assert "gate passed: 4 checks" in done.stdout
    assert (job / "summary.md").read_text().startswith("## vlprune gate: 4 checks passed\n")

    _spoil(job)
    done = _step("Gate", job, **inputs)
    assert done.returncode == 1 and "max_metric_drop of multiflow-0.9-finetuned (vqa / accuracy" in done.stderr
    assert "## vlprune gate: 2 of 4 checks failed" in (job / "summary.md").read_text()  # appended
    failures = list(ElementTree.parse(job / "gate.xml").iter("failure"))
    assert [failure.get("type") for failure in failures] == ["fail", "fail"]


def test_the_action_with_options_alone(job: Path) -> None:
    done = _step("Gate", job, report="run/report.json", options="--min-sparsity 0.9 --max-bytes 1MB")
    assert done.returncode == 1 and "1 of 2 checks: max_bytes" in done.stderr
    assert (job / "vlprune-gate.xml").is_file()
    assert _step("Gate", job, report="run").returncode == 2  # no limit
    assert _step("Gate", job, report="absent", options="--min-sparsity 0.9").returncode == 2


def test_inputs_bring_no_commands(job: Path) -> None:
    for text in ("$(touch hurt)", "`touch hurt`", "; touch hurt", '"; touch hurt; "', "--help"):
        done = _step("Gate", job, **dict.fromkeys(("report", "limits", "baseline", "junit", "options"), text))
        assert done.returncode == 2 or (text == "--help" and done.returncode == 0), done.stderr
        assert not (job / "hurt").exists()


@pytest.mark.parametrize("spoiled", [False, True])
def test_the_gitlab_snippet(job: Path, spoiled: bool) -> None:
    if spoiled:
        _spoil(job)
    (job / "job.sh").write_text("\n".join(_gitlab()))
    done = subprocess.run(["bash", "-eo", "pipefail", "job.sh"], cwd=job, capture_output=True, text=True, timeout=300)
    assert done.returncode == int(spoiled), done.stderr
    pip = ["pip", "install", "--quiet"]
    assert (job / "calls").read_text().splitlines() == [*pip, *_required(), *pip, "--no-deps", "a folder"]
    assert len(list(ElementTree.parse(job / "gate.xml").iter("failure"))) == (2 if spoiled else 0)


def test_the_limits_of_the_document(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "gate.yaml").write_text(_block("reads"))
    limits = read_limits(tmp_path / "gate.yaml")
    assert len(limits.values) == 6
    statuses = {check.limit: check.status for check in judge(copy.deepcopy(report), limits)}
    assert statuses.keys() == limits.values.keys()
