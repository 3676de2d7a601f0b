"""manifest.json of a bundle: what is in it, what that becomes once opened, and where it comes from.

It stands first in the archive, so that every size is known, and found bearable, before anything is read or allocated.
Its text is what a signature signs; the members are bound to it by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypedDict, TypeGuard

import numpy as np

from ..errors import RequestError
from ..names import PRECISIONS, TASKS
from . import limits
from .tensors import CODINGS, DTYPES, TensorEntry, aligned, stored_values


FORMAT, SCHEMA_VERSION = "vlprune-bundle", 1
MAX_TOLERANCE = 0.01
_HASH = re.compile(r"[0-9a-f]{64}")
_BEYOND = 1e300  # no score is as large; an integer may be, and then is no float


class FileEntry(TypedDict):
    """A member: its size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


class Weights(TypedDict):
    """weights.bin, which lies beside the graphs once a bundle is opened.

    Attributes:
        bytes: its size.
        tensors: in their order in the file; no two are equal.
    """

    bytes: int
    tensors: list[TensorEntry]


class Manifest(TypedDict):
    """manifest.json.

    Attributes:
        format: "vlprune-bundle".
        schema_version: 1.
        signed: the second member is a signature of this text.
        task: a name of `vlprune.names.TASKS`.
        family: for example "blip".
        variant: for example "multiflow-0.9-finetuned".
        precision: of the computation, see `vlprune.names.PRECISIONS`.
        packed: graphs need the operator library.
        values: how packed weights are stored, "fp32" or "fp16"; None = they are not packed.
        embeddings: "fp16" if the bundle rounds tables that the graphs have in fp32.
        model: `name`, `checkpoint`, `parameters` and `random_weights` of the model that was compressed.
        dense_bytes: the weights of the same graphs before pruning, in fp32, those that graphs share counted once.
        vlprune: version that wrote the bundle.
        versions: package -> version, of the run.
        recipe_sha256: of the run's recipe.yaml.
        metrics: rows of report.json (`vlprune.report.schema.Metrics`), of this variant and of the dense ones.
        example: where the stored input comes from.
        tolerance: largest difference from the stored output, relative to the largest value where that is above 1.
        differences: the same measure between the bundle and the run's plain fp32 graphs, per output, when it was made.
        files: name of a member -> entry; all but the manifest and its signature.
        weights: what the members in weights/ become.
    """

    format: str
    schema_version: int
    signed: bool
    task: str
    family: str
    variant: str
    precision: str
    packed: bool
    values: str | None
    embeddings: str
    model: dict[str, Any]
    dense_bytes: int
    vlprune: str
    versions: dict[str, str]
    recipe_sha256: str | None
    metrics: list[dict[str, Any]]
    example: str
    tolerance: float
    differences: dict[str, float]
    files: dict[str, FileEntry]
    weights: Weights


class _BrokenError(Exception):
    """What is wrong with a manifest."""


def write_text(manifest: Manifest) -> bytes:
    """Write the one text of a manifest.

    Args:
        manifest: what to write.

    Returns:
        bytes: JSON.
    """
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def identity(text: bytes) -> str:
    """Name a bundle by what it says of itself.

    Args:
        text: of its manifest.

    Returns:
        str: SHA-256 in hexadecimal.
    """
    return hashlib.sha256(text).hexdigest()


def parse(text: bytes, archive_bytes: int) -> Manifest:
    """Read a manifest and believe nothing: types, names, sizes, and what must add up.

    Args:
        text: of the member.
        archive_bytes: size of the file; what it becomes is bounded by it.

    Returns:
        Manifest: checked.

    Raises:
        RequestError: what is wrong, one line.
    """
    try:
        return _checked(parse_json(text, limits.MANIFEST), archive_bytes)
    except _BrokenError as error:
        raise RequestError(
            f"manifest.json of the bundle is refused: {error}; get it again, or make it again"
        ) from error


