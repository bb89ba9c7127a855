"""Causal linear attention: the gated recurrence without decay on mapped queries and keys, divided by its normaliser.

S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t),
o_t = S_t^T phi(scale q_t) / (z_t . phi(scale q_t) + eps)

If there is a shift, it is part of phi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native
from regard.core.precision import without_autocast
from regard.engines.linear_attention import native_form, torch_form
from regard.engines.linear_attention.problem import Problem, Rule
from regard.engines.linear_attention.torch_form import divide, map_memory, map_queries

if TYPE_CHECKING:
    from jaxtyping import Float, Int


add_engine("linear_attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = ["Problem", "Rule", "divide", "linear_attention", "map_memory", "map_queries", "small_step"]

SMALL = 1 << 17
"""Number of elements in a state from which the step kernel is faster than the kernel for whole sequences."""


def linear_attention(
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h n k"],
    v: Float[Tensor, "b h n v"],
    rule: Rule,
    *,
    state: Float[Tensor, "b h k c"] | None = None,
    valid: Int[Tensor, " b"] | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h k c"]]:
    """Compute outputs in the dtype of v, and the final state in at least float32.

    Args:
        rule: the feature map, and whether and how the outputs are divided.
        state: S before the first token, with z as an additional column if outputs are normalised; zero when None.
        valid: number of valid keys in each row; the keys after them write nothing. None for all.
        chunk_size: number of tokens computed together. Only affects rounding.
        backend: see :func:`regard.which_backend`.
    """
    if valid is backend is None and prefers_native():
        found = native_form.plain(q, k, v, rule, state)
        if found is not None:
            return found
    with without_autocast(v.device):
        problem = Problem(q, k, v, state, valid)
        return execute("linear_attention", backend, v.device, v.dtype, problem, rule, chunk_size)


def small_step(
    q: Float[Tensor, "b h 1 k"],
    k: Float[Tensor, "b h 1 k"],
    v: Float[Tensor, "b h 1 v"],
    rule: Rule,
    state: Float[Tensor, "b h k c"],
) -> tuple[Float[Tensor, "b h 1 v"], Float[Tensor, "b h k c"]] | None:
    """:func:`linear_attention` of one token by a direct call of the kernel with feature map and division. None if not
    possible, and for large states, for which :func:`.gated_recurrence_step` is faster."""
    if state.numel() >= SMALL or not prefers_native():
        return None
    return native_form.plain(q, k, v, rule, state)
