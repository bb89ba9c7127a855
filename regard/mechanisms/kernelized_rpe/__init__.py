r"""Kernelized attention with relative positions: a product of feature maps times a learned weight for each offset.

When to pick it: long sequences, or images, that need a learned bias for each relative position without a matrix of all
pairs; training linear attention from scratch, which unit-norm queries and keys make stable.
When not: exact recall of single tokens (random features blur the weights), or relative terms that depend on the query.

Definition (Luo et al., arXiv 2106.12566, section 3), with b_{j-i} a number for each offset (key minus query):

    z_i = (phi(q_i) . sum_j e^{b_{j-i}} phi(k_j) v_j^T) / (phi(q_i) . sum_j e^{b_{j-i}} phi(k_j))
    phi(x) = e^{-|x|^2 / 2} F^-1/2 (e^{w_1 . x}, ..., e^{w_F . x}),   w_f ~ N(0, I)        (positive random features)
    q_i <- q_i / |q_i|,   k_j <- k_j / |k_j|                                                  (normalised, NKA)

phi(q) . phi(k) estimates e^{q . k}, so z approximates softmax(q k + b) v. Its error at a given F grows exponentially with
the norms of q and k, which is why they are normalised. The sums over j are products with a Toeplitz matrix: one FFT for
each pair of a feature and a value column.

| paper | here |
|---|---|
| b_{j-i} | `offset_bias` (H, 2 R + 1): offsets -R ... R; farther ones share the weight of R |
| w | `random_features` (H, F, D), drawn by :func:`draw_features`; a buffer of the layer |
| m, number of features | F: `features`, the width of a head by default |
| phi | `feature_map`: ``positive_random``, or elu + 1, relu, ... which need no `random_features` |
| NKA | `normalize`; sharpness then comes from b, and from `log_temperature` (H) where it is learned |
| c_{j-i} on images | `grid_bias` (H, 2 R_y + 1, 2 R_x + 1) with `grid` (rows, columns), in self patterns |
| weight of a class token | e^a, `class_bias` a (H), 0 if not given; a layer learns it with `learn_class_bias` |

Layout: (B, H, N, D). The scale (1 by default; e^log_temperature multiplies it) applies to q . k: its square root
multiplies q and k before phi. Ranks count valid tokens; in causal-self keys after the query have weight 0. In cross
patterns both sides count from 0, which suits a memory that is aligned with the queries. On a grid the tokens fill it
row by row, and earlier tokens are those in a row above or to the left, which the offset alone decides: so causality
uses half of the table.
Tokens whose role is not TOKEN (such as a class token) have no position: all their pairs have the weight e^a.

Since far offsets share a weight, the sum over them is linear attention, and only near keys are computed by pairs: the
causal state is that sum and the last R - 1 tokens, of constant size. The same split computes whole sequences by blocks,
which is chosen instead of the FFT where it is faster (`method`): on a CPU for all but long sequences whose offsets all
have separate weights. The error of an FFT is relative to the largest of its values, so it is computed in float64.
On a grid, far offsets share a weight per column at best: whole grids use the FFT, the state holds every token, and a
step weights all of them. With tokens that have no position there is no state, since the positions of later tokens
depend on how many of the earlier ones have one.

Deviations: the paper gives every offset of a sequence its own number; here that takes R >= N - 1. Weights e^b and the
features of each query are divided by their largest, which cancels; `eps` bounds the denominator after that. Without
normalisation the Performer scales by D^-0.5, which is `scale` here. Dropout applies to the layer's output.
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
from regard.core.sampling import normals
from regard.mechanisms.kernelized_rpe.definition import NORM_EPS, OFFSETS, POSITIVE_RANDOM, Config, reference
from regard.mechanisms.kernelized_rpe.forms import (
    FFT_SLOWNESS,
    NUMBERS_AT_ONCE,
    KernelizedState,
    absorb,
    chunked,
    fft_is_best,
    fft_operations,
    operations,
    parallel,
    read,
)
from regard.mechanisms.kernelized_rpe.layer import Offsets, draw_features


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    grid: tuple[int, ...] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings: biases of 11 offsets, or 3 x 5 on a grid, fewer than the tests' sequences have."""
    size = {"h": 2, "d": 8, "v": 6} | (sizes or {})
    heads, width = size["h"], size["d"]
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, heads, n, width),
        "k": (batch, heads, m, width),
        "v": (batch, heads, m, size["v"]),
    }
    shapes |= {"offset_bias": (heads, size.get("o", 11))} if grid is None else {"grid_bias": (heads, 3, 5)}
    if config.feature_map == POSITIVE_RANDOM:
        shapes["random_features"] = (heads, config.features or width, width)
    if config.learn_temperature:
        shapes["log_temperature"] = (heads,)
    return normals(generator, shapes, dtype)


