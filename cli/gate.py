"""`vlprune gate`: hold a report against limits."""

import os
from errno import EDQUOT, ENOSPC
from pathlib import Path

from vlprune.cli import options as o
from vlprune.cli.show import show
from vlprune.errors import GateError, MachineError, RequestError


WIDE = 120  # columns of a terminal; in fewer a table would fold every cell


def gate(
    report: o.Report,
    limits: o.Limits = None,
    baseline: o.Baseline = None,
    variant: o.Variants = None,
    against: o.Against = None,
    form: o.Forms = None,
    min_sparsity: o.MinSparsity = None,
    max_metric_drop: o.MaxMetricDrop = None,
    max_bytes: o.MaxBytes = None,
    min_throughput_ratio: o.MinThroughputRatio = None,
    max_abs_diff: o.MaxAbsDiff = None,
    required_providers: o.RequiredProviders = None,
    junit: o.Junit = None,
    json: o.Json = False,
) -> None:
    """Compare the report of a run with limits; exit code 1 when one is broken.

    Scores are in points, as printed: 2 is from 91.5 to 89.5. What the report lacks is a failure. docs/ci.md explains
    the limits; all that is wrong with a file of them is told at once: a summary, then a line per problem (exit code 2).
    A summary is appended to the file named by $GITHUB_STEP_SUMMARY, where that is set.

    \b
    Examples:
      vlprune gate run --limits gate.yaml --baseline main/report.json --junit gate.xml
      vlprune gate run/report.json --min-sparsity 0.9 --max-metric-drop 5% --max-bytes 20MB
      vlprune gate run --max-metric-drop retrieval=2,captioning.cider=5% --min-throughput-ratio cpu=1.2
    """
    from vlprune.report import checks as results
    from vlprune.report.gate import judge
    from vlprune.report.limits import by_option, read_limits
    from vlprune.report.read import read_report

    given = {
        "variant": o.as_list(variant),
        "against": o.as_list(against),
        "form": o.as_list(form),
        "min_sparsity": by_option(min_sparsity),
        "max_metric_drop": by_option(max_metric_drop),
        "max_bytes": by_option(max_bytes),
        "min_throughput_ratio": by_option(min_throughput_ratio),
        "max_abs_diff": by_option(max_abs_diff),
        "required_providers": o.as_list(required_providers),
    }
    chosen = read_limits(limits, given)
    checks = judge(read_report(report), chosen, None if baseline is None else read_report(baseline))
    if junit is not None:
        from vlprune.files import atomic_path

        if junit.is_dir():
            raise RequestError(f"{junit} is a folder: give a file for --junit")
        with atomic_path(junit) as temporary:
            temporary.write_text(results.junit(checks), encoding="utf-8")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _append(Path(summary), results.markdown(checks))
    verdict = results.verdict(checks)
    passed = all(check.passed for check in checks)

    def render(found: object) -> None:
        from vlprune.report.terminal import console, table

        screen = console()
        for variant in dict.fromkeys(check.variant for check in checks):
            rows = results.rows([check for check in checks if check.variant == variant])
            shown = [{key: cell for key, cell in row.items() if key != "variant"} for row in rows]
            if screen.width >= WIDE:
                screen.print(table(variant, shown, text_columns=6))
                continue
            screen.print(variant, style="bold", markup=False)
            for row in shown:
                where = ", ".join(filter(None, (row["of"], row["measured"])))
                screen.print(
                    f"  {row['']}: {row['limit']} ({where}): {row['found']}; allowed: {row['allowed']}", markup=False
                )
        if passed:
            screen.print(verdict, markup=False)

    show(results.as_json(checks), json, render)
    if not passed:
        raise GateError(verdict)


def _append(path: Path, text: str) -> None:
    """Add to the summary of a step, which other commands write to as well."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        kind = MachineError if error.errno in (ENOSPC, EDQUOT) else RequestError
        raise kind(f"cannot write {path} ({error.strerror}), named by $GITHUB_STEP_SUMMARY") from error
