"""Angles of sinusoids at integer positions, shared by the sinusoidal and the rotary scheme."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def angles(
    positions: Int[Tensor, "b n"], width: int, *, base: float, stretch: float = 1.0, dtype: torch.dtype
) -> Float[Tensor, "b n pairs"]:
    """``position / stretch * base ** (-2 i / width)`` for i = 0 ... ceil(width / 2) - 1, modulo one turn.

    Whole turns are removed in float64, so that float32 is as exact at position 1,000,000 as at position 1 (float32
    alone would be off by up to 0.03 radians there). Computed at each call, since ``module.half()`` would round a
    buffer.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=wide, device=positions.device) / width
    turns = positions.to(wide)[..., None] * (base**-exponents / (2 * math.pi * stretch))
    return ((turns - turns.round()) * (2 * math.pi)).to(dtype)
