"""Efficiency length: the number of tokens from which a mechanism is cheaper than softmax attention.

The cost of softmax attention is fitted by a n^2 + b n + c, that of the mechanism by d n + e; the efficiency length is the
larger root of their difference. Each fit comes with its R^2, and a length outside the measured range with a note.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_SHARE = 1e-6
"""Smallest share of the largest cost that the quadratic term must have for softmax's cost to count as a parabola."""


@dataclass(frozen=True)
class Efficiency:
    """An efficiency length.

    Attributes:
        length: in tokens; 0 where the mechanism is cheaper at every length, inf where it never is.
        fit, softmax_fit: R^2 of the line and of the parabola.
        note: says that the length is outside the measured range, or that a fit has the wrong shape; otherwise empty.
    """

    length: float
    fit: float
    softmax_fit: float
    note: str = ""


def efficiency_length(
    lengths: Sequence[float], softmax: Sequence[float], other: Sequence[float], *, skip: int = 0
) -> Efficiency:
    """The length at which two measured costs cross.

    Args:
        lengths: tokens, ascending, three or more.
        softmax, other: costs at these lengths.
        skip: how many of the shortest lengths the line ignores: their times are dominated by the fixed cost of a call.
    """
    n = np.asarray(lengths, dtype=np.float64)
    vanilla, cost = np.asarray(softmax, dtype=np.float64), np.asarray(other, dtype=np.float64)
    a, b, c = np.polyfit(n, vanilla, 2)
    d, e = np.polyfit(n[skip:], cost[skip:], 1)
    fits = _explained(cost[skip:], d * n[skip:] + e), _explained(vanilla, np.polyval((a, b, c), n))
    if a * n[-1] ** 2 < SMALLEST_SHARE * vanilla.max():
        return Efficiency(math.inf, *fits, "softmax is no parabola")
    inside = (b - d) ** 2 - 4 * a * (c - e)
    if inside < 0:
        return Efficiency(0.0, *fits, "cheaper at every length")
    length = (-(b - d) + math.sqrt(inside)) / (2 * a)
    if length <= 0:
        return Efficiency(0.0, *fits, "cheaper at every length")
    note = "beyond what was measured" if length > n[-1] else "below what was measured" if length < n[0] else ""
    return Efficiency(float(length), *fits, note)


def _explained(values: np.ndarray, fitted: np.ndarray) -> float:
    spread = float(((values - values.mean()) ** 2).sum())
    return 1 - float(((values - fitted) ** 2).sum()) / spread if spread > 0 else 1.0
