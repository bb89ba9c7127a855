"""The softmax scan in pairs of tokens: the parallel prefix scan of Attention as an RNN (arXiv 2405.13956, section 3.2).

Neighbours are merged, prefixes of the merged ones are found recursively, and each token in between is merged with the
prefix before it: 2 N merges in 2 log2 N steps (Blelloch, Prefix sums and their applications, 1990), each for all rows
and heads at once. Unlike in the chunked form, nothing is stored for pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.softmax_scan.problem import Carry, Problem
from regard.engines.softmax_scan.torch_form import exponentials, normalized


@dataclass(frozen=True)
class Runs:
    """Sums over runs of consecutive tokens, with the runs along axis 2.

    Attributes:
        m: (B, H, N, Q) largest exponent for each query, a constant that only rescales the other sums.
        u: (B, H, N, Q) sum of the exponentials relative to m.
        w: (B, H, N, Q, V) sum of the exponentials times values.
        log_decay: (B, H, N, 1) what a run adds to the exponents of all earlier tokens; None for no decay.
    """

    m: Tensor
    u: Tensor
    w: Tensor
    log_decay: Tensor | None

    def __len__(self) -> int:
        return self.m.shape[2]

    def __getitem__(self, places: slice) -> Runs:
        decay = None if self.log_decay is None else self.log_decay[:, :, places]
        return Runs(self.m[:, :, places], self.u[:, :, places], self.w[:, :, places], decay)

    def before(self, following: Runs) -> Runs:
        """Merge each run with the corresponding run of `following`."""
        faded, decay = self.m, following.log_decay
        if self.log_decay is not None and decay is not None:
            faded, decay = faded + decay, self.log_decay + decay
        m = torch.maximum(faded, following.m).detach()
        a, b = exponentials(faded, m), exponentials(following.m, m)
        w = a[..., None] * self.w + b[..., None] * following.w
        return Runs(m, a * self.u + b * following.u, w, decay)

    def and_then(self, *others: Runs) -> Runs:
        """Concatenate these runs and the others."""
        return _side_by_side(lambda tensors: torch.cat(tensors, 2), (self, *others))

    def in_turn(self, others: Runs) -> Runs:
        """Interleave with the same number of other runs: first of these, first of the others, second of these, ..."""
        return _side_by_side(lambda tensors: torch.stack(tensors, 3).flatten(2, 3), (self, others))


def _side_by_side(lay: Callable[[list[Tensor]], Tensor], parts: Sequence[Runs]) -> Runs:
    m, u, w = (lay([getattr(part, name) for part in parts]) for name in ("m", "u", "w"))
    decays = [part.log_decay for part in parts if part.log_decay is not None]
    return Runs(m, u, w, lay(decays) if decays else None)


def prefixes(runs: Runs) -> Runs:
    """Merge each run with all runs before it."""
    if len(runs) < 2:
        return runs
    first, second = runs[0::2], runs[1::2]
    whole = prefixes(first[: len(second)].before(second))  # prefixes that end at every second run
    firsts = first[:1].and_then(whole[: len(first) - 1].before(first[1:]))
    found = firsts[: len(whole)].in_turn(whole)
    return found.and_then(firsts[len(whole) :]) if len(firsts) > len(whole) else found


def run(problem: Problem) -> tuple[Tensor, Carry]:
    """See :func:`regard.engines.softmax_scan.softmax_scan`; for at least one token, without `mix`."""
    dtype = problem.u.dtype
    scores, values = problem.s.to(dtype), problem.v.to(dtype)
    m = scores.detach()
    u = exponentials(scores, m)  # 1, with the gradient of the score; 0 if the token is skipped
    decay = problem.log_decay
    if decay is not None:
        decay = decay.to(dtype).expand(*scores.shape[:3])[..., None]
    tokens = Runs(m, u, u[..., None] * values[:, :, :, None], decay)
    none = None if decay is None else torch.zeros_like(decay[:, :, :1])
    start = Runs(problem.m[:, :, None], problem.u[:, :, None], problem.w[:, :, None], none)
    found = prefixes(start.and_then(tokens))[1:]
    output = normalized(found.u, found.w)
    return output.to(problem.v.dtype), Carry(found.m[:, :, -1], found.u[:, :, -1], found.w[:, :, -1])
