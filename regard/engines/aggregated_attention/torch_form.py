"""Aggregated attention in PyTorch: the window one place at a time, the pooled places by matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.precision import wide_dtype
from regard.engines.aggregated_attention.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def run(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, problem: Problem) -> Tensor:
    """See :func:`regard.engines.aggregated_attention.aggregated_attention`."""
    p = problem
    q, k, far_k = (F.normalize(x, dim=-1).to(x.dtype) for x in (q, k, far_k))
    inside = _inside(p, q.device)
    seen = inside.sum(-1, keepdim=True) + far_k.shape[2]
    scaled = ((q + p.moved[:, None]) * (p.slope[:, None, None] * seen.to(wide_dtype(q)).log())).to(q.dtype)

    near = torch.stack([(scaled.unflatten(2, p.grid) * x).sum(-1) for x in _around(k, p)], -1).flatten(2, 3)
    near = (near + p.near_bias[:, None]).masked_fill(~inside, -torch.inf)
    far = scaled @ far_k.mT + biases_of_places(p.table, p.grid, p.factor)
    weights = torch.cat([near, far], -1).softmax(-1)

    near, far = weights.split([near.shape[-1], far.shape[-1]], -1)
    near = (near + (q @ p.near_tokens.to(q.dtype) + p.near_weights[:, None])).unflatten(2, p.grid)
    o = (far.to(far_v.dtype) @ far_v).unflatten(2, p.grid)
    for place, x in enumerate(_around(v, p)):
        o = o + near[..., place, None] * x
    return o.flatten(2, 3).to(v.dtype)


def _around(x: Float[Tensor, "b h n d"], p: Problem) -> list[Float[Tensor, "b h rows columns d"]]:
    """The neighbours of each place of the map, one slice for each place of the window; zeros beyond the map."""
    border, (rows, columns) = p.window // 2, p.grid
    padded = F.pad(x.unflatten(2, p.grid), (0, 0, border, border, border, border))
    sides = range(p.window)
    return [padded[:, :, i : i + rows, j : j + columns] for i in sides for j in sides]


def _inside(p: Problem, device: torch.device) -> Bool[Tensor, "n places"]:
    """Which places of the window around each place are on the map."""
    near = torch.arange(p.window, device=device) - p.window // 2
    rows, columns = (torch.arange(side, device=device)[:, None] + near for side in p.grid)
    rows, columns = ((at >= 0) & (at < side) for at, side in zip((rows, columns), p.grid, strict=True))
    return (rows[:, None, :, None] & columns[:, None, :]).flatten(2).flatten(0, 1)


def biases_of_places(
    table: Float[Tensor, "h down across"], grid: tuple[int, int], factor: int
) -> Float[Tensor, "h n m"]:
    """The bias for each place of a map and each pooled place, from the table of a :class:`Problem`."""
    down, across = (
        torch.arange(side - factor, 2 * side - factor, device=table.device)[:, None]
        - factor * torch.arange(side // factor, device=table.device)
        for side in grid
    )
    return table[:, down[:, None, :, None], across[:, None, :]].flatten(3).flatten(1, 2)
