"""Attention with explicit weights in PyTorch.

Softmax uses `scaled_dot_product_attention`, which never stores the scores; other rules, and what that function does not
support (weights, log-sum-exp, softcap, clipped weights, seeded dropout), compute the weights explicitly. Long sequences
are processed one block of queries at a time, with only the keys in reach, and the backward pass recomputes a block's
mask and scores, so that nothing of size N x M outlives a block. Under a window, many blocks of queries with their
overlapping keys form one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.backends.operators import transformed
from regard.core.draws import uniform
from regard.core.padding import pad_tokens
from regard.core.precision import wide_dtype
from regard.core.visibility import PositionBias, Ranks, Visibility, masked_scores_bias
from regard.engines.attention.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float

PAIRS_AT_ONCE = 1 << 22
"""Number of pairs to compute at once, counted in every row and head that stores numbers for them."""
SMALLEST_BLOCK = 64
LARGEST_BAND = 512
"""Largest block of queries under a window, unless the visibility rule itself has larger blocks."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Weighting:
    """Computes outputs from queries and keys, for one block of pairs."""

    problem: Problem
    explicit: bool
    """Whether to compute weights explicitly rather than inside `scaled_dot_product_attention`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor,
        added: Tensor | None,
        sink: Tensor | None,
        seed: int | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output and, if weights are explicit, the weights and the log-sum-exp; 0 for a query that sees nothing."""
        if self.explicit:
            return self._explicit(q, k, v, visible, added, sink, seed)
        some = visible.any(-1, keepdim=True)
        opened = visible | ~some
        mask = opened if added is None else torch.where(opened, added, -torch.inf)
        if added is not None and q.device.type != "cpu":
            mask = mask.to(q.dtype)  # a wider mask would exclude the kernels that do not store scores
        if sink is not None:
            q, k, v = with_sink(q, k, v, sink, self.problem.scale)
            mask = F.pad(mask, (1, 0), value=float(added is None))
        output = sdpa(q, k, v, mask, dropout=self.problem.dropout, scale=self.problem.scale)
        return torch.where(some, output, 0), None, None

    def _explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor,
        added: Tensor | None,
        sink: Tensor | None,
        seed: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = wide_dtype(q)
        k, v = grouped(k, q.shape[1]), grouped(v, q.shape[1])
        scores = (self.problem.scale * q.to(dtype)) @ k.to(dtype).mT
        if self.problem.softcap is not None:
            scores = self.problem.softcap * torch.tanh(scores / self.problem.softcap)
        if added is not None:
            scores = scores + added
        lse = None
        if self.problem.rule == "softmax":
            some = visible.any(-1, keepdim=True)
            scores = torch.where(visible | ~some, scores, -torch.inf)
            logits = scores
            if sink is not None:
                logits = torch.cat([scores, _finite(sink.to(dtype)).expand(*scores.shape[:-1], 1)], -1)
            weights = torch.where(visible, logits.softmax(-1)[..., : k.shape[-2]], 0)
            if self.problem.stretch is not None:
                low, high = self.problem.stretch
                weights = ((high - low) * weights + low).clamp(0, 1)
            if self.problem.want_lse:
                lse = torch.where(some[..., 0], scores.logsumexp(-1), -torch.inf)
        else:
            weights = torch.where(visible, ACTIVATIONS[self.problem.rule](scores + self.problem.shift), 0)
        kept, largest = weights, self.problem.largest
        if self.problem.dropout > 0:
            generator = None if seed is None else torch.Generator(q.device).manual_seed(seed)
            keep = uniform(weights.shape, generator, device=q.device, dtype=dtype) >= self.problem.dropout
            kept = weights * keep / (1 - self.problem.dropout)
        if largest is not None:
            kept, weights = only_largest(kept, largest), only_largest(weights, largest)
        return (kept @ v.to(dtype)).to(v.dtype), weights.to(v.dtype), lse


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`regard.engines.attention.attention`."""
    batch, heads, n, _ = q.shape
    m = k.shape[2]
    want_weights, want_lse = problem.want_weights, problem.want_lse
    if batch * heads * n == 0 or m == 0:
        return of_no_pairs(q, k, v, want_weights, want_lse)
    ranks, visibility, blocks = problem.ranks, problem.visibility, problem.blocks
    bias, position_bias = problem.bias, problem.position_bias
    scale, dropout, generator = problem.scale, problem.dropout, problem.generator
    if ranks.first is not None:
        visibility = visibility.within(ranks.first, n, m)
    # dropout in scaled_dot_product_attention takes no generator, and on a CPU it stores all scores
    dropped = dropout > 0 and (generator is not None or q.device.type == "cpu")
    explicit = problem.rule != "softmax" or want_weights or want_lse or dropped
    explicit = explicit or any(x is not None for x in (problem.softcap, problem.stretch, problem.largest))
    explicit = explicit or (problem.sink is not None and scale == 0)  # `with_sink` divides by the scale
    explicit = explicit or transformed()  # kernels lack forward-mode derivatives, and are batched by a loop
    sink = None if problem.sink is None else problem.sink[None, :, None, None]
    by_head = explicit or bias is not None or position_bias is not None
    if not by_head and blocks is None and ranks.plain:
        square = ranks.offset == 0 and n == m
        if visibility.everything or (visibility == Visibility(causal=True) and square):
            return _plain(q, k, v, sink, visibility.causal, dropout, scale), None, None

    weighting = Weighting(problem, explicit)
    rows = batch * heads if by_head else max(ranks.queries.shape[0], ranks.keys.shape[0])
    whole = torch.compiler.is_exporting()  # as one block, so that the program does not depend on the length
    if blocks is None and not want_weights and (bias is None or bias.shape[-1] == 1) and not whole:
        band = Band.of(visibility, ranks, n, m)
        if band is not None:
            output, lse = _in_bands(
                band, weighting, q, k, v, ranks, visibility, bias, position_bias, sink, generator, by_head, rows
            )
            return output, None, lse

    back, ahead = visibility.reach()
    step = max(SMALLEST_BLOCK, PAIRS_AT_ONCE // (rows * m))
    one_row = visibility.everything and not by_head and blocks is None  # one mask row serves all queries
    at_once = whole or one_row or n <= step
    pieces = []
    for start in (0,) if at_once else range(0, n, step):
        stop = n if at_once else min(start + step, n)
        first, last = 0, m
        if ranks.offset is not None and not whole:
            # only the keys in reach, but at least one
            first = 0 if back is None else min(max(0, start + ranks.offset - back), m - 1)
            last = m if ahead is None else max(first + 1, min(m, stop + ranks.offset + ahead))
        here = Ranks(ranks.queries[:, start:stop], ranks.keys[:, first:last], None, None, False)
        part = bias
        if part is not None:
            part = part[..., start:stop, :] if part.shape[-2] > 1 else part
            part = part[..., first:last] if part.shape[-1] > 1 else part
        seed = _seed(generator, dropout)

        def attend(
            q_: Tensor,
            k_: Tensor,
            v_: Tensor,
            here: Ranks = here,
            part: Tensor | None = part,
            seed: int | None = seed,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            visible, added = masked_scores_bias(here, visibility, part, position_bias, blocks, q_.dtype)
            return weighting(q_, k_, v_, visible, added, sink, seed)

        tensors = (q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last])
        output, weights, lse = _maybe_again(attend, tensors, not at_once and not want_weights)
        if want_weights and weights is not None:
            weights = F.pad(weights, (first, m - last))
        pieces.append((output, weights, lse))
    return (
        torch.cat([p[0] for p in pieces], 2),
        torch.cat([p[1] for p in pieces if p[1] is not None], 2) if want_weights else None,
        torch.cat([p[2] for p in pieces if p[2] is not None], 2) if want_lse else None,
    )


def part_gradients(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`regard.engines.attention.part_gradients`: uses explicit weights, one block of queries at a time."""
    dtype = wide_dtype(q)
    groups, m = k.shape[1], k.shape[2]
    wide_k, wide_v = grouped(k, q.shape[1]).to(dtype), grouped(v, q.shape[1]).to(dtype)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    step = max(SMALLEST_BLOCK, PAIRS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * m))
    rows = []
    for start in range(0, q.shape[2], step):
        some = slice(start, start + step)
        block, slope, sums = (x[:, :, some].to(dtype) for x in (q, grad, lse[..., None]))
        scores = problem.scale * block @ wide_k.mT
        if problem.visibility.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = (scores - sums).exp()
        dv += weights.mT @ slope
        inside = weights * (slope @ wide_v.mT - (slope * out[:, :, some].to(dtype)).sum(-1, keepdim=True))
        dk += problem.scale * inside.mT @ block
        rows.append(problem.scale * inside @ wide_k)
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return torch.cat(rows, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def only_largest(weights: Float[Tensor, "*b m"], count: int) -> Float[Tensor, "*b m"]:
    """Keep the `count` largest weights of each row and set the rest to 0."""
    wide = F.pad(weights, (0, count))  # so that topk always finds `count` entries, even with fewer keys
    found, places = wide.topk(count, dim=-1)
    return torch.zeros_like(wide).scatter(-1, places, found)[..., : weights.shape[-1]]


def of_no_pairs(
    q: Tensor, k: Tensor, v: Tensor, want_weights: bool, want_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The result of :func:`run` without rows, queries or keys: zeros, with gradients as in any other call."""
    weights = q.to(v.dtype) @ grouped(k, q.shape[1]).to(v.dtype).mT  # has no elements
    lse = weights.to(wide_dtype(q)).logsumexp(-1) if want_lse else None
    return weights @ grouped(v, q.shape[1]), weights if want_weights else None, lse


@dataclass(frozen=True)
class Band:
    """Blocks of `size` query slots, each with the key slots from `back` before it to `ahead` after it.

    `lead` empty slots precede the first query, so that blocks are aligned with those of the visibility rule.
    """

    size: int
    back: int
    ahead: int
    lead: int

    @classmethod
    def of(cls, visibility: Visibility, ranks: Ranks, n: int, m: int) -> Band | None:
        """The blocks for a visibility rule of limited reach; None if they would save nothing."""
        back, ahead = visibility.reach()
        if ranks.offset is None or back is None or ahead is None:
            return None
        size, lead = min(max(back + ahead, SMALLEST_BLOCK), LARGEST_BAND), 0
        block = visibility.block
        if block is not None and ranks.first is not None:
            size = block * math.ceil(SMALLEST_BLOCK / block)
            lead = ranks.first % block
            back = min(back, visibility.lookback * block)
            ahead = min(ahead, visibility.lookahead * block)
        return cls(size, back, ahead, lead) if n > size and back + size + ahead < m else None

    @property
    def extent(self) -> int:
        """Number of key slots for each block of queries."""
        return self.back + self.size + self.ahead

    def queries(self, x: Tensor, axis: int) -> Tensor:
        """Split an axis of query slots into (blocks, size)."""
        axis %= x.ndim
        after = -(self.lead + x.shape[axis]) % self.size
        return pad_tokens(x, self.lead, after, axis).unflatten(axis, (-1, self.size))

    def keys(self, x: Tensor, axis: int, offset: int, count: int, fill: int = 0) -> Tensor:
        """Overlapping windows of an axis of key slots: a view (..., blocks, ..., extent) with the windows last."""
        axis %= x.ndim
        front = self.back + self.lead - offset
        total = (count - 1) * self.size + self.extent
        padding = (0, 0) * (x.ndim - 1 - axis) + (front, total - front - x.shape[axis])
        return F.pad(x, padding, value=fill).contiguous().unfold(axis, self.extent, self.size)


def _in_bands(
    band: Band,
    weighting: Weighting,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Ranks,
    visibility: Visibility,
    bias: Tensor | None,
    position_bias: PositionBias | None,
    sink: Tensor | None,
    generator: torch.Generator | None,
    by_head: bool,
    rows: int,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp if `band` covers all visible pairs; blocks replace heads, (B H, blocks, size)."""
    batch, heads, n, _ = q.shape
    assert ranks.offset is not None
    q = band.queries(q, 2).flatten(0, 1)  # b*h c s d
    count = q.shape[1]
    k, v = (
        band.keys(grouped(x, heads), 2, ranks.offset, count).flatten(0, 1).mT  # b*h c e d
        for x in (k, v)
    )
    shared = max(ranks.queries.shape[0], ranks.keys.shape[0], 1 if bias is None else bias.shape[0])
    query_ranks = band.queries(ranks.queries, 1).expand(shared, -1, -1)
    key_ranks = band.keys(ranks.keys, 1, ranks.offset, count, fill=-1).expand(shared, -1, -1)
    if bias is not None:
        # (shared, c, h, s, 1): one number per query, or the same for all
        bias = band.queries(bias, 2) if bias.shape[2] > 1 else bias[:, :, None].expand(-1, -1, count, -1, -1)
        bias = bias.transpose(1, 2).expand(shared, -1, -1, -1, -1)
    by_row_sink = None if sink is None else sink.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    def to_bands(x: Tensor, blocks: int) -> Tensor:
        x = x.unflatten(0, (-1, blocks)).transpose(1, 2)  # b? h? c s e
        if x.shape[0] == x.shape[1] == 1:
            return x[0]
        return x.expand(batch, heads, -1, -1, -1).flatten(0, 1)

    step = max(1, PAIRS_AT_ONCE // (rows * band.size * band.extent)) if by_head else count
    pieces = []
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        seed = _seed(generator, weighting.problem.dropout)

        def attend(
            q_: Tensor, k_: Tensor, v_: Tensor, part: slice = part, seed: int | None = seed
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            here = Ranks(query_ranks[:, part].flatten(0, 1), key_ranks[:, part].flatten(0, 1), None, None, False)
            by_row = None if bias is None else bias[:, part].flatten(0, 1)
            visible, added = masked_scores_bias(here, visibility, by_row, position_bias, None, q_.dtype)
            blocks = part.stop - part.start
            added = None if added is None else to_bands(added, blocks)
            return weighting(q_, k_, v_, to_bands(visible, blocks), added, by_row_sink, seed)

        pieces.append(_maybe_again(attend, (q[:, part], k[:, part], v[:, part]), step < count))

    def back(x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(0, (batch, heads))[:, :, band.lead : band.lead + n]

    output = back(torch.cat([p[0] for p in pieces], 1))
    if not weighting.problem.want_lse:
        return output, None
    return output, back(torch.cat([p[2] for p in pieces if p[2] is not None], 1))


def _plain(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, causal: bool, dropout: float, scale: float) -> Tensor:
    """Softmax attention to all keys or, if causal, to those up to the query."""
    hidden = None
    if q.device.type == "cpu":
        # without a mask the CPU kernel returns 0 for many rows whose scores are NaN
        keys = grouped(k, q.shape[1]).isnan().any(-1)
        keys = keys.cumsum(-1) > 0 if causal else keys.any(-1, keepdim=True)
        hidden = torch.where(q.isnan().any(-1) | keys, torch.nan, 0.0).to(v.dtype)[..., None]
    if sink is not None:
        q, k, v = with_sink(q, k, v, sink, scale)
        if causal:
            q = F.pad(q, (0, 0, 1, 0))  # a leading query for the sink, so that all other queries see the sink
    output = sdpa(q, k, v, dropout=dropout, causal=causal, scale=scale)
    output = output[:, :, 1:] if causal and sink is not None else output
    return output if hidden is None else output + hidden


def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Prepend a key whose score is the sink (the same for all queries) and whose value is 0.

    The score comes from an additional feature that only this key has, so that heads can still share keys.
    """
    width = q.shape[-1]
    extra = 8 - width % 8  # kernels need widths that are multiples of 8
    feature = _finite((sink / scale).to(q.dtype))  # infinity times the other keys' 0 would be NaN
    q = F.pad(torch.cat([q, feature.expand(*q.shape[:-1], 1)], -1), (0, extra - 1))
    unit = (torch.arange(width + extra, device=k.device) == width).to(k.dtype)
    k = torch.cat([unit.expand(*k.shape[:-2], 1, -1), F.pad(k, (0, extra))], -2)
    return q, k, F.pad(v, (0, 0, 1, 0))


def _finite(x: Tensor) -> Tensor:
    largest = torch.finfo(x.dtype).max / 2
    return x.clamp(-largest, largest)


def _maybe_again(
    attend: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]], tensors: tuple[Tensor, ...], again: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run one block; with `again`, backward recomputes its intermediate results instead of storing them."""
    if again and torch.is_grad_enabled() and not transformed():
        return checkpoint(attend, *tensors, use_reentrant=False)
    return attend(*tensors)


def _seed(generator: torch.Generator | None, dropout: float) -> int | None:
    """A seed for one block's dropout, so that recomputing the block draws the same numbers."""
    if generator is None or dropout == 0:
        return None
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


def grouped(x: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` for grouped heads, values of any width (in their dtype) and second derivatives.

    Pads keys or values to equal widths on a CPU: its kernel needs that, and would otherwise store the whole score
    matrix.
    """
    width, wanted, dtype = q.shape[-1], v.shape[-1], v.dtype
    if q.device.type == "cpu" and width != wanted:
        q, k, v = (F.pad(x, (0, max(width, wanted) - x.shape[-1])) for x in (q, k, v))
    groups = False
    if k.shape[1] != q.shape[1]:  # for symbolic sizes torch accepts a branch, but no bool
        groups = True
    if _runs_cpu_kernel(q, k, v, mask, dropout, causal, scale, groups):
        if groups:
            k, v = grouped(k, q.shape[1]), grouped(v, q.shape[1])
        output = _CpuKernel.apply(q, k, v, mask, causal, scale)
    else:
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=groups
        )
    return output[..., :wanted].to(dtype)  # autocast may compute in another dtype


def _runs_cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float, groups: bool
) -> bool:
    """Return whether PyTorch would choose its CPU flash kernel, which alone has no second derivatives."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return False
    chosen = torch._fused_sdp_choice(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=groups
    )
    return chosen == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


class _CpuKernel(torch.autograd.Function):
    """PyTorch's CPU kernel; its second derivatives are computed with explicit weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, mask, output, lse)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, output, lse = ctx.saved_tensors
        if not torch.is_grad_enabled():
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = kernel(grad, q, k, v, output, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
            return (*found, None, None, None)
        inputs = q, k, v = tuple(x.view_as(x) for x in (q, k, v))  # q, k and v may be one tensor
        again = _with_weights(q, k, v, mask, causal=ctx.causal, scale=ctx.scale)
        wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        slopes = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
        return (*(next(slopes) if need else None for need in ctx.needs_input_grad[:3]), None, None, None)


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> Tensor:
    """`scaled_dot_product_attention`, with the whole score matrix."""
    dtype = wide_dtype(q)
    k, v = grouped(k, q.shape[1]), grouped(v, q.shape[1])
    scores = (scale * q.to(dtype)) @ k.to(dtype).mT
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v.to(dtype)).to(q.dtype)
