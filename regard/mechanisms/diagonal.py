r"""DiagAttention: attention inside blocks that do not overlap, with softmax or ReLU weights and an output norm.

When to pick it: the first layers of a stack, for local context, below `norm_linear` layers that carry the rest
(TransNormer; :func:`regard.models.transnormer_plan`); time is linear in N, the state has a fixed size.
When not: alone, since no information ever crosses the border of a block; where blocks should overlap (`local`); cross
attention (memory has no position near a query).

Definition (TransNormer, Qin et al., arXiv 2210.10340, section 4.2), with blocks of c tokens:

    s_ij = tau q_i . k_j + bias_ij  for j in the block of i, and j <= i when causal
    o_i = Norm(sum_j relu(s_ij) v_j) for T1,     o_i = sum_j softmax_j(s_i)_j v_j for T2

with Norm over all heads of a token together.

| paper | here |
|---|---|
| block size | c, `block` |
| T1, T2 | `activation="relu"`, `"softmax"` |
| SimpleRMSNorm, x / (norm(x) D^-1/2 + 1e-8) | `output_norm="simple_rms"`, the default with ReLU; also `rms`, `layer` |
| LRPE | `positions="lrpe"` of the layer |
| tau | `scale`, D^-0.5 by default |

`form="window"` sees the last c keys instead of the block (c before and after in noncausal-self), which lets local
context cross borders.

Layout: (B, H, N, D), all heads in one call if there is a norm; keys and values may have fewer heads (grouped queries).
Blocks count valid tokens, so padding does not move their borders, and no padded key is in a softmax.
State: the last c - 1 keys, a fixed size. A block's keys are forgotten when the next begins.
Deviations: of the authors' repositories, one applies the causal mask after the softmax, whose denominator then sees
later keys, and one leaves the zeros that pad the last block in the softmax; here both are excluded. Hidden keys have
weight 0 under ReLU. A pairwise bias tensor (not a position bias) is refused with a state, since its columns could not
be matched to the cached keys. Projections are initialised as in other layers (the paper: Xavier).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Cost, Kind, Mechanism, Paper, Pattern, Result, Shape, Unsupported, at_least, one_of
from regard.core.precision import wide
from regard.engines.attention import Ranks, Visibility, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import attend
from regard.engines.cache import WindowState, extend_window
from regard.layers.head_norm import HEAD_NORMS, HeadNormWeights, norm_over_heads

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        block: c, tokens per block, >= 1.
        activation: ``softmax`` or ``relu``.
        output_norm: norm over all heads together: ``simple_rms``, or ``rms`` and ``layer``, which have learned weights
            in a layer, or ``none``; None means ``simple_rms`` with relu and ``none`` with softmax.
        form: ``block``, or ``window`` for the last `block` keys.
    """

    block: int = 64
    activation: str = "softmax"
    output_norm: str | None = None
    form: str = "block"

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        one_of("activation", self.activation, ("softmax", "relu"))
        one_of("form", self.form, ("block", "window"))
        if self.output_norm is not None:
            one_of("output_norm", self.output_norm, HEAD_NORMS)

    @property
    def norm(self) -> str:
        """`output_norm`, or the activation's default if it is None."""
        return self.output_norm or ("simple_rms" if self.activation == "relu" else "none")


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, _visibility(call), call.bias, call.position_bias, call.blocks, q.dtype)
    weights = torch.relu if call.config.activation == "relu" else lambda scores: scores.softmax(-1)
    return norm_over_heads(attention_reference(q, k, v, visible, weights, call.scale, bias), call.config.norm)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Attention in blocks, or in windows, without an N x N matrix: time is proportional to N times the block size."""
    return _attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue from the last keys by any number of tokens; also the step."""
    if call.state is not None and call.bias is not None:
        raise Unsupported("diagonal with a pairwise bias and a state", supported="a position bias, or no state")
    state, keys, values, where = extend_window(call, k, v, q.shape[2], call.config.block - 1)
    return _attend(call, q, keys, values, where, state)


def _visibility(call: Call) -> Visibility:
    config: Config = call.config
    causal = call.pattern.causal
    if config.form == "block":
        return Visibility(causal=causal, block=config.block)
    if causal:
        return Visibility(causal=True, left=config.block - 1)
    return Visibility(left=config.block, right=config.block)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, state: WindowState | None = None) -> Result:
    config: Config = call.config
    dtype = v.dtype
    if config.norm != "none":  # sums are rounded once, after the norm; those of ReLU may be large
        q, k, v = (wide(x) for x in (q, k, v))
    result = attend(call, q, k, v, where, state, visibility=_visibility(call), rule=config.activation)
    result.output = norm_over_heads(result.output, config.norm).to(dtype)
    return result


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (n of M queries in proportion)."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    size = config.block
    if config.form == "block":
        whole, rest = divmod(shape.m, size)
        pairs = (whole * size * (size + 1) + rest * (rest + 1)) / 2
        seen = rest + 1
    else:
        full = min(size, shape.m)
        pairs = full * (full + 1) / 2 + (shape.m - full) * full
        seen = min(size, shape.m + 1)
    return Cost(
        flops=2.0 * heads * pairs * shape.n / max(shape.m, 1) * width,
        memory=float(heads * shape.n),
        state=float(shape.heads * (size - 1) * width),
        step_flops=2.0 * heads * seen * width,
    )


NO_PLACE = "memory tokens have no position in a block of queries"

MECHANISM = Mechanism(
    name="diagonal",
    aliases=("diag_attention", "block_diagonal"),
    kind=Kind.ATTENTION,
    summary="Attention inside blocks that do not overlap, with weights by softmax or by ReLU and an output norm.",
    paper=Paper("The Devil in Linear Transformer", "2210.10340", 2022, 46),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "relu": {"block": 4, "activation": "relu"},
        "relu without norm": {"block": 5, "activation": "relu", "output_norm": "none"},
        "relu window": {"block": 3, "activation": "relu", "form": "window", "output_norm": "rms"},
        "window": {"block": 3, "form": "window", "output_norm": "simple_rms"},
        "normed": {"block": 6, "output_norm": "layer"},
        "single tokens": {"block": 1},
    },
    engine="attention",
    state=WindowState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "lrpe", "alibi", "relative"),
    merge=HeadNormWeights,
    layer_defaults={"bias": True},
)
