r"""Moving average: each feature is averaged over the past with its own exponential decay.

When to pick it: smooth signals, or a cheap sense of order beside another mechanism.
When not: anything that must look at a token because of what it is.

Definition (the undamped average of Mega, Ma et al., arXiv 2209.10655, equation 1), for each feature:

    s_t = a s_{t-1} + (1 - a) x_t,   y_t = s_t,   0 < a < 1

| paper | here |
|---|---|
| 1 - alpha | a = exp(`log_decay`) |
| s | `MatrixState.memory`, (B, C, 1, 1) |

Layout: (B, N, C). Noncausal-self adds the average of the later tokens, so that a token counts itself once.
Deviations: one dimension a feature, no damping; the layer projects before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.apply import apply
from regard.contract import Call, Context, Cost, Kind, Mechanism, Paper, Pattern, Result, Shape
from regard.engines import recurrent_forms
from regard.engines.recurrent_forms import MatrixState
from regard.layers.linear import make_linear
from regard.layers.mixer import MixerLayer, Tokens


@dataclass(frozen=True)
class Config:
    """The moving average has no options."""


def reference(call: Call, x: Tensor, log_decay: Tensor) -> Tensor:
    a = log_decay.exp()
    forward, backward = torch.zeros_like(x), torch.zeros_like(x)
    past = later = torch.zeros_like(x[:, 0]) if x.shape[1] else x.sum(1)
    for t in range(x.shape[1]):
        past = a * past + (1 - a) * x[:, t]
        forward[:, t] = past
    for t in reversed(range(x.shape[1])):
        backward[:, t] = a * later
        later = a * later + (1 - a) * x[:, t]
    return forward if call.pattern.causal else forward + backward


def parallel(call: Call, x: Tensor, log_decay: Tensor) -> Tensor:
    if call.pattern.causal:
        return chunked(call, x, log_decay).output
    return _tokens(recurrent_forms.bidirectional(call, *_recurrence(call, x, log_decay)), x)


def chunked(call: Call, x: Tensor, log_decay: Tensor) -> Result:
    output, state = recurrent_forms.chunked(call, *_recurrence(call, x, log_decay))
    return Result(_tokens(output, x), state)


def step(call: Call, x: Tensor, log_decay: Tensor) -> Result:
    output, state = recurrent_forms.step(call, *_recurrence(call, x, log_decay))
    return Result(_tokens(output, x), state)


def _recurrence(call: Call, x: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and decay of a gated recurrence with a head of width 1 for each feature."""
    values = x.mT[..., None].to(torch.promote_types(x.dtype, torch.float32))
    decay = log_decay.to(values.dtype)[:, None, None].expand_as(values)
    valid = call.valid_keys(x.shape[1])
    if valid is not None:  # padding is not a token: nothing decays there and nothing is written
        decay = torch.where(valid[:, None, :, None], decay, 0)
    return torch.ones_like(values), -torch.expm1(decay), values, decay


def _tokens(heads: Tensor, x: Tensor) -> Tensor:
    return heads[..., 0].mT.to(x.dtype)


class MovingAverage(MixerLayer):
    """Projection, moving average, projection; (B, N, C) -> (B, N, C)."""

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        config: Any = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        self.input, self.output = make_linear(dim, dim), make_linear(dim, dim)
        self.decay = nn.Parameter(torch.linspace(-4.0, 2.0, dim))

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: MatrixState | None) -> Result:
        inputs = {"x": F.silu(self.input(tokens.x)), "log_decay": -F.softplus(self.decay)}
        wanted = state is not None or "state" in context.want
        result = apply(
            self.card,
            inputs,
            pattern=self.pattern,
            mask=tokens.mask,
            state=state,
            return_state=wanted,
            config=self.config,
        )
        result.output = self.output(result.output)
        return result


def cost(shape: Shape, config: Config) -> Cost:
    features = float(shape.heads * shape.dim_value)
    work = 4.0 * shape.batch * features
    return Cost(flops=work * shape.n, memory=shape.batch * features * shape.n, state=features, step_flops=work)


NO_QUERIES = "there are no queries to read a memory with"

MECHANISM = Mechanism(
    name="moving_average",
    aliases=("ema",),
    kind=Kind.MIXER,
    summary="Each feature is averaged over the past with its own exponential decay.",
    paper=Paper("Mega: Moving Average Equipped Gated Attention", "2209.10655", 2022),
    inputs={"x": "bnc", "log_decay": "c"},
    output="bnc",
    patterns=(Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_QUERIES, Pattern.CAUSAL_CROSS: NO_QUERIES},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": step},
    config=Config,
    state=MatrixState,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none",),
    domains={"log_decay": "log_decay"},
    module=MovingAverage,
)
