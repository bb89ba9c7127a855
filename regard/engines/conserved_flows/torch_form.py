"""Conserved flows in PyTorch: running sums as cumulative sums."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract import valid_from_lengths
from regard.engines.conserved_flows.problem import Problem, Rule, Sums
from regard.engines.softmax_scan.torch_form import exponentials, running_normalizer


def run(problem: Problem, rule: Rule) -> tuple[Tensor, Tensor, Sums]:
    """See :func:`regard.engines.conserved_flows.conserved_flows`."""
    sinks, sources, n = problem.sinks, problem.sources, problem.sinks.shape[2]
    count = (problem.length[:, None, None] + torch.arange(1, n + 1, device=sinks.device)).to(sinks.dtype)
    keys, queries, conserved_keys, conserved_queries = problem.totals.unbind(0)

    def running(x: Tensor, start: Tensor) -> Tensor:
        return start[:, :, None] + x.cumsum(2)

    def flow(x: Tensor, total: Tensor) -> Tensor:
        return ((x + rule.eps) * (total + rule.eps)).sum(-1)

    all_sources, all_sinks = running(sources, keys), running(sinks, queries)
    incoming, outgoing = flow(sinks, all_sources), flow(sources, all_sinks)
    kept_sources = running(sources * (count / outgoing)[..., None], conserved_keys)
    kept_sinks = running(sinks * (count / incoming)[..., None], conserved_queries)
    competition, maximum, normalizer = torch.ones_like(incoming), problem.maximum, problem.normalizer
    if rule.competition and n:
        logits = flow(sources, kept_sinks) / count
        logits = (logits if rule.clamp is None else logits.clamp(*rule.clamp)) / rule.temperature
        if problem.valid is not None:
            logits = logits.masked_fill(~valid_from_lengths(problem.valid, n)[:, None], -torch.inf)
        maxima, normalizers = running_normalizer(logits, maximum, normalizer)
        competition = count * (exponentials(logits, maxima) / torch.where(normalizers > 0, normalizers, 1))
        maximum, normalizer = maxima[..., -1], normalizers[..., -1]
    acceptance = 1 / incoming
    if rule.allocation:
        acceptance = acceptance * (flow(sinks, kept_sources) / count).sigmoid()
    totals = problem.totals
    if n:
        totals = torch.stack([x[:, :, -1] for x in (all_sources, all_sinks, kept_sources, kept_sinks)])
    return competition, acceptance, Sums(totals, maximum, normalizer, problem.length)
