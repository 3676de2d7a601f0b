import json
import subprocess
import sys
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from vlprune import doctor, machine, probe
from vlprune.errors import MachineError
from vlprune.runtime import operators


OK = {
    "torch": {"found": {"gpus": ["A card"]}},
    "cpu": {"found": {"providers": ["CPUExecutionProvider"]}},
    "cuda": {"found": {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}},
    "tensorrt": {"found": {"providers": ["TensorrtExecutionProvider"]}},
    "operators": {"found": {"isa": "avx2", "library": "libvlprune_ops.so"}},
    "hub": {"found": {"address": "https://huggingface.co", "status": 200}},
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Examine a machine of one's choosing: pretend(probes that differ, **facts of vlprune.machine) -> findings."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def examine(answers: dict[str, Any] | None = None, **facts: Any) -> dict[str, doctor.Finding]:
        whole = {
            "runtimes": {"onnxruntime-gpu": "1.31.1"},
            "provider_library": Path("libonnxruntime_providers_cuda.so"),
            "missing_libraries": [],
            "has_library": True,
            "driver_cuda": (13, 0),
            "has_gpu": True,
            "runtime_cuda": "13.0",
            "torch_cuda": "13.0",
        }
        for name, fact in (whole | facts).items():
            monkeypatch.setattr(machine, name, lambda *_, fact=fact: fact)
        monkeypatch.setattr(doctor, "_probe", lambda name: (OK | (answers or {}))[name])
        monkeypatch.setattr(doctor, "_cards", lambda: "A card, 580.1")
        return {finding.name: finding for finding in doctor.examine()}

    return examine


NO_GPU = {"driver_cuda": None, "has_gpu": False}
CPU = {"runtimes": {"onnxruntime": "1.31.1"}, "provider_library": None, "runtime_cuda": None, "torch_cuda": None}
ON_CPU = {"torch": {"found": {"gpus": []}}}


def statuses(found: dict[str, doctor.Finding], status: str) -> set[str]:
    return {finding.name for finding in found.values() if finding.status == status}


def test_a_whole_machine_with_a_gpu(pretend: Any) -> None:
    found = pretend()
    assert statuses(found, "ok") == found.keys()
    assert {"provider cuda", "provider tensorrt", "libraries of cuda", "hub", "operators"} <= found.keys()
    assert "A card" in found["driver"].what and "13.0" in found["driver"].what


def test_a_whole_machine_without_a_gpu(pretend: Any) -> None:
    found = pretend(ON_CPU, **NO_GPU, **CPU)
    assert statuses(found, "ok") == found.keys()
    assert "provider cuda" not in found


@pytest.mark.parametrize(
    ("answers", "facts", "name", "status", "what", "remedy"),
    [
        (
            {},
            {"runtimes": {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}},
            "onnxruntime",
            "fault",
            "onnxruntime 1.31.1, onnxruntime-gpu 1.30.0: they overwrite",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'vlprune[gpu]'",
        ),
        ({}, {"runtimes": {}}, "onnxruntime", "fault", "not installed", "pip install 'vlprune[gpu]'"),
        (
            {},
            {"runtimes": {"onnxruntime": "1.31.1"}, "provider_library": None},
            "onnxruntime",
            "warning",
            "for CPUs, though there is a GPU",
            "vlprune[gpu]",
        ),
        (
            {"cuda": {"error": "x"}},
            {"missing_libraries": ["libcublas.so.13"]},
            "libraries of cuda",
            "fault",
            "libcublas.so.13 cannot be found",
            "pip install nvidia-cublas",
        ),
        (
            {"cuda": {"error": "it fell back"}},
            {"missing_libraries": ["libcublas.so.13"]},
            "provider cuda",
            "fault",
            "libcublas.so.13",
            "--provider cpu, or: pip install nvidia-cublas",
        ),
        (
            {"cuda": {"error": "CUDA failure 35"}} | ON_CPU,
            NO_GPU,
            "provider cuda",
            "warning",
            "no NVIDIA driver",
            "--provider cpu",
        ),
        ({}, {"driver_cuda": (12, 8)}, "CUDA", "fault", "the driver serves 12.8 at most", "update the driver"),
        ({}, {"torch_cuda": "12.8"}, "CUDA", "warning", "torch is built for CUDA 12.8, onnxruntime for 13.0", "torch"),
        ({}, {"has_library": False}, "cuDNN", "warning", "libcudnn.so.9", "pip install nvidia-cudnn-cu13"),
        ({}, {"driver_cuda": None}, "driver", "fault", "a GPU, but no driver", "install the NVIDIA driver"),
        (ON_CPU, {"torch_cuda": None}, "torch", "warning", "though there is a GPU", "a CUDA build of torch"),
        ({"torch": {"error": "undefined symbol"}}, {}, "torch", "fault", "undefined symbol", "--force-reinstall"),
        ({"cpu": {"error": "killed by signal 11"}}, {}, "provider cpu", "fault", "signal 11", "vlprune[cpu]"),
        ({"operators": {"error": "they were not built"}}, {}, "operators", "warning", "not built", "C++ compiler"),
        ({"operators": {"error": "invalid ELF header"}}, {}, "operators", "fault", "invalid ELF", "C++ compiler"),
        ({"hub": {"error": "Name or service not known"}}, {}, "hub", "warning", "Name or service", "give a folder"),
    ],
)
def test_faults_are_found(
    pretend: Any, answers: dict[str, Any], facts: dict[str, Any], name: str, status: str, what: str, remedy: str
) -> None:
    found = pretend(answers, **facts)
    assert (found[name].status, what in found[name].what, remedy in found[name].remedy) == (status, True, True)
    assert doctor.report(list(found.values()))["works"] == (not statuses(found, "fault"))


def test_a_full_disk(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100 * doctor.GB, 0, 50_000_000))
    found = pretend()
    assert statuses(found, "fault") == {"disk: this folder", "disk: cache of the hub"}
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100 * doctor.GB, 0, 2 * doctor.GB))
    assert statuses(pretend(), "warning") == {"disk: this folder", "disk: cache of the hub"}


