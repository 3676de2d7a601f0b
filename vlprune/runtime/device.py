"""A graph bound to the memory of the device it runs on, what of it really runs there, and the state of the GPU.

Timing a GPU through `InferenceSession.run` times copies between host and device, too, and a graph whose nodes fell
back to the CPU looks like a slow GPU. So inputs and outputs lie on the device, copies are timed apart, and the nodes
that each provider ran are counted from a profile of one run.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxruntime import OrtValue

from vlprune.errors import MachineError
from vlprune.runtime import tensorrt
from vlprune.runtime.generate import Arrays
from vlprune.runtime.session import CHAINS, DTYPES, refusals, session


SHORT = {chain[0]: name for name, chain in CHAINS.items()}  # CPUExecutionProvider -> cpu
_COPIES = {"MemcpyToHost", "MemcpyFromHost"}  # what onnxruntime puts between nodes on the CPU and on the GPU
_GRAPH_OPTION = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}
# Bits of nvidia-smi's reasons for clocks below the highest; the others (idle, applications' settings) slow nothing.
_THROTTLES = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "power brake",
}  # fmt: skip
_FIGURES = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c",
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """A graph with inputs and outputs at fixed places on a device.

    Attributes:
        graph: the open session, which `Fixed` may bind to inputs of other shapes; not a recorded one.
        run: runs it once, to the end, without any copy between host and device.
        whole: copies the inputs to the device, runs it, copies the outputs back.
        nodes: provider ("cpu", "cuda", "tensorrt") -> nodes that it ran.
        sparse: what TensorRT's build log says of sparse layers; None for other providers.
    """

    graph: Any
    run: Callable[[], None]
    whole: Callable[[], list[Any]]
    nodes: dict[str, int]
    sparse: tensorrt.SparseLayers | None = None


def bind(
    path: Path | str,
    provider: str,
    feeds: Callable[[Any], Arrays],
    threads: int | None = None,
    cuda_graph: bool = False,
) -> Bound:
    """Open a graph, run it once to see which provider runs what, and bind its inputs and outputs.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt".
        feeds: open session -> its inputs.
        threads: CPU threads, None = as many as the process may use.
        cuda_graph: record the kernels once and start them all at once from then on.

    Returns:
        Bound: ready to be timed.

    Raises:
        RequestError: the file is missing or broken.
        MachineError: the provider cannot be used here or not for this file, runs none of its nodes, or not all of them
            where a CUDA graph is wanted.
    """
    path = Path(path)
    # TensorRT builds an engine for the shapes of the inputs, which the graph tells.
    arrays = feeds(session(path, "cpu", threads)) if provider == "tensorrt" else None
    given = {name: array.shape for name, array in (arrays or {}).items()}
    options = tensorrt.options(path, given) if given else {}
    with tempfile.TemporaryDirectory() as folder, tensorrt.build_log(provider == "tensorrt") as log:
        graph = session(path, provider, threads, options, Path(folder))
        with refusals(f"{path} does not run"):
            fixed = Fixed(graph, feeds(graph) if arrays is None else arrays, provider)
        events = json.loads(Path(graph.end_profiling()).read_text(encoding="utf-8"))
    ran = nodes_of(events)
    nodes = dict(Counter(SHORT.get(where, where) for where, _ in ran))
    if provider not in nodes:
        raise MachineError(f"{path}: none of its {len(ran)} nodes runs on provider {provider}: use --provider cpu")
    if cuda_graph:
        _check_capture(path, ran, provider)
        arrays, shapes = fixed.arrays, fixed.shapes()
        del graph, fixed
        with refusals(f"{path} cannot be recorded as a CUDA graph, leave --cuda-graph out"):
            graph = session(path, provider, threads, {**options, _GRAPH_OPTION[provider]: "1"})
            fixed = Fixed(graph, arrays, provider, shapes)
            fixed.run()
    sparse = tensorrt.remember(Path(options["trt_engine_cache_path"]), given, log.found) if given else None
    return Bound(graph, fixed.run, fixed.whole, nodes, sparse)


class Fixed:
    """An open graph whose inputs and outputs have fixed places on the device it runs on.

    Args:
        graph: an open session.
        arrays: its inputs.
        provider: of the session.
        shapes: of its outputs, with their types; None = run it once to see.
    """

    def __init__(
        self, graph: Any, arrays: Arrays, provider: str, shapes: Mapping[str, tuple[list[int], Any]] | None = None
    ) -> None:
        self.graph, self.arrays = graph, arrays
        device = "cpu" if provider == "cpu" else "cuda"
        self.binding = graph.io_binding()
        # A copy: on the CPU the value would be the array itself.
        self.inputs = {name: OrtValue.ortvalue_from_numpy(array.copy(), device) for name, array in arrays.items()}
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.synchronize_inputs()
        if shapes is None:
            names = [output.name for output in graph.get_outputs()]
            for name in names:
                self.binding.bind_output(name, device)
            self.run()
            self.outputs = dict(zip(names, self.binding.get_outputs(), strict=True))
            self.binding.clear_binding_outputs()
        else:
            made = OrtValue.ortvalue_from_shape_and_type
            self.outputs = {name: made(*shape, device, 0) for name, shape in shapes.items()}
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def shapes(self) -> dict[str, tuple[list[int], Any]]:
        """Tell the shapes and types of the outputs.

        Returns:
            dict[str, tuple[list[int], Any]]: by name.
        """
        return {name: (list(value.shape()), DTYPES[value.data_type()]) for name, value in self.outputs.items()}

    def run(self) -> None:
        """Run it once, to the end."""
        self.graph.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def whole(self) -> list[Any]:
        """Copy the inputs to the device, run, copy the outputs back.

        Returns:
            list[Any]: the outputs.
        """
        for name, array in self.arrays.items():
            self.inputs[name].update_inplace(array)
        self.run()
        return [value.numpy() for value in self.outputs.values()]


def nodes_of(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Read from a profile which provider ran which nodes.

    Args:
        events: of onnxruntime's profile.

    Returns:
        list[tuple[str, str]]: provider (onnxruntime's name) and operator of every node, each node once.
    """
    found = {}
    for event in events:
        told = event.get("args", {})
        if event.get("cat") == "Node" and told.get("provider"):
            found[str(event.get("name", "")).removesuffix("_kernel_time")] = (told["provider"], told.get("op_name", ""))
    return list(found.values())


