r"""Sinkhorn attention: each block of queries sees its own block and a mix of all blocks by a soft permutation.

When to pick it: long sequences where a block needs one distant block as a whole, at twice the cost of local attention;
with `sortcut`, encoders for which a few blocks of the whole sequence are enough.
When not: lookups of single tokens (a mixed block blurs tokens at the same place of different blocks), or short
sequences (`softmax`).

Definition (Tay et al., arXiv 2002.11296, section 3; survey arXiv 2103.14636, B10). Blocks of b tokens; p_i and r_j are
summaries of query block i and key block j, s is the scale:

    A_ij = (ln(relu(s p_i . r_j) + 1e-6) + G_ij) / tau,       G Gumbel noise, in training only
    P    = exp of A after `iterations` times: every row, then every column, divided by its sum
    K'_i = sum_j P_ij K_j,    V'_i = sum_j P_ij V_j,          at each of the b places in the blocks
    O_i  = softmax(s Q_i [K'_i; K_i]^T) [V'_i; V_i]

- noncausal-self: summaries are means over blocks.
- causal-self: P_ij = 0 unless j < i, and in its own block a token sees the tokens up to itself. p_i is the mean of all
  queries up to the first of block i, r_j the mean of all keys up to the last of block j; the sum of a column runs over
  rows up to i. So everything block i needs is known at its first token. Block 0 sees only itself.
- noncausal-cross: O_i = softmax(s Q_i K'_i^T) V'_i; P has a row for each block of queries and a column for each block
  of the memory.
- with `sortcut`, in noncausal patterns, every query sees [K'_1; ...; K'_c] of the first c sorted blocks instead.

The last block may be short. The places that it lacks add nothing to a mixed block, and a place that no block has is not
visible.

| paper | here |
|---|---|
| b, block size | `block` |
| SortNet (of the survey) | dot products of summaries, as above; it has no parameters |
| tau | `temperature` |
| N_k, Sinkhorn iterations | `iterations` |
| SortCut, n | `sortcut` |

Layout: (B, H, N, D). State (causal-self): every key and value, a summary of each block, and the mixed block of the last
token, so that P is computed once per block.
Deviations: the paper's SortNet is a small network on the sum of a block's tokens; the public code also offers the one
used here. In causal attention the paper divides columns by sums over all rows, which lets later blocks decide what
earlier ones see. Public code (lucidrains, 0.11.4) uses mixed keys also as mixed values in its noncausal form, draws
noise after training too, and in its causal form takes the one or two best blocks instead of P, with a null block in
front.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Unsupported,
    Waiver,
    at_least,
    state_field,
)
from regard.core.draws import uniform
from regard.core.padding import pad_tokens
from regard.core.precision import wide_dtype, without_autocast
from regard.core.ragged import take_tokens, values_known
from regard.core.visibility import CountedRanks
from regard.engines.attention import Visibility, attention
from regard.engines.cache import KeyValueState, extend

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

EPS = 1e-6
HIDDEN = -1e30
"""Stands for log 0. Finite, so that differences are defined."""

SORTING = torch.float64
"""Dtype of the (small) tensors that P is computed from: ln(x + 1e-6) can amplify rounding a million times."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        block: b, >= 1.
        temperature: tau, > 0.
        iterations: number of row and column normalisations, >= 0.
        sortcut: number of sorted blocks that every query sees, >= 1, in noncausal patterns; None for the query's own
            block and one mixed block.
        noise: whether Gumbel noise is added in training.
    """

    block: int = 64
    temperature: float = 0.75
    iterations: int = 7
    sortcut: int | None = None
    noise: bool = True

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        at_least("iterations", self.iterations, 0)
        if not self.temperature > 0:
            raise Unsupported(f"temperature={self.temperature}", supported="> 0", nearest="temperature=0.75")
        if self.sortcut is not None:
            at_least("sortcut", self.sortcut, 1)


@dataclass(frozen=True)
class SinkhornState(KeyValueState):
    """Every key and value so far, and the summaries that sort them. Sums and summaries are in float64."""

    query_sum: Float[Tensor, "b h d"] = state_field()
    key_sum: Float[Tensor, "b h d"] = state_field()
    query_summaries: Float[Tensor, "b h blocks d"] = state_field()
    key_summaries: Float[Tensor, "b h blocks d"] = state_field()
    mixed_k: Float[Tensor, "b h size d"] = state_field()
    """The mixed block of the last token's block."""
    mixed_v: Float[Tensor, "b h size v"] = state_field()


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, block by block."""
    config: Config = call.config
    _check(call)
    size, n, m = config.block, q.shape[2], k.shape[2]
    own, causal = not call.pattern.cross, call.pattern.causal
    rows, columns = -(-n // size), -(-m // size)
    if n == 0 or m == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    p = [q[:, :, (0 if causal else i * size) : i * size + (1 if causal else size)].mean(2) for i in range(rows)]
    r = [k[:, :, (0 if causal else j * size) : (j + 1) * size].mean(2) for j in range(columns)]
    scores = torch.einsum("bhid,bhjd->bhij", torch.stack(p, 2), torch.stack(r, 2))
    log_p = _noisy(call, (call.scale * scores).relu())
    kept = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
    if causal:
        kept = kept.tril(-1)
    weights = log_p.exp() * kept
    for _ in range(config.iterations):
        weights = weights / torch.where(kept.any(1), weights.sum(3), 1)[..., None]
        below = weights.cumsum(2) if causal else weights.sum(2, keepdim=True)
        weights = weights / torch.where(kept, below, 1)
    blocks = (F.pad(x, (0, 0, 0, columns * size - m)).unflatten(2, (columns, size)) for x in (k, v))
    mixed_k, mixed_v = (torch.einsum("bhij,bhjtd->bhitd", weights, x)[:, :, :, : min(size, m)] for x in blocks)
    outputs = []
    for i in range(rows):
        part = slice(i * size, (i + 1) * size)
        seen = slice(i, i + 1) if config.sortcut is None else slice(config.sortcut)
        keys, values = mixed_k[:, :, seen].flatten(2, 3), mixed_v[:, :, seen].flatten(2, 3)
        if causal and i == 0:
            keys, values = keys[:, :, :0], values[:, :, :0]
        scores = call.scale * q[:, :, part] @ keys.mT
        if own and config.sortcut is None:
            local = call.scale * q[:, :, part] @ k[:, :, part].mT
            if causal:
                local = local.masked_fill(local.new_ones(local.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
            scores, values = torch.cat([scores, local], -1), torch.cat([values, v[:, :, part]], 2)
        outputs.append(scores.softmax(-1) @ values)
    return torch.cat(outputs, 2)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Mix blocks of keys by the sorting weights, then let each block of queries attend to its mixed block and its own
    block: 2 N b pairs and (N / b)^2 weights."""
    _check(call)
    if q.shape[2] == 0 or k.shape[2] == 0:
        return Result(v.new_zeros(*q.shape[:3], v.shape[3]))
    weights = sorting_weights(call, *_summaries(call, q, k))
    return Result(_by_blocks(call, q, k, v, weights, call.memory_lengths))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Causal-self with state in and out, for any number of tokens; also used as the step."""
    _check(call)
    state = _state(call, q, k, v)
    past: SinkhornState | None = call.state
    if past is None:
        return Result(parallel(call, q, k, v).output, state)
    size, n = call.config.block, q.shape[2]
    total = state.query_summaries.shape[2] * size
    places = past.length[:, None] + torch.arange(n, device=q.device)
    if n == 0:
        return Result(v, state)
    if n == 1:
        return Result(_step(call, q, state, places), state)
    every = torch.arange(total, device=q.device).expand(q.shape[0], -1)
    keys, values = (_at_ranks(state, x, every) for x in (state.k, state.v))
    at = places.clamp(max=total)[:, None, :, None].expand_as(q)  # padding may be beyond the last
    placed = q.new_zeros(*q.shape[:2], total + 1, q.shape[3]).scatter(2, at, q)[:, :, :total]
    weights = sorting_weights(call.replace(training=False), state.query_summaries, state.key_summaries)
    whole = _by_blocks(call, placed, keys, values, weights, None)
    found = places.clamp(max=total - 1)[:, None].expand(*q.shape[:3])
    return Result(take_tokens(whole, found).to(v.dtype), state)


def sorting_weights(
    call: Call, p: Float[Tensor, "b h rows d"], r: Float[Tensor, "b h columns d"]
) -> Float[Tensor, "b h rows columns"]:
    """P from the summaries of blocks."""
    size, causal = call.config.block, call.pattern.causal
    rows, columns = torch.arange(p.shape[2], device=p.device)[:, None], torch.arange(r.shape[2], device=p.device)
    if causal:
        kept = columns < rows
    else:
        kept = torch.ones_like(columns < rows)
        for lengths, blocks in ((call.lengths, rows), (call.memory_lengths, columns)):
            if lengths is not None:
                kept = kept & (size * blocks < lengths[:, None, None, None])
    x = torch.where(kept, _noisy(call, (call.scale * p @ r.mT).relu()), HIDDEN)
    for _ in range(call.config.iterations):
        x = torch.where(kept, x - x.logsumexp(3, keepdim=True), HIDDEN)
        if causal:
            below = x.exp().cumsum(2).clamp(min=torch.finfo(x.dtype).tiny).log()
        else:
            below = x.logsumexp(2, keepdim=True)
        x = torch.where(kept, x - below, HIDDEN)
    return torch.where(kept, x.exp(), 0)


def _noisy(call: Call, scores: Float[Tensor, "b h rows columns"]) -> Float[Tensor, "b h rows columns"]:
    """A, the logits of P. Every form draws the noise in float32."""
    logits = (scores + EPS).log()
    if call.training and call.config.noise:
        drawn = uniform(scores.shape, call.generator, device=scores.device).clamp(1e-6, 1 - 1e-6)
        logits = logits - (-drawn.to(scores.dtype).log()).log()
    return logits / call.config.temperature


def _summaries(call: Call, q: Tensor, k: Tensor) -> tuple[Float[Tensor, "b h rows d"], Float[Tensor, "b h columns d"]]:
    size, causal = call.config.block, call.pattern.causal
    p, r = _means(q, size, call.lengths), _means(k, size, call.memory_lengths)
    if causal:
        sums = _blocks(q, size).sum(3, dtype=SORTING)
        before = F.pad(sums.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
        count = size * torch.arange(sums.shape[2], device=q.device)[:, None] + 1
        p = (before + q[:, :, ::size]) / count
        # incomplete blocks come last and sort nothing
        r = r.cumsum(2) / torch.arange(1, r.shape[2] + 1, device=k.device)[:, None]
    return p, r


def _means(x: Float[Tensor, "b h n d"], size: int, lengths: Int[Tensor, " b"] | None) -> Float[Tensor, "b h blocks d"]:
    """Means over the tokens that each block has."""
    blocks = _blocks(x, size)
    start = size * torch.arange(blocks.shape[2], device=x.device)
    total = torch.full((1,), x.shape[2], device=x.device) if lengths is None else lengths
    count = (total[:, None] - start).clamp(1, size)
    return blocks.sum(3, dtype=SORTING) / count[:, None, :, None]


def _blocks(x: Float[Tensor, "b h n d"], size: int) -> Float[Tensor, "b h blocks size d"]:
    missing = -x.shape[2] % size
    return (pad_tokens(x, 0, missing) if missing else x).unflatten(2, (-1, size))


def _by_blocks(
    call: Call, q: Tensor, k: Tensor, v: Tensor, weights: Float[Tensor, "b h rows columns"], lengths: Tensor | None
) -> Float[Tensor, "b h n v"]:
    """Attend in whole rows from blocks of queries to their mixed blocks and their own blocks."""
    config: Config = call.config
    size, n, own = config.block, q.shape[2], not call.pattern.cross
    causal = call.pattern.causal
    dtype, device = wide_dtype(q), q.device
    keys, values = _blocks(k.to(dtype), size), _blocks(v.to(dtype), size)
    mixed_k, mixed_v = ((weights.to(dtype) @ x.flatten(3)).unflatten(3, x.shape[3:]) for x in (keys, values))
    total = torch.full((1,), k.shape[2], device=device) if lengths is None else lengths
    place, block = torch.arange(size, device=device), torch.arange(weights.shape[2], device=device)
    present = place < total[:, None]  # in the first block, hence in some block
    if config.sortcut is not None:
        cut = slice(config.sortcut)
        queries = torch.full((1,), n, device=device) if call.lengths is None else call.lengths
        visible = (size * block[cut, None] < queries[:, None, None]) & present[:, None]
        visible = visible.flatten(1)[:, None, None]
        output = _softmax(
            call, q.to(dtype), mixed_k[:, :, cut].flatten(2, 3), mixed_v[:, :, cut].flatten(2, 3), visible
        )
        return output.to(v.dtype)
    visible = present[:, None, None]  # (b, blocks, size, slots)
    if own:
        mixed_k, mixed_v = torch.cat([mixed_k, keys], 3), torch.cat([mixed_v, values], 3)
        if causal:
            visible = (visible & (block > 0)[:, None, None]).expand(-1, -1, size, -1)
            near = place <= place[:, None]
        else:
            near = (size * block[:, None] + place < total[:, None, None])[:, :, None]
            visible = visible.expand(-1, len(block), -1, -1)
        visible = torch.cat([visible, near.expand(*visible.shape[:-1], -1)], 3)
    queries = _blocks(q.to(dtype), size)
    visible = visible[:, None].expand(q.shape[0], q.shape[1], len(block), -1, -1).flatten(0, 2)[:, None]
    asked, keys, values = (x.flatten(0, 2)[:, None] for x in (queries, mixed_k, mixed_v))
    output = _softmax(call, asked, keys, values, visible).view(*queries.shape[:4], v.shape[3]).flatten(2, 3)
    return output[:, :, :n].to(v.dtype)


def _softmax(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    visible: Bool[Tensor, "b #h #n m"],
) -> Float[Tensor, "b h n v"]:
    return attention(
        q,
        k,
        v,
        CountedRanks(q.shape[2], k.shape[2], 0, True, q.device),
        visibility=Visibility(),
        scale=call.scale,
        bias=q.new_zeros(()).masked_fill(~visible, -torch.inf),
        dropout=call.dropout,
        generator=call.generator,
        backend=call.backend,
    )[0]


def _step(
    call: Call, q: Float[Tensor, "b h 1 d"], state: SinkhornState, place: Int[Tensor, "b 1"]
) -> Float[Tensor, "b h 1 v"]:
    """Attend from one token to its mixed block and its own block."""
    size, dtype = call.config.block, state.mixed_k.dtype
    block = place.div(size, rounding_mode="floor")
    wanted = block * size + torch.arange(size, device=q.device)
    keys, values = (_at_ranks(state, x, wanted).to(dtype) for x in (state.k, state.v))
    visible = torch.cat([(block > 0).expand_as(wanted), wanted <= place], 1)[:, None, None]
    k, v = torch.cat([state.mixed_k, keys], 2), torch.cat([state.mixed_v, values], 2)
    return _softmax(call, q.to(dtype), k, v, visible).to(state.v.dtype)


def _state(call: Call, q: Tensor, k: Tensor, v: Tensor) -> SinkhornState:
    """The state after new tokens."""
    size, n = call.config.block, q.shape[2]
    past: SinkhornState | None = call.state
    cache = extend(call, k, v, n)[0]
    batch, heads, slots, width = cache.k.shape
    dtype, count = wide_dtype(q), -(-slots // size)
    before = torch.zeros_like(cache.length) if past is None else past.length
    rank = before[:, None] + torch.arange(n, device=q.device)
    valid = call.valid_queries(n)
    valid = torch.ones_like(rank, dtype=torch.bool) if valid is None else valid

    def add(x: Tensor, place: int, total: Tensor | None, table: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of all tokens, and for each block the mean of all tokens up to its place `place`."""
        x = x.to(SORTING)
        total = x.new_zeros(batch, heads, width) if total is None else total
        table = x.new_zeros(batch, heads, 0, width) if table is None else table
        means = (x.cumsum(2) + total[:, :, None]) / (rank + 1)[:, None, :, None]
        block = torch.where(valid & (rank % size == place), rank.div(size, rounding_mode="floor"), count)
        longer = F.pad(table, (0, 0, 0, count + 1 - table.shape[2]))
        longer = longer.scatter(2, block[:, None, :, None].expand_as(means), means)
        return total + x.sum(2), longer[:, :, :count]

    query_sum, p = add(q, 0, *((None, None) if past is None else (past.query_sum, past.query_summaries)))
    key_sum, r = add(k, size - 1, *((None, None) if past is None else (past.key_sum, past.key_summaries)))
    state = SinkhornState(
        cache.k,
        cache.v,
        cache.ranks,
        cache.length,
        query_sum,
        key_sum,
        p,
        r,
        k.new_zeros(batch, heads, size, width, dtype=dtype) if past is None else past.mixed_k,
        v.new_zeros(batch, heads, size, v.shape[3], dtype=dtype) if past is None else past.mixed_v,
    )
    begins = valid & (rank % size == 0)
    if count and (not values_known(begins) or bool(begins.any())):
        return _mix(call, state)
    return state


