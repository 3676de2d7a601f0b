"""What this machine has of what a GPU needs, told without importing torch or onnxruntime: in a fraction of a second.

onnxruntime falls back to the CPU in silence when a package, a library or the driver is missing. Here each of them is
looked for by itself, so that a refusal can name what is missing.
"""

from __future__ import annotations

import ast
import ctypes
import os
import re
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vlprune.errors import MachineError


# Distributions that all unpack into the one folder "onnxruntime": of several installed, the last one wins.
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-training",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "ort-nightly",
    "ort-nightly-gpu",
)
REINSTALL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'vlprune[{extra}]'"
_LIBRARIES = {"cuda": "libonnxruntime_providers_cuda.so", "tensorrt": "libonnxruntime_providers_tensorrt.so"}
NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1)"


def runtimes() -> dict[str, str]:
    """Find the distributions of onnxruntime that are installed.

    Returns:
        dict[str, str]: name -> version; one of them is right, several overwrite each other's files.
    """
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def torch_cuda() -> str | None:
    """Tell the CUDA version that torch was built for, from a file of its package.

    Returns:
        str | None: as in "13.0"; None when torch was built without CUDA, or is not installed.
    """
    return _assigned("torch", "version.py", "cuda")


def runtime_cuda() -> str | None:
    """Tell the CUDA version that onnxruntime was built for, from a file of its package.

    Returns:
        str | None: as in "13.0"; None for a package without CUDA.
    """
    return _assigned("onnxruntime", "capi/build_and_package_info.py", "cuda_version")


def driver_cuda() -> tuple[int, int] | None:
    """Tell the newest CUDA that the NVIDIA driver serves.

    Returns:
        tuple[int, int] | None: as in (13, 0); None without a driver.
    """
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def has_gpu() -> bool:
    """Tell whether the system shows an NVIDIA GPU to this process; containers often hide it.

    Returns:
        bool: it does.
    """
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # dxg: Windows' subsystem for Linux


def provider_library(provider: str) -> Path | None:
    """Find the library by which onnxruntime talks to a GPU.

    Args:
        provider: "cuda" or "tensorrt".

    Returns:
        Path | None: None where the package installed has none: it is the one for CPUs.
    """
    folder = _package("onnxruntime")
    path = folder / "capi" / _LIBRARIES[provider] if folder else None
    return path if path and path.is_file() else None


def library_folders() -> list[Path]:
    """List the folders of Python packages that hold CUDA, cuDNN and TensorRT libraries.

    Returns:
        list[Path]: those that exist; onnxruntime and torch look there before the system's folders.
    """
    folders = []
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(Path(root).glob("*/lib"))
    for name, inside in (("torch", "lib"), ("tensorrt_libs", "")):
        package = _package(name)
        if package and (package / inside).is_dir():
            folders.append(package / inside)
    return folders


