"""The grids of a weight, and rounding to their nearest points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.compression.weights.limits import CALIBRATORS
from regard.contract import Unsupported, one_of
from regard.engines.quantized_linear import padded
from regard.layers.quantized import Codes, Format

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TINY = 1e-12
"""The smallest step, so that a row of zeros has a grid too."""


@dataclass(frozen=True)
class Grids:
    """One grid for each row of weights: the numbers ``code * scale + offset``, with codes from `low` to `high`.

    Attributes:
        scale, offset: (rows,) bfloat16.
        low, high: see :attr:`regard.layers.quantized.Format.codes`.
    """

    scale: Float[Tensor, " r"]
    offset: Float[Tensor, " r"] | None
    low: int
    high: int

    def codes(self, rows: Float[Tensor, "r c"]) -> Int[Tensor, "r c"]:
        """The nearest code for each number, int8."""
        offset = 0 if self.offset is None else self.offset.to(rows.dtype)[:, None]
        return ((rows - offset) / self.scale.to(rows.dtype)[:, None]).round().clamp(self.low, self.high).to(torch.int8)

    def numbers(self, codes: Int[Tensor, "r c"], dtype: torch.dtype) -> Float[Tensor, "r c"]:
        """The number that each code represents."""
        found = codes.to(dtype) * self.scale.to(dtype)[:, None]
        return found if self.offset is None else found + self.offset.to(dtype)[:, None]


def make_grids(
    rows: Float[Tensor, "r c"],
    format: Format,
    calibrate: str = "minmax",
    *,
    importance: Float[Tensor, "#r c"] | None = None,
) -> Grids:
    """A grid for each row, up to its largest absolute value or from minimum to maximum, times a factor by `calibrate`.

    Scale and offset are rounded to bfloat16; the scale is rounded so that the ends stay on the grid. A symmetric grid
    has one more number on one side of 0 than on the other: with fewer than 8 bits it is the side that allows smaller
    steps, and if that is the positive side the scale is negative.

    Args:
        calibrate: a name in :data:`regard.compression.weights.limits.CALIBRATORS`.
        importance: weight of each number's squared error, for the calibrator ``mse``; all equal when None.
    """
    one_of("calibrate", calibrate, CALIBRATORS)
    if not bool(torch.isfinite(rows).all()):
        raise Unsupported("weights that are not finite", supported="a model whose training did not diverge")
    low, high = format.codes
    least, largest = _ends(rows)

    def made(share: Tensor) -> Grids:
        if format.symmetric:
            return Grids(_outwards(_symmetric_step(least, largest, format) * share), None, low, high)
        below, above = least * share, largest * share
        offset = (below - low * (above - below) / (high - low)).to(torch.bfloat16)
        own = offset.to(rows.dtype)
        return Grids(_outwards(torch.maximum((below - own) / low, (above - own) / high)), offset, low, high)

    def lost(share: Tensor) -> Tensor:
        grids = made(share)
        squares = (grids.numbers(grids.codes(rows), rows.dtype) - rows).square()
        return (squares if importance is None else squares * importance).sum(1)

    return made(CALIBRATORS[calibrate](rows, lost, format.bits))


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    if not rows.shape[1]:
        return rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    return rows.amin(1), rows.amax(1)


def _symmetric_step(least: Tensor, largest: Tensor, format: Format) -> Tensor:
    """The smallest step with which grids around 0 reach both ends; negative if the longer side is the positive one."""
    low, high = format.codes
    if format.bits == 8:  # one more number hardly matters, and byte products may need -127 to 127
        return torch.maximum(-least, largest) / high
    upright, turned = torch.maximum(least / low, largest / high), torch.maximum(-least / high, -largest / low)
    return torch.where(turned < upright, -turned, upright)


def _outwards(step: Tensor) -> Tensor:
    """Round to bfloat16, away from 0 and never to 0."""
    step = torch.where(step.abs() < TINY, TINY, step)
    rounded = step.to(torch.bfloat16)
    return torch.where(rounded.to(step.dtype).abs() < step.abs(), (step * (1 + 2.0**-7)).to(torch.bfloat16), rounded)


def round_to_nearest(
    weight: Float[Tensor, "n k"],
    format: Format,
    calibrate: str = "minmax",
    *,
    importance: Float[Tensor, " k"] | None = None,
) -> Codes:
    """Round each number of a weight to the nearest point of its grid.

    Args:
        importance: weight of each column, see :func:`make_grids`.
    """
    grouped, groups = in_groups(weight, format)
    if importance is not None:
        importance = in_groups(importance[None], format)[0].to(weight).repeat(len(weight), 1)
    grids = make_grids(grouped, format, calibrate, importance=importance)
    return as_codes(grids.codes(grouped), grids, groups)


def in_groups(weight: Float[Tensor, "n k"], format: Format) -> tuple[Float[Tensor, "r c"], int]:
    """Reshape to a row for each grid, the last group of a row padded with zeros; also return the grids per row."""
    if format.group is None:
        return weight, 1
    whole = padded(weight, format.columns(weight.shape[1]))
    return whole.reshape(-1, format.group), whole.shape[1] // format.group


def as_codes(codes: Int[Tensor, "r c"], grids: Grids, groups: int) -> Codes:
    """Reshape codes with a row for each grid to the codes of a weight with `groups` groups per row."""
    offset = None if grids.offset is None else grids.offset.reshape(-1, groups)
    return Codes(codes.reshape(len(codes) // groups, -1), grids.scale.reshape(-1, groups), offset)
