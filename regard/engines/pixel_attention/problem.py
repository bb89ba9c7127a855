"""The arguments of attention to chosen pixels as objects, which the engine's forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.core.visibility import Ranks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

GROUPINGS = ("row", "query", "head", "batch")
"""Which probabilities are ranked together: those of all heads of a query, of one head of a query, of one head for all
queries, or of a whole map."""


def slots_by_rank(ranks: Ranks, batch: int) -> Int[Tensor, "b m"] | None:
    """The slot of the key with each rank; None if slots and ranks are equal."""
    if ranks.offset is not None or ranks.plain:
        return None
    keys = ranks.keys
    rows, m = keys.shape
    # a single row without empty slots, as in decoding
    if rows == 1 and m and values_known(keys) and int(keys[0, -1]) == m - 1:
        return None
    named = torch.where(keys < 0, m, keys)
    slots = torch.arange(m, device=keys.device).expand_as(keys)
    return keys.new_zeros(rows, m + 1).scatter(1, named, slots)[:, :m].expand(batch, -1)


@dataclass(frozen=True)
class Problem:
    """Which keys are read, and how.

    Attributes:
        estimate: scores of the pixels of each query's map; no gradient flows through them.
        totals: number of keys that each query sees, those with the lowest ranks.
        ranks: ranks of the key slots.
        top_k: average number of keys that a query reads per head.
        oversample: keeps that many times as many pixels, and reads an evenly spaced part of their keys.
        grouping: one of :data:`GROUPINGS`.
        scale: factor on the scores.
        fewest: lower bound on the number of keys that any query sees, as far as sizes determine it.
        valid: valid queries, if `grouping` ranks several together; None when all are valid.
        jitter: shifts of the ranks of the keys in each slot, less than 1, applied before the pixels are determined.
        want_weights: whether to return the weights.
    """

    estimate: Float[Tensor, "b h n c"]
    totals: Int[Tensor, "#b n"]
    ranks: Ranks
    top_k: int
    oversample: float
    grouping: str
    scale: float
    fewest: int = 1
    valid: Bool[Tensor, "b n"] | None = None
    jitter: Float[Tensor, "b m"] | None = None
    want_weights: bool = False


@dataclass(frozen=True)
class Mean:
    """The mean value that is mixed with the output of attention.

    Attributes:
        first: the mean itself, the same for all queries; or, with `before`, the sum of that many values that precede
            the last `count` slots. A query's mean is then over these and the values that it sees in the last slots.
    """

    first: Float[Tensor, "b #h v"]
    before: Int[Tensor, " b"] | None = None
    count: int = 0

    def of(self, v: Float[Tensor, "b g m v"], totals: Int[Tensor, "#b n"]) -> Float[Tensor, "b #h #n v"]:
        """The mean of the `totals` values that each query sees."""
        if self.before is None:
            return self.first[:, :, None]
        new = wide(v[:, :, v.shape[2] - self.count :])
        sums = torch.cat([self.first[:, :, None], new], 2).cumsum(2)
        index = (totals - self.before[:, None]).clamp(0, self.count).expand(sums.shape[0], -1)
        taken = sums.gather(2, index[:, None, :, None].expand(-1, sums.shape[1], -1, sums.shape[3]))
        return taken / totals.clamp(min=1)[:, None, :, None]


@dataclass(frozen=True)
class Mix:
    """How P V is scaled and mixed: sigmoid(mix_logit) sigmoid(row_logit) P V + (1 - sigmoid(mix_logit)) mean; a factor
    whose logit is None is left out. The output of a query that sees no key is 0."""

    row_logit: Float[Tensor, "b h n"] | None = None
    mix_logit: Float[Tensor, "b h n"] | None = None
    mean: Mean | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that may have gradients."""
        return self.row_logit, self.mix_logit, None if self.mean is None else self.mean.first
