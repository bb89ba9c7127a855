r"""Mixture of heads (MoH): each token uses a few of the attention heads, chosen and weighted by routers.

When to pick it: attention whose heads should specialise; a trained model that should use fewer heads per token; long
sequences processed whole, where a query is computed only in the heads that its token chose.
When not: to save memory, or time in decoding: decoding computes and caches all heads, since a later token may choose
any.

Definition (Jin et al., arXiv 2410.11842), for the head outputs o_i of a token x, with H heads of which the first h_s
are shared and E = H - h_s are routed, k of them active:

    (a_1, a_2) = 2 softmax(x W_0),   shared: g_i = a_1 h_s softmax(x W_s)_i
    p = softmax(x W_r),   T = top-k(p),   routed: g_i = a_2 k p_i / sum_{j in T} p_j for i in T, else 0
    y = concat_i(g_i o_i) W_o,   L_b = E sum_e mean(p_e) mean(1[e in T]), means over the tokens

| paper | here |
|---|---|
| o_i | `o` (B, H, N, V), the head outputs of any attention mechanism |
| x W_r, x W_s, x W_0 | `routed` (B, N, E), `shared` (B, N, h_s), `balance` (B, N, 2) |
| h_s, k | `shared_heads`, `active_heads`; which heads are shared: the first, or those listed in `shared_heads` |
| L_b, k when balanced and E when collapsed | `losses["load_balance"]`, averaged over layers; the paper's weight is 0.01 |

Gates depend only on the token (the query token in cross attention), so patterns, caches and states are those of the
wrapped mechanism; padding affects neither the gates nor L_b. With equal logits every active head has gate 1. A single
shared head has no W_s; without shared heads, or without routed ones, there is no W_0. Ties in a top-k go to the first
head. `router="query_norm"` (for continued training of a dense model) has no parameters: the score of a routed head is
the norm of its query over the (unbiased) standard deviation of the routed heads' norms, and the gates are 0 or 1, so
the head outputs keep their scale; p gets its gradient as if the gates were p (straight-through).
Where softmax attention processes many tokens at once, a query is computed only in the heads that its token chose, in
layers and in swapped models: heads that share keys are processed together, and no scores or weights of other heads are
computed. Keys and values are computed for all tokens, since any may be read. The projections of all heads remain one
product each: one large product is faster than small ones on gathered tokens, and query norms need all queries. The
result is the same function. All heads are computed for a single token (heads that share keys read them once either
way), if weights are requested, in a compiled program, and for straight-through gates in training (whose gradient needs
the heads that were not chosen). This saves 1 - (h_s + k) / H of the scores; within a batch a head's scores are padded
to the row with the most tokens. `compute="auto"` gathers on a CPU where a query is spared 256 keys or more on average:
from about 1,000 tokens with 75 % of the heads, from 500 with 50 %; measured by `benchmarks/mixture_of_heads.py`.
`want={"gates"}` returns (B, N, H) on right-padded tokens in `extras["gates"]`; see `head_usage`.
Deviations: L_b is also returned in evaluation, and covers the local batch when training is distributed. The standard
deviation is at least eps. `rescale_gates=False` omits the factors 2, h_s, k and the division by the sum over T: plain
softmax products, as in the paper's formulas. `scale` multiplies the logits of the routers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
    Waiver,
)
from regard.layers.attention import LayerState
from regard.mechanisms.mixture_of_heads.definition import GATES, ROUTERS, Config, reference
from regard.mechanisms.mixture_of_heads.forms import gates_of, parallel
from regard.mechanisms.mixture_of_heads.layer import HeadRouter, MixtureOfHeads, cannot_gather

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def head_usage(gates: Float[Tensor, "b n h"], tokens: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " h"]:
    """Share of tokens for which each head is active; the mask `tokens` selects tokens (to skip padding, say)."""
    active = (gates != 0).double()
    if tokens is None:
        return active.mean((0, 1))
    return active[tokens].mean(0)


def usage_entropy(usage: Float[Tensor, " e"]) -> Float[Tensor, ""]:
    """Entropy of the usage of routed heads as a fraction of log E: 1 if even, log k / log E if collapsed."""
    share = usage / usage.sum()
    return torch.special.entr(share).sum() / math.log(len(usage))


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int],
) -> Tensors:
    """Inputs for tests: eight heads, and the logits that the options need."""
    heads = 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"o": normal(batch, heads, n, sizes.get("v", 6))}
    for name, width in config.routers(heads).items():
        logits = normal(batch, n, width)
        inputs[name] = logits.abs() if config.router == "query_norm" else logits
    return inputs


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of softmax attention with all heads (for gathered whole sequences, the chosen heads) and of the gates."""
    heads = shape.batch * shape.heads
    width = shape.dim_key + shape.dim_value
    used = 1.0
    if config.gathers(shape.heads, min(shape.n, shape.m)):
        shared, _, active = config.groups(shape.heads)
        used = (shared + active) / shape.heads
    return Cost(
        flops=heads * (2.0 * used * shape.n * shape.m * width + shape.n * (shape.dim_value + 8)),
        memory=float(heads * shape.n * (shape.dim_value + 2)),
        state=float(shape.heads * shape.m * width),
        step_flops=heads * (2.0 * shape.m * width + shape.dim_value + 8),
    )


