r"""Universal relative positions (URPE): softmax weights multiplied by a learned number for each offset.

When to pick it: a noncausal transformer with only relative positions that must know where its tokens are (positions in
language, graphs, images), for 2 R + 1 numbers per head.
When not: causal models, whose mask already reveals positions; long sequences without a kernel
(:func:`regard.which_backend`), since all weights are then computed explicitly.

Definition (Luo et al., arXiv 2205.13401, section 3), with B and C constant along diagonals:

    A = softmax(tau Q K^T + B),     A'_ij = A_ij c_{j-i},     O = A' V

A bias inside the softmax leaves every row of A summing to 1, so tokens that are all equal stay equal whatever B is: no
network of such layers, however deep or wide, can tell their positions apart or approximate every continuous function of
sequences. The rows of A' have arbitrary sums and may be negative. A C of ones gives ordinary attention.

| paper | here |
|---|---|
| B = b_{j-i} | any position scheme of the layer that adds to scores; `toeplitz` by default, T5's `relative` if C is bucketed |
| C = c_{j-i} | `factors` (H, 2 R + 1): offsets -R ... R, key minus query; farther offsets use the factor of R |
| C on images | `grid_factors` (H, 2 R_y + 1, 2 R_x + 1) with `grid`, in whole calls of self patterns, tokens in row-major order |
| C on graphs | `pair_factors` (B, H, N, M), a factor for each pair, in whole calls; B is then `mask.bias` |
| tau | `scale`, D^-0.5 by default |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Ranks count valid tokens. In cross
patterns both sides count from 0, which suits a memory aligned with the queries. With ``want={"weights"}`` the extras
contain A' as ``weights`` and A as ``softmax_weights``. A query that sees no key gives 0.

Nothing is normalised after C, and C cannot be written as a bias, since its logarithm would enter the normaliser. But
with `factors`, O is a sum over parts P of the keys, where softmax attention to each part gives an output and a
log-sum-exp:

    O = sum_P c_P e^{L_P - L} O_P,    L = log sum_P e^{L_P}

Keys R or more before the query form one part, with the c of -R, and keys R or more after it another, with the c of R.
Nearer keys are in two parts with factors kappa and -kappa, which share the weights as p and 1 - p: their c is kappa (2
p - 1), with kappa > |c|, and log p and log(1 - p) are biases by offset. So it costs softmax attention plus a second
pass over the window, if B depends only on distance and a kernel has enough pairs to be worthwhile (`FEWEST_WEIGHTS`).
Everything else (`grid_factors`, `pair_factors`, dropout, requested weights, `mask.bias`, blocks) uses explicit weights,
computed for some queries at a time and again in the backward pass.

Deviations: the official network has one B and one C for all its layers; here each layer has its own unless the model
has ``stack={"share": "tables"}``. A layer learns C - 1, so that weight decay pulls towards plain attention, not towards
zero. Unused bucket rows are left out, and buckets grow as in `relative`. Computed in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch

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
from regard.core.sampling import attention_shapes, normals
from regard.engines.cache import CountedState
from regard.mechanisms.universal_rpe.definition import ACTIVATIONS, Config, reference
from regard.mechanisms.universal_rpe.forms import (
    ABOVE_LARGEST,
    FEWEST_WEIGHTS,
    NUMBERS_AT_ONCE,
    absorb,
    chunked,
    parallel,
    read,
)
from regard.mechanisms.universal_rpe.layer import STD, Factors


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    grid: tuple[int, ...] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings: factors of both signs for 11 offsets, or 3 x 5 on a grid, fewer than the tests'
    sequences have."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6, "o": 11} | (sizes or {})
    shapes = attention_shapes(batch, n, m, size)
    shapes |= {"factors": (size["h"], size["o"])} if grid is None else {"grid_factors": (size["h"], 3, 5)}
    return normals(generator, shapes, dtype)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: factors by offset, from the farthest before to the farthest after."""
    distance = config.max_distance
    return {"o": 2 * (distance if isinstance(distance, int) else max(distance)) + 1}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with a kernel and a layer's factors: softmax attention plus a second pass over the window; with few pairs,
    or on a grid, softmax attention plus one product per pair."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    pairs = heads * shape.n * shape.m
    flops, memory = pairs * (2.0 * width + 1), float(min(pairs, NUMBERS_AT_ONCE))
    if pairs >= FEWEST_WEIGHTS and isinstance(config.max_distance, int):
        again = 0 if config.factors == "none" else min(shape.m, 2 * config.max_distance - 1)
        parts = 1 if config.factors == "none" else 4
        flops, memory = (
            heads * shape.n * (shape.m + again) * 2.0 * width,
            float(parts * heads * shape.n * shape.dim_value),
        )
    return Cost(
        flops=flops,
        memory=float(heads * (shape.n + shape.m)) + memory,
        state=float(shape.heads * shape.m * width),
        step_flops=heads * shape.m * (2.0 * width + 1),
    )


MECHANISM = Mechanism(
    name="universal_rpe",
    aliases=("urpe", "urpe_attention", "universal_relative_positions"),
    kind=Kind.ATTENTION,
    summary="Softmax weights times a learned number for each offset, which lets relative positions express absolute ones.",
    paper=Paper("Your Transformer May Not be as Powerful as You Expect", "2205.13401", 2022, 40),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "factors?": "ho",
        "grid_factors?": "hyx",
        "pair_factors?": "bhnm",
    },
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
        "bucketed": {"factors": "bucketed", "num_buckets": 8, "max_distance": 20},
        "no factors": {"factors": "none"},
        "shared, relu": {"share_heads": True, "activation": "relu", "max_distance": 10},
        "normal, softplus": {"start": "normal", "activation": "softplus"},
        "on a grid": {"max_distance": (12, 12)},
    },
    variant_patterns={
        "on a grid": (Pattern.NONCAUSAL_SELF,),
    },
    grid_variants=frozenset({"on a grid"}),
    engine="attention",
    state=CountedState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    projection=Factors,
    sample_inputs=sample_inputs,
    layer_defaults={"positions": "toeplitz", "bias": True},
    waivers=(Waiver("layer_lengths", "the size of its table is fixed when the program is compiled"),),
)


__all__ = [
    "ABOVE_LARGEST",
    "ACTIVATIONS",
    "FEWEST_WEIGHTS",
    "MECHANISM",
    "NUMBERS_AT_ONCE",
    "STD",
    "Config",
    "Factors",
    "absorb",
    "axis_sizes",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
]
