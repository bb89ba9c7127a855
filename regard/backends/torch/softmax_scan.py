"""Chunked softmax scan in PyTorch: inside a chunk each prefix is a masked product with its own running maximum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regard.backends.torch.gated_recurrence import segment_sum
from regard.backends.torch.scan import fold_chunks

if TYPE_CHECKING:
    from jaxtyping import Float


class Carry(NamedTuple):
    """What a prefix leaves behind. An empty prefix has m = -inf, u = 0, w = 0."""

    m: Tensor
    """Running maximum of each query, (B, H, Q)."""
    u: Tensor
    """Sum of exponentials, (B, H, Q)."""
    w: Tensor
    """Sum of exponentials times values, (B, H, Q, V)."""


def exponentials(x: Tensor, maximum: Tensor) -> Tensor:
    """exp(x - maximum), and 0 where both are -inf."""
    return (x - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp()


def prefix_weights(
    scores: Float[Tensor, "b h q c"], log_decay: Float[Tensor, "#b #h c"] | None, m: Float[Tensor, "b h q"]
) -> tuple[Float[Tensor, "b h q c"], Float[Tensor, "b h q c c"], Float[Tensor, "b h q c"]]:
    """Running maximum at each token t of a chunk; weights of tokens j <= t, and of what came before, relative to it."""
    c = scores.shape[-1]
    exponents, before = scores[..., None, :], m[..., None]
    if log_decay is not None:
        exponents = exponents + segment_sum(log_decay[..., None])
        before = before + log_decay.cumsum(-1)[:, :, None]
    past = torch.ones(c, c, dtype=torch.bool, device=scores.device).tril()
    exponents = torch.where(past, exponents, -torch.inf)
    # the maximum only shifts the exponents: its gradient cancels, so it is held constant
    running = torch.maximum(exponents.detach().amax(-1), before.detach())
    return running, exponentials(exponents, running[..., None]), exponentials(before, running)


def run(
    s: Tensor, v: Tensor, carry: Carry, chunk_size: int, log_decay: Tensor | None, mix: Tensor | None
) -> tuple[Tensor, Carry]:
    """See :func:`regard.engines.softmax_scan.softmax_scan`."""
    dtype = carry.u.dtype
    if s.shape[2] == 0:
        shape = (*v.shape[:2], 0, v.shape[-1]) if mix is not None else (*v.shape[:2], 0, s.shape[-1], v.shape[-1])
        return v.new_zeros(shape), carry

    def chunk(
        carry: tuple[Tensor, ...], scores: Tensor, values: Tensor, gate: Tensor | None, mix: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        m, u, w = carry
        values = values.to(dtype)
        gate = None if gate is None else gate.to(dtype)
        running, weights, carried = prefix_weights(scores.to(dtype).mT, gate, m)
        denominators = weights.sum(-1) + carried * u[..., None]
        seen = denominators > 0
        inverse = torch.where(seen, 1 / torch.where(seen, denominators, 1), 0)
        if mix is None:
            numerators = weights @ values[:, :, None] + carried[..., None] * w[..., None, :]
            output = (numerators * inverse[..., None]).transpose(2, 3)
            w = numerators[..., -1, :]
        else:
            # queries are mixed before the values are read, so no (.., q, v) tensor exists for each token
            share = mix.to(dtype).mT * inverse  # b h q t
            near = torch.einsum("bhqt,bhqtj->bhtj", share, weights)
            output = near @ values + (share * carried).mT @ w
            w = weights[..., -1, :] @ values + carried[..., -1:] * w
        return (running[..., -1], denominators[..., -1], w), output

    last, output = fold_chunks(chunk, tuple(carry), (s, v, log_decay, mix), (-torch.inf, 0, 0, 0), chunk_size, 2)
    return output.to(v.dtype), Carry(*last)


def running_normalizer(
    s: Float[Tensor, "b h n"], m: Float[Tensor, "b h"], u: Float[Tensor, "b h"], *, chunk_size: int = 64
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"]]:
    """m_t and u_t of every prefix, continuing from (m, u): sum_{j<=t} exp(s_j) = u_t exp(m_t) at any range of scores."""
    if s.shape[2] == 0:
        return s, s

    def chunk(carry: tuple[Tensor, ...], scores: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        m, u = carry
        running, weights, carried = prefix_weights(scores[:, :, None], None, m[:, :, None])
        sums = weights.sum(-1) + carried * u[:, :, None, None]
        found = torch.cat([running, sums], 2)  # b h 2 c
        return (found[:, :, 0, -1], found[:, :, 1, -1]), found.mT

    _, found = fold_chunks(chunk, (m, u), (s,), (-torch.inf,), chunk_size, 2)
    return found[..., 0], found[..., 1]
