"""A small world in which nothing may change while a hostile file is read."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import Parts

from vlprune.errors import VlpruneError


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.name != "tmp"  # the temporary folder itself is used, and must be empty again
    }


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a working folder, a home and a folder for temporary files."""
    for name in ("cwd", "home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def refused(world: Path) -> Callable[..., str]:
    """Call something with a hostile file; it must refuse in one line and leave nothing behind. Gives the line."""

    def check(call: Callable[[], Any]) -> str:
        before = _tree(world)
        with pytest.raises(VlpruneError) as caught:
            call()
        assert _tree(world) == before
        assert os.listdir(world / "tmp") == []
        line = str(caught.value)
        assert "\n" not in line and len(line) < 1000 and line.isprintable()
        return line

    return check


@pytest.fixture
def parts(small_bundle: Path) -> Parts:
    """A good bundle, taken apart."""
    return Parts(small_bundle)
