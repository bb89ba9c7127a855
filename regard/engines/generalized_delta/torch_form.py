"""The generalised delta rule in PyTorch, chunk by chunk.

Inside a chunk, the readings of the probes solve a triangular system: with A of
:mod:`regard.engines.gated_recurrence.torch_form` between the state *before* a token and the writes before it,

    (I + A(r, e)) U = A(r, k) V + R S,      S_i = E_i S + sum_{j <= i} E_ij (k_j v_j^T - e_j u_j^T),

so that outputs and the state after the chunk are those of a gated recurrence with two writes per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.precision import wide_dtype
from regard.engines.gated_recurrence.torch_form import FORGET, decayed_product, solve_unit, suffix_sum
from regard.engines.scan import in_chunks


def run(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    probe: Tensor,
    erase: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    sub_chunk: int,
    inclusive: bool,
) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.generalized_delta.generalized_delta`."""
    dtype = wide_dtype(v)
    batch, heads, n, width = k.shape
    if state is None:
        state = k.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    state = state.to(dtype)
    if n == 0:
        return (None if q is None else v), state
    size = min(chunk_size, n)
    count = -(-n // size)

    def chunks(x: Tensor) -> Tensor:
        # (b, h, n, d) -> (b, h, chunks, size, d); zero padding neither reads, writes nor decays
        return in_chunks(x.to(dtype), 2, count, size)

    k_, v_, r, e = map(chunks, (k, v, probe, erase))
    q_ = None if q is None else chunks(q)
    g = None if log_decay is None else chunks(log_decay.clamp(min=FORGET))
    r_next = F.pad(r[..., 1:, :], (0, 0, 0, 1))  # aligned with the preceding token, whose state it reads
    readers = torch.stack([r_next] if q_ is None else [r_next, q_])[:, None]
    near = decayed_product(readers, torch.stack([k_, e]), g, sub_chunk)  # (readers, writes, b, h, chunks, size, size)
    before = F.pad(near[0, :, ..., :-1, :], (0, 0, 1, 0))
    keys, r_in, q_in, total = torch.cat([k_, -e], -2), r, q_, None
    if g is not None:
        from_start = g.cumsum(-2).exp()
        r_in = r * F.pad(from_start[..., :-1, :], (0, 0, 1, 0), value=1.0)
        q_in = None if q_ is None else q_ * from_start
        to_end = suffix_sum(g).exp()
        keys = torch.cat([k_ * to_end, -e * to_end], -2)
        total = g.sum(-2).exp()[..., None]
    right = torch.cat([before[0] @ v_, r_in], -1)
    solved = solve_unit(before[1], right)
    read, along = solved.split([v.shape[-1], width], -1)
    after = None
    if q_ is not None:
        read_by = near[1] if inclusive else near[1].tril(-1)
        after = torch.cat([read_by[0], -read_by[1]], -1)

    def each(x: Tensor | None) -> Sequence[Any]:
        # unbind: indexing would make a gradient as long as the sequence for each chunk
        return (None,) * k_.shape[2] if x is None else x.unbind(2)

    outputs = []
    for v_c, read_c, along_c, keys_c, total_c, q_c, after_c in zip(
        *map(each, (v_, read, along, keys, total, q_in, after)), strict=True
    ):
        written = torch.cat([v_c, read_c + along_c @ state], -2)
        if q_c is not None:
            outputs.append(q_c @ state + after_c @ written)
        write = keys_c.mT @ written
        state = write + (state if total_c is None else total_c * state)
    if not outputs:
        return None, state
    return torch.cat(outputs, 2)[:, :, :n].to(v.dtype), state


def run_step(
    q: Tensor, k: Tensor, v: Tensor, probe: Tensor, erase: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.generalized_delta.generalized_delta_step`."""
    dtype = state.dtype
    q, k, value, probe, erase = (x.to(dtype) for x in (q, k, v, probe, erase))
    read = torch.einsum("bhkv,bhk->bhv", state, probe)
    if log_decay is not None:
        state = state * log_decay.to(dtype).exp()[..., None]
    state = state - erase[..., None] * read[..., None, :] + k[..., None] * value[..., None, :]
    return torch.einsum("bhkv,bhk->bhv", state, q).to(v.dtype), state
