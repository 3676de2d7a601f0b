"""Names a user may type, importable without torch, so that a typing error is answered at once.

The registries themselves (`vlprune.pruning.METHODS`, `vlprune.structured.STRUCTURED`, `vlprune.tasks.TASKS`) hold the
code; a test keeps both equal.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal, get_args

from .errors import RequestError


UNSTRUCTURED = ("multiflow", "omp", "local-magnitude", "modal-magnitude", "l2", "lamp", "random")
STRUCTURED = ("multiflow-structured", "magnitude-structured", "isomorphic", "upop", "mope")
METHODS = (*UNSTRUCTURED, *STRUCTURED)
TASKS = ("retrieval", "captioning", "vqa", "zero-shot", "classification", "nlvr")
PROVIDERS = ("cpu", "cuda", "tensorrt")
PRECISIONS = ("fp32", "fp16", "int8-static", "int8-dynamic")
COSINES = {"fp16": 0.999, "int8-static": 0.99, "int8-dynamic": 0.99}  # to PyTorch: below it the report warns
Packing = Literal["none", "sparse"]
PackedValues = Literal["fp32", "fp16"]
Target = Literal["auto", "avx512", "avx2", "portable"]
PACKINGS: tuple[str, ...] = get_args(Packing)
PACKED_VALUES: tuple[str, ...] = get_args(PackedValues)
TARGETS: tuple[str, ...] = get_args(Target)


def check(kind: str, name: str, known: Iterable[str]) -> str:
    """Refuse an unknown name, with the nearest known ones.

    Args:
        kind: what the name names, for the message ("method", "task", ...).
        name: what was typed.
        known: the allowed names.

    Returns:
        str: `name`.

    Raises:
        RequestError: `name` is not among the known ones.
    """
    known = list(known)
    if name in known:
        return name
    near = get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? (known: {', '.join(known)})" if near else f"known: {', '.join(known)}"
    raise RequestError(f"unknown {kind} {name!r}: {hint}")
