"""What the edge runner takes of vlprune imports nothing that an edge device has not."""

import ast
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
ALLOWED = {"PIL", "cryptography", "numpy", "onnxruntime", "tokenizers", "zstandard"}
LAZY = {"onnx": "vlprune/runtime/session.py"}  # tried where it may be missing
OTHERS = ["runtime/tensorrt.py"]  # imported when that provider is asked for, which the edge runner never does


def shared() -> list[str]:
    """The files that edge/CMakeLists.txt names."""
    text = (ROOT / "edge/CMakeLists.txt").read_text()
    found = []
    for folder, names in re.findall(r"set\(names_(\S+) ([^)]*)\)", text):
        found += [f"{'' if folder == '.' else folder + '/'}{name}.py" for name in names.split()]
    return found


def test_the_list_is_found():
    assert {"errors.py", "bundle/runner.py", "runtime/generate.py", "models/pixels.py"} <= set(shared())


@pytest.mark.parametrize("name", shared())
def test_imports(name):
    path = ROOT / "vlprune" / name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: it must be shared, too
                base = (path.parent if node.level == 1 else path.parents[node.level - 1]) / (node.module or "").replace(
                    ".", "/"
                )
                there = base.with_suffix(".py") if base.with_suffix(".py").is_file() else None
                for alias in node.names:
                    file = there or base / f"{alias.name}.py"
                    assert str(file.relative_to(ROOT / "vlprune")) in shared() + OTHERS, f"{name}:{node.lineno}"
                continue
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            known = top in ALLOWED or top in sys.stdlib_module_names
            assert known or LAZY.get(top) == f"vlprune/{name}", f"{name}:{node.lineno} imports {module}"


def test_the_links_of_the_edge_folder():
    assert (ROOT / "edge/source").resolve() == ROOT / "vlprune"
    assert (ROOT / "edge/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
