r"""Softmax attention within a layout of blocks: each block of queries sees some blocks of keys.

When to pick it: long sequences for which you know which blocks matter, or want every pair connected within a few layers
while computing a small share of the pairs (butterfly); time is proportional to the visible blocks if the backend skips
the rest.
When not: exact recall from anywhere in one layer (`softmax`), a plain window (`local`, whose state has a fixed size),
or endless streams, since the state keeps every key.

Definition (block-sparse FlashAttention, arXiv 2205.14135, section 3.3):

    S = cap(tau Q K^T) + bias, -inf where M[floor(i/b), floor(j/b)] = 0 or the pattern hides (i, j)
    P_ij = exp(S_ij) / (exp(a) + exp(LSE_i)),   LSE_i = log sum_l exp(S_il),   O = P V

with cap(s) = c tanh(s / c) if there is a softcap c, else s; and exp(a) only if there is a sink a, one number per head.
With beta = floor(i/b), gamma = floor(j/b) and g global blocks, the layouts are:

| `layout` | M[beta, gamma] = 1 where beta < g or gamma < g, or |
|---|---|
| `butterfly` | beta = gamma, or beta and gamma differ in one bit; in causal-self beta - gamma is 0 or a power of two |
| `local_global` | abs(beta - gamma) <= `neighbours` |
| `random` | beta = gamma, or with probability `density`, drawn for each head and pair of blocks from `seed` |
| `user` | exactly where `visible` says so (no global blocks) or, without it, where the call's `mask.blocks` does |

No layout depends on the length of the sequence, so decoding, padding and packing see the same one. ceil(log2 n)
butterfly layers connect all n blocks. Causal-self has its own butterfly because the noncausal one, which could then
only clear bits of beta, would not connect them.

| paper | here |
|---|---|
| M, the block mask | `layout` and `visible`, each combined by AND with the call's `mask.blocks` |
| B_r = B_c, rows and columns of a block | b, `block_size` |
| Q, K, V | `q`, `k`, `v` |
| tau | `scale`, D^-0.5 by default |
| c, softcap of the scores | `softcap` |
| a, logit of an attention sink | `sink`; a parameter of the layer with `learn_sink` |
| LSE | `extras["lse"]` with `want={"lse"}`: (B, H, N), in at least float32, over the keys without the sink |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). i and j are ranks: they count the valid
tokens of a row or document, cached ones included; in causal-self queries count from M - N. In cross patterns both
sides count from 0, so the layouts suit memories whose blocks correspond to those of the queries; of a shorter memory,
later queries may see only the global blocks. A query that sees no key gives 0, and its LSE is -inf.
State: every key and value, and the number of queries that have read a memory, from which the next queries are counted.
Deviations: the official kernel has no causal form, and blocks of 16 queries by 256 keys; blocks here are square, so
express rectangular ones in the smaller size, repeating entries along the longer side. The random layout draws each pair
independently rather than a fixed number per row, which could not be the same at every length. A `mask.blocks` of
another block size is combined on blocks of the greatest common divisor, so make one size a multiple of the other.
PyTorch's backend computes hidden blocks too, a block of queries at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    BlockMask,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
)
from regard.core.visibility import block_visibility
from regard.engines.attention import Ranks, Visibility, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import attend
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.mechanisms.softmax import sample_inputs, sink_weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LAYOUTS = ("butterfly", "local_global", "random", "user")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        layout: ``butterfly``, ``local_global``, ``random`` or ``user``.
        block_size: b, tokens per block, >= 1.
        global_blocks: g, >= 0: this many blocks at the start see, and are seen by, every block; not with ``user``.
        neighbours: blocks seen on either side in ``local_global``, >= 0.
        density: probability that a block is visible in ``random``, 0 to 1; a block always sees itself.
        seed: seed of the draws of ``random``.
        visible: the layout of ``user``: booleans (or 0 and 1) indexed by query block and key block, or by head, query
            block and key block, as nested sequences or a tensor; stored as nested tuples by head (one layout for all
            heads, or one per head). Input sequences must fit in it. Without it, each call with ``user`` must pass
            `mask.blocks`.
        softcap: c > 0 bounds the scores to (-c, c) before biases; None for no bound.
        learn_sink: whether a layer learns the sink, initialised to 0; functions take it as the tensor `sink`.
    """

    layout: str = "butterfly"
    block_size: int = 64
    global_blocks: int = 1
    neighbours: int = 1
    density: float = 0.125
    seed: int = 0
    visible: Any = None
    softcap: float | None = None
    learn_sink: bool = False

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)
        at_least("block_size", self.block_size, 1)
        at_least("global_blocks", self.global_blocks, 0)
        at_least("neighbours", self.neighbours, 0)
        if not 0 <= self.density <= 1:
            raise Unsupported(f"density={self.density}", supported="0 <= density <= 1")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise Unsupported(f"softcap={self.softcap}", supported="a finite softcap > 0", nearest="softcap=None")
        if self.visible is not None:
            if self.layout != "user":
                raise Unsupported(f"visible blocks with layout={self.layout!r}", supported="layout='user'")
            object.__setattr__(self, "visible", _nested(self.visible))


