"""Attention to retrieved blocks in PyTorch: gathers the keys and values that some of the queries retrieve at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.precision import wide
from regard.engines.grouped_attention import log_sum, normalized, product
from regard.engines.retrieved_attention.problem import Problem, tolerance

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NUMBERS_AT_ONCE = 1 << 24
"""Number of elements in retrieved keys above which queries are processed in blocks."""


@dataclass(frozen=True)
class Blocks:
    """The complete blocks of a cache that contain a token, in order of time: the newest is the last column.

    Attributes:
        count: number of blocks.
        begins, ends: the slot before each block's tokens, and the slot of its landmark.
        exists: whether a column holds a block; a row may have fewer blocks than columns.
    """

    count: Int[Tensor, " b"]
    begins: Int[Tensor, "b blocks"]
    ends: Int[Tensor, "b blocks"]
    exists: Bool[Tensor, "b blocks"]


def blocks_of(p: Problem) -> Blocks:
    """The complete blocks of a problem's cache."""
    slots, blocks = p.landmark.shape[1], p.closed.shape[1]
    exists = p.closed >= (p.length - p.cached)[:, None]
    ends = p.closed + (slots - p.length)[:, None]
    begins = F.pad(torch.where(exists, ends, -1)[:, :-1], (1, 0), value=-1)[:, :blocks]
    return Blocks(exists.sum(-1), begins, ends.clamp(min=0), exists)


def landmark_scores(q: Float[Tensor, "b h n d"], p: Problem, blocks: Blocks) -> Float[Tensor, "b h n blocks"]:
    """Landmark scores by which blocks are chosen, without gradients; -inf where there is no block."""
    keys = wide(p.marks)
    if p.rotate is not None:
        total = p.closed.shape[1]
        slot = torch.arange(total, device=q.device) - total + blocks.count.clamp(max=p.top_k + 1)[:, None]
        keys = p.rotate(keys, slot.clamp(min=0) * (p.block + 1) + p.block)
    scores = (p.scale * product(wide(q), keys.mT)).detach()
    return scores.masked_fill(~blocks.exists[:, None, None], -torch.inf)


