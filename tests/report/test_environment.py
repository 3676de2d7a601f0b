import subprocess

import pytest

from vlprune.report import environment as module
from vlprune.report.schema import Environment


def test_environment_has_the_declared_keys() -> None:
    found = module.environment(threads=3)
    assert found.keys() == Environment.__required_keys__
    assert found["threads"] == 3
    assert found["cpu"]
    assert "CPUExecutionProvider" in found["providers"]


def test_threads_default_to_what_the_process_may_use() -> None:
    assert module.environment()["threads"] >= 1


def test_gpu_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "Some GPU, 80GB, 580.1\nSecond, 580.1\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, answer))
    found = module.environment()
    assert (found["gpu"], found["driver"]) == ("Some GPU, 80GB", "580.1")


def test_no_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    found = module.environment()
    assert (found["gpu"], found["driver"]) == (None, None)


def test_versions_leave_out_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("vlprune", "no-such-package"))
    assert list(module.versions()) == ["vlprune"]
