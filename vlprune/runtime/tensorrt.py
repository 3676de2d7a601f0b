"""What ONNX Runtime's TensorRT provider is told, and what its build log tells.

TensorRT builds an engine for each graph, which takes minutes: engines are kept in the user's cache. The provider finds
them by the names of nodes and not by the weights, so that each file has a folder of its own.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime

from ..errors import VlpruneError
from ..files import disk_errors, read_json, sha256, write_json


@dataclass(frozen=True)
class SparseLayers:
    """What TensorRT made of weights in the pattern 2:4.

    Attributes:
        eligible: layers whose weights have the pattern.
        chosen: layers that it runs on sparse tensor cores, because that was faster.
        names: of those chosen, where the log names them.
    """

    eligible: int
    chosen: int
    names: tuple[str, ...] = ()


@dataclass
class BuildLog:
    """A log that is being written.

    Attributes:
        found: what it told when the block was left; None where it tells nothing of sparse layers.
    """

    found: SparseLayers | None = field(default=None)


# TensorRT 8 and 9 list the layers; TensorRT 10 counts them, and lists them in detailed logs.
_LISTED = {
    "eligible": re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)"),
    "chosen": re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)"),
}
_COUNTED = {
    "eligible": re.compile(r"\(Sparsity\) Found (\d+) layer\(s\) eligible to use sparse tactics:?(.*)"),
    "chosen": re.compile(r"\(Sparsity\) Chose (\d+) layer\(s\) using sparse tactics:?(.*)"),
}


def sparse_layers(log: str) -> SparseLayers | None:
    """Read from a build log how many layers may run sparse, and how many do; several engines add up.

    Args:
        log: of TensorRT 8 to 10, whatever stands around its messages.

    Returns:
        SparseLayers | None: None where the log tells nothing of sparsity: it was not enabled, or no engine was built.
    """
    counts, names, seen = {"eligible": 0, "chosen": 0}, [], False
    for line in log.splitlines():
        for what in counts:
            if match := _LISTED[what].search(line):
                listed = _names(match[1])
                counts[what] += len(listed)
            elif match := _COUNTED[what].search(line):
                listed = _names(match[2])
                counts[what] += int(match[1])
            else:
                continue
            seen = True
            names += listed if what == "chosen" else []
    return SparseLayers(counts["eligible"], counts["chosen"], tuple(names)) if seen else None


def _names(text: str) -> list[str]:
    """Split a list of layers; commas inside brackets are part of a name, and what closes the message is not."""
    text = re.sub(r"\s+\w*\]\s*$", "", text)  # onnxruntime writes "[time   INFO] message" or "[time message INFO]"
    names, depth, name = [], 0, ""
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            names.append(name.strip())
            name = ""
        else:
            name += letter
    return [name for name in [*names, name.strip()] if name]


def options(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
    """Choose the options of the provider for a file.

    Args:
        path: the ONNX file.
        shapes: of its inputs; the engine is built for them, before the first run.

    Returns:
        dict[str, str]: by onnxruntime's names.
    """
    folder = str(engine_folder(path))
    chosen = {
        "trt_fp16_enable": "1" if holds_half(path) else "0",  # else TensorRT would choose for fp32 graphs, too
        "trt_sparsity_enable": "1",  # a permission: it takes the faster of sparse and dense
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(Path(folder).parent),
        "trt_detailed_build_log": "1",
    }
    if shapes:
        text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
        chosen |= {f"trt_profile_{which}_shapes": text for which in ("min", "opt", "max")}
    return chosen


def engine_folder(path: Path) -> Path:
    """Make the folder of a graph's engines, named by what is in the file and its external data.

    Args:
        path: the ONNX file.

    Returns:
        Path: inside `$XDG_CACHE_HOME/vlprune`, or `~/.cache/vlprune`.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlprune" / "tensorrt"
    hashes = [sha256(file)[:16] for file in sorted(path.parent.glob(f"{path.name}*")) if file.is_file()]
    folder = cache / "-".join(hashes)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def remember(engines: Path, shapes: Mapping[str, Sequence[int]], found: SparseLayers | None) -> SparseLayers | None:
    """Keep what a build log told beside the engine: an engine from the cache has no log.

    Args:
        engines: folder of a graph's engines.
        shapes: of its inputs.
        found: what the log told; None = no engine was built now.

    Returns:
        SparseLayers | None: this, or what was kept when the engine was built.
    """
    file = engines / f"sparse-{'-'.join('x'.join(map(str, shape)) for shape in shapes.values())}.json"
    if found is not None:
        write_json(file, {"eligible": found.eligible, "chosen": found.chosen, "names": list(found.names)})
    elif file.is_file():
        with suppress(VlpruneError, KeyError, TypeError, ValueError):  # a broken file tells nothing
            kept = read_json(file)
            found = SparseLayers(int(kept["eligible"]), int(kept["chosen"]), tuple(map(str, kept["names"])))
    return found


def holds_half(path: Path) -> bool:
    """Tell whether a graph computes in fp16.

    Args:
        path: the ONNX file.

    Returns:
        bool: one of its weights is of that type.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


@contextmanager
def build_log(wanted: bool = True) -> Iterator[BuildLog]:
    """Read what TensorRT logs inside the block, which it writes to the process's stderr.

    Args:
        wanted: False does nothing.

    Yields:
        BuildLog: filled when the block is left.
    """
    log = BuildLog()
    if not wanted:
        yield log
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        onnxruntime.set_default_logger_severity(2)  # TensorRT's messages come as warnings
        try:
            yield log
        finally:
            onnxruntime.set_default_logger_severity(4)
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            log.found = sparse_layers(file.read().decode("utf-8", "replace"))