def _mix(call: Call, state: SinkhornState) -> SinkhornState:
    """The state with updated mixed blocks, those of each row's last token."""
    size, dtype = call.config.block, state.mixed_k.dtype
    p, r = state.query_summaries, state.key_summaries
    count = p.shape[2]
    weights = sorting_weights(call.replace(training=False), p, r)
    last = (state.length - 1).clamp(min=0).div(size, rounding_mode="floor")
    row = weights.gather(2, last[:, None, None, None].expand(*p.shape[:2], 1, count)).to(dtype)
    every = torch.arange(count * size, device=p.device).expand(p.shape[0], -1)

    def mixed(x: Tensor) -> Tensor:
        blocks = _at_ranks(state, x, every).to(dtype).view(*x.shape[:2], count, size * x.shape[3])
        with without_autocast(x.device):
            return (row @ blocks).view(*x.shape[:2], size, x.shape[3])

    return dataclasses.replace(state, mixed_k=mixed(state.k), mixed_v=mixed(state.v))


def _at_ranks(
    state: SinkhornState, x: Float[Tensor, "b h past d"], wanted: Int[Tensor, "b w"]
) -> Float[Tensor, "b h w d"]:
    """Gather cached tokens by rank; a rank that does not exist gives an arbitrary token."""
    slots = x.shape[2]
    at = torch.where(state.ranks >= 0, state.ranks, slots)
    found = torch.zeros(at.shape[0], slots + 1, dtype=torch.long, device=x.device)
    found = found.scatter(1, at, torch.arange(slots, device=x.device).expand_as(at))
    index = found.gather(1, wanted.clamp(max=slots))
    return take_tokens(x, index[:, None].expand(-1, x.shape[1], -1))


