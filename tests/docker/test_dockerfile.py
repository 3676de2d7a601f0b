"""The Dockerfile as far as it can be read; `docker/check.py --run` builds its CPU image."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest


ROOT = Path(__file__).parents[2]
pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed")


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_check", ROOT / "docker" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_nothing_is_wrong_with_ours(check: ModuleType) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what Docker would be sent is not known")
    assert list(check.problems(ROOT / "Dockerfile", ROOT)) == []
    stages = {stage.name: stage for stage in check.read(ROOT / "Dockerfile")}
    assert list(stages) == ["base", "build", "gpu", "cpu"]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", stages["base"].base)
    assert all(stages[name].base == "base" for name in ("build", "gpu", "cpu"))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("USER vlprune\n", "", "stage gpu runs as root"),
        ("USER vlprune\n", "USER root\n", "stage cpu runs as root"),
        ("python:3.11.14-slim-bookworm", "python:3.11-slim", "python:3.11-slim is not pinned to a version"),
        ("--no-install-recommends ", "", "apt-get installs recommended packages"),
        (" && rm -rf /var/lib/apt/lists/*", "", "apt's lists stay"),
        ("--constraint /etc/vlprune/constraints.txt ", "", "whatever versions are newest"),
        ("&& install", "&& (install", "the shell does not read it"),
        ("--from=build", "--from=cpu", "copies from cpu, which is no earlier stage"),
        ("COPY docker/constraints.txt", "COPY nowhere.txt", "copies nowhere.txt, which is not in the context"),
        ("COPY docker/constraints.txt", "COPY .git", "copies .git, which is not in the context, or is ignored"),
        ('["vlprune"]', "vlprune", "ENTRYPOINT is no JSON list"),
        ("AS cpu", "AS other", "the last stage, which docker builds by default, is not cpu"),
        ("AS gpu", "AS other", "there is no stage gpu"),
        ("AS build", "", "does not name its stage"),
        ("COPY . /src", "ADD https://example.org/x /src", "ADD is no instruction this file should need"),
    ],
)
def test_what_is_wrong_is_named(check: ModuleType, tmp_path: Path, before: str, after: str, says: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what Docker would be sent is not known")
    text = (ROOT / "Dockerfile").read_text()
    assert before in text
    (tmp_path / "Dockerfile").write_text(text.replace(before, after))
    assert any(says in line for line in check.problems(tmp_path / "Dockerfile", ROOT))


def test_versions_are_pinned() -> None:
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pinned.values())
    known = {name.lower().replace("_", "-") for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["cpu"], *extras["gpu"]]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in needed}  # type: ignore[index]
    assert names <= known
    for version in re.findall(r"torch==(\S+)", (ROOT / "Dockerfile").read_text() + (ROOT / "Makefile").read_text()):
        assert version.partition("+")[0] == pinned["torch"]


def test_what_docker_would_be_sent(check: ModuleType, tmp_path: Path) -> None:
    ignored = ["**/__pycache__", ".*_cache", "build", "demo"]
    for name, gone in {
        "build/lib.so": True,
        "vlprune/build/x.py": False,
        "a/__pycache__/b.pyc": True,
        ".mypy_cache/x": True,
        "demos/x": False,
    }.items():
        assert check._ignored(name, ignored) is gone, name
    assert check.copied("--from=build /a /b /c/") == ("build", ["/a", "/b"], "/c/")
    assert check.fill("${A}-$B-$C", {"A": "1", "B": "2"}) == "1-2-"