def _nested(visible: Any) -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """Convert a user's layout to booleans by head, query block and key block."""
    table = visible.tolist() if hasattr(visible, "tolist") else visible
    try:
        heads = table if isinstance(table[0][0], (list, tuple)) else (table,)
        found = tuple(tuple(tuple(row) for row in head) for head in heads)
    except (TypeError, IndexError):
        found = ()
    sizes = {(len(head), len(row)) for head in found for row in head}
    if len(sizes) != 1 or any(entry not in (0, 1) for head in found for row in head for entry in row):
        raise Unsupported(
            "visible blocks that are not a table of booleans",
            supported="booleans by (query block, key block) or (head, query block, key block), at least one",
            nearest="butterfly_blocks(length, block_size).visible[0] of regard.engines.block_patterns",
        )
    return tuple(tuple(tuple(map(bool, row)) for row in head) for head in found)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sink: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    n, m = q.shape[2], k.shape[2]
    _check_extent(call, n, m)
    where = ranks(call, n, m, q.device)
    blocks = _block_mask(call, n if call.pattern.cross else m, m, q.shape[1], q.device)
    rule = Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)
    visible, bias = masked_scores_bias(where, rule, call.bias, call.position_bias, blocks, q.dtype)
    return attention_reference(q, k, v, visible, partial(sink_weights, sink), call.scale, bias, call.config.softcap)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sink: Float[Tensor, " h"] | None = None,
) -> Result:
    """Softmax attention under the block mask; a kernel's time is proportional to the number of visible blocks.

    Raises:
        Unsupported: if a row has more blocks than the user's layout, or the layout is for another number of heads.
    """
    n, m = q.shape[2], k.shape[2]
    _check_extent(
        call, n if call.lengths is None else call.lengths, m if call.memory_lengths is None else call.memory_lengths
    )
    blocks = _block_mask(call, n if call.pattern.cross else m, m, q.shape[1], q.device)
    where, causal = ranks(call, n, m, q.device), call.pattern is Pattern.CAUSAL_SELF
    return _attend(call, q, k, v, sink, where, blocks, causal=causal)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sink: Float[Tensor, " h"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    n, heads = q.shape[2], q.shape[1]
    state, where = extend_counted(call, k, v, n)
    _check_extent(call, state.length, state.length)
    slots = state.k.shape[2]  # at least as many as any row has tokens
    if n != 1:
        blocks = _block_mask(call, slots, slots, heads, q.device)
        return _attend(call, q, state.k, state.v, sink, where, blocks, state, causal=True)
    # no key is later than the last token, so one row of blocks is enough instead of the full square
    last = (state.length - 1).clamp(min=0)
    blocks = _block_mask(call, 1, slots, heads, q.device, last)
    call, where = _from_row(call, where, last)
    return _attend(call, q, state.k, state.v, sink, where, blocks, state, causal=False)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> CountedState:
    """Absorb memory into a cache; may be called repeatedly."""
    return extend_counted(call, k, v, 0)[0]


def read(call: Call, q: Float[Tensor, "b h n d"], sink: Float[Tensor, " h"] | None = None) -> Result:
    """Attend to absorbed memory; queries are counted on from those that have read it before."""
    n, before = q.shape[2], call.state.queries
    call, state, where = read_on(call, n, q.device)
    _check_extent(call, state.queries, state.length)
    blocks = _block_mask(call, n + _common_size(call) - 1, state.k.shape[2], q.shape[1], q.device, before)
    call, where = _from_row(call, where, before)
    return _attend(call, q, state.k, state.v, sink, where, blocks, state, causal=False)


def _from_row(call: Call, where: Ranks, before: Int[Tensor, " b"]) -> tuple[Call, Ranks]:
    """The call and its ranks with queries counted from the block of rank `before`, to match a block mask whose first
    row is that block; position biases still receive the original ranks."""
    start = (before - before % _common_size(call))[:, None]
    if call.position_bias is not None:
        by_rank = call.position_bias
        call = call.replace(position_bias=lambda i, j: by_rank(i + start, j))
    return call, Ranks(where.queries - start, where.keys, None, None, plain=False)


def _common_size(call: Call) -> int:
    """Block size of the mask that combines the layout with the call's own blocks."""
    config: Config = call.config
    if call.blocks is None:
        return config.block_size
    if config.layout == "user" and config.visible is None:
        return call.blocks.block_size
    return math.gcd(config.block_size, call.blocks.block_size)


def _block_mask(
    call: Call,
    queries: int,
    keys: int,
    heads: int,
    device: torch.device,
    before: Int[Tensor, " b"] | None = None,
) -> BlockMask:
    """Combine the layout and the call's own blocks into one mask for `queries` query ranks and `keys` key ranks.

    Row 0 is the block of rank 0, or that of rank `before` if queries continue from there.
    """
    config: Config = call.config
    size = _common_size(call)
    i = torch.arange(math.ceil(queries / size), device=device)[None] * size
    if before is not None:
        i = i + before[:, None]  # any rank of a block may represent it
    j = torch.arange(math.ceil(keys / size), device=device)[None] * size
    visible = None if call.blocks is None else block_visibility(call.blocks, Ranks(i, j, None, None, False))
    if config.layout != "user" or config.visible is not None:
        causal = call.pattern is Pattern.CAUSAL_SELF
        layout = visible_blocks(config, i // config.block_size, j // config.block_size, heads=heads, causal=causal)
        visible = layout if visible is None else visible & layout
    if visible is None:
        raise Unsupported(
            "block_sparse with layout='user' but no layout",
            supported="the option `visible`, or mask.blocks with each call",
            nearest="layout='butterfly'",
        )
    return BlockMask(visible, size)


def visible_blocks(
    config: Config, i: Int[Tensor, "#b q_blocks"], j: Int[Tensor, "#b k_blocks"], *, heads: int, causal: bool
) -> Bool[Tensor, "#b #h q_blocks k_blocks"]:
    """The layout M at query blocks `i` and key blocks `j`; if `causal`, entries after the query's block are arbitrary.

    Raises:
        Unsupported: if a user's layout is for another number of heads.
    """
    if config.visible is not None:
        _check_heads(config, heads)
        table = torch.tensor(config.visible, device=i.device)[None]
        return block_visibility(BlockMask(table, 1), Ranks(i, j, None, None, False))
    i, j = i[:, None, :, None], j[:, None, None, :]
    if config.layout == "butterfly":
        apart = i - j if causal else i ^ j
        visible = (apart & (apart - 1)) == 0  # 0 and powers of two, but no negative number
    elif config.layout == "local_global":
        visible = (i - j).abs() <= config.neighbours
    else:
        head = torch.arange(heads, device=i.device)[None, :, None, None]
        drawn = _hash(_hash(_hash(head + (config.seed & 0xFFFFFFFF)) + i) + j)
        visible = (drawn < int(config.density * 2**32)) | (i == j)
    return visible | (i < config.global_blocks) | (j < config.global_blocks)


def _hash(x: Int[Tensor, "*axes"]) -> Int[Tensor, "*axes"]:
    """Hash of an integer >= 0 to 32 random-looking bits: draws that depend on nothing but their position."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _check_heads(config: Config, heads: int) -> None:
    if config.visible is not None and len(config.visible) not in (1, heads):
        raise Unsupported(
            f"block_sparse with visible blocks of {len(config.visible)} heads for {heads} heads",
            supported="one layout for all heads, or one a head",
        )


def _check_extent(call: Call, queries: Int[Tensor, " b"] | int, keys: Int[Tensor, " b"] | int) -> None:
    """Raise Unsupported for sequences beyond a user's layout (lengths held in tensors are not checked in a graph)."""
    config: Config = call.config
    if config.visible is None:
        return
    rows, columns = (count * config.block_size for count in (len(config.visible[0]), len(config.visible[0][0])))
    needed = [("queries", queries, rows), ("keys", keys, columns)]
    if not call.pattern.cross:
        needed = [("tokens", keys, min(rows, columns))]
    for what, counts, room in needed:
        if isinstance(counts, Tensor) and torch.compiler.is_compiling():
            continue
        longest = max(counts.tolist(), default=0) if isinstance(counts, Tensor) else counts
        if longest > room:
            raise Unsupported(
                f"block_sparse on {longest} {what} with visible blocks for {room}",
                supported="sequences that the layout covers",
                nearest="layout='butterfly', or mask.blocks, beyond whose last block nothing is seen",
            )


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    where: Ranks,
    blocks: BlockMask,
    state: CountedState | None = None,
    *,
    causal: bool,
) -> Result:
    options = {"visibility": Visibility(causal=causal), "softcap": call.config.softcap, "sink": sink, "blocks": blocks}
    return attend(call, q, k, v, where, state, **options)


class Sink(Projection):
    """Gives a layer's heads their learned sinks, if `learn_sink` is set."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        _check_heads(spec.config, spec.heads)
        self.sink = nn.Parameter(torch.zeros(spec.heads)) if spec.config.learn_sink else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.sink is None else heads | {"sink": self.sink}


def _row(config: Config, beta: int) -> tuple[float, float]:
    """Number of earlier blocks that block `beta` sees in causal-self, and whether it sees itself; means over heads."""
    if config.visible is not None:
        rows = [head[beta] for head in config.visible if beta < len(head)]
        before, own = sum(sum(row[:beta]) for row in rows), sum(sum(row[beta : beta + 1]) for row in rows)
        return before / len(config.visible), own / len(config.visible)
    later = beta - config.global_blocks  # blocks between the global ones and this one
    if config.layout == "user" or later < 0:
        return float(beta), 1.0
    near = {
        "butterfly": later.bit_length(),
        "local_global": min(later, config.neighbours),
        "random": config.density * later,
    }
    return config.global_blocks + near[config.layout], 1.0


def visible_pairs(config: Config, n: int) -> float:
    """Number of pairs of query and key that causal-self computes in a sequence of `n` tokens, averaged over the heads
    and over the draws of a random layout. Full causal attention has n (n + 1) / 2."""
    size, pairs = config.block_size, 0.0
    for beta in range(math.ceil(n / size)):
        tokens = min(size, n - beta * size)
        before, own = _row(config, beta)
        pairs += before * size * tokens + own * tokens * (tokens + 1) / 2
    return pairs


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (n of M queries in proportion), with empty blocks skipped."""
    size = config.block_size
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    pairs = visible_pairs(config, shape.m) * shape.n / max(shape.m, 1)
    before, own = _row(config, shape.m // size)
    return Cost(
        flops=2.0 * heads * pairs * width,
        memory=float(heads * shape.n + math.ceil(shape.m / size) ** 2),
        state=float(shape.heads * shape.m * width),
        step_flops=2.0 * heads * (before * size + own * (shape.m % size + 1)) * width,
    )


MECHANISM = Mechanism(
    name="block_sparse",
    aliases=("blocksparse", "block_sparse_flash", "block_sparse_flash_attention", "butterfly"),
    kind=Kind.ATTENTION,
    summary="Softmax attention within a layout of blocks: a block of queries sees some blocks of keys.",
    paper=Paper("FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", "2205.14135", 2022, 11),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "sink?": "h"},
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
        "butterfly": {"block_size": 3, "softcap": 0.8, "learn_sink": True},
        "nothing global": {"block_size": 2, "global_blocks": 0},
        "local and global": {"layout": "local_global", "block_size": 3, "neighbours": 2, "global_blocks": 2},
        "local": {"layout": "local_global", "block_size": 2, "neighbours": 0, "global_blocks": 0},
        "random": {"layout": "random", "block_size": 2, "density": 0.3, "seed": 5},
        "given": {"layout": "user", "block_size": 40, "visible": ((1, 0), (1, 1))},
    },
    engine="attention",
    state=CountedState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    projection=Sink,
    sample_inputs=sample_inputs,
    waivers=(Waiver("layer_lengths", "its number of blocks is fixed when the program is compiled"),),
)
