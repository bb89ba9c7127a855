r"""Scaled heads: every head output of another mechanism is multiplied by a learned number.

When to pick it: deep models whose heads should be able to fade.
When not: it costs nothing, but a following projection can learn the same.

Definition (HeadScale of NormFormer, Shleifer et al., arXiv 2110.09456, section 2.2):

    y = concat_i(gamma_i o_i) W_o

| paper | here |
|---|---|
| h_i, gamma_i | `o` (B, H, N, V), `gamma` (H,) |

Layout: (B, H, N, V). Patterns and states are those of the wrapped mechanism.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Context,
    Cost,
    Kind,
    LayerCall,
    Mechanism,
    Merge,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
)
from regard.layers.attention import AttentionLayer, LayerState


@dataclass(frozen=True)
class Config:
    """Scaled heads have no options; those of the layer name the wrapped mechanism."""


def reference(call: Call, o: Tensor, gamma: Tensor) -> Tensor:
    return torch.stack([gamma[i] * o[:, i] for i in range(o.shape[1])], 1)


def parallel(call: Call, o: Tensor, gamma: Tensor) -> Tensor:
    dtype = torch.promote_types(o.dtype, torch.float32)
    return (o.to(dtype) * gamma.to(dtype)[:, None, None]).to(o.dtype)


class HeadScale(Merge):
    """A merge of the attention shell, after the wrapped mechanism's own."""

    def __init__(self, heads: int, inner: Merge | None) -> None:
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(torch.ones(heads))

    def forward(self, output: Tensor, heads: Tensors, call: LayerCall, result: Result) -> Tensor:
        if self.inner is not None:
            output = self.inner(output, heads, call, result)
        return output * self.gamma[:, None, None]


class ScaledHeads(nn.Module):
    """An attention layer whose head outputs are scaled, (B, N, C) -> (B, N, C)."""

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        create: Callable[..., nn.Module],
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        mechanism: str = "softmax",
        positions: str | None = None,
        mechanism_options: Mapping[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        options = dict(mechanism_options or {})
        attention = create(mechanism, dim, num_heads, pattern=self.pattern, positions=positions, **options)
        if not isinstance(attention, AttentionLayer):
            raise Unsupported(f"{card.name} of {mechanism}", supported="mechanisms of kind attention")
        attention.merge = HeadScale(num_heads, attention.merge)
        self.attention = attention

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, context: Context | None = None, state: Any = None
    ) -> Result:
        return self.attention(x, memory, context=context, state=state)

    def step(self, x_t: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        return self.attention.step(x_t, state)

    def encode_memory(self, memory: Tensor, *, context: Context | None = None, state: Any = None) -> LayerState:
        return self.attention.encode_memory(memory, context=context, state=state)


def cost(shape: Shape, config: Config) -> Cost:
    """Of softmax attention, and the scaling."""
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    return Cost(
        flops=heads * shape.n * (2.0 * shape.m * width + shape.dim_value),
        memory=float(heads * shape.n * shape.dim_value),
        state=float(shape.heads * shape.m * width),
        step_flops=heads * (2.0 * shape.m * width + shape.dim_value),
    )


MECHANISM = Mechanism(
    name="scaled_heads",
    aliases=("headscale",),
    kind=Kind.WRAPPER,
    summary="Every head output of another mechanism is multiplied by a learned number.",
    paper=Paper("NormFormer: Improved Transformer Pretraining with Extra Normalization", "2110.09456", 2021),
    inputs={"o": "bhnv", "gamma": "h"},
    patterns=ALL_PATTERNS,
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    state=LayerState,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    module=ScaledHeads,
)
