r"""NormAttention: linear attention whose output is normalised instead of being divided by a sum of weights.

When to pick it: in place of `linear` wherever `linear` trains unstably, in the later layers of a stack whose first
layers attend locally (`diagonal`; :func:`regard.models.transnormer_plan`).
When not: exact recall of single tokens (nothing is ever forgotten or overwritten; see `gated_linear`, `delta_rule`).

Definition (TransNormer, Qin et al., arXiv 2210.10340, section 4.1):

    S_i = sum_{j<=i} k'_j v_j^T,   o_i = Norm(q'_i S_i),   q'_i = R_i f(q_i),   k'_j = R_j f(k_j)

with Norm over all heads of a token together, and noncausal patterns summing over all keys. Dividing by the sum of the
scores (`linear`) puts an unbounded factor 1 / score into the derivative of a weight; without the denominator this
factor disappears (section 3.1). The norm brings it back if all scores of a query shrink together, since the output then
does not change; there the norm's eps bounds it.

| paper | here |
|---|---|
| f: elu (variant T1), 1 + elu (T2) | `feature_map="plain_elu"`, `"elu"`: named as in `linear`; and others |
| SimpleRMSNorm, x / (norm(x) D^-1/2 + 1e-8) | `output_norm="simple_rms"`; also `rms` and `layer` with learned weights |
| LRPE, R | `positions="lrpe"` of the layer, after f; also `rotary` |
| S | `MatrixState.memory`, in at least float32 |

Layout: (B, H, N, D), all heads in one call, since the norm is over all of them. The scale multiplies q before f and is
1 by default. Padded keys are masked after f, since 1 + elu(0) is not 0. A query that sees no key gives 0.
Deviations: `denominator=True` is the ablation: weights are divided by their sum before the norm. It needs f >= 0 and
refuses rotation, under which sums may vanish. Projections are initialised as in other layers (the paper: Xavier with
gain 2^-1/2 for q, k and v, of nearly the same spread). Cross patterns have no positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Result,
    Shape,
    Unsupported,
    Waiver,
    one_of,
)
from regard.core.precision import wide, without_autocast
from regard.core.visibility import ranks
from regard.engines import recurrent_forms
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.linear_attention import Rule, divide, linear_attention, map_memory, map_queries
from regard.engines.recurrent_forms import MatrixState
from regard.layers.head_norm import HEAD_NORMS, HeadNormWeights, norm_over_heads

if TYPE_CHECKING:
    from jaxtyping import Float

MAPS = {**FEATURE_MAPS, "plain_elu": F.elu}

EPS = 1e-6
"""Added to the denominator, if there is one."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        feature_map: f: ``elu`` (1 + elu), ``plain_elu`` (elu), ``relu``, ``relu_squared``, ``sigmoid``, ``silu``,
            ``identity`` or ``exp`` (sums overflow when features approach 88).
        output_norm: norm over all heads together: ``simple_rms``; ``rms`` or ``layer``, whose learned weights belong to
            the layer; or ``none``.
        denominator: divide by the sum of the weights before the norm; needs a feature map that is never negative.
    """

    feature_map: str = "elu"
    output_norm: str = "simple_rms"
    denominator: bool = False

    def __post_init__(self) -> None:
        one_of("feature_map", self.feature_map, MAPS)
        one_of("output_norm", self.output_norm, HEAD_NORMS)
        if self.denominator and self.feature_map not in NONNEGATIVE:
            raise Unsupported(
                f"feature_map={self.feature_map!r} with a denominator, which may vanish",
                supported=f"{', '.join(NONNEGATIVE)} with a denominator",
                nearest="denominator=False",
            )


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    config: Config = call.config
    _check(call)
    f = MAPS[config.feature_map]
    q, k = f(call.scale * q), f(k)
    if call.rotate is not None:
        where = ranks(call, q.shape[2], k.shape[2], q.device)
        q, k = call.rotate(q, where.queries), call.rotate(k, where.keys)
    weights = q @ k.mT
    if call.pattern.causal and not call.pattern.cross:
        weights = weights.tril(k.shape[2] - q.shape[2])
    if config.denominator:
        weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    return norm_over_heads(weights @ v, config.output_norm)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Noncausal: sums over all keys first. Causal: the chunked form."""
    if call.pattern.causal and not call.pattern.cross:
        return chunked(call, q, k, v)
    q, k = _mapped(call, q, k)
    memory = _written(call, k, v)
    with without_autocast(k.device):
        o = map_queries(q, _rule(call)) @ memory
    return Result(_normalized(call, o, v.dtype))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Causal-self with state in and out, in chunks of 64 unless the call says otherwise; then the norm."""
    q, k = _mapped(call, q, k)
    o, memory = linear_attention(
        recurrent_forms.beside_keys(call, q, k.shape[2]),
        k,
        wide(v),
        _rule(call),
        state=recurrent_forms.memory_of(call),
        valid=call.memory_lengths,
        chunk_size=call.chunk_size or 64,
        backend=call.backend,
    )
    o = recurrent_forms.of_queries(call, o, q.shape[2])
    after = MatrixState(memory, recurrent_forms.length_after(call, k))
    return Result(norm_over_heads(o, call.config.output_norm).to(v.dtype), after)


def step(call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 v"]) -> Result:
    """One token of :func:`chunked` computed by the recurrence itself."""
    q, k = _mapped(call, q, k)
    rule = _rule(call)
    o, state = recurrent_forms.step(call, map_queries(q, rule), *map_memory(k, wide(v), rule, call.memory_lengths))
    return Result(_normalized(call, o, v.dtype), state)


def absorb(call: Call, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]) -> MatrixState:
    """Add memory to S; more may follow, in any order."""
    memory = _written(call, _mapped_keys(call, k), v)
    if call.state is not None:
        memory = memory + call.state.memory
    return MatrixState(memory, recurrent_forms.length_after(call, k))


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Read absorbed memory with queries."""
    o = recurrent_forms.read(call, map_queries(_mapped_queries(call, q), _rule(call)))
    return Result(_normalized(call, o, q.dtype), call.state)


