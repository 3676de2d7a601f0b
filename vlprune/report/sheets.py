"""The tables of report.md and report.html: cells as texts, first the texts (left), then the figures (right)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlprune.report.schema import Metrics, Report
from vlprune.report.summary import (
    cost_table,
    has_int8,
    has_packed,
    packing,
    points,
    precision_table,
    precisions,
    ratio,
    score_table,
    side_by_side,
    square_table,
    title,
    verdict,
)


@dataclass(frozen=True)
class Sheet:
    """One table.

    Attributes:
        name: its heading.
        columns: their headings.
        body: rows of cells.
        text_columns: how many columns, from the left, are no figures.
        intro: what the reader has to know first, or "".
    """

    name: str
    columns: list[str]
    body: list[list[str]]
    text_columns: int
    intro: str = ""


def score_sheet(report: Report) -> Sheet | None:
    """Lay out the headline metrics.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: a row per compressed model and metric; None where nothing was scored.
    """
    intro = "All scores times 100; in brackets the 95 % bootstrap interval over the test samples."
    return _named("Scores", score_table(report), 3, intro)


def task_sheets(report: Report) -> list[Sheet]:
    """Lay out all metrics with their intervals.

    Args:
        report: a valid report.

    Returns:
        list[Sheet]: one per task and data set.
    """
    found = []
    sparsity = {variant["id"]: variant["sparsity"]["achieved"] for variant in report["variants"]}
    for task, dataset in dict.fromkeys((row["task"], row["dataset"]) for row in report["metrics"]):
        rows = [row for row in report["metrics"] if (row["task"], row["dataset"]) == (task, dataset)]
        metrics = list(dict.fromkeys(metric for row in rows for metric in row["values"]))
        skipped = max(row.get("skipped", 0) for row in rows)
        note = f"; {skipped} broken records skipped" if skipped else ""
        body = [
            [row["variant"], percent(sparsity[row["variant"]]), run_by(row), str(row["n"])]
            + [interval(row, metric) for metric in metrics]
            for row in rows
        ]
        columns = ["variant", "sparsity", "run by", "n", *map(title, metrics)]
        found.append(Sheet(f"{task} ({dataset}{note})", columns, body, text_columns=1))
    return found


def sparsity_sheet(report: Report) -> Sheet | None:
    """Lay out how much of each modality is gone.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: a row per compressed model; None where there is none.
    """
    pruned = [variant for variant in report["variants"] if variant["method"]]
    if not pruned:
        return None
    modalities = list(dict.fromkeys(name for variant in pruned for name in variant["sparsity"]["per_modality"]))
    body = [
        [variant["id"], variant["method"] or "", variant["pattern"] or "", percent(variant["ratio"])]
        + [percent(variant["sparsity"]["achieved"], 4)]
        + [percent(variant["sparsity"]["per_modality"].get(name)) for name in modalities]
        for variant in pruned
    ]
    columns = ["variant", "method", "pattern", "asked", "achieved", *modalities]
    return Sheet("Sparsity", columns, body, text_columns=3, intro="Share of prunable weights removed.")


def cost_sheet(report: Report) -> Sheet | None:
    """Lay out parameters and operations of structured variants.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: see `vlprune.report.summary.cost_table`; None where no units were removed.
    """
    intro = "In brackets the share of the dense model's; a variant made for one task is held against the same parts."
    return _named("Parameters and FLOPs", cost_table(report), 1, intro)


def graph_sheet(report: Report) -> Sheet | None:
    """Lay out the ONNX files.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: a row per file; None where nothing was exported.
    """
    others = len(precisions(report)) > 1
    body = [
        [
            row["file"],
            row["precision"] + _packed(row),
            megabytes(row["bytes"]),
            megabytes(row["dense_bytes"]),
            percent(row["nonzero_fraction"]),
            f"{row['max_abs_diff']:.1e}",
            f"{row['cosine_min']:.6f}",
            *([str(len(row["kept_fp32"])) if "kept_fp32" in row else "–"] if others else []),
        ]
        for row in report["graphs"]
    ]
    columns = ["file", "precision", "size", "dense size", "nonzero", "max abs difference", "min cosine"]
    columns += ["nodes kept in fp32"] if others else []
    intro = "Differences are between ONNX Runtime and PyTorch on the same inputs. 1 MB = 1,000,000 bytes."
    if has_packed(report):
        intro += " packing.json beside packed graphs tells of every layer whether it is packed, and why not."
    if others:
        intro += " report.json names the nodes kept in fp32, and why."
    return Sheet("ONNX graphs", columns, body, 2, intro) if body else None


def precision_sheet(report: Report) -> Sheet | None:
    """Lay out the scores in each precision.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: see `vlprune.report.summary.precision_table`; None where all graphs are in fp32.
    """
    intro = "All scores times 100, computed by ONNX Runtime on the unpacked graphs."
    return _named("Scores by precision", precision_table(report), 4, intro)


def square_sheet(report: Report) -> Sheet | None:
    """Lay out dense and compressed in fp32 and fp16.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: see `vlprune.report.summary.square_table`; None where nothing was timed in fp16.
    """
    intro = "Milliseconds are of different moments: the ratios, of two sides timed in turn, are what counts."
    return _named("Dense and compressed, fp32 and fp16", square_table(report), 3, intro)


def throughput_sheet(report: Report) -> Sheet | None:
    """Lay out the timings.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: a row per graph, provider and batch size; None where nothing was timed.
    """
    body = [
        [
            row["variant"],
            f"{row['task']} / {row['graph']}",
            f"{row['provider']}, {row['precision']}{_packed(row)}",
            str(row["batch"]),
            f"{row['dense']['p50_ms']:.2f}",
            f"{row['compressed']['p50_ms']:.2f}",
            f"{row['compressed']['p99_ms']:.2f}",
            f"{row['compressed']['per_s']:,.1f}",
            ratio(row),
            verdict(row),
        ]
        for row in report["throughput"]
    ]
    columns = ["variant", "graph", "run by", "batch", "dense p50 ms", "p50 ms", "p99 ms", "per s", "ratio", "verdict"]
    intro = (
        "Both sides exported the same way and timed in alternating blocks by the same provider at the same precision; "
        "ratio = dense time / compressed time, with its 95 % interval: the range over six measurements, on a CPU with "
        "both graphs opened anew for each."
    )
    if has_int8(report) or len(precisions(report)) > 1:
        intro += " Rows of the dense model hold one of its other precisions against itself in fp32."
    return Sheet("Throughput", columns, body, 3, intro) if body else None


def beside_sheet(report: Report) -> Sheet | None:
    """Lay out packed graphs beside dynamic int8.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: see `vlprune.report.summary.side_by_side`; None where there is nothing to compare.
    """
    return _named("Packed beside dynamic int8", side_by_side(report), 2)


def stage_sheet(report: Report) -> Sheet | None:
    """Lay out what the stages cost.

    Args:
        report: a valid report.

    Returns:
        Sheet | None: a row per stage; None where there is none.
    """
    body = [
        [
            row["name"] + (f" ({row['skipped']} broken records skipped)" if row.get("skipped") else ""),
            f"{row['seconds']:.1f}",
            megabytes(row["peak_rss_bytes"]),
            "–" if row["peak_cuda_bytes"] is None else megabytes(row["peak_cuda_bytes"]),
        ]
        for row in report["stages"]
    ]
    return Sheet("Stages", ["stage", "seconds", "peak memory", "peak CUDA memory"], body, 1) if body else None


def environment_lines(report: Report) -> list[tuple[str, str]]:
    """Describe the machine.

    Args:
        report: a valid report.

    Returns:
        list[tuple[str, str]]: what, and which.
    """
    machine = report["environment"]
    providers = ", ".join(machine["providers"]) or "no providers"
    return [
        ("Python", machine["python"]),
        ("torch", machine["torch"] or "absent"),
        ("onnxruntime", f"{machine['onnxruntime'] or 'absent'} ({providers})"),
        ("Processor", f"{machine['cpu']}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"),
        ("GPU", f"{machine['gpu']} (driver {machine['driver']})" if machine["gpu"] else "none"),
    ]


def run_by(row: Metrics) -> str:
    """Tell what computed a score.

    Args:
        row: of metrics.

    Returns:
        str: runtime, provider, precision, and the packed form.
    """
    name = "PyTorch" if row["runtime"] == "pytorch" else "ONNX Runtime"
    return f"{name}, {row['provider']}, {row['precision']}{_packed(row)}"


def interval(row: Metrics, metric: str) -> str:
    """Print a score with its interval.

    Args:
        row: of metrics.
        metric: which.

    Returns:
        str: times 100; a dash where it was not measured.
    """
    if metric not in row["values"]:
        return "–"
    text = points(row["values"][metric])
    if metric in row["ci95"]:
        low, high = row["ci95"][metric]
        text += f" [{points(low)}, {points(high)}]"
    return text


def percent(fraction: float | None, decimals: int = 2) -> str:
    """Print a share.

    Args:
        fraction: in 0 to 1, None where there is none.
        decimals: how many.

    Returns:
        str: in per cent, or a dash.
    """
    return "–" if fraction is None else f"{100 * fraction:.{decimals}f} %"


def megabytes(count: int) -> str:
    """Print a size.

    Args:
        count: bytes.

    Returns:
        str: in units of 1,000,000 bytes.
    """
    return f"{count / 1e6:,.2f} MB"


def _packed(row: Mapping[str, Any]) -> str:
    return f", {packing(row)}" if row["packed"] else ", fused" if row.get("fused") else ""


def _named(name: str, rows: Sequence[Mapping[str, Any]], text_columns: int, intro: str = "") -> Sheet | None:
    """Lay out rows whose keys, alike in all of them, are the columns."""
    if not rows:
        return None
    body = [[str(value) for value in row.values()] for row in rows]
    return Sheet(name, list(rows[0]), body, text_columns, intro)
