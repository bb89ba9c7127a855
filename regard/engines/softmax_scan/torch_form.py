"""The softmax scan in PyTorch, chunk by chunk: inside a chunk each prefix is a masked product with its own running
maximum, and the carries between chunks are found by merging in pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.gated_recurrence.torch_form import segment_sum, suffix_sum
from regard.engines.scan import fold_chunks, in_chunks
from regard.engines.softmax_scan.problem import Carry, Problem

if TYPE_CHECKING:
    from jaxtyping import Float


PAIRS_AT_ONCE = 1 << 22
"""Number of pairs of tokens within chunks, over all rows, heads and queries, to compute at once."""


def exponentials(x: Tensor, maximum: Tensor) -> Tensor:
    """exp(x - maximum), or 0 if both are -inf."""
    return (x - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp()


def normalized(u: Float[Tensor, "..."], w: Float[Tensor, "... v"]) -> Float[Tensor, "... v"]:
    """w / u, or 0 if no token was seen."""
    seen = u != 0  # NaN counts as seen
    return torch.where(seen[..., None], w / torch.where(seen, u, 1)[..., None], 0)


def prefix_weights(
    scores: Float[Tensor, "*b q c"], log_decay: Float[Tensor, "*#b c"] | None, m: Float[Tensor, "*b q"]
) -> tuple[Float[Tensor, "*b q c"], Float[Tensor, "*b q c c"], Float[Tensor, "*b q c"]]:
    """Running maximum at each token t of a chunk and, relative to it, the weights of tokens j <= t and of the carry."""
    c = scores.shape[-1]
    exponents, before = scores[..., None, :], m[..., None]
    if log_decay is not None:
        exponents = exponents + segment_sum(log_decay[..., None])
        before = before + log_decay.cumsum(-1)[..., None, :]
    past = torch.ones(c, c, dtype=torch.bool, device=scores.device).tril()
    exponents = torch.where(past, exponents, -torch.inf)
    # the maximum only shifts the exponents: its gradient cancels, so it is held constant
    running = torch.maximum(exponents.detach().amax(-1), before.detach())
    return running, exponentials(exponents, running[..., None]), exponentials(before, running)


def carries(
    carry: Carry,
    scores: Float[Tensor, "b chunks h q c"],
    log_decay: Tensor | None,
    values: Float[Tensor, "b chunks h c v"],
) -> Carry:
    """The carry before each chunk and after the last one, in logarithmically many steps: each step merges a carry with
    one that covers twice as many earlier chunks as before (Hillis and Steele, Data parallel algorithms, 1986)."""
    total = None
    if log_decay is not None:
        scores = scores + suffix_sum(log_decay[..., None]).mT
        total = F.pad(log_decay.sum(-1, keepdim=True), (0, 0, 0, 0, 1, 0))
    largest = scores.detach().amax(-1)
    weights = exponentials(scores, largest[..., None])
    own = (largest, weights.sum(-1), weights @ values)
    m, u, w = (torch.cat([x[:, None], y], 1) for x, y in zip(carry, own, strict=True))
    distance = 1
    while distance < m.shape[1]:
        before, after = slice(0, -distance), slice(distance, None)
        faded = m[:, before] if total is None else m[:, before] + total[:, after]
        merged = torch.maximum(faded, m[:, after]).detach()
        a, b = exponentials(faded, merged), exponentials(m[:, after], merged)
        found = (merged, a * u[:, before] + b * u[:, after], a[..., None] * w[:, before] + b[..., None] * w[:, after])
        m, u, w = (torch.cat([x[:, :distance], y], 1) for x, y in zip((m, u, w), found, strict=True))
        if total is not None:
            total = torch.cat([total[:, :distance], total[:, before] + total[:, after]], 1)
        distance *= 2
    return Carry(m, u, w)


def run(problem: Problem, chunk_size: int) -> tuple[Tensor, Carry]:
    """See :func:`regard.engines.softmax_scan.softmax_scan`. Computes as many chunks in parallel as memory allows."""
    s, v, carry = problem.s, problem.v, problem.carry
    batch, heads, n, queries = s.shape
    if n == 0:
        shape = (batch, heads, 0, v.shape[-1]) if problem.mix is not None else (batch, heads, 0, queries, v.shape[-1])
        return v.new_zeros(shape), carry
    if torch.compiler.is_exporting():
        return _folded(problem, chunk_size)
    size = min(chunk_size, n)
    span = size * max(1, PAIRS_AT_ONCE // max(1, batch * heads * queries * size * size))
    outputs = []
    for start in range(0, n, span):
        part = slice(start, start + span)
        gate, share = (None if x is None else x[:, :, part].to(carry.u.dtype) for x in (problem.log_decay, problem.mix))
        here, values = (x[:, :, part].to(carry.u.dtype) for x in (s, v))
        output, carry = _span(here, values, gate, share, carry, size)
        outputs.append(output)
    return torch.cat(outputs, 2).to(v.dtype), carry


def _span(
    s: Tensor, v: Tensor, log_decay: Tensor | None, mix: Tensor | None, carry: Carry, size: int
) -> tuple[Tensor, Carry]:
    """Process some chunks of `size` tokens; the last one may be shorter."""
    n = s.shape[2]

    def chunks(x: Tensor, fill: float = 0.0) -> Tensor:
        """(b, chunks, h, size, ...)"""
        return in_chunks(x, 2, -(-n // size), size, fill).transpose(1, 2)

    scores, values = chunks(s, -torch.inf).mT, chunks(v)
    gate = None if log_decay is None else chunks(log_decay)
    every = carries(carry, scores, gate, values)
    m, u, w = (x[:, :-1] for x in every)
    _, weights, carried = prefix_weights(scores, gate, m)
    denominators = weights.sum(-1) + carried * u[..., None]
    seen = denominators != 0
    inverse = torch.where(seen, 1 / torch.where(seen, denominators, 1), 0)
    if mix is None:
        numerators = weights @ values[..., None, :, :] + carried[..., None] * w[..., None, :]
        output = (numerators * inverse[..., None]).transpose(3, 4)  # b chunks h t q v
    else:
        # queries are mixed before the values are read, so no (.., q, v) tensor exists for each token
        share = chunks(mix).mT * inverse  # b chunks h q t
        near = torch.einsum("...qt,...qtj->...tj", share, weights)
        output = near @ values + (share * carried).mT @ w
    return output.transpose(1, 2).flatten(2, 3)[:, :, :n], Carry(*(x[:, -1] for x in every))


def _folded(p: Problem, chunk_size: int) -> tuple[Tensor, Carry]:
    """:func:`run` one chunk after another, for exported programs, in which the number of chunks is unknown."""
    dtype = p.u.dtype

    def chunk(
        carry: tuple[Tensor, ...], scores: Tensor, values: Tensor, gate: Tensor | None, mix: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        m, u, w = carry
        values = values.to(dtype)
        gate = None if gate is None else gate.to(dtype)
        running, weights, carried = prefix_weights(scores.to(dtype).mT, gate, m)
        denominators = weights.sum(-1) + carried * u[..., None]
        seen = denominators != 0
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

    inputs, fills = (p.s, p.v, p.log_decay, p.mix), (-torch.inf, 0, 0, 0)
    last, output = fold_chunks(chunk, tuple(p.carry), inputs, fills, chunk_size, 2)
    return output.to(p.v.dtype), Carry(*last)


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
