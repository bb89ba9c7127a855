"""Attention to chosen pages in PyTorch: the definition, with the keys of these pages gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.engines.quest_attention.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float


def page_bounds(
    q: Float[Tensor, "b h 1 d"], low: Float[Tensor, "b g p d"], high: Float[Tensor, "b g p d"]
) -> Float[Tensor, "b g r p"]:
    """The upper bound on the scores of each page's keys with each query, for the r heads of a key/value head, without
    the scale; in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q[:, :, 0].to(wide).unflatten(1, (low.shape[1], -1))
    # max(q low, q high) is q high where q > 0 and q low where q < 0
    return query.clamp(min=0) @ high.to(wide).mT + query.clamp(max=0) @ low.to(wide).mT


def run(p: Problem) -> Tensor:
    """See :func:`regard.engines.quest_attention.quest_attention`."""
    batch, groups, held, _ = p.low.shape
    wide, device = torch.promote_types(p.q.dtype, torch.float32), p.q.device
    counts = p.counts.to(device)[..., None, None]
    newest = (counts - 1).clamp(min=0) // p.page
    upper = page_bounds(p.q, p.low, p.high).detach()
    if p.shared:
        upper = upper.sum(2, keepdim=True)
    number = torch.arange(held, device=device)
    upper = upper.masked_fill(number > newest, -torch.inf).masked_fill(number == newest, torch.inf)
    table = upper.topk(min(p.chosen + 1, held), -1).indices.sort(-1).values  # (b, g, lines, pages)

    slots = (table[..., None] * p.page + torch.arange(p.page, device=device)).flatten(3)
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head = torch.arange(groups, device=device).view(-1, 1, 1)
    there = (slots < counts)[..., None]
    k, v = (torch.where(there, x[row, head, slots].to(wide), 0) for x in (p.k, p.v))
    query = p.q.to(wide).reshape(batch, groups, table.shape[2], -1, p.q.shape[3])
    hidden = ~there.mT & (counts > 0)[..., None]  # a head without keys sees zero values, whose sum is 0
    weights = (p.scale * query @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).reshape(*p.q.shape[:3], -1).to(p.q.dtype)
