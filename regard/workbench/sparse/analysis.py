"""Conclusions from scores at several compressions: which are safe, what is best at a cost, how scores scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NOTICED = 1.645
"""z-score from which a loss counts: one-sided, at 5 %."""


def mean_and_variance(scores: Sequence[float]) -> tuple[float, float]:
    """Mean, and unbiased variance (0 for a single score)."""
    values = np.asarray(scores, dtype=np.float64)
    return float(values.mean()), float(values.var(ddof=1)) if len(values) > 1 else 0.0


def loss_z(dense: Sequence[float], sparse: Sequence[float]) -> float:
    """Number of standard errors by which the mean sparse score is below the dense one; infinite if neither varies."""
    (a, var_a), (b, var_b) = mean_and_variance(dense), mean_and_variance(sparse)
    error = math.sqrt(var_a / len(dense) + var_b / len(sparse))
    if error == 0:
        return 0.0 if a == b else math.copysign(math.inf, a - b)
    return (a - b) / error


def safe_compression(dense: Sequence[float], by_ratio: Mapping[float, Sequence[float]]) -> float:
    """The largest compression with no noticeable loss there or at any smaller one; 1 if already the smallest loses."""
    safe = 1.0
    for ratio in sorted(by_ratio):
        if loss_z(dense, by_ratio[ratio]) >= NOTICED:
            break
        safe = max(safe, ratio)
    return safe


def noticeable_loss(dense: Sequence[float]) -> float:
    """The smallest noticeable loss of the mean, if sparse scores vary as much as these dense ones."""
    return NOTICED * math.sqrt(2 * mean_and_variance(dense)[1] / len(dense))


@dataclass(frozen=True)
class Point:
    """A model at one compression.

    Attributes:
        size: the size by which models are ordered (parameters, or a width).
        ratio: the compression; 1 for dense.
        cost: the cost of an answer.
        scores: the scores of the samples.
    """

    size: float
    ratio: float
    cost: float
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean score over the samples."""
        return mean_and_variance(self.scores)[0]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other point beats at the same or lower cost, from cheap to expensive."""
    best, found = -math.inf, []
    for point in sorted(points, key=lambda p: (p.cost, -p.score)):
        if point.score > best:
            best = point.score
            found.append(point)
    return found


def larger_and_sparse(points: Sequence[Point]) -> list[tuple[Point, Point | None]]:
    """For each dense model, the best larger sparse one that costs no more; None if there is none."""
    found = []
    for dense in sorted((p for p in points if p.ratio == 1), key=lambda p: p.size):
        rivals = [p for p in points if p.ratio > 1 and p.size > dense.size and p.cost <= dense.cost]
        found.append((dense, max(rivals, key=lambda p: p.score, default=None)))
    return found


def crossing_length(by_length: Mapping[int, Sequence[Point]]) -> int | None:
    """The smallest length at which a larger sparse model surely beats a dense one at no more cost; None without one."""
    for length in sorted(by_length):
        for dense, rival in larger_and_sparse(by_length[length]):
            if rival is not None and loss_z(rival.scores, dense.scores) >= NOTICED:
                return length
    return None


@dataclass(frozen=True)
class Observation:
    """The score of a model with a number of parameters, at a length and a compression."""

    parameters: float
    length: float
    compression: float
    score: float


@dataclass(frozen=True)
class ScalingLaw:
    """log score = constant + parameters log P + length log N + compression log C, by least squares.

    Attributes:
        held_out: R^2 on the largest model, length or compression when it is left out of the fit; only for those with
            two or more values and varying scores.
    """

    constant: float
    parameters: float
    length: float
    compression: float
    held_out: Mapping[str, float]

    def predict(self, at: Observation) -> float:
        """The score predicted by the law."""
        logs = (math.log(at.parameters), math.log(at.length), math.log(at.compression))
        slopes = (self.parameters, self.length, self.compression)
        return math.exp(self.constant + sum(a * b for a, b in zip(slopes, logs, strict=True)))


FEWEST_SCORES = 1e-3
"""Lowest score that is used, since its logarithm is taken."""


def scaling_law(observations: Sequence[Observation]) -> ScalingLaw | None:
    """Fit the law to all observations, and without the largest of each kind in turn; None for fewer than four."""
    if len(observations) < 4:
        return None
    axes: dict[str, Callable[[Observation], float]] = {
        "parameters": lambda o: o.parameters,
        "length": lambda o: o.length,
        "compression": lambda o: o.compression,
    }
    held: dict[str, float] = {}
    for name, of in axes.items():
        largest = max(map(of, observations))
        fitted, rest = ([o for o in observations if (of(o) < largest) == low] for low in (True, False))
        seen = np.array([_logarithm(o) for o in rest])
        if len(fitted) < 4 or len(rest) < 2 or not seen.std():
            continue
        predicted = _design(rest) @ _fit(fitted)
        held[name] = float(1 - ((seen - predicted) ** 2).sum() / ((seen - seen.mean()) ** 2).sum())
    constant, parameters, length, compression = map(float, _fit(observations))
    return ScalingLaw(constant, parameters, length, compression, held)


def _logarithm(o: Observation) -> float:
    return math.log(max(o.score, FEWEST_SCORES))


def _design(observations: Sequence[Observation]) -> np.ndarray:
    return np.array([[1, math.log(o.parameters), math.log(o.length), math.log(o.compression)] for o in observations])


def _fit(observations: Sequence[Observation]) -> np.ndarray:
    return np.linalg.lstsq(_design(observations), np.array([_logarithm(o) for o in observations]), rcond=None)[0]
