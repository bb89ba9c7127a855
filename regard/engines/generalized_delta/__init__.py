"""The generalised delta rule behind RWKV-7: a decaying memory that erases along one key what it reads along another.

    S_t = exp(g_t) S_{t-1} - e_t (r_t^T S_{t-1}) + k_t v_t^T,     o_t = S_t^T q_t

With e_t = exp(g_t) beta_t r_t and k_t = beta_t r_t it is the gated delta rule of
:mod:`regard.engines.gated_recurrence`, which is faster where it suffices: making e_t and r_t equal by a diagonal change
of basis would need growing exponentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.contract import Unsupported
from regard.core.precision import without_autocast
from regard.engines.generalized_delta import torch_form

if TYPE_CHECKING:
    from jaxtyping import Float


def generalized_delta(
    q: Float[Tensor, "b h n k"] | None,
    k: Float[Tensor, "b h n k"],
    v: Float[Tensor, "b h n v"],
    probe: Float[Tensor, "b h n k"],
    erase: Float[Tensor, "b h n k"],
    log_decay: Float[Tensor, "b h n #k"] | None = None,
    *,
    state: Float[Tensor, "b h k v"] | None = None,
    chunk_size: int = 64,
    sub_chunk: int = 16,
    inclusive: bool = True,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"] | None, Float[Tensor, "b h k v"]]:
    """Compute outputs and final state, chunk by chunk, in at least float32.

    Args:
        q: queries; None to compute only the final state.
        probe: r, the keys with which the memory is read before it decays.
        erase: e, the keys along which that reading is subtracted.
        log_decay: g, natural logarithms <= 0, per key feature or per head (last axis 1); -inf forgets everything. None
            for no decay.
        state: S_0, zero when None; kept in at least float32.
        chunk_size, sub_chunk, inclusive, backend: as in :func:`regard.engines.gated_recurrence.gated_recurrence`; an
            exclusive output reads exp(g_t) S_{t-1}.

    Returns:
        o in the dtype of v (None without q) and S_N in at least float32.
    """
    if chunk_size < 1 or sub_chunk < 1:
        raise Unsupported(f"chunk_size={chunk_size}, sub_chunk={sub_chunk}", supported="positive integers")
    arguments = (q, k, v, probe, erase, log_decay, state, chunk_size, sub_chunk, inclusive)
    with without_autocast(v.device):
        return execute("generalized_delta", backend, v.device, v.dtype, *arguments)


def generalized_delta_step(
    q: Float[Tensor, "b h k"],
    k: Float[Tensor, "b h k"],
    v: Float[Tensor, "b h v"],
    probe: Float[Tensor, "b h k"],
    erase: Float[Tensor, "b h k"],
    log_decay: Float[Tensor, "b h #k"] | None,
    state: Float[Tensor, "b h k v"],
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h v"], Float[Tensor, "b h k v"]]:
    """One token of :func:`generalized_delta` (inclusive): the output and the next state, in the state's dtype."""
    with without_autocast(v.device):
        return execute("generalized_delta_step", backend, v.device, v.dtype, q, k, v, probe, erase, log_decay, state)


add_engine("generalized_delta", torch=Engine(torch_form.run))
add_engine("generalized_delta_step", torch=Engine(torch_form.run_step))
