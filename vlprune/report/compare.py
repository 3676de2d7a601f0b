"""Two reports side by side: what differs, and whether the intervals can tell."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlprune.report.schema import Report
from vlprune.report.summary import HEADLINES, packing


ONLY = ("only in A", "only in B")
MACHINE = ("cpu", "gpu", "threads", "torch", "onnxruntime")  # what times depend on


def compare(a: Report, b: Report) -> dict[str, Any]:
    """Compare two reports, row by row.

    Intervals that do not overlap tell a difference from chance; where they overlap, nothing is claimed. Ratios of
    throughput are to the dense model of their own report.

    Args:
        a: a valid report.
        b: another.

    Returns:
        dict[str, Any]: `notes` (what makes the two hard to compare), and rows with `a`, `b`, `difference` (B - A; of
            sizes B / A) and `says`: `scores` (points), `sparsity` (shares), `sizes` (bytes), `throughput` (ratios).
    """
    scores, sizes = list(_paired(_scores(a), _scores(b))), list(_paired(_sizes(a), _sizes(b)))
    return {
        "notes": list(_notes(a, b)),
        "scores": [_row(("variant", "task", "metric", "measured"), *pair, _score_says, 100) for pair in scores],
        "sparsity": [
            _row(("variant", "of"), *pair, lambda one, other: "" if one["value"] == other["value"] else "differs")
            for pair in _paired(_sparsities(a), _sparsities(b))
        ],
        "sizes": [_size_row(*pair) for pair in sizes],
        "throughput": [
            _row(("variant", "task", "graph", "measured"), *pair, _speed_says)
            for pair in _paired(_speeds(a), _speeds(b))
        ],
    }


Cells = dict[tuple[str, ...], dict[str, Any]]


def _paired(a: Cells, b: Cells) -> Iterator[tuple[tuple[str, ...], dict[str, Any] | None, dict[str, Any] | None]]:
    for key in dict.fromkeys([*a, *b]):
        yield key, a.get(key), b.get(key)


def _notes(a: Report, b: Report) -> Iterator[str]:
    for key in ("name", "checkpoint"):
        if a["model"][key] != b["model"][key]:  # type: ignore[literal-required]
            yield f"The models differ: {key} {a['model'][key]} and {b['model'][key]}."  # type: ignore[literal-required]
    if other := [key for key in MACHINE if a["environment"][key] != b["environment"][key]]:  # type: ignore[literal-required]
        told = "; ".join(f"{key} {a['environment'][key]} and {b['environment'][key]}" for key in other)  # type: ignore[literal-required]
        yield f"The machines differ ({told}): compare ratios, rather than times."


def _scores(report: Report) -> Cells:
    found: Cells = {}
    for row in report["metrics"]:
        place = f"{row['runtime']} {row['provider']} {packing(row)}"
        for metric, value in row["values"].items():
            cell = {"value": value, "ci95": row["ci95"].get(metric), "data": (row["dataset"], row["n"])}
            found.setdefault((row["variant"], row["task"], metric, place), cell)
    return found


def _sparsities(report: Report) -> Cells:
    found: Cells = {}
    for row in report["variants"]:
        if row["method"] is not None:
            parts = {"all prunable layers": row["sparsity"]["achieved"], **row["sparsity"]["per_modality"]}
            found |= {(row["id"], name): {"value": share} for name, share in parts.items()}
    return found


def _sizes(report: Report) -> Cells:
    return {
        (row["variant"], row["task"], row["graph"], packing(row)): {"value": row["bytes"]} for row in report["graphs"]
    }


def _speeds(report: Report) -> Cells:
    found: Cells = {}
    for row in report["throughput"]:
        place = f"{row['provider']} {packing(row)} batch {row['batch']}"
        cell = {"value": row["ratio"], "ci95": row["ratio_ci95"], "note": "note" in row}
        found.setdefault((row["variant"], row["task"], row["graph"], place), cell)
    return found


def _score_says(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if one["data"] != other["data"]:
        return f"other test data ({one['data'][1]} of {one['data'][0]}, {other['data'][1]} of {other['data'][0]})"
    return _intervals_say(one, other, "better", "worse")


def _speed_says(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if one["note"] or other["note"]:
        return "disturbed: no evidence"
    return _intervals_say(one, other, "faster", "slower")


def _intervals_say(one: Mapping[str, Any], other: Mapping[str, Any], above: str, below: str) -> str:
    if one["value"] == other["value"]:
        return "equal"
    if one["ci95"] is None or other["ci95"] is None:
        return "no interval"
    if other["ci95"][0] > one["ci95"][1]:
        return f"B {above}"
    return f"B {below}" if other["ci95"][1] < one["ci95"][0] else "no clear difference"


def _row(
    names: tuple[str, ...],
    key: tuple[str, ...],
    one: dict[str, Any] | None,
    other: dict[str, Any] | None,
    says: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
    times: int = 1,
) -> dict[str, Any]:
    def scaled(cell: dict[str, Any] | None, field: str) -> Any:
        value = None if cell is None else cell.get(field)
        return [times * end for end in value] if isinstance(value, list) else None if value is None else times * value

    row: dict[str, Any] = dict(zip(names, key, strict=True))
    row |= {"a": scaled(one, "value"), "b": scaled(other, "value")}
    if "ci95" in (one or other or {}):
        row |= {"a_ci95": scaled(one, "ci95"), "b_ci95": scaled(other, "ci95")}
    both = one is not None and other is not None
    row["difference"] = row["b"] - row["a"] if both else None
    row["says"] = says(one, other) if one is not None and other is not None else ONLY[one is None]
    return row


def _size_row(key: tuple[str, ...], one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any]:
    def says(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
        change = second["value"] - first["value"]
        return "equal" if not change else "B larger" if change > 0 else "B smaller"

    row = _row(("variant", "task", "graph", "form"), key, one, other, says)
    row["difference"] = row["b"] / row["a"] if row["a"] and row["b"] is not None else None
    return row


def tables(compared: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Lay out a comparison for people; of the scores those that stand for a task.

    Args:
        compared: of `compare`.

    Returns:
        dict[str, list[dict[str, str]]]: title -> rows, ready to print.
    """
    printers: dict[str, tuple[str, Callable[[Any], str], Callable[[Any], str]]] = {
        "scores": ("Scores x 100", lambda v: f"{v:.1f}", lambda v: f"{v:+.1f}"),
        "sparsity": ("Sparsity", lambda v: f"{v:.4f}", lambda v: f"{v:+.4f}"),
        "sizes": ("Size of graphs", lambda v: f"{v / 1e6:,.2f} MB", lambda v: f"x {v:.3f}"),
        "throughput": ("Dense time / compressed time", lambda v: f"{v:.3f}", lambda v: f"{v:+.3f}"),
    }
    found = {}
    for section, (title, value, change) in printers.items():
        rows = []
        for row in compared[section]:
            if "metric" in row and row["metric"] not in HEADLINES.get(row["task"], (row["metric"],)):
                continue
            cells = {name: row[name] for name in row if name not in (*"ab", "a_ci95", "b_ci95", "difference", "says")}
            for side in "ab":
                interval = row.get(f"{side}_ci95")
                cells[side.upper()] = "–" if row[side] is None else value(row[side])
                cells[side.upper()] += f" [{value(interval[0])}, {value(interval[1])}]" if interval else ""
            cells["B - A" if section != "sizes" else "B / A"] = (
                "–" if row["difference"] is None else change(row["difference"])
            )
            rows.append(cells | {"says": row["says"]})
        if rows:
            found[title] = rows
    return found
