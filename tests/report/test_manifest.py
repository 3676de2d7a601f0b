import json
from pathlib import Path

import pytest

from vlprune.errors import RequestError
from vlprune.report.manifest import verify_manifest, write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "onnx" / "deep").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 7\n")
    (folder / "onnx" / "deep" / "graph.onnx").write_bytes(b"abc")
    write_manifest(folder, seed=7)
    return folder


def _problem(run: Path) -> str:
    with pytest.raises(RequestError) as caught:
        verify_manifest(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_content(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["files"]["onnx/deep/graph.onnx"] == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # of "abc", FIPS 180-2
        "bytes": 3,
    }
    assert sorted(manifest["files"]) == ["onnx/deep/graph.onnx", "recipe.yaml"]
    assert manifest["recipe_sha256"] == manifest["files"]["recipe.yaml"]["sha256"]
    assert manifest["seed"] == 7
    assert {"vlprune", "torch", "onnx"} <= manifest["versions"].keys()


def test_an_untouched_run_verifies(run: Path) -> None:
    assert verify_manifest(run)["seed"] == 7


def test_writing_again_leaves_itself_out(run: Path) -> None:
    write_manifest(run, seed=7)
    assert "manifest.json" not in verify_manifest(run)["files"]


def test_a_flipped_byte_is_found(run: Path) -> None:
    (run / "onnx" / "deep" / "graph.onnx").write_bytes(b"abd")
    assert "onnx/deep/graph.onnx has another content" in _problem(run)


def test_a_longer_file_is_found(run: Path) -> None:
    (run / "onnx" / "deep" / "graph.onnx").write_bytes(b"abcd")
    assert "onnx/deep/graph.onnx has another size" in _problem(run)


def test_a_missing_file_is_found(run: Path) -> None:
    (run / "recipe.yaml").unlink()
    assert "recipe.yaml is missing" in _problem(run)


def test_an_extra_file_is_found_even_when_hidden(run: Path) -> None:
    (run / "onnx" / ".extra").write_text("")
    assert "onnx/.extra is not in the manifest" in _problem(run)


def test_links_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (run / "onnx" / "link").symlink_to(tmp_path / "secret")
    assert "onnx/link" in _problem(run)
    with pytest.raises(RequestError, match="is a link"):
        write_manifest(run, seed=0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 2, "files": {}}',
        '{"schema_version": 1, "files": []}',
        '{"schema_version": 1, "files": {"recipe.yaml": "x"}}',
        '{"schema_version": 1, "files": {"recipe.yaml": {"sha256": 1, "bytes": 1}}}',
    ],
)
def test_malformed_manifests_are_refused(run: Path, text: str) -> None:
    (run / "manifest.json").write_text(text)
    assert "manifest.json" in _problem(run)


def test_a_name_outside_the_folder_is_never_opened(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"sha256": "0" * 64, "bytes": 1}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "../secret is missing" in _problem(run)
