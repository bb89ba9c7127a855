"""Attention with linear biases: scores fall with distance (Press et al., arXiv 2108.12409, section 3).

``bias_ij = -slope_h |i - j|``. For a power of two H the slopes are ``2^(-8 h / H)``, h = 1 ... H; for other H they are
those of the power of two below, P, followed by every other slope of 2P (the authors' rule).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import at_least
from regard.positions.protocol import Positions, check_pair

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Alibi(Positions):
    """Subtracts a multiple of the distance from the scores; symmetric in noncausal patterns.

    Args:
        heads: number of heads H.
    """

    name = "alibi"

    def __init__(self, *, heads: int) -> None:
        super().__init__()
        at_least("heads", heads, 1)
        self.heads = heads

    def slopes(self, device: torch.device | None = None) -> Float[Tensor, " h"]:
        """Slope of each head, in float32: bfloat16 could not tell distances beyond 256 apart."""
        power = 1 << (self.heads.bit_length() - 1)
        head = torch.arange(self.heads, device=device)
        between = 2 * (head - power) + 1
        exponents = torch.where(head < power, 8 * (head + 1), 4 * between)
        return torch.exp2(-exponents.float() / power)

    def bias(
        self, query_positions: Int[Tensor, "#b n"], key_positions: Int[Tensor, "#b m"], causal: bool
    ) -> Float[Tensor, "b h n m"]:
        """Scores to add, in float32. `causal` changes nothing, since what it hides is hidden by the mask."""
        check_pair(query_positions, key_positions)
        return self.by_distance(key_positions[:, None, :] - query_positions[:, :, None], causal).transpose(0, 1)

    def by_distance(self, distances: Int[Tensor, "..."], causal: bool) -> Float[Tensor, "h ..."]:
        """The bias of key position minus query position."""
        slopes = self.slopes(distances.device)
        return -slopes.view(-1, *[1] * distances.ndim) * distances.abs()

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
