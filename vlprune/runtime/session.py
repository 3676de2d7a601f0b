"""ONNX Runtime sessions that run where they were asked to, or not at all."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import MachineError, RequestError, VlpruneError
from ..names import PROVIDERS, check
from . import operators
from .generate import Arrays


os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # 1.31 leaves a number that tells users apart in TMPDIR
try:
    import onnxruntime
except ImportError as error:
    raise MachineError("onnxruntime cannot be imported: pip install 'vlprune[cpu]', or 'vlprune[gpu]'") from error

# What goes wrong reaches us as exceptions, one line each; the log would repeat it in several.
onnxruntime.set_default_logger_severity(4)

# First the provider asked for, then those that take over single operators it lacks.
CHAINS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@cache
def check_provider(name: str) -> None:
    """Make sure a provider is installed and starts; takes seconds at most, so call it before any heavy work.

    Args:
        name: "cpu", "cuda" or "tensorrt".

    Raises:
        RequestError: the name is unknown.
        MachineError: this onnxruntime has no such provider, or the machine cannot start it.
    """
    check("provider", name, PROVIDERS)
    version, wanted = onnxruntime.__version__, CHAINS[name][0]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        here = ", ".join(short for short, chain in CHAINS.items() if chain[0] in available)
        raise MachineError(
            f"provider {name} is not in this onnxruntime {version} (it has {here}): use --provider cpu, or "
            "pip uninstall onnxruntime, then pip install 'vlprune[gpu]'"
        )
    if name == "cpu":
        return
    # The libraries come from pip packages that only torch or this call finds; it reports failures on stdout.
    with redirect_stdout(io.StringIO()) as said:
        onnxruntime.preload_dlls()
    reason = said.getvalue().strip()
    try:
        in_use = _open(_probe(), name, 1).get_providers()
    except Exception as error:
        in_use, reason = [], str(error)
    if wanted not in in_use:
        raise MachineError(
            f"provider {name} of onnxruntime {version} does not start here ({_line(reason) or 'it fell back to cpu'}): "
            "compare the driver and the CUDA, cuDNN and TensorRT libraries with its requirements, or use --provider cpu"
        )


def session(
    path: Path | str,
    provider: str = "cpu",
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file, plain or packed.

    The pool's threads go to sleep when a run ends: by default they spin on and steal the cores from the next session.

    Args:
        path: the ONNX file; external data must lie beside or below it.
        provider: "cpu", "cuda" or "tensorrt".
        threads: CPU threads of one operator, None = as many as the process may use.
        options: of the provider, by onnxruntime's names.
        profile: folder to write a profile to, from now until `end_profiling` is called.

    Returns:
        onnxruntime.InferenceSession: it really has the provider.

    Raises:
        RequestError: the file is missing or broken, or needs an operator that onnxruntime lacks.
        MachineError: the provider cannot be used here or not for this file, the file is packed and the operators for
            that are missing, or memory is short.
    """
    check_provider(provider)
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"there is no ONNX file {path}: check the path")
    try:
        with refusals(f"{path} cannot be used by ONNX Runtime"):
            opened = _open(str(path), provider, threads, options, profile)
    except RequestError:
        if _is_packed(path):
            _check_operators(path, provider)
        raise
    # check_provider opened a small graph; onnxruntime may still fall back silently for this one.
    if CHAINS[provider][0] not in opened.get_providers():
        raise MachineError(f"{path} does not run on provider {provider}, onnxruntime fell back: use --provider cpu")
    return opened


def open_bytes(model: bytes, provider: str = "cpu", threads: int | None = 1) -> onnxruntime.InferenceSession:
    """Open a graph that is in memory.

    Args:
        model: a serialised ModelProto, its weights included.
        provider: see `session`.
        threads: see `session`.

    Returns:
        onnxruntime.InferenceSession: it really has the provider.

    Raises:
        RequestError: ONNX Runtime refuses the graph.
        MachineError: the provider cannot be used here.
    """
    check_provider(provider)
    with refusals("a graph cannot be used by ONNX Runtime"):
        opened = _open(model, provider, threads)
    if CHAINS[provider][0] not in opened.get_providers():
        raise MachineError(f"a graph does not run on provider {provider}, onnxruntime fell back: use --provider cpu")
    return opened


