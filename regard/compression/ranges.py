"""Uniform grids with one scale for a whole tensor, and estimators of the range that a grid covers.

With b bits and a range from low <= 0 to high >= 0

    weights:      scale = max |w| / (2^(b-1) - 1),   integers -2^(b-1) ... 2^(b-1) - 1
    activations:  scale = (max(high, 1e-8) - low) / (2^b - 1),   integers 0 ... 2^b - 1,   zero = round(-low / scale)
    q(x) = scale (clip(round(x / scale) + zero) - zero)

so that 0 is on every grid. The range holds all numbers (min-max), all between two percentiles, is the one with the least
mean |q(x) - x|^p (L_p; p = 2 is the mean squared error), found by golden-section search, or the one that changes the
histogram of sizes least (KL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.compression.weights.limits import BINS, least_divergence
from regard.contract import Unsupported, at_least
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-8

GOLDEN = (math.sqrt(5) - 1) / 2

HALVINGS = 10.0
"""How often the largest number is halved to get the smallest end of a range that is tried."""

STEPS = 16
"""Steps of a golden-section search: the last interval is 0.05 % of the first."""


@dataclass(frozen=True)
class Grid:
    """The numbers ``scale * (i - zero)`` for the integers i from `low` to `high`."""

    scale: float
    zero: int
    low: int
    high: int


def symmetric_grid(x: Float[Tensor, "..."], bits: int = 8, *, p: float | None = None) -> Grid:
    """The grid of weights: symmetric about 0, reaching the largest absolute value, or with the least L_p error."""
    at_least("bits", bits, 2)
    check_power(p)
    half = 2 ** (bits - 1)

    def reaching(size: float) -> Grid:
        return Grid(max(size, EPS) / (half - 1), 0, -half, half - 1)

    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    if p is not None:
        largest *= golden_section(lambda share: _error(x, reaching(share * largest), p))
    return reaching(largest)


def asymmetric_grid(low: float, high: float, bits: int = 8) -> Grid:
    """The grid of activations from `low` to `high`, always extended to include 0."""
    at_least("bits", bits, 2)
    most = 2**bits - 1
    low = min(low, 0.0)
    scale = (max(high, EPS) - low) / most
    if not math.isfinite(scale):
        raise Unsupported(f"a grid from {low} to {high}", supported="finite activations")
    return Grid(scale, min(max(round(-low / scale), 0), most), 0, most)


class _Round(torch.autograd.Function):
    """Round to the nearest integer, passing gradients straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def simulate(x: Float[Tensor, "..."], grid: Grid) -> Float[Tensor, "..."]:
    """The nearest number of the grid, in the dtype of `x`, computed in at least float32.

    Gradients are those of the clip: 1 on the grid's range, 0 beyond (straight through the rounding).
    """
    precise = wide(x)
    index = (_Round.apply(precise / grid.scale) + grid.zero).clamp(grid.low, grid.high)
    return (grid.scale * (index - grid.zero)).to(x.dtype)


def check_power(p: float | None) -> None:
    """Raise Unsupported unless `p` is None or a finite number above 0."""
    if p is not None and not 0 < p < math.inf:
        raise Unsupported(f"p={p}", supported="a finite p > 0, or None for min-max", nearest="p=2.0")


def golden_section(loss: Callable[[float], float], known: float = 1.0) -> float:
    """The share of an end with the least loss among 1, `known` and those that a golden-section search tries.

    It searches over the logarithm of the share, from 2^-10 to 1, since a few outliers can be many times as large as all
    other numbers. The result is the best share to 0.3 % of itself where the loss has one minimum only.
    """
    first, last = 0.0, HALVINGS
    low, high = last + GOLDEN * (first - last), first + GOLDEN * (last - first)
    tried = {x: loss(2.0**-x) for x in (0.0, -math.log2(known), low, high)}
    for _ in range(STEPS):
        if tried[low] < tried[high]:
            last, high = high, low
            low = last + GOLDEN * (first - last)
            tried[low] = loss(2.0**-low)
        else:
            first, low = low, high
            high = first + GOLDEN * (last - first)
            tried[high] = loss(2.0**-high)
    return 2.0 ** -min(tried, key=lambda x: tried[x])


