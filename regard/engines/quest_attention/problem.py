"""The arguments of attention to pages as one object, which forms and operator share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.operators import Packed
from regard.contract import Unsupported, at_least


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.quest_attention.quest_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor
    page: int
    chosen: int
    shared: bool
    scale: float

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v]

    def misfit(self) -> str | None:
        """The mismatch among the tensors, without reading their values; None if they fit together."""
        q, k, v = self.q, self.k, self.v
        if not q.ndim == k.ndim == v.ndim == 4 or q.shape[2] != 1:
            return "q, k and v that are not those of a token: (B, H, 1, D), (B, G, S, D) and (B, G, S, E)"
        batch, heads, _, width = q.shape
        groups, slots = v.shape[1:3]
        if k.shape != (batch, groups, slots, width) or v.shape[0] != batch or min(groups, width, v.shape[3]) < 1:
            return f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        if heads % groups:
            return f"{heads} query heads on {groups} kv heads"
        if slots < self.page or slots % self.page:
            return f"{slots} slots with pages of {self.page}"
        bounds = (batch, groups, slots // self.page, width)
        if self.low.shape != bounds or self.high.shape != bounds:
            return f"bounds {tuple(self.low.shape)} and {tuple(self.high.shape)} where {bounds} are"
        if self.counts.shape != (batch, groups) or self.counts.dtype != torch.int64 or not self.counts.is_cpu:
            return f"counts {tuple(self.counts.shape)} in {str(self.counts.dtype)[6:]} on {self.counts.device.type}"
        return None

    def check(self) -> None:
        """Raise Unsupported for invalid sizes and for tensors that do not fit together."""
        at_least("page", self.page, 1)
        at_least("chosen", self.chosen, 0)
        reason = self.misfit()
        if reason is not None:
            raise Unsupported(f"attention to pages with {reason}", supported="what quest_attention says")

    def empty(self) -> Tensor:
        """An uninitialised output."""
        return self.q.new_empty(*self.q.shape[:3], self.v.shape[3])
