"""recipe.yaml: the options of a compression in a file; what each may be stands here and nowhere else.

Every run writes the recipe that repeats it; a recipe written by hand may leave out everything but the model. Where and
how it runs is no part of it (`output`, `resume`). Relative paths start from the current directory, as on the command
line.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from vlprune import models, names
from vlprune.errors import ProblemsError, RequestError
from vlprune.fields import Choice, Named, Number, Optional, Rule, Several, Table, Whole, flag, meant, shown, text


FinetuneMode = Literal["none", "heads", "full"]
MopeStage = Literal["pretraining", "task"]
Device = Literal["auto", "cpu", "cuda"]
Export = Literal["onnx", "none"]

COUNT, SIDE, PAIRS, SEED = Whole(1), Whole(16), Whole(2), Whole(0, 2**32 - 1)
BATCH = Whole(1, 999_999)
RATIO = Number(
    lambda ratio: 0 < ratio < 1, "is not a number strictly between 0 and 1: give the fraction to remove, as in 0.9"
)
RATE = Number(lambda rate: rate > 0, "is not a positive number: give a learning rate, as in 3e-4")
SECONDS = Number(lambda seconds: seconds > 0, "is not a positive number: give seconds, as in 5")
SHARE = Number(lambda share: 0 <= share <= 1, "is no share of zeros: give a number from 0 to 1")
WEIGHT = Number(lambda weight: weight >= 0, "is no weight of a loss: give a number of 0 or more")
METHOD, TASK = Choice("method", names.METHODS), Choice("task", names.TASKS)
PROVIDER, PRECISION = Choice("provider", names.PROVIDERS), Choice("precision", names.PRECISIONS)
CUTS = "structured"  # the pattern of methods that remove whole units


def model(name: str, value: Any, problems: list[str]) -> Any:
    """An alias, or what can be a path or a hub id."""
    if isinstance(value, str) and not is_place(value):
        return Choice("model", models.names())(name, value, problems)
    return text(name, value, problems)


def is_place(name: str) -> bool:
    """Tell what can be a path or a hub id from an alias.

    Args:
        name: of a model.

    Returns:
        bool: it has a slash, or a file or folder of that name is there.
    """
    try:
        return "/" in name or os.sep in name or (bool(name) and Path(name).exists())
    except (OSError, ValueError):  # too long, or with letters no path has
        return False


def mask_pattern(name: str, value: Any, problems: list[str]) -> Any:
    """Which weights go together: "unstructured", "n:m" (n of m kept along the input) or "rxc" (blocks)."""
    n_of_m = re.fullmatch(r"([1-9][0-9]?):([1-9][0-9]?)", value) if isinstance(value, str) else None
    block = isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,2}x[1-9][0-9]{0,2}", value)
    if value != "unstructured" and not block and not (n_of_m and int(n_of_m[1]) < int(n_of_m[2])):
        problems.append(
            f"{name} {shown(value)} is unknown: unstructured, n:m with n < m (as in 2:4), or rxc blocks (as in 8x1)"
        )
    return value


def _pattern(name: str, value: Any, problems: list[str]) -> Any:
    return value if value == CUTS else mask_pattern(name, value, problems)


def _export(name: str, value: Any, problems: list[str]) -> Any:
    return None if value == "none" else Optional(Choice("export", get_args(Export)))(name, value, problems)


def _distill(name: str, value: Any, problems: list[str]) -> Any:
    return None if value in ("none", []) else Optional(Several(WEIGHT, count=3))(name, value, problems)


MAPPINGS: dict[str, dict[str, Rule]] = {
    "finetune": {
        "mode": Choice("mode of fine-tuning", get_args(FinetuneMode)),
        "max_steps": Optional(COUNT),
        "epochs": Optional(COUNT),
        "lr": Optional(RATE),
        "seed": SEED,
        "gradient_checkpointing": flag,
        "compile": flag,
    },
    "mope": {
        "stage": Choice("stage of mope", get_args(MopeStage)),
        "pairs": PAIRS,
        "groups": COUNT,
        "neurons": Optional(COUNT),
        "candidates": PAIRS,
        "batch_size": COUNT,
        "seed": SEED,
    },
}
RECIPE: dict[str, Rule] = {  # what recipe.yaml holds, so that later verbs find it
    "model": model,
    "family": Optional(Choice("family", tuple(models.FAMILIES))),
    "method": METHOD,
    "ratios": Several(RATIO, sorts=True),
    "pattern": _pattern,
    "calibration": Optional(text),
    "calibration_samples": COUNT,
    "data": Named(TASK, text),
    "tasks": Optional(Several(TASK)),
    "image_size": Optional(SIDE),
    "device": Choice("device", get_args(Device)),
    "threads": Optional(COUNT),
    "seed": SEED,
    "skip_broken": flag,
    "finetune": Table(MAPPINGS["finetune"], short="mode"),
    "batch_size": Optional(COUNT),
    "export": _export,
    "providers": Several(PROVIDER),
    "bench_batches": Several(BATCH),
    "samples": Optional(COUNT),
    "precision": Several(PRECISION),
    "fuse": Optional(flag),
    "permute": flag,
    "pack": Choice("packing", names.PACKINGS),
    "values": Choice("kind of values", names.PACKED_VALUES),
    "target": Choice("target", names.TARGETS),
    "pack_threshold": Optional(SHARE),
    "round_widths": flag,
    "mope": Table(MAPPINGS["mope"]),
    "distill": _distill,
}
OLDER: dict[str, Any] = {  # what older recipes leave out
    "precision": ["fp32"], "fuse": False, "permute": False, "pack": "none", "values": "fp32", "target": "auto",
    "pack_threshold": None, "round_widths": True, "mope": {}, "distill": None,
}  # fmt: skip
ELSEWHERE = ("output", "resume", "json", "debug")  # of the command line alone
OPTIONS = {  # options whose keys have other names
    "ratio": "ratios", "provider": "providers", "bench_batch": "bench_batches", "mope_stage": "mope.stage",
    "mope_pairs": "mope.pairs",
}  # fmt: skip


def read(path: Path | str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: the file.

    Returns:
        dict[str, Any]: its keys and values, each of them possible; whether they fit together is another question.

    Raises:
        RequestError: it cannot be read.
        ProblemsError: all that is wrong with its keys and values.
    """
    from vlprune.yamlfile import read_yaml  # the command line needs what stands above without it

    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise RequestError(f"{path} is no recipe: write `key: value` lines, as in model: blip-tiny")
    checked, problems = check(content)
    if problems:
        raise ProblemsError(str(path), problems)
    return checked


