"""Time series from a table: find the interval, gaps and duplicates; one series per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.contract import Unsupported
from regard.measurement.units import counted
from regard.tasks.tables import Table

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

MOST_MISSING = 0.05
FEWEST = 8
_SECONDS = {"minute": 60, "hour": 3600, "day": 86400, "week": 604800}


@dataclass(frozen=True)
class Interval:
    """Distance between consecutive times of a series: in seconds, or in calendar months."""

    count: int
    months: bool = False

    def __str__(self) -> str:
        if self.months:
            return "a month" if self.count == 1 else f"{self.count} months"
        for unit, seconds in reversed(_SECONDS.items()):
            if self.count % seconds == 0:
                many = self.count // seconds
                return f"{many} {unit}s" if many > 1 else "an hour" if unit == "hour" else f"a {unit}"
        return f"{self.count} s"

    @property
    def season(self) -> int:
        """Points per day; per week for daily data, per year for weeks and months; 1 when none of these fits."""
        if self.months:
            return max(12 // self.count, 1)
        for seconds in (_SECONDS["day"], _SECONDS["week"], 52 * _SECONDS["week"]):
            if 2 * self.count <= seconds:
                return seconds // self.count if seconds % self.count == 0 else 1
        return 1


@dataclass(frozen=True)
class Series:
    """One series, at regular times.

    Attributes:
        name: name of its group; "" without groups.
        times: datetime64[s], one interval apart.
        values: the columns asked for, with gaps filled by the previous value.
        known: True where the first column was measured, False where it was filled.
    """

    name: str
    times: np.ndarray
    values: Float[np.ndarray, "n c"]
    known: Bool[np.ndarray, " n"]


def read_series(
    table: Table, time: str, columns: list[str], groups: str | None, options: list[str]
) -> tuple[list[Series], Interval, list[str]]:
    """Read the series of a table; returns them, their common interval, and notes on what was sorted or filled.

    Args:
        time: column with the times.
        columns: columns of numbers; the first is the one to predict.
        groups: column that says to which series a row belongs.
        options: for each of `columns`, the task option that named it.

    Raises:
        Unsupported: for a time that occurs twice in a series, for times that are not an interval apart, and for more
            than 5 % missing rows or cells.
    """
    times = table.times(time, "time")
    values = np.stack([table.numbers(name, option) for name, option in zip(columns, options, strict=True)], axis=1)
    labels = np.array(table.texts(groups, "groups")) if groups is not None else np.full(len(table), "")
    notes: list[str] = []
    rows_of: dict[str, np.ndarray] = {}
    unsorted = 0
    for name in dict.fromkeys(labels.tolist()):
        rows = np.flatnonzero(labels == name)
        order = rows[np.argsort(times[rows], kind="stable")]
        unsorted += not np.array_equal(order, rows)
        _refuse_twice(table, times, order, name, time, groups)
        if len(order) < FEWEST:
            raise Unsupported(
                f"{_called(table, name)} of {counted(len(order), 'row')}",
                supported=f"{FEWEST} or more, for training and held-out data",
            )
        rows_of[name] = order
    if unsorted:
        notes.append("the rows were not in the order of their times: sorted")

    interval = _interval(np.concatenate([np.diff(times[rows]) for rows in rows_of.values()]), times)
    series = []
    missing_rows, first_gap = 0, ""
    for name, rows in rows_of.items():
        grid, places = _grid(times[rows], interval, table, rows)
        full = np.full((len(grid), len(columns)), np.nan)
        full[places] = values[rows]
        gaps = np.setdiff1d(np.arange(len(grid)), places)
        if len(gaps):
            missing_rows += len(gaps)
            first_gap = first_gap or f"{_called(table, name)} at {grid[gaps[0]]}"
        if len(gaps) > MOST_MISSING * len(grid):
            raise Unsupported(
                f"{_called(table, name)} without {len(gaps)} of {len(grid)} rows, the first at {grid[gaps[0]]} "
                f"(the interval is {interval})",
                supported=f"up to {MOST_MISSING:.0%} missing, which are filled with the value before",
            )
        empty = np.isnan(full)
        for i, column in enumerate(columns):
            if empty[:, i].sum() - len(gaps) > MOST_MISSING * len(grid):
                raise Unsupported(
                    f"{_called(table, name)} whose column {column} is empty in {empty[:, i].sum() - len(gaps)} of "
                    f"{len(rows)} rows",
                    supported=f"up to {MOST_MISSING:.0%} empty, which are filled with the value before",
                )
        series.append(Series(name, grid, _fill(full), ~empty[:, 0]))
    if missing_rows:
        notes.append(f"{missing_rows} missing rows, the first in {first_gap}: filled with the value before, not scored")
    for column, cells in zip(columns, values.T, strict=True):
        rows = np.flatnonzero(np.isnan(cells))
        if len(rows):
            first = table.places[rows[0]]
            notes.append(
                f"{counted(len(rows), 'empty cell')} of {column} filled with the value before, the first: {first}"
            )
    return series, interval, notes


def calendar(times: np.ndarray, interval: Interval, *, years: bool) -> tuple[Float[np.ndarray, "n f"], list[str]]:
    """Sine and cosine of hour, weekday and, with `years`, day of the year, where the interval resolves them."""
    seconds = times.astype("datetime64[s]").astype(np.int64)
    found: list[np.ndarray] = []
    names = []
    if not interval.months and 2 * interval.count <= _SECONDS["day"]:
        found.append(seconds / _SECONDS["day"])
        names.append("time of day")
    if not interval.months and 2 * interval.count <= _SECONDS["week"]:
        found.append(seconds / _SECONDS["week"])
        names.append("day of week")
    if years or interval.months:
        start = times.astype("datetime64[Y]").astype("datetime64[s]")
        found.append((times - start).astype(np.int64) / (365.2425 * _SECONDS["day"]))
        names.append("time of year")
    turns = 2 * np.pi * np.array(found).reshape(len(found), len(times)).T
    return np.concatenate([np.sin(turns), np.cos(turns)], axis=1), names


def _called(table: Table, name: str) -> str:
    return f"the series {name!r} of {table.name}" if name else f"the series of {table.name}"


def _refuse_twice(table: Table, times: Any, order: Any, name: str, time: str, groups: str | None) -> None:
    twice = np.flatnonzero(np.diff(times[order]) == np.timedelta64(0, "s"))
    if len(twice):
        i = order[twice[0] + 1]
        raise Unsupported(
            f"{table.places[i]}, where {time} is {times[i]} again" + (f" in the series {name!r}" if name else ""),
            supported="each time once in a series",
            nearest="groups=COLUMN that tells the series apart" if groups is None else "",
        )


def _interval(steps: np.ndarray, times: np.ndarray) -> Interval:
    """The commonest distance; in months if every time is at the same moment of its month."""
    moments = times - times.astype("datetime64[M]").astype("datetime64[s]")
    seconds, counts = np.unique(steps.astype(np.int64), return_counts=True)
    commonest = int(seconds[counts.argmax()])
    if commonest >= 28 * _SECONDS["day"] and (moments == moments[0]).all():
        months = np.unique(times.astype("datetime64[M]").astype(np.int64))
        return Interval(int(np.diff(months).min()), months=True)
    return Interval(commonest)


def _grid(times: np.ndarray, interval: Interval, table: Table, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regular times from the first to the last, and which of them are given."""
    first = times[0]
    if interval.months:
        months = times.astype("datetime64[M]")
        distance, step = (months - months[0]).astype(np.int64), interval.count
    else:
        distance, step = (times - first).astype(np.int64), interval.count
    off = np.flatnonzero(distance % step)
    if len(off):
        raise Unsupported(
            f"{table.places[rows[off[0]]]}, where the time {times[off[0]]} is off the interval of {interval}",
            supported="times an interval apart",
            nearest="resample them",
        )
    places = distance // step
    if places[-1] + 1 > len(times) / (1 - MOST_MISSING) + 1:
        gap = int(np.diff(places).argmax())
        raise Unsupported(
            f"{places[-1] + 1 - len(times)} of {places[-1] + 1} rows missing at an interval of {interval}; the largest "
            f"gap is after {times[gap]} ({table.places[rows[gap]]})",
            supported=f"up to {MOST_MISSING:.0%} missing, which are filled with the value before",
        )
    count = np.arange(places[-1] + 1)
    if interval.months:
        grid = (months[0] + count * step).astype("datetime64[s]") + (first - months[0].astype("datetime64[s]"))
    else:
        grid = first + (count * step).astype("timedelta64[s]")
    return grid, places


def _fill(values: np.ndarray) -> np.ndarray:
    """Fill gaps with the previous value; leading gaps with the first value."""
    rows = np.arange(len(values))[:, None]
    before = np.maximum.accumulate(np.where(np.isnan(values), -1, rows), axis=0)
    first = (~np.isnan(values)).argmax(axis=0)
    return np.take_along_axis(values, np.where(before < 0, first, before), axis=0)
