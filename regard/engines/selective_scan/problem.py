"""The arguments of the selective scan as one object, which the engine's forms and operators share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.operators import Packed


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.selective_scan.selective_scan`; `a`, `skip`, `dt_bias` and `state` are in
    at least float32."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor | None
    skip: Tensor | None
    dt_bias: Tensor | None
    z: Tensor | None
    state: Tensor | None
    lengths: Tensor | None
    order: Tensor | None
    inclusive: bool

    @property
    def learned(self) -> list[Tensor | None]:
        """The inputs that have gradients: the fields before `lengths`."""
        return [self.x, self.dt, self.a, self.b, self.c, self.skip, self.dt_bias, self.z, self.state]

    @property
    def updates(self) -> float:
        """How often a state is updated: once for each token. Where gradients are recorded, four times, since the
        backward pass updates the states again, and differentiates that in twice as many operations."""
        once = float(self.x.numel() * self.a.shape[1])
        return 4 * once if torch.is_grad_enabled() and self.records else once