def _check(call: Call) -> None:
    if call.config.denominator and call.rotate is not None:
        raise Unsupported(
            "norm_linear with a denominator and positions that rotate, under which it may vanish",
            supported="one of them",
            nearest='positions="none"',
        )


def _engine_maps(call: Call) -> bool:
    """Return whether the engine applies f; otherwise its inputs are already mapped and rotated."""
    return call.rotate is None and call.config.feature_map in FEATURE_MAPS


def _rule(call: Call) -> Rule:
    eps = EPS if call.config.denominator else None
    return Rule(call.config.feature_map, call.scale, eps) if _engine_maps(call) else Rule("identity", 1.0, eps)


def _mapped_queries(call: Call, q: Tensor) -> Tensor:
    return wide(q) if _engine_maps(call) else MAPS[call.config.feature_map](call.scale * wide(q))


def _mapped_keys(call: Call, k: Tensor) -> Tensor:
    return wide(k) if _engine_maps(call) else MAPS[call.config.feature_map](wide(k))


def _mapped(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys for the engine, rotated by their ranks if the call rotates."""
    _check(call)
    queries, keys = _mapped_queries(call, q), _mapped_keys(call, k)
    if call.rotate is None:
        return queries, keys
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    before = 0 if call.state is None else call.state.length[:, None]
    # padding has rank -1, and the engine masks it
    return call.rotate(queries, where.queries + before), call.rotate(keys, where.keys.clamp(min=0) + before)


def _written(call: Call, keys: Tensor, v: Tensor) -> Tensor:
    """S summed over all keys."""
    keys, values = map_memory(keys, wide(v), _rule(call), call.memory_lengths)
    with without_autocast(v.device):
        return keys.mT @ values


def _normalized(call: Call, o: Tensor, dtype: torch.dtype) -> Tensor:
    """The normalised output, after division by the denominator if there is one."""
    return norm_over_heads(divide(o, _rule(call)), call.config.output_norm).to(dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of linear attention; the norm adds only a few operations per output number."""
    width = shape.dim_value + config.denominator
    matrix = shape.dim_key * width
    tokens = shape.batch * shape.heads * shape.m
    return Cost(
        flops=4.0 * tokens * (matrix + 32 * (shape.dim_key + width)),
        memory=float(tokens * (64 + shape.dim_key + width)),
        state=float(shape.heads * matrix),
        step_flops=4.0 * shape.batch * shape.heads * matrix,
    )


MECHANISM = Mechanism(
    name="norm_linear",
    aliases=("norm_attention", "transnormer"),
    kind=Kind.ATTENTION,
    summary="Linear attention whose output is normalised over all heads instead of being divided by a sum of weights.",
    paper=Paper("The Devil in Linear Transformer", "2210.10340", 2022, 46),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": step,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "relu": {"feature_map": "relu", "denominator": True, "output_norm": "rms"},
        "squared relu": {"feature_map": "relu_squared", "output_norm": "layer"},
        "sigmoid": {"feature_map": "sigmoid", "denominator": True, "output_norm": "none"},
        "exp": {"feature_map": "exp"},
        "silu": {"feature_map": "silu"},
        "identity": {"feature_map": "identity"},
        "plain elu": {"feature_map": "plain_elu"},
    },
    engine="linear_attention",
    state=MatrixState,
    combines="sum",
    cost=cost,
    honours=frozenset({"rotate"}),
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "lrpe"),
    maps_before_rotation=True,
    merge=HeadNormWeights,
    layer_defaults={"bias": True},
    waivers=(Waiver("extremes", "exp of features above 88 is not finite in float32", variants=("exp",)),),
)
