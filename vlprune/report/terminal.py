"""The report in the terminal: what `compress` ends with."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlprune.report.schema import Report
from vlprune.report.summary import (
    INT8,
    PACKED,
    RANDOM,
    ZEROS,
    has_int8,
    has_packed,
    is_unstructured,
    packing,
    points,
    ratio,
    side_by_side,
    summarize,
    title,
)


def console() -> Console:
    """Open stdout: colours and the true width on a terminal, plain and wide lines in a file or pipe.

    Returns:
        Console: for results; progress belongs to stderr.
    """
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=160)


def table(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out rows of named values.

    Args:
        caption: stands above the table; may be empty.
        rows: mappings; the keys of all of them become the columns.

    Returns:
        Table: numbers right, text left.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    grid = Table(title=Text(caption) if caption else None, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        grid.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_text(row.get(column))) for column in columns))
    return grid


def print_report(report: Report, screen: Console | None = None) -> None:
    """Print the scores, sparsities and timings of a report.

    Args:
        report: a valid report; a stage run alone may leave most lists empty.
        screen: where to, stdout by default.
    """
    screen = screen or console()
    if report["model"]["random_weights"]:
        screen.print(RANDOM, style="bold")
    scores = _scores(report)
    if scores.row_count:
        screen.print(scores)
    sparsities = [
        {"variant": variant["id"], "achieved": f"{variant['sparsity']['achieved']:.6f}"}
        | {name: f"{value:.4f}" for name, value in variant["sparsity"]["per_modality"].items()}
        for variant in report["variants"]
        if variant["method"]
    ]
    if sparsities:
        screen.print(table("Sparsity", sparsities))
    packed = has_packed(report)
    sizes = [
        {
            "variant": row["variant"],
            "graph": f"{row['task']} / {row['graph']}",
            "weights": packing(row),
            "packed layers": f"{row.get('linears_packed', 0)} of {row.get('linears', 0)}",
            "dense MB": f"{row['dense_bytes'] / 1e6:,.2f}",
            "MB": f"{row['bytes'] / 1e6:,.2f}",
            "share": f"{row['bytes'] / max(row['dense_bytes'], 1):.3f}",
        }
        for row in report["graphs"]
        if row["packed"]
    ]
    if sizes:
        screen.print(table("Size of packed graphs", sizes))
    timings = [
        {
            "variant": row["variant"],
            "graph": f"{row['task']} / {row['graph']}",
            **({"weights": packing(row)} if packed else {}),
            "provider": row["provider"],
            "batch": row["batch"],
            "dense ms": f"{row['dense']['p50_ms']:.2f}",
            "ms": f"{row['compressed']['p50_ms']:.2f}",
            "dense / compressed": ratio(row),
            "verdict": row["verdict"],
        }
        for row in report["throughput"]
    ]
    if timings:
        screen.print(table("Throughput", timings))
    if beside := side_by_side(report):
        screen.print(table("Packed beside dynamic int8", beside))
    if report["graphs"] and is_unstructured(report):
        screen.print(ZEROS)
    if packed:
        screen.print(PACKED)
    if has_int8(report):
        screen.print(INT8)


def _scores(report: Report) -> Table:
    name = report["model"]["name"]
    grid = Table(title=Text(f"{name}: scores x 100"), title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for column in ("variant", "task", "metric"):
        grid.add_column(column)
    packed = ("ONNX, packed",) if has_packed(report) else ()
    int8 = ("dense, int8",) if has_int8(report) else ()
    for column in ("dense", "dense, fine-tuned", "pruned", "pruned, fine-tuned", "ONNX", *packed, *int8):
        grid.add_column(column, justify="right")
    for row in summarize(report):
        scores = (
            row.dense,
            row.dense_finetuned,
            row.pruned,
            row.finetuned,
            row.onnx,
            *([row.packed] if packed else []),
            *([row.int8] if int8 else []),
        )
        grid.add_row(row.variant, row.task, title(row.metric), *map(points, scores))
    return grid


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
