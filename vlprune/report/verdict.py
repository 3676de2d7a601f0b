"""The verdict at a glance: of each compressed model what it lost, how large it is, how fast."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlprune.report.schema import Metrics, Report, Variant
from vlprune.report.summary import base_id, headline, packing, points, title, verdict


Side = Literal["lower", "higher", "alike"]


@dataclass(frozen=True)
class Change:
    """One headline metric before and after.

    Attributes:
        task: the task.
        metric: its key.
        dense: id of the dense variant: fine-tuned alike, where there is one.
        before: its score in PyTorch.
        after: the compressed model's, fine-tuned where it was.
        side: "lower" or "higher" where the 95 % intervals are apart, else "alike"; None without intervals.
    """

    task: str
    metric: str
    dense: str
    before: float
    after: float
    side: Side | None

    def __str__(self) -> str:
        words = {
            "lower": "intervals apart",
            "higher": "intervals apart",
            "alike": "intervals overlap",
            None: "no intervals",
        }[self.side]
        change = f"{100 * (self.after - self.before):+.1f}".replace("-", "\N{MINUS SIGN}")
        scores = f"{points(self.before)} → {points(self.after)}"
        return f"{self.task} {title(self.metric)} {scores} ({change}; {words})"


@dataclass(frozen=True)
class Size:
    """The graphs of all tasks in one form, held against the dense ones.

    Attributes:
        form: "plain", "packed fp32", a precision.
        size: bytes.
        dense: bytes of the dense graphs.
    """

    form: str
    size: int
    dense: int

    @property
    def percent(self) -> float:
        """Share of the dense graphs' size."""
        return 100 * self.size / max(self.dense, 1)

    @property
    def text(self) -> str:
        """Both sizes."""
        return f"{self.size / 1e6:,.2f} of {self.dense / 1e6:,.2f} MB"

    def __str__(self) -> str:
        return f"{self.form}: {self.text} ({self.percent:.1f} %)"


@dataclass(frozen=True)
class Speed:
    """The timings of one form on one provider.

    Attributes:
        form: see `Size`.
        provider: "cpu", "cuda", "tensorrt".
        ratios: verdict -> ratios of the timings that have it, smallest first.
    """

    form: str
    provider: str
    ratios: dict[str, list[float]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, str]:
        """Verdict -> in how many timings, and the ratios; losses like gains."""
        told = {}
        for name in ("faster", "slower", "no measurable difference", "disturbed"):
            if ratios := self.ratios.get(name):
                low, high = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
                span = "" if name == "disturbed" else f" ({low if low == high else f'{low} to {high}'} ×)"
                told[name] = f"{name} in {len(ratios)}{span}"
        return told

    def __str__(self) -> str:
        total = sum(map(len, self.ratios.values()))
        return f"{self.form}, {self.provider}: of {total} timings " + ", ".join(self.parts.values())


@dataclass(frozen=True)
class Verdict:
    """What one compressed model lost and gained.

    Attributes:
        variant: its row, as pruned.
        changes: per task and headline metric, as far as both sides were scored.
        sizes: per form, as far as it was exported.
        speeds: per form and provider, as far as it was timed.
    """

    variant: Variant
    changes: list[Change]
    sizes: list[Size]
    speeds: list[Speed]


def verdicts(report: Report) -> list[Verdict]:
    """Sum up every compressed model.

    Args:
        report: a valid report.

    Returns:
        list[Verdict]: in the order of the report.
    """
    bases: dict[str, Variant] = {}
    for variant in report["variants"]:
        if variant["method"]:
            bases.setdefault(base_id(variant), variant)
    return [
        Verdict(variant, _changes(report, base), _sizes(report, base), _speeds(report, base))
        for base, variant in bases.items()
    ]


def _changes(report: Report, base: str) -> list[Change]:
    if report["model"]["random_weights"]:
        return []
    found = []
    for task in dict.fromkeys(row["task"] for row in report["metrics"]):
        rows = [row for row in report["metrics"] if row["task"] == task]
        for metric in headline(task, rows):
            # A fine-tuned model is held against the dense one that got the same training.
            pairs = ((f"{base}-finetuned", "dense-finetuned"), (f"{base}-finetuned", "dense"), (base, "dense"))
            for compressed, dense in pairs:
                before, after = _scored(rows, dense, metric), _scored(rows, compressed, metric)
                if before and after:
                    values = before["values"][metric], after["values"][metric]
                    found.append(Change(task, metric, dense, *values, _side(before, after, metric)))
                    break
    return found


def _scored(rows: list[Metrics], variant: str, metric: str) -> Metrics | None:
    for row in rows:
        if row["variant"] == variant and row["runtime"] == "pytorch" and metric in row["values"]:
            return row
    return None


def _side(before: Metrics, after: Metrics, metric: str) -> Side | None:
    if metric not in before["ci95"] or metric not in after["ci95"]:
        return None
    (low, high), (lowest, highest) = before["ci95"][metric], after["ci95"][metric]
    return "lower" if highest < low else "higher" if lowest > high else "alike"


def _sizes(report: Report, base: str) -> list[Size]:
    totals: dict[str, list[int]] = {}
    for row in _shipped(report["graphs"], base):
        total = totals.setdefault(packing(row), [0, 0])
        total[0] += row["bytes"]
        total[1] += row["dense_bytes"]
    return [Size(form, size, dense) for form, (size, dense) in totals.items()]


def _speeds(report: Report, base: str) -> list[Speed]:
    found: dict[tuple[str, str], Speed] = {}
    for row in sorted(_shipped(report["throughput"], base), key=lambda row: row["ratio"]):
        speed = found.setdefault((packing(row), row["provider"]), Speed(packing(row), row["provider"]))
        speed.ratios.setdefault(verdict(row), []).append(row["ratio"])
    order = [(packing(row), row["provider"]) for row in _shipped(report["throughput"], base)]
    return [found[key] for key in dict.fromkeys(order)]


def _shipped(rows: Any, base: str) -> list[Mapping[str, Any]]:
    """The rows of a compressed model, of the fine-tuned one where there are any."""
    tuned = [row for row in rows if row["variant"] == f"{base}-finetuned"]
    return tuned or [row for row in rows if row["variant"] == base]
