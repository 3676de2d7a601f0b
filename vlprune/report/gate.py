"""The gate: a report held against limits; what is missing, disturbed or uncertain never passes.

An entry of a limit that names nothing of the report is a failure: it would otherwise pass unseen. Units are those that
reports print: scores in points, a hundred times the shares of report.json.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlprune import names
from vlprune.errors import RequestError
from vlprune.fields import meant
from vlprune.report.limits import DEFAULT, FORMS, Drop, Limits
from vlprune.report.schema import Graph, Metrics, Report, Throughput, Variant
from vlprune.report.summary import packing


Status = Literal["pass", "fail", "inconclusive", "missing", "no evidence"]
ANYWHERE = frozenset({"pytorch", "onnxruntime", *names.PROVIDERS})  # what is not there is missing everywhere
ROUNDING = 1e-9  # of points; a drop of exactly the limit passes


@dataclass(frozen=True)
class Check:
    """One limit, held against one figure.

    Attributes:
        limit: name of the limit.
        status: only "pass" is one.
        variant: whose figure it is.
        subject: what it is of, as in "vqa / accuracy".
        place: where it was measured, as in "onnxruntime cpu, plain", or "".
        bound: what is allowed, in words.
        found: what was found, in words.
        value: the figure, in the unit of the limit; None where there is none.
    """

    limit: str
    status: Status
    variant: str
    subject: str
    place: str
    bound: str
    found: str
    value: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the limit is kept."""
        return self.status == "pass"

    def __str__(self) -> str:
        where = ", ".join(filter(None, [self.subject, self.place]))
        named = f"{self.status}: " if self.status in ("inconclusive", "no evidence") else ""
        allowed = "" if self.status == "missing" else f"; allowed: {self.bound}"
        return f"{self.limit} of {self.variant}{f' ({where})' if where else ''}: {named}{self.found}{allowed}"


@dataclass(frozen=True)
class _Item:
    """Something a limit can be judged on.

    Attributes:
        names: what limits may call it.
        judge: bound -> check.
        needs: a name that a limit has to use to mean it, or "".
    """

    names: frozenset[str]
    judge: Callable[[Any], Iterable[Check]]
    needs: str = ""


def judge(report: Report, limits: Limits, baseline: Report | None = None) -> list[Check]:
    """Hold a report against limits.

    Args:
        report: a valid report.
        limits: with one value at least.
        baseline: an earlier report, for scores.

    Returns:
        list[Check]: never empty; the gate is passed when all are.

    Raises:
        RequestError: there is nothing to judge, a variant is unknown, or the baseline is missing or unused.
    """
    against = limits.against
    if against is None:
        against = ["baseline"] if baseline else [row["id"] for row in report["variants"] if row["method"] is None]
    if "baseline" in against and baseline is None:
        raise RequestError("limits against a baseline need one: give --baseline with an earlier report")
    if baseline is not None and ("baseline" not in against or "max_metric_drop" not in limits.values):
        raise RequestError("a baseline was given, but no limit is held against it: see max_metric_drop and against")
    judges: dict[str, Callable[[_Subject], list[_Item]]] = {
        "min_sparsity": _sparsities,
        "max_metric_drop": lambda subject: _scores(subject, against, baseline),
        "max_bytes": _sizes,
        "min_throughput_ratio": _speeds,
        "max_abs_diff": _differences,
        "required_providers": _providers,
    }
    checks = []
    for variant in _variants(report, limits):
        for limit, value in limits.values.items():
            subject = _Subject(report, variant, limits.forms)
            checks += _apply(limit, value, variant["id"], judges[limit](subject))
    return checks


def _variants(report: Report, limits: Limits) -> list[Variant]:
    if limits.variants is not None:
        known = {row["id"]: row for row in report["variants"]}
        return [known[names.check("variant", variant, known)] for variant in limits.variants]
    compressed = [row for row in report["variants"] if row["method"] is not None]
    if not compressed:
        raise RequestError("the report has no compressed variant: there is nothing to judge")
    return [row for row in compressed if row["finetuned"]] or compressed


