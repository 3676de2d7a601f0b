import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from vlprune.runtime.tensorrt import (
    SparseLayers,
    build_log,
    engine_folder,
    holds_half,
    options,
    remember,
    sparse_layers,
)


# Written for these tests in the form that NVIDIA documents.
TENSORRT_8 = """
[11/20/2026-10:00:01] [I] [TRT] Total Host Persistent Memory: 160
[11/20/2026-10:00:02] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_3, Conv_0 + Relu_1, Gemm_9
[11/20/2026-10:00:02] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Gemm_9
"""
TENSORRT_10 = """
2026-11-20 10:00:02.1 [W:onnxruntime:Default, log.h:93 log] [2026-11-20 10:00:02    INFO] (Sparsity) Found 3 layer(s) \
eligible to use sparse tactics: /fc1/MatMul_myl0_3, __myl_Fc(a, b), /fc2/MatMul
2026-11-20 10:00:02.1 [W:onnxruntime:Default, log.h:93 log] [2026-11-20 10:00:02    INFO] (Sparsity) Chose 1 layer(s) \
using sparse tactics: __myl_Fc(a, b)
"""


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (TENSORRT_8, SparseLayers(3, 1, ("Gemm_9",))),
        (TENSORRT_10, SparseLayers(3, 1, ("__myl_Fc(a, b)",))),
        (TENSORRT_8 + TENSORRT_10, SparseLayers(6, 2, ("Gemm_9", "__myl_Fc(a, b)"))),
        (
            "(Sparsity) Found 39 layer(s) eligible to use sparse tactics\n"
            "(Sparsity) Chose 0 layer(s) using sparse tactics\n",
            SparseLayers(39, 0),
        ),
        (
            "[I] [TRT] (Sparsity) Layers eligible for sparse math:\n"
            "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: \n",
            SparseLayers(0, 0),
        ),
        ("[a (Sparsity) Layers eligible for sparse math: fc1, fc2 INFO]", SparseLayers(2, 0)),
        ("[I] [TRT] Total Activation Memory: 7864832", None),
        ("", None),
    ],
)
def test_sparse_layers_are_read(log: str, found: SparseLayers | None) -> None:
    assert sparse_layers(log) == found


def test_options_fit_the_file(linear: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, half = linear("plain.onnx"), linear("half.onnx", weight=np.eye(4, dtype=np.float16))
    assert not holds_half(plain) and holds_half(half)
    chosen = options(plain, {"x": (8, 4), "attention_mask": (8, 35)})
    assert chosen["trt_fp16_enable"] == "0" and options(half)["trt_fp16_enable"] == "1"
    assert chosen["trt_sparsity_enable"] == chosen["trt_detailed_build_log"] == "1"
    for which in ("min", "opt", "max"):
        assert chosen[f"trt_profile_{which}_shapes"] == "x:8x4,attention_mask:8x35"
    assert not any("profile" in name for name in options(half))
    assert Path(chosen["trt_engine_cache_path"]).is_dir()


def test_each_file_has_its_engines(
    linear: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = engine_folder(linear("a.onnx"))
    assert first.is_relative_to(tmp_path / "cache" / "vlprune" / "tensorrt")
    assert engine_folder(linear("b.onnx")) == first  # the same graph, by another name
    pruned = linear("a.onnx", weight=np.zeros((4, 4), np.float32))
    assert engine_folder(pruned) != first
    (pruned.parent / "a.onnx.data").write_bytes(b"weights")
    beside = engine_folder(pruned)
    (pruned.parent / "a.onnx.data").write_bytes(b"others")
    assert engine_folder(pruned) != beside


def test_what_a_log_told_stays_with_the_engine(tmp_path: Path) -> None:
    small, large = {"x": (1, 3, 8, 8)}, {"x": (8, 3, 8, 8)}
    assert remember(tmp_path, small, None) is None
    told = SparseLayers(3, 1, ("fc1",))
    assert remember(tmp_path, small, told) == told
    assert remember(tmp_path, small, None) == told and remember(tmp_path, large, None) is None
    (file,) = tmp_path.iterdir()
    for broken in ("[", "[]", '{"eligible": "many"}'):
        file.write_text(broken)
        assert remember(tmp_path, small, None) is None


def test_the_log_is_read_from_stderr_and_stderr_is_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    levels = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnxruntime, "set_default_logger_severity", levels.append)
        with build_log() as log:
            os.write(2, TENSORRT_10.encode())
        with pytest.raises(ZeroDivisionError), build_log():
            os.write(2, b"lost")
            raise ZeroDivisionError
        with build_log(wanted=False) as nothing:
            os.write(2, b"seen")
    assert levels == [2, 4, 2, 4]
    assert log.found == SparseLayers(3, 1, ("__myl_Fc(a, b)",)) and nothing.found is None
    assert capfd.readouterr().err == "seen"
