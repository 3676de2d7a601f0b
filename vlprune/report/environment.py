"""What the run ran on: versions, providers, processor, GPU."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlprune.report.schema import Environment


PACKAGES = (
    "vlprune",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Look up the installed versions of the packages that a run's numbers depend on.

    Returns:
        dict[str, str]: package -> version; packages that are not installed are left out.
    """
    found = {name: _version(name) for name in PACKAGES}
    return {name: text for name, text in found.items() if text}


def environment(threads: int | None = None) -> Environment:
    """Describe this machine for report.json.

    Args:
        threads: CPU threads the run was given, None for all it may use.

    Returns:
        Environment: see the schema.
    """
    gpu, driver = _gpu()
    try:
        import onnxruntime

        providers, runtime = onnxruntime.get_available_providers(), onnxruntime.__version__
    except ImportError:
        providers, runtime = [], None
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "onnxruntime": runtime,
        "providers": providers,
        "cpu": _cpu(),
        "gpu": gpu,
        "driver": driver,
        "threads": threads or len(os.sched_getaffinity(0)),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> tuple[str | None, str | None]:
    """Name and driver of the first GPU, from the driver's own tool, so that torch need not be loaded."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    name, _, driver = answer.partition("\n")[0].rpartition(", ")
    return (name, driver) if name else (None, None)
