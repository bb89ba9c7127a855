r"""Routing attention: learned centroids match queries with the keys of the same cluster.

When to pick it: long sequences where a query needs few tokens, by content, from anywhere; unlike in random hashing
(`reformer`), clusters follow the data, and queries and keys remain separate.
When not: short sequences (`softmax` is cheaper), or short training, in which centroids do not settle.

Definition (Roy et al., arXiv 2003.05997, section 4; survey arXiv 2103.14636, B9). The score of a token x at the
centroid mu_c, one of C, is x . mu_c / |x|. With att(i, S) the softmax attention of query i over the keys S and, if
there is one, the null memory of the cluster:

- noncausal-self: Q_c and K_c are the w queries and the w keys that score highest at centroid c;
  o_i = mean over the clusters c with i in Q_c of att(i, K_c), and 0 if there is none.
- causal-self: every query and key belongs to the centroid where it scores highest; o_i = att(i, S_i), with S_i the last
  w keys of i's cluster up to i.
- cross patterns: o_i = att(i, K_c), with c the cluster of query i and K_c the w keys of the memory that score highest
  at c.

A query without a key gives 0.

| paper | here |
|---|---|
| mu | `centroids` (H, C, D); in a layer, the buffer `projection.centroids` of `clusters` centroids |
| w | `window` |
| moving average of the centroids | `decay`; in training, towards the normalised mean of the nearest unit tokens |
| spherical k-means loss | `losses["commitment"]`, mean squared distance of a unit token to its centroid; its weight in a model is 1e-4 |
| null memory (public code) | `null_k` (H, C, D), `null_v` (H, C, V); `null_memory` in a layer |
| half of the heads local | `local_heads`: number of first heads that attend to the last w keys, or to w around the query |

Layout: q (B, H, N, D), k and v (B, H, M, D). State, in causal-self and in cross patterns: w keys and values of each
cluster, which is all that a later query can see; its size never changes.
Deviations: in causal-self too, the paper chooses the w highest of the whole row, so that a later token can push an
earlier one out of its cluster; here a token's membership depends only on the token, and a cluster shows its last w
keys. The paper normalises queries and keys and makes them equal in decoders; here they are normalised only for routing
(for more, use the layer's `query_key_norm`). A layer under activation checkpointing should have ``decay=1``.
"""

from __future__ import annotations

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Waiver,
)
from regard.mechanisms.routing.definition import Config, reference
from regard.mechanisms.routing.forms import (
    QUERIES_AT_ONCE,
    Null,
    RoutingState,
    absorb,
    block_size,
    chunked,
    parallel,
    read,
    step,
)
from regard.mechanisms.routing.layer import Centroids


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: clusters per head."""
    return {"c": config.clusters}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern, whose blocks of queries attend to the keys of two chunks."""
    width, window = shape.dim_key + shape.dim_value, config.window
    heads = shape.batch * shape.heads
    size = max(1, block_size(config, shape.n))
    blocks = min(shape.n, shape.n // size + shape.m // window + config.clusters)
    routing = 2.0 * config.clusters * shape.dim_key
    kept = config.clusters * window
    return Cost(
        flops=heads * ((shape.n + shape.m) * routing + 2.0 * blocks * size * 2 * window * width),
        memory=float(heads * blocks * (2 * window * (width + size) + size * width)),
        state=float(shape.heads * kept * (width + 1)),
        step_flops=heads * (2 * routing + 2.0 * window * width),
    )


MECHANISM = Mechanism(
    name="routing",
    aliases=("routing_transformer", "kmeans_attention"),
    kind=Kind.ATTENTION,
    summary="Learned centroids bring queries together with the keys of the same cluster.",
    paper=Paper("Efficient Content-Based Sparse Attention with Routing Transformers", "2003.05997", 2020),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv", "centroids": "hcd", "null_k?": "hcd", "null_v?": "hcv"},
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
        "small clusters": {"window": 3, "clusters": 4, "decay": 0.5},
        "no null memory": {"window": 5, "clusters": 3, "null_memory": False},
        "a local head": {"window": 5, "local_heads": 1},
    },
    variant_patterns={
        "a local head": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    engine="attention",
    state=RoutingState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"dropout"}),
    weights="exact",
    projection=Centroids,
    waivers=(Waiver("layer_lengths", "its number of tokens in a cluster is fixed when the program is compiled"),),
)


__all__ = [
    "MECHANISM",
    "QUERIES_AT_ONCE",
    "Centroids",
    "Config",
    "Null",
    "RoutingState",
    "absorb",
    "axis_sizes",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "step",
]
