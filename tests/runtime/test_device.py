import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlprune.errors import MachineError, RequestError
from vlprune.runtime import device
from vlprune.runtime.device import bind, gpu_state, nodes_of, parse_state
from vlprune.runtime.session import session


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_bound_graphs_compute(linear: Callable[..., Path]) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    bound = bind(linear(weight=weight), "cpu", lambda graph: {graph.get_inputs()[0].name: X}, threads=1)
    assert bound.nodes == {"cpu": 1} and bound.sparse is None
    for _ in range(3):
        bound.run()
        (y,) = bound.whole()
        np.testing.assert_array_equal(y, X @ weight)


def test_whole_reads_the_arrays_anew(linear: Callable[..., Path]) -> None:
    x = X.copy()
    bound = bind(linear(), "cpu", lambda graph: {"x": x}, threads=1)
    x += 1
    np.testing.assert_array_equal(bound.whole()[0], X + 1)


def test_a_graph_to_be_recorded_is_opened_again_with_outputs_in_their_places(
    linear: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Mapping[str, str], bool]] = []

    def watched(path: Path, provider: str, threads: int | None, options: Any = None, profile: Any = None) -> Any:
        opened.append((options, profile is not None))
        return session(path, provider, threads, None, profile)

    monkeypatch.setattr(device, "session", watched)
    monkeypatch.setitem(device._GRAPH_OPTION, "cpu", "enable_cuda_graph")
    bound = bind(linear(weight=np.eye(4, 3, dtype=np.float32)), "cpu", lambda graph: {"x": X}, 1, cuda_graph=True)
    assert opened == [({}, True), ({"enable_cuda_graph": "1"}, False)]
    bound.run()
    np.testing.assert_array_equal(bound.whole()[0], X[:, :3])


def test_a_provider_that_runs_nothing_is_refused(linear: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "nodes_of", lambda events: [("CUDAExecutionProvider", "MatMul")])
    with pytest.raises(MachineError, match="none of its 1 nodes runs on provider cpu"):
        bind(linear(), "cpu", lambda graph: {"x": X})


def test_what_needs_the_cpu_on_the_way_is_not_recorded() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    device._check_capture(Path("g.onnx"), [(cuda, "MatMul"), (cpu, "Gather")], "cuda")  # a shape
    ran = [(cuda, "MatMul"), (cuda, "MemcpyToHost"), (cpu, "NonZero"), (cpu, "NonZero"), (cuda, "MemcpyFromHost")]
    with pytest.raises(MachineError, match=r"2 copies to or from nodes on the CPU \(2 NonZero\); leave --cuda-graph"):
        device._check_capture(Path("g.onnx"), ran, "cuda")
    with pytest.raises(MachineError, match="only parts"):
        device._check_capture(Path("g.onnx"), [("TensorrtExecutionProvider", "TRT"), (cuda, "MatMul")], "tensorrt")


def test_what_does_not_run_is_one_line(linear: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="does not run") as error:
        bind(linear(), "cpu", lambda graph: {"x": X[:, :3].copy()})
    assert "\n" not in str(error.value)


def test_nodes_are_counted_once() -> None:
    def event(name: str, provider: str, operator: str, cat: str = "Node") -> dict[str, Any]:
        return {"cat": cat, "name": name, "args": {"provider": provider, "op_name": operator}}

    events = [
        {"cat": "Session", "name": "model_loading_uri", "args": {}},
        event("MatMul_1_fence_before", "", ""),
        event("MatMul_1_kernel_time", "CUDAExecutionProvider", "MatMul"),
        event("MatMul_1_kernel_time", "CUDAExecutionProvider", "MatMul"),
        event("Gather_2_kernel_time", "CPUExecutionProvider", "Gather"),
        event("Gather_2_kernel_time", "CPUExecutionProvider", "Gather", cat="Kernel"),
        {"cat": "Node", "name": "odd"},
    ]
    assert nodes_of(events) == [("CUDAExecutionProvider", "MatMul"), ("CPUExecutionProvider", "Gather")]
    assert nodes_of(json.loads("[]")) == []


# --- the GPU's state --------------------------------------------------------------------------------------------------


def test_states_are_read() -> None:
    assert parse_state("1980, 2619, 412.53, 61, 0x0000000000000005\n") == {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 412.53, "temperature_c": 61.0, "throttled": ["power cap"],
    }  # fmt: skip
    assert parse_state("345, 405, [N/A], 33, 0x1") == {
        "sm_mhz": 345.0, "memory_mhz": 405.0, "temperature_c": 33.0, "throttled": [],
    }  # fmt: skip
    assert parse_state("345, 405, 10, 33, [Not Supported]")["throttled"] == []
    assert parse_state("0, 0, 0, 0, 0x68")["throttled"] == [
        "hardware slowdown", "software thermal slowdown", "hardware thermal slowdown",
    ]  # fmt: skip
    assert parse_state("No devices were found") is None


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$3" in *clocks_event_reasons*) exit 2;; esac\n'
        '[ "$1 $2" = "-i 3" ] && echo "1980, 2619, 412.53, 61, 0x4"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu_state() == parse_state("1980, 2619, 412.53, 61, 0x4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert gpu_state() is None
    assert device.states(None, None) == {}
    assert device.states({"throttled": []}, None) == {"gpu": [{"throttled": []}]}
