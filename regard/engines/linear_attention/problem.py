"""The arguments of linear attention as one object, which the engine's forms and operators share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.backends.operators import Packed


@dataclass(frozen=True)
class Rule(Packed):
    """How queries and keys become weights.

    Attributes:
        feature_map: phi, a name in :data:`regard.engines.feature_maps.FEATURE_MAPS`.
        scale: factor on the queries before phi.
        eps: added to the denominators; None for no denominators.
        shift: added to phi.
    """

    feature_map: str
    scale: float
    eps: float | None
    shift: float = 0.0


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.linear_attention.linear_attention` besides the rule."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    valid: Tensor | None

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v, self.state]
