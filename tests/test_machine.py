import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from vlprune import machine
from vlprune.errors import MachineError


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of one's choosing: pretend(runtimes={...}, driver_cuda=(13, 0), ...)."""

    def change(**facts: Any) -> None:
        for name, fact in facts.items():
            monkeypatch.setattr(machine, name, lambda *_, fact=fact: fact)

    return change


GPU = {
    "runtimes": {"onnxruntime-gpu": "1.31.1"},
    "provider_library": Path("libonnxruntime_providers_cuda.so"),
    "missing_libraries": [],
    "driver_cuda": (13, 0),
    "has_gpu": True,
    "runtime_cuda": "13.0",
    "torch_cuda": "13.0",
}


def fake_package(folder: Path, name: str, files: dict[str, str]) -> None:
    for file, text in {"__init__.py": "raise AssertionError('imported')", **files}.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_whole_machine_is_not_refused(pretend: Any) -> None:
    pretend(**GPU)
    assert machine.lacks("cuda") == machine.lacks("tensorrt") == []
    machine.require_provider("cuda")
    machine.require_device("cuda")
    machine.require_provider("cpu")


@pytest.mark.parametrize(
    ("fault", "what", "way"),
    [
        ({"runtimes": {}, "provider_library": None}, "no onnxruntime is installed", "vlprune[gpu]"),
        (
            {"runtimes": {"onnxruntime": "1.31.1"}, "provider_library": None},
            "onnxruntime 1.31.1 has no cuda in it",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'vlprune[gpu]'",
        ),
        (
            {"runtimes": {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}, "provider_library": None},
            "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are both installed",
            "pip uninstall onnxruntime onnxruntime-gpu",
        ),
        ({"driver_cuda": None}, "no NVIDIA driver (libcuda.so.1)", "a machine with an NVIDIA GPU"),
        (
            {"missing_libraries": ["libcublas.so.13", "libcudart.so.13"]},
            "libcublas.so.13, libcudart.so.13 cannot be found",
            "pip install nvidia-cuda-runtime nvidia-cublas",
        ),
        (
            {"missing_libraries": ["libcublasLt.so.12", "libcudnn.so.9"]},
            "libcublasLt.so.12, libcudnn.so.9 cannot be found",
            "pip install nvidia-cublas-cu12 nvidia-cudnn-cu12",
        ),
        ({"missing_libraries": ["libodd.so.1"]}, "libodd.so.1 cannot be found", "LD_LIBRARY_PATH"),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(pretend: Any, fault: dict[str, Any], what: str, way: str) -> None:
    pretend(**GPU | fault)
    with pytest.raises(MachineError) as error:
        machine.require_provider("cuda")
    message = str(error.value)
    assert message.startswith("provider cuda cannot run here: ") and "\n" not in message
    assert what in message and way in message and "--provider cpu" in message


def test_everything_that_is_missing_is_named_at_once(pretend: Any) -> None:
    pretend(**GPU | {"runtimes": {"onnxruntime": "1.31.1"}, "provider_library": None, "driver_cuda": None})
    with pytest.raises(MachineError, match=r"onnxruntime 1.31.1 has no tensorrt in it; there is no NVIDIA driver"):
        machine.require_provider("tensorrt")


@pytest.mark.parametrize(
    ("fault", "what"),
    [({"torch_cuda": None}, "built without CUDA"), ({"driver_cuda": None}, "no NVIDIA driver")],
)
def test_a_device_that_torch_cannot_have(pretend: Any, fault: dict[str, Any], what: str) -> None:
    pretend(**GPU | fault)
    with pytest.raises(MachineError, match=f"--device cuda: PyTorch sees no CUDA device here: .*{what}"):
        machine.require_device("cuda")
    machine.require_device("auto")


def test_a_missing_library_is_found_out(tmp_path: Path) -> None:
    """A library of onnxruntime, made to need one that is nowhere."""
    copy = tmp_path / "library.so"
    shutil.copyfile(Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_shared.so", copy)
    assert machine.missing_libraries(copy) == []
    content = copy.read_bytes()
    assert content.count(b"libstdc++.so.6\0") == 1
    copy.write_bytes(content.replace(b"libstdc++.so.6\0", b"libnowhere.so\0\0"))
    assert machine.missing_libraries(copy) == ["libnowhere.so"]


def test_libraries_of_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    (folder / "libodd.so.9").touch()
    assert not machine.has_library("libodd.so.9") and machine.has_library("libc.so.6")
    monkeypatch.syspath_prepend(tmp_path)
    assert folder in machine.library_folders() and machine.has_library("libodd.so.9")


def test_versions_of_cuda_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_package", lambda name: tmp_path / name)
    fake_package(tmp_path, "torch", {"version.py": "__version__ = '2'\ncuda: Optional[str] = '13.0'\nhip = None\n"})
    fake_package(tmp_path, "onnxruntime", {"capi/build_and_package_info.py": "cuda_version = '12.9'\n"})
    assert (machine.torch_cuda(), machine.runtime_cuda()) == ("13.0", "12.9")
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    (tmp_path / "onnxruntime" / "capi" / "build_and_package_info.py").write_text("cuda_version = evil()\n")
    assert (machine.torch_cuda(), machine.runtime_cuda()) == (None, None)
    assert machine.provider_library("cuda") is None
    fake_package(tmp_path, "onnxruntime", {"capi/libonnxruntime_providers_cuda.so": ""})
    assert machine.provider_library("cuda") is not None


def test_both_packages_of_onnxruntime_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "onnxruntime_gpu-1.30.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.30.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.runtimes() == {"onnxruntime": metadata.version("onnxruntime"), "onnxruntime-gpu": "1.30.0"}


def test_a_refusal_needs_no_heavy_import() -> None:
    script = (
        "import sys; from vlprune import machine; machine.lacks('cuda'); machine.torch_cuda();"
        "sys.exit(bool({'torch', 'onnxruntime', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
