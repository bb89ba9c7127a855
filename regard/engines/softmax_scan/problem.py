"""The arguments of the softmax scan as one object, which the engine's forms and operators share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from regard.backends.operators import Packed


class Carry(NamedTuple):
    """The sums over a prefix. An empty prefix has m = -inf, u = 0, w = 0."""

    m: Tensor
    """Running maximum of each query, (B, H, Q)."""
    u: Tensor
    """Sum of exponentials, (B, H, Q)."""
    w: Tensor
    """Sum of exponentials times values, (B, H, Q, V)."""


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.softmax_scan.softmax_scan`."""

    s: Tensor
    v: Tensor
    log_decay: Tensor | None
    mix: Tensor | None
    m: Tensor
    u: Tensor
    w: Tensor

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.s, self.v, self.log_decay, self.mix, *self.carry]

    @property
    def carry(self) -> Carry:
        """The carry from which the scan continues."""
        return Carry(self.m, self.u, self.w)
