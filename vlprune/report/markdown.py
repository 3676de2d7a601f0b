"""report.md: the report for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlprune.report.schema import Metrics, Report
from vlprune.report.summary import (
    RANDOM,
    cost_table,
    has_int8,
    has_packed,
    notes,
    packing,
    points,
    ratio,
    score_table,
    side_by_side,
    title,
    verdict,
)


def render_markdown(report: Report) -> str:
    """Write a report as Markdown.

    Args:
        report: a valid report.

    Returns:
        str: the text of report.md.
    """
    sections = [
        _head(report),
        _scores(report),
        _sparsity(report),
        _graphs(report),
        _throughput(report),
        _stages(report),
        _environment(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(report: Report) -> str:
    model = report["model"]
    lines = [
        f"# Compression of {model['name']}",
        f"Family {model['family']}, checkpoint {model['checkpoint']}; {model['parameters']:,} parameters, "
        f"{model['prunable_parameters']:,} of them prunable; seed {report['seed']}.",
    ]
    if model["random_weights"]:
        lines.append(f"**{RANDOM}**")
    return "\n\n".join([*lines, *notes(report)])


def _scores(report: Report) -> str:
    if report["model"]["random_weights"] or not report["metrics"]:
        return ""
    blocks = ["## Scores", "All scores times 100; in brackets the 95 % bootstrap interval over the test samples."]
    if rows := score_table(report):
        blocks.append(_named_table(rows, text_columns=3))
    for task, dataset in dict.fromkeys((row["task"], row["dataset"]) for row in report["metrics"]):
        blocks += _task(task, dataset, report)
    return "\n\n".join(blocks)


def _task(task: str, dataset: str, report: Report) -> list[str]:
    rows = [row for row in report["metrics"] if (row["task"], row["dataset"]) == (task, dataset)]
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["values"]))
    skipped = max(row.get("skipped", 0) for row in rows)
    note = f"; {skipped} broken records skipped" if skipped else ""
    sparsity = {variant["id"]: variant["sparsity"]["achieved"] for variant in report["variants"]}
    body = [
        [row["variant"], _percent(sparsity[row["variant"]]), _runtime(row), str(row["n"])]
        + [_interval(row, metric) for metric in metrics]
        for row in rows
    ]
    table = _table(["variant", "sparsity", "run by", "n", *map(title, metrics)], body, text_columns=1)
    return [f"### {task} ({dataset}{note})", table]


def _runtime(row: Metrics) -> str:
    name = "PyTorch" if row["runtime"] == "pytorch" else "ONNX Runtime"
    return f"{name}, {row['provider']}, {row['precision']}{_packed(row)}"


def _packed(row: Mapping[str, Any]) -> str:
    return f", {packing(row)}" if row["packed"] else ""


def _interval(row: Metrics, metric: str) -> str:
    if metric not in row["values"]:
        return "–"
    text = points(row["values"][metric])
    if metric in row["ci95"]:
        low, high = row["ci95"][metric]
        text += f" [{points(low)}, {points(high)}]"
    return text


def _sparsity(report: Report) -> str:
    pruned = [variant for variant in report["variants"] if variant["method"]]
    if not pruned:
        return ""
    modalities = list(dict.fromkeys(name for variant in pruned for name in variant["sparsity"]["per_modality"]))
    body = [
        [variant["id"], variant["method"] or "", variant["pattern"] or "", _percent(variant["ratio"])]
        + [_percent(variant["sparsity"]["achieved"], 4)]
        + [_percent(variant["sparsity"]["per_modality"].get(name)) for name in modalities]
        for variant in pruned
    ]
    table = _table(["variant", "method", "pattern", "asked", "achieved", *modalities], body, text_columns=3)
    text = f"## Sparsity\n\nShare of prunable weights removed.\n\n{table}"
    if costs := cost_table(report):
        intro = (
            "In brackets the share of the dense model's; a variant made for one task is held against the same parts."
        )
        text += f"\n\n## Parameters and FLOPs\n\n{intro}\n\n{_named_table(costs, text_columns=1)}"
    return text


def _graphs(report: Report) -> str:
    if not report["graphs"]:
        return ""
    body = [
        [
            f"`{row['file']}`",
            row["precision"] + _packed(row),
            _megabytes(row["bytes"]),
            _megabytes(row["dense_bytes"]),
            _percent(row["nonzero_fraction"]),
            f"{row['max_abs_diff']:.1e}",
            f"{row['cosine_min']:.6f}",
        ]
        for row in report["graphs"]
    ]
    columns = ["file", "precision", "size", "dense size", "nonzero", "max abs difference", "min cosine"]
    intro = "Differences are between ONNX Runtime and PyTorch on the same inputs. 1 MB = 1,000,000 bytes."
    if has_packed(report):
        intro += " `packing.json` beside packed graphs tells of every layer whether it is packed, and why not."
    return f"## ONNX graphs\n\n{intro}\n\n{_table(columns, body, text_columns=2)}"


def _throughput(report: Report) -> str:
    if not report["throughput"]:
        return ""
    body = []
    for row in report["throughput"]:
        body.append(
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
        )
    columns = ["variant", "graph", "run by", "batch", "dense p50 ms", "p50 ms", "p99 ms", "per s", "ratio", "verdict"]
    intro = (
        "Both sides exported the same way and timed in alternating blocks by the same provider at the same precision; "
        "ratio = dense time / compressed time, with its 95 % bootstrap interval."
    )
    if has_int8(report):
        intro += " Rows at int8-dynamic hold the dense graph in int8 against itself in fp32."
    text = f"## Throughput\n\n{intro}\n\n{_table(columns, body, text_columns=3)}"
    if beside := side_by_side(report):
        text += f"\n\n### Packed beside dynamic int8\n\n{_named_table(beside, text_columns=2)}"
    return text


def _stages(report: Report) -> str:
    if not report["stages"]:
        return ""
    body = [
        [
            row["name"] + (f" ({row['skipped']} broken records skipped)" if row.get("skipped") else ""),
            f"{row['seconds']:.1f}",
            _megabytes(row["peak_rss_bytes"]),
            "–" if row["peak_cuda_bytes"] is None else _megabytes(row["peak_cuda_bytes"]),
        ]
        for row in report["stages"]
    ]
    return f"## Stages\n\n{_table(['stage', 'seconds', 'peak memory', 'peak CUDA memory'], body, text_columns=1)}"


def _environment(report: Report) -> str:
    machine = report["environment"]
    gpu = f"{machine['gpu']} (driver {machine['driver']})" if machine["gpu"] else "none"
    lines = [
        f"- Python {machine['python']}, torch {machine['torch'] or 'absent'}, "
        f"onnxruntime {machine['onnxruntime'] or 'absent'} ({', '.join(machine['providers']) or 'no providers'})",
        f"- Processor: {machine['cpu']}, {machine['threads']} threads",
        f"- GPU: {gpu}",
    ]
    return "## Environment\n\n" + "\n".join(lines)


def _named_table(rows: Sequence[Mapping[str, Any]], text_columns: int) -> str:
    """Build a Markdown table of rows whose keys, alike in all of them, are the columns."""
    return _table(list(rows[0]), [[str(value) for value in row.values()] for row in rows], text_columns)


def _table(columns: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> str:
    """Build a Markdown table whose first columns are text (left) and the rest figures (right)."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(columns))]
    rows = [columns, rule, *body]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _percent(fraction: float | None, decimals: int = 2) -> str:
    return "–" if fraction is None else f"{100 * fraction:.{decimals}f} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