def missing_libraries(library: Path) -> list[str]:
    """Ask the system's loader which libraries a library needs, itself or through another, and cannot have.

    Args:
        library: a shared library of an installed package.

    Returns:
        list[str]: their names, as in "libcublas.so.13"; [] too where the loader cannot be asked.
    """
    paths = [str(folder) for folder in library_folders()]
    environment = {**os.environ, "LC_ALL": "C"}
    environment["LD_LIBRARY_PATH"] = ":".join([*paths, os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(":")
    try:
        done = subprocess.run(["ldd", str(library)], capture_output=True, text=True, timeout=10, env=environment)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^\s*(\S+) => not found$", done.stdout, re.MULTILINE)
    return sorted(set(found) - {"libcuda.so.1", "libonnxruntime_providers_shared.so"})  # see `driver_cuda`; it is there


def has_library(name: str) -> bool:
    """Tell whether a shared library would be found, in the folders of packages or the system's.

    Args:
        name: as in "libcudnn.so.9".

    Returns:
        bool: it would.
    """
    if any((folder / name).exists() for folder in library_folders()):
        return True
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if any((folder / name).exists() for folder in folders):
        return True
    try:
        known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        known = ""
    return f"\t{name} " in known or any((Path(folder) / name).exists() for folder in ("/lib", "/usr/lib", "/usr/lib64"))


def lacks(provider: str) -> list[tuple[str, str]]:
    """Find what keeps a GPU provider of onnxruntime from starting here.

    Args:
        provider: "cuda" or "tensorrt".

    Returns:
        list[tuple[str, str]]: what is missing, and the way out; [] where nothing is known to be.
    """
    found = []
    installed = runtimes()
    listed = " and ".join(f"{name} {version}" for name, version in installed.items())
    library = provider_library(provider)
    again = REINSTALL.format(extra="gpu")
    if not installed and library is None:
        found.append(("no onnxruntime is installed", "pip install 'vlprune[gpu]'"))
    elif library is None and len(installed) > 1:
        found.append((f"{listed} are both installed, and the one without {provider} has overwritten the other", again))
    elif library is None:
        found.append((f"{listed} has no {provider} in it", again))
    if driver_cuda() is None:
        found.append((NO_DRIVER, "take a machine with an NVIDIA GPU and its driver"))
    missing = missing_libraries(library) if library else []
    if missing:
        found.append((f"{', '.join(missing)} cannot be found", install_of(missing)))
    return found


def install_of(libraries: list[str]) -> str:
    """Tell how to install NVIDIA's libraries.

    Args:
        libraries: their names, as in "libcublas.so.13".

    Returns:
        str: the command, or that the folder must be named in LD_LIBRARY_PATH.
    """
    versions = [re.match(r"lib(?:cudart|cublas)\w*\.so\.(\d+)", name) for name in libraries]
    major = next((found[1] for found in versions if found), (runtime_cuda() or "13").split(".")[0])
    suffix = "" if int(major) >= 13 else f"-cu{major}"  # NVIDIA's names carry no version from CUDA 13 on
    packages = {
        "libcudart": f"nvidia-cuda-runtime{suffix}",
        "libcublas": f"nvidia-cublas{suffix}",
        "libcurand": f"nvidia-curand{suffix}",
        "libcufft": f"nvidia-cufft{suffix}",
        "libnvrtc": f"nvidia-cuda-nvrtc{suffix}",
        "libcudnn": f"nvidia-cudnn-cu{major}",
        "libnvinfer": f"'tensorrt-cu{major}<11'",
        "libnvonnxparser": f"'tensorrt-cu{major}<11'",
    }
    wanted = [package for start, package in packages.items() if any(name.startswith(start) for name in libraries)]
    if not wanted:
        return "install them, and name their folder in LD_LIBRARY_PATH"
    return f"pip install {' '.join(dict.fromkeys(wanted))}"


def require_provider(provider: str) -> None:
    """Refuse a provider that cannot start here; silent where nothing is known to be missing.

    Args:
        provider: "cpu", "cuda" or "tensorrt".

    Raises:
        MachineError: naming all that is missing.
    """
    found = lacks(provider) if provider in _LIBRARIES else []
    if found:
        what, ways = "; ".join(what for what, _ in found), "; ".join(way for _, way in found)
        raise MachineError(
            f"provider {provider} cannot run here: {what}; use --provider cpu, or: {ways} (vlprune doctor)"
        )


def require_device(device: str) -> None:
    """Refuse `--device cuda` where PyTorch cannot have it.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        MachineError: naming what is missing.
    """
    if device != "cuda":
        return
    found = []
    if torch_cuda() is None:
        found.append("the torch installed was built without CUDA")
    if driver_cuda() is None:
        found.append(NO_DRIVER)
    if found:
        raise MachineError(
            f"--device cuda: PyTorch sees no CUDA device here: {'; '.join(found)}; use --device cpu, or a machine with "
            "a GPU and a CUDA build of torch (vlprune doctor)"
        )


def _package(name: str) -> Path | None:
    """The folder of an installed package; it is not imported."""
    spec = find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) if folders else None


def _assigned(package: str, file: str, name: str) -> str | None:
    """What a file of a package assigns to a name, where that is a text."""
    folder = _package(package)
    try:
        text = (folder / file).read_text(encoding="utf-8") if folder else ""
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(rf"^{name}\b[^=\n]*=\s*(.+)$", text, re.MULTILINE)
    try:
        value = ast.literal_eval(found[1]) if found else None
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, str) else None
