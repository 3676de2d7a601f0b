"""What this machine can run, what it cannot, and the remedy: the findings of `vlprune doctor`.

A fault is something that is installed and does not work, or without which nothing works; a warning, something that
only some models or verbs miss. What may crash or hang is tried in processes of their own, all at once
(`vlprune.probe`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from vlprune import machine
from vlprune.runtime.operators import BUILD


SECONDS = 20.0  # that a probe may take; a GPU's libraries load for some
HUB_SECONDS = 5.0
GB = 1_000_000_000
PYTHON = (3, 11)
# Bytes below which there is a warning, and a fault: a base model with its run takes some gigabytes, the smallest one
# and its libraries about one of memory.
DISK, MEMORY = (5 * GB, GB // 10), (4 * GB, GB)
HUB_USE = "aliases such as blip are read from the hub: without it give a folder or a .pth file"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: how it is.
        what: what was seen.
        remedy: what to do about it; "" where nothing is to be done.
    """

    name: str
    status: Literal["ok", "warning", "fault"]
    what: str
    remedy: str = ""


Answer = Mapping[str, Any]  # of a probe: {"found": {...}} or {"error": "why"}


def examine() -> list[Finding]:
    """Look at everything; takes some seconds.

    Returns:
        list[Finding]: in the order in which one thing needs the other.
    """
    answers = probes(["torch", "cpu", *_gpu_providers(), "operators", *([] if _offline() else ["hub"])])
    return [
        _python(),
        *_packages(),
        _driver(),
        _torch(answers["torch"]),
        _runtime(),
        *_cuda(),
        *(_provider(name, answers[name]) for name in ("cpu", "cuda", "tensorrt") if name in answers),
        _operators(answers["operators"]),
        _disk("disk: this folder", Path.cwd()),
        _disk("disk: cache of the hub", _cache()),
        _memory(),
        _hub(answers.get("hub")),
    ]


def report(findings: list[Finding]) -> dict[str, Any]:
    """Gather the findings for machines.

    Args:
        findings: of `examine`.

    Returns:
        dict[str, Any]: `works` (there is no fault) and `findings`.
    """
    works = all(finding.status != "fault" for finding in findings)
    return {"works": works, "findings": [asdict(finding) for finding in findings]}


# --- probes -----------------------------------------------------------------------------------------------------------


def probes(names: list[str]) -> dict[str, Answer]:
    """Run probes side by side.

    Args:
        names: keys of `vlprune.probe.PROBES`.

    Returns:
        dict[str, Answer]: by name.
    """
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(_probe, names), strict=True))


def _probe(name: str) -> Answer:
    """Run a probe in a process of its own: one that crashes or hangs is an answer, too."""
    seconds = HUB_SECONDS if name == "hub" else SECONDS
    command = [sys.executable, "-P", "-m", "vlprune.probe", name]  # -P: a folder vlprune/ here is not the package
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} seconds"}
    except OSError as error:
        return {"error": str(error)}
    if done.returncode < 0:
        return {"error": f"it was killed by signal {-done.returncode}"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"error": (done.stderr.splitlines() or [f"it ended with exit code {done.returncode}"])[-1][:300]}


def _gpu_providers() -> list[str]:
    """The GPU providers that the package installed has."""
    return [name for name in ("cuda", "tensorrt") if machine.provider_library(name)]


# --- findings ---------------------------------------------------------------------------------------------------------


def _python() -> Finding:
    what = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info < PYTHON:
        return Finding("python", "fault", what, "take Python 3.11 or newer")
    return Finding("python", "ok", what)


def _packages() -> Iterator[Finding]:
    """Hold the packages installed against what vlprune asks for."""
    try:
        asked = metadata.requires("vlprune") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages", "fault", "vlprune is not installed", "pip install '.[cpu]' in the folder of its sources"
        )
        return
    wrong = 0
    for requirement in map(Requirement, asked):
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        if not version and not optional:
            yield Finding(requirement.name, "fault", "it is not installed", remedy)
        elif version and not requirement.specifier.contains(version, prereleases=True):
            what = f"{version} is outside the range that vlprune is tested with, {requirement.specifier}"
            yield Finding(requirement.name, "warning", what, remedy)
        else:
            continue
        wrong += 1
    if not wrong:
        yield Finding("packages", "ok", f"vlprune {metadata.version('vlprune')}, and what it needs within its ranges")


