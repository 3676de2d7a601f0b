import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from vlprune.errors import MachineError, RequestError
from vlprune.runtime import session as module
from vlprune.runtime.session import OnnxGraph, check_provider, load_graphs, session


Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def forget_providers() -> None:
    check_provider.cache_clear()


def external(location: str, length: int = 64) -> TensorProto:
    """A float [4, 4] tensor whose data lies in another file."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_session_takes_its_threads_and_stops_spinning(linear: Write) -> None:
    options = session(linear(), threads=3).get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_session_defaults_to_the_cores_of_the_process(linear: Write) -> None:
    assert session(linear()).get_session_options().intra_op_num_threads == len(os.sched_getaffinity(0))


def broken(folder: Path, intact: Path) -> dict[str, Path]:
    content = intact.read_bytes()
    files = {"empty": b"", "junk": bytes(range(256)) * 3, "truncated": content[: len(content) // 2]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.onnx").mkdir()
    return {name: folder / name for name in (*files, "folder.onnx", "missing.onnx")}


@pytest.mark.parametrize("which", ["empty", "junk", "truncated", "folder.onnx", "missing.onnx"])
def test_broken_file_is_one_line(which: str, linear: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, linear())[which]
    with pytest.raises(RequestError) as error:
        session(path)
    assert str(path) in one_line(error)
    assert "ONNXRuntimeError" not in one_line(error)
    assert capfd.readouterr() == ("", "")


def test_unknown_operator_is_named(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    value = [("x", TensorProto.FLOAT, ["batch"])]
    path = write(
        "evil.onnx",
        [helper.make_node("Evil", ["x"], ["y"], domain="evil")],
        value,
        [("y", *value[0][1:])],
        {},
        ["evil"],
    )
    with pytest.raises(RequestError, match="evil:Evil"):
        session(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("location", ["absolute", "../secret", "link", "missing"])
def test_external_data_stays_in_the_folder(location: str, linear: Write, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    path = linear("model/graph.onnx", external(str(secret) if location == "absolute" else location))
    with pytest.raises(RequestError) as error:
        session(path)
    assert str(path) in one_line(error)


def test_external_data_beside_the_file_is_read(linear: Write, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.full((4, 4), 2, np.float32).tobytes())
    graph = OnnxGraph(session(linear("graph.onnx", external("weights.bin"))), "graph")
    np.testing.assert_array_equal(graph({"x": np.ones((1, 4), np.float32)})["y"], [[8, 8, 8, 8]])


def test_size_that_lies_is_refused_before_allocation(linear: Write) -> None:
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 20], raw_data=bytes(64))
    with pytest.raises((RequestError, MachineError)) as error:
        session(linear("lie.onnx", tensor))
    one_line(error)


# --- providers --------------------------------------------------------------------------------------------------------


def test_unknown_provider() -> None:
    with pytest.raises(RequestError, match="did you mean cuda"):
        check_provider("cudo")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_absent_provider_is_the_machine_s_fault(
    provider: str, linear: Write, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = linear()
    for attempt in (
        lambda: check_provider(provider),
        lambda: session(path, provider),
        lambda: load_graphs(path.parent, provider),
    ):
        with pytest.raises(MachineError) as error:
            attempt()
        assert f"provider {provider} is not in this onnxruntime" in one_line(error)
        assert "vlprune[gpu]" in one_line(error)
    assert capfd.readouterr() == ("", "")


class CpuOnly:
    """A session that fell back."""

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def pretend(monkeypatch: pytest.MonkeyPatch, opened: Any) -> None:
    """Make onnxruntime claim CUDA; `opened` stands in for what opening a session does."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13: no such file"))
    monkeypatch.setattr(module, "_open", opened)


def test_silent_fallback_is_an_error_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, lambda *_: CpuOnly())
    with pytest.raises(MachineError, match=r"does not start here \(Failed to load libcublas") as error:
        check_provider("cuda")
    one_line(error)
    assert capfd.readouterr() == ("", "")


