"""The gated recurrence behind linear attention, GLA, the delta rule, Mamba-2 and retention.

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,     o_t = S_t^T q_t,
    u_t = v_t,  or  u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t)      (delta rule)

Scale, feature map, normaliser and skip connection are left to the caller (:mod:`regard.engines.linear_attention`
includes the first three, without decay).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native
from regard.contract import Unsupported
from regard.core.precision import without_autocast
from regard.engines.gated_recurrence import native_form, step, torch_form
from regard.engines.gated_recurrence.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def gated_recurrence(
    q: Float[Tensor, "b g n k"] | None,
    k: Float[Tensor, "b g n k"],
    v: Float[Tensor, "b h n v"],
    log_decay: Float[Tensor, "b h n #k"] | None = None,
    beta: Float[Tensor, "b h n"] | None = None,
    *,
    state: Float[Tensor, "b h k v"] | None = None,
    reset: Bool[Tensor, "b n"] | None = None,
    chunk_size: int = 64,
    sub_chunk: int = 16,
    inclusive: bool = True,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"] | None, Float[Tensor, "b h k v"]]:
    """Compute outputs and final state, chunk by chunk.

    Numerically safe for any length and any gates: no differences of cumulative sums are formed, and autocast is
    disabled inside.

    Args:
        q: queries; None to compute only the final state. Queries and keys may be shared: with G heads of them for H
            heads of values, each serves H / G consecutive heads.
        log_decay: g, natural logarithms <= 0, per key feature or per head (last axis 1); -inf forgets everything,
            exactly as `reset` does. None for no decay.
        beta: step size of the delta rule; None for plain writes.
        state: S_0, zero when None; kept in at least float32.
        reset: True where a document starts: the state is cleared before that token.
        chunk_size: number of tokens computed together. Only affects rounding.
        sub_chunk: number of tokens for which exponents are formed pair by pair, if the decay differs between features.
        inclusive: whether o_t sees k_t; otherwise it reads exp(g_t) S_{t-1}, before the write.
        backend: see :func:`regard.which_backend`.

    Returns:
        o in the dtype of v (None without q) and S_N in at least float32.
    """
    if chunk_size < 1 or sub_chunk < 1:
        raise Unsupported(f"chunk_size={chunk_size}, sub_chunk={sub_chunk}", supported="positive integers")
    if log_decay is not None and log_decay.shape[-1] not in (1, k.shape[-1]):
        raise Unsupported(
            f"log_decay with {log_decay.shape[-1]} features for keys with {k.shape[-1]}",
            supported=f"(B, H, N, 1) or (B, H, N, {k.shape[-1]})",
        )
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.shape[1] == 0 or v.shape[1] % x.shape[1]):
            raise Unsupported(
                f"{name} with {x.shape[1]} heads for v with {v.shape[1]}", supported="a divisor of the heads of v"
            )
    if reset is not None:
        gate = torch.zeros_like(v[..., :1]) if log_decay is None else log_decay
        log_decay = gate.masked_fill(reset[:, None, :, None], -torch.inf)
    if q is not None and backend is None and prefers_native():
        found = native_form.plain(q, k, v, log_decay, beta, state, inclusive)
        if found is not None:
            return found
    problem = Problem(q, k, v, log_decay, beta, state, inclusive)
    with without_autocast(v.device):
        return execute("gated_recurrence", backend, v.device, v.dtype, problem, chunk_size, sub_chunk)


def gated_recurrence_step(
    q: Float[Tensor, "b g k"],
    k: Float[Tensor, "b g k"],
    v: Float[Tensor, "b h v"],
    log_decay: Float[Tensor, "b h #k"] | None,
    beta: Float[Tensor, "b h"] | None,
    state: Float[Tensor, "b h k v"],
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h v"], Float[Tensor, "b h k v"]]:
    """Process one token of :func:`gated_recurrence` (inclusive); return the output and the next state.

    Accumulates in the state's dtype; the output has the dtype of v.
    """
    if backend is None and prefers_native():
        found = step.plain(q, k, v, log_decay, beta, state)
        if found is not None:
            return found
    with without_autocast(v.device):
        return execute("gated_recurrence_step", backend, v.device, v.dtype, q, k, v, log_decay, beta, state)


add_engine("gated_recurrence", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))
add_engine(
    "gated_recurrence_step",
    torch=Engine(torch_form.run_step),
    native=Engine(step.run_step, step.refuses),
)
