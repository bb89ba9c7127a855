r"""Softmax attention: every query looks at every key; weights are positive and sum to one.

When to pick it: up to about a thousand tokens, when exact recall of any earlier token matters, or as the yardstick.
When not: long sequences (time grows with N M) and streams (the state grows with every token).

Definition (Vaswani et al., arXiv 1706.03762; computed by blocks as in FlashAttention, arXiv 2205.14135):

    S = tau Q K^T + bias,   P_ij = exp(S_ij) / sum_l exp(S_il) over visible keys l,   O = P V,   LSE_i = log sum_l exp(S_il)

In causal-self key j is visible to query i iff j <= i + M - N (bottom-right). A query that sees no key gives 0.

| paper | here |
|---|---|
| Q, K, V | `q`, `k`, `v` |
| tau | `scale`, D^-0.5 by default |
| block mask (block-sparse FlashAttention, section 3.3) | `mask.blocks` |
| LSE | `extras["lse"]` with `want={"lse"}` |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries).
Deviations: the paper applies the block mask only without causality; here both combine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.contract import ALL_PATTERNS, Call, Cost, Kind, Mechanism, Paper, Result, Shape
from regard.engines.attention import Ranks, Visibility, attention, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import KeyValueState, extend

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Softmax attention has no options of its own."""


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the whole weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, _visibility(call), call.bias, call.position_bias, call.blocks, q.dtype)
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale, bias)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    return _attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    state, where = extend(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, where, state)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> KeyValueState:
    """Memory into a cache; more may follow."""
    return extend(call, k, v, 0)[0]


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Queries on absorbed memory."""
    state: KeyValueState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    return _attend(call, q, state.k, state.v, where, state)


def _visibility(call: Call) -> Visibility:
    return Visibility(causal=call.pattern.causal and not call.pattern.cross)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, state: KeyValueState | None = None) -> Result:
    output, weights, lse = attention(
        q,
        k,
        v,
        where,
        visibility=_visibility(call),
        scale=call.scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=call.dropout,
        generator=call.generator,
        want_weights="weights" in call.want,
        want_lse="lse" in call.want,
        backend=call.backend,
    )
    extras = {name: value for name, value in (("weights", weights), ("lse", lse)) if value is not None}
    return Result(output, state, extras=extras)


def cost(shape: Shape, config: Config) -> Cost:
    pairs = shape.batch * shape.heads * shape.n * shape.m
    width = shape.dim_key + shape.dim_value
    return Cost(
        flops=2.0 * pairs * width,
        memory=float(shape.batch * shape.heads * shape.n),
        state=float(shape.heads * shape.m * width),
        step_flops=2.0 * shape.batch * shape.heads * shape.m * width,
    )


MECHANISM = Mechanism(
    name="softmax",
    aliases=("sdpa", "flash", "flash_attention", "vanilla", "full", "exact"),
    kind=Kind.ATTENTION,
    summary="Every query looks at every key; weights are positive and sum to one.",
    paper=Paper("FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", "2205.14135", 2022, 11),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
)
