"""Judges the measurements of several seeds by one rule for all claims.

A check compares a number with a bound. The number is computed for each seed (so a difference is taken between runs with
the same seed), and its 95 % interval over the seeds is mean +- t SE, by Student's t. The check *held* if the whole
interval is on the expected side of the bound, *did not hold* if the whole interval is on the other side, and is
undecided if the bound is inside. A timing has a spread of its own: its interval spans the interquartile ranges of all
seeds. A claim held if all of its checks held, and did not hold if one did not. Either verdict requires that the
experiment can decide: its needs (a control that learns, an upper end) are judged by the same rule, and unless all of
them held, the claim is undecided.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.contract import Unsupported
from regard.measurement.statistics import t_quantile
from regard.measurement.timing import Timing

LEAST_SEEDS = 2
MOST_SEEDS_TOLD = 1000

Measurements = Mapping[str, Any]
"""Measurements of a cell by name: numbers, timings (see :func:`spread`) or lists of numbers; None for a value that was
not finite."""

Seed = Mapping[str, Measurements]
"""Measurements of the cells of one seed, by setting."""


class Outcome(enum.StrEnum):
    """Outcome of a check or a claim."""

    HELD = "held"
    DID_NOT_HOLD = "did not hold"
    UNDECIDED = "undecided at this size"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Check:
    """One expectation: a number computed for each seed, and the bound that it should be above or below.

    Attributes:
        says: the expectation in words.
        value: function from a seed's cells to the number; raises KeyError if a cell is missing, and returns nan if a
            measurement was not finite.
        above, below: the bound; exactly one of the two.
    """

    says: str
    value: Callable[[Seed], float | Mapping[str, float]]
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise Unsupported(f"a check with above={self.above} and below={self.below}", supported="one of the two")

    def judge(self, seeds: Sequence[Seed]) -> Finding:
        """Return the finding over the seeds that have all the cells needed."""
        found: list[float | Mapping[str, float]] = []
        for seed in seeds:
            try:
                found.append(self.value(seed))
            except KeyError:
                continue
        values = [v["median"] if isinstance(v, Mapping) else v for v in found]
        mean = float(np.mean(values)) if values else math.nan
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        low, high = math.nan, math.nan
        if len(values) >= LEAST_SEEDS:
            half = t_quantile(len(values) - 1) * error
            low, high = mean - half, mean + half
            timings = [v for v in found if isinstance(v, Mapping)]
            if timings:
                low, high = min(v["low"] for v in timings), max(v["high"] for v in timings)
        outcome = self._outcome(low, high) if values else Outcome.NOT_RUN
        finding = Finding(self.says, mean, error, low, high, len(values), outcome)
        if outcome is not Outcome.UNDECIDED:
            return finding
        return dataclasses.replace(finding, seeds_to_decide=self.seeds_to_decide(finding))

    def reads(self, seed: Seed) -> frozenset[str]:
        """Return the settings that the number is computed from; none if the seed lacks one of them."""
        watched = _Watched(seed)
        try:
            self.value(watched)
        except KeyError:
            return frozenset()
        return frozenset(watched.read)

    def seeds_to_decide(self, found: Finding) -> int | None:
        """Return how many seeds would decide if mean and spread stayed the same; None if unknown or above 1000."""
        bound = self.above if self.above is not None else self.below
        assert bound is not None
        spread, distance = found.standard_error * math.sqrt(found.seeds), abs(found.mean - bound)
        if not math.isfinite(spread) or not distance > 0:
            return None
        sizes = range(LEAST_SEEDS, MOST_SEEDS_TOLD + 1)
        return next((n for n in sizes if t_quantile(n - 1) * spread / math.sqrt(n) < distance), None)

    def _outcome(self, low: float, high: float) -> Outcome:
        if self.above is not None:
            held, failed = low > self.above, high <= self.above
        else:
            assert self.below is not None
            held, failed = high < self.below, low >= self.below
        return Outcome.HELD if held else Outcome.DID_NOT_HOLD if failed else Outcome.UNDECIDED


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        says: the expectation in words.
        mean, standard_error: mean and standard error of the number over seeds; nan if there are too few seeds.
        low, high: the interval that decides.
        seeds: number of seeds that had all cells.
        outcome: outcome of the check.
        seeds_to_decide: how many seeds would decide if mean and spread stayed the same; None if the check is decided,
            if the spread is unknown, or above 1000.
    """

    says: str
    mean: float
    standard_error: float
    low: float
    high: float
    seeds: int
    outcome: Outcome
    seeds_to_decide: int | None = None


