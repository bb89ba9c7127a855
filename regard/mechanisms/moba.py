r"""Mixture of block attention: each query attends to its own block of keys and the few with the best mean keys.

When to pick it: long contexts in which a query needs only a few places, wherever they are, in a model that was or will
be trained with it; it adds no parameters to softmax attention, so layers can switch between the two.
When not: short contexts (`softmax` is cheaper, and identical up to `top` blocks), or a cache of constant size.

Definition (Lu et al., arXiv 2502.13189, equations 2-9), ranks from 0, b = `block_size`, B_r the tokens r b to r b + b -
1:

    s_ir = q_i . mean of k_j over j in B_r
    R_i  = { floor(i / b) } and the k - 1 blocks r < floor(i / b) of the highest s_ir
    o_i  = sum_j softmax_j(tau q_i . k_j) v_j over the keys j <= i in the blocks R_i

Blocks are chosen for each query and head, and no gradient flows through the choice.

| paper | here |
|---|---|
| B, block size | `block_size` |
| k, of top-k gating | `top`, including the query's own block |
| s_i, affinity scores | dot products with the means of rotated keys, in at least float32 |
| g_i, gates | whether a block is among the highest scores |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries); each query head still chooses its own
blocks. A query that sees no key gives 0. Nothing of size N x M is materialised: there are N M / b block scores, and
each query's softmax is computed in two parts, its own block and the others, merged by their log-sum-exps.
State: keys, values, and the sum of each block's keys; a step reads the sums, and the keys and values of `top` blocks.
Deviations: the paper has only causal-self. In noncausal-self the other blocks may also come later, and in cross
patterns all `top` blocks are chosen by score; the mean of a shorter last block is over the tokens that it has. The
paper's blocks have 512 tokens, with k = 3 and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Waiver,
    at_least,
    lengths_after,
    state_field,
)
from regard.core.padding import pad_tokens
from regard.core.precision import wide, without_autocast
from regard.core.ragged import group_queries, take_tokens
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention, attention_reference, ranks
from regard.engines.attention_forms import attend_to_part
from regard.engines.cache import KeyValueState, extend
from regard.engines.grouped_attention import product
from regard.engines.merging import merge

if TYPE_CHECKING:
    from jaxtyping import Float, Int

QUERIES_AT_ONCE = 64
"""Maximum number of queries in a tile, which shares one block of keys."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        block_size: b >= 1, tokens per block.
        top: k >= 1, blocks that a query attends to.
    """

    block_size: int = 64
    top: int = 3

    def __post_init__(self) -> None:
        at_least("block_size", self.block_size, 1)
        at_least("top", self.top, 1)


@dataclass(frozen=True)
class BlockState(KeyValueState):
    """Every key and value so far, and the sums of the keys of each block, in at least float32."""

    sums: Float[Tensor, "b g blocks d"] = state_field()


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    size, n, m = call.config.block_size, q.shape[2], k.shape[2]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    i, j = torch.arange(n, device=q.device)[:, None] + m - n, torch.arange(m, device=q.device)
    if m == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    affinity = torch.stack([q @ block.mean(2)[..., None] for block in keys.split(size, 2)], 3)[..., 0]
    block, own = torch.arange(affinity.shape[3], device=q.device), i.div(size, rounding_mode="floor")
    if not call.pattern.cross:
        affinity = affinity.masked_fill(block == own, torch.inf)
    if call.pattern is Pattern.CAUSAL_SELF:
        affinity = affinity.masked_fill(block > own, -torch.inf)
    best = affinity.topk(min(call.config.top, affinity.shape[3]))
    chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(3, best.indices, best.values > -torch.inf)
    visible = chosen.repeat_interleave(size, 3)[..., :m]
    if call.pattern is Pattern.CAUSAL_SELF:
        visible = visible & (j <= i)
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """Score blocks (N M / b scores), then take one softmax over each query's own block and one over the blocks that it
    chose, with queries gathered by block; the two are merged by their log-sum-exps."""
    m, size = k.shape[2], call.config.block_size
    length = lengths_after(None, call.memory_lengths, k.shape[0], m, k.device)
    with torch.no_grad():
        sums = pad_tokens(wide(k), 0, -m % size).unflatten(2, (-(-m // size), size)).sum(3)
    return _attend(call, q, k, v, sums, length, ranks(call, q.shape[2], m, q.device), None)


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    state, where = _extend(call, k, v, q.shape[2])
    return Result(_attend(call, q, state.k, state.v, state.sums, state.length, where, _slots(state)), state)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> BlockState:
    """Append memory to the cache; more may follow."""
    return _extend(call, k, v, 0)[0]


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Attend from queries to absorbed memory."""
    state: BlockState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    return Result(_attend(call, q, state.k, state.v, state.sums, state.length, where, _slots(state)), state)


