"""The weights that an estimated map is compared with, as an object that the engine's forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.core.visibility import Ranks

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Problem:
    """The keys that queries see, and their weights.

    Attributes:
        totals: number of keys that each query sees, those with the lowest ranks.
        ranks: ranks of the key slots.
        scale: factor on the scores.
        jitter: shifts of the ranks of the keys in each slot, less than 1, applied before the pixels are determined.
        target: the weights of a teacher; None for those of the scores.
    """

    totals: Int[Tensor, "#b n"]
    ranks: Ranks
    scale: float
    jitter: Float[Tensor, "b m"] | None = None
    target: Float[Tensor, "b h n m"] | None = None
