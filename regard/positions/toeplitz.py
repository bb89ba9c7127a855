"""A learned bias for each head and offset: a Toeplitz matrix (Luo et al., arXiv 2205.13401, section 3).

``T_ij = t_{j - i}``, with offsets clipped to -R ... R, so that all larger distances share an entry. This scheme is the
paper's matrix B, which is added to the scores, like `relative`, which has a bias for each bucket of distances instead.
A second such matrix, C, multiplies the weights: see ``regard.mechanisms.universal_rpe``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import at_least
from regard.positions.protocol import Positions, check_pair

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Toeplitz(Positions):
    """Adds a learned bias for each head and offset to the scores.

    Args:
        heads: number of heads H; 1 for a table that all heads share.
        max_distance: R >= 1, the largest distance with an entry of its own.
        std: standard deviation of the initial table (H, 2 R + 1); offset -R comes first.
    """

    name = "toeplitz"

    def __init__(self, *, heads: int, max_distance: int = 128, std: float = 0.02) -> None:
        super().__init__()
        at_least("heads", heads, 1)
        at_least("max_distance", max_distance, 1)
        at_least("std", std, 0.0)
        self.max_distance, self.std = max_distance, std
        self.table = nn.Parameter(torch.empty(heads, 2 * max_distance + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def bias(
        self, query_positions: Int[Tensor, "#b n"], key_positions: Int[Tensor, "#b m"], causal: bool
    ) -> Float[Tensor, "b h n m"]:
        """Return the bias of the scores, in the table's dtype. `causal` has no effect: the mask hides later keys."""
        check_pair(query_positions, key_positions)
        return self.by_distance(key_positions[:, None, :] - query_positions[:, :, None], causal).transpose(0, 1)

    def by_distance(self, distances: Int[Tensor, "..."], causal: bool) -> Float[Tensor, "h ..."]:
        """Return the bias for differences key position - query position."""
        return at_offsets(self.table, distances)

    def extra_repr(self) -> str:
        return f"heads={self.table.shape[0]}, max_distance={self.max_distance}"


def at_offsets(table: Float[Tensor, "h offsets"], offsets: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
    """Return the entries of a table over offsets -R ... R, with `offsets` clipped to this range."""
    reach = table.shape[1] // 2
    return nn.functional.embedding((offsets + reach).clamp(0, 2 * reach), table.mT).movedim(-1, 0)
