r"""Adaptive span: each head learns how far back it looks, and a loss makes it look no farther than it needs.

When to pick it: language models on long text, where most heads need little context: nothing beyond the longest span of
a layer is computed, and the cache has a fixed size. Also to find out how far heads look.
When not: lookups at any distance (`softmax`), windows that are known in advance (`local`, which has nothing to learn).

Definition (Sukhbaatar et al., arXiv 1905.07799, equations 3 to 5; survey arXiv 2103.14636, B6), x = |i - j| the
distance between two tokens, z the span of a head, R the width of the ramp:

    m_z(x) = clamp((R + z - x) / R, 0, 1)
    a_ij = m_z(x) exp(s_ij) / sum_l m_z(|i - l|) exp(s_il),   o_i = sum_j a_ij v_j,   j <= i when causal

and the loss `losses["span"]`, the mean of z / S over the heads.

| paper | here |
|---|---|
| z, learned | `span`, one number per head, kept in [0, S]; learned by the layer |
| S, the longest span | `longest` |
| R, 32 | `ramp` |
| lambda / M sum z | `losses["span"]` times its weight in the model, usually 0.01 |

m acts as a bias log m on the scores, to which a position scheme may add its own; keys at a distance of S + R or more
are never seen. With z >= N - 1 it is softmax attention; with z = w and a ramp of 1 it is a window of w + 1 keys.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Distances count valid tokens. A query that
sees no key gives 0.
State: the last S + R - 1 keys, a fixed size. A call computes scores only as far away as the longest of its spans.
Deviations: the layer clamps z to [0, S] in the forward pass and lets gradients pass through the clamp. The paper's code
clips the parameter after each step, and hides keys at a distance of S or more; here the ramp continues beyond a span of
S. Noncausal self, which is not in the paper, looks as far ahead as back. A pairwise bias tensor (not a position bias)
is refused with a state, since its columns could not be matched to the cached keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
)
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.core.sampling import attention_shapes, normals
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines import attention_forms
from regard.engines.attention import Ranks, Visibility, attention_cost, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import WindowState, extend_window

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        longest: S, the longest span in tokens, >= 1.
        ramp: R, tokens over which weights fall to 0 beyond the span, >= 1.
        initial: initial span of a layer's heads, as a fraction of S, 0 to 1.
    """

    longest: int = 256
    ramp: int = 32
    initial: float = 0.0

    def __post_init__(self) -> None:
        at_least("longest", self.longest, 1)
        at_least("ramp", self.ramp, 1)
        if not 0 <= self.initial <= 1:
            raise Unsupported(f"initial={self.initial}", supported="a share, 0 to 1", nearest="initial=0.0")

    @property
    def cached(self) -> int:
        """Number of past keys that the next token can reach."""
        return self.longest + self.ramp - 1


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    span: Float[Tensor, " h"],
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    config: Config = call.config
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    distance = (where.queries[:, :, None] - where.keys[:, None, :]).abs()[:, None]
    z = span.clamp(0, config.longest)[None, :, None, None]
    m = ((config.ramp + z - distance) / config.ramp).clamp(0, 1)
    visible, bias = _pairs(call, where, q.dtype)
    shown = visible & (m > 0)

    def weigh(scores: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        weights = torch.where(shown, m, 0) * scores.softmax(-1)
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, 1, total)

    return attention_reference(q, k, v, shown, weigh, call.scale, bias)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    span: Float[Tensor, " h"],
) -> Result:
    """Softmax attention in a window as wide as the longest span, with log m added to the scores: its time grows with
    that span, and no N x M matrix is made. The result includes the span loss."""
    return _with_loss(call, span, attention_forms.parallel(call, q, k, v, **_within(call, span)))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    span: Float[Tensor, " h"],
) -> Result:
    """Continue from the last keys by any number of tokens; also the step."""
    if call.state is not None and call.bias is not None:
        raise Unsupported("adaptive spans with a pairwise bias and a state", supported="a position bias, or no state")
    state, keys, values, where = extend_window(call, k, v, q.shape[2], call.config.cached)
    return _with_loss(call, span, attention_forms.attend(call, q, keys, values, where, state, **_within(call, span)))


