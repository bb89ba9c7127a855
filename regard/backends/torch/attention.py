"""Attention with explicit weights in PyTorch.

Softmax goes through `scaled_dot_product_attention`, which tiles on CPUs and GPUs; masks are built for one block of
queries at a time and keys out of reach are left out, so neither scores nor masks of size N x M are ever stored for long
sequences. Other rules recompute their scores in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.contract import BlockMask
from regard.visibility import PositionBias, Ranks, Visibility, masked_scores_bias

QUERY_BLOCK = 512
PAIRS_AT_ONCE = 1 << 20
"""Pairs of positions above which queries are taken block by block."""


def _slice(ranks: Ranks, rows: slice, columns: slice) -> Ranks:
    return Ranks(ranks.queries[:, rows], ranks.keys[:, columns], ranks.offset, ranks.plain)


def _grouped(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Ranks,
    visibility: Visibility,
    scale: float,
    rule: str,
    shift: float,
    bias: Tensor | None,
    position_bias: PositionBias | None,
    blocks: BlockMask | None,
    dropout: float,
    generator: torch.Generator | None,
    want_weights: bool,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`regard.engines.attention.attention`."""
    n, m = q.shape[-2], k.shape[-2]
    if n == 0 or m == 0:
        weights = q.new_zeros(*q.shape[:-1], m) if want_weights else None
        lse = q.new_full(q.shape[:-1], -torch.inf) if want_lse else None
        return v.new_zeros(*q.shape[:-1], v.shape[-1]), weights, lse
    explicit = rule != "softmax" or want_weights or want_lse or (dropout > 0 and generator is not None)
    added = bias is not None or position_bias is not None or blocks is not None
    if not explicit and not added and ranks.plain:
        square = ranks.offset == 0 and n == m
        if visibility.everything or (visibility == Visibility(causal=True) and square):
            grouped = k.shape[1] != q.shape[1]
            causal = visibility.causal
            return (
                F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
                ),
                None,
                None,
            )

    k, v = _grouped(k, q.shape[1]), _grouped(v, q.shape[1])
    back, ahead = visibility.reach()
    limited = ranks.offset is not None and (back is not None or ahead is not None)
    step = n if n * m <= PAIRS_AT_ONCE and not (limited and back is not None and back < m // 2) else QUERY_BLOCK
    if limited and back is not None:
        step = min(step, max(64, back + 1))
    pieces = []
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        columns = slice(0, m)
        if limited and ranks.offset is not None:
            first = 0 if back is None else max(0, rows.start + ranks.offset - back)
            last = m if ahead is None else max(0, min(m, rows.stop + ranks.offset + ahead))
            columns = slice(min(first, last), last)
        here = _slice(ranks, rows, columns)
        part = (
            None
            if bias is None
            else bias[..., rows if bias.shape[-2] > 1 else slice(None), columns if bias.shape[-1] > 1 else slice(None)]
        )

        def attend(
            q_: Tensor, k_: Tensor, v_: Tensor, here: Ranks = here, part: Tensor | None = part
        ) -> tuple[Tensor, ...]:
            visible, added = masked_scores_bias(here, visibility, part, position_bias, blocks, q_.dtype)
            if explicit:
                return _explicit(q_, k_, v_, visible, added, scale, rule, shift, dropout, generator)
            return (_softmax(q_, k_, v_, visible, added, scale, dropout),)

        arguments = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        if explicit and not want_weights and step < n and torch.is_grad_enabled():
            found = checkpoint(attend, *arguments, use_reentrant=False)
        else:
            found = attend(*arguments)
        if want_weights:
            found = (found[0], F.pad(found[1], (columns.start, m - columns.stop)), *found[2:])
        pieces.append(found)
    output = torch.cat([p[0] for p in pieces], 2)
    weights = torch.cat([p[1] for p in pieces], 2) if want_weights else None
    lse = torch.cat([p[2] for p in pieces], 2) if want_lse else None
    return output, weights, lse


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, added: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Softmax attention under a mask; a query that sees nothing gives 0 with finite gradients."""
    if k.shape[2] == 0:
        return v.new_zeros(*q.shape[:-1], v.shape[-1])
    some = visible.any(-1, keepdim=True)
    opened = visible | ~some
    mask = opened if added is None else torch.where(opened, added, -torch.inf)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return torch.where(some, output, 0)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    added: Tensor | None,
    scale: float,
    rule: str,
    shift: float,
    dropout: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by its weights: output, weights, log-sum-exp (the last only means something for softmax)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(dtype) @ k.to(dtype).mT)
    if added is not None:
        scores = scores + added.to(dtype)
    lse = scores.new_empty(())
    if rule == "softmax":
        some = visible.any(-1, keepdim=True)
        lse = torch.where(visible | ~some, scores, -torch.inf).logsumexp(-1)
        weights = torch.where(visible, (scores - lse[..., None]).exp(), 0)
        lse = torch.where(some[..., 0], lse, -torch.inf)
    else:
        weights = torch.where(visible, (scores + shift).sigmoid(), 0)
    kept = weights
    if dropout > 0:
        keep = torch.rand(weights.shape, generator=generator, device=q.device, dtype=dtype) >= dropout
        kept = weights * keep / (1 - dropout)
    return (kept @ v.to(dtype)).to(v.dtype), weights.to(v.dtype), lse.to(v.dtype)
