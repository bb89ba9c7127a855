"""Predictions of time or memory at any length, from measurements at a few.

The model is  y(N) = a + b N + c g(N)  with a, b, c >= 0: a fixed cost per call, a cost per token (projections), and g,
the growth of the cost according to the mechanism's card. It is fitted by relative errors. Its residuals at the measured
lengths are interpolated on logarithmic axes and multiplied back, so a prediction at a measured length equals the
measurement; beyond the measured lengths the last residual is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

TINY = 1e-30


class Curve:
    """A cost as a function of the length, fitted to measurements.

    Args:
        measured: cost by length, two lengths or more, all positive.
        growth: g, the growth of the cost according to the card; in any unit.
    """

    def __init__(self, measured: Mapping[int, float], growth: Callable[[int], float]) -> None:
        self.lengths = sorted(measured)
        self.growth = growth
        self.largest = max(growth(self.lengths[-1]), TINY)
        values = np.array([max(measured[n], TINY) for n in self.lengths])
        features = np.array([self._features(n) for n in self.lengths])
        self.weights = nonnegative_least_squares(features / values[:, None], np.ones(len(values)))
        self.left = np.log(values / np.maximum(features @ self.weights, TINY))

    def __call__(self, length: int) -> float:
        """The cost at a length, in the unit of the measurements."""
        left = np.interp(math.log(length), np.log(self.lengths), self.left)
        return float(self._features(length) @ self.weights * math.exp(left))

    def basis(self, length: int) -> str:
        """How the cost at a length is known: ``measured``, ``interpolated`` or ``extrapolated``."""
        if length in self.lengths:
            return "measured"
        return "interpolated" if self.lengths[0] < length < self.lengths[-1] else "extrapolated"

    def _features(self, length: int) -> np.ndarray:
        return np.array([1.0, length / self.lengths[-1], self.growth(length) / self.largest])


def nonnegative_least_squares(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The weights >= 0 with the least squared error, by trying every subset of the (few) features."""
    count = features.shape[1]
    best, error = np.zeros(count), math.inf
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            solution = np.linalg.lstsq(features[:, chosen], target, rcond=None)[0]
            found = float(np.square(features[:, chosen] @ solution - target).sum())
            if solution.min() >= 0 and found < error - 1e-12:
                best = np.zeros(count)
                best[chosen], error = solution, found
    return best
