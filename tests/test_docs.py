"""The examples in README.md and docs/ run, and say what happens."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlprune.exporters.pack import is_packed, pack
from vlprune.runtime import operators


ROOT = Path(__file__).parents[1]
SPARSE = ROOT / "docs" / "sparse.md"
SIDE, WIDTH = 8, 64  # pixels; outputs


def test_layout_example() -> None:
    text = SPARSE.read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_doctest(text, {}, "sparse.md", "sparse.md", 0)
    assert len(examples.examples) >= 6
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_readme_example() -> None:
    names: dict[str, Any] = {}
    exec(example(ROOT / "README.md"), names)
    (mask,) = names["pruned"].masks.values()
    assert mask.shape == names["weight"].shape and int((~mask).sum()) == round(0.9 * mask.numel())


def test_structured_example() -> None:
    names: dict[str, Any] = {}
    exec(example(ROOT / "docs" / "structured.md"), names)
    left = sum(layer.weight.numel() for layer in names["model"].layers())
    whole = sum(layer.weight.numel() for layer in names["load"]("clip-tiny").layers())
    assert left / whole == pytest.approx(0.5, abs=0.01)


@pytest.mark.skipif(not operators.available(), reason="the operator library is not built")
def test_example_runs_without_this_package(tmp_path: Path) -> None:
    weight, bias = write_encoder(tmp_path / "image_encoder.onnx")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    config = {"image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    image = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    np.save(tmp_path / "image.npy", image)

    code = example(SPARSE)
    assert len(code.strip().splitlines()) <= 22
    check = (
        "\nassert not {'vlprune', 'onnx', 'torch', 'transformers'} & set(sys.modules)"
        "\nnp.save(Path(folder) / 'outputs.npy', outputs[0])"
    )
    (tmp_path / "example.py").write_text(code + check)
    command = [sys.executable, "-I", "example.py", ".", str(operators.library()), "image.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"image_embeds (1, {WIDTH})\n"
    pixels = ((image / 255 - mean) / std).transpose(2, 0, 1).reshape(1, -1)
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), pixels @ weight + bias, rtol=1e-4, atol=1e-4)


def example(document: Path) -> str:
    """The block that a comment in the document announces."""
    text = document.read_text(encoding="utf-8")
    found = re.search(r"<!-- tests/test_docs.py runs this block -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def write_encoder(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write a packed graph of one Linear over the pixels; give its weight [K, N] and bias."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((3 * SIDE * SIDE, WIDTH), np.float32)
    weight[random.random(weight.shape) < 0.9] = 0
    bias = random.standard_normal(WIDTH, np.float32)
    tensors = [("shape", np.array([0, -1])), ("weight", weight), ("bias", bias)]
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["image_embeds"]),
    ]
    graph = helper.make_graph(
        nodes,
        "image_encoder",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in tensors],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    packed, _ = pack(model, target="portable")
    assert is_packed(packed)
    onnx.save(packed, path)
    return weight, bias
