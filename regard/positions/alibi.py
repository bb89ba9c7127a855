"""Attention with linear biases, by which scores fall with distance (Press et al., arXiv 2108.12409, section 3).

``bias_ij = -slope_h |i - j|``. If H is a power of two, the slopes are ``2^(-8 h / H)``, h = 1 ... H; for other H they
are the slopes of the next lower power of two, P, followed by every other slope of 2P (the authors' rule).
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
    """Subtracts a multiple of the distance from the scores, symmetrically in noncausal patterns.

    Args:
        heads: number of heads H.
    """

    name = "alibi"

    def __init__(self, *, heads: int) -> None:
        super().__init__()
        at_least("heads", heads, 1)
        self.heads = heads

    def slopes(self, device: torch.device | None = None) -> Float[Tensor, " h"]:
        """Return the slope of each head, in float32: bfloat16 could not tell distances beyond 256 apart."""
        power = 1 << (self.heads.bit_length() - 1)
        head = torch.arange(self.heads, device=device)
        between = 2 * (head - power) + 1
        exponents = torch.where(head < power, 8 * (head + 1), 4 * between)
        return torch.exp2(-exponents.float() / power)

    def bias(
        self, query_positions: Int[Tensor, "#b n"], key_positions: Int[Tensor, "#b m"], causal: bool
    ) -> Float[Tensor, "b h n m"]:
        """Return the bias of the scores, in float32. `causal` has no effect, since the mask hides later keys."""
        check_pair(query_positions, key_positions)
        return self.by_distance(key_positions[:, None, :] - query_positions[:, :, None], causal).transpose(0, 1)

    def by_distance(self, distances: Int[Tensor, "..."], causal: bool) -> Float[Tensor, "h ..."]:
        """Return the bias for differences key position - query position."""
        slopes = self.slopes(distances.device)
        return -slopes.view(-1, *[1] * distances.ndim) * distances.abs()

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
