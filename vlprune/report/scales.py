"""Where on a chart a number lies, and which numbers its axis names."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


MARGIN = 4.0  # per cent of a chart's width (or height) left free at both ends, so that marks and labels have room
LOG_TICKS = (0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
SHORT_LOG_TICKS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 100, 1000)


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: number at its beginning.
        high: number at its end, above `low`.
        ticks: the numbers to name, inside.
        logarithmic: equal ratios are equally far apart.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Place a number on the chart.

        Args:
            value: any; what lies outside is put at the end.

        Returns:
            float: per cent of the chart's width, from the left.
        """
        low, high, value = (math.log(max(x, 1e-9)) if self.logarithmic else x for x in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(MARGIN + (100 - 2 * MARGIN) * share, 2)


def linear(values: Iterable[float], floor: float | None = None) -> Scale:
    """Make an axis on which all numbers have room.

    Args:
        values: at least one.
        floor: it begins no lower.

    Returns:
        Scale: with three to six ticks at round numbers.
    """
    values = list(values)
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.02 * abs(high) or 0.01
    low, high = low - room, high + room
    if floor is not None:
        low = max(low, floor)
    step = _round_step((high - low) / 5.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, tuple(round(k * step, 10) for k in range(first, last + 1)))


def ratios(values: Iterable[float]) -> Scale:
    """Make a logarithmic axis for ratios, with 1 on it.

    Args:
        values: positive, at least one.

    Returns:
        Scale: from 0.8 or less to 1.25 or more.
    """
    values = [max(value, 1e-3) for value in values]
    low, high = min(*values, 0.8) / 1.05, max(*values, 1.25) * 1.05
    ticks = SHORT_LOG_TICKS if high / low > 8 else LOG_TICKS
    return Scale(low, high, tuple(tick for tick in ticks if low <= tick <= high), logarithmic=True)


def level(value: float, low: float, high: float, levels: int) -> int:
    """Choose the colour of a cell of a heat map.

    Args:
        value: between `low` and `high`.
        low: the number of the first colour.
        high: that of the last.
        levels: how many colours there are.

    Returns:
        int: 0 to levels - 1.
    """
    share = (value - low) / (high - low) if high > low else 1.0
    return min(max(int(share * levels), 0), levels - 1)


def _round_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= step * (1 - 1e-9))
