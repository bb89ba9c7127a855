"""Competition and acceptance of causal flow attention, from flows whose sums run over the tokens so far.

With sinks x_t and sources y_t, never negative, n_t tokens seen at t, and running sums X, Y of the sinks and sources
(Flowformer, arXiv 2202.06258, section 3 and its causal version):

    incoming_t = <x_t + eps, Y_t + eps>                 outgoing_t = <y_t + eps, X_t + eps>
    conserved_sinks_t = <x_t + eps, Y'_t + eps> / n_t   conserved_sources_t = <y_t + eps, X'_t + eps> / n_t

where X', Y' are running sums of x_t n_t / incoming_t and of y_t n_t / outgoing_t, and from these

    competition_t = n_t exp(l_t) / sum_{j<=t} exp(l_j),   l_t = clamp(conserved_sources_t) / temperature
    acceptance_t = sigmoid(conserved_sinks_t) / incoming_t
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.engines.conserved_flows import native_form, torch_form
from regard.engines.conserved_flows.problem import Problem, Rule, Sums

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def empty_sums(sinks: Float[Tensor, "b h n d"]) -> Sums:
    """The sums before the first token."""
    batch, heads, _, width = sinks.shape
    return Sums(
        sinks.new_zeros(4, batch, heads, width),
        sinks.new_full((batch, heads), -torch.inf),
        sinks.new_zeros(batch, heads),
        torch.zeros(batch, dtype=torch.long, device=sinks.device),
    )


def conserved_flows(
    sinks: Float[Tensor, "b h n d"],
    sources: Float[Tensor, "b h n d"],
    sums: Sums,
    rule: Rule,
    *,
    valid: Int[Tensor, " b"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"], Sums]:
    """Competition, acceptance, and the sums after the last token (whose `length` is the given one).

    Args:
        sinks: phi of the queries; zero at padding.
        sources: phi of the keys; zero at padding.
        sums: the sums to continue from.
        rule: which tokens compete, and how.
        valid: number of valid tokens in each row; those after them do not compete. None for all.
    """
    problem = Problem(sinks, sources, *sums, valid)
    return execute("conserved_flows", backend, sinks.device, sinks.dtype, problem, rule)


add_engine("conserved_flows", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = ["Problem", "Rule", "Sums", "conserved_flows", "empty_sums"]
