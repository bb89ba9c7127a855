"""Conserved flows in PyTorch: running sums as cumulative sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.contract import valid_from_lengths
from regard.engines.softmax_scan.torch_form import exponentials, running_normalizer


class Sums(NamedTuple):
    """The sums over the tokens so far."""

    totals: Tensor
    """Sums of sources, sinks, weighted sources and weighted sinks, (4, B, H, D)."""
    maximum: Tensor
    """Largest l_t, (B, H); -inf where there was none."""
    normalizer: Tensor
    """Sum of exp(l_t - maximum), (B, H)."""
    length: Tensor
    """Tokens seen before, (B,)."""


@dataclass(frozen=True)
class Rule:
    """How flows become weights.

    Attributes:
        competition: whether sources compete; 1 without.
        allocation: whether the conserved sinks enter the acceptance; 1 / incoming without.
        clamp: range of the conserved sources; None for no clamp.
        temperature: divides them, > 0.
        eps: added to the vectors of both factors of each flow.
    """

    competition: bool
    allocation: bool
    clamp: tuple[float, float] | None
    temperature: float
    eps: float


def run(sinks: Tensor, sources: Tensor, sums: Sums, rule: Rule, valid: Tensor | None) -> tuple[Tensor, Tensor, Sums]:
    """See :func:`regard.engines.conserved_flows.conserved_flows`."""
    n = sinks.shape[2]
    count = (sums.length[:, None, None] + torch.arange(1, n + 1, device=sinks.device)).to(sinks.dtype)
    keys, queries, conserved_keys, conserved_queries = sums.totals.unbind(0)

    def running(x: Tensor, start: Tensor) -> Tensor:
        return start[:, :, None] + x.cumsum(2)

    def flow(x: Tensor, total: Tensor) -> Tensor:
        return ((x + rule.eps) * (total + rule.eps)).sum(-1)

    all_sources, all_sinks = running(sources, keys), running(sinks, queries)
    incoming, outgoing = flow(sinks, all_sources), flow(sources, all_sinks)
    kept_sources = running(sources * (count / outgoing)[..., None], conserved_keys)
    kept_sinks = running(sinks * (count / incoming)[..., None], conserved_queries)
    competition, maximum, normalizer = torch.ones_like(incoming), sums.maximum, sums.normalizer
    if rule.competition and n:
        logits = flow(sources, kept_sinks) / count
        logits = (logits if rule.clamp is None else logits.clamp(*rule.clamp)) / rule.temperature
        if valid is not None:
            logits = logits.masked_fill(~valid_from_lengths(valid, n)[:, None], -torch.inf)
        maxima, normalizers = running_normalizer(logits, maximum, normalizer)
        competition = count * (exponentials(logits, maxima) / torch.where(normalizers > 0, normalizers, 1))
        maximum, normalizer = maxima[..., -1], normalizers[..., -1]
    acceptance = 1 / incoming
    if rule.allocation:
        acceptance = acceptance * (flow(sinks, kept_sources) / count).sigmoid()
    totals = sums.totals
    if n:
        totals = torch.stack([x[:, :, -1] for x in (all_sources, all_sinks, kept_sources, kept_sinks)])
    return competition, acceptance, Sums(totals, maximum, normalizer, sums.length)
