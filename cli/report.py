"""`vlprune report`: render the report of a run again."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def report(
    report: o.Report,
    output: o.ReportOutput = None,
    no_samples: o.NoSamples = False,
    json: o.Json = False,
) -> None:
    """Write report.json as one HTML page without scripts or network, or as Markdown.

    Every run writes report.html and report.md already; this serves runs of earlier versions, reports that lie alone,
    and pages to be passed on without the test samples.

    \b
    Example:
      vlprune report run --no-samples --output report-to-share.html
    """
    from vlprune.report.write import write_report

    written = write_report(report, output, samples=not no_samples)
    show({"written": str(written), "bytes": written.stat().st_size}, json)
