"""Conversion of quantities in a chart to pixels: scales, ticks and axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from regard.measurement import units

Formatter = Callable[[float], str]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn; JSON has null for what could not be measured."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Scale:
    """Maps a quantity to pixels, linearly or logarithmically.

    Attributes:
        low, high: ends of the data range; positive when `log`.
        start, end: pixels of these ends.
        ticks: values to mark.
        limit: larger values have its pixel.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]
    label: Formatter
    limit: float = math.inf

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, min(value, self.limit)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def inside(self, value: float) -> float:
        """The pixel of a value, clamped to the range."""
        return self(min(max(value, self.low), self.high))


def linear_scale(values: Iterable[float], start: float, end: float, label: Formatter, *, pad: float = 0.08) -> Scale:
    """A linear scale that covers all values (at least one), with about five round ticks.

    Args:
        pad: share of the range left free at each end.
    """
    low, high = min(values := list(values)), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    low, high = low - pad * (high - low), high + pad * (high - low)
    step = _round_step((high - low) / 5)
    ticks = (step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Scale(low, high, start, end, False, tuple(round(t, 12) for t in ticks), label)


def log_scale(
    values: Iterable[float], start: float, end: float, label: Formatter, *, base: int = 10, pad: float = 0.06
) -> Scale:
    """A logarithmic scale that covers all values (positive), with ticks at powers of `base`, or finer if few of them
    fit.

    Args:
        pad: share of the range left free at each end.
    """
    low, high = min(values := list(values)), max(values)
    if high / low < 1.3:
        middle = math.sqrt(low * high)
        low, high = middle / 1.25, middle * 1.25
    stretch = (high / low) ** pad
    low, high = low / stretch, high * stretch
    return Scale(low, high, start, end, True, _log_ticks(low, high, base), label)


def _round_step(step: float) -> float:
    size = 10 ** math.floor(math.log10(step))
    return next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= step * 0.999)


def _log_ticks(low: float, high: float, base: int, most: int = 6) -> tuple[float, ...]:
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))

    def inside(multiples: Sequence[float], stride: int = 1) -> tuple[float, ...]:
        powers = range(first - first % stride, last + 1, stride)
        return tuple(v for p in powers for m in multiples if low <= (v := m * float(base) ** p) <= high)

    if base == 10:
        for multiples in (tuple(range(1, 10)), (1, 2, 5), (1, 3)):
            if 3 <= len(found := inside(multiples)) <= most:
                return found
    for stride in itertools.count(1):
        if len(found := inside((1,), stride)) <= most:
            break
    if len(found) >= 2:
        return found
    plain = linear_scale((low, high), 0, 1, units.tick, pad=0).ticks
    return tuple(t for t in plain if t > 0)


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: its label, including the unit and which direction is better.
        format: formats the text of a tick.
        log: whether it is logarithmic.
        base: base of logarithmic ticks.
        rising: False puts small values at the top, for quantities where smaller is better.
        limit: larger values are drawn at the edge.
        ticks: values to mark in place of round ones.
    """

    label: str
    format: Formatter = units.tick
    log: bool = False
    base: int = 10
    rising: bool = True
    limit: float = math.inf
    ticks: tuple[float, ...] = ()

    def usable(self, value: object) -> TypeGuard[float]:
        """Whether a value can be placed on the axis."""
        return is_number(value) and (not self.log or value > 0)

    def scale(self, values: Iterable[float], start: float, end: float) -> Scale:
        """The scale for some values, from pixel `start` to pixel `end`."""
        shown = [min(v, self.limit) for v in values]
        if not self.rising:
            start, end = end, start
        if self.log:
            scale = log_scale(shown, start, end, self.format, base=self.base)
        else:
            scale = linear_scale(shown, start, end, self.format)
        return replace(scale, ticks=self.ticks or scale.ticks, limit=self.limit)