def _driver() -> Finding:
    newest = machine.driver_cuda()
    if newest is None:
        what = "no NVIDIA driver (libcuda.so.1): models run on the CPU"
        if machine.has_gpu():
            return Finding("driver", "fault", "a GPU, but no driver (libcuda.so.1)", "install the NVIDIA driver")
        return Finding("driver", "ok", what)
    serves = f"it serves CUDA up to {newest[0]}.{newest[1]}"
    try:
        return Finding("driver", "ok", f"{_cards()}; {serves}")
    except (OSError, subprocess.SubprocessError) as error:
        if not machine.has_gpu():
            remedy = "start the container with --gpus all, or use --provider cpu"
            return Finding("driver", "warning", f"a driver, but no GPU is visible (/dev/nvidia0); {serves}", remedy)
        remedy = "look at the output of nvidia-smi; restart after an update of the driver"
        return Finding("driver", "warning", f"nvidia-smi fails ({type(error).__name__}); {serves}", remedy)


def _cards() -> str:
    """Names of the GPUs, and the driver's version."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=HUB_SECONDS, check=True).stdout
    return "; ".join(said.split("\n")[:-1])


def _torch(answer: Answer) -> Finding:
    cuda = machine.torch_cuda()
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    if "error" in answer:
        remedy = "pip install --force-reinstall torch"
        return Finding("torch", "fault", f"it does not work ({answer['error']})", remedy)
    gpus = answer["found"]["gpus"]
    what = f"{_version('torch')}, {built}; it computes on {', '.join(gpus) if gpus else 'the CPU'}"
    if gpus or not machine.has_gpu():
        return Finding("torch", "ok", what)
    remedy = "pip install a CUDA build of torch" if cuda is None else "update the NVIDIA driver"
    return Finding("torch", "warning", f"{what}, though there is a GPU", remedy)


def _runtime() -> Finding:
    """One package of onnxruntime, and the one for this machine."""
    installed = machine.runtimes()
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    gpu = machine.driver_cuda() is not None and machine.has_gpu()
    again = machine.REINSTALL.format(extra="gpu" if gpu else "cpu")
    if not installed:
        extra = "gpu" if gpu else "cpu"
        return Finding("onnxruntime", "fault", "it is not installed", f"pip install 'vlprune[{extra}]'")
    if len(installed) > 1:
        what = f"{listed}: they overwrite each other's files, and a GPU provider may be lost in silence"
        return Finding("onnxruntime", "fault", what, again)
    if gpu and not _gpu_providers():
        return Finding("onnxruntime", "warning", f"{listed} is for CPUs, though there is a GPU", again)
    return Finding("onnxruntime", "ok", listed)


def _cuda() -> Iterator[Finding]:
    """The libraries that onnxruntime's GPU providers load, and whether their CUDA is torch's and the driver's."""
    for name in _gpu_providers():
        library = machine.provider_library(name)
        missing = machine.missing_libraries(library) if library else []
        # Without a GPU nothing is lost; the base of TensorRT is installed by those who want it.
        status: Literal["warning", "fault"] = "fault" if machine.has_gpu() and name == "cuda" else "warning"
        if missing:
            what = f"{', '.join(missing)} cannot be found"
            yield Finding(f"libraries of {name}", status, what, machine.install_of(missing))
        else:
            yield Finding(f"libraries of {name}", "ok", "all that it is linked to can be found")
    wanted, newest = machine.runtime_cuda(), machine.driver_cuda()
    if not wanted or not _gpu_providers():
        return
    if not machine.has_library("libcudnn.so.9"):
        what = "libcudnn.so.9 cannot be found: convolutions fail or are slow on the GPU"
        yield Finding("cuDNN", "warning", what, machine.install_of(["libcudnn.so.9"]))
    major = int(wanted.split(".")[0])
    if newest and newest[0] < major:
        what = f"onnxruntime is built for CUDA {wanted}, the driver serves {newest[0]}.{newest[1]} at most"
        yield Finding(
            "CUDA", "fault", what, "update the driver (CUDA 13: 580 or newer), or take an older onnxruntime-gpu"
        )
    theirs = machine.torch_cuda()
    if theirs and int(theirs.split(".")[0]) != major:
        what = f"torch is built for CUDA {theirs}, onnxruntime for {wanted}: each needs libraries of its own"
        remedy = f"install builds of torch and onnxruntime-gpu for the same CUDA, as in torch for CUDA {major}"
        yield Finding("CUDA", "warning", what, remedy)


