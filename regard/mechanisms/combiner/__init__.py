r"""Combiner: near tokens are attended to directly, all others through summaries of their groups.

When to pick it: a sparse pattern (blocks, log-sparse, axial) is what you can afford, but every position must be within
reach in one layer.
When not: exact recall of far tokens (a group of any size counts as one token, with one key), short inputs.

Definition (Ren et al., arXiv 2107.05768, section 3, and the authors' code). With q scaled by tau, token i attends to
the tokens D_i directly and to groups G through summaries; together they cover every token that it may see:

    kappa_G = pool over j in G of k_j,    rho_G = pool over j in G of q_j
    nu_G    = sum_{j in G} softmax_j(rho_G . k_j) v_j,       the same for every query
    p_i     = softmax over { q_i . k_j, j in D_i } and { q_i . kappa_G },    one softmax for both
    o_i     = sum_{j in D_i} p_ij v_j + sum_G p_iG nu_G

Tokens are laid out in rows of s = `segment`; token i is in row r, column c; the last row may be incomplete.

| `factorization` | directly | groups (causal) | noncausal |
|---|---|---|---|
| `fixed` | own row, up to i | each earlier row | whole own row; every row, its own included |
| `logn` | i | for each set bit l of i, the 2^l tokens before i - i mod 2^l | none |
| `axial_vertical` | own row up to i, own column above | the part of each other column above row r | and the part below |
| `axial_horizontal` | as above | the parts of each row above, left and right of column c | of rows below too |
| `axial_mixture` | as above | both of these | both |
| `axial_rowmajor` | own row, up to i | each earlier row t, summarised by the query of (t, c) | every row, its own included |

In `axial_rowmajor` each row is summarised once per column, by that column's query: nu_tc = sum over row t of
softmax(q_tc . k_j) v_j, and its key depends on `row_keys`: k_tc (`none`), the same sum over k (`wsum`), W' LN(x_tc + W
nu_tc) (`proj`), or that with the sum over k in place of nu (`wsum_proj`).

| paper | here |
|---|---|
| Omega_i^0, Omega_i^r | D_i, the groups G |
| max pooling of phi(Omega_r) | `reduce` and `pool`: relu or a learned map with relu may come first |
| L^(1/2), span of `fixed` | `segment`, s |

Layout: (B, H, N, D), with as many key heads as query heads; any length. N = M in causal-self, since groups have
queries.
State: `fixed`: the open row and one key and value for each finished row. Axial: the open row and, for each token of a
finished row, its key and value and those of the parts of its row (`axial_rowmajor`: only those of its summary). `logn`:
all keys and values and log2(N) summaries, each computed when its block is complete. Several tokens after a state are
computed at once by `fixed`, one after the other by the rest.
Cross patterns (not in the paper): `fixed` only; groups are rows of the memory, summarised by their own pooled keys in
place of queries.
Deviations: the two axial patterns that the paper names, but has no code for, are the mixture without the other family.
Empty parts are masked, and in noncausal axial patterns a token's own row and column count once; the original masks
neither. `logn` has bit_length(N - 1) levels; the original's ceil(log2(N - 1)) loses the top one when N - 1 is a power
of two. In noncausal `axial_rowmajor`, columns without a token in an incomplete row use the summary of the row's last
token. Dropout applies to direct weights and to weights inside groups. Learned partitions are left out: a learned
cluster holds tokens on both sides of a query, so under causality each query would need its own summaries, while those
of rows and blocks are complete when first read, and shared. (`routing` attends within learned clusters.)
"""

from __future__ import annotations

