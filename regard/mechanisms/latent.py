r"""Latent attention: the keys and values of all heads come from one small vector per token, and only that is cached.

When to pick it: decoding long contexts with many heads. The cache holds C + R numbers per token, whatever the number of
heads, without the quality loss of fewer key/value heads.
When not: short contexts, or little decoding: a whole sequence costs as much as softmax attention with the same heads,
plus the products that compute its keys and values.

Definition (multi-head latent attention of DeepSeek-V2, arXiv 2405.04434, equations 9-19), for each head i:

    c_t = RMSNorm(W_DKV x_t),   k_{t,i} = [W_{UK,i} c_t; k^R_t],   v_{t,i} = W_{UV,i} c_t,   k^R_t = RoPE(W_KR x_t)
    q_{t,i} = [W_{UQ,i} c^Q_t; RoPE(W_{QR,i} c^Q_t)],   c^Q_t = RMSNorm(W_DQ x_t)
    o_{t,i} = sum_j softmax_j(tau q_{t,i} . k_{j,i}) v_{j,i},   tau = (D + R)^-0.5

Decoding computes no keys or values: q^C_{t,i} . W_{UK,i} c_j = (W_{UK,i}^T q^C_{t,i}) . c_j, and sum_j p_j W_{UV,i} c_j
= W_{UV,i} sum_j p_j c_j. So all heads read one key [c; k^R] of C + R numbers per token, and one value c. Each call
takes the form that needs fewer multiplications: this one for few queries, explicit keys and values for many.

| paper | here |
|---|---|
| c^KV_t, d_c wide | `latent` (B, M, C); `latent_dim` of a layer |
| k^R_t, the decoupled key | `k` (B, 1, M, R), one for all heads; `head_dim` of a layer is R |
| q^R_{t,i} | `q` (B, H, N, R) |
| q^C_{t,i}, d_h wide | `q_content` (B, H, N, D); `content_dim` of a layer |
| W^UK, W^UV | `up_k` (H, D, C), `up_v` (H, V, C); `projection.up_k`, `.up_v` of a layer |
| W^DKV, W^KR | `projection.down` and `key` of a layer |
| W^UQ and W^QR, together | `projection.query`; each head's D content features come first |
| W^DQ, d'_c wide | `projection.query_down`, if a layer has a `query_latent_dim` |

Layout: (B, H, N, D). The layer's position scheme rotates `q` and `k` and nothing else; without one, k^R is a part of
the key that all heads share. State: (C + R) numbers per token, and the tokens' ranks.
Deviations: without `query_latent_dim` queries are computed from x_t itself, as in DeepSeek-V2-Lite. The paper gives the
norms of c and c^Q in the text rather than in its equations. Half-precision inputs are computed in float32, because
products of rounded products would exceed the tolerance; the cache keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Projection,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    at_least,
    lengths_after,
    state_field,
)
from regard.core.precision import wide
from regard.core.sampling import normals
from regard.engines.attention import Ranks, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import attend, by_pattern
from regard.engines.cache import append
from regard.layers.attention import AttentionLayer
from regard.layers.norms import RMSNorm

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options, all for the layer; a function reads them from the shapes of its inputs.

    Attributes:
        latent_dim: C >= 1, numbers per token that keys and values are computed from; 4 D when None, as in the paper.
        content_dim: D >= 1, features of a query or key without positions; the width of a value head when None.
        query_latent_dim: numbers >= 1 per token from which queries are computed, which saves weights and activations;
            None computes queries from the layer's input.
    """

    latent_dim: int | None = None
    content_dim: int | None = None
    query_latent_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("latent_dim", "content_dim", "query_latent_dim"):
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, 1)

    def widths(self, value_dim: int) -> tuple[int, int]:
        """D and C, the content and latent widths of a layer."""
        content = value_dim if self.content_dim is None else self.content_dim
        return content, 4 * content if self.latent_dim is None else self.latent_dim


