"""Small ONNX files, written node by node."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper


Value = tuple[str, int, Sequence[int | str]]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a graph: write(name, nodes, inputs, outputs, {initializer: array or TensorProto}, other domains)."""

    def save(
        name: str,
        nodes: list[NodeProto],
        inputs: list[Value],
        outputs: list[Value],
        initializers: dict[str, Any] | None = None,
        domains: Sequence[str] = (),
    ) -> Path:
        tensors = [
            value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), key)
            for key, value in (initializers or {}).items()
        ]
        values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
        graph = helper.make_graph(nodes, "graph", *values, tensors)
        opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        return path

    return save


@pytest.fixture
def linear(write: Write) -> Callable[..., Path]:
    """Write y = x @ weight for x [batch, in]."""

    def save(name: str = "linear.onnx", weight: Any = None) -> Path:
        weight = np.eye(4, dtype=np.float32) if weight is None else weight
        node = helper.make_node("MatMul", ["x", "weight"], ["y"])
        shape = weight.dims if isinstance(weight, TensorProto) else weight.shape
        ends = [("x", TensorProto.FLOAT, ["batch", shape[0]])], [("y", TensorProto.FLOAT, ["batch", shape[1]])]
        return write(name, [node], *ends, {"weight": weight})

    return save
