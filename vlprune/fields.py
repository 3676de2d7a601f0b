"""What a value from a file that a user wrote may be: small rules, which tell everything that is wrong at once.

A rule is called with the name of the field, for messages, its value, and a list to which it adds a line per problem; it
returns the value, normalised. What it returns after a problem means nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from vlprune import names
from vlprune.errors import ProblemsError, RequestError


Rule = Callable[[str, Any, list[str]], Any]
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # of terminals and of direction
ENOUGH = 100  # problems; nobody reads more


def text(name: str, value: Any, problems: list[str]) -> Any:
    """A text that is not blank, without control characters."""
    if not isinstance(value, str) or not value.strip():
        problems.append(f"{name} {shown(value)} is no text")
    elif CONTROLS.search(value):
        problems.append(f"{name} {value!a:.60} has characters that cannot be printed")
    return value


def flag(name: str, value: Any, problems: list[str]) -> Any:
    """True or false."""
    if not isinstance(value, bool):
        problems.append(f"{name} {shown(value)} is neither true nor false")
    return value


@dataclass(frozen=True)
class Whole:
    """A whole number.

    Attributes:
        low: the least.
        high: the largest.
    """

    low: int
    high: int = 2**31

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        if isinstance(value, bool) or not isinstance(value, int):
            problems.append(f"{name} {shown(value)} is no whole number")
        elif not self.low <= value <= self.high:
            problems.append(f"{name} {shown(value)} is out of range: give {self.low} to {self.high}")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number.

    Attributes:
        fits: tells whether it is in range.
        otherwise: what is said when it is none, after name and value: "is not ...: give ...".
    """

    fits: Callable[[float], bool]
    otherwise: str

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.holds(value):
            problems.append(f"{name} {shown(value)} {self.otherwise}")
            return value
        return float(value)

    def holds(self, value: float) -> bool:
        """Tell whether a number is finite and in range.

        Args:
            value: the number.

        Returns:
            bool: it is.
        """
        try:
            return math.isfinite(value) and self.fits(value)
        except OverflowError:  # a whole number that no float can hold
            return False


@dataclass(frozen=True)
class Choice:
    """One of some names.

    Attributes:
        kind: what they name.
        known: they.
    """

    kind: str
    known: tuple[str, ...]

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        if not isinstance(value, str):
            problems.append(f"{name} {shown(value)} is no {self.kind}: known: {', '.join(self.known)}")
            return value
        try:
            return names.check(self.kind, value, self.known)
        except RequestError as error:
            problems.append(f"{name}: {error}")
            return value


@dataclass(frozen=True)
class Optional:
    """What the rule says, or null.

    Attributes:
        rule: for anything else.
    """

    rule: Rule

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        return None if value is None else self.rule(name, value, problems)


@dataclass(frozen=True)
class Several:
    """A list without repetitions; a single entry may stand for it.

    Attributes:
        rule: of each entry.
        sorts: in ascending order.
        count: how many there are, None = one or more; repetitions are allowed where it is given.
    """

    rule: Rule
    sorts: bool = False
    count: int | None = None

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        entries = value if isinstance(value, list) else [value]
        found: list[str] = []
        checked = [self.rule(name, entry, found) for entry in entries if len(found) <= ENOUGH]
        if self.count is not None and len(entries) != self.count:
            found.insert(0, f"{name} {shown(value)} is no list of {self.count}")
        elif not entries:
            found.append(f"{name} is empty: leave it out, or name one")
        if not found and self.count is None:
            times = Counter(checked)
            found += [f"{name} names {entry} twice: name it once" for entry in times if times[entry] > 1]
        problems += found
        return sorted(checked) if self.sorts and not found else checked


@dataclass(frozen=True)
class Table:
    """A mapping with fixed keys, each of which may be left out.

    Attributes:
        rules: key -> rule.
        short: the key that a value stands for which is no mapping.
    """

    rules: Mapping[str, Rule]
    short: str | None = None

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        if self.short and not isinstance(value, dict) and value is not None:
            value = {self.short: value}
        if not isinstance(value, dict):
            problems.append(f"{name or 'it'} {shown(value)} is no mapping of keys to values")
            return value
        checked = {}
        for key, entry in value.items():
            path = f"{name}.{key}" if name else str(key)
            if len(problems) > ENOUGH:
                break
            if key in self.rules:
                checked[key] = self.rules[key](path, entry, problems)
            else:
                problems.append(f"unknown key {shown(path)}: {meant(key, self.rules)}")
        return checked


@dataclass(frozen=True)
class Named:
    """A mapping whose keys are names, too.

    Attributes:
        key: rule of the keys.
        rule: of the values.
    """

    key: Rule
    rule: Rule

    def __call__(self, name: str, value: Any, problems: list[str]) -> Any:
        """See `Rule`."""
        if not isinstance(value, dict):
            problems.append(f"{name} {shown(value)} is no mapping of keys to values")
            return value
        checked = {}
        for key, entry in value.items():
            if len(problems) > ENOUGH:
                break
            self.key(name, key, problems)
            checked[key] = self.rule(f"{name}.{key}", entry, problems)
        return checked


def meant(key: Any, known: Iterable[str]) -> str:
    """Say which key an unknown one may stand for.

    Args:
        key: what was written.
        known: the keys there are.

    Returns:
        str: "did you mean ...?", or the list of them.
    """
    known = list(known)
    near = get_close_matches(str(key).lower().replace("-", "_"), known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def shown(value: Any) -> str:
    """Print a value of any kind and size.

    Args:
        value: what was read.

    Returns:
        str: at most some 60 letters.
    """
    if isinstance(value, dict | list):  # as deep as it may be
        return f"(a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)})"
    if isinstance(value, int) and abs(value) >= 10**60:  # too many digits to be printed
        return "(a huge number)"
    return f"{value!r:.60}"


def check(rule: Rule, name: str, value: Any) -> Any:
    """Apply a rule to one value.

    Args:
        rule: of the value.
        name: of the value, as in "--ratio".
        value: to be checked.

    Returns:
        Any: the value, normalised.

    Raises:
        RequestError: the first problem.
    """
    problems: list[str] = []
    value = rule(name, value, problems)
    if problems:
        raise RequestError(problems[0])
    return value


def check_all(rule: Rule, where: str, value: Any) -> Any:
    """Apply a rule to the content of a file.

    Args:
        rule: of the content.
        where: the file, for the message.
        value: its content.

    Returns:
        Any: the content, normalised.

    Raises:
        ProblemsError: all the problems.
    """
    problems: list[str] = []
    value = rule("", value, problems)
    if problems:
        raise ProblemsError(where, problems)
    return value
