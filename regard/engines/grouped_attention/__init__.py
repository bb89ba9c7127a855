"""Softmax in two levels over groups of keys: a landmark's weight is distributed among the tokens of its group.

The key slots of a row form groups: each landmark closes one, and the slots after the last landmark are a group too.
With S = scale Q K^T + biases over visible keys, for query i (Mohtashami and Jaggi, arXiv 2305.16300, section 3.2):

    t_i   = softmax of S_i over { tokens of its own group } and { landmarks of the other groups that hold a token }
    u_i^c = softmax of S_i over the tokens of group c,            for each other group c
    W_ij  = t_ij for tokens of the own group, t_i,landmark(c) u_ij^c for tokens of another group c, 0 for landmarks
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.core.visibility import Ranks
from regard.engines.grouped_attention import native_form, torch_form
from regard.engines.grouped_attention.problem import Dropout, Problem
from regard.engines.grouped_attention.torch_form import PAIRS_AT_ONCE, log_sum, logits, normalized, product

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def own_groups(ranks: Ranks, landmark: Bool[Tensor, "b m"]) -> Int[Tensor, "b n"]:
    """Each query's group, as the number of landmarks before it. A landmark is in the group that it closes."""
    last = torch.iinfo(torch.long).max
    places = torch.where(landmark, ranks.keys, last).sort(-1).values
    return torch.searchsorted(places, ranks.queries.expand(landmark.shape[0], -1).contiguous())


def grouped_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    problem: Problem,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n m"] | None, Float[Tensor, "b h n"] | None]:
    """Output in the dtype of v and, if requested, the weights and the log-sum-exp of the upper level (-inf if nothing
    is seen).

    The output of a query that sees no key is 0. If a query sees no token of a group, it loses the group's landmark too;
    tokens of another group whose landmark is hidden or missing have no weight.
    """
    return execute("grouped_attention", backend, q.device, q.dtype, q, k, v, problem)


add_engine("grouped_attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = [
    "PAIRS_AT_ONCE",
    "Dropout",
    "Problem",
    "grouped_attention",
    "log_sum",
    "logits",
    "normalized",
    "own_groups",
    "product",
]
