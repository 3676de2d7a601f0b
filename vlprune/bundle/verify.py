"""Prove that a bundle is whole, by whom it is, and that it computes here what it computed when it was made."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import MachineError, RequestError
from . import limits
from .manifest import parse_json
from .runner import Bundle
from .unpack import unpack


def verify(path: Path | str, public_key: Path | str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Check every hash and size, open every graph, run the stored input and compare.

    Args:
        path: the bundle.
        public_key: of whom it must be signed by, a PEM file; None = signatures are not checked.
        threads: CPU threads of one operator, None = as many as the process may use.

    Returns:
        dict[str, Any]: `bundle` (SHA-256 of its manifest), `signature` ("valid", "not checked" or "none"), `task`,
            `variant`, `files`, `graphs`, `tolerance`, and `differences` from the stored output, by name.

    Raises:
        RequestError: the bundle is not intact, or not signed by that key.
        MachineError: the machine computes something else, or lacks what the bundle needs.
    """
    with tempfile.TemporaryDirectory(prefix="vlprune-") as name:
        folder = Path(name)
        manifest, identity = unpack(path, folder, None if public_key is None else Path(public_key))
        image, text, expected = read_example(folder)
        bundle = Bundle(folder, manifest, threads=threads)
        found = bundle.example(image, text)
    differences = compare(expected, found)
    if any(difference > manifest["tolerance"] for difference in differences.values()):
        worst = max(differences, key=lambda output: differences[output])
        raise MachineError(
            f"{path} computes something else here: {worst} differs by {differences[worst]:.1e} from what was stored, "
            f"allowed {manifest['tolerance']:.0e}: do not use it on this machine"
        )
    for output, value in expected.items():
        if isinstance(value, str) and found[output] != value:
            raise MachineError(
                f"{path} computes something else here: {output} {found[output]!r:.200} instead of {value!r:.200}: "
                "do not use it on this machine"
            )
    signature = "valid" if public_key is not None else "not checked" if manifest["signed"] else "none"
    return {
        "bundle": identity,
        "signature": signature,
        "task": manifest["task"],
        "variant": manifest["variant"],
        "files": len(manifest["files"]) + 1 + manifest["signed"],
        "graphs": sorted(bundle.graphs),
        "tolerance": manifest["tolerance"],
        "differences": differences,
    }


def read_example(folder: Path) -> tuple[Image.Image, str, dict[str, Any]]:
    """Read the stored input of an unpacked bundle, and what it gave.

    Args:
        folder: that `unpack` filled.

    Returns:
        tuple[Image.Image, str, dict[str, Any]]: image, text ("" = none), expected numbers and texts by name.

    Raises:
        RequestError: one of them is broken.
    """
    try:
        with Image.open(folder / limits.EXAMPLE_IMAGE, formats=("PNG",)) as image:
            if image.width * image.height > limits.MAX_EXAMPLE or image.mode != "RGB":
                raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}")
            picture = image.copy()
        file = folder / limits.EXAMPLE_TEXT
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
        why = " ".join(str(error).split())[:200]
        raise RequestError(f"the stored input of the bundle is broken ({why}): get the bundle again") from error
    expected = parse_json((folder / limits.EXPECTED).read_bytes(), limits.EXPECTED)
    if not isinstance(expected, dict) or not expected or not all(map(_is_output, expected.values())):
        raise RequestError("the stored output of the bundle is broken: get the bundle again")
    return picture, text, expected


def compare(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Compare the numbers of two outputs.

    Args:
        expected: lists of numbers and texts by name.
        found: the same names.

    Returns:
        dict[str, float]: by name the largest difference, relative to the largest value where that is above 1;
            infinite where one is not finite.

    Raises:
        RequestError: names or lengths differ.
    """
    numbers = {name: value for name, value in expected.items() if isinstance(value, list)}
    if expected.keys() != found.keys() or any(len(found[name]) != len(value) for name, value in numbers.items()):
        raise RequestError("the stored output of the bundle is not what its graphs give: get the bundle again")
    differences = {}
    for name, value in numbers.items():
        a, b = np.asarray(value, np.float64), np.asarray(found[name], np.float64)
        difference = float(np.abs(a - b).max(initial=0)) / max(1.0, float(np.abs(a).max(initial=0)))
        differences[name] = difference if np.isfinite(difference) else float("inf")
    return differences


def _is_output(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(x) in (int, float) and abs(x) < 1e30 for x in value)
    return isinstance(value, str) or (numbers and len(value) <= 100_000)