class _Watched(dict[str, Measurements]):
    """The cells of a seed, with a record of the settings that were read."""

    def __init__(self, seed: Seed) -> None:
        super().__init__(seed)
        self.read = set[str]()

    def __getitem__(self, setting: str) -> Measurements:
        self.read.add(setting)
        return super().__getitem__(setting)


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim, and its reasons.

    Attributes:
        outcome: outcome of the claim.
        findings: results of its checks.
        needs: results of the conditions under which the experiment can decide at all.
    """

    outcome: Outcome
    findings: tuple[Finding, ...]
    needs: tuple[Finding, ...] = ()


def judge(
    checks: Sequence[Check], cells: Mapping[tuple[str, int], Measurements], needs: Sequence[Check] = ()
) -> Verdict:
    """Return the verdict on measurements by (setting, seed). A pure function of its arguments."""
    seeds = sorted({seed for _, seed in cells})
    by_seed = [{name: measured for (name, own), measured in cells.items() if own == seed} for seed in seeds]
    findings, needed = (tuple(check.judge(by_seed) for check in some) for some in (checks, needs))
    return Verdict(_outcome(findings, needed), findings, needed)


def _outcome(findings: Sequence[Finding], needed: Sequence[Finding]) -> Outcome:
    if not any(finding.seeds for finding in findings):
        return Outcome.NOT_RUN
    outcomes = {finding.outcome for finding in findings}
    if {finding.outcome for finding in needed} - {Outcome.HELD}:
        return Outcome.UNDECIDED
    if Outcome.DID_NOT_HOLD in outcomes:
        return Outcome.DID_NOT_HOLD
    return Outcome.HELD if outcomes == {Outcome.HELD} else Outcome.UNDECIDED


def number(seed: Seed, setting: str, name: str) -> float:
    """Return a measured number; nan if it was not finite."""
    value = seed[setting][name]
    return math.nan if value is None else float(value)


def numbers(seed: Seed, setting: str, name: str) -> list[float]:
    """Return a measured list of numbers, with nan where one was not finite."""
    return [math.nan if value is None else float(value) for value in seed[setting][name]]


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers; nan if one is nan, which `max` may pass over."""
    return float(np.max([*values]))


def smallest(values: Iterable[float]) -> float:
    """Return the smallest of some numbers; nan if one is nan."""
    return float(np.min([*values]))


def measured(setting: str, name: str) -> Callable[[Seed], Any]:
    """Return a check value: a measurement of a setting, unchanged."""

    def value(seed: Seed) -> Any:
        found = seed[setting][name]
        return math.nan if found is None else found

    return value


def minus(first: str, second: str, name: str = "score") -> Callable[[Seed], float]:
    """Return a check value: a measurement of the first setting minus that of the second."""
    return lambda seed: number(seed, first, name) - number(seed, second, name)


def within(setting: str, first: str, second: str) -> Callable[[Seed], float]:
    """Return a check value: one measurement of a setting minus another."""
    return lambda seed: number(seed, setting, first) - number(seed, setting, second)


def over(first: str, second: str, name: str) -> Callable[[Seed], float]:
    """Return a check value: a measurement of the first setting divided by that of the second."""
    return lambda seed: number(seed, first, name) / number(seed, second, name)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and interquartile range of repeats, as a measurement of a cell."""
    timing = Timing.of(values)
    return {"median": timing.median, "low": timing.low, "high": timing.high}