MECHANISM = Mechanism(
    name="mixture_of_heads",
    aliases=("moh", "mixture_of_head_attention", "routed_heads"),
    kind=Kind.WRAPPER,
    summary="Each token keeps a few of the attention heads, chosen and weighted by routers.",
    paper=Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842", 2024, 54),
    inputs={"o": "bhnv", "routed?": "bne", "shared?": "bns", "balance?": "bnt"},
    patterns=ALL_PATTERNS,
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "none shared": {"num_heads": 8, "shared_heads": 0, "active_heads": 3},
        "nearly all active": {"num_heads": 8, "shared_heads": 1, "active_heads": 7, "rescale_gates": False},
        "all shared": {"num_heads": 4, "shared_heads": 4, "two_stage": False},
        "named": {"num_heads": 8, "shared_heads": (1, 6), "active_heads": 2, "z_loss": True, "noise": 0.5},
        "binary": {"num_heads": 8, "gates": "binary", "compute": "dense"},
        "straight through": {"num_heads": 8, "gates": "straight_through"},
        "query norms": {"num_heads": 8, "router": "query_norm", "shared_heads": (0, 3, 7), "eps": 1e-3},
        "query norms, binary": {"num_heads": 8, "router": "query_norm", "shared_heads": 4, "gates": "binary"},
        "gathered": {"num_heads": 8, "gates": "weighted", "compute": "gather", "shared_heads": (5,), "active_heads": 3},
    },
    state=LayerState,
    cost=cost,
    default_scale=1.0,
    honours=frozenset(),
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    sample_inputs=sample_inputs,
    merge=HeadRouter,
    module=MixtureOfHeads,
    layer_defaults={"output_norm": None},  # routers scale the head outputs
    in_trained_models=lambda model: {  # three quarters of the heads, as for LLaMA3 in the paper
        "router": "query_norm",
        "shared_heads": model.heads // 2,
        "active_heads": -(-3 * model.heads // 4) - model.heads // 2,
    },
    waivers=(
        Waiver(
            "gradient",
            "gates of 0 and 1 have the gradient of probabilities, which numerical derivatives do not see",
            variants=("straight through", "query norms"),
        ),
    ),
)


__all__ = [
    "GATES",
    "MECHANISM",
    "ROUTERS",
    "Config",
    "HeadRouter",
    "MixtureOfHeads",
    "cannot_gather",
    "cost",
    "gates_of",
    "head_usage",
    "parallel",
    "reference",
    "sample_inputs",
    "usage_entropy",
]