def test_provider_that_fails_to_start_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA failure 35: driver version is insufficient\n second line")

    pretend(monkeypatch, fail)
    with pytest.raises(MachineError, match="CUDA failure 35: driver version is insufficient") as error:
        check_provider("cuda")
    one_line(error)


def test_silent_fallback_of_one_file_is_an_error(linear: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = linear()
    monkeypatch.setattr(module, "check_provider", lambda name: None)
    monkeypatch.setattr(module, "_open", lambda *_: CpuOnly())
    with pytest.raises(MachineError, match="fell back"):
        session(path, "cuda")


def test_probe_is_a_graph_that_runs() -> None:
    opened = module._open(module._probe(), "cpu", 1)
    assert opened.run(None, {"x": np.array([-1], np.float32)})[0] == [0]


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_load_graphs_names_every_file(linear: Write, tmp_path: Path) -> None:
    linear("task/image_encoder.onnx")
    linear("task/text_encoder.onnx", np.full((2, 3), 0.5, np.float32))
    (tmp_path / "task" / "task.json").write_text("{}")
    graphs = load_graphs(tmp_path / "task", threads=1)
    assert list(graphs) == ["image_encoder", "text_encoder"]
    outputs = graphs["text_encoder"]({"x": np.ones((5, 2), np.float32)})
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], np.ones((5, 3), np.float32))


def test_load_graphs_needs_a_graph(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RequestError, match="no ONNX file"):
            load_graphs(folder)


@pytest.fixture
def mixed(write: Write) -> OnnxGraph:
    """half = Cast(x) to float16's own input; ids pass through."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("half", "ids")]
    types = {"half": TensorProto.FLOAT16, "ids": TensorProto.INT64}
    inputs = [(name, kind, ["batch"]) for name, kind in types.items()]
    outputs = [(f"{name}_out", kind, ["batch"]) for name, kind in types.items()]
    return OnnxGraph(session(write("mixed.onnx", nodes, inputs, outputs)), "mixed")


def test_arrays_are_converted_within_their_kind(mixed: OnnxGraph) -> None:
    outputs = mixed({"half": np.array([0.5], np.float32), "ids": np.array([7], np.int32)})
    assert outputs["half_out"].dtype == np.float16 and outputs["half_out"] == [0.5]
    assert outputs["ids_out"].dtype == np.int64 and outputs["ids_out"] == [7]


def test_floats_are_no_ids(mixed: OnnxGraph) -> None:
    with pytest.raises(RequestError, match="graph mixed wants ids as int64, not float32"):
        mixed({"half": np.zeros(1, np.float32), "ids": np.zeros(1, np.float32)})


def test_feeds_must_name_exactly_the_inputs(mixed: OnnxGraph) -> None:
    ids = np.zeros(1, np.int64)
    with pytest.raises(RequestError, match="graph mixed wants half"):
        mixed({"ids": ids})
    with pytest.raises(RequestError, match="graph mixed does not take stray"):
        mixed({"half": np.zeros(1, np.float32), "ids": ids, "stray": ids})


def test_wrong_shape_is_one_line(linear: Write, capfd: pytest.CaptureFixture[str]) -> None:
    graph = OnnxGraph(session(linear()), "linear")
    with pytest.raises(RequestError, match="Got: 5 Expected: 4") as error:
        graph({"x": np.zeros((1, 5), np.float32)})
    one_line(error)
    assert capfd.readouterr() == ("", "")


def test_graph_that_asks_for_too_much_memory(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["size"], ["zeros"]), helper.make_node("Add", ["x", "zeros"], ["y"])]
    ends = [("x", TensorProto.FLOAT, ["n"])], [("y", TensorProto.FLOAT, ["m"])]
    path = write("bomb.onnx", nodes, *ends, {"size": np.array([1 << 45])})
    with pytest.raises(MachineError, match="not enough memory") as error:
        OnnxGraph(session(path), "bomb")({"x": np.zeros(1, np.float32)})
    one_line(error)
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_leaves_no_trace_of_the_user(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", "import vlprune.runtime.session"]
    subprocess.run(command, env=environment | {"TMPDIR": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []
