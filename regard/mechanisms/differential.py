r"""Differential attention: the weights of a second softmax map are subtracted from those of the first.

When to pick it: models trained from scratch on inputs in which little is relevant and much distracts: the weight that both
maps spread over everything cancels.
When not: few heads (two of them make one map), pretrained weights (`softmax`), or speed: each map reads values twice as wide.

Definition (Ye et al., arXiv 2410.05258, equations 1-3), for H pairs of heads, with tau = d^-0.5:

    o_i = (softmax(tau Q_i K_i^T) - lambda softmax(tau Q_{H+i} K_{H+i}^T)) [V_i, V_{H+i}]
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init
    head_i = (1 - lambda_init) RMSNorm(o_i)

The function computes the first line, the layer all three. The norm is over the 2 d features of a pair.

| paper | here |
|---|---|
| Q_1, K_1 and Q_2, K_2 of head i | heads i and H + i of `q`, `k` |
| V of head i, 2 d wide | heads i and H + i of `v`, side by side |
| h, heads | H, half of the heads of `q` |
| lambda | `lam` (H); in a layer, one number for all heads |
| lambda_q1, lambda_k1, lambda_q2, lambda_k2 | `projection.q1`, `.k1`, `.q2`, `.k2` of the layer |
| lambda_init = 0.8 - 0.6 exp(-0.3 (l - 1)) | :func:`depth_lambda` of layer l, which `regard.models.plans.differential_plan` sets in each |

Layout: q (B, 2H, N, d), k (B, 2G, M, d), v (B, 2G, M, e), output (B, 2H, N, e); G divides H (grouped queries). A layer
has as many parameters as one of softmax attention with as many heads, plus 4 d + 2 e. Weights, if requested, are (B, H,
N, M); rows sum to 1 - lambda. A query that sees no key gives 0.
State: keys and values, the values of a pair side by side.
Deviations: the authors' code puts the two maps of a head next to each other, which permutes the rows of W_q, W_k and
W_v and the columns of W_o. Their first implementation repeats keys for grouped queries before it pairs heads, so that
both maps of a head may have the same key; here, as in their implementations with FlashAttention, a group shares both
keys.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    BlockMask,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Merge,
    Paper,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
)
from regard.core.precision import wide
from regard.core.sampling import attention_shapes, normals
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines import cache
from regard.engines.attention import Ranks, attention_cost, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import attend, by_pattern
from regard.engines.cache import KeyValueState, extend
from regard.layers.norms import RMSNorm

if TYPE_CHECKING:
    from jaxtyping import Float


def depth_lambda(layer: int) -> float:
    """lambda_init of the paper for a layer, counted from 1: 0.2 in the first, towards 0.8 in deep ones."""
    at_least("layer", layer, 1)
    return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


@dataclass(frozen=True)
class Config:
    """Options, all of them the layer's; functions take `lam`.

    Attributes:
        lambda_init: approximate initial lambda, 0 <= lambda_init < 1. In the paper a constant is nearly as good as its
            schedule.
    """

    lambda_init: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_init < 1:
            raise Unsupported(
                f"lambda_init={self.lambda_init}", supported="0 <= lambda_init < 1", nearest="lambda_init=0.8"
            )


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    lam: Float[Tensor, " p"],
) -> Float[Tensor, "b h n v"]:
    """The definition, with both weight matrices."""
    _check(q.shape[1], k.shape[1], lam)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)
    values = torch.cat([_half(v, 0), _half(v, 1)], -1)
    first, second = (
        attention_reference(
            _half(q, i), _half(k, i), values, _half(visible, i), lambda s: s.softmax(-1), call.scale, _half(bias, i)
        )
        for i in (0, 1)
    )
    output = first - lam[:, None, None] * second
    return torch.cat(output.chunk(2, -1), 1)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    lam: Float[Tensor, " p"],
) -> Result:
    """The difference of two calls of softmax attention, on values twice as wide."""
    _check(q.shape[1], k.shape[1], lam)
    return _attend(call, q, k, _side_by_side(v), lam, ranks(call, q.shape[2], k.shape[2], q.device))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    lam: Float[Tensor, " p"],
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    _check(q.shape[1], k.shape[1], lam)
    state, where = extend(call, k, _side_by_side(v), q.shape[2])
    return _attend(call, q, state.k, state.v, lam, where, state)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> KeyValueState:
    """Absorb memory into a cache; may be called repeatedly."""
    _check(k.shape[1], k.shape[1], None)
    return cache.absorb(call, k, _side_by_side(v))


def read(call: Call, q: Float[Tensor, "b h n d"], lam: Float[Tensor, " p"]) -> Result:
    """Attend to absorbed memory."""
    state: KeyValueState = call.state
    _check(q.shape[1], state.k.shape[1], lam)
    return _attend(call, q, state.k, state.v, lam, ranks(call, q.shape[2], 0, q.device, state.ranks), state)


def _check(heads: int, kv_heads: int, lam: Tensor | None) -> None:
    if heads % 2 or kv_heads % 2:
        raise Unsupported(
            f"differential attention with {heads} heads and {kv_heads} key/value heads",
            supported="even numbers: two heads make one map",
            nearest=f"{heads + heads % 2} and {kv_heads + kv_heads % 2}",
        )
    if lam is not None and lam.shape[0] != heads // 2:
        raise Unsupported(
            f"differential attention with lam for {lam.shape[0]} pairs of {heads} heads",
            supported=f"({heads // 2},)",
            nearest=f"lam.expand({heads // 2})",
        )


def _side_by_side(x: Float[Tensor, "b h m v"]) -> Float[Tensor, "b h/2 m 2*v"]:
    """Join the heads of each pair into one."""
    return torch.cat(x.chunk(2, 1), -1)


def _apart(x: Float[Tensor, "b h/2 n 2*v"]) -> Float[Tensor, "b h n v"]:
    return torch.cat(x.chunk(2, -1), 1)


def _half(x: Any, i: int) -> Any:
    """Heads of the first or the second maps; None and tensors shared by all heads are returned unchanged."""
    return x if x is None or x.shape[1] == 1 else x.chunk(2, 1)[i]


def _half_bias(bias: PositionBias | None, i: int) -> PositionBias | None:
    if bias is None:
        return None
    if isinstance(bias, DistanceBias):
        return DistanceBias(lambda distances: bias.by_distance(distances).chunk(2)[i])
    return lambda queries, keys: _half(bias(queries, keys), i)


def _attend(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g/2 m 2*v"],
    lam: Float[Tensor, " p"],
    where: Ranks,
    state: KeyValueState | None = None,
) -> Result:
    first, second = (
        attend(
            call,
            _half(wide(q), i),
            _half(k, i),
            v,
            where,
            bias=_half(call.bias, i),
            position_bias=_half_bias(call.position_bias, i),
            blocks=None if call.blocks is None else BlockMask(_half(call.blocks.visible, i), call.blocks.block_size),
        )
        for i in (0, 1)
    )
    subtracted = wide(lam)[:, None, None]
    output = _apart((first.output - subtracted * second.output).to(q.dtype))
    extras = {name: (x - subtracted * second.extras[name]).to(q.dtype) for name, x in first.extras.items()}
    return Result(output, state, extras=extras)


class Lambda(Projection):
    """Computes a layer's lambda from four vectors as wide as a head: adds `lam` to the heads.

    Raises:
        Unsupported: for an odd number of heads, or of key/value heads.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        _check(spec.heads, spec.kv_heads, None)
        self.pairs, self.initial = spec.heads // 2, spec.config.lambda_init
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(0.1 * torch.randn(spec.head_dim)) for _ in range(4))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        q1, k1, q2, k2 = map(wide, (self.q1, self.k1, self.q2, self.k2))
        lam = (q1 @ k1).exp() - (q2 @ k2).exp() + self.initial
        return heads | {"lam": lam.expand(self.pairs)}


class PairNorm(Merge):
    """The norm of each pair's output, times 1 - lambda_init."""

    each_token_alone = True  # so padding may be anywhere

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.norm, self.factor = RMSNorm(2 * spec.value_dim, eps=1e-5), 1 - spec.config.lambda_init

    def forward(self, y: Float[Tensor, "b h n v"], *_: object) -> Float[Tensor, "b h n v"]:
        return _apart(self.factor * self.norm(_side_by_side(y)))


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
    """Inputs for tests and timings."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | (sizes or {})
    found = normals(generator, {**attention_shapes(batch, n, m, size), "lam": (size["h"] // 2,)}, torch.float64)
    found["lam"] = found["lam"].sigmoid()
    return {name: x.to(dtype) for name, x in found.items()}


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """One lambda for each pair of heads."""
    return {"p": shape.heads // 2}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of two maps per pair of heads, on values of both; paired values and both maps' outputs are stored."""
    both = attention_cost(dataclasses.replace(shape, dim_value=2 * shape.dim_value))
    heads = shape.batch * shape.heads
    return Cost(
        flops=both.flops,
        memory=float(heads * (shape.n + (3 * shape.n + shape.m) * shape.dim_value)),
        state=attention_cost(shape).state,
        step_flops=both.step_flops,
    )


MECHANISM = Mechanism(
    name="differential",
    aliases=("diff_transformer", "differential_transformer", "diff_attention", "diffattn"),
    kind=Kind.ATTENTION,
    summary="A second softmax map, scaled by a learned factor, is subtracted from the first.",
    paper=Paper("Differential Transformer", "2410.05258", 2024),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "lam": "p"},
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
        "weak": {"lambda_init": 0.2},
    },
    engine="attention",
    state=KeyValueState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    sample_inputs=sample_inputs,
    projection=Lambda,
    merge=PairNorm,
    layer_defaults={"output_norm": None},  # it has its own
)