import math

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
from regard.mechanisms.combiner.definition import (
    AXIAL,
    EPSILON,
    FACTORIZATIONS,
    Config,
    Group,
    Learned,
    check_pattern,
    partition,
    reference,
)
from regard.mechanisms.combiner.fixed import absorb, read
from regard.mechanisms.combiner.forms import chunked, parallel
from regard.mechanisms.combiner.layer import LearnedMaps
from regard.mechanisms.combiner.state import BlockState, CombinerState, RowState


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
) -> Tensors:
    """Normal inputs for tests, with just the learned maps that the options need."""
    widths = {"h": 2, "d": 8, "v": 6, "c": 5, **(sizes or {})}
    heads, d, value, c = (widths[letter] for letter in "hdvc")
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, heads, n, d),
        "k": (batch, heads, m, d),
        "v": (batch, heads, m, value),
    }
    if config.pool == "deepset":
        shapes |= {"pool_q": (d, d), "pool_k": (d, d)}
    if config.projected:
        told = d if config.row_keys == "wsum_proj" else value
        shapes |= {"residual": (batch, m, c), "row_in": (heads, told, c), "row_out": (heads, c, d)}
        shapes |= {"norm_weight": (c,), "norm_bias": (c,)}
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M; the learned maps are not counted."""
    width, heads, m = shape.dim_key + shape.dim_value, shape.batch * shape.heads, shape.m
    s = min(config.segment, max(m, 1))
    rows = math.ceil(m / s)
    # logits of a token, and pairs inside groups
    if config.factorization == "fixed":
        logits, pairs, kept = s + rows, float(m), rows * width + s * (shape.dim_key + width)
    elif config.factorization == "logn":
        levels = m.bit_length()
        logits, pairs, kept = 1 + levels, m * levels / 2, m * width + levels * (shape.dim_key + width)
    else:
        logits, pairs, kept = s + rows, float(m * s), m * width + s * (shape.dim_key + width)
        if config.factorization != "axial_rowmajor":
            logits, pairs = logits + s * config.vertical + 2 * rows * config.horizontal, 0.0
            pairs = float(m * (rows * config.vertical + 2 * s * config.horizontal))
            kept += 2 * m * width * config.horizontal + s * (shape.dim_key + width) * config.vertical
    stored = logits if config.factorization != "fixed" else 1
    return Cost(
        flops=2.0 * heads * (shape.n * logits + pairs) * width,
        memory=float(heads * (shape.n * stored + pairs)),
        state=float(shape.heads * kept),
        step_flops=2.0 * heads * (logits + pairs / max(m, 1)) * width,
    )


MECHANISM = Mechanism(
    name="combiner",
    kind=Kind.ATTENTION,
    summary="Nearby tokens are attended to directly, all others through summaries of their groups.",
    paper=Paper("Combiner: Full Attention Transformer with Sparse Computation Cost", "2107.05768", 2021, 7),
    inputs={
        "q": "bhnd",
        "k": "bhmd",
        "v": "bhmv",
        "residual?": "bmc",
        "pool_q?": "dd",
        "pool_k?": "dd",
        "row_in?": "hrc",
        "norm_weight?": "c",
        "norm_bias?": "c",
        "row_out?": "hcd",
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
        "short rows": {"segment": 4, "reduce": "mean"},
        "learned pooling": {"segment": 5, "pool": "deepset", "share_pool": True, "exclude_self_segment": True},
        "logarithmic": {"factorization": "logn", "reduce": "mean"},
        "logarithmic, learned pooling": {"factorization": "logn", "pool": "deepset"},
        "vertical": {"factorization": "axial_vertical", "segment": 4, "reduce": "sum"},
        "horizontal": {"factorization": "axial_horizontal", "segment": 4},
        "mixture": {"factorization": "axial_mixture", "segment": 3, "pool": "relu", "reduce": "mean"},
        "rows": {"factorization": "axial_rowmajor", "segment": 4},
        "rows, plain keys": {"factorization": "axial_rowmajor", "segment": 4, "row_keys": "none"},
        "rows, weighted sums": {"factorization": "axial_rowmajor", "segment": 3, "row_keys": "wsum"},
        "rows, projected sums": {
            "factorization": "axial_rowmajor",
            "segment": 3,
            "row_keys": "wsum_proj",
            "exclude_self_segment": True,
        },
    },
    variant_patterns={
        "logarithmic": (Pattern.CAUSAL_SELF,),
        "logarithmic, learned pooling": (Pattern.CAUSAL_SELF,),
        **dict.fromkeys(
            (
                "vertical",
                "horizontal",
                "mixture",
                "rows",
                "rows, plain keys",
                "rows, weighted sums",
                "rows, projected sums",
            ),
            (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        ),
    },
    engine="attention",
    state=CombinerState,
    cost=cost,
    uneven=False,
    honours=frozenset({"dropout"}),
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=LearnedMaps,
    waivers=(Waiver("layer_lengths", "its number of summaries is fixed when the program is compiled"),),
)


__all__ = [
    "AXIAL",
    "EPSILON",
    "FACTORIZATIONS",
    "MECHANISM",
    "BlockState",
    "CombinerState",
    "Config",
    "Group",
    "Learned",
    "LearnedMaps",
    "RowState",
    "absorb",
    "check_pattern",
    "chunked",
    "cost",
    "parallel",
    "partition",
    "read",
    "reference",
    "sample_inputs",
]