@dataclass(frozen=True)
class LatentState(State):
    """[c; k^R] of every token so far. A row with fewer tokens than others has empty slots, whose rank is -1."""

    latent: Float[Tensor, "b 1 past c+r"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    length: Int[Tensor, " b"] = state_field()


def scale(widths: Mapping[str, int]) -> float:
    """(D + R)^-0.5"""
    return max(widths.get("q_content", 0) + widths.get("q", 0), 1) ** -0.5


def reference(
    call: Call,
    q: Float[Tensor, "b h n r"],
    k: Float[Tensor, "b 1 m r"],
    q_content: Float[Tensor, "b h n d"],
    latent: Float[Tensor, "b m c"],
    up_k: Float[Tensor, "h d c"],
    up_v: Float[Tensor, "h v c"],
) -> Float[Tensor, "b h n v"]:
    """The definition, with explicit keys and values for every head."""
    _check(k)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)
    keys = torch.cat([latent[:, None] @ up_k.mT, k.expand(-1, q.shape[1], -1, -1)], -1)
    values = latent[:, None] @ up_v.mT
    queries = torch.cat([q_content, q], -1)
    return attention_reference(queries, keys, values, visible, lambda scores: scores.softmax(-1), call.scale, bias)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n r"],
    k: Float[Tensor, "b 1 m r"],
    q_content: Float[Tensor, "b h n d"],
    latent: Float[Tensor, "b m c"],
    up_k: Float[Tensor, "h d c"],
    up_v: Float[Tensor, "h v c"],
) -> Result:
    """Softmax attention by the cheaper of two ways (:func:`absorbs`): with keys and values computed for every head, or
    with the latents as the keys and values of a single head and the maps applied to queries and outputs instead."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    return _attend(call, q, q_content, _joined(k, latent), up_k, up_v, where)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n r"],
    k: Float[Tensor, "b 1 m r"],
    q_content: Float[Tensor, "b h n d"],
    latent: Float[Tensor, "b m c"],
    up_k: Float[Tensor, "h d c"],
    up_v: Float[Tensor, "h v c"],
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    state, where = _extend(call, _joined(k, latent), q.shape[2])
    return _attend(call, q, q_content, state.latent, up_k, up_v, where, state)


def absorb(call: Call, k: Float[Tensor, "b 1 m r"], latent: Float[Tensor, "b m c"]) -> LatentState:
    """Append memory to the cache; more may follow."""
    return _extend(call, _joined(k, latent), 0)[0]


def read(
    call: Call,
    q: Float[Tensor, "b h n r"],
    q_content: Float[Tensor, "b h n d"],
    up_k: Float[Tensor, "h d c"],
    up_v: Float[Tensor, "h v c"],
) -> Result:
    """Attend from queries to absorbed memory."""
    state: LatentState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    return _attend(call, q, q_content, state.latent, up_k, up_v, where, state)


def _check(k: Tensor) -> None:
    if k.shape[1] != 1:
        raise Unsupported(
            f"latent attention with k of {k.shape[1]} heads", supported="one for all query heads", nearest="k[:, :1]"
        )


def _joined(k: Float[Tensor, "b 1 m r"], latent: Float[Tensor, "b m c"]) -> Float[Tensor, "b 1 m c+r"]:
    """The cache entry of each token: its latent, then its rotated key."""
    _check(k)
    return torch.cat([latent[:, None], k], -1)


def _extend(call: Call, joined: Float[Tensor, "b 1 m c+r"], n: int) -> tuple[LatentState, Ranks]:
    """The cache of `call.state` with the new tokens appended, and the ranks of the `n` queries that come with them."""
    past: LatentState | None = call.state
    batch, _, m, _ = joined.shape
    length = lengths_after(None if past is None else past.length, call.memory_lengths, batch, m, joined.device)
    if past is None:
        where = ranks(call, n, m, joined.device)
        return LatentState(joined, where.keys.expand(batch, -1), length), where
    where = ranks(call, n, m, joined.device, past.ranks, past.length)
    return LatentState(append(past.latent, joined.to(past.latent.dtype), 2), where.keys, length), where


def _attend(
    call: Call,
    q: Float[Tensor, "b h n r"],
    q_content: Float[Tensor, "b h n d"],
    joined: Float[Tensor, "b 1 m c+r"],
    up_k: Float[Tensor, "h d c"],
    up_v: Float[Tensor, "h v c"],
    where: Ranks,
    state: LatentState | None = None,
) -> Result:
    (_, d, c), (_, h, n, r), m = up_k.shape, q.shape, joined.shape[2]
    dtype, absorbed = q.dtype, absorbs(n, m, d, up_v.shape[1], r, c)
    q, q_content, up_k, up_v = map(wide, (q, q_content, up_k, up_v))
    joined = joined.to(q.dtype)
    latent, rotated = joined.split([c, r], -1)
    if absorbed:
        queries, keys, values = torch.cat([q_content @ up_k, q], -1), joined, latent
    else:
        queries, values = torch.cat([q_content, q], -1), latent @ up_v.mT
        keys = torch.cat([latent @ up_k.mT, rotated.expand(-1, h, -1, -1)], -1)
    result = attend(call, queries, keys, values, where, state)
    result.output = (result.output @ up_v.mT if absorbed else result.output).to(dtype)
    if "weights" in result.extras:
        result.extras["weights"] = result.extras["weights"].to(dtype)
    return result


def absorbs(n: int, m: int, d: int, v: int, r: int, c: int) -> bool:
    """Return whether `n` queries on `m` tokens need fewer multiplications without explicit keys and values."""
    return n * (m * (2 * c + r) + c * (d + v)) < m * (c * (d + v) + n * (d + r + v))


class Latents(Projection):
    """A layer's queries in both parts, its tokens' latents, and the matrices that map latents to keys and values.

    Raises:
        Unsupported: for more than one key head.
    """

    makes_queries = True

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        if spec.kv_heads != 1:
            raise Unsupported(
                f"num_kv_heads={spec.kv_heads} with latent", supported="one rotated key for all heads", nearest="1"
            )
        self.heads, self.rotated = spec.heads, spec.head_dim
        content, width = config.widths(spec.value_dim)
        asked = config.query_latent_dim
        self.query_down = None if asked is None else spec.linear(spec.dim, asked)
        self.query_norm = None if asked is None else RMSNorm(asked)
        self.query = spec.linear(spec.dim if asked is None else asked, spec.heads * (content + spec.head_dim))
        self.down, self.norm = spec.linear(spec.memory_dim, width), RMSNorm(width)
        bound = width**-0.5
        self.up_k = nn.Parameter(torch.empty(spec.heads, content, width).uniform_(-bound, bound))
        self.up_v = nn.Parameter(torch.empty(spec.heads, spec.value_dim, width).uniform_(-bound, bound))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, memory = call.x, call.memory
        found = heads | {"up_k": self.up_k, "up_v": self.up_v}
        if memory is not None:
            found["latent"] = self.norm(self.down(memory))
        if x is not None:
            if self.query_down is not None and self.query_norm is not None:
                x = self.query_norm(self.query_down(x))
            queries = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            found["q_content"], found["q"] = queries.split([queries.shape[-1] - self.rotated, self.rotated], -1)
        return found


class LatentLayer(AttentionLayer):
    """The attention shell without short convolutions, since there are no keys or values to convolve."""

    takes_convolutions = False


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings; the matrices preserve scale from latents to keys and values."""
    size = {"h": 2, "d": 8, "v": 6, "r": 4, "c": 24} | (sizes or {})
    h, d, v, r, c = (size[letter] for letter in "hdvrc")
    shapes = {
        "q": (batch, h, n, r),
        "k": (batch, 1, m, r),
        "q_content": (batch, h, n, d),
        "latent": (batch, m, c),
        "up_k": (h, d, c),
        "up_v": (h, v, c),
    }
    found = normals(generator, shapes, torch.float64)
    found |= {name: found[name] * c**-0.5 for name in ("up_k", "up_v")}
    return {name: x.to(dtype) for name, x in found.items()}


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes of a layer whose rotated part is half as wide as a value head, the default."""
    content, latent = config.widths(shape.dim_value)
    return {"r": max(1, shape.dim_key // 2), "d": content, "c": latent}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the cheaper form, including the computation of keys and values if it makes them."""
    size = axis_sizes(shape, config)
    d, v, r, c = size["d"], shape.dim_value, size["r"], size["c"]
    heads = shape.batch * shape.heads

    def products(n: int) -> float:
        if absorbs(n, shape.m, d, v, r, c):
            return float(n * (shape.m * (2 * c + r) + c * (d + v)))
        return float(shape.m * (c * (d + v) + n * (d + r + v)))

    stored = shape.n * (2 * c + r) if absorbs(shape.n, shape.m, d, v, r, c) else shape.m * (d + r + v)
    return Cost(
        flops=2.0 * heads * products(shape.n),
        memory=float(heads * (stored + shape.n)),
        state=float(shape.m * (c + r)),
        step_flops=2.0 * heads * products(1),
    )


MECHANISM = Mechanism(
    name="latent",
    aliases=("mla", "multi_head_latent_attention", "multi_latent_attention"),
    kind=Kind.ATTENTION,
    summary="Keys and values of all heads are computed from one small vector per token, and only that is cached.",
    paper=Paper(
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", "2405.04434", 2024
    ),
    inputs={"q": "bhnr", "k": "bomr", "q_content": "bhnd", "latent": "bmc", "up_k": "hdc", "up_v": "hvc"},
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
    variants={
        "narrow": {"latent_dim": 5, "content_dim": 4, "query_latent_dim": 7},
    },
    engine="attention",
    state=LatentState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=scale,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    refused_positions="its decoupled part already encodes positions",
    sample_inputs=sample_inputs,
    module=LatentLayer,
    projection=Latents,
    layer_defaults={"key_expand": 0.5, "value_expand": 1.0, "num_kv_heads": 1},
)
