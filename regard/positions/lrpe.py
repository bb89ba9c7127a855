r"""LRPE: a reflection followed by a rotation by learned angles (Qin et al., arXiv 2307.09270, the unitary solution).

    y_t = R_t H x_t,   H = I - 2 u u^T / |u|^2,   R_t rotates the plane of features 2i and 2i + 1 by t theta_i

u is drawn once and not learned; theta is learned and starts at 10000^(-2i/D). Queries and keys have the same H and R,
so their product depends only on the difference of positions, and norms are preserved. This is the encoding of
TransNormer (arXiv 2210.10340), in which all heads of a layer share u and theta.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.core.precision import wide_dtype
from regard.positions.protocol import Positions, check_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Lrpe(Positions):
    """Reflects and rotates queries and keys, each token by its absolute position.

    Args:
        head_dim: width D of a head, even.
        base: the slowest plane initially rotates by one radian in about `base` tokens.
    """

    name = "lrpe"
    reflection: Tensor

    def __init__(self, *, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise Unsupported(
                f"lrpe positions on heads of {head_dim}",
                supported="an even head_dim",
                nearest=f"head_dim={head_dim + head_dim % 2 or 2}",
            )
        if base <= 1:
            raise Unsupported(f"base={base} of lrpe positions", supported="base > 1", nearest="base=10000.0")
        self.head_dim = head_dim
        self.angles = nn.Parameter(base ** -(torch.arange(0, head_dim, 2) / head_dim))
        self.angles._no_weight_decay = True  # type: ignore[attr-defined]
        self.register_buffer("reflection", nn.functional.normalize(torch.randn(head_dim), dim=0))

    def rotate(self, x: Float[Tensor, "b h n d"], positions: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """Reflect and rotate queries or keys by their positions, in at least float32; returned in the dtype of `x`."""
        check_positions(positions, x.shape[0], x.shape[2])
        if x.shape[-1] != self.head_dim:
            raise Unsupported(f"lrpe positions on heads of {x.shape[-1]}", supported=f"head_dim={self.head_dim}")
        dtype = wide_dtype(x)
        u = self.reflection.to(dtype)
        # a unit vector rounded to half precision is not of length 1
        wide = x.to(dtype)
        wide = wide - (wide @ u)[..., None] * (2 * u / u.square().sum())
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        turns = positions.to(exact)[:, None, :, None] * (self.angles.to(exact) / (2 * math.pi))
        turn = ((turns - turns.round()) * (2 * math.pi)).to(dtype)  # whole turns are removed before rounding
        cos, sin = turn.cos(), turn.sin()
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}"
