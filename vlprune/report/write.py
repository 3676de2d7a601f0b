"""report.html or report.md of a run, rendered again from its report.json."""

from pathlib import Path

from vlprune.errors import RequestError
from vlprune.files import atomic_path
from vlprune.report.html import render_html
from vlprune.report.manifest import MANIFEST, update_manifest
from vlprune.report.markdown import render_markdown
from vlprune.report.read import REPORT, read_report


SUFFIXES = (".html", ".md")


def write_report(source: Path | str, output: Path | str | None = None, samples: bool = True) -> Path:
    """Render a report as one HTML page, or as Markdown.

    The manifest of the run, where the file lies in one, is told of it.

    Args:
        source: a run directory, or a report.json; small images and the recipe are looked for beside it.
        output: a .html or .md file; None = report.html beside report.json.
        samples: show test samples, of which a page to be passed on may have to be free.

    Returns:
        Path: what was written.

    Raises:
        RequestError: there is no valid report, or the output is neither .html nor .md.
    """
    path = Path(source)
    path = path / REPORT if path.is_dir() else path
    target = path.with_name("report.html") if output is None else Path(output)
    if target.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{target} is neither .html nor .md: choose another --output")
    if target.is_dir():
        raise RequestError(f"{target} is a folder: choose another --output")
    report = read_report(path)
    markdown = target.suffix.lower() == ".md"
    text = render_markdown(report) if markdown else render_html(report, path.parent, samples)
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    inside = target.resolve().is_relative_to(path.parent.resolve())
    if inside and (path.parent / MANIFEST).is_file():
        update_manifest(path.parent, target)
    return target
