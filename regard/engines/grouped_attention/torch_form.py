"""Softmax in two levels in PyTorch: all pairs of positions, for some queries at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.core.precision import wide
from regard.core.visibility import Ranks, Visibility, masked_scores_bias
from regard.engines.attention.torch_form import of_no_pairs
from regard.engines.grouped_attention.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float

PAIRS_AT_ONCE = 1 << 18
"""Number of pairs of positions above which queries are processed in blocks."""


def product(a: Float[Tensor, "b h n x"], b: Float[Tensor, "b g x y"]) -> Float[Tensor, "b h n y"]:
    """a @ b, where each group of b serves h / g heads of a."""
    groups = b.shape[1]
    if a.shape[1] == groups:
        return a @ b
    return (a.unflatten(1, (groups, -1)).flatten(2, 3) @ b).unflatten(2, (-1, a.shape[2])).flatten(1, 2)


def logits(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], problem: Problem
) -> tuple[Float[Tensor, "b h n m"], Float[Tensor, "b h n m"] | None]:
    """S + C, whose softmax is W, with -inf where W is 0; and factors for the weights if gates are dropped.

    C_ij is 0 for tokens of the own group; for others it is the landmark's score minus the log-sum-exp of the group's
    tokens. Every key points to the landmark that closes its group; tables over groups are tables over landmark slots,
    filled by scattering along these pointers.
    """
    p, landmark, own = problem, problem.landmark, problem.own
    scores = p.scale * product(wide(q), wide(k).mT)
    rule = Visibility(causal=p.causal)
    visible, added = masked_scores_bias(p.ranks, rule, p.bias, p.position_bias, p.blocks, scores.dtype)
    scores = scores if added is None else scores + added
    marks = landmark[:, None, None]
    slots = torch.arange(k.shape[2], device=k.device)
    # Without a landmark after it, a key points to the last slot, which opens no gate unless it is a landmark.
    closing = torch.where(landmark, slots, k.shape[2] - 1).flip(-1).cummin(-1).values.flip(-1)
    tokens = visible & ~marks
    opened = (visible & marks).expand(landmark.shape[0], -1, scores.shape[2], -1)
    gated = tokens & opened.gather(-1, closing[:, None, None].expand_as(opened))
    local = torch.zeros_like(gated)
    if own is not None:
        group = landmark.cumsum(-1) - landmark.long()
        mine = (own[:, :, None] == group[:, None])[:, None]
        gated, local = gated & ~mine, tokens & mine

    index = closing[:, None, None].expand_as(scores)
    inner = torch.where(gated, scores, -torch.inf)
    peak = torch.full_like(scores, -torch.inf).scatter_reduce(-1, index, inner.detach(), "amax").detach()
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = torch.zeros_like(scores).scatter_add(-1, index, (inner - peak.gather(-1, index)).exp())
    gate = scores - peak - torch.where(total > 0, total, 1.0).log()  # C, at the slots of landmarks
    found = torch.where(gated, scores + gate.gather(-1, index), torch.where(local, scores, -torch.inf))
    kept = p.dropout.of_gates(scores.shape, q)
    return found, None if kept is None else torch.where(gated, kept.gather(-1, index), 1.0)


def normalized(logits: Tensor) -> Tensor:
    """Softmax; 0 where all logits are -inf. NaN stays NaN."""
    some = (logits != -torch.inf).any(-1, keepdim=True)
    return torch.where(some, logits, 0.0).softmax(-1) * some


def log_sum(logits: Float[Tensor, "*q m"]) -> Float[Tensor, "*q"]:
    """Log-sum-exp; -inf, without a gradient, if all logits are -inf."""
    some = (logits != -torch.inf).any(-1)
    return torch.where(some, torch.where(some[..., None], logits, 0.0).logsumexp(-1), -torch.inf)


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`regard.engines.grouped_attention.grouped_attention`."""
    n, m = q.shape[2], k.shape[2]
    ranks, dropout, want_weights = problem.ranks, problem.dropout, problem.want_weights
    if n == 0 or m == 0:
        return of_no_pairs(q, k, v, want_weights, problem.want_lse)
    size = n if n * m <= PAIRS_AT_ONCE else max(1, PAIRS_AT_ONCE // m)
    offset = ranks.offset if problem.causal else None
    outputs, found_weights, lses = [], [], []
    for start in range(0, n, size):
        rows = slice(start, start + size)
        columns = slice(0, m if offset is None else max(1, min(m, start + size + offset)))
        bias = problem.bias
        if bias is not None:
            every = slice(None)
            bias = bias[..., rows if bias.shape[-2] > 1 else every, columns if bias.shape[-1] > 1 else every]
        part = replace(
            problem,
            ranks=Ranks(ranks.queries[:, rows], ranks.keys[:, columns], offset=None, first=None, plain=False),
            landmark=problem.landmark[:, columns],
            own=None if problem.own is None else problem.own[:, rows],
            bias=bias,
        )

        def attend(q_: Tensor, k_: Tensor, v_: Tensor, part: Problem = part) -> tuple[Tensor, Tensor, Tensor | None]:
            found, factors = logits(q_, k_, part)
            lse = log_sum(found) if part.want_lse else None
            found = normalized(found)
            found = dropout.of_weights(found if factors is None else found * factors)
            return product(found, wide(v_)).to(v_.dtype), found, lse

        arguments = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        # An explicit generator would draw other numbers when recomputing: random weights are stored instead.
        if size < n and torch.is_grad_enabled() and not dropout.random and not want_weights:
            output, found, lse = checkpoint(attend, *arguments, use_reentrant=False)
        else:
            output, found, lse = attend(*arguments)
        outputs.append(output)
        if lse is not None:
            lses.append(lse)
        if want_weights:
            found_weights.append(F.pad(found.to(v.dtype), (0, m - columns.stop)))
    return (
        torch.cat(outputs, 2),
        torch.cat(found_weights, 2) if want_weights else None,
        torch.cat(lses, 2) if lses else None,
    )
