"""Statistics of a comparison's scores: means with standard errors, paired differences, and their resolution.

Every mechanism is trained with the same seeds and scored on the same held-out items, so comparisons are paired. Two
sources of noise are kept apart. *Training* noise is the residual of the scores after an effect for each mechanism and
one for each seed (a two-way layout without replication), pooled over the mechanisms, since two or three seeds alone say
little about a single pair. *Item* noise is the variance of the paired differences over held-out items; all seeds share
the items, so this noise does not average out over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom."""


FEWEST_ITEMS = 6
"""Least number of differing items: n all differ in one direction with probability 2 / 2^n, below 5 % from six on."""


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond 30 degrees of freedom, that of the normal distribution."""
    return T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else 1.96


@dataclass(frozen=True)
class Scores:
    """One mechanism's runs on one task: for each seed, the (sum, weight) of every held-out item."""

    items: Mapping[int, np.ndarray]

    def score(self, seed: int) -> float:
        """Return the weighted mean over a seed's items; nan if none has a weight."""
        sums, weights = self.items[seed].sum(0)
        return float(sums / weights) if weights else math.nan

    @property
    def mean(self) -> float:
        """The mean of the seeds' scores."""
        return float(np.mean([self.score(s) for s in self.items]))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over seeds; nan with a single seed."""
        values = [self.score(s) for s in self.items]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """A paired difference of two mechanisms' scores.

    Attributes:
        mean: first minus second.
        standard_error: standard error from training and item noise; nan if there are too few seeds to estimate it.
        resolved: smallest difference that this data can distinguish from 0 at the 5 % level.
    """

    mean: float
    standard_error: float
    resolved: float

    @property
    def separable(self) -> bool:
        """Whether the difference is larger than this data can resolve; False if the resolution is unknown."""
        return abs(self.mean) > self.resolved


class Comparison:
    """A comparison of several mechanisms on one task, on the seeds that all of them have."""

    def __init__(self, scores: Mapping[str, Scores]) -> None:
        self.scores = dict(scores)
        shared = set.intersection(*(set(s.items) for s in scores.values())) if scores else set()
        self.seeds = sorted(shared)
        table = np.array([[s.score(seed) for seed in self.seeds] for s in scores.values()])
        self.degrees = (table.shape[0] - 1) * (len(self.seeds) - 1) if len(scores) else 0
        self.training_variance = math.nan
        if self.degrees > 0:
            residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
            self.training_variance = float((residual**2).sum() / self.degrees)

    @property
    def few_items(self) -> bool:
        """Whether there are fewer than FEWEST_ITEMS held-out items, so that nothing can be told from a rule."""
        return any(len(items) < FEWEST_ITEMS for scores in self.scores.values() for items in scores.items.values())

    def difference(self, first: str, second: str) -> Difference:
        """Return the difference of two mechanisms, paired over seeds and items."""
        a, b = self.scores[first], self.scores[second]
        mean = float(np.mean([a.score(s) - b.score(s) for s in self.seeds])) if self.seeds else math.nan
        if self.degrees < 1:
            return Difference(mean, math.nan, math.inf)
        error = math.sqrt(2 * self.training_variance / len(self.seeds) + self._item_variance(a, b))
        return Difference(mean, error, t_quantile(self.degrees) * error)

    def against(self, name: str, rule: np.ndarray) -> Difference:
        """Return a mechanism's score minus that of an untrained rule, given as the (sum, weight) of each item.

        Paired over items. If there are too few seeds or mechanisms to estimate the training noise, only item noise
        counts. With fewer than FEWEST_ITEMS items on which the two differ, nothing is resolved.
        """
        own, fixed = self.scores[name], Scores(dict.fromkeys(self.seeds, rule))
        mean = float(np.mean([own.score(s) - fixed.score(s) for s in self.seeds])) if self.seeds else math.nan
        degrees = self.degrees if self.degrees > 0 else len(rule) - 1
        differ = sum(any(own.items[s][i, 0] != rule[i, 0] for s in self.seeds) for i in range(len(rule)))
        if degrees < 1 or differ < FEWEST_ITEMS:
            return Difference(mean, math.nan, math.inf)
        training = self.training_variance / len(self.seeds) if self.degrees > 0 else 0.0
        error = math.sqrt(training + self._item_variance(own, fixed))
        return Difference(mean, error, t_quantile(degrees) * error)

    def _item_variance(self, a: Scores, b: Scores) -> float:
        """Variance of the mean difference due to the choice of items, with each item's scores averaged over seeds."""
        first = np.mean([a.items[s] for s in self.seeds], 0)
        second = np.mean([b.items[s] for s in self.seeds], 0)
        weights = first[:, 1]
        count = np.count_nonzero(weights)  # items without targets do not count
        if count < 2:
            return 0.0
        # linearised ratio estimator: items with more targets count more
        difference = first[:, 0] - second[:, 0]
        ratio = difference.sum() / weights.sum()
        residual = difference - ratio * weights
        return float(count / (count - 1) * (residual**2).sum() / weights.sum() ** 2)

    @property
    def resolution(self) -> float:
        """The median over pairs of the smallest difference resolved; inf if there are too few seeds."""
        names = list(self.scores)
        resolved = [self.difference(a, b).resolved for i, a in enumerate(names) for b in names[:i]]
        return float(np.median(resolved)) if resolved else math.inf


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of points that no other point dominates (higher is better on both coordinates)."""
    front = set()
    for name, (x, y) in points.items():
        beaten = any((u >= x and w >= y) and (u > x or w > y) for other, (u, w) in points.items() if other != name)
        if not beaten and not (math.isnan(x) or math.isnan(y)):
            front.add(name)
    return front


def seeds_needed(seeds: int, resolved: float, difference: float) -> int | None:
    """Return the number of seeds that would resolve a difference of this size at the same noise; None beyond 100."""
    if not math.isfinite(resolved) or difference == 0:
        return None
    needed = math.ceil(seeds * (resolved / abs(difference)) ** 2)
    return needed if needed <= 100 else None


def items_array(items: Sequence[Sequence[float]]) -> np.ndarray:
    """Return (sum, weight) pairs as an array of shape (items, 2)."""
    return np.asarray(items, dtype=np.float64).reshape(-1, 2)


def score_of_items(items: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return total sum / total weight of (sum, weight) pairs, and its standard error over items; nan if unknown.

    Items of weight 0 do not count.
    """
    found = items_array(items)
    total, weight = found.sum(0)
    if not weight:
        return math.nan, math.nan
    score = float(total / weight)
    left = found[:, 0] - score * found[:, 1]
    n = np.count_nonzero(found[:, 1])
    return score, float(math.sqrt(n / (n - 1) * np.square(left).sum()) / weight) if n > 1 else math.nan


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent p of value ~ size^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
