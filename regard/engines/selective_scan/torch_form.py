"""The selective scan in PyTorch, chunk by chunk.

A chunk is cut into strides of a few tokens. All strides of the chunk advance in parallel, first from an empty state to
find the contribution of each, then from the true state before each: twice the additions, but every operator processes
many tokens. Decays over a stride are exponentials of sums of steps, all of one sign.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.contract import valid_from_lengths
from regard.core.reordering import opposite, reorder
from regard.engines.scan import fold_chunks, in_chunks
from regard.engines.selective_scan.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

STRIDE = 8
"""Number of tokens that are processed one after another."""


def _recur(
    x: Float[Tensor, "b q c"],
    dt: Float[Tensor, "b q c"],
    a: Float[Tensor, "c k"],
    b: Float[Tensor, "b q g k"],
    c: Float[Tensor, "b q g k"] | None,
    state: Float[Tensor, "b c k"],
    inclusive: bool,
) -> tuple[Float[Tensor, "b q c"] | None, Float[Tensor, "b c k"]]:
    """The recurrence alone over a chunk, all in the dtype of the state."""
    n, groups = x.shape[1], b.shape[2]
    stride = min(STRIDE, n)
    count = -(-n // stride)

    def strides(t: Tensor) -> Tensor:
        # (b, q, ...) -> (stride, b, strides, ...); steps of 0 neither write nor decay
        return in_chunks(t, 1, count, stride).movedim(2, 0)

    def channels(t: Tensor) -> Tensor:
        return t.unflatten(-1, (groups, -1))[..., None]  # (..., g, c / g, 1)

    steps, rates = channels(strides(dt)), a.unflatten(0, (groups, -1))
    # unbind instead of indexing: the gradient is a single stack, not a tensor of zeros per token
    keep = (steps * rates).exp().unbind()  # by place in the stride: (b, strides, g, c / g, k)
    write = (channels(strides(dt * x)) * strides(b)[..., None, :]).unbind()
    start = state.unflatten(1, (groups, -1))
    several = n > stride
    starts = start[:, None]
    if several:
        left = write[0]
        for j in range(1, stride):
            left = keep[j] * left + write[j]
        total = (steps.sum(0) * rates).exp()
        found = []
        for kept, added in zip(total.unbind(1), left.unbind(1), strict=True):
            found.append(start)
            start = kept * start + added
        if c is None:
            return None, start.flatten(1, 2)
        starts = torch.stack(found, 1)
    h, reads = starts, []
    for j in range(stride):
        before = keep[j] * h
        h = before + write[j]
        reads.append(h if inclusive else before)
    # a view of the last row would keep all strides in memory
    last = (start if several else h[:, 0]).flatten(1, 2)
    if c is None:
        return None, last
    y = (torch.stack(reads) @ strides(c)[..., None])[..., 0]  # (stride, b, strides, g, c / g)
    return y.flatten(-2).movedim(0, 2).flatten(1, 2)[:, :n], last


def _chunk(part: Problem, valid: Bool[Tensor, "b q"] | None) -> tuple[Tensor | None, Tensor]:
    """Process one chunk from the state before it."""
    assert part.state is not None
    dtype = part.state.dtype
    wide, steps = part.x.to(dtype), part.dt.to(dtype)
    if part.dt_bias is not None:
        steps = F.softplus(steps + part.dt_bias)
    if valid is not None:
        steps = torch.where(valid[..., None], steps, 0)
    c = None if part.c is None else part.c.to(dtype)
    y, state = _recur(wide, steps, part.a, part.b.to(dtype), c, part.state, part.inclusive)
    if y is None:
        return None, state
    if part.skip is not None:
        y = y + part.skip * wide
    if part.z is not None:
        y = y * F.silu(part.z.to(dtype))
    if valid is not None:
        y = torch.where(valid[..., None], y, 0)
    return y.to(part.x.dtype), state


def _visited(problem: Problem) -> Problem:
    """The problem with its tokens in the order of visits."""
    order, p = problem.order, problem
    assert order is not None
    back = opposite(order)
    x, dt, b = (reorder(t, order, back) for t in (p.x, p.dt, p.b))
    c, z = (None if t is None else reorder(t, order, back) for t in (p.c, p.z))
    return replace(p, x=x, dt=dt, b=b, c=c, z=z, order=None)


def run(problem: Problem, chunk_size: int) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.selective_scan.selective_scan`."""
    if problem.order is not None:
        visited, last = run(_visited(problem), chunk_size)
        return (None if visited is None else reorder(visited, opposite(problem.order), problem.order)), last
    x, a, c, state, lengths = problem.x, problem.a, problem.c, problem.state, problem.lengths
    n = x.shape[1]
    if state is None:
        state = a.new_zeros(x.shape[0], *a.shape)
    if n == 0:
        return (None if c is None else x), state
    if _is_of_shapes(problem):
        return (None if c is None else x.new_empty(x.shape)), state
    valid = None if lengths is None else valid_from_lengths(lengths, n)
    if valid is None and torch.compiler.is_exporting():
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)  # excludes the scan's padding
    recompute = torch.is_grad_enabled() and problem.records and not torch.compiler.is_exporting()

    def tokens(state: Tensor, *own: Any) -> tuple[Tensor | None, Tensor]:
        x_, dt_, b_, c_, z_, valid_ = own
        part = replace(problem, x=x_, dt=dt_, b=b_, c=c_, z=z_, state=state, lengths=None)
        return _chunk(part, valid_)

    def chunk(carry: tuple[Tensor, ...], *own: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        if recompute:
            y, after = checkpoint(tokens, *carry, *own, use_reentrant=False, preserve_rng_state=False)
        else:
            y, after = tokens(*carry, *own)
        x_ = own[0]
        return (after,), x_.new_zeros(*x_.shape[:2], 0) if y is None else y

    (state,), y = fold_chunks(
        chunk, (state,), (x, problem.dt, problem.b, c, problem.z, valid), (0, 0, 0, 0, 0, 0), chunk_size, 1
    )
    return None if c is None else y, state


def _is_of_shapes(problem: Problem) -> bool:
    """Return whether a call has only shapes, and nothing to differentiate: its operators need not be called."""
    return problem.x.is_meta and not (torch.is_grad_enabled() and problem.records)


def flops(problem: Problem, chunk_size: int) -> float:
    """Operations of the recurrence: two for the decay, one for what is written, and two to update the state. The product
    with `c` is a matrix product of torch, unless it is not called."""
    return (7.0 if problem.c is not None and _is_of_shapes(problem) else 5.0) * problem.updates
