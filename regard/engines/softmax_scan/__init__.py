"""The running softmax of attention with position-independent queries, as a scan over (m, u, w).

For scores s_t and values v_t: m_t the running maximum, u_t = sum_{j<=t} exp(s_j - m_t), w_t = sum_{j<=t} exp(s_j - m_t) v_j;
the output is w_t / u_t. Pairs merge associatively (Attention as an RNN, arXiv 2405.13956, section 3.2),

    (m, u, w) + (m', u', w') = (M, u e^(m - M) + u' e^(m' - M), w e^(m - M) + w' e^(m' - M)),   M = max(m, m'),

so prefixes are computed in chunks with a carried (m, u, w), or by merging neighbours, then neighbours of those (the
parallel prefix scan, :mod:`regard.engines.softmax_scan.pairs_form`). Scores have gradients; a merged maximum only
rescales, so it is held constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.contract import State, Unsupported, state_field
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.gated_recurrence.torch_form import suffix_sum
from regard.engines.softmax_scan import native_form, pairs_form, torch_form
from regard.engines.softmax_scan.problem import Carry, Problem
from regard.engines.softmax_scan.torch_form import exponentials, normalized, running_normalizer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


CHUNK = 64
"""Default number of tokens per chunk."""
PAIRS_FROM = 1 << 12
"""Number of scores in a call from which, on a CPU, merging in pairs is faster than chunks and no larger."""


@dataclass(frozen=True)
class ScanState(State):
    """A :class:`Carry` for q queries in each of h groups of heads, and the number of tokens that it has seen."""

    m: Float[Tensor, "b h q"] = state_field(fill=-torch.inf)
    u: Float[Tensor, "b h q"] = state_field()
    w: Float[Tensor, "b h q v"] = state_field()
    length: Int[Tensor, " b"] = state_field()

    @property
    def carry(self) -> Carry:
        """m, u and w, as the scan takes them."""
        return Carry(self.m, self.u, self.w)


def empty_carry(s: Float[Tensor, "b h n q"], v: Float[Tensor, "b h n v"]) -> Carry:
    """The carry of no tokens: m = -inf, u = 0, w = 0, in at least float32."""
    dtype = wide_dtype(v)
    batch, heads, _, queries = s.shape
    return Carry(
        s.new_full((batch, heads, queries), -torch.inf, dtype=dtype),
        s.new_zeros((batch, heads, queries), dtype=dtype),
        v.new_zeros((batch, heads, queries, v.shape[-1]), dtype=dtype),
    )


def softmax_scan(
    s: Float[Tensor, "b h n q"],
    v: Float[Tensor, "b h n v"],
    *,
    state: Carry | None = None,
    log_decay: Float[Tensor, "#b #h n"] | None = None,
    mix: Float[Tensor, "b h n q"] | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n q v"] | Float[Tensor, "b h n v"], Carry]:
    """Prefix outputs of q fixed queries and the carry after the last token. Autocast is disabled inside.

    Args:
        s: score of each token for each of the q queries; -inf skips the token.
        v: values, shared by the queries.
        state: the carry to continue from.
        log_decay: <= 0; before token t is added, the weights of all earlier tokens are multiplied by its exponential.
            Must be zero at skipped tokens.
        mix: weights of the q prefix outputs at each token. The outputs are then their weighted sums (B, H, N, V), and
            the q separate outputs of a token are never stored.
        chunk_size: number of tokens computed together; None for 64 or, on the torch backend if faster, for merging in
            pairs (:mod:`.pairs_form`). Only affects rounding.

    Returns:
        Outputs in the dtype of v (0 before the first token seen); the carry in at least float32.
    """
    if chunk_size is not None and chunk_size < 1:
        raise Unsupported(f"chunk_size={chunk_size}", supported="a positive integer")
    problem = Problem(s, v, log_decay, mix, *(empty_carry(s, v) if state is None else state))
    with without_autocast(v.device):
        return execute("softmax_scan", backend, v.device, v.dtype, problem, chunk_size)


def softmax_scan_shifted(
    s: Float[Tensor, "b h n q"], v: Float[Tensor, "b h n v"], *, state: Carry | None = None
) -> tuple[Float[Tensor, "b h n q v"], Carry]:
    """The scan as two cumulative sums relative to the largest score of the call.

    Needs fewer operations than :func:`softmax_scan`, but exp underflows if early scores are far below the largest one
    (by 87 in float32, 700 in float64): those prefixes lose precision, and eventually become 0.
    """
    m, u, w = empty_carry(s, v) if state is None else state
    scores = s.to(u.dtype)
    largest = torch.cat([m[:, :, None], scores.detach()], 2).amax(2)
    weights, carried = exponentials(scores, largest[:, :, None]), exponentials(m, largest)
    products = weights[..., None] * v.to(u.dtype)[:, :, :, None]
    denominators = (carried * u)[:, :, None] + weights.cumsum(2)
    numerators = (carried[..., None] * w)[:, :, None] + products.cumsum(2)
    outputs = normalized(denominators, numerators).to(v.dtype)
    after = Carry(largest, carried * u + weights.sum(2), carried[..., None] * w + products.sum(2))
    return outputs, after


def absorb(
    s: Float[Tensor, "b h n q"],
    v: Float[Tensor, "b h n v"],
    *,
    state: Carry | None = None,
    log_decay: Float[Tensor, "#b #h n"] | None = None,
) -> Carry:
    """The carry of :func:`softmax_scan` without its outputs: merges one block into the carry."""
    m, u, w = empty_carry(s, v) if state is None else state
    scores = s.to(u.dtype).mT
    if log_decay is not None and s.shape[2]:
        gate = log_decay.to(u.dtype)
        scores = scores + suffix_sum(gate[..., None]).mT
        m = m + gate.sum(-1)[..., None]
    largest = torch.cat([m[..., None], scores], -1).detach().amax(-1)
    weights = exponentials(scores, largest[..., None])
    with without_autocast(v.device):
        added = weights @ v.to(u.dtype)
    return merge(Carry(m, u, w), Carry(largest, weights.sum(-1), added))


def merge(first: Carry, second: Carry) -> Carry:
    """Merge the carries of two disjoint sets of tokens (associative; an empty carry is the identity)."""
    m = torch.maximum(first.m, second.m).detach()
    a, b = exponentials(first.m, m), exponentials(second.m, m)
    return Carry(m, a * first.u + b * second.u, a[..., None] * first.w + b[..., None] * second.w)


def _run_in_torch(problem: Problem, chunk_size: int | None) -> tuple[Tensor, Carry]:
    s = problem.s
    # only measured on CPUs; a compiled program must not depend on how often the tokens can be halved
    unrolled = s.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if chunk_size is not None or problem.mix is not None or unrolled or s.numel() < PAIRS_FROM:
        return torch_form.run(problem, chunk_size or CHUNK)
    return pairs_form.run(problem)


add_engine("softmax_scan", torch=Engine(_run_in_torch), native=Engine(native_form.run, native_form.refuses))

__all__ = [
    "Carry",
    "Problem",
    "ScanState",
    "absorb",
    "empty_carry",
    "exponentials",
    "merge",
    "normalized",
    "pairs_form",
    "running_normalizer",
    "softmax_scan",
    "softmax_scan_shifted",
]
