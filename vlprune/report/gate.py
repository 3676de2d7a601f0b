"""The gate: a report, limits, and whether each is kept; what is missing or uncertain never passes.

A limit is one value for all it can be judged on, or a mapping by names of tasks, metrics, graphs, providers,
modalities, precisions or forms of the weights, nested in any order; `default` stands for what its neighbours do not
name. An entry that names nothing of the report is a failure: it would otherwise pass unseen.

Units are those that reports print: scores in points, a hundred times the shares of report.json.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlprune import names
from vlprune.errors import ProblemsError, RequestError
from vlprune.fields import Number, Optional, Rule, Several, Table, meant, shown, text
from vlprune.recipe import PROVIDER
from vlprune.report.schema import Graph, Metrics, Report, Throughput, Variant
from vlprune.report.summary import packing
from vlprune.yamlfile import read_yaml


Status = Literal["pass", "fail", "inconclusive", "missing", "no evidence"]
Against = Literal["dense", "dense-finetuned", "baseline"]
FORMS = ("plain", "packed", "fused", *names.PRECISIONS[1:])
ANYWHERE = frozenset({"pytorch", "onnxruntime", *names.PROVIDERS})  # what is not there is missing everywhere
DEFAULT = "default"
DEEPEST = 6  # levels of a mapping
ROUNDING = 1e-9  # of points; a drop of exactly the limit passes
UNITS = {"": 1, "b": 1} | {f"{letter}b": 1000**n for n, letter in enumerate("kmg", 1)}
UNITS |= {f"{letter}ib": 1024**n for n, letter in enumerate("kmg", 1)}


@dataclass(frozen=True)
class Drop:
    """How much a score may lose.

    Attributes:
        amount: points, or percent of the reference.
        relative: it is percent.
    """

    amount: float
    relative: bool = False

    def points(self, reference: float) -> float:
        """Tell what a reference may lose.

        Args:
            reference: score as in report.json.

        Returns:
            float: points.
        """
        return self.amount * reference if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount:g} {'%' if self.relative else 'points'}"


@dataclass(frozen=True)
class Limits:
    """What a report is held against.

    Attributes:
        values: limit -> value, or nested mapping of names to values.
        variants: ids of the variants that are judged; None = all compressed ones that ship: the fine-tuned ones, or
            all where nothing was fine-tuned.
        against: what scores are compared with; None = the baseline where one is given, else every dense variant of the
            report.
        forms: of graphs, see `FORMS`; None = scores and differences in all forms; sizes and speeds in all but "plain",
            where a variant has others.
    """

    values: Mapping[str, Any]
    variants: list[str] | None = None
    against: list[str] | None = None
    forms: list[str] | None = None


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


# --- limits from files and options ------------------------------------------------------------------------------------


def _drop(name: str, value: Any, problems: list[str]) -> Any:
    percent = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?%", value) if isinstance(value, str) else None
    if percent:
        return Drop(float(percent[1]), relative=True)
    rule = Number(lambda drop: drop >= 0, "is no drop: give points of 0 or more, as in 2, or percent, as in 5%")
    amount = rule(name, value, problems)
    return Drop(amount) if isinstance(amount, float) else amount


def _bytes(name: str, value: Any, problems: list[str]) -> Any:
    written = (
        re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]?i?b?)", str(value).lower()) if _sized(value) else None
    )
    if written is None or written[2] not in UNITS:
        problems.append(f"{name} {shown(value)} is no size: give bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
        return value
    return int(float(written[1]) * UNITS[written[2]])


def _sized(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and len(shown(value)) < 40


@dataclass(frozen=True)
class Nested:
    """A value, or a mapping of names to such.

    Attributes:
        rule: of the values.
    """

    rule: Rule

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `vlprune.fields.Rule`."""
        return self._checked(name, value, problems, DEEPEST)

    def _checked(self, name: str, value: Any, problems: list[str], levels: int) -> Any:
        if not isinstance(value, dict):
            return self.rule(name, value, problems)
        if not value or not levels:
            problems.append(f"{name} is {'nested too deeply' if value else 'empty'}: give a value, or values by name")
            return value
        for key in value:
            text(f"a name in {name}:", key, problems)
        return {key: self._checked(f"{name}.{key}", item, problems, levels - 1) for key, item in value.items()}


