r"""Query pooling: learned queries pool a sequence into as many vectors, each a softmax average of the tokens.

When to pick it: a classifier that should find the few tokens that matter.
When not: a mean does as well and has no parameters.

Definition (Lin et al., arXiv 1703.03130, equation 5, without its hidden layer):

    A = softmax over tokens of W X^T,   M = A X

| paper | here |
|---|---|
| W_s2 (r, D) | `w` (S, D) |
| H, M | `x` (B, N, D), the output (B, S, D) |

Layout: the output has no token axis. A sequence without tokens gives 0.
Deviations: no hidden layer and no penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.apply import apply
from regard.contract import Call, Context, Cost, Kind, Mechanism, Paper, Pattern, Result, Shape, Unsupported


@dataclass(frozen=True)
class Config:
    """Query pooling has no options."""


def reference(call: Call, x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.T).softmax(1).mT @ x


def parallel(call: Call, x: Tensor, w: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    scores = w.to(dtype) @ x.to(dtype).mT
    valid = call.valid_queries(x.shape[1])
    if valid is not None:
        opened = valid | ~valid.any(-1, keepdim=True)  # -inf throughout a row would make its gradient NaN
        weights = scores.masked_fill(~opened[:, None], -torch.inf).softmax(-1)
        weights = torch.where(valid[:, None], weights, 0)
    else:
        weights = scores.softmax(-1)
    return (weights @ x.to(dtype)).to(x.dtype)


class QueryPooling(nn.Module):
    """(B, N, D) -> (B, num_heads, D)."""

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        self.w = nn.Parameter(dim**-0.5 * torch.randn(num_heads, dim))

    def forward(self, x: Tensor, memory: None = None, *, context: Context | None = None, state: None = None) -> Result:
        context = Context() if context is None else context
        if memory is not None or state is not None:
            raise Unsupported(f"{self.card.name} with memory or state", supported="layer(x)", nearest="softmax")
        return apply(
            self.card,
            {"x": x, "w": self.w},
            pattern=self.pattern,
            mask=context.mask,
            roles=context.roles,
            want=context.want,
        )


def cost(shape: Shape, config: Config) -> Cost:
    work = 4.0 * shape.batch * shape.heads * shape.dim_value
    return Cost(flops=work * shape.n, memory=float(shape.batch * shape.heads * shape.n), state=0.0, step_flops=work)


NO_TOKENS = "the output has no token axis"
NO_MEMORY = "its queries are learned, not a sequence"

MECHANISM = Mechanism(
    name="query_pooling",
    kind=Kind.POOLING,
    summary="Learned queries pool a sequence into as many vectors, each a softmax average of the tokens.",
    paper=Paper("A Structured Self-attentive Sentence Embedding", "1703.03130", 2017),
    inputs={"x": "bnd", "w": "sd"},
    output="bsd",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: NO_TOKENS,
        Pattern.NONCAUSAL_CROSS: NO_MEMORY,
        Pattern.CAUSAL_CROSS: NO_MEMORY,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none",),
    module=QueryPooling,
)