def least_error_range(x: Float[Tensor, "..."], bits: int, p: float) -> tuple[float, float]:
    """The range from low <= 0 to high >= 0 whose :func:`asymmetric_grid` has the least mean |q(x) - x|^p.

    Both ends are searched for together, and then in turn, twice each. The error is at most that of the range of all
    numbers.
    """
    least, largest = (float(end) for end in x.detach().aminmax())
    least, largest = min(least, 0.0), max(largest, 0.0)

    def error(low: float, high: float) -> float:
        return _error(x, asymmetric_grid(low * least, high * largest, bits), p)

    low = high = golden_section(lambda share: error(share, share))
    if least < 0 < largest:
        for _ in range(2):
            high = golden_section(partial(error, low), high)
            low = golden_section(partial(error, high=high), low)
    return low * least, high * largest


def least_divergence_range(x: Float[Tensor, "..."], bits: int) -> tuple[float, float]:
    """The range from low <= 0 to high >= 0 without the sizes beyond the end at which the histogram of |x| changes least in
    Kullback-Leibler divergence, as in pytorch-quantization; see :func:`regard.compression.weights.limits.least_divergence`.

    The histogram has 2048 bins, of which the first is given the count of the second, since numbers near 0 lose nothing;
    a sixteenth of them or more stay.
    The steps are those of one side of the grid, or of all of it if no number is negative.
    """
    least, largest = (float(end) for end in wide(x.detach()).aminmax())
    least, largest = min(least, 0.0), max(largest, 0.0)
    size = max(-least, largest)
    if not 0 < size < math.inf:
        return least, largest
    counts = torch.histc(wide(x.detach()).abs() / size, BINS, 0.0, 1.0).double()
    counts[0] = counts[1]
    if not bool(counts.any()):
        return least, largest
    end = size * least_divergence(counts, 2 ** (bits - (least < 0)), BINS // 16)
    return max(least, -end), min(largest, end)


def _error(x: Tensor, grid: Grid, p: float) -> float:
    precise = wide(x.detach())
    return float((simulate(precise, grid) - precise).abs().pow(p).mean())


@dataclass
class RunningRange:
    """Running means of the ends of each batch's range, starting with those of the first batch.

    A batch's range is from its least number to its largest unless one of `percentile`, `p` and `kl` is given.

    Attributes:
        momentum: weight of the past at each batch, in [0, 1).
        percentile: the upper end is this percentile of a batch's numbers, above 50; the lower end is the percentile 100
            less it.
        p: the ends are those with the least L_p error on a grid of `bits`, see :func:`least_error_range`.
        bits: only used with `p` and `kl`.
        kl: whether the ends are those of :func:`least_divergence_range` on a grid of `bits`. The public code makes one
            histogram of all batches; here each has its own.
    """

    momentum: float = 0.9
    percentile: float | None = None
    p: float | None = None
    bits: int = 8
    kl: bool = False
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise Unsupported(f"momentum={self.momentum}", supported="0 <= momentum < 1", nearest="momentum=0.9")
        if self.percentile is not None and not 50 < self.percentile <= 100:
            raise Unsupported(
                f"percentile={self.percentile}", supported="50 < percentile <= 100", nearest="percentile=99.999"
            )
        check_power(self.p)
        given = {"percentile": self.percentile, "p": self.p, "kl": self.kl or None}
        chosen = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise Unsupported(" with ".join(chosen), supported="one of them", nearest=chosen[0])

    def update(self, x: Float[Tensor, "..."]) -> None:
        """Update the range with a batch."""
        if not x.numel():
            return
        if self.percentile is not None:
            numbers = x.detach().double().cpu().numpy()
            low, high = (float(end) for end in np.percentile(numbers, [100 - self.percentile, self.percentile]))
        elif self.p is not None:
            low, high = least_error_range(x, self.bits, self.p)
        elif self.kl:
            low, high = least_divergence_range(x, self.bits)
        else:
            low, high = (float(end) for end in x.detach().aminmax())
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high
