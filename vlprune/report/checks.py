"""What a gate found, for people, pull requests and CI servers."""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from vlprune.report.gate import Check


PASSED, BROKEN = "pass", "FAIL"


def verdict(checks: Sequence[Check]) -> str:
    """Say in one line how a gate ended.

    Args:
        checks: what was judged.

    Returns:
        str: how many limits are kept; the broken ones by name.
    """
    broken = [check for check in checks if not check.passed]
    if not broken:
        return f"gate passed: {_count(checks)}"
    told = []
    for limit in dict.fromkeys(check.limit for check in broken):  # an example of each: the line may be cut short
        same = [check for check in broken if check.limit == limit]
        told.append(str(same[0]) + (f" (and {len(same) - 1} more)" if len(same) > 1 else ""))
    return f"gate failed, {len(broken)} of {_count(checks)}: {'; '.join(told)}"


def _count(checks: Sequence[Check]) -> str:
    return f"{len(checks)} check{'' if len(checks) == 1 else 's'}"


def rows(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Lay out checks for a table: each of the broken ones, then the worst of each kind of those that passed.

    Args:
        checks: what was judged.

    Returns:
        list[dict[str, str]]: ready to print.
    """
    kept: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        if check.passed:
            kept.setdefault((check.limit, check.variant, check.bound), []).append(check)
    return [
        *(_row(check, BROKEN if check.status == "fail" else check.status) for check in checks if not check.passed),
        *(_row(_worst(group), PASSED, len(group)) for group in kept.values()),
    ]


def _worst(group: Sequence[Check]) -> Check:
    """Of checks of one limit, that with the least or largest figure, as the limit's name says."""
    valued = [check for check in group if check.value is not None]
    choose = min if group[0].limit.startswith("min") else max
    return choose(valued, key=lambda check: check.value or 0) if valued else group[0]


def _row(check: Check, result: str, count: int = 1) -> dict[str, str]:
    alike = "one of" if check.value is None else "worst of"
    return {
        "": result,
        "limit": check.limit,
        "variant": check.variant,
        "of": check.subject,
        "measured": check.place,
        "allowed": check.bound,
        "found": check.found if count == 1 else f"{check.found} ({alike} {count})",
    }


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Give checks to machines.

    Args:
        checks: what was judged.

    Returns:
        dict[str, Any]: `passed`, `broken` (their number) and `checks`, each with the fields of `Check`.
    """
    broken = sum(not check.passed for check in checks)
    return {"passed": not broken, "broken": broken, "checks": [dict(vars(check)) for check in checks]}


def junit(checks: Sequence[Check]) -> str:
    """Write checks as JUnit XML: a suite, a case per check, a failure whose type is the status.

    Args:
        checks: what was judged.

    Returns:
        str: the text of the file.
    """
    broken = str(sum(not check.passed for check in checks))
    counts = {"tests": str(len(checks)), "failures": broken, "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "vlprune gate", **counts})
    for check in checks:
        name = " / ".join(filter(None, [check.variant, check.subject, check.place]))
        case = ElementTree.SubElement(suite, "testcase", {"classname": check.limit, "name": name})
        if not check.passed:
            ElementTree.SubElement(case, "failure", {"type": check.status, "message": str(check)})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(checks: Sequence[Check]) -> str:
    """Write checks for a pull request: the broken ones, and the others to be unfolded.

    Args:
        checks: what was judged.

    Returns:
        str: Markdown.
    """
    broken = [check for check in checks if not check.passed]
    head = f"{len(broken)} of {_count(checks)} failed" if broken else f"{_count(checks)} passed"
    blocks = [f"## vlprune gate: {head}"]
    if broken:
        blocks.append(markdown_table(rows(broken)))
    if kept := [check for check in checks if check.passed]:
        blocks += [f"<details>\n<summary>{_count(kept)} passed</summary>", markdown_table(rows(kept)), "</details>"]
    return "\n\n".join(blocks) + "\n"


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Write rows as a table.

    Args:
        rows: with the same keys.

    Returns:
        str: Markdown, in which no cell begins a tag or a column.
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")
