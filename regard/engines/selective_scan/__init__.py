"""The selective scan (S6) behind Mamba: a diagonal recurrence for each channel, with a different decay for each state.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,     y_t = h_t C_t        (h is C x K; dt_t and x_t scale its rows)

Mamba, arXiv 2312.00752, equation 2 with the discretisation of its code: exact for A, Euler for B. Elementwise
operations around the recurrence are part of the engine, because they would cost a pass over the (B, N, C) tensors but
are free in a fused kernel: softplus(dt + dt_bias), the skip D x_t and the gate silu(z_t), in the order (y_t + D x_t)
silu(z_t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.contract import State, Unsupported, at_least, state_field
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.selective_scan import native_form, torch_form
from regard.engines.selective_scan.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class SelectiveState(State):
    """h of each channel, in at least float32, and the number of tokens written into it."""

    memory: Float[Tensor, "b c k"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def selective_scan(
    x: Float[Tensor, "b n c"],
    dt: Float[Tensor, "b n c"],
    a: Float[Tensor, "c k"],
    b: Float[Tensor, "b n g k"],
    c: Float[Tensor, "b n g k"] | None,
    *,
    skip: Float[Tensor, " c"] | None = None,
    dt_bias: Float[Tensor, " c"] | None = None,
    z: Float[Tensor, "b n c"] | None = None,
    state: Float[Tensor, "b c k"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    order: Int[Tensor, " n"] | None = None,
    chunk_size: int = 64,
    inclusive: bool = True,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b n c"] | None, Float[Tensor, "b c k"]]:
    """Compute outputs and final state, chunk by chunk; backward recomputes each chunk from the state before it.

    Numerically safe for any length and any step size: exponents are products of steps and A, no differences of
    cumulative sums are formed, and autocast is disabled inside.

    Args:
        x: inputs, which are written into the state.
        dt: steps >= 0, or any numbers if `dt_bias` is given.
        a: A < 0, the log decay of each state for a step of 1.
        b, c: write and read vectors; each of their G groups (a divisor of C) serves C / G consecutive channels. Without
            `c`, only the final state is computed.
        skip: D; D x_t is added to y_t.
        dt_bias: if given, the steps are softplus(dt + dt_bias) (pass zeros for softplus alone).
        z: gate; y_t + D x_t is multiplied by silu(z_t).
        state: h_0, zero when None; kept in at least float32.
        lengths: number of valid tokens in each right-padded row. Later tokens neither decay nor write, and their output
            is 0.
        order: permutation (not checked) in which the recurrence visits the tokens of all rows; y is in the original
            order. Excludes `lengths`.
        chunk_size: number of tokens computed together. Only affects rounding.
        inclusive: whether y_t sees x_t through h_t; otherwise it reads exp(dt_t A) h_{t-1}, before the write.
        backend: see :func:`regard.which_backend`.

    Returns:
        y in the dtype of x (None without c) and h_N in at least float32.

    Raises:
        Unsupported: for chunks without tokens, groups that do not divide the channels, lengths out of range, or an
            order of another shape or together with lengths.
    """
    at_least("chunk_size", chunk_size, 1)
    if order is not None and (lengths is not None or order.shape != x.shape[1:2]):
        beside = f"of shape {tuple(order.shape)}" if lengths is None else "beside lengths"
        raise Unsupported(f"an order {beside}", supported=f"an order ({x.shape[1]},) of rows without padding")
    channels, groups = x.shape[-1], b.shape[2]
    if groups < 1 or channels % groups:
        raise Unsupported(f"b with {groups} groups for {channels} channels", supported=f"a divisor of {channels}")
    wide = wide_dtype(x)
    a_ = a.to(wide)
    skip_, dt_bias_, state_ = (None if t is None else t.to(wide) for t in (skip, dt_bias, state))
    problem = Problem(x, dt, a_, b, c, skip_, dt_bias_, z, state_, lengths, order, inclusive)
    with without_autocast(x.device):
        return execute("selective_scan", backend, x.device, x.dtype, problem, chunk_size)


def selective_read(state: Float[Tensor, "b c k"], c: Float[Tensor, "b n g k"]) -> Float[Tensor, "b n c"]:
    """Compute y_t = h C_t for any number of readers of one state, in the state's dtype."""
    groups = c.shape[2]
    with without_autocast(c.device):
        rows = state.unflatten(1, (groups, -1))  # (b, g, c / g, k)
        return (c.to(state.dtype).transpose(1, 2) @ rows.mT).transpose(1, 2).flatten(2)


def selective_scan_reference(
    x: Float[Tensor, "b n c"],
    dt: Float[Tensor, "b n c"],
    a: Float[Tensor, "c k"],
    b: Float[Tensor, "b n g k"],
    c: Float[Tensor, "b n g k"],
    *,
    state: Float[Tensor, "b c k"] | None = None,
    inclusive: bool = True,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c k"]]:
    """The recurrence token by token, without the elementwise operations around it."""
    b, c = (t.repeat_interleave(x.shape[-1] // t.shape[2], 2) for t in (b, c))  # (b, n, c, k)
    h = x.new_zeros(x.shape[0], *a.shape) if state is None else state
    outputs = [x[:, :0]]
    for t in range(x.shape[1]):
        before = (dt[:, t, :, None] * a).exp() * h
        h = before + (dt[:, t] * x[:, t])[..., None] * b[:, t]
        outputs.append(((h if inclusive else before) * c[:, t]).sum(-1)[:, None])
    return torch.cat(outputs, 1), h


add_engine(
    "selective_scan",
    torch=Engine(torch_form.run, flops=torch_form.flops),
    native=Engine(native_form.run, native_form.refuses, native_form.flops),
)

__all__ = ["Problem", "SelectiveState", "selective_read", "selective_scan", "selective_scan_reference"]
