r"""Low-rank linear layer: a projection through a narrow middle.

When to pick it: fewer parameters and less work, where a full matrix has more directions than it needs.
When not: projections that are already narrow.

Definition (the update of LoRA, Hu et al., arXiv 2106.09685, equation 3, alone):

    y = x A^T B^T

| paper | here |
|---|---|
| A (r, D), B (E, r) | `down` (R, D), `up` (E, R) |
| r | `rank` |

Layout: (B, N, D) to (B, N, E); tokens do not mix.
Deviations: there is no frozen matrix beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Call, Cost, Kind, Mechanism, Paper, Pattern, Shape, Unsupported, at_least


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        rank: width of the middle, >= 1.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)


def reference(call: Call, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("bnd,rd,er->bne", x, down, up)


def parallel(call: Call, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ down.to(dtype).T @ up.to(dtype).T).to(x.dtype)


class LowRank(nn.Module):
    """A projection (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, config: Any = None) -> None:
        super().__init__()
        if bias:
            raise Unsupported("low_rank with bias=True", supported="bias=False", nearest="dense")
        rank = (Config() if config is None else config).rank
        self.down = nn.Parameter(in_features**-0.5 * torch.randn(rank, in_features))
        self.up = nn.Parameter(rank**-0.5 * torch.randn(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T


def cost(shape: Shape, config: Config) -> Cost:
    token = 2.0 * shape.batch * config.rank * (shape.dim_key + shape.dim_value)
    return Cost(flops=token * shape.n, memory=float(shape.batch * shape.n * config.rank), state=0.0, step_flops=token)


NO_MIXING = "tokens do not mix; use it as the projection of a cross-attention layer"

MECHANISM = Mechanism(
    name="low_rank",
    kind=Kind.PROJECTION,
    summary="A projection through a narrow middle.",
    paper=Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685", 2021),
    inputs={"x": "bnd", "down": "rd", "up": "er"},
    output="bne",
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_MIXING, Pattern.CAUSAL_CROSS: NO_MIXING},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none",),
    module=LowRank,
)
