"""Make a bundle of one task of a run.

Every tensor of a kilobyte or more leaves its graph for one file of weights, where equal tensors lie once, and is stored
in the smallest exact form (see `vlprune.bundle.tensors`). The same run, options and versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from onnx import ModelProto, TensorProto, numpy_helper
from PIL import Image

from vlprune import __version__
from vlprune.bundle import archive, limits, signing
from vlprune.bundle.card import render_card
from vlprune.bundle.manifest import FORMAT, SCHEMA_VERSION, FileEntry, Manifest, identity, parse, write_text
from vlprune.bundle.protobuf import check_graph
from vlprune.bundle.runner import Bundle, open_picture
from vlprune.bundle.tensors import DTYPES, TensorEntry, aligned, encode
from vlprune.bundle.verify import compare, verify
from vlprune.data.scenes import scene
from vlprune.errors import MachineError, RequestError
from vlprune.exporters.layout import beyond_half
from vlprune.exporters.pack import is_packed, load
from vlprune.exporters.packed_files import PACKED
from vlprune.files import atomic_path, read_json, sha256, write_json
from vlprune.names import PRECISIONS, TASKS, check
from vlprune.progress import track
from vlprune.report.manifest import MANIFEST
from vlprune.report.schema import validate_report


SMALLEST = 1024  # bytes; smaller tensors stay in their graph
TRIAL_LEVEL = 3  # of zstd, to choose the form of a tensor
TOLERANCE = 1e-4  # from the stored output, of a machine that verifies
# Largest difference from the plain fp32 graphs; other precisions lose what the run's report says they lose.
LOSS = {"fp32": 1e-4, "fp16": 2e-2}
SIDE = 512  # pixels; the stored image is no larger


def make_bundle(
    run: Path | str,
    task: str,
    output: Path | str,
    *,
    variant: str | None = None,
    precision: str = "fp32",
    packed: bool = True,
    embeddings: str = "fp32",
    sign: Path | str | None = None,
    example: Path | str | None = None,
    text: str | None = None,
) -> dict[str, Any]:
    """Write a bundle, then open and verify it as a stranger would.

    Args:
        run: run directory with exported graphs.
        task: one that was exported.
        output: the file.
        variant: which model; None = the only one that is pruned.
        precision: of the graphs, as exported; see `vlprune.names.PRECISIONS`.
        packed: take packed graphs where the run has them; they need the operator library.
        embeddings: "fp16" rounds the tables of embeddings that are not fp16 in the graphs already, and expands them
            when the bundle is opened.
        sign: private key file (Ed25519, PEM); None = unsigned.
        example: image to store as the input that `verify` runs; None = one of the embedded scenes.
        text: to store beside it; None = that of the scene.

    Returns:
        dict[str, Any]: `file`, `bundle` (its identity), `bytes`, `dense_bytes` and their `ratio`, `variant`, `form`,
            `tensors` and how many of them graphs share (`shared`), `differences` from the run's plain fp32 graphs.

    Raises:
        RequestError: the run lacks what is asked for, or its files have changed since it wrote its manifest.
        MachineError: the bundle does not compute here what the plain graphs compute, or the disk is full.
    """
    source = _Source.find(Path(run), task, variant, precision, packed)
    check("embeddings", embeddings, ("fp32", "fp16"))
    if sign is not None:
        signing.sign(b"", Path(sign))  # a key that cannot sign is found now
    weights = _Weights(embeddings == "fp16")
    image, line, origin = _example(task, example, text)
    output = Path(output)
    if output.is_dir():
        raise RequestError(f"{output} is a folder: name a file, as in --output model.vlp.tar.zst")
    with tempfile.TemporaryDirectory(prefix="vlprune-") as name:
        folder = Path(name)
        for subfolder in ("graphs", "example", "weights"):
            (folder / subfolder).mkdir()
        for file in source.others():
            (folder / file.name).write_bytes(file.read_bytes())
        graphs = {}
        for file in track(source.graphs, f"Reading {source.variant} {task}"):
            graphs[file.name] = load(file)
            weights.take(graphs[file.name])
        entries = weights.write(folder)
        for file_name, graph in graphs.items():
            (folder / "graphs" / file_name).write_bytes(graph.SerializeToString(deterministic=True))
        is_sparse = any(map(is_packed, graphs.values()))
        image.save(folder / limits.EXAMPLE_IMAGE, optimize=True)
        if line:
            (folder / limits.EXAMPLE_TEXT).write_text(line, encoding="utf-8")
        spec = read_json(folder / "task.json")
        values = source.values if is_sparse else None
        manifest: Manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "signed": sign is not None,
            "task": task,
            "family": spec["family"],
            "variant": source.variant,
            "precision": precision,
            "packed": is_sparse,
            "values": values,
            "embeddings": "fp16" if weights.rounded else "fp32",
            "model": source.model(),
            "dense_bytes": source.dense_bytes(),
            "vlprune": __version__,
            "versions": source.manifest["versions"],
            "recipe_sha256": source.manifest["recipe_sha256"],
            "metrics": source.metrics(values),
            "example": origin,
            "tolerance": TOLERANCE,
            "differences": {},
            "files": {},
            "weights": {"bytes": (folder / "graphs" / limits.WEIGHTS).stat().st_size, "tensors": entries},
        }
        tensors = {(entry["offset"], entry["bytes"]): entry["dtype"] for entry in entries}
        for file in sorted((folder / "graphs").glob("*.onnx")):
            check_graph(file.read_bytes(), file.name, tensors)
        outputs = Bundle(folder, manifest, threads=1).example(image, line)
        write_json(folder / limits.EXPECTED, outputs)
        with _as_bundle(source.plain, folder) as plain:
            reference = Bundle(plain, {**manifest, "packed": False}, threads=1).example(image, line)
        manifest["differences"] = compare(reference, outputs)
        _check_loss(manifest)
        (folder / "graphs" / limits.WEIGHTS).unlink()
        (folder / "README.md").write_text(render_card(manifest, source.report), encoding="utf-8")
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        manifest["files"] = {file: _entry(files[file]) for file in sorted(files)}
        contents = write_text(manifest)
        members: list[tuple[str, bytes | Path]] = [(limits.MANIFEST, contents)]
        if sign is not None:
            members.append((limits.SIGNATURE, signing.sign(contents, Path(sign))))
        # tensors last: whoever reads the archive knows the rest by then
        members += [(file, files[file]) for file in sorted(files, key=lambda file: (file.startswith("weights/"), file))]
        with atomic_path(output) as temporary:
            archive.write(temporary, members)
            size = temporary.stat().st_size
            parse(contents, size)
            verify(temporary)
    return {
        "file": str(output),
        "bundle": identity(contents),
        "bytes": size,
        "dense_bytes": manifest["dense_bytes"],
        "ratio": size / manifest["dense_bytes"],
        "variant": source.variant,
        "form": describe(manifest),
        "tensors": len(entries),
        "shared": len(weights.uses) - len(entries),
        "differences": manifest["differences"],
    }


def describe(manifest: Mapping[str, Any]) -> str:
    """Say how a bundle stores its weights.

    Args:
        manifest: of the bundle.

    Returns:
        str: for example "packed fp16, embeddings fp16".
    """
    form = f"packed {manifest['values']}" if manifest["packed"] else str(manifest["precision"])
    return form if manifest["embeddings"] == "fp32" else f"{form}, embeddings {manifest['embeddings']}"


# --- what the run offers ----------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """A variant of a run, in the form that is to be bundled."""

    run: Path
    task: str
    variant: str
    precision: str
    folder: Path  # of the graphs
    plain: Path  # of the plain fp32 ones
    report: dict[str, Any]
    manifest: dict[str, Any]

    @classmethod
    def find(cls, run: Path, task: str, variant: str | None, precision: str, packed: bool) -> _Source:
        check("task", task, TASKS)
        check("precision", precision, PRECISIONS)
        if not (run / "report.json").is_file():
            raise RequestError(f"{run} has no report.json: give the directory of a finished run")
        report = validate_report(read_json(run / "report.json"))
        manifest = read_json(run / MANIFEST)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise RequestError(f"{run / MANIFEST} is no manifest of a run: run vlprune validate {run} --resume")
        there = {file.parent.parent.name for file in run.glob(f"onnx/*/{task}/task.json")}
        if not there:
            raise RequestError(f"{run} has no graphs for {task}: vlprune export {run} --tasks {task}")
        if variant is None:
            pruned = [row["id"] for row in report["variants"] if row["ratio"] is not None and row["id"] in there]
            if len(pruned) != 1:
                raise RequestError(f"{run} holds {', '.join(sorted(there))} for {task}: name one by --variant")
            variant = pruned[0]
        elif variant not in there:
            raise RequestError(f"{run} has no graphs of {variant!r} for {task}: it holds {', '.join(sorted(there))}")
        plain = run / "onnx" / variant / task
        folder = plain if precision == "fp32" else plain / precision
        if precision == "fp32" and packed and (plain / PACKED / "task.json").is_file():
            folder = plain / PACKED
        if not (folder / "task.json").is_file():
            raise RequestError(
                f"{run} has no graphs of {variant} for {task} in {precision}: "
                f"vlprune export {run} --precision {precision}"
            )
        source = cls(run, task, variant, precision, folder, plain, dict(report), manifest)
        source._check_unchanged()
        return source

    @property
    def graphs(self) -> list[Path]:
        return sorted(self.folder.glob("*.onnx"))

    def others(self) -> list[Path]:
        """Files beside the graphs that a bundle may hold."""
        files = [file for file in sorted(self.folder.iterdir()) if file.is_file() and not file.is_symlink()]
        return [file for file in files if limits.largest(file.name) is not None]

    def _check_unchanged(self) -> None:
        for file in [*self.others(), *self.folder.glob("*.onnx*")]:
            name = file.relative_to(self.run).as_posix()
            known = self.manifest["files"].get(name)
            if not isinstance(known, dict) or known.get("sha256") != sha256(file):
                raise RequestError(f"{file} is not what the run wrote: export it again (vlprune export {self.run})")

    @property
    def values(self) -> str:
        """How the packed graphs store their weights."""
        rows = [row for row in self.report["graphs"] if row["packed"] and row["variant"] == self.variant]
        return next((row.get("weights", "fp32") for row in rows if row["task"] == self.task), "fp32")

    def model(self) -> dict[str, Any]:
        """Describe the model without naming a place on this machine."""
        model = self.report["model"]
        digest = re.search(r"SHA-256 ([0-9a-f]{64})", model["checkpoint"])
        return {
            "name": Path(model["name"]).name,
            "checkpoint_sha256": digest[1] if digest else None,
            "parameters": model["parameters"],
            "random_weights": model["random_weights"],
        }

    def metrics(self, values: str | None) -> list[dict[str, Any]]:
        """Rows of the report on this form of the variant, and on the dense ones in fp32."""

        def wanted(row: Mapping[str, Any]) -> bool:
            plain = row["precision"] == "fp32" and not row["packed"]
            if row["variant"] == self.variant:
                same = row["precision"] == self.precision and row["packed"] == (values is not None)
                return row["runtime"] == "pytorch" or (same and row.get("weights") == values)
            return row["variant"] in ("dense", "dense-finetuned") and plain

        return [row for row in self.report["metrics"] if row["task"] == self.task and wanted(row)]

    def dense_bytes(self) -> int:
        """Bytes of the dense model's weights in fp32, those that graphs share counted once."""
        names = ["dense-finetuned", "dense"] if self.variant.endswith("-finetuned") else ["dense", "dense-finetuned"]
        folders = [self.run / "onnx" / name / self.task for name in names]
        folder = next((folder for folder in folders if (folder / "task.json").is_file()), None)
        if folder is None:
            raise RequestError(f"{self.run} has no dense graphs for {self.task} to compare with: export them, too")
        seen: dict[str, int] = {}
        for file in sorted(folder.glob("*.onnx")):
            for tensor in load(file).graph.initializer:
                array = numpy_helper.to_array(tensor)
                if array.dtype == np.float32:
                    seen[_hash(array)] = array.nbytes
        return sum(seen.values())


