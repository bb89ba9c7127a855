"""Rotary positions: queries and keys turn with their position (Su et al., arXiv 2104.09864, equation 34).

The first R features of a head form R/2 planes; plane i holds features i and i + R/2 (half-split pairing, as in GPT-NeoX
and Llama; the paper pairs 2i with 2i + 1, which is the same up to an order of the features). At position p it turns by
``p * base^(-2i/R)``, so a product of a rotated query and a rotated key depends on the difference of positions alone.
The other features pass unchanged.

Longer contexts than those trained on: `interpolation` divides positions (Chen et al., arXiv 2306.15595, equation 4);
`ntk` multiplies the base by ``ntk^(R/(R-2))``, which slows the slowest plane by `ntk` and leaves the fastest alone
(the "NTK-aware" rule, Peng et al., arXiv 2309.00071, section 3.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.engines.layers import rotary
from regard.positions.protocol import Positions, check_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Rotary(Positions):
    """Rotates queries and keys. Each token is rotated alone, by its absolute position.

    Args:
        head_dim: width D of a head.
        base: the slowest plane turns by one radian in about `base` tokens.
        fraction: part of the features that turn, in (0, 1]; R is rounded down to an even number.
        interpolation: positions are divided by it; 1 for none.
        ntk: factor by which the context grows under NTK-aware scaling of the base; 1 for none.
    """

    name = "rotary"

    def __init__(
        self,
        *,
        head_dim: int,
        base: float = 10_000.0,
        fraction: float = 1.0,
        interpolation: float = 1.0,
        ntk: float = 1.0,
    ) -> None:
        super().__init__()
        if base <= 1:
            raise Unsupported(f"base={base} of rotary positions", supported="base > 1", nearest="base=10000.0")
        if not 0 < fraction <= 1:
            raise Unsupported(f"fraction={fraction} of a head", supported="0 < fraction <= 1", nearest="fraction=1.0")
        at_least("interpolation", interpolation, 1.0)
        at_least("ntk", ntk, 1.0)
        # A product such as 0.7 * 20 falls just short of the integer it means.
        self.rotated = int(fraction * head_dim + 1e-9) // 2 * 2
        fewest = 2 if ntk == 1 else 4
        if self.rotated < fewest:
            raise Unsupported(
                f"{self.rotated} rotated features (fraction={fraction} of head_dim={head_dim}, ntk={ntk})",
                supported=f"at least {fewest}",
                nearest=f"head_dim={fewest}, fraction=1.0",
            )
        self.head_dim, self.interpolation = head_dim, interpolation
        self.base = base if ntk == 1 else base * ntk ** (self.rotated / (self.rotated - 2))

    def rotate(self, x: Float[Tensor, "b h n d"], positions: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """Queries or keys turned by their positions; computed in at least float32, returned in the dtype of `x`."""
        check_positions(positions, x.shape[0], x.shape[2])
        if x.shape[-1] != self.head_dim:
            raise Unsupported(f"rotary positions on heads of {x.shape[-1]}", supported=f"head_dim={self.head_dim}")
        return rotary(x, positions, rotated=self.rotated, base=self.base, stretch=self.interpolation)

    def extra_repr(self) -> str:
        scaling = f"base={self.base:g}, interpolation={self.interpolation:g}"
        return f"head_dim={self.head_dim}, rotated={self.rotated}, {scaling}"
