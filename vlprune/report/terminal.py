"""The report in the terminal: what `compress` ends with."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlprune.report.schema import Report
from vlprune.report.summary import (
    RANDOM,
    cost_table,
    has_packed,
    notes,
    packing,
    precision_table,
    precisions,
    ratio,
    score_table,
    side_by_side,
    square_table,
    verdict,
)


def console() -> Console:
    """Open stdout: colours and the true width on a terminal, plain and wide lines in a file or pipe.

    Returns:
        Console: for results; progress belongs to stderr.
    """
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=160)


def table(caption: str, rows: Sequence[Mapping[str, Any]], text_columns: int | None = None) -> Table:
    """Lay out rows of named values.

    Args:
        caption: stands above the table; may be empty.
        rows: mappings; the keys of all of them become the columns.
        text_columns: the first so many columns are text, the others figures; None = as the values are.

    Returns:
        Table: figures right, text left.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    grid = Table(title=Text(caption) if caption else None, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for index, column in enumerate(columns):
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        if text_columns is not None:
            numeric = index >= text_columns
        # rich narrows the widest columns, which tears names apart; those of variants stand first
        whole = index == 0 and max((len(written(row.get(column))) for row in rows), default=0) <= 30
        grid.add_column(Text(column), justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        grid.add_row(*(Text(written(row.get(column))) for column in columns))
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
    if scores := score_table(report):
        screen.print(table(f"{report['model']['name']}: scores x 100", scores, text_columns=3))
    if by_precision := precision_table(report):
        screen.print(table("Scores by precision", by_precision, text_columns=4))
    sparsities = [
        {"variant": variant["id"], "achieved": f"{variant['sparsity']['achieved']:.6f}"}
        | {name: f"{value:.4f}" for name, value in variant["sparsity"]["per_modality"].items()}
        for variant in report["variants"]
        if variant["method"]
    ]
    if sparsities:
        screen.print(table("Sparsity", sparsities))
    if costs := cost_table(report):
        screen.print(table("Parameters and FLOPs", costs, text_columns=1))
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
    forms = len(precisions(report)) > 1 or any(row.get("fused") for row in report["throughput"])
    timings = [
        {
            "variant": row["variant"],
            "graph": f"{row['task']} / {row['graph']}",
            **({"weights": packing(row)} if packed or forms else {}),
            "provider": row["provider"],
            "batch": row["batch"],
            "dense ms": f"{row['dense']['p50_ms']:.2f}",
            "ms": f"{row['compressed']['p50_ms']:.2f}",
            "dense / compressed": ratio(row),
            "verdict": verdict(row),
        }
        for row in report["throughput"]
    ]
    if timings:
        screen.print(table("Throughput", timings))
    if beside := side_by_side(report):
        screen.print(table("Packed beside dynamic int8", beside, text_columns=2))
    if square := square_table(report):
        screen.print(table("Dense and compressed, fp32 and fp16", square, text_columns=3))
    if report["graphs"]:
        for note in notes(report):
            screen.print(note)


def written(value: Any) -> str:
    """Write a value for people.

    Args:
        value: as it stands in a result.

    Returns:
        str: figures rounded and grouped, lists joined.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