# --- weights ----------------------------------------------------------------------------------------------------------


class _Weights:
    """The large tensors of all graphs, by the hash of what they become once the bundle is opened.

    Args:
        round_tables: to float16, those that a Gather reads.
    """

    def __init__(self, round_tables: bool) -> None:
        self.round_tables = round_tables
        self.arrays: dict[str, np.ndarray] = {}
        self.rounded: set[str] = set()
        self.uses: list[tuple[TensorProto, str]] = []

    def take(self, model: ModelProto) -> None:
        """Take the large tensors out of a graph, and write the small ones in the one way that bundles know."""
        tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather" and not node.domain}
        for tensor in model.graph.initializer:
            name, shape = tensor.name, list(tensor.dims)
            array = np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(shape)
            if array.nbytes < SMALLEST or array.dtype.name not in DTYPES:
                tensor.CopyFrom(numpy_helper.from_array(array, name))
                continue
            table = self.round_tables and name in tables and array.ndim == 2 and array.dtype == np.float32
            table = table and not beyond_half(array)
            if table:
                array = array.astype(np.float16).astype(np.float32)
            digest = _hash(array)
            if table:
                self.rounded.add(digest)
            self.arrays.setdefault(digest, array)
            self.uses.append((tensor, digest))
            kind = tensor.data_type
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(shape)
        for tensor in (a.t for node in model.graph.node for a in node.attribute if a.HasField("t")):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))

    def write(self, folder: Path) -> list[TensorEntry]:
        """Write weights/<hash> and graphs/weights.bin, and tell the graphs where their tensors lie in it."""
        compressor = zstandard.ZstdCompressor(level=TRIAL_LEVEL)
        entries: dict[str, TensorEntry] = {}
        with (folder / "graphs" / limits.WEIGHTS).open("wb") as out:
            for digest in track(sorted(self.arrays), "Storing weights"):
                array = self.arrays.pop(digest)
                stored = array.astype(np.float16) if digest in self.rounded else array
                data, masked, coding = encode(stored, size_of=lambda form: len(compressor.compress(form)))
                (folder / "weights" / digest).write_bytes(data)
                out.write(b"\0" * (aligned(out.tell()) - out.tell()))
                entries[digest] = {
                    "sha256": digest,
                    "bytes": array.nbytes,
                    "dtype": array.dtype.name,
                    "offset": out.tell(),
                    "stored": stored.dtype.name,
                    "masked": masked,
                    "coding": coding,
                }
                out.write(array.tobytes())
        for tensor, digest in self.uses:
            entry = entries[digest]
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": limits.WEIGHTS, "offset": entry["offset"], "length": entry["bytes"]}
            for key, value in places.items():
                place = tensor.external_data.add()
                place.key, place.value = key, str(value)
        return list(entries.values())


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


