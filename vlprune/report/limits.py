"""The limits of a gate: a YAML file, and options, which win.

A limit is one value for all it can be judged on, or a mapping by names of tasks, metrics, graphs, providers,
modalities, precisions or forms of the weights, nested in any order; `default` stands for what its neighbours do not
name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlprune import names
from vlprune.errors import ProblemsError, RequestError
from vlprune.fields import Number, Optional, Rule, Several, Table, meant, shown, text
from vlprune.recipe import PROVIDER
from vlprune.yamlfile import read_yaml


Against = Literal["dense", "dense-finetuned", "baseline"]
FORMS = ("plain", "packed", "fused", *names.PRECISIONS[1:])
DEFAULT = "default"
DEEPEST = 6  # levels of a mapping
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
