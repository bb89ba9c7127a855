"""The definition of routing: its options and its reference, written to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Unsupported,
    at_least,
)
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.attention import attention_reference

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        window: w, >= 1: keys (and in noncausal-self queries) per cluster.
        clusters: C of a layer, >= 1; about the training length divided by the window.
        decay: decay of the moving average of the centroids, in [0, 1]; 1 keeps them fixed.
        null_memory: whether a layer learns a null memory.
        local_heads: number of heads that are local instead, >= 0, in self patterns.
    """

    window: int = 64
    clusters: int = 16
    decay: float = 0.999
    null_memory: bool = True
    local_heads: int = 0

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("clusters", self.clusters, 1)
        if not 0 <= self.decay <= 1:
            raise Unsupported(f"decay={self.decay}", supported="0 <= decay <= 1", nearest="decay=0.999")
        at_least("local_heads", self.local_heads, 0)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, one cluster at a time."""
    config: Config = call.config
    check(call, q.shape[1])
    n, m, w = q.shape[2], k.shape[2], config.window
    at_queries, at_keys = _scores(q, centroids), _scores(k, centroids)  # (b, h, c, n)
    i, j = torch.arange(n, device=q.device)[:, None] + m - n, torch.arange(m, device=q.device)
    output, count = v.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(*q.shape[:3], 1)
    for c in range(centroids.shape[1]):
        keys, queries = at_keys.argmax(2) == c, at_queries.argmax(2) == c
        if call.pattern.cross or not call.pattern.causal:
            keys = _among_highest(at_keys[:, :, c], w)
        if call.pattern is Pattern.NONCAUSAL_SELF:
            queries = _among_highest(at_queries[:, :, c], w)
        seen = keys[:, :, None].expand(-1, -1, n, -1)
        if call.pattern is Pattern.CAUSAL_SELF:
            seen = seen & (j <= i)
            seen = seen & (seen.flip(-1).cumsum(-1).flip(-1) <= w)
        scores = (call.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
        values = v
        if null_k is not None and null_v is not None:
            scores = torch.cat([scores, call.scale * q @ null_k[:, c, :, None]], -1)
            values = torch.cat([v, null_v[:, c, None].expand(*v.shape[:2], 1, -1)], 2)
        attended = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1) @ values
        chosen = (queries & seen.any(-1))[..., None]
        output, count = output + torch.where(chosen, attended, 0), count + queries[..., None]
    output = output / count.clamp(min=1)
    if config.local_heads:
        near = (i - j < w) & (j <= i) if call.pattern.causal else (i - j).abs() <= w // 2
        local = attention_reference(q, k, v, near[None, None], lambda x: x.softmax(-1), call.scale)
        output = torch.cat([local[:, : config.local_heads], output[:, config.local_heads :]], 1)
    return output


def _among_highest(scores: Float[Tensor, "b h n"], count: int) -> Bool[Tensor, "b h n"]:
    chosen = scores.topk(min(count, scores.shape[-1])).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def _scores(x: Float[Tensor, "b h n d"], centroids: Float[Tensor, "h c d"]) -> Float[Tensor, "b h c n"]:
    """Scores of normalised tokens at the centroids. They only select, so they have no gradient."""
    dtype = wide_dtype(x)
    with without_autocast(x.device):
        return centroids.detach().to(dtype) @ F.normalize(x.detach().to(dtype), dim=-1).mT


def check(call: Call, heads: int) -> None:
    """Refuse more local heads than there are heads, and local heads in cross patterns."""
    local = call.config.local_heads
    if local > heads:
        raise Unsupported(f"local_heads={local} of {heads}", supported=f"0 to {heads}", nearest=f"local_heads={heads}")
    if local and call.pattern.cross:
        raise Unsupported(
            f"local heads in {call.pattern.value}, where memory has no position relative to a query",
            supported="self patterns",
            nearest="local_heads=0",
        )