class OnnxGraph:
    """An ONNX graph as a function from named arrays to named arrays.

    Feeds must name exactly the graph's inputs. Arrays are converted to the input's type within their kind (float32 to
    float16, int32 to int64), never from one kind to another.

    Args:
        session: runs the graph.
        name: for messages.
    """

    def __init__(self, session: onnxruntime.InferenceSession, name: str) -> None:
        self.session = session
        self.name = name
        self._inputs = {value.name: DTYPES.get(value.type) for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]

    def __call__(self, feeds: Arrays) -> Arrays:
        """Run the graph.

        Args:
            feeds: one array per input.

        Returns:
            Arrays: one array per output.

        Raises:
            RequestError: inputs are missing, unknown, or of a kind or shape the graph does not take.
            MachineError: memory is short.
        """
        missing, unknown = sorted(self._inputs.keys() - feeds.keys()), sorted(feeds.keys() - self._inputs.keys())
        if missing or unknown:
            what = f"wants {', '.join(missing)}" if missing else f"does not take {', '.join(unknown)}"
            raise RequestError(f"graph {self.name} {what}: it was exported for another task, export it again")
        arrays = {name: self._convert(name, array) for name, array in feeds.items()}
        with refusals(f"graph {self.name} failed in ONNX Runtime"):
            outputs = self.session.run(self._outputs, arrays)
        return dict(zip(self._outputs, outputs, strict=True))

    def _convert(self, name: str, array: np.ndarray) -> np.ndarray:
        wanted = self._inputs[name]
        if wanted is None or array.dtype == wanted:
            return array
        if not np.can_cast(array.dtype, wanted, "same_kind"):
            raise RequestError(f"graph {self.name} wants {name} as {np.dtype(wanted)}, not {array.dtype}")
        return array.astype(wanted)


def load_graphs(folder: Path | str, provider: str = "cpu", threads: int | None = None) -> dict[str, OnnxGraph]:
    """Open every ONNX file of a task's folder.

    Args:
        folder: what the export of one task wrote.
        provider: see `session`.
        threads: see `session`.

    Returns:
        dict[str, OnnxGraph]: file name without ".onnx" -> graph.

    Raises:
        RequestError: there is no ONNX file, or a broken one.
        MachineError: the provider cannot be used here.
    """
    check_provider(provider)
    files = sorted(Path(folder).glob("*.onnx"))
    if not files:
        raise RequestError(f"there is no ONNX file in {folder}: give the folder of one exported task")
    options = dict.fromkeys(files)
    if provider == "tensorrt":
        from .tensorrt import options as options_of  # not at the top: it hashes files for its cache, others need not

        options = {file: options_of(file) for file in files}
    return {file.stem: OnnxGraph(session(file, provider, threads, options[file]), file.stem) for file in files}


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn the exceptions of ONNX Runtime, which share no class of their own, into one line.

    Args:
        what: what fails if something fails.

    Yields:
        None: nothing.

    Raises:
        RequestError: ONNX Runtime refused a graph or its inputs.
        MachineError: memory is short.
    """
    try:
        yield
    except VlpruneError:
        raise
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(s in text for s in ("bad_alloc", "allocate memory", "out of memory")):
            raise MachineError(f"{what}: not enough memory; use a smaller batch or a larger machine") from error
        raise RequestError(f"{what} ({_line(text)})") from error


def _open(
    model: str | bytes,
    provider: str,
    threads: int | None,
    provider_options: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Cheaper than looking whether the graph needs them; `session` says why they are missing when it does.
    if provider == "cpu":
        with suppress(MachineError):
            operators.register(options)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    first, *others = CHAINS[provider]
    chain = [(first, dict(provider_options or {})), *others]
    # enable_fallback=0: a provider that fails is an error instead of a message on stdout and a CPU session.
    return onnxruntime.InferenceSession(model, options, providers=chain, enable_fallback=0)


def _is_packed(path: Path) -> bool:
    """Tell whether a graph needs the operators of this package."""
    try:
        import onnx  # the edge runner has none

        imports = onnx.load(path, load_external_data=False).opset_import
    except Exception:  # whatever is wrong with the file, onnxruntime has said it
        return False
    return any(opset.domain == operators.DOMAIN for opset in imports)


def _check_operators(path: Path, provider: str) -> None:
    """Refuse a packed graph that lacks its operators."""
    if provider != "cpu":
        raise MachineError(
            f"{path} is packed for CPUs and does not run on provider {provider}: "
            "use --provider cpu, or export it again without --pack"
        )
    try:
        operators.register(onnxruntime.SessionOptions())
    except MachineError as error:
        raise MachineError(f"{path} is packed: {error}; or export it again without --pack") from error


def _probe() -> bytes:
    """Make the smallest graph that does something."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _line(text: str) -> str:
    """A message on one line, without ONNX Runtime's "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : "."""
    text = " ".join(text.split()).rsplit("[ONNXRuntimeError] : ", 1)[-1]
    return text.split(" : ", 2)[-1][:300]
