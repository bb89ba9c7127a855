r"""Linear attention: the weight of a pair is a product of feature maps, so the past fits in one matrix per head.

When to pick it: long sequences where a blurred summary of the past is enough; the cheapest recurrent baseline.
When not: exact recall of single tokens (nothing is ever forgotten or overwritten): see `gated_linear`, `delta_rule`.

Definition (Katharopoulos et al., arXiv 2006.16236, equations 4-7, 18-20; survey arXiv 2103.14636, C3):

    S_i = sum_{j<=i} phi(k_j) v_j^T,   z_i = sum_{j<=i} phi(k_j),   o_i = phi(q_i) S_i / (phi(q_i) . z_i + eps)

| paper | here |
|---|---|
| phi(x) = elu(x) + 1 | `feature_map="elu"` (also `relu`, `silu`, `identity`, `exp`, `sigmoid`, `relu_squared`) |
| S, z | `MatrixState.memory`: S with z as its last column when normalized; in at least float32 |
| eps | `eps`, 1e-6 |

Layout: (B, H, N, D). The scale multiplies q before phi and is 1 by default: elu + 1 is not homogeneous, so a scale
changes the kernel. Padded keys are masked after phi, since phi(0) is not 0. A query that sees no key gives 0.
Deviations: `normalize=False` leaves out the denominator (then o_i = phi(q_i) S_i). With feature maps that take both
signs (silu, identity) the denominator may vanish; they are accepted only with `normalize=False`.
Noncausal patterns sum over all keys; in cross patterns the order of the memory does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Recurrence,
    Result,
    Shape,
    Unsupported,
    Waiver,
    one_of,
)
from regard.core.precision import without_autocast
from regard.engines import recurrent_forms
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.linear_attention import Rule, divide, linear_attention, map_memory, map_queries, small_step
from regard.engines.recurrent_forms import MatrixState

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        feature_map: phi: ``elu`` (elu(x) + 1), ``relu``, ``relu_squared``, ``sigmoid``, ``exp`` (sums overflow when
            features approach 88), ``silu`` or ``identity``.
        normalize: divide by phi(q) . z + eps; needs a feature map that is never negative.
        eps: added to the denominator, > 0 and finite. Where features vanish, as with ``relu``, a query whose weights
            are of the order of eps amplifies the rounding error of its projection; a larger eps avoids this.
    """

    feature_map: str = "elu"
    normalize: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        one_of("feature_map", self.feature_map, FEATURE_MAPS)
        if not 0 < self.eps < math.inf:
            raise Unsupported(f"eps={self.eps}", supported="a finite eps > 0", nearest="eps=1e-6")
        if self.normalize and self.feature_map not in NONNEGATIVE:
            raise Unsupported(
                f"feature_map={self.feature_map!r} with normalize=True, whose denominator may vanish",
                supported=f"{', '.join(NONNEGATIVE)} when normalized",
                nearest="normalize=False",
            )


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    config: Config = call.config
    phi = FEATURE_MAPS[config.feature_map]
    weights = phi(call.scale * q) @ phi(k).mT
    if call.pattern.causal and not call.pattern.cross:
        weights = weights.tril(k.shape[2] - q.shape[2])
    output = weights @ v
    return output / (weights.sum(-1, keepdim=True) + config.eps) if config.normalize else output


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """Noncausal: sums over all keys first. Causal: the chunked form."""
    if call.pattern.causal and not call.pattern.cross:
        return _recurrence(call, q, k, v)[0]
    return read(call.replace(state=absorb(call.replace(state=None), k, v)), q).output


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Causal-self with state in and out, in chunks of 64 unless the call says otherwise."""
    output, memory = _recurrence(call, q, k, v)
    return Result(output, MatrixState(memory, recurrent_forms.length_after(call, k)))


def _recurrence(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal-self: the outputs, and S and z after the last key."""
    output, memory = linear_attention(
        recurrent_forms.beside_keys(call, q, k.shape[2]),
        k,
        v,
        _rule(call),
        state=recurrent_forms.memory_of(call),
        valid=call.memory_lengths,
        chunk_size=call.chunk_size or 64,
        backend=call.backend,
    )
    return recurrent_forms.of_queries(call, output, q.shape[2]), memory


def step(call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 v"]) -> Result:
    """One token of :func:`chunked`, by the recurrence or in one kernel."""
    rule = _rule(call)
    if call.memory_lengths is call.backend is None:
        found = small_step(q, k, v, rule, call.state.memory)
        if found is not None:
            return Result(found[0], MatrixState(found[1], recurrent_forms.length_after(call, k)))
    output, state = recurrent_forms.step(call, map_queries(q, rule), *map_memory(k, v, rule, call.memory_lengths))
    return Result(divide(output, rule).to(v.dtype), state)


def absorb(call: Call, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]) -> MatrixState:
    """Add memory to S and z; more may follow."""
    keys, values = map_memory(k, v, _rule(call), call.memory_lengths)
    with without_autocast(k.device):
        memory = keys.mT @ values
    if call.state is not None:
        memory = memory + call.state.memory
    return MatrixState(memory, recurrent_forms.length_after(call, k))


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Read absorbed memory with queries."""
    rule = _rule(call)
    return Result(divide(recurrent_forms.read(call, map_queries(q, rule)), rule).to(q.dtype), call.state)


def _rule(call: Call) -> Rule:
    config: Config = call.config
    return Rule(config.feature_map, call.scale, config.eps if config.normalize else None)


def recurrence(config: Config, _: None) -> Recurrence[nn.Module]:
    """Describe the layer, whose scale is 1, as a recurrence over its state."""
    return Recurrence(feature_map=config.feature_map, scale=1.0, divisor=config.eps if config.normalize else None)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern in chunks of 64: each token pairs with 32 tokens of its chunk on average, and with S.
    The normaliser is one more column."""
    width = shape.dim_value + config.normalize
    matrix = shape.dim_key * width
    tokens = shape.batch * shape.heads * shape.m
    return Cost(
        flops=4.0 * tokens * (matrix + 32 * (shape.dim_key + width)),
        memory=float(tokens * (64 + shape.dim_key + width)),
        state=float(shape.heads * matrix),
        step_flops=4.0 * shape.batch * shape.heads * matrix,
    )


MECHANISM = Mechanism(
    name="linear",
    aliases=("linear_transformer", "linear_attention", "katharopoulos"),
    kind=Kind.ATTENTION,
    summary="The weight of a pair is a product of feature maps, so the past fits in one matrix per head.",
    paper=Paper(
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", "2006.16236", 2020, 18
    ),
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
        "relu": {"feature_map": "relu", "eps": 1e-3},
        "squared relu": {"feature_map": "relu_squared", "eps": 1e-3},
        "sigmoid": {"feature_map": "sigmoid"},
        "exp": {"feature_map": "exp"},
        "silu": {"feature_map": "silu", "normalize": False},
        "identity": {"feature_map": "identity", "normalize": False},
    },
    engine="linear_attention",
    state=MatrixState,
    combines="sum",
    recurrence=recurrence,
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    waivers=(
        Waiver("extremes", "exp of features above 88 is not finite in float32", variants=("exp",)),
        Waiver(
            "layer_decoding",
            "if relu leaves a query a single feature near eps, rounding in the projection is a thousandth of the sum of the weights",
            holds_with={"eps": 0.1},
            patterns=(Pattern.CAUSAL_SELF,),
            variants=("relu",),
            dtypes=(torch.float32,),
        ),
    ),
)
