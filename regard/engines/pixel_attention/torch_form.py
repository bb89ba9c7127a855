"""Attention to chosen pixels in PyTorch: kept keys are gathered, or all keys are multiplied if that is less work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.precision import wide, without_autocast
from regard.engines.pixel_attention.problem import Mix, Problem, slots_by_rank
from regard.engines.recomputed import recomputed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NUMBERS_AT_ONCE = 1 << 22
"""Number of scores or gathered features above which queries are processed in blocks."""

DENSE_ADVANTAGE = 32
"""How much cheaper one pair of a masked product over all keys is than gathering one key."""


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mix: Mix) -> tuple[Tensor, Tensor | None]:
    """See :func:`regard.engines.pixel_attention.pixel_attention`."""
    p = problem
    batch, heads, n, width = q.shape
    m = k.shape[2]
    kept = kept_pixels(p)
    most = most_read(p.grouping, p.top_k * p.oversample, heads, p.estimate.shape[-1], p.fewest, m)
    if p.jitter is not None or p.want_weights or DENSE_ADVANTAGE * most >= heads * m:
        compute, numbers = _dense_rows(p), heads * m
    else:
        compute, numbers = _gathered_rows(p, most), most * (width + v.shape[-1])
    by_query = (kept, p.scale * wide(q))
    output, *more = by_rows(compute, batch * numbers, p.totals.expand(-1, n), (k, v), by_query)
    return mixed(output, more[0] if more else None, v, p, mix)


def mixed(
    output: Float[Tensor, "b h n v"], weights: Float[Tensor, "b h n m"] | None, v: Tensor, problem: Problem, mix: Mix
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n m"] | None]:
    """Apply `mix` to P V, and the row factor to P."""
    if mix.row_logit is not None:
        scale = wide(mix.row_logit).sigmoid()[..., None]
        output, weights = scale * output, None if weights is None else scale * weights
    if mix.mix_logit is not None:
        assert mix.mean is not None
        share, mean = wide(mix.mix_logit).sigmoid()[..., None], mix.mean.of(v, problem.totals)
        output = share * output + (1 - share) * mean.repeat_interleave(output.shape[1] // mean.shape[1], 1)
    return torch.where(problem.totals[:, None, :, None] > 0, output, 0), weights


def kept_pixels(p: Problem) -> Bool[Tensor, "b h n c"]:
    """Mask of the pixels with the highest probabilities; ties keep the first. In float64, so that all forms agree."""
    batch, heads, n, pixels = p.estimate.shape
    scores = p.estimate.detach().double()
    scores = scores - scores.logsumexp(-1, keepdim=True)
    wanted = p.top_k * p.oversample * pixels / p.totals.clamp(min=1).double()
    if p.grouping == "row":
        scores, budget = scores.transpose(1, 2).flatten(2), heads * wanted  # (b, n, h * c)
    elif p.grouping == "query":
        budget = wanted[:, None]
    else:
        rows = torch.tensor(n, device=scores.device, dtype=torch.int64) if p.valid is None else p.valid.sum(-1)
        if p.valid is not None:
            scores = scores.masked_fill(~p.valid[:, None, :, None], -torch.inf)
        budget = wanted[:, 0] * rows  # (b,)
        scores = scores.flatten(2)
        if p.grouping == "batch":
            scores, budget = scores.flatten(1), heads * budget
        else:
            budget = budget[:, None]
    budget = budget.round().clamp(min=1).long()[..., None]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    kept = torch.zeros_like(order).scatter(-1, order, place) < budget
    if p.grouping == "row":
        return kept.unflatten(-1, (heads, pixels)).transpose(1, 2)
    return kept.reshape(batch, heads, n, pixels)


def pixels_of_keys(
    keys: Int[Tensor, "#b m"], totals: Int[Tensor, "#b #n"], pixels: int, jitter: Float[Tensor, "b m"] | None = None
) -> tuple[Int[Tensor, "#b #n m"], Bool[Tensor, "#b #n m"]]:
    """The pixel of each key in the map of each query, and whether the query sees the key."""
    j, total = keys[:, None, :], totals[:, :, None]
    visible = (j >= 0) & (j < total)
    if jitter is None:
        # floor((j + 1/2) K / n - 1e-4) in integers
        pixel = ((2 * j + 1) * (5000 * pixels) - total).div(10000 * total.clamp(min=1), rounding_mode="floor")
    else:
        pixel = (((j + jitter[:, None] + 0.5) / total.clamp(min=1)) * pixels - 1e-4).floor().long()
    return pixel.clamp(0, pixels - 1), visible


def first_keys(totals: Int[Tensor, "b n"], pixels: int) -> Int[Tensor, "b n c1"]:
    """The rank of the first key of each pixel, followed by the number of keys."""
    total = totals[..., None]
    pixel = torch.arange(pixels + 1, device=totals.device)
    first = -((5000 * pixels - total * (10000 * pixel + 1)).div(10000 * pixels, rounding_mode="floor"))
    return torch.where(pixel == 0, 0, torch.where(pixel == pixels, total, torch.minimum(first, total)))


def read_regularly(top_k: int, oversample: float, keys: Tensor, totals: Tensor) -> Bool[Tensor, "..."]:
    """Which keys of kept pixels are read when oversampling: about one in `oversample`, evenly spaced."""
    if oversample == 1:
        return torch.ones_like(keys, dtype=torch.bool)
    total = totals.double()
    parts = (total / oversample).round().clamp(min=1)
    scaled = (keys + 1) / total.clamp(min=1) * parts
    step = total.clamp(top_k, top_k * oversample) / top_k
    return (scaled - scaled.round()).abs() <= 0.5 / step + 1e-4


def most_read(grouping: str, each: float, heads: int, pixels: int, fewest: int, most: int) -> int:
    """An upper bound on the keys that all heads of a query read together, if it sees `fewest` to `most` keys and each
    head wants `each` of them."""
    groups = heads if grouping == "query" else 1
    wanted = heads * each
    bound = wanted + most / pixels * groups + wanted * pixels / max(fewest, pixels) + groups
    if fewest < pixels:  # a pixel has at most one token
        bound = max(bound, heads * math.sqrt(each * pixels) + groups)
    every = heads * most
    return every if grouping in ("head", "batch") else min(every, math.ceil(bound))


Compute = Callable[..., tuple[Tensor, ...]]


def by_rows(
    compute: Compute, numbers: int, totals: Tensor, whole: tuple[Tensor, ...], by_query: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``compute(totals, *whole, *by_query)``, where each query needs about `numbers` temporary numbers.

    If that is too much memory, queries are processed in blocks, and backward recomputes intermediate results.
    """
    n = totals.shape[1]
    size = max(1, NUMBERS_AT_ONCE // max(numbers, 1))
    with without_autocast(totals.device):  # everything inside is in at least float32
        if size >= n:
            return compute(totals, *whole, *by_query)
        parts = []
        for start in range(0, n, size):
            rows = slice(start, start + size)
            inputs = (totals[:, rows], *whole, *(x[:, :, rows] for x in by_query))
            parts.append(recomputed(compute, *inputs))
    return tuple(torch.cat(found, 2) for found in zip(*parts, strict=True))


def _dense_rows(p: Problem) -> Compute:
    """Products with all keys, masked to the kept ones."""
    ranks = p.ranks.keys

    def compute(totals: Tensor, k: Tensor, v: Tensor, kept: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        heads = q.shape[1]
        pixel, visible = pixels_of_keys(ranks, totals, kept.shape[-1], p.jitter)
        if p.oversample > 1:
            visible = visible & read_regularly(p.top_k, p.oversample, ranks[:, None], totals[:, :, None])
        pixel = pixel[:, None].expand(*kept.shape[:3], -1)
        allowed = kept.gather(-1, pixel) & visible[:, None]
        scores = q @ wide(k).repeat_interleave(heads // k.shape[1], 1).mT
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        weights = torch.where(allowed, weights, 0)
        output = weights @ wide(v).repeat_interleave(heads // v.shape[1], 1)
        return (output, weights) if p.want_weights else (output,)

    return compute


def _gathered_rows(p: Problem, most: int) -> Compute:
    """Products with the kept keys only: at most `most` for each query, ordered by head."""
    slots = slots_by_rank(p.ranks, p.estimate.shape[0])

    def compute(totals: Tensor, k: Tensor, v: Tensor, kept: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        batch, heads, n, _ = q.shape
        pixels, m = kept.shape[-1], k.shape[2]
        first = first_keys(totals, pixels)
        counts = (first.diff(dim=-1)[:, :, None] * kept.transpose(1, 2)).flatten(2)  # (b, n, h * c)
        ends = counts.cumsum(-1)
        entry = torch.arange(most, device=q.device).expand(batch, n, -1).contiguous()
        place = torch.searchsorted(ends, entry, right=True)
        inside = place < heads * pixels
        place = place.clamp(max=heads * pixels - 1)
        head = place.div(pixels, rounding_mode="floor")
        key = entry - (ends - counts).gather(-1, place) + first.expand(batch, -1, -1).gather(-1, place % pixels)
        key = key.clamp(0, m - 1)
        if p.oversample > 1:
            inside = inside & read_regularly(p.top_k, p.oversample, key, totals[..., None])
        slot = key if slots is None else slots.gather(1, key.flatten(1)).view_as(key)
        row = torch.arange(batch, device=q.device)[:, None, None]
        query = torch.arange(n, device=q.device)[:, None]
        group = head.div(heads // k.shape[1], rounding_mode="floor")
        scores = (wide(k[row, group, slot]) * q[row, head, query]).sum(-1)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~inside, lowest)
        top = scores.new_full((batch, n, heads), lowest).scatter_reduce(-1, head, scores.detach(), "amax")
        weights = torch.where(inside, (scores - top.gather(-1, head)).exp(), 0)
        weighted = weights[..., None] * wide(v[row, group, slot])
        sums = weights.new_zeros(batch, n, heads).scatter_add(-1, head, weights)
        output = weighted.new_zeros(batch, n, heads, v.shape[-1])
        output = output.scatter_add(2, head[..., None].expand_as(weighted), weighted)
        output = output / torch.where(sums > 0, sums, 1)[..., None]
        return (output.transpose(1, 2),)

    return compute