# --- small things -----------------------------------------------------------------------------------------------------


def _example(task: str, image: Path | str | None, text: str | None) -> tuple[Image.Image, str, str]:
    """The stored input: image, text, and where they come from."""
    drawn = scene("test", 0)
    line = drawn.questions()[0][0] if task == "vqa" else drawn.captions[0]
    if text is not None:
        line = text
    if task in ("captioning", "classification"):
        line = ""
    if len(line) > limits.MAX_TEXT:
        raise RequestError(f"--example-text has more than {limits.MAX_TEXT:,} characters: shorten it")
    if image is None:
        return drawn.draw(), line, "drawn by vlprune"
    picture = open_picture(image)
    picture.thumbnail((SIDE, SIDE))
    return picture, line, "given by the maker of the bundle"


def _check_loss(manifest: Manifest) -> None:
    """Refuse a bundle that computes something else than the graphs that were validated."""
    rounds = manifest["values"] == "fp16" or manifest["embeddings"] == "fp16"
    most = LOSS["fp16" if rounds else "fp32"] if manifest["precision"] == "fp32" else np.inf
    worst = max(manifest["differences"], key=lambda output: manifest["differences"][output])
    if not manifest["differences"][worst] <= most or not np.isfinite(manifest["differences"][worst]):
        raise MachineError(
            f"the bundle's {worst} differs from that of the plain graphs by {manifest['differences'][worst]:.1e}, "
            f"allowed {most:.0e}: bundle the run without what rounds its weights"
        )


@contextmanager
def _as_bundle(graphs: Path, folder: Path) -> Iterator[Path]:
    """Plain graphs of a run in the form of an opened bundle whose other files lie in a folder."""
    with tempfile.TemporaryDirectory(prefix="vlprune-") as name:
        for file in folder.iterdir():
            if file.is_file():
                os.symlink(file, Path(name) / file.name)
        os.symlink(graphs.resolve(), Path(name) / "graphs")
        yield Path(name)


def _entry(path: Path) -> FileEntry:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
