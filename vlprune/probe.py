"""Tries one thing that may crash or hang, in a process of its own: `python -m vlprune.probe cuda` prints one JSON line.

`vlprune.doctor` starts it; each probe returns what it found out, or raises.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any


HUB = "https://huggingface.co"


def torch() -> dict[str, Any]:
    """Multiply two matrices with PyTorch, on a GPU where it sees one.

    Returns:
        dict[str, Any]: `gpus`, the names of those it can compute on.

    Raises:
        RuntimeError: the product is wrong.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ones = torch.ones(8, 8, device=device)
    if float((ones @ ones).sum()) != 512:
        raise RuntimeError(f"a product of matrices on {device} is wrong")
    return {"gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}


def provider(name: str) -> dict[str, Any]:
    """Run a small graph with a convolution and a product of matrices, as a vision transformer has them.

    Args:
        name: "cpu", "cuda" or "tensorrt".

    Returns:
        dict[str, Any]: `providers` of the session.

    Raises:
        RuntimeError: the outputs are wrong.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    from vlprune.runtime.session import open_bytes

    kernel = numpy_helper.from_array(np.ones((4, 3, 2, 2), np.float32), "kernel")
    weight = numpy_helper.from_array(np.ones((16, 5), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["patches"], strides=[2, 2]),
        helper.make_node("Flatten", ["patches"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("x", 1, [1, 3, 4, 4])], [helper.make_tensor_value_info("y", 1, [1, 5])]
    graph = helper.make_graph(nodes, "probe", *ends, [kernel, weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_bytes(model.SerializeToString(), name)
    (y,) = session.run(None, {"x": np.ones((1, 3, 4, 4), np.float32)})
    if not np.allclose(y, 3 * 4 * 16):
        raise RuntimeError(f"a convolution and a product of matrices give {y.ravel()[0]}, not 192")
    return {"providers": session.get_providers()}


def operators() -> dict[str, Any]:
    """Pack a sparse layer, run it, and compare it with the plain one.

    Returns:
        dict[str, Any]: `isa`, the instruction set used, and `library`, its path.

    Raises:
        RuntimeError: the packed layer computes something else.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    from vlprune.exporters.pack import pack
    from vlprune.runtime import operators
    from vlprune.runtime.session import open_bytes

    used = {"isa": operators.isa(), "library": str(operators.library())}  # raises what is wrong with it
    random = np.random.default_rng(0)
    weight = random.standard_normal((128, 64), np.float32) * (random.random((128, 64)) < 0.1)
    ends = [helper.make_tensor_value_info("x", 1, ["n", 128])], [helper.make_tensor_value_info("y", 1, ["n", 64])]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "probe", *ends, [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    packed, layers = pack(model, target="portable")
    if not all(layer["packed"] for layer in layers):
        raise RuntimeError("a layer with a tenth of its weights is not packed")
    x = random.standard_normal((5, 128), np.float32)
    (y,) = open_bytes(packed.SerializeToString(), "cpu").run(None, {"x": x})
    if not np.allclose(y, x @ weight, atol=1e-4):
        raise RuntimeError("a packed layer computes something else than the plain one")
    return used


def hub(seconds: float = 3.0) -> dict[str, Any]:
    """Ask the Hugging Face hub for nothing but an answer.

    Args:
        seconds: to wait for it.

    Returns:
        dict[str, Any]: `address` and `status` of the answer.
    """
    address = os.environ.get("HF_ENDPOINT", HUB)
    request = urllib.request.Request(address, method="HEAD")
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return {"address": address, "status": answer.status}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch,
    "operators": operators,
    "hub": hub,
    **{name: partial(provider, name) for name in ("cpu", "cuda", "tensorrt")},
}


def main(name: str) -> None:
    """Run a probe and print what it found, or why it failed, as one JSON line.

    Args:
        name: a key of `PROBES`.
    """
    try:
        answer: dict[str, Any] = {"found": PROBES[name]()}
    except Exception as error:
        reason = getattr(error, "reason", error)  # of urllib's errors
        answer = {"error": " ".join(str(reason).split())[:300] or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