def test_a_folder_that_cannot_be_written_to(
    pretend: Any, open_folder: Path, ordinary_user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (open_folder / "closed").mkdir(mode=0o555)
    monkeypatch.setenv("HF_HOME", str(open_folder / "closed" / "below"))
    with ordinary_user():
        found = pretend()["disk: cache of the hub"]
    assert (found.status, "cannot be written" in found.what) == ("warning", True) and "HF_HOME" in found.remedy


def test_little_memory(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_memory", lambda: doctor.GB // 2)
    assert pretend()["memory"].status == "fault"
    monkeypatch.setattr(doctor, "_free_memory", lambda: 2 * doctor.GB)
    assert pretend()["memory"].status == "warning"
    monkeypatch.setattr(doctor, "_free_memory", lambda: None)
    assert pretend()["memory"].status == "ok"


def test_an_offline_machine_asks_nobody(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pretend({"hub": None})["hub"]
    assert found.status == "warning" and "HF_HUB_OFFLINE" in found.what


def test_packages_outside_their_ranges(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "numpy>=99",
        "no-such-package<2",
        "rich",
        'onnxruntime>=99; extra == "cpu"',
        'also-missing; extra == "gpu"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    found = pretend()
    assert found["numpy"].status == found["onnxruntime"].status.replace("ok", "warning") == "warning"
    assert found["numpy"].remedy == "pip install 'numpy>=99'"
    assert found["no-such-package"].status == "fault"
    assert not {"rich", "also-missing", "packages"} & found.keys()


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "operators"])
def test_probes_run_here(name: str) -> None:
    assert "found" in doctor._probe(name)


def test_a_provider_that_is_not_there_answers() -> None:
    if machine.provider_library("cuda"):
        pytest.skip("this onnxruntime has CUDA")
    assert "provider cuda" in doctor._probe("cuda")["error"]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it was killed by signal 11"),
        ("raise ImportError('no module')", "ImportError: no module"),
        ("import sys; sys.exit(7)", "it ended with exit code 7"),
    ],
)
def test_what_crashes_or_hangs_does_not_take_the_doctor_along(
    script: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run
    monkeypatch.setattr(doctor, "SECONDS", 1.0)
    monkeypatch.setattr(subprocess, "run", lambda command, **more: run([sys.executable, "-c", script], **more))
    start = time.monotonic()
    assert doctor._probe("cpu") == {"error": error}
    assert time.monotonic() - start < 30


def test_a_broken_operator_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    broken = tmp_path / "libvlprune_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(operators, "library", lambda: broken)
    probe.main("operators")
    assert doctor._operators(json.loads(capsys.readouterr().out)).status == "fault"

    def missing() -> Path:
        raise MachineError(f"the operators for packed graphs were not built: {operators.BUILD}")

    monkeypatch.setattr(operators, "library", missing)
    probe.main("operators")
    assert doctor._operators(json.loads(capsys.readouterr().out)).status == "warning"


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    probe.main("hub")
    assert "refused" in json.loads(capsys.readouterr().out)["error"]
