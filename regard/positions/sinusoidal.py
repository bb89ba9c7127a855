"""Fixed sinusoids added to the input embedding (Vaswani et al., arXiv 1706.03762, section 3.5).

Feature 2i is ``sin(p / base^(2i/C))`` and feature 2i + 1 is ``cos(p / base^(2i/C))``; an odd C ends with a sine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.core.angles import angles
from regard.core.precision import wide_dtype
from regard.positions.protocol import Positions, check_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Sinusoidal(Positions):
    """Adds fixed sinusoids to the input embedding, for any position and without parameters.

    Args:
        dim: width C of the embedding, even or odd.
        base: longest wavelength, in units of 2 pi tokens.
    """

    name = "sinusoidal"

    def __init__(self, *, dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        at_least("dim", dim, 1)
        if base <= 1:
            raise Unsupported(f"base={base} of sinusoidal positions", supported="base > 1", nearest="base=10000.0")
        self.dim, self.base = dim, base

    def embed(self, x: Float[Tensor, "b n c"], positions: Int[Tensor, "#b n"]) -> Float[Tensor, "b n c"]:
        """Add the sinusoids to `x`; they are computed in at least float32 and rounded to the dtype of `x`."""
        check_positions(positions, x.shape[0], x.shape[1])
        if x.shape[-1] != self.dim:
            raise Unsupported(f"sinusoidal positions on a width of {x.shape[-1]}", supported=f"dim={self.dim}")
        angle = angles(positions, self.dim, base=self.base, dtype=wide_dtype(x))
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.dim]
        return x + waves.to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base}"
