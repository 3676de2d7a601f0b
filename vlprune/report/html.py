"""report.html: the whole report in one file, without scripts and without network.

Every text is escaped: names, captions and answers come from models and data of strangers. The page's own security
policy allows its one style sheet, known by its hash, and images that are part of the file; nothing else.
"""

import base64
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from vlprune.report import scales, sheets
from vlprune.report.schema import Metrics, Report, Sample, Throughput, Variant
from vlprune.report.summary import DENSE, RANDOM, base_id, headline, notes, packing, ratio, title, verdict
from vlprune.report.verdict import verdicts


PAGE = Path(__file__).parent / "page"
LEVELS = 7  # colours of the heat map
MAX_IMAGE, MAX_RECIPE = 64 << 10, 64 << 10  # bytes: what we write is far smaller
JPEG = b"\xff\xd8\xff"
MARKS = {"faster": "faster", "slower": "slower", "no measurable difference": "alike", "disturbed": "disturbed"}


def render_html(report: Report, folder: Path | None = None, samples: bool = True) -> str:
    """Write a report as one HTML page.

    Args:
        report: a valid report.
        folder: the run directory, which has the small images and the recipe; None leaves both out.
        samples: show test samples, where there are any.

    Returns:
        str: the text of report.html; the same for the same report and folder.
    """
    style = (PAGE / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    random = report["model"]["random_weights"]
    tables = [
        *([] if random else [sheets.precision_sheet(report), *sheets.task_sheets(report)]),
        sheets.graph_sheet(report),
        sheets.throughput_sheet(report),
        sheets.beside_sheet(report),
        sheets.square_sheet(report),
        sheets.stage_sheet(report),
    ]
    text = environment.get_template("report.html.j2").render(
        style=Markup(style),  # ours
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        model=report["model"],
        seed=report["seed"],
        random=RANDOM if random else "",
        notes=notes(report),
        verdicts=[_verdict(found) for found in verdicts(report)],
        accuracy=[] if random else _accuracy(report),
        tradeoffs=[] if random else _tradeoffs(report),
        sizes=_sizes(report),
        speeds=_speeds(report),
        heat=_heat(report),
        sparsity=[sheet for sheet in (sheets.sparsity_sheet(report), sheets.cost_sheet(report)) if sheet],
        samples=_samples(report, folder) if samples else [],
        machine=sheets.environment_lines(report),
        recipe=_recipe(folder),
        tables=[table for table in tables if table],
    )
    return text.encode(errors="replace").decode()  # JSON may hold halves of characters, files may not


def _clean(value: Any) -> Any:
    """Take control characters out of a text: some reverse the order in which others are shown."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "".join("\ufffd" if _controls(character) else character for character in value)
    return value


def _breakable(value: Any) -> Markup:
    """Let a long name go on in the next line after its dots and slashes, rather than in the middle of a word."""
    return Markup(re.sub(r"([./])", r"\1<wbr>", str(escape(_clean(value)))))


def _controls(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs")


# --- what the sections show -------------------------------------------------------------------------------------------


def _verdict(found: Any) -> dict[str, Any]:
    return {
        "name": found.variant["id"],
        "how": f"{found.variant['method']}, {found.variant['pattern']}",
        "removed": sheets.percent(found.variant["sparsity"]["achieved"]),
        "changes": [
            {
                "what": f"{change.task}, {title(change.metric)}",
                "before": 100 * change.before,
                "after": 100 * change.after,
                "side": change.side or "unknown",
                "against": label(change.dense),
            }
            for change in found.changes
        ],
        "sizes": [{"form": size.form, "text": size.text, "share": f"{size.percent:.1f} %"} for size in found.sizes],
        "speeds": [
            {
                "form": f"{speed.form}, {speed.provider}",
                "parts": [{"kind": MARKS[name], "text": text} for name, text in speed.parts.items()],
            }
            for speed in found.speeds
        ],
    }


def label(variant: str) -> str:
    """Name a variant for people.

    Args:
        variant: its id.

    Returns:
        str: the same, "-finetuned" written out.
    """
    return f"{variant.removesuffix('-finetuned')}, fine-tuned" if variant.endswith("-finetuned") else variant


def _ordered(report: Report) -> dict[str, int]:
    """Places of the variants: each as pruned, then fine-tuned, in the order of the report."""
    ids = [variant["id"] for variant in report["variants"]]
    bases = list(dict.fromkeys(base_id(variant) for variant in report["variants"]))
    ids.sort(key=lambda name: (bases.index(name.removesuffix("-finetuned")), name.endswith("-finetuned")))
    return {name: place for place, name in enumerate(ids)}


def _kind(variant: str) -> str:
    """What a mark stands for: the colour it gets."""
    if variant in DENSE:
        return "dense"
    return "tuned" if variant.endswith("-finetuned") else "pruned"


def _accuracy(report: Report) -> list[dict[str, Any]]:
    """One chart per task and headline metric: every variant with its interval."""
    order = _ordered(report)
    charts = []
    for task in dict.fromkeys(row["task"] for row in report["metrics"]):
        rows = [row for row in report["metrics"] if row["task"] == task]
        rows.sort(key=lambda row: (order[row["variant"]], row["runtime"] != "pytorch"))
        for metric in headline(task, rows):
            measured = [row for row in rows if metric in row["values"]]
            scale = scales.linear([100 * bound for row in measured for bound in _bounds(row, metric)], floor=0.0)
            reference = max(
                (row for row in measured if row["variant"] in DENSE and row["runtime"] == "pytorch"),
                key=lambda row: order[row["variant"]],
                default=None,
            )
            charts.append(
                {
                    "task": task,
                    "metric": title(metric),
                    "about": f"{measured[0]['dataset']}, n = {measured[0]['n']}",
                    "ticks": _ticks(scale),
                    "reference": scale.place(100 * reference["values"][metric]) if reference else None,
                    "rows": [_score(row, metric, scale) for row in measured],
                }
            )
    return charts


def _bounds(row: Metrics, metric: str) -> list[float]:
    return [row["values"][metric], *row["ci95"].get(metric, [])]


def _score(row: Metrics, metric: str, scale: scales.Scale) -> dict[str, Any]:
    bounds = [scale.place(100 * bound) for bound in row["ci95"].get(metric, [])]
    return {
        "variant": label(row["variant"]),
        "by": _by(row),
        "kind": _kind(row["variant"]),
        "hollow": row["runtime"] != "pytorch",
        "place": scale.place(100 * row["values"][metric]),
        "low": bounds[0] if bounds else None,
        "high": bounds[-1] if bounds else None,
        "text": sheets.interval(row, metric),
    }


def _by(row: Mapping[str, Any]) -> str:
    """What computed an output, shortly."""
    if row["runtime"] == "pytorch":
        return "PyTorch"
    form = packing(row)
    return f"ONNX, {row['provider']}" + ("" if form == "plain" else f", {form}")


def _ticks(scale: scales.Scale) -> list[dict[str, Any]]:
    return [{"place": scale.place(tick), "text": f"{tick:g}"} for tick in scale.ticks]


def _tradeoffs(report: Report) -> list[dict[str, Any]]:
    """One plot per task and headline metric over the ratios, where there are several."""
    pruned = [variant for variant in report["variants"] if variant["method"]]
    sparsity = {variant["id"]: 100 * variant["sparsity"]["achieved"] for variant in pruned}
    if len({base_id(variant) for variant in pruned}) < 2:
        return []
    across = scales.linear(sparsity.values())
    plots = []
    for task in dict.fromkeys(row["task"] for row in report["metrics"]):
        rows = [row for row in report["metrics"] if row["task"] == task and row["runtime"] == "pytorch"]
        for metric in headline(task, rows):
            measured = [row for row in rows if metric in row["values"]]
            points = [row for row in measured if row["variant"] in sparsity]
            if len({row["variant"] for row in points}) < 2:
                continue
            up = scales.linear([100 * bound for row in measured for bound in _bounds(row, metric)], floor=0.0)
            series = [_series(kind, points, metric, sparsity, across, up) for kind in ("pruned", "tuned")]
            dense = [row for row in measured if row["variant"] in DENSE]
            plots.append(
                {
                    "task": task,
                    "metric": title(metric),
                    "ticks": _ticks(up),
                    "across": _removed(report, task, sparsity, across),
                    "dense": [
                        {"name": label(row["variant"]), "place": up.place(100 * row["values"][metric])} for row in dense
                    ],
                    "series": [found for found in series if found["points"]],
                    "text": "; ".join(
                        f"{label(row['variant'])} {sheets.interval(row, metric)}" for row in (*dense, *points)
                    ),
                }
            )
    return plots


def _series(
    kind: str,
    rows: Sequence[Metrics],
    metric: str,
    sparsity: Mapping[str, float],
    across: scales.Scale,
    up: scales.Scale,
) -> dict[str, Any]:
    found = sorted((row for row in rows if _kind(row["variant"]) == kind), key=lambda row: sparsity[row["variant"]])
    points = []
    for row in found:
        bounds = [up.place(100 * bound) for bound in row["ci95"].get(metric, [])]
        points.append(
            {
                "x": _inside(across.place(sparsity[row["variant"]])),
                "y": up.place(100 * row["values"][metric]),
                "low": bounds[0] if bounds else None,
                "high": bounds[-1] if bounds else None,
            }
        )
    return {"kind": kind, "name": {"pruned": "as pruned", "tuned": "fine-tuned"}[kind], "points": points}


def _removed(report: Report, task: str, sparsity: Mapping[str, float], across: scales.Scale) -> list[dict[str, Any]]:
    """Marks of the horizontal axis: the ratios that were run, and how large the packed graphs are."""
    marks: dict[float, dict[str, Any]] = {}
    for variant, share in sparsity.items():
        mark = marks.setdefault(_inside(across.place(share)), {"text": f"{share:.4g} %", "size": ""})
        graphs = [row for row in report["graphs"] if (row["variant"], row["task"]) == (variant, task) and row["packed"]]
        if graphs:
            mark["size"] = sheets.megabytes(sum(row["bytes"] for row in graphs))
    return [{"place": place, **mark} for place, mark in sorted(marks.items())]


def _inside(place: float) -> float:
    """Leave room for the labels of the first and last mark."""
    return round(10 + 0.8 * place, 2)


def _sizes(report: Report) -> list[dict[str, Any]]:
    """One row per compressed variant, task and form: its graphs together, held against the dense ones."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    order = _ordered(report)
    for row in sorted(report["graphs"], key=lambda row: order[row["variant"]]):
        if row["variant"] not in DENSE:
            total = totals.setdefault((row["variant"], row["task"], packing(row)), [0, 0])
            total[0] += row["bytes"]
            total[1] += row["dense_bytes"]
    widest = max((size / max(dense, 1) for size, dense in totals.values()), default=1.0)
    return [
        {
            "variant": label(variant),
            "task": task,
            "form": form,
            "kind": "smaller" if size < 0.995 * dense else "larger" if size > 1.005 * dense else "same",
            "width": round(100 * size / max(dense, 1) / max(widest, 1.0), 2),
            "whole": round(100 / max(widest, 1.0), 2),
            "text": f"{sheets.megabytes(size)} of {sheets.megabytes(dense)}",
            "share": f"{100 * size / max(dense, 1):.1f} %",
        }
        for (variant, task, form), (size, dense) in totals.items()
    ]


def _speeds(report: Report) -> list[dict[str, Any]]:
    """Forest plots of the throughput ratios: one per variant, form and provider, all on the same axis."""
    rows = report["throughput"]
    if not rows:
        return []
    scale = scales.ratios([bound for row in rows for bound in (row["ratio"], *row["ratio_ci95"])])
    groups: dict[tuple[str, str, str], list[Throughput]] = {}
    order = _ordered(report)
    for row in sorted(rows, key=lambda row: order[row["variant"]]):
        groups.setdefault((row["variant"], packing(row), row["provider"]), []).append(row)
    return [
        {
            "variant": label(variant),
            "form": "in int8 against itself in fp32" if variant in DENSE else form,
            "provider": provider,
            "ticks": _ticks(scale),
            "one": scale.place(1.0),
            "rows": [
                {
                    "graph": f"{row['task']} / {row['graph']}",
                    "batch": row["batch"],
                    "place": scale.place(row["ratio"]),
                    "low": scale.place(row["ratio_ci95"][0]),
                    "high": scale.place(row["ratio_ci95"][1]),
                    "kind": MARKS[verdict(row)],
                    "times": f"{row['dense']['p50_ms']:.2f} → {row['compressed']['p50_ms']:.2f} ms",
                    "text": ratio(row),
                    "verdict": verdict(row),
                }
                for row in group
            ],
        }
        for (variant, form, provider), group in groups.items()
    ]


def _heat(report: Report) -> list[dict[str, Any]]:
    """Per compressed model, a grid per modality: kinds of layers down, their numbers across."""
    modalities = report["model"].get("modalities", {})
    maps = []
    shown: dict[str, Variant] = {}
    for variant in report["variants"]:
        if variant["method"]:
            shown.setdefault(base_id(variant), variant)
    for base, variant in shown.items():
        layers = variant["sparsity"]["per_layer"]
        if not layers:
            continue
        low, high = min(layers.values()), max(layers.values())
        if high - low < 0.1:  # a narrower scale would show rounding as colour
            low = min(low, 0.9)
            high = low + 0.1
        grids = []
        for modality in dict.fromkeys(modalities.get(name, "") for name in layers):
            ours = {name: share for name, share in layers.items() if modalities.get(name, "") == modality}
            total = variant["sparsity"]["per_modality"].get(modality)
            about = f": {sheets.percent(total)} removed" if total is not None else ""
            grids.append({"name": f"{modality or 'all layers'}{about}", **_grid(ours, low, high)})
        maps.append({"variant": base, "grids": grids, "low": f"{100 * low:.0f} %", "high": f"{100 * high:.0f} %"})
    return maps


def _grid(layers: Mapping[str, float], low: float, high: float) -> dict[str, Any]:
    """Lay layers out by the first number in their names; what has none stands in a column of its own."""
    cells: dict[str, dict[int, tuple[str, float]]] = {}
    for name, share in layers.items():
        number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        kind = name if number is None else f"{name[: number.start()]}N{name[number.end() :]}"
        cells.setdefault(kind, {})[-1 if number is None else int(number[0])] = (name, share)
    columns = sorted({column for row in cells.values() for column in row})
    shared = _prefix(list(cells))
    return {
        "prefix": shared,
        "columns": ["" if column < 0 else str(column) for column in columns],
        "rows": [
            {
                "name": kind.removeprefix(shared),
                "cells": [
                    {
                        "name": row[column][0],
                        "text": f"{100 * row[column][1]:.0f}",
                        "level": scales.level(row[column][1], low, high, LEVELS),
                    }
                    if column in row
                    else None
                    for column in columns
                ],
            }
            for kind, row in cells.items()
        ],
    }


def _prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot; something is left of each."""
    shared = os.path.commonprefix([name.split(".")[:-1] for name in names])  # of lists it compares whole parts
    return "".join(f"{part}." for part in shared)


def _samples(report: Report, folder: Path | None) -> list[dict[str, Any]]:
    """Per task, its samples; like outputs of several variants are joined."""
    found = report.get("samples", [])
    order = _ordered(report)
    tasks = []
    for task in dict.fromkeys(row["task"] for row in found):
        rows = [row for row in found if row["task"] == task]
        cards = [_card(row, folder, order) for row in rows]
        tasks.append({"task": task, "dataset": rows[0]["dataset"], "cards": cards, "chosen": _chosen(rows)})
    return tasks


def _chosen(rows: Sequence[Sample]) -> list[str]:
    """How the samples of a task were chosen; retrieval asks in two ways."""
    told = {}
    for row in rows:
        asked = "finding an image" if "image" in row else "finding a text" if row["task"] == "retrieval" else ""
        told[asked] = (
            f"{f'{asked}: ' if asked else ''}{_who(row)} disagree on {row['differing']:,} of the first "
            f"{row['candidates']:,} test samples"
        )
    return list(told.values())


def _who(row: Sample) -> str:
    """Whose disagreement counts, see `vlprune.report.samples`."""
    tuned = any(output["variant"].endswith("-finetuned") for output in row["outputs"])
    return "fine-tuned models" if tuned else "models"


def _card(row: Sample, folder: Path | None, order: Mapping[str, int]) -> dict[str, Any]:
    answers: dict[tuple[Any, ...], dict[str, Any]] = {}
    outputs = sorted(row["outputs"], key=lambda one: (order[one["variant"]], one["runtime"] != "pytorch"))
    for output in outputs:
        key = (output["text"], output.get("image"), output.get("correct"), output.get("rank"))
        answer = answers.setdefault(
            key,
            {
                "text": output["text"],
                "image": _image(folder, output["image"]) if "image" in output else None,
                "mark": _mark(output.get("correct")),
                "rank": output.get("rank"),
                "by": {},
            },
        )
        answer["by"].setdefault((_kind(output["variant"]), label(output["variant"])), []).append(_by(output))
    ways = Counter(label(output["variant"]) for output in outputs)
    for answer in answers.values():
        answer["by"] = [
            {"kind": kind, "name": name, "ways": "; ".join(by) if len(by) < ways[name] else ""}
            for (kind, name), by in answer["by"].items()
        ]
    return {
        "number": row["sample"],
        "images": [_image(folder, image) for image in row["images"]],
        "question": row["question"],
        "expected": row["expected"],
        "target": _image(folder, row["image"]) if "image" in row else None,
        "finds_image": "image" in row,
        "differs": row["differs"],
        "who": _who(row),
        "answers": list(answers.values()),
    }


def _mark(correct: float | None) -> str:
    if correct is None:
        return ""
    return {0.0: "wrong", 1.0: "right"}.get(correct, f"{100 * correct:.0f} % right")


def _image(folder: Path | None, name: str) -> str:
    """An image of the run as a data URI; "" where there is none, or something else in its place."""
    content = _bytes(folder, name, MAX_IMAGE)
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}" if content.startswith(JPEG) else ""


def _recipe(folder: Path | None) -> str:
    return _bytes(folder, "recipe.yaml", MAX_RECIPE).decode(errors="replace")


def _bytes(folder: Path | None, name: str, limit: int) -> bytes:
    """A small file of the run; none outside of it, whatever links say."""
    if folder is None or "\0" in name:
        return b""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > limit:
            return b""
        return path.read_bytes()
    except OSError:
        return b""
