"""Write a task's packed graphs, prove that they still compute what PyTorch computes; write plain ones back."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from vlprune.data.sets import Data
from vlprune.errors import RequestError
from vlprune.exporters.compare import compare
from vlprune.exporters.graphs import as_function
from vlprune.exporters.pack import is_packed, load, pack, save, unpack
from vlprune.files import atomic_path, read_json, write_json
from vlprune.models.family import Model
from vlprune.progress import track
from vlprune.runtime.session import OnnxGraph, session


PACKED, UNPACKED = "packed", "unpacked"  # folders of a run, inside and beside each other
SUMMARY = "packing.json"  # what became of each Linear
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3}  # largest difference allowed, as in `exporters.export`; fp16 rounds weights


def pack_task(
    model: Model,
    plain: Path,
    folder: Path,
    data: Data,
    *,
    values: str,
    target: str,
    threshold: float | None,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Pack the graphs of a task into a folder that is complete by itself.

    Files are written in place: give a temporary folder and rename it.

    Args:
        model: what the graphs were exported from, on the CPU.
        plain: folder of the plain graphs.
        folder: an existing, empty folder.
        data: real images and texts; each graph is compared with PyTorch on six of them.
        values: see `pack`.
        target: see `pack`.
        threshold: see `pack`.
        threads: CPU threads of ONNX Runtime, None = all.

    Returns:
        list[dict[str, Any]]: per graph its name (`graph`), its `file` in the folder, `bytes`, `weights` (`values`),
            `linears` and how many of them are packed (`linears_packed`), `max_abs_diff` and `cosine_min` against
            PyTorch.

    Raises:
        RequestError: a plain graph is missing or broken.
        MachineError: the operators are missing, or a graph differs from PyTorch.
    """
    spec = read_json(plain / "task.json")
    graphs = import_module(f"vlprune.exporters.{model.family}").graphs(model, spec["task"])
    rows, packed, summary = [], {}, {}
    for name in track(graphs, f"Packing {plain.parent.name} {plain.name}", len(graphs)):
        graph, layers = pack(load(plain / f"{name}.onnx"), values=values, target=target, threshold=threshold)
        size = save(graph, folder / f"{name}.onnx")
        packed[name] = OnnxGraph(session(folder / f"{name}.onnx", threads=threads), name)
        counts = {"linears": len(layers), "linears_packed": sum(layer["packed"] for layer in layers)}
        rows.append({"graph": name, "file": f"{name}.onnx", "bytes": size, "weights": values, **counts})
        summary[name] = layers
    reference = {name: as_function(graph) for name, graph in graphs.items()}
    differences = compare(reference, packed, spec, model.processor, data, TOLERANCE[values])
    for row in rows:
        difference = differences[row["graph"]]
        row |= {"max_abs_diff": difference.max_abs_diff, "cosine_min": difference.cosine_min}
    copy_others(plain, folder)
    write_json(folder / SUMMARY, summary)
    return rows


def unpack_files(path: Path) -> list[dict[str, Any]]:
    """Write plain graphs for packed ones.

    Args:
        path: a packed ONNX file: `<name>.unpacked.onnx` is written beside it. Or a folder of packed graphs with their
            task.json, or a run directory: the plain graphs go to a folder "unpacked" beside each folder "packed".

    Returns:
        list[dict[str, Any]]: the `packed` and the `unpacked` file, and the size of each, `bytes` and `unpacked_bytes`.

    Raises:
        RequestError: nothing there is packed, or a file is broken.
    """
    if path.is_file():
        target = path.with_name(f"{path.stem}.{UNPACKED}.onnx")
        plain = _unpacked(path)
        with atomic_path(target) as temporary:
            save(plain, temporary)
            beside = temporary.with_name(f"{temporary.name}.data")
            if beside.exists():
                beside.replace(target.with_name(beside.name))
        return [_row(path, target)]
    folders = [path] if (path / "task.json").is_file() else sorted((path / "onnx").glob(f"*/*/{PACKED}"))
    rows = []
    for folder in folders:
        files = sorted(file for file in folder.glob("*.onnx") if not file.stem.endswith(f".{UNPACKED}"))
        if not files:
            continue
        target = folder.with_name(UNPACKED) if folder.name == PACKED else folder / UNPACKED
        with atomic_path(target) as temporary:
            temporary.mkdir()
            for file in files:
                save(_unpacked(file), temporary / file.name)
            copy_others(folder, temporary)
        rows += [_row(file, target / file.name) for file in files]
    if not rows:
        raise RequestError(f"{path} has no packed graphs: give a packed ONNX file, their folder, or a run with --pack")
    return rows


def _unpacked(path: Path) -> Any:
    graph = load(path)
    if not is_packed(graph):
        raise RequestError(f"{path} is not packed: there is nothing to unpack")
    try:
        return unpack(graph)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _row(packed: Path, plain: Path) -> dict[str, Any]:
    return {"packed": str(packed), "bytes": _size(packed), "unpacked": str(plain), "unpacked_bytes": _size(plain)}


def _size(path: Path) -> int:
    """Bytes of an ONNX file and of the weights beside it."""
    files = (path, path.with_name(f"{path.name}.data"))
    return sum(file.stat().st_size for file in files if file.is_file())


def copy_others(source: Path, target: Path) -> None:
    """Copy what a runner needs beside the graphs: task.json, tokenizer, image preprocessing.

    Args:
        source: folder of a task.
        target: an existing folder.
    """
    for file in source.iterdir():
        if file.is_file() and not file.is_symlink() and ".onnx" not in file.suffixes and file.name != SUMMARY:
            shutil.copyfile(file, target / file.name)