def _check_capture(path: Path, ran: list[tuple[str, str]], provider: str) -> None:
    """Refuse to record what needs the CPU on the way; nodes there that only compute shapes are left out of the record.

    Where a node on the CPU reads or makes values of the GPU, onnxruntime puts a copy before or behind it.
    """
    copies = sum(operator in _COPIES for _, operator in ran)
    if copies:
        there = Counter(operator for where, operator in ran if where == CHAINS["cpu"][0])
        listed = ", ".join(f"{number} {operator}" for operator, number in there.most_common(5))
        raise MachineError(
            f"{path} cannot be recorded as a CUDA graph: {copies} copies to or from nodes on the CPU ({listed}); "
            "leave --cuda-graph out"
        )
    if provider == "tensorrt" and any(where == CHAINS["cuda"][0] for where, _ in ran):
        raise MachineError(f"{path} cannot be recorded as a CUDA graph: TensorRT runs only parts of it; "
                           "leave --cuda-graph out, or use --provider cuda")  # fmt: skip


def gpu_state() -> dict[str, Any] | None:
    """Ask the driver's own tool for clocks, power and temperature of the GPU that this process uses.

    Returns:
        dict[str, Any] | None: `sm_mhz`, `memory_mhz`, `power_w`, `temperature_c`, as far as the GPU tells them, and
            `throttled`, the reasons why its clocks are lowered now; None without the tool or a GPU.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the name until driver 535
        query = f"--query-gpu={','.join([*_FIGURES, reasons])}"
        command = ["nvidia-smi", "-i", chosen, query, "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        if answer.returncode == 0:
            return parse_state(answer.stdout)
    return None


def parse_state(line: str) -> dict[str, Any] | None:
    """Read what `gpu_state` asked for.

    Args:
        line: comma-separated answer of nvidia-smi; what a GPU does not tell is in brackets.

    Returns:
        dict[str, Any] | None: see `gpu_state`; None for another kind of answer.
    """
    *figures, mask = [part.strip() for part in line.strip().partition("\n")[0].split(",")]
    if len(figures) != len(_FIGURES):
        return None
    state: dict[str, Any] = {}
    for name, text in zip(_FIGURES.values(), figures, strict=True):
        try:
            state[name] = float(text)
        except ValueError:
            continue
    try:
        bits = int(mask, 16)
    except ValueError:
        bits = 0
    return {**state, "throttled": [reason for bit, reason in _THROTTLES.items() if bits & bit]}


def states(*seen: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """Make the entry of a report from the states before and after.

    Args:
        *seen: what `gpu_state` returned.

    Returns:
        dict[str, list[Any]]: {"gpu": the states}; {} where there is none.
    """
    known = [dict(state) for state in seen if state is not None]
    return {"gpu": known} if known else {}
