import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlprune import doctor, machine
from vlprune.cli.main import main


def test_the_verb_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"] and {"name", "status", "what", "remedy"} == found["findings"][0].keys()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert {row["name"]: row["status"] for row in found["findings"]}["hub"] == "warning"


def test_the_verb_at_a_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    faults = [doctor.Finding("disk", "fault", "it is full", "free some"), doctor.Finding("hub", "ok", "it answers")]
    monkeypatch.setattr(doctor, "examine", lambda: faults)
    assert main(["doctor"]) == 3
    out = capsys.readouterr().out
    assert "disk: free some" in out and "1 fault." in out


@pytest.mark.parametrize("option", [["--provider", "cuda"], ["--provider", "cpu,tensorrt"], ["--device", "cuda"]])
def test_no_verb_starts_without_its_machine(
    monkeypatch: pytest.MonkeyPatch,
    pipeline: Any,
    tmp_path: Path,
    option: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "driver_cuda", lambda: None)
    (tmp_path / "recipe.yaml").touch()
    verbs = ["validate", "bench"] if option[0] == "--provider" else ["finetune"]
    commands = [["compress", "a/b", "-o", str(tmp_path / "out")], *([verb, str(tmp_path)] for verb in verbs)]
    for command in commands:
        assert main([*command, *option]) == 3
        assert "no NVIDIA driver (libcuda.so.1)" in capsys.readouterr().err
    assert pipeline.calls == []
