"""The arguments of conserved flows as one object, which the engine's forms and operators share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from regard.backends.operators import Packed


class Sums(NamedTuple):
    """The sums over the tokens so far."""

    totals: Tensor
    """Sums of sources, sinks, weighted sources and weighted sinks, (4, B, H, D)."""
    maximum: Tensor
    """Largest l_t, (B, H); -inf if there was none."""
    normalizer: Tensor
    """Sum of exp(l_t - maximum), (B, H)."""
    length: Tensor
    """Number of tokens seen before, (B,)."""


@dataclass(frozen=True)
class Rule(Packed):
    """How flows become weights.

    Attributes:
        competition: whether sources compete; without it, the competition is 1.
        allocation: whether the conserved sinks enter the acceptance; without it, the acceptance is 1 / incoming.
        clamp: range of the conserved sources; None for no clamp.
        temperature: divisor of the conserved sources, > 0.
        eps: added to both vectors in the product of each flow.
    """

    competition: bool
    allocation: bool
    clamp: Sequence[float] | None
    temperature: float
    eps: float


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.conserved_flows.conserved_flows` besides the rule."""

    sinks: Tensor
    sources: Tensor
    totals: Tensor
    maximum: Tensor
    normalizer: Tensor
    length: Tensor
    valid: Tensor | None

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.sinks, self.sources, self.totals, self.maximum, self.normalizer]