def _check(call: Call) -> None:
    if call.config.sortcut is not None and call.pattern.causal:
        raise Unsupported(
            f"sinkhorn attention with sortcut={call.config.sortcut} in causal-self (sorted blocks hold later tokens)",
            supported="noncausal patterns",
            nearest="sortcut=None",
        )


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of self patterns. In decoding, blocks are sorted once per block of steps."""
    width, heads = shape.dim_key + shape.dim_value, shape.batch * shape.heads
    rows, columns = -(-shape.n // config.block), -(-shape.m // config.block)
    keys = config.block * (2 if config.sortcut is None else min(config.sortcut, rows))
    sorting = rows * columns * (2.0 * shape.dim_key + 2.0 * config.block * width + 8.0 * config.iterations)
    once = columns * (columns * (2.0 * shape.dim_key + 8.0 * config.iterations) + 2.0 * config.block * width)
    return Cost(
        flops=heads * (sorting + 2.0 * rows * config.block * keys * width),
        memory=float(heads * rows * (columns + 2 * config.block * (width + config.block))),
        state=float(shape.heads * (shape.m * width + 2 * (columns + 1) * shape.dim_key + config.block * width)),
        step_flops=heads * (4.0 * config.block * width + once / config.block),
    )


MECHANISM = Mechanism(
    name="sinkhorn",
    aliases=("sinkhorn_transformer", "sparse_sinkhorn"),
    kind=Kind.ATTENTION,
    summary="Each block sees its own block and one that a soft permutation mixes from all blocks.",
    paper=Paper("Sparse Sinkhorn Attention", "2002.11296", 2020),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    refused={Pattern.CAUSAL_CROSS: "blocks of the memory are shared out among all blocks of queries"},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "small blocks": {"block": 3, "noise": False},
        "little balanced": {"block": 4, "iterations": 1, "temperature": 2.0},
        "cut": {"block": 3, "sortcut": 2},
    },
    variant_patterns={
        "cut": (Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    },
    engine="attention",
    state=SinkhornState,
    uneven=False,
    cost=cost,
    honours=frozenset({"dropout"}),
    weights="exact",
    waivers=(Waiver("layer_lengths", "its number of blocks is fixed when the program is compiled"),),
)