def _farthest(config: Config) -> int:
    """Largest offset with its own weight, along any side of a grid."""
    return config.max_offset if isinstance(config.max_offset, int) else max(config.max_offset)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Number of offsets with their own weight, from the farthest before to the farthest after."""
    return {"o": 2 * _farthest(config) + 1}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of causal-self by the chosen method; a grid (a tuple `max_offset`) has as many places as keys."""
    reach = _farthest(config)
    features = config.features if config.features and config.feature_map == POSITIVE_RANDOM else shape.dim_key
    width = shape.dim_value + 1
    heads = shape.batch * shape.heads
    size = (shape.n, shape.m, features, width, reach)
    fft, blocks = operations(*size, causal=True)
    by_fft = fft_is_best(config, *size, causal=True)
    maps = 2.0 * (shape.n + shape.m) * shape.dim_key * features if config.feature_map == POSITIVE_RANDOM else 0.0
    if isinstance(config.max_offset, tuple):
        points = 4 * max(shape.m, 1)  # twice as many along either side
        return Cost(
            flops=heads * (maps + fft_operations(points, features, width)),
            memory=float(heads * shape.m * (5 * features + width)),
            state=float(shape.heads * shape.m * (features + width)),
            step_flops=heads * (2.0 * (shape.m + 1) * (features + width) + maps / max(shape.n + shape.m, 1)),
        )
    near = 64 + min(reach, shape.m)
    table = (reach - 1) * (features + width) + features * width
    step = (
        2.0 * min(reach, shape.m + 1) * (features + width) + 4.0 * features * width + maps / max(shape.n + shape.m, 1)
    )
    return Cost(
        flops=heads * (maps + (fft if by_fft else blocks)),
        memory=float(heads * shape.m * (features + width + (2 * features if by_fft else near * (1 + features / 64)))),
        state=float(shape.heads * table),
        step_flops=heads * step,
    )


MECHANISM = Mechanism(
    name="kernelized_rpe",
    aliases=("nka_rpe", "kernelized_attention_rpe", "nprf_rpe", "kernelized"),
    kind=Kind.ATTENTION,
    summary="A product of feature maps times a learned weight for each offset, computed without a matrix of pairs.",
    paper=Paper(
        "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", "2106.12566", 2021, 36
    ),
    inputs={
        "q": "bhnd",
        "k": "bhmd",
        "v": "bhmv",
        "offset_bias?": "ho",
        "grid_bias?": "hyx",
        "random_features?": "hfd",
        "log_temperature?": "h",
        "class_bias?": "h",
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
        "fft": {"method": "fft", "max_offset": 20},
        "blocks": {"method": "blocks", "share_offsets": True, "max_offset": 5, "eps": 1e-3},
        "orthogonal features": {"features": 3, "orthogonal": True, "share_features": True, "redraw": 7},
        "elu": {"feature_map": "elu", "learn_temperature": True, "offsets": "bucketed"},
        "relu": {"feature_map": "relu", "offsets": "alibi"},
        "squared relu": {"feature_map": "relu_squared", "offsets": "power"},
        "sigmoid": {"feature_map": "sigmoid", "offsets": "none", "normalize": False},
        "exp": {"feature_map": "exp", "learn_class_bias": True},
        "on a grid": {"max_offset": (12, 12), "learn_class_bias": True},
    },
    variant_patterns={
        "on a grid": (Pattern.NONCAUSAL_SELF,),
    },
    grid_variants=frozenset({"on a grid"}),
    engine="gated_recurrence",
    state=KernelizedState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"roles"}),
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    knows_positions=True,
    refused_positions="it has a weight for each relative position already",
    projection=Offsets,
    sample_inputs=sample_inputs,
    waivers=(
        Waiver("layer_lengths", "the size of its Fourier transform is fixed when the program is compiled"),
        Waiver("layer_gradient", "a class bias learns from class tokens alone", variants=("exp", "on a grid")),
        Waiver(
            "layer_decoding",
            "squared rectified features leave a query almost no weight, and float32 divides by their sum (float64 holds)",
            variants=("squared relu",),
            dtypes=(torch.float32,),
        ),
    ),
)


__all__ = [
    "FFT_SLOWNESS",
    "MECHANISM",
    "NORM_EPS",
    "NUMBERS_AT_ONCE",
    "OFFSETS",
    "POSITIVE_RANDOM",
    "Config",
    "KernelizedState",
    "Offsets",
    "absorb",
    "axis_sizes",
    "chunked",
    "cost",
    "draw_features",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
]
