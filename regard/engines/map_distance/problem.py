"""What an estimated map is compared with, as an object that the engine's forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.core.visibility import Ranks

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Problem:
    """Which weights, of which keys.

    Attributes:
        totals: keys that each query sees, those of the lowest ranks.
        ranks: of the key slots.
        scale: multiplies the scores.
        jitter: shifts of the ranks of the keys in each slot before the pixels are found, less than 1.
        target: the weights of a teacher; where None, those of the scores.
    """

    totals: Int[Tensor, "#b n"]
    ranks: Ranks
    scale: float
    jitter: Float[Tensor, "b m"] | None = None
    target: Float[Tensor, "b h n m"] | None = None
