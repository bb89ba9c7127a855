"""A call of attention to chosen pixels as objects, which the engine's forms share."""

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
"""Which probabilities are ranked together: those of all heads of a query, of one head of a query, of one head of all
queries, or of a whole map."""


def slots_by_rank(ranks: Ranks, batch: int) -> Int[Tensor, "b m"] | None:
    """Slot of the key of each rank; None where it is the rank."""
    if ranks.offset is not None or ranks.plain:
        return None
    keys = ranks.keys
    rows, m = keys.shape
    # one row without an empty slot, as in decoding
    if rows == 1 and m and values_known(keys) and int(keys[0, -1]) == m - 1:
        return None
    named = torch.where(keys < 0, m, keys)
    slots = torch.arange(m, device=keys.device).expand_as(keys)
    return keys.new_zeros(rows, m + 1).scatter(1, named, slots)[:, :m].expand(batch, -1)


@dataclass(frozen=True)
class Problem:
    """Which keys are read, and how.

    Attributes:
        estimate: scores of the pixels of each query's map; never differentiated.
        totals: keys that each query sees, those of the lowest ranks.
        ranks: of the key slots.
        top_k: keys that a query reads in each head on average.
        oversample: keeps that many times the pixels, and reads a regular part of their keys.
        grouping: of :data:`GROUPINGS`.
        scale: multiplies the scores.
        fewest: the fewest keys that any query sees, as far as the sizes tell.
        valid: queries that count where `grouping` ranks several; all when None.
        jitter: shifts of the ranks of the keys in each slot before the pixels are found, less than 1.
        want_weights: whether the weights are wanted.
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
    """The value that a query gets beside attention.

    Attributes:
        first: the same for all queries; or, with `before`, the sum of so many values before those of the last `count` slots,
            and a query's is the mean of that sum and the values that it sees of these.
    """

    first: Float[Tensor, "b #h v"]
    before: Int[Tensor, " b"] | None = None
    count: int = 0

    def of(self, v: Float[Tensor, "b g m v"], totals: Int[Tensor, "#b n"]) -> Float[Tensor, "b #h #n v"]:
        """The mean of the values that each query sees, `totals` of them."""
        if self.before is None:
            return self.first[:, :, None]
        new = wide(v[:, :, v.shape[2] - self.count :])
        sums = torch.cat([self.first[:, :, None], new], 2).cumsum(2)
        index = (totals - self.before[:, None]).clamp(0, self.count).expand(sums.shape[0], -1)
        taken = sums.gather(2, index[:, None, :, None].expand(-1, sums.shape[1], -1, sums.shape[3]))
        return taken / totals.clamp(min=1)[:, None, :, None]


@dataclass(frozen=True)
class Mix:
    """What becomes of P V: sigmoid(mix_logit) sigmoid(row_logit) P V + (1 - sigmoid(mix_logit)) mean; a factor whose logit
    is None is left out. A query that sees no key gets 0."""

    row_logit: Float[Tensor, "b h n"] | None = None
    mix_logit: Float[Tensor, "b h n"] | None = None
    mean: Mean | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors that may have gradients."""
        return self.row_logit, self.mix_logit, None if self.mean is None else self.mean.first
