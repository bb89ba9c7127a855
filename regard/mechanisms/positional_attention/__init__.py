r"""Positional attention: the weight of a pair depends only on its positions; only values carry content.

When to pick it: numeric and algorithmic regression of bounded length, where the flow of data does not depend on the
data (prefix sums, sorting networks, tournaments), especially if test values are larger than training values.
When not: lookups, parsing, or anything whose data flow depends on content; lengths beyond the table of encodings.

Definition (Back de Luca et al., arXiv 2410.01686), for a head with positional encodings P, the same in all rows:

    Q = P W_Q + b_Q,   K = P W_K + b_K,   A = softmax(Q K^T / sqrt(D)),   O = A V

A has no batch axis, and O is linear in V: up to 2^15 pairs A is computed once for all rows; beyond that, where reading
a stored matrix costs more than recomputing its weights, by the kernels of softmax attention, row by row. In causal-self
A is masked before the softmax; in cross patterns queries use the positions of their own sequence and keys those of the
memory.

| paper | here |
|---|---|
| P, F features wide | `encodings` (S, F): one row for each of S positions; sinusoids, at any position, when absent |
| W_Q, W_K, b_Q | `query_map`, `key_map` (H, F, D), `query_bias` (H, D); b_K would add the same to all scores of a query |
| P of a layer | `encoding`: one-hot in the paper, which fixes the maximum length; by default sinusoidal, which does not |
| d_k = width of P for each head | `key_width="encoding"`; ``"split"`` divides it among the heads |

Layout: (B, H, N, D). The position of a token is its rank among the valid tokens of its row; a position without a row of
P is refused. `slots` (B, N), whose values are not read, gives the number of outputs if it differs from the number of
keys. The paper's extra node is put first here instead of last, so that it keeps its row of P at every length. The scale
multiplies D^-0.5 (1 by default). Scores are computed as (Q W_K^T) P^T, so that no key is ever projected, and the state
holds only values. With padding in noncausal patterns each row has its own weights, since its padding must not be
counted.
Hybrid heads: `content_query` and `content_key` (B, C, N, E) are queries and keys of C additional heads of softmax
attention, the last of V's heads; `content_heads` in a layer.

The paper's layer concatenates, MLP([x ; W_O O]), instead of using a residual and a norm, and without any biases it is
positively homogeneous: f(a x) = a f(x). This is what generalises to larger values, and what a norm, or P in the values,
would destroy. `regard.models.AlgorithmicNetwork` is the network of such layers.

Deviations: each layer has its own encodings if they are learned. Maps are initialised as in the paper, the other
projections as in all layers here.
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
    Shape,
    Tensors,
)
from regard.engines.cache import CountedState
from regard.mechanisms.positional_attention.definition import Config, reference
from regard.mechanisms.positional_attention.forms import SHARED_PAIRS, Positions, absorb, chunked, parallel, read
from regard.mechanisms.positional_attention.layer import Maps


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings: encodings with room for continuations, and content for content heads."""
    size = {"h": 2, "d": 8, "v": 6, "f": 5} | (sizes or {})
    heads, content, rows = size["h"], min(config.content_heads, size["h"] - 1), max(80, n, m)
    shapes: dict[str, tuple[int, ...]] = {
        "query_map": (heads - content, size["f"], size["d"]),
        "key_map": (heads - content, size["f"], size["d"]),
        "query_bias": (heads - content, size["d"]),
        "v": (batch, heads, m, size["v"]),
    }
    if config.encoding == "learned":
        shapes["encodings"] = (rows, size["f"])
    if content:
        shapes |= {"content_query": (batch, content, n, 4), "content_key": (batch, content, m, 4)}
    found = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    found["slots"] = torch.zeros(batch, n, dtype=torch.long)
    return found


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: features of an encoding."""
    return {"f": config.features}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of one weight matrix per head, shared by all rows if it is small, and its product with each row."""
    pairs = shape.heads * shape.n * shape.m
    shared = shape.n * shape.m <= SHARED_PAIRS
    rows = 1 if shared else shape.batch
    stored = pairs + shape.batch * shape.heads * (shape.n + shape.m) * shape.dim_value
    return Cost(
        flops=2.0 * pairs * (rows * shape.dim_key + shape.batch * shape.dim_value),
        memory=float(stored if shared else shape.heads * (shape.n + shape.m) * shape.dim_key + shape.batch * shape.n),
        state=float(shape.heads * shape.m * shape.dim_value),
        step_flops=2.0 * shape.batch * shape.heads * shape.m * (shape.dim_key + shape.dim_value),
    )


MECHANISM = Mechanism(
    name="positional_attention",
    aliases=("positional", "positional_transformer"),
    kind=Kind.ATTENTION,
    summary="The weight of a pair depends on its positions alone; only values carry content.",
    paper=Paper(
        "Positional Attention: Expressivity and Learnability of Algorithmic Computation", "2410.01686", 2024, 32
    ),
    inputs={
        "query_map": "tfd",
        "key_map": "tfd",
        "v": "bhmv",
        "query_bias?": "td",
        "encodings?": "sf",
        "slots?": "bn",
        "content_query?": "bcne",
        "content_key?": "bcme",
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
        "one-hot": {"encoding": "one_hot", "max_length": 200},
        "binary": {"encoding": "binary", "max_length": 256, "key_width": "split"},
        "learned": {"encoding": "learned", "encoding_dim": 6, "max_length": 200},
        "content": {"content_heads": 1},
    },
    engine="attention",
    state=CountedState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "alibi", "relative", "toeplitz"),
    refused_positions="its weights already come from positions, and only its values carry content",
    projection=Maps,
    sample_inputs=sample_inputs,
    layer_defaults={"bias": True},
)


__all__ = [
    "MECHANISM",
    "SHARED_PAIRS",
    "Config",
    "Maps",
    "Positions",
    "absorb",
    "axis_sizes",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
]