def _provider(name: str, answer: Answer) -> Finding:
    if "error" not in answer:
        return Finding(f"provider {name}", "ok", "a small graph ran on it")
    if name == "cpu":
        remedy = machine.REINSTALL.format(extra="cpu")
        return Finding("provider cpu", "fault", f"a small graph did not run ({answer['error']})", remedy)
    lacking = machine.lacks(name)
    what = "; ".join(what for what, _ in lacking) or answer["error"]
    remedy = "; ".join(way for _, way in lacking) or "compare the driver and libraries with onnxruntime's requirements"
    status: Literal["warning", "fault"] = "fault" if machine.has_gpu() and name == "cuda" else "warning"
    return Finding(f"provider {name}", status, f"it does not start: {what}", f"use --provider cpu, or: {remedy}")


def _operators(answer: Answer) -> Finding:
    if "error" not in answer:
        found = answer["found"]
        return Finding("operators", "ok", f"packed graphs run, with {found['isa']} instructions ({found['library']})")
    if "were not built" in answer["error"]:
        return Finding("operators", "warning", "they were not built: packed graphs (--pack sparse) cannot run", BUILD)
    return Finding("operators", "fault", f"they do not work ({answer['error']})", BUILD)


def _disk(name: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    what = f"{free / GB:,.1f} GB free in {folder}"
    remedy = "free some, or choose another folder"
    if name.endswith("hub"):
        remedy = "free some, or name another folder in HF_HOME"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(name, "warning", f"{folder} cannot be written to ({error.strerror})", remedy)
    status: Literal["ok", "warning", "fault"] = _against(free, DISK)
    return Finding(name, status, what, "" if status == "ok" else remedy)


def _memory() -> Finding:
    free = _free_memory()
    if free is None:
        return Finding("memory", "ok", "the system does not tell how much is free")
    status = _against(free, MEMORY)
    what = f"{free / GB:,.1f} GB free, for {len(os.sched_getaffinity(0))} cores"
    return Finding("memory", status, what, "" if status == "ok" else "end other programs, or give the container more")


def _hub(answer: Answer | None) -> Finding:
    if answer is None:
        return Finding("hub", "warning", "HF_HUB_OFFLINE forbids to ask it", f"unset HF_HUB_OFFLINE; {HUB_USE}")
    if "error" in answer:
        return Finding("hub", "warning", f"it cannot be reached ({answer['error']})", HUB_USE)
    return Finding("hub", "ok", f"{answer['found']['address']} answers")


# --- what they look at ------------------------------------------------------------------------------------------------


def _against(free: int, limits: tuple[int, int]) -> Literal["ok", "warning", "fault"]:
    return "fault" if free < limits[1] else "warning" if free < limits[0] else "ok"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cache() -> Path:
    """The hub's folder of downloads, as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser().absolute()


def _free_memory() -> int | None:
    """Bytes that this process may still take: what is free, or what its container has left."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # files can be dropped
            found.append(int(limit) - used)
    except (OSError, ValueError, KeyError):
        pass
    return max(min(found), 0) if found else None