def _apply(limit: str, value: Any, variant: str, items: list[_Item]) -> list[Check]:
    """Judge every item by all values that name it; what is named and not there is missing."""
    used: set[tuple[str, ...]] = set()
    checks: list[Check] = []
    for item in items:
        for path, bound in _bounds(value, item.names):
            if not item.needs or item.needs in path:
                used.add(path)
                checks += item.judge(bound)
    known = sorted({name for item in items for name in item.names})
    for path in _paths(value):
        if path not in used and (DEFAULT not in path or not used):
            what = ".".join(path) or "anything it could be judged on"
            near = [name for name in path if name not in known and name != DEFAULT]
            hint = f" ({meant(near[0], known)})" if near and known else ""
            checks.append(
                Check(limit, "missing", variant, ".".join(path), "", "there", f"the report lacks {what}{hint}")
            )
    return checks


def _bounds(value: Any, called: frozenset[str], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values that hold for something with these names, each with its path."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key in [key for key in value if key in called] or [key for key in value if key == DEFAULT]:
        yield from _bounds(value[key], called, (*path, key))


def _paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(value, dict):
        yield path
        return
    for key, item in value.items():
        yield from _paths(item, (*path, key))


class _Subject:
    """One variant, and the rows that tell of it."""

    def __init__(self, report: Report, variant: Variant, forms: list[str] | None) -> None:
        self.report = report
        self.variant = variant
        self.id = variant["id"]
        self.metrics = [row for row in report["metrics"] if row["variant"] == self.id and _in(row, forms)]
        self.graphs = [row for row in report["graphs"] if row["variant"] == self.id and _in(row, forms)]
        self.timed = [row for row in report["throughput"] if row["variant"] == self.id and _in(row, forms)]
        self.exported = list(dict.fromkeys((row["task"], row["graph"]) for row in report["graphs"]))
        rows: list[Any] = [*self.metrics, *self.graphs, *self.timed]
        found = dict.fromkeys(packing(row) for row in rows)
        self.shipped = [form for form in found if form != "plain"] or list(found)
        self.expected = self.shipped or forms or ["plain"]

    def check(self, limit: str, status: Status, subject: str, place: str, bound: str, found: str, value: Any) -> Check:
        return Check(limit, status, self.id, subject, place, bound, found, value)

    def missing(self, limit: str, subject: str, place: str, what: str) -> Callable[[Any], list[Check]]:
        """A judge that fails whatever the bound: the figure is not there."""
        return lambda bound: [self.check(limit, "missing", subject, place, "there", what, None)]


def _forms(row: Mapping[str, Any]) -> frozenset[str]:
    """The names of a row's form: "packed", or its precision and "fused", else "plain"."""
    if row["packed"]:
        return frozenset({"packed"})
    marks = {row["precision"]} - {"fp32"} | ({"fused"} if row.get("fused") else set())
    return frozenset(marks or {"plain"})


def _in(row: Any, forms: list[str] | None) -> bool:
    return forms is None or bool(_forms(row) & set(forms))


def _place(row: Mapping[str, Any]) -> str:
    """Where a row was measured, in words."""
    parts = [row.get("runtime"), row.get("provider"), packing(row), f"batch {row['batch']}" if "batch" in row else None]
    return " ".join(part for part in parts if part)


def _called(row: Mapping[str, Any], *more: str) -> frozenset[str]:
    """What limits may call a row."""
    told = {row.get("task"), row.get("graph"), row.get("provider"), row.get("runtime"), row["precision"], *more}
    return frozenset({name for name in told if name} | _forms(row))


def _sparsities(subject: _Subject) -> list[_Item]:
    whole = subject.variant["sparsity"]
    tasks = frozenset(row["task"] for row in subject.report["metrics"] + subject.report["graphs"])
    parts: list[tuple[str, frozenset[str], Any]] = [("", tasks, whole)]
    if per_task := subject.variant.get("per_task"):
        parts = [(task, frozenset({task}), part["sparsity"]) for task, part in per_task.items()]

    def item(name: str, called: frozenset[str], share: float, needs: str = "") -> _Item:
        def verdict(bound: float) -> list[Check]:
            # A ratio is met to one weight per group: 0.9 may be 0.8999998.
            status: Status = "pass" if round(share, 4) >= bound else "fail"
            named = name or "all prunable layers"
            return [subject.check("min_sparsity", status, named, "", f"at least {bound:g}", f"{share:.4f}", share)]

        return _Item(called | {needs} - {""}, verdict, needs)

    items = []
    for name, called, sparsity in parts:
        items.append(item(name, called, sparsity["achieved"]))
        for modality, share in sparsity["per_modality"].items():
            items.append(item(f"{name} / {modality}".removeprefix(" / "), called, share, modality))
    return items


def _scores(subject: _Subject, against: list[str], baseline: Report | None) -> list[_Item]:
    items = []
    for other in against:
        rows = (baseline or subject.report)["metrics"] if other == "baseline" else subject.report["metrics"]
        wanted = [row for row in rows if row["variant"] == (subject.id if other == "baseline" else other)]
        scored = {(row["task"], metric): None for row in [*wanted, *subject.metrics] for metric in row["values"]}
        if not wanted:
            judge = subject.missing("max_metric_drop", "", "", f"no scores of {other} to compare with")
            items.append(_Item(ANYWHERE.union(FORMS, names.PRECISIONS, *scored), judge))
        for task, metric in scored if wanted else ():
            ours = [row for row in subject.metrics if row["task"] == task]
            for row in ours:
                verdict = _drop_judge(subject, row, metric, other, [r for r in wanted if r["task"] == task])
                items.append(_Item(_called(row, metric), verdict))
            if not ours:
                what = f"{task} was not scored"
                judge = subject.missing("max_metric_drop", f"{task} / {metric}", "", what)
                items.append(_Item(ANYWHERE.union(FORMS, names.PRECISIONS, (task, metric)), judge))
    return items + _unscored(subject)


def _unscored(subject: _Subject) -> list[_Item]:
    """What was exported and never scored in ONNX Runtime: scores in PyTorch say nothing of it."""
    if subject.report["model"]["random_weights"]:
        return []
    done = {(row["task"], packing(row)) for row in subject.metrics if row["runtime"] == "onnxruntime"}
    found = {(row["task"], packing(row)): row for row in subject.graphs}
    metrics = {metric for row in subject.report["metrics"] for metric in row["values"]}
    return [
        _Item(
            ANYWHERE.union(_forms(row), metrics, (task, row["precision"])),
            subject.missing("max_metric_drop", task, f"onnxruntime {form}", "its graphs were not scored"),
        )
        for (task, form), row in found.items()
        if (task, form) not in done
    ]


def _drop_judge(
    subject: _Subject, row: Metrics, metric: str, other: str, wanted: list[Metrics]
) -> Callable[[Drop], list[Check]]:
    """Make the judge of one score; its reference was computed the same way, or else by PyTorch."""

    def alike(candidate: Metrics) -> bool:
        same = all(candidate[key] == row[key] for key in ("runtime", "provider"))  # type: ignore[literal-required]
        return same and packing(candidate) == (packing(row) if other == "baseline" else "plain")

    candidates = [r for r in wanted if alike(r)] or [r for r in wanted if r["runtime"] == "pytorch"] or wanted
    name, place = f"{row['task']} / {metric}", f"{_place(row)}, against {other}"

    def verdict(drop: Drop) -> list[Check]:
        def check(status: Status, bound: str, found: str, value: float | None) -> list[Check]:
            return [subject.check("max_metric_drop", status, name, place, bound, found, value)]

        values = [r["values"][metric] for r in candidates if metric in r["values"]]
        if metric not in row["values"]:
            return check("missing", "there", f"the report lacks {metric}", None)
        if not values:
            return check("missing", "there", f"{other} has no {metric} to compare with", None)
        if different := [r for r in candidates if (r["dataset"], r["n"]) != (row["dataset"], row["n"])]:
            data, count = different[0]["dataset"], different[0]["n"]
            found = f"scored on {row['n']} of {row['dataset']}, {other} on {count} of {data}"
            return check("no evidence", "the same test data", found, None)
        reference, value = max(values), row["values"][metric]
        lost = 100 * (reference - value)
        status: Status = "pass" if lost <= drop.points(reference) + ROUNDING else "fail"
        change = f"{abs(lost):.4g} points {'below' if lost > 0 else 'above'}" if lost else "equal to"
        found = f"{100 * value:.2f}, {change} {100 * reference:.2f}"
        return check(status, f"at most {drop} below", found, lost)

    return verdict


def _gaps(subject: _Subject, rows: Sequence[Any], limit: str, lacks: str) -> list[_Item]:
    """An item for each graph that should be there in one of the forms that ship, and is not."""
    there = {(row["task"], row["graph"], packing(row)) for row in rows}
    return [
        _Item(
            ANYWHERE.union((task, graph, form), form.replace(",", "").split()),
            subject.missing(limit, f"{task} / {graph}", form, lacks),
        )
        for task, graph in subject.exported
        for form in subject.expected
        if (task, graph, form) not in there
    ]


def _sizes(subject: _Subject) -> list[_Item]:
    """All graphs of a task together, which is what a machine gets; a limit that names a graph is on that one."""

    def item(rows: Sequence[Graph], called: frozenset[str], name: str, needs: str = "") -> _Item:
        size = sum(row["bytes"] for row in rows)
        among = f" in {len(rows)} graphs" if len(rows) > 1 else ""

        def verdict(bound: int) -> list[Check]:
            status: Status = "pass" if size <= bound else "fail"
            found, allowed = f"{size:,} bytes{among}", f"at most {bound:,} bytes"
            return [subject.check("max_bytes", status, name, _place(rows[0]), allowed, found, size)]

        return _Item(called, verdict, needs)

    shipped: dict[tuple[str, str], list[Graph]] = {}
    for row in subject.graphs:
        if packing(row) in subject.shipped:
            shipped.setdefault((row["task"], packing(row)), []).append(row)
    items = []
    for (task, _), rows in shipped.items():
        items.append(item(rows, _called(rows[0]) - {rows[0]["graph"]}, f"{task} / all graphs"))
        items += [item([row], _called(row), f"{task} / {row['graph']}", row["graph"]) for row in rows]
    return items + _gaps(subject, subject.graphs, "max_bytes", "there is no such graph")


def _differences(subject: _Subject) -> list[_Item]:
    def item(row: Graph) -> _Item:
        def verdict(bound: float) -> list[Check]:
            difference = row["max_abs_diff"]
            status: Status = "pass" if difference <= bound else "fail"
            name, allowed = f"{row['task']} / {row['graph']}", f"at most {bound:g}"
            return [subject.check("max_abs_diff", status, name, _place(row), allowed, f"{difference:.3g}", difference)]

        return _Item(_called(row), verdict)

    items = [item(row) for row in subject.graphs]
    return items + _gaps(subject, subject.graphs, "max_abs_diff", "there is no such graph")


def _speeds(subject: _Subject) -> list[_Item]:
    def item(row: Throughput) -> _Item:
        def verdict(bound: float) -> list[Check]:
            low, high = row["ratio_ci95"]
            found = f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
            status: Status = "pass" if low >= bound else "fail" if high < bound else "inconclusive"
            if "note" in row:
                status, found = "no evidence", f"{found}, {row['note']}"
            name, allowed = f"{row['task']} / {row['graph']}", f"at least {bound:g}"
            return [subject.check("min_throughput_ratio", status, name, _place(row), allowed, found, row["ratio"])]

        return _Item(_called(row, f"batch {row['batch']}"), verdict)

    items = _gaps(subject, subject.timed, "min_throughput_ratio", "it was not timed")
    anywhere = {(row["task"], row["graph"]) for row in subject.timed}
    for provider in dict.fromkeys(row["provider"] for row in subject.timed):  # packed graphs run on the CPU alone
        rows = [row for row in subject.timed if row["provider"] == provider]
        shipped = [row for row in rows if packing(row) != "plain"] or rows
        items += [item(row) for row in shipped]
        there = {(row["task"], row["graph"]) for row in shipped}
        for task, graph in subject.exported:
            if (task, graph) in anywhere - there:
                judge = subject.missing("min_throughput_ratio", f"{task} / {graph}", provider, "it was not timed")
                items.append(_Item(frozenset({task, graph, provider}), judge))
    return items


def _providers(subject: _Subject) -> list[_Item]:
    """A provider counts for a task when it scored the graphs; for random weights, when it timed them."""
    random = subject.report["model"]["random_weights"]
    rows: list[Any] = [*subject.timed] if random else [r for r in subject.metrics if r["runtime"] == "onnxruntime"]
    what = "timed" if random else "scored"

    def item(task: str) -> _Item:
        ran = list(dict.fromkeys(row["provider"] for row in rows if row["task"] == task))

        def verdict(bound: list[str]) -> list[Check]:
            found = f"{what} on {', '.join(ran) or 'none'}"
            return [
                subject.check(
                    "required_providers", "pass" if provider in ran else "missing", task, "", provider, found, None
                )
                for provider in bound
            ]

        return _Item(frozenset({task}), verdict)

    told = [*subject.report["metrics"], *subject.report["graphs"], *subject.report["throughput"]]
    return [item(task) for task in dict.fromkeys(str(row["task"]) for row in told)]
