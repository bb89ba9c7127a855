"""Calibrators: choose the size up to which the weights of a row or a group fit on its grid; larger weights are clipped.

Each takes weights (rows, columns) with a grid for each row, and returns the share of the largest size that is kept,
(rows,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

STEPS = 80
"""Number of candidate shares, down to 1 - 79 / 100."""

STRIDE = 5
"""Spacing of the candidates that are tried first; then the ones around the best are tried."""

BINS = 2048
"""Bins of the histogram of sizes whose divergence is minimised."""

Loss = Callable[["Float[Tensor, ' r']"], "Float[Tensor, ' r']"]
"""Computes the loss of each row on the grids that the given shares result in."""


def minmax(rows: Float[Tensor, "r c"], lost: Loss, bits: int) -> Float[Tensor, " r"]:
    """Keep everything on the grid."""
    return rows.new_ones(len(rows))


def percentile(rows: Float[Tensor, "r c"], lost: Loss, bits: int, percent: float = 99.9) -> Float[Tensor, " r"]:
    """This percentile of the sizes in a row, linearly interpolated."""
    sizes = rows.abs()
    largest = sizes.amax(1)
    kept = torch.quantile(sizes, percent / 100, dim=1) if sizes.shape[1] else largest
    return torch.where(largest > 0, kept / largest, 1.0).clamp(min=1e-3)


def mse(rows: Float[Tensor, "r c"], lost: Loss, bits: int) -> Float[Tensor, " r"]:
    """The share with the least loss per row: every :data:`STRIDE`-th of :data:`STEPS` is tried, then some near the best."""
    best = rows.new_ones(len(rows))
    least = lost(best)

    def attempt(share: Tensor) -> None:
        nonlocal best, least
        error = lost(share)
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)

    for step in range(STRIDE, STEPS, STRIDE):
        attempt(rows.new_full((len(rows),), 1 - step / 100))
    middle = best
    for step in range(1, STRIDE):
        for near in (middle - step / 100, middle + step / 100):
            attempt(near.clamp(1 - (STEPS - 1) / 100, 1.0))
    return best


def kl(rows: Float[Tensor, "r c"], lost: Loss, bits: int) -> Float[Tensor, " r"]:
    """One share for all rows: the one at which the distribution of sizes, relative to each row's largest, changes least
    in Kullback-Leibler divergence when it is clipped there and quantized to as many steps as the grid has.

    A single row has too few numbers for a histogram.
    """
    sizes = rows.abs()
    largest = sizes.amax(1, keepdim=True)
    relative = (sizes / torch.where(largest > 0, largest, 1.0))[largest[:, 0] > 0]
    if not relative.numel():
        return rows.new_ones(len(rows))
    counts = torch.histc(relative.float(), BINS, 0.0, 1.0).double()
    return rows.new_full((len(rows),), least_divergence(counts, 2 ** (bits - 1), BINS // 5))


def least_divergence(counts: Float[Tensor, " bins"], levels: int, first: int) -> float:
    """The share of a histogram's range at which it changes least, in Kullback-Leibler divergence, when all that is beyond
    is moved to the last bin that stays and the rest is quantized to `levels` steps.

    Args:
        counts: of sizes from 0 up, in bins of equal width.
        first: the fewest bins that may stay; :data:`STEPS` numbers of them are tried, up to all.
    """
    bins = len(counts)
    ends = torch.linspace(max(levels, first), bins, STEPS).round().long().unique().tolist()
    best, least = bins, float("inf")
    for end in ends:
        kept = counts[:end].clone()
        kept[-1] += counts[end:].sum()
        step = (torch.arange(end, device=counts.device) * levels) // end
        there = counts[:end] > 0
        empty = counts.new_zeros(levels)
        mass, places = empty.index_add(0, step, counts[:end]), empty.index_add(0, step, there.double())
        coarse = torch.where(there, (mass / places.clamp(min=1))[step], 0.0)
        divergence = _divergence(kept, coarse)
        if divergence < least:
            best, least = end, divergence
    return best / bins


def _divergence(p: Tensor, q: Tensor) -> float:
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())


CALIBRATORS: dict[str, Callable[..., Tensor]] = {"minmax": minmax, "percentile": percentile, "mse": mse, "kl": kl}
"""Calibrators by the values of the option ``calibrate``."""
