"""The gated recurrence in PyTorch, chunk by chunk.

Inside a chunk, everything is built from one primitive, the decayed product

    A(x, y)_ij = sum_d x_id y_jd exp(sum of g_rd for r in (j, i]),      j <= i,

which gives the weights A(q, k) of the outputs and, strictly below the diagonal, the triangular system of the delta
rule. Exponents are sums of non-positive numbers over the segment itself: differences of cumulative sums would lose two
digits for strong gates, and would turn -inf gates into NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.precision import wide_dtype
from regard.engines.gated_recurrence.problem import Problem
from regard.engines.scan import chunk_count, fold, in_chunks

if TYPE_CHECKING:
    from jaxtyping import Float


FORGET = -1e4
"""Replaces -inf in log decays: its exponential is exactly 0 in every dtype, and 0 * FORGET is 0, not NaN."""


def segment_sum(g: Float[Tensor, "... n d"]) -> Float[Tensor, "... d n n"]:
    """Sums of finite g over (j, i], 0 where i <= j: a product with constant zeros and ones, so nothing is subtracted.

    Features precede the pair of tokens, so that later operations on the result access contiguous memory for any width.
    """
    n = g.shape[-2]
    place = torch.arange(n, device=g.device)
    upto, after = (place <= place[:, None]).to(g.dtype), (place > place[:, None]).to(g.dtype)  # r <= i, r > j
    if g.shape[-1] == 1:
        return (g.mT * upto)[..., None, :, :] @ after.mT
    inside = (upto[:, None] * after[None]).flatten(0, 1)  # (i j, r)
    return (g.mT @ inside.mT).unflatten(-1, (n, n))


def solve_unit(lower: Float[Tensor, "... c c"], right: Float[Tensor, "... c v"]) -> Float[Tensor, "... c v"]:
    """Solve (I + L) X = R for X, with L strictly below the diagonal."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return solve_unit_by_products(lower, right)
    return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)


