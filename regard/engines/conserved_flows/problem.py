"""A call of conserved flows as one object, which the engine's forms and its operators share."""

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
    """Largest l_t, (B, H); -inf where there was none."""
    normalizer: Tensor
    """Sum of exp(l_t - maximum), (B, H)."""
    length: Tensor
    """Tokens seen before, (B,)."""


@dataclass(frozen=True)
class Rule(Packed):
    """How flows become weights.

    Attributes:
        competition: whether sources compete; 1 without.
        allocation: whether the conserved sinks enter the acceptance; 1 / incoming without.
        clamp: range of the conserved sources; None for no clamp.
        temperature: divides them, > 0.
        eps: added to the vectors of both factors of each flow.
    """

    competition: bool
    allocation: bool
    clamp: Sequence[float] | None
    temperature: float
    eps: float


@dataclass(frozen=True)
class Problem(Packed):
    """What :func:`regard.engines.conserved_flows.conserved_flows` is given beside the rule."""

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
