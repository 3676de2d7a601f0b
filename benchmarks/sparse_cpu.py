"""Sparse Linear layers on the CPU: packed BLIP graphs against dense ones, dynamic int8 and DeepSparse.

python benchmarks/sparse_cpu.py                        # blip-base-random; writes docs/results/sparse_cpu.md
python benchmarks/sparse_cpu.py --quick                # blip-tiny, one sparsity, moments of timing: does it run
python benchmarks/sparse_cpu.py --only image,int8      # some of the parts
python benchmarks/sparse_cpu.py --json FILE --resume   # go on where a run that wrote FILE was stopped

Graphs are exported once into --work and zeroed by seeded random masks. Every time is measured by the protocol of
vlprune/runtime/timing.py: alternating blocks, first runs and disturbed rounds dropped. The dense graph compared with is
the faster of the exported one and the same with its attention fused; "ratio" is dense time / packed time, of medians.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vlprune.exporters import pack, simplify
from vlprune.files import atomic_path, read_json, write_json
from vlprune.report.environment import environment
from vlprune.runtime import operators, timing
from vlprune.runtime.session import session


# What needs torch is imported where a graph is exported: the processes that time layers start without it.
EXPORTING = ("vlprune.exporters.blip", "vlprune.exporters.simplify", "vlprune.models.blip", "vlprune.models.loading")
PACKING = ("vlprune.exporters.pack", "vlprune.exporters.fusion", "vlprune.exporters.layout")
ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("_workers.py")
SHORT = 3  # samples
PARTS = ("image", "text", "decoder", "int8", "deepsparse", "memory", "threads", "kernel")
GRAPHS = {
    "image": ("retrieval", "image_encoder"),
    "text": ("retrieval", "text_encoder"),
    "decoder": ("captioning", "text_decoder"),
}
MASKS = {"90": (0.9, 1), "75": (0.75, 1), "63": (0.63, 1), "75-4x1": (0.75, 4)}  # share of zeros, rows of a block
TITLES = {"90": "90 %", "75": "75 %", "63": "63 %", "75-4x1": "75 % in 4x1 blocks"}
VALUES = ("fp32", "fp16")
LIMITS = {"fp32": 1e-5, "fp16": 2e-3}  # difference to the dense graph, relative to its largest value
SPEED = {"90": (4.8, 5.0), "75": (2.6, 2.75), "63": (1.85, 2.0), "75-4x1": (3.1, 3.3)}  # ratios at batch 1 and 8
SIZE = {"90": 0.10, "75": 0.21, "63": 0.30}  # of the file with fp16 values
TEXT_SPEED, DECODER_SPEED, INT8_SPEED, DEEPSPARSE_SPEED, MEMORY = 3.5, 3.0, 1.5, 1.6, 0.24
DEEPSPARSE = "1.8.0"
ISAS = ("avx512", "avx2", "portable")  # from the fastest


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long.

    Attributes:
        model: alias.
        seconds: of timing per comparison.
        masks: keys of `MASKS`.
        batches: images per run.
        lengths: tokens of the text encoder.
        past: cached tokens of the decoder's step.
        beams: rows of the decoder's step.
        repeats: fresh processes whose peak memory is measured.
        shapes: [N, K] of single layers.
        tokens: rows of single layers.
        grid: sparsities of single layers.
        kernel_seconds: of timing per single layer.
        judged: whether the targets are for this model.
        sweeps: how often comparisons of at most `SHORT` samples are measured.
    """

    model: str = "blip-base-random"
    seconds: float = 20.0
    masks: tuple[str, ...] = tuple(MASKS)
    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (16, 24, 35)
    past: int = 16
    beams: tuple[int, ...] = (1, 3)
    repeats: int = 3
    shapes: tuple[tuple[int, int], ...] = ((768, 768), (768, 3072), (3072, 768))
    tokens: tuple[int, ...] = (1, 16, 197)
    grid: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    kernel_seconds: float = 1.0
    judged: bool = True
    sweeps: int = 5


FULL = Sizes()
QUICK = Sizes("blip-tiny", 0.2, ("90",), (1,), (16,), 16, (1,), 1, ((192, 192),), (1, 16), (0.3, 0.9), 0.05, False, 3)


# --- the graphs -------------------------------------------------------------------------------------------------------


