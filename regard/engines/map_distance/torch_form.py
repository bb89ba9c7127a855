"""The distance of an estimated map from exact attention in PyTorch: all scores, one block of queries at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.precision import wide
from regard.engines.map_distance.problem import Problem
from regard.engines.pixel_attention import by_rows, pixels_of_keys

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def run(q: Tensor, k: Tensor, estimate: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.map_distance.map_distance`."""
    p = problem
    batch, heads, n, _ = q.shape
    if p.target is None:
        q, k = q.detach(), k.detach()

    def compute(totals: Tensor, k: Tensor, q: Tensor, e: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        pixel, visible = (x.expand(batch, -1, -1) for x in pixels_of_keys(p.ranks.keys, totals, e.shape[-1], p.jitter))
        seen = visible[:, None]
        scores = q @ wide(k).repeat_interleave(heads // k.shape[1], 1).mT
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if target is None:
            return _map_distances(torch.where(seen, scores.softmax(-1), 0), e, pixel, visible)
        weights = torch.where(seen, wide(target), 0)
        kl, squares = _map_distances(weights, e, pixel, visible)
        own = scores.log_softmax(-1)
        kl = kl + torch.xlogy(weights, weights).sum(-1) - (weights * torch.where(seen, own, 0)).sum(-1)
        return kl, squares + (weights - torch.where(seen, own.exp(), 0)).square().sum(-1)

    by_query: tuple[Tensor, ...] = (p.scale * wide(q), wide(estimate))
    if p.target is not None:
        by_query = (*by_query, p.target)
    kl, squares = by_rows(compute, batch * heads * k.shape[2], p.totals.expand(batch, n), (k,), by_query)
    return kl, squares


def _map_distances(
    p: Float[Tensor, "b h n m"],
    estimate: Float[Tensor, "b h n c"],
    pixel: Int[Tensor, "b n m"],
    visible: Bool[Tensor, "b n m"],
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"]]:
    """KL(p, r) and sum (p - r)^2 for each row, where r is the softmax over visible tokens of the score of their pixel.

    All tokens of a pixel have the same r, so that sums over pixels suffice and no gradient is as wide as the tokens.
    """
    counts = torch.zeros_like(estimate[:, 0]).scatter_add(-1, pixel, visible.to(estimate.dtype))[:, None]
    mass = torch.zeros_like(estimate).scatter_add(-1, pixel[:, None].expand_as(p), p)
    some = counts > 0
    scores = estimate.masked_fill(~some, torch.finfo(estimate.dtype).min)
    top = scores.detach().amax(-1, keepdim=True)
    exponentials = torch.where(some, (scores - top).exp(), 0)
    total = (counts * exponentials).sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1)
    logs = torch.where(some, scores - top - total.log(), 0)
    r = exponentials / total
    kl = torch.xlogy(p, p).sum(-1) - (mass * logs).sum(-1)
    return kl, p.square().sum(-1) - 2 * (mass * r).sum(-1) + (counts * r.square()).sum(-1)
