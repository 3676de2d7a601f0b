"""The operator library for ONNX Runtime's CPU provider, compiled from csrc/ by pip install.

It holds SparseLinear, SparseMlp (two of them in one), HalfLinear and Attention, which docs/sparse.md describes. It is a
plain shared library that any program gives to ONNX Runtime (1.17 or newer) by
`SessionOptions.register_custom_ops_library`; `vlprune.runtime.session` does so by itself.
"""

import ctypes
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import MachineError


DOMAIN = "vlprune"  # of the operators in an ONNX file
_PACKAGE = __name__.rpartition(".")[0]  # vlprune.runtime; the edge runner has this file, too
BUILD = (
    "install a C++ compiler (GCC 11, Clang, or newer), then pip install --no-cache-dir --force-reinstall --no-deps "
    f"{_PACKAGE.partition('.')[0].replace('_', '-')}, or the folder of its sources"
)
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def library() -> Path:
    """Find the operator library.

    Returns:
        Path: what to give to `SessionOptions.register_custom_ops_library`.

    Raises:
        MachineError: it was not built, because there was no compiler.
    """
    # In an editable install the library lies elsewhere than the Python files: only importlib knows both places.
    file = resources.files(_PACKAGE).joinpath(f"libvlprune_ops{_SUFFIX}")
    if not (isinstance(file, Path) and file.is_file()):
        raise MachineError(f"the operators for packed graphs were not built: {BUILD}")
    return file


def available() -> bool:
    """Tell whether the operator library was built.

    Returns:
        bool: True = packed graphs can run.
    """
    try:
        library()
    except MachineError:
        return False
    return True


def isa() -> str:
    """Name the instruction set that the operators use.

    Returns:
        str: "avx512", "avx2" or "portable".

    Raises:
        MachineError: the library was not built, or cannot be loaded.
    """
    path = library()
    try:
        function = ctypes.CDLL(str(path)).vlprune_ops_isa
    except (OSError, AttributeError) as error:
        raise MachineError(f"the operator library {path} cannot be loaded ({error}): {BUILD}") from error
    function.restype = ctypes.c_char_p
    return str(function().decode())


def register(options: Any) -> None:
    """Make the operators known to the sessions that will be opened with some options.

    Args:
        options: an `onnxruntime.SessionOptions`.

    Raises:
        MachineError: the library was not built, or onnxruntime or this processor cannot use it.
    """
    path = library()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:
        text = " ".join(str(error).split()).rsplit(" : ", 1)[-1]
        raise MachineError(f"onnxruntime cannot use the operators of packed graphs ({text})") from error