def _with_loss(call: Call, span: Float[Tensor, " h"], result: Result) -> Result:
    share = wide(span).clamp(0, call.config.longest) / call.config.longest
    result.losses["span"] = (share.sum(), torch.tensor(share.numel(), device=span.device))
    return result


def _within(call: Call, span: Float[Tensor, " h"]) -> dict[str, Any]:
    """Options for the attention engine: how far queries see, and log m added to the call's position bias."""
    config: Config = call.config
    z = wide(span).clamp(0, config.longest)
    reach = config.cached
    if values_known(span) and span.numel():
        reach = math.ceil(float(z.detach().max()) + config.ramp) - 1
    causal = call.pattern is Pattern.CAUSAL_SELF
    visibility = Visibility(causal=causal, left=reach, right=None if causal else reach)
    return {"visibility": visibility, "position_bias": _beside(call.position_bias, _LogRamp(z, config.ramp))}


@dataclass(frozen=True)
class _LogRamp:
    """log m at distances (...), for each head; -inf where m is 0."""

    span: Float[Tensor, " h"]
    ramp: int

    def __call__(self, distances: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
        z = self.span.view(-1, *[1] * distances.ndim)
        m = ((self.ramp + z - distances.abs()) / self.ramp).clamp(max=1)
        return torch.where(m > 0, m, 1).log().masked_fill(m <= 0, -torch.inf)


def _beside(given: PositionBias | None, ramp: _LogRamp) -> PositionBias:
    """The sum of a position bias and the ramp; a function of distance alone if both are."""
    if given is None:
        return DistanceBias(ramp)
    if isinstance(given, DistanceBias):
        return DistanceBias(lambda distances: given.by_distance(distances) + ramp(distances))
    own = DistanceBias(ramp)
    return lambda queries, keys: given(queries, keys) + own(queries, keys)


def _pairs(call: Call, where: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    visibility = Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)
    return masked_scores_bias(where, visibility, call.bias, call.position_bias, call.blocks, dtype)


class Spans(Projection):
    """Gives the heads of a layer their learned spans.

    Args:
        spec: the layer's specification.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.longest = config.longest
        self.share = nn.Parameter(torch.full((spec.heads,), float(config.initial)))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        kept = self.share + (self.share.clamp(0, 1) - self.share).detach()  # straight-through: gradients pass the clamp
        return heads | {"span": self.longest * kept}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: object,
) -> Tensors:
    """Inputs for tests and timings, with spans anywhere between 0 and the longest."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | (sizes or {})
    shapes = {**attention_shapes(batch, n, m, size), "span": (size["h"],)}
    found = normals(generator, shapes, torch.float64)
    found["span"] = config.longest * found["span"].sigmoid()
    return {name: x.to(dtype) for name, x in found.items()}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with all spans at their longest."""
    near = attention_cost(shape, config.cached + 1)
    width = shape.dim_key + shape.dim_value
    return Cost(
        flops=near.flops,
        memory=near.memory,
        state=float(shape.heads * config.cached * width),
        step_flops=near.step_flops,
    )


NO_PLACE = "memory tokens have no position relative to a query"

MECHANISM = Mechanism(
    name="adaptive_span",
    aliases=("adaptive_attention_span",),
    kind=Kind.ATTENTION,
    summary="Softmax over the keys within a span that each head learns.",
    paper=Paper("Adaptive Attention Span in Transformers", "1905.07799", 2019, 18),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "span": "h"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "short": {"longest": 4, "ramp": 3, "initial": 0.5},
        "steep": {"longest": 7, "ramp": 1, "initial": 1.0},
    },
    engine="attention",
    state=WindowState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    projection=Spans,
    sample_inputs=sample_inputs,
)