def _one_of(known: Sequence[str], kind: str) -> Rule:
    def rule(name: str, value: Any, problems: list[str]) -> Any:
        if value not in known:
            problems.append(f"{name} {shown(value)} is no {kind}: {meant(value, known)}")
        return value

    return rule


LIMITS: dict[str, Rule] = {
    "min_sparsity": Nested(
        Number(lambda share: 0 <= share <= 1, "is no share: give a number from 0 to 1, as in 0.9 for 90 %")
    ),
    "max_metric_drop": Nested(_drop),
    "max_bytes": Nested(_bytes),
    "min_throughput_ratio": Nested(
        Number(lambda ratio: ratio > 0, "is no ratio: give dense time / compressed time, as in 0.95 or 1.5")
    ),
    "max_abs_diff": Nested(Number(lambda diff: diff >= 0, "is no difference: give a number of 0 or more, as in 1e-4")),
    "required_providers": Nested(Several(PROVIDER)),
}
SETTINGS: dict[str, Rule] = {
    "variant": Optional(Several(text)),
    "against": Optional(Several(_one_of(get_args(Against), "reference"))),
    "form": Optional(Several(_one_of(FORMS, "form of graphs"))),
}


def read_limits(path: Path | str | None, options: Mapping[str, Any] | None = None) -> Limits:
    """Read limits from a file, and from options, which win.

    Args:
        path: YAML; None = there is none.
        options: limits and settings by their keys in the file, as a command line gives them; None = not given.

    Returns:
        Limits: one at least.

    Raises:
        RequestError: there is no limit, or the file cannot be read.
        ProblemsError: all that is wrong with their keys and values.
    """
    content = {} if path is None else read_yaml(path)
    where = "the command line" if path is None else str(path)
    content = {} if content is None else content
    if isinstance(content, dict):
        content = content | {key: value for key, value in (options or {}).items() if value is not None}
    problems: list[str] = []
    checked = Table(LIMITS | SETTINGS)("", content, problems)
    if problems:
        raise ProblemsError(where, problems)
    values = {key: value for key, value in checked.items() if key in LIMITS}
    if not values:
        raise RequestError(f"no limit in {where}: a gate without one proves nothing; give {', '.join(LIMITS)}")
    return Limits(values, checked.get("variant"), checked.get("against"), checked.get("form"))


def by_option(given: str | None) -> Any:
    """Read the value of a limit as a command line gives it.

    Args:
        given: a value, or NAME=VALUE pairs separated by commas; a dot in NAME nests, as in `retrieval.itm=1.2`; None =
            nothing.

    Returns:
        Any: what would stand in the file.

    Raises:
        RequestError: a name is there twice.
    """
    if given is None or "=" not in given:
        return None if given is None else _scalar(given.strip())
    tree: dict[str, Any] = {}
    for pair in given.split(","):
        name, _, value = pair.partition("=")
        *outer, last = [part.strip() for part in name.split(".")]
        place = tree
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                break
        if not isinstance(place, dict) or last in place:
            raise RequestError(f"{given!r:.80} names {name.strip()} twice: name it once")
        place[last] = _scalar(value.strip())
    return tree


def _scalar(value: str) -> Any:
    try:
        return int(value) if re.fullmatch("[0-9]{1,15}", value) else float(value)
    except ValueError:
        return value


# --- judging ----------------------------------------------------------------------------------------------------------


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
    checks = []
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
        for form in subject.shipped or ["plain"]
        if (task, graph, form) not in there
    ]


def _sizes(subject: _Subject) -> list[_Item]:
    def item(row: Graph) -> _Item:
        def verdict(bound: int) -> list[Check]:
            status: Status = "pass" if row["bytes"] <= bound else "fail"
            name, found = f"{row['task']} / {row['graph']}", f"{row['bytes']:,} bytes"
            return [
                subject.check("max_bytes", status, name, _place(row), f"at most {bound:,} bytes", found, row["bytes"])
            ]

        return _Item(_called(row), verdict)

    items = [item(row) for row in subject.graphs if packing(row) in subject.shipped]
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
    for provider in dict.fromkeys(row["provider"] for row in subject.timed):  # packed graphs run on the CPU alone
        rows = [row for row in subject.timed if row["provider"] == provider]
        shipped = [row for row in rows if packing(row) != "plain"] or rows
        items += [item(row) for row in shipped]
        there = {(row["task"], row["graph"]) for row in shipped}
        for task, graph in subject.exported:
            if (task, graph) not in there:
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