def check(recipe: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Look through the keys and values of a recipe.

    Args:
        recipe: what was read.

    Returns:
        tuple[dict[str, Any], list[str]]: the recipe, normalised (single values where lists belong become lists), and
            what is wrong with it.
    """
    problems: list[str] = []
    known = {key: value for key, value in recipe.items() if key in RECIPE}
    problems += [_unknown(key) for key in list(recipe)[:1000] if key not in RECIPE]
    return Table(RECIPE)("", known, problems), problems


def _unknown(key: Any) -> str:
    written = str(key).replace("-", "_")
    if written in ELSEWHERE:
        return f"unknown key {shown(key)}: give --{written} on the command line"
    nested = [f"{outer}.{inner}" for outer, rules in MAPPINGS.items() for inner in rules if inner == written]
    if hint := OPTIONS.get(written) or " or ".join(nested):
        return f"unknown key {shown(key)}: did you mean {hint}?"
    return f"unknown key {shown(key)}: {meant(key, RECIPE)}"


def arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a recipe into what `vlprune.pipeline.compress` takes.

    Args:
        recipe: a checked one.

    Returns:
        dict[str, Any]: arguments by name, as far as the recipe tells them.
    """
    found = {key: value for key, value in recipe.items() if key != "finetune"}
    tuned = dict(recipe.get("finetune", {}))
    for key, name in (("mode", "finetune"), ("seed", "finetune_seed")):
        if key in tuned:
            found[name] = tuned.pop(key)
    if "distill" in found:
        found["distill"] = found["distill"] or []  # null says "none"; left out, the method decides
    return found | tuned


def merge(recipe: Mapping[str, Any], options: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Put the options of the command line over a recipe.

    Sources of data join task by task, and so do the options of mope. Another method leaves behind what the recipe says
    for its own: mope, distill, round_widths, and the pattern of cuts.

    Args:
        recipe: a checked one.
        options: all arguments of `vlprune.pipeline.compress` but the model, as the command line has them.
        typed: names of those that were typed, rather than left at their defaults.

    Returns:
        dict[str, Any]: the arguments.
    """
    found = arguments(recipe)
    if "method" in typed and options["method"] != found.get("method", options["method"]):
        for name in ("mope", "distill", "round_widths"):
            found.pop(name, None)
        if found.get("pattern") == CUTS:
            del found["pattern"]
    own = {name: options[name] for name in typed}
    for name in ("data", "mope"):
        if joined := {**(found.get(name) or {}), **(own.get(name) or {})}:
            own[name] = joined
    return {**options, **found, **own}
