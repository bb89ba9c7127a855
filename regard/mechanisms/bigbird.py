r"""BigBird: blocks of queries see their neighbours, the first and the last block, and a few blocks at random.

When to pick it: encoders of long documents, especially to convert a trained softmax model; any two tokens are connected
within two layers, and time is linear in N.
When not: generation (it looks ahead), cross attention, exact recall from anywhere in one layer (`softmax`), sequences
shorter than a dozen blocks, for which it is full attention.

Definition (Zaheer et al., arXiv 2007.14062, section 2 and appendix D; survey arXiv 2103.14636, B3). Tokens are divided
into blocks of b, of which the last may be shorter. With beta and gamma the blocks of query and key, it is softmax
attention over the pairs with

    beta or gamma among the first g_1 or the last g_2 blocks, or |beta - gamma| <= w, or gamma in R(beta),

where R(beta) is r blocks drawn without replacement from those that beta does not otherwise see. Full attention is used
in rows of fewer than (1 + 2w + g_1 + g_2 + 2r) b tokens.

| paper | here |
|---|---|
| b, block size | `block`, 64 |
| r, random blocks | `random_blocks`, 3 |
| w, window (3 blocks in all) | `neighbours`, 1: blocks on either side |
| g, global blocks of the internal construction (ITC) | `first_blocks` and `last_blocks`, 1 and 1 |
| extra global tokens (ETC) | the user's own tokens at the front, enough `first_blocks` to hold them, `last_blocks=0` |
| 1 / sqrt(d) | `scale` |

R is drawn for each head from `seed` and the number of blocks of the row, so that a padded row draws the same blocks as
it does alone. The layers of a stack should have different seeds.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Blocks count valid tokens. A query that sees
no key gives 0.
Deviations: in the code of transformers (5.24) R is the first block, r times over, whenever the model is not training,
and a block seen twice counts twice; here a block counts once, and R is the same in training and inference. There is no
causal form: all queries see the last block, and random blocks may be later ones. PyTorch's backend computes hidden
blocks too, a block of queries at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    BlockMask,
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    at_least,
)
from regard.core.visibility import surely
from regard.engines import attention_forms
from regard.engines.attention import Visibility, attention_reference, masked_scores_bias, ranks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        block: b, tokens per block, >= 1.
        neighbours: w, blocks seen on either side, >= 0.
        random_blocks: r, blocks drawn for each head and block of queries, >= 0.
        first_blocks: g_1, >= 0: this many blocks at the start see, and are seen by, all blocks.
        last_blocks: g_2, >= 0: likewise at the end.
        seed: seed of the draws.
    """

    block: int = 64
    neighbours: int = 1
    random_blocks: int = 3
    first_blocks: int = 1
    last_blocks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        for name in ("neighbours", "random_blocks", "first_blocks", "last_blocks"):
            at_least(name, getattr(self, name), 0)

    @property
    def shortest(self) -> int:
        """Number of tokens from which a row has hidden pairs."""
        seen = 1 + 2 * self.neighbours + self.first_blocks + self.last_blocks
        return (seen + 2 * self.random_blocks) * self.block


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    blocks = _blocks(call, q)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, Visibility(), call.bias, call.position_bias, blocks, q.dtype)
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale, bias)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n v"]
) -> Result:
    """Softmax attention under a mask of blocks; a kernel that skips hidden blocks takes time proportional to N."""
    return attention_forms.parallel(call, q, k, v, visibility=Visibility(), blocks=_blocks(call, q))


def _blocks(call: Call, q: Tensor) -> BlockMask | None:
    """The block layout of each row; None if every row is too short to have hidden pairs."""
    _, heads, n, _ = q.shape
    config: Config = call.config
    if surely(n < config.shortest):
        return None
    lengths = torch.full((1,), n, device=q.device) if call.lengths is None else call.lengths
    count = math.ceil(n / config.block)
    if torch.compiler.is_compiling():
        count = max(2, count)  # if there were one, the program would serve no other number
    return BlockMask(visible_blocks(config, lengths, count, heads), config.block)


