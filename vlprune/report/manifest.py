"""manifest.json: SHA-256 and size of every file of a run directory, so that nothing changes unnoticed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from vlprune.errors import RequestError
from vlprune.files import read_json, sha256, write_json
from vlprune.report.environment import versions


MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"


class FileEntry(TypedDict):
    """One file: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: str
    bytes: int


class Manifest(TypedDict):
    """manifest.json.

    Attributes:
        schema_version: 1.
        files: path inside the folder, with "/" -> entry; every file but the manifest.
        versions: package -> version.
        seed: seed of the run.
        recipe_sha256: hash of recipe.yaml, None where there is none.
    """

    schema_version: int
    files: dict[str, FileEntry]
    versions: dict[str, str]
    seed: int
    recipe_sha256: str | None


def write_manifest(folder: Path | str, seed: int) -> Manifest:
    """Hash every file under `folder` and write its manifest.json; the last thing a run does.

    Args:
        folder: run directory.
        seed: seed of the run.

    Returns:
        Manifest: what was written.
    """
    folder = Path(folder)
    files: dict[str, FileEntry] = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in _files(folder)
    }
    manifest: Manifest = {
        "schema_version": 1,
        "files": files,
        "versions": versions(),
        "seed": seed,
        "recipe_sha256": files[RECIPE]["sha256"] if RECIPE in files else None,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def update_manifest(folder: Path | str, path: Path | str) -> None:
    """Tell a folder's manifest.json of one file that was written again; what it says of the others stays.

    Args:
        folder: run directory with a manifest.
        path: a file in it.

    Raises:
        RequestError: the manifest is malformed.
    """
    folder, path = Path(folder), Path(path)
    manifest = read_json(folder / MANIFEST)
    _check_form(manifest, folder / MANIFEST)
    name = path.resolve().relative_to(folder.resolve()).as_posix()
    manifest["files"][name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(folder / MANIFEST, manifest)


def verify_manifest(folder: Path | str) -> Manifest:
    """Compare a folder with its manifest.json.

    Only files found by listing the folder are opened, so a name in the manifest cannot lead outside it.

    Args:
        folder: run directory or unpacked bundle.

    Returns:
        Manifest: the manifest, when everything fits.

    Raises:
        RequestError: a file is missing, was added or was changed, or the manifest is malformed.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    _check_form(manifest, folder / MANIFEST)
    expected, present = manifest["files"], set(_files(folder))
    problems = [f"{name} is missing" for name in expected if name not in present]
    for name in sorted(present):
        entry = expected.get(name)
        if entry is None:
            problems.append(f"{name} is not in the manifest")
        elif (folder / name).stat().st_size != entry["bytes"]:
            problems.append(f"{name} has another size")
        elif sha256(folder / name) != entry["sha256"]:
            problems.append(f"{name} has another content")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RequestError(f"{folder} does not fit its manifest: {shown}")
    return manifest


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files under `folder` but the manifest, sorted, relative, with "/"."""
    for path, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            entry = Path(path, name)
            relative = entry.relative_to(folder).as_posix()
            if entry.is_symlink():
                raise RequestError(f"{relative} in {folder} is a link: a manifest vouches for plain files only")
            if entry.is_file() and relative != MANIFEST:
                yield relative
        folders.sort()


def _check_form(manifest: Any, path: Path) -> None:
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    well_formed = (
        isinstance(entries, dict)
        and manifest.get("schema_version") == 1
        and all(
            isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
            for entry in entries.values()
        )
    )
    if not well_formed:
        raise RequestError(f"{path} is not a manifest this vlprune can read")