def _extend(call: Call, k: Tensor, v: Tensor, n: int) -> tuple[BlockState, Ranks]:
    """The cache with new keys and values appended and the block sums updated."""
    past: BlockState | None = call.state
    cache, where = extend(call, k, v, n)
    count = -(-cache.k.shape[2] // call.config.block_size)
    with torch.no_grad():
        new = wide(k)
        sums = new.new_zeros(*k.shape[:2], 0, k.shape[3]) if past is None else past.sums
        sums = F.pad(sums, (0, 0, 0, count - sums.shape[2]))
        block = where.keys[:, cache.k.shape[2] - k.shape[2] :].clamp(min=0) // call.config.block_size  # padding is zero
        index = block[:, None, :, None].expand(k.shape[0], k.shape[1], -1, k.shape[3])
        sums = sums.scatter_add(2, index, new.to(sums.dtype))
    return BlockState(cache.k, cache.v, cache.ranks, cache.length, sums), where


def _slots(state: BlockState) -> Int[Tensor, "b past"]:
    """The cache slot of each rank."""
    total = state.ranks.shape[1]
    slot = torch.arange(total, device=state.ranks.device).expand_as(state.ranks)
    places = torch.where(state.ranks < 0, total, state.ranks)
    return slot.new_zeros(slot.shape[0], total + 1).scatter(1, places, slot)[:, :total]


def _attend(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sums: Float[Tensor, "b g blocks d"],
    length: Int[Tensor, " b"],
    where: Ranks,
    slots: Int[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n v"]:
    """Softmax attention to the chosen blocks; keys are stored at their ranks unless `slots` maps ranks to slots."""
    config: Config = call.config
    causal, n = call.pattern is Pattern.CAUSAL_SELF, q.shape[2]
    if n == 0 or sums.shape[2] <= config.top:
        rule = Visibility(causal=causal)
        return attention(q, k, v, where, visibility=rule, scale=call.scale, backend=call.backend)[0]
    size, heads = config.block_size, q.shape[1]
    own = None if call.pattern.cross else block_numbers(where.queries, size)
    chosen = _chosen(config, q, sums, length, own, causal=causal)
    if n == 1:  # the query's blocks form one row of keys
        if own is not None:
            chosen = torch.cat([own[:, None, :, None].expand(chosen.shape[0], heads, -1, -1), chosen], 3)
        last = torch.minimum(length[:, None], where.queries + 1) if causal else length[:, None]
        return _on_blocks(call, q[:, :, None], k, v, chosen, last, slots)[0][:, :, 0].to(q.dtype)
    outputs, lses = [], []
    if own is not None:
        rule = Visibility(causal=causal, block=size)
        output, lse = attend_to_part(call, wide(q), k, v, where, rule)
        outputs, lses = [output], [lse]
    if chosen.shape[3]:
        pairs, count = chosen.flatten(2), chosen.shape[3]
        tiles = group_queries(pairs, sums.shape[2] + 1, min(QUERIES_AT_ONCE, pairs.shape[2]))
        queries = take_tokens(q, tiles.table.flatten(2) // count).unflatten(2, tiles.table.shape[2:])
        asked = pairs.gather(2, tiles.first)[..., None]
        output, lse = _on_blocks(call, queries, k, v, asked, length[:, None], slots)
        outputs += take_tokens(output.flatten(2, 3), tiles.place).unflatten(2, (n, count)).unbind(3)
        lses += lse.flatten(2).gather(2, tiles.place).unflatten(2, (n, count)).unbind(3)
    return merge(outputs, lses).to(q.dtype)


def _chosen(
    config: Config,
    q: Float[Tensor, "b h n d"],
    sums: Float[Tensor, "b g blocks d"],
    length: Int[Tensor, " b"],
    own: Int[Tensor, "#b n"] | None,
    *,
    causal: bool,
) -> Int[Tensor, "b h n picks"]:
    """The blocks that each query chooses besides its own; the number of blocks marks an empty choice."""
    block = torch.arange(sums.shape[2], device=q.device)
    tokens = (length[:, None] - block * config.block_size).clamp(0, config.block_size)
    eligible = (tokens > 0)[:, None]
    if own is not None:
        eligible = eligible & ((block < own[..., None]) if causal else (block != own[..., None]))
    with torch.no_grad(), without_autocast(q.device):
        means = sums / tokens.clamp(min=1)[:, None, :, None]
        affinity = product(wide(q), means.mT).masked_fill(~eligible[:, None], -torch.inf)
        best = affinity.topk(config.top - (own is not None))
    return torch.where(best.values > -torch.inf, best.indices, len(block))


def _on_blocks(
    call: Call,
    q: Float[Tensor, "b h tiles s d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    blocks: Int[Tensor, "b h tiles c"],
    stop: Int[Tensor, "b 1"],
    slots: Int[Tensor, "b m"] | None,
) -> tuple[Float[Tensor, "b h tiles s v"], Float[Tensor, "b h tiles s"]]:
    """Attend from each tile of queries to its own blocks, below the row's rank `stop`; with log-sum-exps."""
    size = call.config.block_size
    place = (blocks[..., None] * size + torch.arange(size, device=q.device)).flatten(3)
    exists = (place >= 0) & (place < stop[..., None, None])
    if slots is None:
        keys, values = (_taken_blocks(x, blocks, size) for x in (k, v))
    else:
        keys, values = (_taken_tokens(x, place, slots) for x in (k, v))
    tokens = torch.arange(place.shape[3], device=q.device)
    where = Ranks(
        torch.arange(q.shape[3], device=q.device)[None],
        torch.where(exists, tokens, -1).flatten(0, 2),
        None,
        None,
        plain=False,
    )
    asked, keys, values = (x.flatten(0, 2)[:, None] for x in (wide(q), keys, values))
    output, lse = attend_to_part(call, asked, keys, values, where, Visibility())
    return output.view(*q.shape[:4], v.shape[-1]), lse.view(q.shape[:4])


def _taken_blocks(
    x: Float[Tensor, "b g m d"], blocks: Int[Tensor, "b h tiles c"], size: int
) -> Float[Tensor, "b h tiles c*size d"]:
    """Gather blocks of keys (or values) stored at their ranks, per query head; an empty choice gives any block."""
    x = pad_tokens(x, 0, -x.shape[2] % size).unflatten(2, (-1, size))
    batch, groups, count, _, width = x.shape
    heads = blocks.shape[1]
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1) // (heads // groups) * count
    rows = start + blocks.clamp(0, count - 1)
    taken = x.reshape(-1, size * width).index_select(0, rows.flatten())
    return taken.view(*blocks.shape[:3], blocks.shape[3] * size, width)


def _taken_tokens(
    x: Float[Tensor, "b g m d"], place: Int[Tensor, "b h tiles t"], slots: Int[Tensor, "b m"]
) -> Float[Tensor, "b h tiles t d"]:
    """Gather cached tokens by rank, per query head; missing ranks give any token. `slots` may cover longer memory."""
    batch, heads = place.shape[:2]
    row = torch.arange(batch, device=x.device)[:, None, None]
    group = torch.arange(heads, device=x.device)[:, None] // (heads // x.shape[1])
    slot = slots[:, None].expand(-1, heads, -1).gather(2, place.flatten(2).clamp(0, x.shape[2] - 1))
    return x[row, group, slot].unflatten(2, place.shape[2:])


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of block scores, and of `top` blocks of keys for each query."""
    size, width = config.block_size, shape.dim_key + shape.dim_value
    heads, blocks = shape.batch * shape.heads, math.ceil(shape.m / config.block_size)
    seen = min(shape.m, config.top * size)
    scores = 2.0 * blocks * shape.dim_key if blocks > config.top else 0.0
    copied = (shape.n * config.top + shape.m) * width if blocks > config.top else 0
    return Cost(
        flops=heads * (shape.n * (scores + 2.0 * seen * width) + shape.m * shape.dim_key),
        memory=float(heads * (shape.n * (1 + (blocks if scores else 0)) + copied)),
        state=float(shape.heads * (shape.m * width + blocks * shape.dim_key)),
        step_flops=heads * (scores + 2.0 * seen * width),
    )


MECHANISM = Mechanism(
    name="moba",
    aliases=("mixture_of_block_attention", "block_attention_mixture"),
    kind=Kind.ATTENTION,
    summary="Each query reads the few blocks of keys whose mean key scores highest, and its own.",
    paper=Paper("MoBA: Mixture of Block Attention for Long-Context LLMs", "2502.13189", 2025),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
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
        "small blocks": {"block_size": 3, "top": 2},
        "own block": {"block_size": 5, "top": 1},
        "several blocks": {"block_size": 2, "top": 4},
    },
    engine="attention",
    state=BlockState,
    cost=cost,
    weights="implicit",
    waivers=(Waiver("layer_lengths", "its number of blocks is fixed when the program is compiled"),),
)