def visible_blocks(
    config: Config, lengths: Int[Tensor, " b"], count: int, heads: int
) -> Bool[Tensor, "b #h blocks blocks"]:
    """Blocks of keys that each block of queries sees, in rows of `lengths` tokens, padded to `count` blocks."""
    blocks = (-(-lengths // config.block))[:, None, None]
    beta = torch.arange(count, device=lengths.device)[:, None]
    gamma = beta.T

    def is_global(index: Tensor) -> Tensor:
        return (index < config.first_blocks) | (index >= blocks - config.last_blocks)

    seen = is_global(beta) | is_global(gamma) | ((beta - gamma).abs() <= config.neighbours)  # (b, blocks, blocks)
    seen = (seen | (lengths < config.shortest)[:, None, None])[:, None]
    if config.random_blocks == 0:
        return seen
    head = torch.arange(heads, device=lengths.device)[:, None, None]
    # the number of blocks is hashed too, so that rows of different lengths are drawn differently
    draws = _hash(_hash(_hash(_hash(head + (config.seed & 0xFFFFFFFF)) + beta) + gamma) + blocks[:, None])
    draws = draws.masked_fill(seen | (gamma >= blocks)[:, None], 1 << 32)
    drawn = draws.argsort(dim=-1, stable=True).argsort(dim=-1) < config.random_blocks
    return seen | (drawn & (draws < 1 << 32))


def _hash(x: Int[Tensor, "*axes"]) -> Int[Tensor, "*axes"]:
    """Hash of an integer >= 0 to 32 random-looking bits: draws that depend on nothing but their position."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def visible_pairs(config: Config, n: int) -> int:
    """Number of visible pairs of query and key in a row of `n` tokens; random blocks count as full ones, although the
    last block may be shorter if it is not global."""
    if n < config.shortest:
        return n * n
    size, count = config.block, math.ceil(n / config.block)

    def tokens(first: int, last: int) -> int:
        """Number of tokens in the blocks first ... last - 1."""
        return max(0, min(last * size, n) - max(first, 0) * size)

    begin, end = config.first_blocks, count - config.last_blocks
    ends = tokens(0, begin) + tokens(end, count)
    pairs = ends * n
    for beta in range(begin, end):
        near = tokens(max(beta - config.neighbours, begin), min(beta + config.neighbours + 1, end))
        pairs += tokens(beta, beta + 1) * (ends + near + config.random_blocks * size)
    return pairs


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with hidden blocks skipped. There is no step: its operations are those of a whole call."""
    heads = shape.batch * shape.heads
    flops = 2.0 * heads * visible_pairs(config, shape.m) * shape.n / max(shape.m, 1) * (shape.dim_key + shape.dim_value)
    blocks = math.ceil(shape.m / config.block)
    return Cost(flops=flops, memory=float(heads * (shape.n + blocks**2)), state=0.0, step_flops=flops)


AHEAD = "the last block and random ones are seen by earlier queries"
NO_PLACE = "blocks of a memory have no position relative to those of the queries"

MECHANISM = Mechanism(
    name="bigbird",
    aliases=("big_bird",),
    kind=Kind.ATTENTION,
    summary="Blocks of queries see their neighbours, the first and the last block, and a few blocks at random.",
    paper=Paper("Big Bird: Transformers for Longer Sequences", "2007.14062", 2020),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={Pattern.CAUSAL_SELF: AHEAD, Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "small blocks": {"block": 2, "random_blocks": 2, "seed": 5},
        "no random blocks": {"block": 3, "random_blocks": 0, "neighbours": 2},
        "no last blocks": {"block": 4, "random_blocks": 1, "first_blocks": 2, "last_blocks": 0},
        "random blocks alone": {"block": 1, "random_blocks": 3, "neighbours": 0, "first_blocks": 0, "last_blocks": 0},
    },
    engine="attention",
    cost=cost,
    honours=frozenset({"bias", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
)