def parse_json(text: bytes, name: str) -> Any:
    """Read JSON from a bundle; NaN and infinity, which JSON does not have, are refused.

    Args:
        text: in UTF-8.
        name: of the member, for the message.

    Returns:
        Any: its content.

    Raises:
        RequestError: it is no JSON, or nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        return json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as error:
        raise RequestError(f"{name} of the bundle is nested too deeply: get the bundle again") from error
    except ValueError as error:  # not UTF-8, too
        why = " ".join(str(error).split())[:200]
        raise RequestError(f"{name} of the bundle is not valid JSON ({why}): get the bundle again") from error


def _checked(value: Any, archive_bytes: int) -> Manifest:
    manifest = _object(value, "the manifest")
    if manifest.get("format") != FORMAT:
        raise _BrokenError(f"it is of the format {_short(manifest.get('format'))}, not {FORMAT}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        version = _short(manifest.get("schema_version"))
        raise _BrokenError(f"it is of schema version {version}, this vlprune reads {SCHEMA_VERSION}")
    _texts(manifest, ("task", "family", "variant", "precision", "embeddings", "vlprune", "example"))
    _among(manifest, "task", TASKS)
    _among(manifest, "precision", PRECISIONS)
    _among(manifest, "embeddings", ("fp32", "fp16"))
    _among(manifest, "values", ("fp32", "fp16", None))
    for key in ("signed", "packed"):
        if not isinstance(manifest.get(key), bool):
            raise _BrokenError(f"{key} = {_short(manifest.get(key))} is neither true nor false")
    recipe = manifest.get("recipe_sha256")
    if recipe is not None and not _is_hash(recipe):
        raise _BrokenError(f"recipe_sha256 = {_short(recipe)} is no SHA-256")
    for key in ("model", "versions", "differences"):
        _finite(_object(manifest.get(key), key), key)
    metrics = manifest.get("metrics")
    if not isinstance(metrics, list):
        raise _BrokenError("metrics is no list")
    for row in metrics:
        _finite(_object(row, "a row of metrics"), "metrics")
        values = row.get("values")
        if not isinstance(values, dict) or not all(map(_is_number, values.values())):
            raise _BrokenError(f"a row of metrics has the values {_short(values)}")
    tolerance = manifest.get("tolerance")
    if not _is_number(tolerance) or not 0 < tolerance <= MAX_TOLERANCE:
        raise _BrokenError(f"tolerance = {_short(tolerance)} is not above 0 and at most {MAX_TOLERANCE}")
    _size(manifest.get("dense_bytes"), "dense_bytes", 2**50)
    _check_files(_object(manifest.get("files"), "files"), archive_bytes)
    _check_weights(_object(manifest.get("weights"), "weights"), manifest["files"], archive_bytes)
    return manifest  # type: ignore[return-value]  # it has just been checked


def _check_files(files: Mapping[str, Any], archive_bytes: int) -> None:
    total = 0
    for name, entry in files.items():
        most = limits.largest(name)
        if most is None:
            raise _BrokenError(f"it names the file {_short(name)}, which no bundle has")
        size = _size(_object(entry, f"the entry of {name}").get("bytes"), f"the size of {name}", most)
        if not _is_hash(entry.get("sha256")):
            raise _BrokenError(f"the hash of {name} is no SHA-256")
        total += size
    for name in limits.REQUIRED:
        if name not in files:
            raise _BrokenError(f"it lacks {name}")
    if not any(name.startswith("graphs/") for name in files):
        raise _BrokenError("it has no graph")
    _bearable(total, "its members", archive_bytes, limits.MAX_RATIO)


def _check_weights(weights: Mapping[str, Any], files: Mapping[str, Any], archive_bytes: int) -> None:
    size = _size(weights.get("bytes"), "the size of the weights", limits.MAX_BYTES)
    _bearable(size, "its weights", archive_bytes, limits.MAX_REBUILT)
    tensors = weights.get("tensors")
    if not isinstance(tensors, list):
        raise _BrokenError("the weights list no tensors")
    end, named = 0, set()
    for tensor in tensors:
        entry = _object(tensor, "a tensor")
        if not _is_hash(entry.get("sha256")):
            raise _BrokenError("the hash of a tensor is no SHA-256")
        name = f"weights/{entry['sha256']}"
        if name not in files or name in named:
            raise _BrokenError(f"{name} is named twice, or is no file of it")
        named.add(name)
        what = f"tensor {entry['sha256'][:12]}"
        for key, known in (("dtype", DTYPES), ("stored", DTYPES), ("coding", CODINGS)):
            if entry.get(key) not in known:
                raise _BrokenError(f"{what} has {key} = {_short(entry.get(key))}")
        if not isinstance(entry.get("masked"), bool):
            raise _BrokenError(f"{what} has masked = {_short(entry.get('masked'))}")
        count = _size(entry.get("bytes"), f"the size of {what}", size)
        rounded = entry["dtype"] == "float32" and entry["stored"] == "float16"
        width = np.dtype(entry["dtype"]).itemsize
        if not count or count % width or not (entry["stored"] == entry["dtype"] or rounded):
            raise _BrokenError(f"{what} of {count:,} bytes of {entry['dtype']} is stored as {entry['stored']}")
        if (entry["coding"] == "delta") != (width == 1) and entry["coding"] != "raw":
            raise _BrokenError(f"{what} of {entry['dtype']} has the coding {entry['coding']}")
        if entry.get("offset") != aligned(end):
            raise _BrokenError(f"{what} starts at {_short(entry.get('offset'))}, not at {aligned(end)}")
        end = aligned(end) + count
        if stored_values(entry, files[name]["bytes"]) is None:  # type: ignore[arg-type]
            raise _BrokenError(f"{what} does not fit {files[name]['bytes']:,} stored bytes")
    if end != size:
        raise _BrokenError(f"its tensors end at {end:,}, its weights at {size:,}")
    if stray := [name for name in files if name.startswith("weights/") and name not in named]:
        raise _BrokenError(f"{stray[0]} is no tensor of it")


def _bearable(size: int, what: str, archive_bytes: int, ratio: int) -> None:
    most = min(limits.MAX_BYTES, ratio * archive_bytes + limits.SLACK)
    if size > most:
        raise _BrokenError(f"{what} claim {size:,} bytes, more than {most:,} (the file has {archive_bytes:,})")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BrokenError(f"{what} is no object")
    return value


def _texts(manifest: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        value = manifest.get(key)
        if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
            raise _BrokenError(f"{key} = {_short(value)} is no short text")


def _among(manifest: Mapping[str, Any], key: str, known: tuple[Any, ...]) -> None:
    value = manifest.get(key)
    if not isinstance(value, str | None) or value not in known:
        raise _BrokenError(f"{key} = {_short(value)} is unknown")


def _finite(value: Any, what: str) -> None:
    """Refuse numbers beyond float64 (1e999) below a value; its depth is that of the JSON, which was bearable."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, float) and not math.isfinite(found):
            raise _BrokenError(f"{what} holds a number that is not finite")


def _size(value: Any, what: str, most: int) -> int:
    if type(value) is not int or value < 0:
        raise _BrokenError(f"{what} is {_short(value)}, no number of bytes")
    if value > most:
        raise _BrokenError(f"{what} is {value:,} bytes, more than {most:,}")
    return value


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _BEYOND


def _short(value: Any) -> str:
    """A value from the file, made harmless for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
