"""report.md: the report as a comment on a pull request shows it: the verdict, and details to be unfolded."""

from collections.abc import Sequence

from vlprune.report.schema import Report
from vlprune.report.sheets import (
    Sheet,
    beside_sheet,
    cost_sheet,
    environment_lines,
    graph_sheet,
    percent,
    precision_sheet,
    score_sheet,
    sparsity_sheet,
    square_sheet,
    stage_sheet,
    task_sheets,
    throughput_sheet,
)
from vlprune.report.summary import RANDOM, notes
from vlprune.report.verdict import verdicts


def render_markdown(report: Report) -> str:
    """Write a report as Markdown.

    Args:
        report: a valid report.

    Returns:
        str: the text of report.md.
    """
    random = report["model"]["random_weights"]
    scores = score_sheet(report)
    by_precision = None if random else precision_sheet(report)
    tasks = [] if random else [_section(sheet, "###") for sheet in task_sheets(report)]
    blocks = [
        *_head(report),
        *(_section(sheet) for sheet in (scores, by_precision) if sheet),
        _folded("All scores", tasks),
        _folded("Sparsity", [_section(sheet) for sheet in (sparsity_sheet(report), cost_sheet(report)) if sheet]),
        _folded("ONNX graphs", [_section(sheet) for sheet in (graph_sheet(report),) if sheet]),
        _folded(
            "Throughput",
            [
                _section(sheet, rank)
                for sheet, rank in (
                    (throughput_sheet(report), "##"),
                    (beside_sheet(report), "###"),
                    (square_sheet(report), "###"),
                )
                if sheet
            ],
        ),
        _folded("Stages", [_section(sheet) for sheet in (stage_sheet(report),) if sheet]),
        _folded("Environment", [_environment(report)]),
    ]
    text = "\n\n".join(block for block in blocks if block) + "\n"
    return text.encode(errors="replace").decode()  # JSON may hold halves of characters, files may not


def _head(report: Report) -> list[str]:
    model = report["model"]
    lines = [f"# Compression of {_text(model['name'])}"]
    for found in verdicts(report):
        achieved = percent(found.variant["sparsity"]["achieved"])
        facts = [*found.changes, *found.sizes, *found.speeds]
        head = f"**{_text(found.variant['id'])}**: {achieved} of the prunable weights removed"
        lines.append("\n".join([head, *(["", *(f"- {_text(str(fact))}" for fact in facts)] if facts else [])]))
    lines.append(
        f"Family {_text(model['family'])}, checkpoint {_text(model['checkpoint'])}; {model['parameters']:,} "
        f"parameters, {model['prunable_parameters']:,} of them prunable; seed {report['seed']}."
    )
    if model["random_weights"]:
        lines.append(f"**{RANDOM}**")
    return [*lines, *notes(report)]


def _environment(report: Report) -> str:
    return "## Environment\n\n" + "\n".join(f"- {what}: {_text(which)}" for what, which in environment_lines(report))


def _folded(summary: str, blocks: Sequence[str]) -> str:
    """Hide blocks until they are asked for; the empty lines let Markdown be read inside HTML."""
    if not blocks:
        return ""
    return "\n\n".join([f"<details>\n<summary>{summary}</summary>", *blocks, "</details>"])


def _section(sheet: Sheet, rank: str = "##") -> str:
    """Build a heading, the introduction and a table: texts to the left, figures to the right."""
    rule = ["---" if index < sheet.text_columns else "---:" for index in range(len(sheet.columns))]
    rows = [sheet.columns, rule, *sheet.body]
    table = "\n".join("| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n\n".join(part for part in (f"{rank} {_text(sheet.name)}", sheet.intro, table) if part)


def _text(text: str) -> str:
    """One line, in which no tag begins."""
    return " ".join(text.split()).replace("<", "&lt;")
