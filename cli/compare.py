"""`vlprune compare`: two reports side by side."""

from vlprune.cli import options as o
from vlprune.cli.show import show
from vlprune.errors import RequestError


def compare(a: o.ReportA, b: o.ReportB, markdown: o.Markdown = False, json: o.Json = False) -> None:
    """Hold the reports of two runs side by side: scores, sparsity, sizes, throughput.

    A difference is called one where the 95 % intervals do not overlap. Ratios of throughput are to the dense model of
    each report.

    \b
    Examples:
      vlprune compare main/report.json run
      vlprune compare main/report.json run --markdown >> "$GITHUB_STEP_SUMMARY"
    """
    if markdown and json:
        raise RequestError("--markdown and --json exclude each other: give one of them")
    from vlprune.report.checks import markdown_table
    from vlprune.report.compare import compare as compared
    from vlprune.report.compare import tables
    from vlprune.report.read import read_report

    found = compared(read_report(a), read_report(b))

    def render(_: object) -> None:
        from vlprune.report.terminal import console, table

        screen = console()
        for note in (f"A is {a}, B is {b}.", *found["notes"]):
            screen.print(note, markup=False, soft_wrap=True)
        for title, rows in tables(found).items():
            screen.print(table(title, rows, text_columns=len(rows[0]) - 4))

    def render_markdown(_: object) -> None:
        blocks = [f"# A is `{a}`, B is `{b}`", *found["notes"]]
        for title, rows in tables(found).items():
            blocks += [f"## {title}", markdown_table(rows)]
        print("\n\n".join(blocks))

    show(found, json, render_markdown if markdown else render)
