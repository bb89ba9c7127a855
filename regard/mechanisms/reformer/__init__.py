r"""Reformer attention: tokens whose directions hash alike attend to each other, in several rounds of random hashing.

When to pick it: long sequences where a query needs a few similar tokens from anywhere; more rounds approximate full
attention better, at a proportional cost.
When not: sequences shorter than several thousand tokens (`softmax` is faster, especially than many rounds), cross
attention (queries and keys are the same vectors), or states of fixed size.

Definition (Kitaev et al., arXiv 2001.04451, section 2; survey arXiv 2103.14636, B8). Keys are the queries, normalised
to unit length: k_j = q_j / (|q_j|^2 + D e)^1/2. In round r the bucket of a token is h_r(x) = argmax [x R_r; -x R_r].
P_i^r is the set of other tokens that i sees in round r, P_i their union over rounds:

    o_i = sum_{j in P_i} softmax_j(s q_i . k_j) v_j,          o_i = v_i when P_i is empty

- noncausal-self: tokens are sorted by (bucket, position) and cut into chunks of m; P_i^r contains the tokens of i's
  chunk and of the `lookback` chunks before it, wrapping around the row, and with `same_bucket` only those in i's
  bucket.
- causal-self: each bucket is cut into its own chunks, so that the r-th token of a bucket is in its chunk floor(r / m),
  whatever comes later; P_i^r contains the earlier tokens of i's chunk and of the bucket's `lookback` chunks before it.

Each round is a separate attention over the sorted tokens. A pair that an earlier round has seen is hidden in later
ones, so rounds are merged exactly by their log-sum-exps.

| paper | here |
|---|---|
| R, size (d, b / 2) for each round | `rotations` (H, R, D, P): 2 P buckets; a layer draws `rounds` of them with `buckets` buckets each |
| n_rounds | `rounds`; :func:`draw_rounds` adds rounds to a trained model for evaluation |
| m, chunk length | `chunk` |
| N_ij, number of rounds that have a pair | a pair counts once, or N_ij times with `count_duplicates` |
| s | `scale`, 1 by default |

Layout: q (B, H, N, D), v (B, H, N, V). State: all queries and values so far, their buckets, and the number of tokens in
each bucket, so that a step attends to at most R (`lookback` + 1) m keys. A token's bucket and chunk never change once
it is read.
Deviations: in causal attention too, the paper sorts the whole row. Then later tokens move the borders of earlier chunks
and so influence what earlier queries see; here they do not, at the cost of one more chunk of keys that is computed and
hidden. transformers' code (5.24) counts a pair for every round that has it, lets the first chunk of a round look into
another round, and masks a token from itself with a large finite number. Rounds are drawn for each head. If two
projections of a token are equal up to rounding, forms may hash it differently. In training a layer draws new rotations
at each call (`fresh`); with activation checkpointing, the recomputation must see the same random numbers, or use
``fresh=False``.
"""

from __future__ import annotations

import torch
from torch import nn

from regard.contract import (
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Waiver,
    at_least,
)
from regard.mechanisms.reformer.definition import Config, hash_tokens, reference
from regard.mechanisms.reformer.forms import BUCKET, NOWHERE, PAIRS_AT_ONCE, ReformerState, chunked, parallel
from regard.mechanisms.reformer.layer import Rotations


def draw_rounds(model: nn.Module, rounds: int, generator: torch.Generator | None = None) -> nn.Module:
    """Give the layers of a trained model another number of rounds: the paper evaluates with more than it trains with.

    Layers keep their existing rotations, up to the new number, and draw the rest. Configs do not change: a model saved
    afterwards loads into a model with the new number of rounds.

    Args:
        rounds: number of rounds of each layer, >= 1.
        generator: random generator, on the device of the model.

    Returns:
        The model, changed in place.
    """
    at_least("rounds", rounds, 1)
    for module in model.modules():
        if isinstance(module, Rotations):
            old = module.rotations
            heads, before, *sizes = old.shape
            more = torch.randn(
                heads, max(rounds - before, 0), *sizes, generator=generator, device=old.device, dtype=old.dtype
            )
            module.rotations = torch.cat([old[:, :rounds], more], 1)
    return model


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern, which looks at one chunk more than the noncausal one."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    chunks = -(-shape.n // config.chunk)
    keys = min(config.lookback + 2, chunks) * config.chunk
    hashing = config.rounds * config.buckets * shape.dim_key
    cached = min(shape.m, config.rounds * (config.lookback + 1) * config.chunk)
    return Cost(
        flops=heads * (shape.n * hashing + 2.0 * config.rounds * chunks * config.chunk * keys * width),
        memory=float(heads * chunks * (keys * (width + config.chunk) + config.rounds * config.chunk * shape.dim_value)),
        state=float(shape.heads * (shape.m * (width + config.rounds) + config.rounds * config.buckets)),
        step_flops=heads * (hashing + 2.0 * cached * width),
    )


SAME = "queries and keys are the same vectors"


MECHANISM = Mechanism(
    name="reformer",
    aliases=("lsh", "lsh_attention"),
    kind=Kind.ATTENTION,
    summary="Tokens whose directions hash alike attend to each other, in several rounds of random hashing.",
    paper=Paper("Reformer: The Efficient Transformer", "2001.04451", 2020),
    inputs={"q": "bhnd", "v": "bhnv", "rotations": "hrdp"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: SAME, Pattern.CAUSAL_CROSS: SAME},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "small chunks": {"chunk": 3, "buckets": 4, "eps": 1e-3},
        "no lookback": {"chunk": 4, "lookback": 0, "rounds": 1},
        "duplicates": {"chunk": 2, "lookback": 3, "count_duplicates": True, "fresh": False},
        "one bucket": {"chunk": 5, "same_bucket": True},
    },
    engine="attention",
    state=ReformerState,
    default_scale=1.0,
    uneven=False,
    cost=cost,
    honours=frozenset({"dropout"}),
    weights="exact",
    projection=Rotations,
    waivers=(Waiver("layer_lengths", "its number of buckets is fixed when the program is compiled"),),
)


__all__ = [
    "BUCKET",
    "MECHANISM",
    "NOWHERE",
    "PAIRS_AT_ONCE",
    "SAME",
    "Config",
    "ReformerState",
    "Rotations",
    "chunked",
    "cost",
    "draw_rounds",
    "hash_tokens",
    "parallel",
    "reference",
]
