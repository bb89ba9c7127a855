"""Importance of keys to the last queries of a prompt, which stand in for the queries to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def last_weights(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], window: int, scale: float
) -> Float[Tensor, "b h a n"]:
    """Causal softmax weights of the last `window` queries (or all, if fewer), at least in float32."""
    n = k.shape[2]
    window = min(window, n)
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (scale * q[:, :, n - window :].to(wide)) @ k.mT
    later = torch.ones(window, n, dtype=torch.bool, device=q.device).triu(1 + n - window)
    return scores.masked_fill_(later, -torch.inf).softmax(-1)


def diagonal_sums(weights: Float[Tensor, "b h a n"]) -> Float[Tensor, "b h n"]:
    """Sums of the weights at each distance 0, 1, ... n - 1 between query and key, for the last `a` queries of n."""
    a, n = weights.shape[-2:]
    # after padding with `a` zeros, query i at distance o is at n + i - o; viewed with rows one longer, at n - o in
    # every row
    padded = F.pad(weights, (a, 0)).contiguous()
    width = n + a
    shifted = padded.as_strided((*padded.shape[:-2], a, n), (*padded.stride()[:-2], width + 1, 1), 1)
    return shifted.sum(-2).flip(-1)


def pooled(importance: Float[Tensor, "b g n"], kernel: int) -> Float[Tensor, "b g n"]:
    """Means over `kernel` neighbours; positions beyond the ends count as zeros."""
    if not importance.shape[-1]:
        return importance
    return F.avg_pool1d(importance, kernel, stride=1, padding=kernel // 2)[..., : importance.shape[-1]]


def grouped(weights: Float[Tensor, "b h ..."], groups: int) -> Float[Tensor, "b g r ..."]:
    """Reshape query heads into groups that share a kv head."""
    return weights.unflatten(1, (groups, weights.shape[1] // groups))


def key_sums(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], scale: float, rows: int = 256
) -> Float[Tensor, "b h n"]:
    """Total attention weight that each key gets from all queries of a prompt, computed by blocks of queries."""
    batch, heads, n = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros(batch, heads, n, dtype=wide, device=q.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        total[..., :stop] += last_weights(q[:, :, :stop], k[:, :, :stop], stop - start, scale).sum(-2)
    return total


def top(scores: Float[Tensor, "b h n"], count: int) -> Tensor:
    """Boolean mask of the `count` largest scores (all if there are fewer)."""
    chosen = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