def solve_unit_by_products(
    lower: Float[Tensor, "... c c"], right: Float[Tensor, "... c v"]
) -> Float[Tensor, "... c v"]:
    """:func:`solve_unit` by products alone, for ONNX, which has no triangular solver.

    Inverts diagonal blocks of doubling size: the inverse of [[A, 0], [C, D]] has -D^-1 C A^-1 in place of C, a product
    of the inverses found so far with C.
    """
    size = lower.shape[-1]
    place = torch.arange(size, device=lower.device)
    inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
    width = 1
    while width < size:
        row, column = place[:, None] // width, place // width
        below = (row == column + 1) & (row // 2 == column // 2)
        inverse = inverse - inverse @ torch.where(below, lower, 0) @ inverse
        width *= 2
    return inverse @ right


def suffix_sum(g: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
    """Sums of g over the tokens after each token j: (j, end]."""
    shifted = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return shifted.flip(-2).cumsum(-2).flip(-2)


def decayed_product(
    x: Float[Tensor, "... c k"], y: Float[Tensor, "... c k"], g: Float[Tensor, "... c #k"] | None, sub_chunk: int
) -> Float[Tensor, "... c c"]:
    """A(x, y) on and below the diagonal; entries above it are 0."""
    if g is None:
        return (x @ y.mT).tril()
    if g.shape[-1] == 1:
        return (x @ y.mT * segment_sum(g)[..., 0, :, :].exp()).tril()
    rows = []
    past: Tensor | None = None
    length = x.shape[-2]
    for start in range(0, length, sub_chunk):
        part = slice(start, min(start + sub_chunk, length))
        x_here, y_here, g_here = x[..., part, :], y[..., part, :], g[..., part, :]
        seen = y_here.mT[..., None, :] * segment_sum(g_here).exp()  # (..., k, i, j)
        near = (x_here[..., None, :] @ seen.movedim(-3, -2))[..., 0, :].tril()
        row = [near]
        if past is not None:
            row.insert(0, (x_here * g_here.cumsum(-2).exp()) @ past.mT)
        rows.append(F.pad(torch.cat(row, -1), (0, length - part.stop)))
        decayed = y_here * suffix_sum(g_here).exp()
        past = decayed if past is None else torch.cat([past * g_here.sum(-2, keepdim=True).exp(), decayed], -2)
    return torch.cat(rows, -2)


def for_each_head(x: Float[Tensor, "b g *n k"], v: Float[Tensor, "b h *n v"]) -> Float[Tensor, "b h *n k"]:
    """Repeat queries or keys that H / G consecutive heads of values share, once for each head."""
    return x if x.shape[1] == v.shape[1] else x.repeat_interleave(v.shape[1] // x.shape[1], 1)


def run(problem: Problem, chunk_size: int, sub_chunk: int) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.gated_recurrence.gated_recurrence`."""
    q, k, v, log_decay, beta, state = problem.learned
    assert k is not None and v is not None
    dtype = wide_dtype(v)
    q, k = (None if q is None else for_each_head(q, v)), for_each_head(k, v)
    batch, heads, n, width = k.shape
    if state is None:
        state = k.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    state = state.to(dtype)
    if n == 0:
        return (None if q is None else v), state
    size = chunk_size if torch.compiler.is_exporting() else min(chunk_size, n)
    count = chunk_count(n, size)

    def chunks(x: Tensor | None) -> Tensor | None:
        # (b, h, n, d) -> (b, h, chunks, size, d); zero padding neither writes nor decays
        return None if x is None else in_chunks(x.to(dtype), 2, count, size)

    q_, k_, v_ = chunks(q), chunks(k), chunks(v)
    g = chunks(None if log_decay is None else log_decay.clamp(min=FORGET))
    beta_ = None if beta is None else chunks(beta[..., None])
    assert k_ is not None and v_ is not None
    k_out, k_in, q_in, total = k_, k_, q_, None
    if g is not None:
        from_start = g.cumsum(-2).exp()
        k_out, k_in = k_ * suffix_sum(g).exp(), k_ * from_start
        q_in = None if q_ is None else q_ * from_start
        total = g.sum(-2).exp()[..., None]
    if beta_ is not None:
        # (I + L) u = beta (v - k_in S): solved for v and k_in together, before the states are known
        lower = beta_ * decayed_product(k_, k_, g, sub_chunk).tril(-1)
        right = beta_ * torch.cat([v_, k_in], -1)
        solved = solve_unit(lower, right)
        v_, k_in = solved.split([v.shape[-1], width], -1)
    near = None
    if q_ is not None:
        near = decayed_product(q_, k_, g, sub_chunk)
        near = near if problem.inclusive else near.tril(-1)
        if beta_ is None:
            near = near @ v_

    def chunk(
        carry: tuple[Tensor, ...],
        q_in: Tensor | None,
        k_in: Tensor | None,
        k_out: Tensor,
        u: Tensor,
        near: Tensor | None,
        total: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        (state,) = carry
        if k_in is not None:
            u = u - k_in @ state
        output = u.new_zeros(0, 0, 0, 0)
        if q_in is not None and near is not None:
            output = q_in @ state + (near if beta is None else near @ u)
        write = k_out.mT @ u
        return (write + (state if total is None else total * state),), output

    pieces = (q_in, None if beta is None else k_in, k_out, v_, near, total)
    (state,), y = fold(chunk, (state,), pieces, 2)
    return None if q is None else y.flatten(2, 3)[:, :, :n].to(v.dtype), state


def run_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.gated_recurrence.gated_recurrence_step`."""
    dtype = state.dtype
    q, k, u = for_each_head(q, v).to(dtype), for_each_head(k, v).to(dtype), v.to(dtype)
    if log_decay is not None:
        state = state * log_decay.to(dtype).exp()[..., None]
    if beta is not None:
        u = beta.to(dtype)[..., None] * (u - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k[..., None] * u[..., None, :]
    return torch.einsum("bhkv,bhk->bhv", state, q).to(v.dtype), state