def margin_of(q: Float[Tensor, "b h n d"], p: Problem, blocks: Blocks) -> Float[Tensor, "b h n 1"]:
    """How far landmark scores may be apart as ties, see :func:`tolerance`; without gradients."""
    q, sizes = wide(q.detach()), wide(p.marks.detach()).norm(dim=-1)
    sizes = torch.where(sizes.isfinite() & blocks.exists[:, None], sizes, 0)
    longest = F.pad(sizes, (0, 1)).amax(-1).repeat_interleave(q.shape[1] // sizes.shape[1], 1)
    return tolerance(p.marks.dtype) * abs(p.scale) * q.norm(dim=-1, keepdim=True) * longest[..., None, None]


def best(
    scores: Float[Tensor, "b h n blocks"], margin: Float[Tensor, "b h n 1"], top_k: int
) -> Int[Tensor, "b h n picks"]:
    """Columns with the highest scores, in order of time; -1 if there are fewer. Scores no further than `margin` from the
    lowest one that is high enough are ties: of these the last columns are taken. NaN is the highest score."""
    scores = torch.where(scores.isnan(), torch.inf, scores)
    blocks = scores.shape[-1]
    picks = min(top_k, blocks)
    last = scores.topk(picks, -1).values[..., -1:]
    column = torch.arange(blocks, device=scores.device)
    order = torch.where(scores > last + margin, blocks + column, column).masked_fill(scores < last - margin, -1)
    found = order.topk(picks, -1).indices
    return torch.where(scores.gather(-1, found) != -torch.inf, found, -1).sort(-1).values


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.retrieved_attention.retrieved_attention`."""
    q, blocks, chosen = wide(q), blocks_of(problem), problem.chosen
    if chosen is None:
        scores = landmark_scores(q, problem, blocks)
        chosen = best(scores, margin_of(q, problem, blocks), problem.top_k)
    n, shared = q.shape[2], chosen.shape[2] == 1
    numbers = q.shape[0] * q.shape[1] * chosen.shape[3] * (problem.block + 1) * max(q.shape[3], v.shape[3])
    step = max(1, n if shared else min(n, NUMBERS_AT_ONCE // max(numbers, 1)))
    taken = _gathered(chosen, k, v, problem, blocks) if shared else None
    outputs, lses = [q.new_zeros(*q.shape[:2], 0, v.shape[3])], [q.new_zeros(*q.shape[:2], 0)]
    for start in range(0, n, step):
        rows = slice(start, start + step)
        here = _gathered(chosen[:, :, rows], k, v, problem, blocks) if taken is None else taken
        found, factors = _logits(q[:, :, rows], here, problem)
        weights = normalized(found) if factors is None else normalized(found) * factors
        outputs.append(here.read(problem.dropout.of_weights(weights)))
        lses.append(log_sum(found))
    return torch.cat(outputs, 2), torch.cat(lses, 2)


@dataclass(frozen=True)
class _Gathered:
    """Tokens of retrieved blocks, on the device of the call.

    Attributes:
        keys, values: keys rotated to their places, and values; the query axis has size 1 if all queries retrieve the
            same.
        inside: whether a place holds a token of its block, or the block's landmark, which comes last.
        found: whether there is a block.
    """

    keys: Float[Tensor, "b h #n picks size d"]
    values: Float[Tensor, "b h #n picks size v"]
    inside: Bool[Tensor, "b h #n picks size"]
    found: Bool[Tensor, "b h #n picks"]

    def scores(self, q: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n picks size"]:
        keys = self.keys.flatten(3, 4)
        found = q @ keys[:, :, 0].mT if keys.shape[2] == 1 else (keys @ q[..., None])[..., 0]
        return found.unflatten(-1, self.keys.shape[3:5])

    def read(self, weights: Float[Tensor, "b h n r"]) -> Float[Tensor, "b h n v"]:
        values = self.values.flatten(3, 4)
        if values.shape[2] == 1:
            return weights @ wide(values[:, :, 0])
        return (weights[..., None, :] @ wide(values))[..., 0, :]


def _gathered(block: Int[Tensor, "b h #n picks"], k: Tensor, v: Tensor, p: Problem, blocks: Blocks) -> _Gathered:
    """The tokens of the chosen blocks, rotated to their places."""
    total, size, picks = blocks.ends.shape[1], p.block + 1, block.shape[-1]
    found, block = block >= 0, block.clamp(min=0)
    row = torch.arange(block.shape[0], device=block.device)[:, None, None, None]
    within = torch.arange(size, device=block.device)
    slot = blocks.ends[row, block][..., None] + (within - p.block)  # (b, h, n, picks, size)
    inside = (slot >= 0) & found[..., None]
    slot = slot.clamp(min=0)
    row = row[..., None]
    token = ~p.landmark[row, slot] & (slot >= k.shape[2] - p.cached[:, None, None, None, None])
    inside = inside & (token | (within == p.block)) & (slot > blocks.begins[row[..., 0], block][..., None])
    head = torch.arange(block.shape[1], device=block.device) // (block.shape[1] // k.shape[1])
    place = [index.to(k.device) for index in (row, head[None, :, None, None, None], slot)]
    keys, values = (x[tuple(place)].to(block.device) for x in (k, v))  # (b, h, n, picks, size, d)
    keys = wide(keys)
    if p.rotate is not None:
        order = p.top_k - picks + torch.arange(picks, device=block.device)
        newest = (block >= total - p.top_k).long()
        count = blocks.count[:, None, None, None]
        at = torch.where(count <= p.top_k, block - total + count, order + newest).clamp(min=0)
        positions = at[..., None] * size + within
        flat = p.rotate(keys.flatten(3, 4).flatten(0, 2)[:, None], positions.flatten(3, 4).flatten(0, 2))
        keys = flat[:, 0].view(keys.shape)
    if p.softmax != "plain":
        inside = torch.cat([inside[..., :-1], torch.zeros_like(inside[..., -1:])], -1)
    return _Gathered(keys, values, inside, found)


def _logits(
    q: Float[Tensor, "b h n d"], taken: _Gathered, p: Problem
) -> tuple[Float[Tensor, "b h n r"], Float[Tensor, "b h n r"] | None]:
    """Logits of the tokens in retrieved blocks, by query and head; factors for the weights if gates are dropped."""
    scores, inside = p.scale * taken.scores(q), taken.inside
    if p.softmax != "grouped":
        return scores.masked_fill(~inside, -torch.inf).flatten(3), None
    gate = scores[..., -1:]
    total = torch.where(inside | ~taken.found[..., None], scores, -torch.inf).logsumexp(-1, keepdim=True)
    found = torch.where(inside, scores - total + gate, -torch.inf)
    kept = p.dropout.of_gates(gate.shape, q)
    return found.flatten(3), None if kept is None else kept.expand_as(found).flatten(3)