class Files:
    """The graphs, each made when first asked for, and made again when the code that makes it has changed.

    Args:
        root: folder for them.
        model: alias.
        seed: of the masks; random weights have their own.
    """

    def __init__(self, root: Path, model: str, seed: int) -> None:
        self.root = root
        self.model_name = model
        self.seed = seed
        self.sources = code(*EXPORTING)
        self.packing = f"{code(*PACKING)}-{pack.THRESHOLDS[operators.isa()]}"
        for kind, digest in (("plain", self.sources), ("packed", self.packing)):
            for folder in root.glob(f"{model}-{kind}-*"):
                if folder.name != f"{model}-{kind}-{digest}":
                    shutil.rmtree(folder)

    @cached_property
    def _model(self) -> Any:
        from vlprune import load

        say(f"loading {self.model_name}")
        return load(self.model_name)

    def _plain_path(self, name: str) -> Path:
        return self.root / f"{self.model_name}-plain-{self.sources}" / name

    def _packed_path(self, name: str) -> Path:
        return self.root / f"{self.model_name}-packed-{self.packing}" / name

    def spec_path(self, graph: str) -> Path:
        """Write once what tells the inputs of a graph, and the names of the model's prunable weights."""
        path = self._plain_path(f"{graph}.json")
        if not path.exists():
            from vlprune import exporters
            from vlprune.exporters import onnx_files

            names = sorted(onnx_files._prunable_weights(self._model))
            spec = exporters.task_spec(self._model, GRAPHS[graph][0])
            write_json(path, {"spec": spec, "prunable": names})
        return path

    def spec(self, graph: str, length: int | None = None) -> dict[str, Any]:
        """Give the task.json, with another length of texts."""
        spec = read_json(self.spec_path(graph))["spec"]
        return spec if length is None else {**spec, "max_length": length}

    def plain(self, graph: str, opset: int = 18) -> Path:
        """Export a graph."""
        path = self._plain_path(f"{graph}.onnx" if opset == 18 else f"{graph}-opset{opset}.onnx")
        if not path.exists():
            from vlprune.exporters import blip, onnx_files

            task, name = GRAPHS[graph]
            prunable = set(read_json(self.spec_path(graph))["prunable"])
            module = blip.graphs(self._model, task)[name]
            say(f"exporting {path.name}")
            with atomic_path(path) as temporary:
                onnx_files._write(temporary.stem, module, temporary.parent, opset, prunable, {})
        return path

    def zeroed(self, graph: str, mask: str, opset: int = 18) -> Path:
        """Set the weights outside a mask to zero."""
        path = self.plain(graph, opset)
        path = path.with_name(f"{path.stem}-zeroed-{mask}.onnx")
        if not path.exists():
            model = onnx.load(self.plain(graph, opset))
            prunable = set(read_json(self.spec_path(graph))["prunable"])
            say(f"writing {path.name}")
            for tensor in model.graph.initializer:
                name = tensor.name.removesuffix(simplify.TRANSPOSED)
                if name in prunable:
                    weight = numpy_helper.to_array(tensor)
                    upright = weight.T if name != tensor.name else weight  # [N, K]
                    kept = random_mask(upright.shape, *MASKS[mask], self.seed + zlib.crc32(name.encode()))
                    upright = np.where(kept, upright, np.float32(0))
                    weight = upright.T if name != tensor.name else upright
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), tensor.name))
            _save(model, path)
        return path

    def fused(self, graph: str) -> Path:
        """Fuse the attention of the dense graph, and nothing else."""
        path = self._packed_path(f"{graph}-fused.onnx")
        if not path.exists():
            say(f"writing {path.name}")
            _save(pack.pack(onnx.load(self.plain(graph)), threshold=1.0)[0], path)
        return path

    def beside(self, graph: str) -> Path:
        """Write the dense graph with its weights beside it, as packed graphs are written."""
        path = self._plain_path(f"{graph}-beside.onnx")
        if not path.exists():
            say(f"writing {path.name}")
            with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
                model = onnx.load(self.plain(graph))
                onnx.save_model(
                    model, f"{scratch}/{path.name}", save_as_external_data=True, location=f"{path.name}.data"
                )
                for file in sorted(Path(scratch).iterdir(), reverse=True):
                    file.replace(path.with_name(file.name))
        return path

    def packed(self, graph: str, mask: str, values: str) -> Path:
        """Pack a zeroed graph as `vlprune export --pack sparse` does."""
        path = self._packed_path(f"{graph}-{mask}-{values}.onnx")
        if not path.exists():
            say(f"writing {path.name}")
            model, rows = pack.pack(onnx.load(self.zeroed(graph, mask)), values=values)
            write_json(path.with_suffix(".json"), rows)
            _save(model, path)
        return path

    def layers(self, graph: str, mask: str, values: str) -> list[dict[str, Any]]:
        """Tell what became of the Linears of a packed graph."""
        return list(read_json(self.packed(graph, mask, values).with_suffix(".json")))

    def int8(self, graph: str) -> Path:
        """Quantise the dense graph as ONNX Runtime does it: int8 weights per channel, activations as they come."""
        path = self._plain_path(f"{graph}-int8.onnx")
        if not path.exists():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            say(f"writing {path.name}")
            with atomic_path(path) as temporary:
                quantize_dynamic(
                    self.plain(graph),
                    temporary,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                )
        return path

    def static(self, graph: str, mask: str) -> Path:
        """Write the zeroed graph as DeepSparse takes it: opset 12, one image."""
        path = self._plain_path(f"{graph}-static-{mask}.onnx")
        if not path.exists():
            model = onnx.load(self.zeroed(graph, mask, opset=12))
            dims = {}
            for value in model.graph.input:
                value.type.tensor_type.shape.dim[0].dim_value = 1
                dims[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for node in list(model.graph.node):  # `simplify` asks for one size of an input, which opset 12 cannot
                if node.op_type == "Shape" and node.input[0] in dims and node.attribute:
                    given = {attribute.name: attribute.i for attribute in node.attribute}
                    size = np.array(dims[node.input[0]][given.get("start", 0) : given.get("end")], np.int64)
                    model.graph.initializer.append(numpy_helper.from_array(size, node.output[0]))
                    model.graph.node.remove(node)
            onnx.checker.check_model(model)
            _save(model, path)
        return path


def random_mask(shape: Sequence[int], share: float, rows: int, seed: int) -> np.ndarray:
    """Draw a mask, True = kept, with an exact number of zeros in blocks of `rows` x 1."""
    blocks = shape[0] // rows * shape[1]
    kept = np.ones(blocks, bool)
    kept[np.random.default_rng(seed).permutation(blocks)[: round(share * blocks)]] = False
    return np.repeat(kept.reshape(shape[0] // rows, shape[1]), rows, axis=0)


def _save(model: onnx.ModelProto, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
        pack.save(model, Path(scratch) / path.name)
        for file in sorted(Path(scratch).iterdir(), reverse=True):  # the weights before the graph
            file.replace(path.with_name(file.name))


def _size(path: Path) -> int:
    """Bytes of a graph and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def code(*modules: str) -> str:
    """Hash what modules do, without comments, docstrings and the thresholds that this script measures."""
    digest = hashlib.sha256()
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if "THRESHOLDS" not in ast.unparse(node).partition("=")[0].split()]
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:10]


# --- the measurements -------------------------------------------------------------------------------------------------


class Bench:
    """Measures what no earlier run has measured, and keeps it.

    Args:
        files: the graphs.
        sizes: what is measured.
        threads: of every session.
        rows: measured before, by name; it grows.
        keep: called after each new row.
    """

    def __init__(
        self, files: Files, sizes: Sizes, threads: int, rows: dict[str, dict[str, Any]], keep: Callable[[], None]
    ) -> None:
        self.files = files
        self.sizes = sizes
        self.threads = threads
        self.rows = rows
        self.keep = keep
        self.short: dict[str, Callable[[], dict[str, Any]]] = {}  # comparisons that are measured in every sweep

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a row unless it is there."""
        if name not in self.rows:
            self.rows[name] = measure()
            self.keep()
            say(f"{name}: {brief(self.rows[name])}")
        return self.rows[name]

    def versus(self, first: Path, second: Path, graph: str, batch: int, length: int | None, threads: int = 0) -> Any:
        """Time one file against another."""
        spec, seconds = self.files.spec(graph, length), self.sizes.seconds
        return timing.compare(
            first, second, spec=spec, batch=batch, threads=threads or self.threads, seconds=seconds, seed=1
        )

    def dense(self, part: str, graph: str, batch: int, length: int | None = None, threads: int = 0) -> tuple[str, Path]:
        """Find the faster dense graph, which all ratios refer to."""
        plain, fused = self.files.plain(graph), self.files.fused(graph)
        name = case(part, "fused", batch, length, threads)
        row = self.once(name, lambda: self.versus(plain, fused, graph, batch, length, threads))
        return ("fused", fused) if row["ratio"] > 1 else ("plain", plain)

    def speed(
        self,
        part: str,
        graph: str,
        mask: str,
        values: str,
        batch: int,
        length: int | None = None,
        threads: int = 0,
        target: float | None = None,
    ) -> None:
        """Time a packed graph against the faster dense one."""

        def measure() -> dict[str, Any]:
            kind, dense = self.dense(part, graph, batch, length, threads)
            row = self.versus(dense, self.files.packed(graph, mask, values), graph, batch, length, threads)
            return {**row, "against": kind}

        named = {"mask": mask, "values": values, "batch": batch, "length": length, "threads": threads or self.threads}
        name = case(part, f"{mask} {values}", batch, length, threads)
        self._judged(name, named, measure, "ratio", target)
        if batch <= SHORT:
            self.short[name] = measure

    def sweep(self) -> None:
        """Measure the short comparisons again, minutes later; the sweep with the median ratio counts."""
        for count in range(2, self.sizes.sweeps + 1):
            for name, measure in self.short.items():
                row = self.rows[name]
                sweeps = row.setdefault("sweeps", [dict(row)])
                if len(sweeps) < count:
                    sweeps.append(measure())
                    row.update(sorted(sweeps, key=lambda sweep: sweep["ratio"])[len(sweeps) // 2])
                    if row["target"] is not None:
                        row["reached"] = bool(row["ratio"] >= row["target"])
                    self.keep()
                    say(f"{name}, sweep {count}: {brief(sweeps[-1])}")

    def _judged(
        self,
        name: str,
        named: dict[str, Any],
        measure: Callable[[], dict[str, Any]],
        figure: str,
        target: float | None,
        at_most: bool = False,
    ) -> dict[str, Any]:
        """Measure a row and set one of its figures against a target."""
        row = self.once(name, lambda: {**named, **measure()})
        target = None if not self.sizes.judged else target
        row["target"] = target
        row["reached"] = None
        if target is not None and row.get(figure) is not None:
            row["reached"] = bool(row[figure] <= target if at_most else row[figure] >= target)
        return row

    def checked(self, part: str, graph: str, mask: str, values: str, length: int | None = None) -> None:
        """Compare results and size of a packed graph with those of the dense one that has the same zeros."""

        def measure() -> dict[str, Any]:
            dense, packed = self.files.zeroed(graph, mask), self.files.packed(graph, mask, values)
            opened = session(dense, threads=self.threads)
            feeds = timing.feeds_for(opened, self.files.spec(graph, length), batch=2, seed=2)
            wanted = opened.run(None, feeds)
            del opened
            got = session(packed, threads=self.threads).run(None, feeds)
            layers = self.files.layers(graph, mask, values)
            return {
                "difference": max(relative(a, b) for a, b in zip(wanted, got, strict=True)),
                "bytes": _size(packed),
                "dense_bytes": _size(dense),
                "size": _size(packed) / _size(dense),
                "layers": len(layers),
                "packed_layers": sum(layer["packed"] for layer in layers),
                "reasons": sorted({layer["reason"] for layer in layers if layer["reason"]}),
            }

        target = SIZE.get(mask) if graph == "image" and values == "fp16" else None
        row = self._judged(
            f"{part}/file {mask} {values}", {"mask": mask, "values": values}, measure, "size", target, at_most=True
        )
        row["difference_limit"] = LIMITS[values]
        row["equal"] = row["difference"] <= LIMITS[values]

    # --- the parts ---

    def image(self) -> None:
        """Image encoder: every mask, both kinds of values."""
        for mask in self.sizes.masks:
            for values in VALUES:
                self.checked("image", "image", mask, values)
                for batch in self.sizes.batches:
                    target = dict(zip((1, 8), SPEED[mask], strict=True)).get(batch) if values == "fp32" else None
                    self.speed("image", "image", mask, values, batch, target=target)

    def text(self) -> None:
        """Text encoder: one short text."""
        for values in VALUES:
            self.checked("text", "text", "90", values, self.sizes.lengths[0])
            for length in self.sizes.lengths:
                target = TEXT_SPEED if values == "fp32" else None
                self.speed("text", "text", "90", values, 1, length, target=target)

    def decoder(self) -> None:
        """Decoder: one new token per row after cached ones."""
        for values in VALUES:
            self.checked("decoder", "decoder", "90", values, self.sizes.past)
            for beams in self.sizes.beams:
                target = DECODER_SPEED if values == "fp32" and beams == 1 else None
                self.speed("decoder", "decoder", "90", values, beams, self.sizes.past, target=target)

    def int8(self) -> None:
        """Image encoder: dynamic int8 against packed, and against dense."""
        for batch in self.sizes.batches:

            def against_dense(batch: int = batch) -> dict[str, Any]:
                kind, dense = self.dense("image", "image", batch)
                return {**self.versus(dense, self.files.int8("image"), "image", batch, None), "against": kind}

            def against_packed(values: str, batch: int = batch) -> dict[str, Any]:
                packed = self.files.packed("image", "90", values)
                return {**self.versus(self.files.int8("image"), packed, "image", batch, None), "against": "int8"}

            self.once(case("int8", "dense", batch), against_dense)
            for values in VALUES:
                target = INT8_SPEED if values == "fp32" else None
                named = {"mask": "90", "values": values, "batch": batch}
                measure = partial(against_packed, values)
                self._judged(case("int8", f"90 {values}", batch), named, measure, "ratio", target)

    def deepsparse(self) -> None:
        """Image encoder, one image: DeepSparse against packed."""
        names = {values: case("deepsparse", f"90 {values}", 1) for values in VALUES}
        missing = [values for values in VALUES if names[values] not in self.rows]
        found = self._deepsparse(missing) if missing else {}
        for values in VALUES:
            named = {"mask": "90", "values": values, "batch": 1}
            measured = found.get(values, {})
            target = DEEPSPARSE_SPEED if values == "fp32" else None
            self._judged(names[values], named, lambda measured=measured: measured, "ratio", target)

    def _deepsparse(self, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Time packed graphs with some kinds of values against one engine: it takes long to compile the graph."""
        python, reason = deepsparse_python(self.files.root / "deepsparse")
        if python is None:
            return {values: {"reason": reason, "ratio": None} for values in kinds}
        graph = self.files.static("image", "90")
        opened = {values: session(self.files.packed("image", "90", values), threads=self.threads) for values in kinds}
        feeds = timing.feeds_for(opened[kinds[0]], self.files.spec("image"), batch=1, seed=1)
        found = {}
        with tempfile.TemporaryDirectory() as scratch, stored(feeds, scratch) as inputs:
            command = [str(python), str(WORKER), "deepsparse", str(graph), inputs, str(self.threads)]
            say("DeepSparse compiles the graph")
            with asked(command) as (process, ask):
                about = ask()
                if about is None:
                    return {values: {"reason": "its engine refuses the graph", "ratio": None} for values in kinds}
                with np.load(Path(scratch) / "deepsparse_outputs.npz") as answers:
                    theirs = [answers[f"output_{index}"] for index in range(len(answers))]
                pings = []
                for _ in range(50):
                    start = time.perf_counter()
                    ask("ping")
                    pings.append(time.perf_counter() - start)
                for values, packed in opened.items():
                    ours = packed.run(None, feeds)
                    sides = (lambda: ask("run"), bound(packed, feeds))
                    row = timing.measure(
                        lambda sides=sides: sides,
                        seconds=self.sizes.seconds,
                        watch=lambda: watch(process.pid),
                    )
                    found[values] = {
                        **row,
                        "against": f"DeepSparse {about['version']}, {about['isa']}",
                        "request_ms": 1e3 * float(np.median(pings)),
                        "difference": max(relative(a, b) for a, b in zip(theirs, ours, strict=True)),
                    }
        return found

    def memory(self) -> None:
        """Peak resident memory of a fresh process that opens a session and runs one image."""
        kinds: dict[str, Callable[[], Path | None]] = {
            "imports": lambda: None,
            "dense": lambda: self.files.plain("image"),
            "fused": lambda: self.files.fused("image"),
            "beside": lambda: self.files.beside("image"),
            **{f"90 {values}": lambda v=values: self.files.packed("image", "90", v) for values in VALUES},
        }
        for kind, path in kinds.items():
            self.once(f"memory/{kind}", lambda path=path: self._peak(path()))
        base = self.rows["memory/imports"]["peak_bytes"]
        dense = min(self.rows[f"memory/{kind}"]["peak_bytes"] for kind in ("dense", "fused", "beside"))
        for values in VALUES:
            row = self.rows[f"memory/90 {values}"]
            row["of_process"] = row["peak_bytes"] / dense
            row["of_session"] = (row["peak_bytes"] - base) / (dense - base)
            row["target"] = MEMORY if values == "fp16" and self.sizes.judged else None

    def _peak(self, path: Path | None) -> dict[str, Any]:
        opened = session(self.files.plain("image"), threads=self.threads)
        feeds = timing.feeds_for(opened, self.files.spec("image"), batch=1, seed=1)
        del opened
        peaks = []
        with tempfile.TemporaryDirectory() as scratch, stored(feeds, scratch) as inputs:
            command = [sys.executable, str(WORKER), "memory", str(path or "-"), inputs, str(self.threads)]
            if path is not None and pack.is_packed(onnx.load(path, load_external_data=False)):
                command.append(str(operators.library()))
            for _ in range(self.sizes.repeats):
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                peaks.append(json.loads(output)["peak_bytes"])
        return {"peak_bytes": int(np.median(peaks)), "peaks": peaks}

    def scaling(self) -> None:
        """Image encoder with other numbers of threads."""
        for threads in (1, 2, 4):
            if threads <= len(os.sched_getaffinity(0)):
                for batch in self.sizes.batches:
                    self.speed("threads", "image", "90", "fp32", batch, threads=threads)

    def kernel(self) -> None:
        """Single layers per instruction set."""
        best = ISAS.index(operators.isa())
        for isa in ISAS[best:]:
            cells = [
                {"isa": isa, "shape": list(shape), "tokens": tokens, "sparsity": sparsity}
                for shape in self.sizes.shapes
                for tokens in self.sizes.tokens
                for sparsity in self.sizes.grid
            ]
            missing = [cell for cell in cells if kernel_name(cell) not in self.rows]
            if not missing:
                continue
            task = {"cells": missing, "threads": self.threads, "seconds": self.sizes.kernel_seconds}
            command = [sys.executable, __file__, "--kernel-worker"]
            with asked(command, {**os.environ, "VLPRUNE_ISA": isa}) as (_, ask):
                answer = ask(json.dumps(task))
                for cell in missing:
                    if answer is None:
                        raise SystemExit(f"the process that measures {isa} has ended")
                    self.once(kernel_name(cell), lambda cell=cell, answer=answer: {**cell, **answer})
                    answer = ask()


def kernel_worker() -> None:
    """Time the layers that a line of input names, in a process whose instruction set is forced."""
    task = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as scratch:
        for cell in task["cells"]:
            if operators.isa() != cell["isa"]:
                raise SystemExit(f"the operators use {operators.isa()}, not {cell['isa']}")
            plain = one_layer(*cell["shape"], cell["sparsity"])
            packed, _ = pack.pack(plain, target=cell["isa"], threshold=0.0)
            x = np.random.default_rng(1).standard_normal((cell["tokens"], cell["shape"][1]), np.float32)
            runs = []
            for name, model in (("dense", plain), ("packed", packed)):
                path = Path(scratch) / f"{name}.onnx"
                onnx.save_model(model, path)
                runs.append(bound(session(path, threads=task["threads"]), {"x": x}))
            row = timing.measure(lambda runs=tuple(runs): runs, seconds=task["seconds"])
            figures = {key: row[key] for key in ("ratio", "ratio_ci95", "rounds", "dropped")}
            figures |= {key: row[key]["p50_ms"] for key in ("dense", "compressed")}
            print(json.dumps(figures | ({"note": row["note"]} if "note" in row else {})), flush=True)


def one_layer(outputs: int, inputs: int, sparsity: float) -> onnx.ModelProto:
    """Make the graph of one Linear with bias."""
    random = np.random.default_rng(0)
    weight = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    weight *= random_mask(weight.shape, sparsity, 1, 0)
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(weight.T), "layer.weight" + simplify.TRANSPOSED),
        numpy_helper.from_array(random.normal(0, 0.02, outputs).astype(np.float32), "layer.bias"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", tensors[0].name], ["product"], "product"),
        helper.make_node("Add", ["product", "layer.bias"], ["y"], "sum"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", inputs), ("y", outputs))
    )
    graph = helper.make_graph(nodes, "layer", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def crossover(cells: Iterable[dict[str, Any]]) -> float | None:
    """Find the share of zeros from which packed is faster, between the measured ones; None = it never is."""
    points = sorted((cell["sparsity"], np.log(cell["ratio"])) for cell in cells)
    found = None
    for (left, low), (right, high) in zip([(0.0, -np.inf), *points], points, strict=False):
        if low <= 0 < high:
            found = right if not np.isfinite(low) else left + (right - left) * -low / (high - low)
    return None if found is None else float(found)


# --- other processes --------------------------------------------------------------------------------------------------


def deepsparse_python(folder: Path) -> tuple[Path | None, str]:
    """Find the Python that has DeepSparse, or make one; with the reason where that fails."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        names = [f"python3.{minor}" for minor in (11, 10, 9, 8)]  # the ones it supports
        base = sys.executable if sys.version_info[:2] == (3, 11) else next(filter(None, map(shutil.which, names)), None)
        if base is None:
            return None, f"DeepSparse {DEEPSPARSE} needs Python 3.8 to 3.11, which is not here"
        folder.mkdir(parents=True, exist_ok=True)
        say(f"installing DeepSparse {DEEPSPARSE}")
        for command in (
            [base, "-m", "venv", str(folder / "venv")],
            [str(python), "-m", "pip", "install", "--quiet", f"deepsparse=={DEEPSPARSE}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(folder / "venv", ignore_errors=True)
                return None, f"cannot be installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
    found = subprocess.run([str(python), "-c", "import deepsparse"], capture_output=True, text=True)
    if found.returncode:
        return None, f"cannot be imported: {(found.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return python, ""


Ask = Callable[..., dict[str, Any] | None]


@contextmanager
def asked(command: list[str], variables: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], Ask]]:
    """Start a process that answers lines with JSON; the function yielded asks it (None = only waits for a line)."""
    variables = variables or {**os.environ, "NM_DISABLE_ANALYTICS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def ask(line: str | None = None) -> dict[str, Any] | None:
        if line is not None:
            requests.write(line + "\n")
            requests.flush()
        answer = answers.readline()
        return json.loads(answer) if answer else None

    try:
        yield process, ask
    finally:
        requests.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch(other: int) -> Callable[[], float]:
    """Watch for third processes that take cores from this one and from another one; see `timing.watch_cpus`."""

    def look() -> tuple[float, float, float, float]:
        waited = busy = 0.0
        for process in (os.getpid(), other):
            for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
                waited += int(path.read_text().split()[1]) / 1e9
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            busy += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        cores = timing._cores() or (0.0, 0.0)
        return time.perf_counter(), waited, cores[0] - busy, cores[1]

    before = look()

    def share() -> float:
        passed, waited, others, stolen = (b - a for a, b in zip(before, look(), strict=True))
        return (min(waited, max(others, 0.0)) + stolen) / max(passed, 1e-9)

    return share


@contextmanager
def stored(feeds: dict[str, np.ndarray], folder: str) -> Iterator[str]:
    """Store inputs where another process can read them."""
    path = Path(folder) / "inputs.npz"
    np.savez(path, **feeds)
    yield str(path)


def bound(opened: Any, feeds: dict[str, np.ndarray]) -> Callable[[], None]:
    """Make a function that runs a session on the same inputs without copying them."""
    binding = opened.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for output in opened.get_outputs():
        binding.bind_output(output.name)
    return lambda: opened.run_with_iobinding(binding)


def relative(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference between two arrays, relative to the largest value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


# --- the document -----------------------------------------------------------------------------------------------------


def case(part: str, what: str, batch: int, length: int | None = None, threads: int = 0) -> str:
    """Name a row."""
    more = [f"length {length}"] if length else []
    more += [f"threads {threads}"] if threads else []
    return " ".join([f"{part}/{what} batch {batch}", *more])


def kernel_name(cell: dict[str, Any]) -> str:
    """Name the row of a single layer."""
    return "kernel/{isa} {shape[0]}x{shape[1]} tokens {tokens} sparsity {sparsity}".format(**cell)


def say(line: str) -> None:
    """Tell how far the work is."""
    print(line, file=sys.stderr, flush=True)


def brief(row: dict[str, Any]) -> str:
    """Tell the figure of a row in a few words."""
    for key, form in (("ratio", "{:.2f} x"), ("difference", "difference {:.1e}"), ("peak_bytes", "{:,} bytes")):
        if row.get(key) is not None:
            return form.format(row[key]) + (f" ({row['note']})" if "note" in row else "")
    return str(row.get("reason", ""))


def table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Build a Markdown table: the first column is text, the others figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *body])


def verdict(row: dict[str, Any], sign: str = ">=", form: str = "{:.2f}") -> tuple[str, str]:
    """Print the target of a row, and whether it was reached."""
    if row.get("target") is None:
        return "", ""
    reached = {True: "reached", False: "**missed**", None: "not measured"}[row["reached"]]
    return f"{sign} {form.format(row['target'])}", reached


def ratio(row: dict[str, Any]) -> str:
    """Print a ratio with its interval."""
    if row.get("ratio") is None:
        return "–"
    return "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["ratio_ci95"])


TIMED = ["against", "its ms", "packed ms", "ratio [95 %]", "target", "", "rounds (dropped)", "all sweeps"]


def timed(row: dict[str, Any]) -> list[str]:
    """Print what every timed row has."""
    if row.get("ratio") is None:
        return ["", "", "", row.get("reason", "–"), *verdict(row), "", ""]
    return [
        row.get("against", ""),
        f"{row['dense']['p50_ms']:.2f}",
        f"{row['compressed']['p50_ms']:.2f}",
        ratio(row),
        *verdict(row),
        f"{row['rounds']} ({row['dropped']})" + (" disturbed" if "note" in row else ""),
        ", ".join(f"{sweep['ratio']:.2f}" for sweep in row.get("sweeps", [])),
    ]


Rows = dict[str, dict[str, Any]]


def speed_table(rows: Rows, part: str, first: str, label: Callable[[dict[str, Any]], str]) -> str:
    """Write one line per timed packed graph of a part."""
    body = [
        [label(row), row["values"], *timed(row)]
        for name, row in rows.items()
        if name.startswith(f"{part}/") and "values" in row and "/file " not in name
    ]
    return table([first, "values", *TIMED], body) if body else ""


def file_table(rows: Rows, part: str) -> str:
    """Write one line per packed file of a part."""
    body = []
    for name, row in rows.items():
        if name.startswith(f"{part}/file "):
            equal = "equal" if row["equal"] else "**differs**"
            body.append(
                [
                    TITLES[row["mask"]],
                    row["values"],
                    f"{row['packed_layers']} of {row['layers']}",
                    f"{row['difference']:.1e}",
                    f"<= {row['difference_limit']:.0e}",
                    equal,
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['dense_bytes'] / 1e6:.1f}",
                    f"{row['size']:.3f}",
                    *verdict(row, "<="),
                ]
            )
    columns = ["zeros", "values", "layers packed", "difference", "limit", "", "MB", "dense MB", "size", "target", ""]
    return table(columns, body) if body else ""


def fused_note(rows: Rows, part: str) -> str:
    """Tell what the fused attention alone brings."""
    found = {name.partition("/fused ")[2]: row for name, row in rows.items() if name.startswith(f"{part}/fused ")}
    if not found:
        return ""
    return "Fused attention alone, dense: " + "; ".join(f"{name}: {ratio(row)}" for name, row in found.items()) + "."


def image_text(rows: Rows) -> list[str]:
    """Write the part about the image encoder."""
    body = speed_table(rows, "image", "zeros", lambda row: f"{TITLES[row['mask']]}, batch {row['batch']}")
    return ["## Image encoder", body, fused_note(rows, "image"), file_table(rows, "image")]


def text_text(rows: Rows) -> list[str]:
    """Write the part about the text encoder."""
    body = speed_table(rows, "text", "tokens", lambda row: str(row["length"]))
    return ["## Text encoder, 90 %, batch 1", body, fused_note(rows, "text"), file_table(rows, "text")]


def decoder_text(rows: Rows) -> list[str]:
    """Write the part about the decoder."""
    body = speed_table(rows, "decoder", "rows (beams)", lambda row: str(row["batch"]))
    past = next((row["length"] for name, row in rows.items() if name.startswith("decoder/") and "length" in row), 0)
    about = f"One new token per row after {past} cached ones."
    return [
        "## Decoder step, 90 %",
        about,
        body,
        fused_note(rows, "decoder"),
        file_table(rows, "decoder"),
    ]


def int8_text(rows: Rows) -> list[str]:
    """Write the part about dynamic int8."""
    about = (
        'The dense graph quantised by `onnxruntime.quantization.quantize_dynamic(op_types_to_quantize=["MatMul"], '
        "per_channel=True, weight_type=QInt8)`."
    )
    body = speed_table(rows, "int8", "batch", lambda row: str(row["batch"]))
    against = [
        f"batch {name.rpartition(' ')[2]}: {ratio(row)}" for name, row in rows.items() if name.startswith("int8/dense ")
    ]
    note = f"Int8 itself against the dense graph: {'; '.join(against)}." if against else ""
    return ["## Dynamic int8 against packed, 90 %", about, body, note]


def deepsparse_text(rows: Rows) -> list[str]:
    """Write the part about DeepSparse."""
    about = (
        f"DeepSparse {DEEPSPARSE} in a process of its own, on the same zeros (opset 12, one image), both opened "
        "once, timed around a request through a pipe."
    )
    more = [
        f"A request alone takes {row['request_ms']:.2f} ms; largest difference between the two engines "
        f"({row['values']}) {row['difference']:.1e}."
        for name, row in rows.items()
        if name.startswith("deepsparse/") and "request_ms" in row
    ]
    body = speed_table(rows, "deepsparse", "batch", lambda row: str(row["batch"]))
    return ["## DeepSparse against packed, 90 %", about, body, *more]


def memory_text(rows: Rows) -> list[str]:
    """Write the part about memory."""
    names = {"imports": "imports alone", "dense": "dense", "fused": "dense, attention fused"}
    names |= {"beside": "dense, weights beside the graph"}
    names |= {f"90 {values}": f"packed, 90 %, {values} values" for values in VALUES}
    body = []
    for kind, title in names.items():
        if row := rows.get(f"memory/{kind}"):
            shares = []
            for key in ("of_process", "of_session"):
                judged = {**row, "reached": row[key] <= MEMORY} if row.get("target") else {}
                shares += [f"{row[key]:.3f}" if key in row else "", verdict(judged)[1]]
            target = f"<= {row['target']:.2f}" if row.get("target") else ""
            body.append([title, f"{row['peak_bytes'] / 1e6:.0f}", target, *shares])
    about = (
        "Most resident memory (VmHWM) that a fresh process with onnxruntime and numpy ever held until its first run of "
        "one image had ended; median of several. The session's share leaves out, on both sides, what the imports alone "
        "take; the target is for both. Shares are of the leanest dense process. Pages of a mapped file count, though "
        "processes that map the same file share them."
    )
    columns = ["image encoder", "peak MB", "target", "of the dense process", "", "of the dense session", ""]
    return ["## Memory", about, table(columns, body)]


def threads_text(rows: Rows) -> list[str]:
    """Write the part about numbers of threads."""
    body = speed_table(rows, "threads", "", lambda row: f"{row['threads']} threads, batch {row['batch']}")
    return ["## Threads, image encoder, 90 %", body]


def kernel_text(rows: Rows) -> list[str]:
    """Write the part about single layers."""
    cells = [row for name, row in rows.items() if name.startswith("kernel/")]
    grid = sorted({cell["sparsity"] for cell in cells})
    isas = [isa for isa in ISAS if any(cell["isa"] == isa for cell in cells)]
    about = (
        "Single Linears with bias, fp32 values: ratio of the dense MatMul to SparseLinear per share of zeros, and the "
        "share from which packed is faster (between measured ones; the lowest measured one where it always is). The "
        "dense side uses the best instruction set of this processor in every row, as ONNX Runtime has no switch for "
        "it: on a processor whose best is AVX2 the dense side is slower, and packing pays from a lower share than "
        "shown for avx2 and portable."
    )
    parts = ["## Thresholds per instruction set", about]
    for isa in isas:
        body, found = [], []
        for shape, tokens in dict.fromkeys((tuple(c["shape"]), c["tokens"]) for c in cells if c["isa"] == isa):
            mine = [c for c in cells if (c["isa"], tuple(c["shape"]), c["tokens"]) == (isa, shape, tokens)]
            ratios = {cell["sparsity"]: f"{cell['ratio']:.2f}" for cell in mine}
            point = crossover(mine)
            found.append(1.0 if point is None else point)
            line = [f"{shape[0]} x {shape[1]}, {tokens}", *(ratios.get(share, "") for share in grid)]
            body.append([*line, "never" if point is None else f"{point:.0%}"])
        columns = ["N x K, tokens", *(f"{share:.0%}" for share in grid), "pays from"]
        summary = f"Median {np.median(found):.0%}, highest {max(found):.0%}; packing uses {pack.THRESHOLDS[isa]:.0%}."
        parts += [f"### {isa}", table(columns, body), summary]
    return parts


TEXTS: dict[str, Callable[[Rows], list[str]]] = {
    "image": image_text,
    "text": text_text,
    "decoder": decoder_text,
    "int8": int8_text,
    "deepsparse": deepsparse_text,
    "memory": memory_text,
    "threads": threads_text,
    "kernel": kernel_text,
}


def document(figures: dict[str, Any]) -> str:
    """Write all tables."""
    settings, machine, rows = figures["settings"], figures["environment"], figures["rows"]
    head = [
        "# Sparse Linear layers on the CPU",
        f"Made by `{figures['command']}` on {machine['cpu']}, {settings['threads']} threads, kernels for "
        f"{figures['made_of']['isa']}, onnxruntime {machine['onnxruntime']}, Python {machine['python']}.",
        f"Model {settings['model']}; every prunable Linear zeroed by a random mask. Times are medians by the protocol "
        "of `vlprune/runtime/timing.py`; the dense graph compared with is the faster of the one exported and the one "
        "with fused attention, and is named. A neighbour of a virtual machine can make minutes unlike others: "
        "comparisons of few samples are measured in several sweeps, each after all others, and the one with the median "
        "ratio counts. Differences are to the dense graph with the same zeros, relative to its "
        "largest value; sizes are of files, 1 MB = 1,000,000 bytes.",
    ]
    parts = [text for part in PARTS if any(name.startswith(f"{part}/") for name in rows) for text in TEXTS[part](rows)]
    return "\n\n".join(text for text in [*head, *parts] if text) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Tell what the figures depend on: rows of other code are not kept."""
    library = ctypes.CDLL(str(operators.library()))
    library.vlprune_ops_version.restype = ctypes.c_char_p
    isa = operators.isa()
    return {
        "library": hashlib.sha256(operators.library().read_bytes()).hexdigest()[:10],
        "version": library.vlprune_ops_version().decode(),
        "isa": isa,
        "packing": code(*PACKING),
        "packs_all": pack.THRESHOLDS[isa] <= min(share for share, _ in MASKS.values()),
        "graphs": code(*EXPORTING),
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small configuration: does it run; writes no document")
    parser.add_argument("--only", default="", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, after each one")
    parser.add_argument("--resume", action="store_true", help="keep the figures in FILE that are there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of timing per comparison of two graphs")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "vlprune" / "sparse_cpu")
    parser.add_argument(
        "--results", type=Path, help="the document (default: docs/results/sparse_cpu.md, once every part is measured)"
    )
    parser.add_argument("--kernel-worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = parse()
    if args.kernel_worker:
        kernel_worker()
        return
    chosen = (
        args.only.split(",") if args.only else [part for part in PARTS if not (args.quick and part == "deepsparse")]
    )
    if unknown := set(chosen) - set(PARTS):
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    sizes = QUICK if args.quick else FULL
    seconds = args.seconds or sizes.seconds
    sizes = Sizes(**{**sizes.__dict__, "seconds": seconds})
    settings = {"model": sizes.model, "threads": args.threads, "seconds": seconds, "seed": args.seed}
    made_of = versions()
    rows: Rows = {}
    if args.json and args.json.exists():
        before = read_json(args.json)
        if (before.get("settings"), before.get("made_of")) == (settings, made_of):
            rows = {
                name: row for name, row in before["rows"].items() if args.resume or name.partition("/")[0] not in chosen
            }
        else:
            say(f"{args.json} is of other settings or other code: everything is measured again")
    given = {"quick": "" if args.quick else None, "threads": args.threads, "seconds": args.seconds, "seed": args.seed}
    usual = {"threads": 2, "seed": 0}
    words = [f"--{name} {value}".strip() for name, value in given.items() if value not in (None, usual.get(name))]
    command = " ".join(["python benchmarks/sparse_cpu.py", *words])
    figures = {
        "command": command,
        "settings": settings,
        "made_of": made_of,
        "environment": environment(args.threads),
        "rows": rows,
    }

    def keep() -> None:
        if args.json:
            write_json(args.json, figures)

    bench = Bench(Files(args.work, sizes.model, args.seed), sizes, args.threads, rows, keep)
    for part in PARTS:
        if part in chosen:
            (bench.scaling if part == "threads" else getattr(bench, part))()
    bench.sweep()
    keep()
    text = document(figures)
    print(text)
    results = args.results
    if results is None and not args.quick:
        if {name.partition("/")[0] for name in rows} >= set(PARTS):
            results = ROOT / "docs" / "results" / "sparse_cpu.md"
        else:
            say("some parts are not measured: the document stays as it is")
    if results:
        with atomic_path(results) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
