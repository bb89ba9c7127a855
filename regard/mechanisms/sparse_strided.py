r"""Sparse Transformer: attention to nearby tokens, and to every s-th earlier token (or the last few of every s).

When to pick it: sequences with a period (rows of an image, samples of a sound: `strided`), or text where the state must
keep every token (`fixed`); with s near sqrt(N) time grows as N^1.5, and any two tokens are connected within two layers.
When not: endless streams (every key is kept), cross attention (memory has no place near a query), or sequences not much
longer than s.

Definition (Child et al., arXiv 1904.10509, section 4; survey arXiv 2103.14636, B1). Softmax attention, for causal-self
over keys j <= i, in two patterns:

| `layout` | first | second |
|---|---|---|
| `strided` | abs(i - j) < s | s divides i - j |
| `fixed` | floor(i/s) = floor(j/s) | j mod s >= s - c |

which `combine` merges: one softmax over the union of both (``union``, the paper's merged head), one pattern per head,
the first half of the heads having the first (``heads``), or one pattern for the whole layer (``first``, ``second``:
alternate them in a plan of layers).

| paper | here |
|---|---|
| l, stride | s, `stride`, near the square root of the length |
| c | `columns` |
| attention to different blocks of l columns by different heads | `head_columns`: head h has the c columns before those of head h - 1, starting from the last ones and wrapping around |
| d_k^-1/2 | `scale` |

Layout: (B, H, N, D). Ranks count valid tokens, so padding does not shift the patterns. A query that sees no key gives
0, as do the first queries of `second` with `fixed`. noncausal-self drops j <= i.
State: every key and value. A step reads s + N / s of them (c N / s with `fixed`), and scans all ranks to find them.
Deviations: the paper's kernels compute both patterns in one pass; here each is a call of blocked attention on
contiguous keys (every s-th token on a separate axis), and the two are merged by their log-sum-exps. A continuation by
several tokens at once computes hidden pairs too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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
    Unsupported,
    Waiver,
    at_least,
    one_of,
)
from regard.core.precision import wide
from regard.core.ragged import place_queries, take_queries
from regard.core.visibility import CountedRanks, block_numbers
from regard.engines.attention import Ranks, Visibility, attention_reference, ranks
from regard.engines.attention_forms import attend_to_part
from regard.engines.cache import KeyValueState, extend
from regard.engines.merging import merge

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        layout: ``strided`` or ``fixed``.
        stride: s, >= 1.
        columns: c of the fixed layout, 1 to `stride`.
        combine: ``union``, ``heads``, ``first`` or ``second``.
        head_columns: whether each head has its own columns in the fixed layout.
    """

    layout: str = "strided"
    stride: int = 32
    columns: int = 8
    combine: str = "union"
    head_columns: bool = False

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("strided", "fixed"))
        one_of("combine", self.combine, ("union", "heads", "first", "second"))
        at_least("stride", self.stride, 1)
        if self.layout == "fixed" and not 1 <= self.columns <= self.stride:
            raise Unsupported(
                f"columns={self.columns} of stride={self.stride}",
                supported="1 to stride",
                nearest=f"columns={min(max(self.columns, 1), self.stride)}",
            )
        if self.head_columns and self.layout != "fixed":
            raise Unsupported("head_columns with the strided layout", supported="layout='fixed'")

    def places(self, head: int) -> tuple[int, int]:
        """A head's columns as places in a block of `stride`: the first, and one past the last."""
        group = head % (self.stride // self.columns) if self.head_columns else 0
        return self.stride - self.columns * (group + 1), self.stride - self.columns * group

    def patterns(self, heads: int) -> list[tuple[str, list[int], tuple[int, int]]]:
        """Groups of heads computed together: ``first``, ``second`` or ``union``, the heads, and their columns."""
        half = -(-heads // 2)
        found: dict[tuple[str, tuple[int, int]], list[int]] = {}
        for head in range(heads):
            kind = self.combine
            if kind == "heads":
                kind = "first" if head < half else "second"
            columns = (0, 0) if kind == "first" or self.layout == "strided" else self.places(head)
            found.setdefault((kind, columns), []).append(head)
        return [(kind, group, columns) for (kind, columns), group in found.items()]


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible = pattern_mask(call.config, where.queries, where.keys, heads=q.shape[1])
    if call.pattern.causal:
        visible = visible & (where.keys[:, None, None] <= where.queries[:, None, :, None])
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale)


def pattern_mask(
    config: Config, i: Int[Tensor, "#b n"], j: Int[Tensor, "#b m"], *, heads: int
) -> Bool[Tensor, "#b h n m"]:
    """The patterns of all heads at ranks of queries and keys, without the condition j <= i."""
    i, j = i[:, None, :, None], j[:, None, None, :]
    s = config.stride
    if config.layout == "strided":
        first = (i - j).abs() < s
    else:
        first = i.div(s, rounding_mode="floor") == j.div(s, rounding_mode="floor")
    kinds: list[Tensor] = [first] * heads
    for kind, group, (begin, end) in config.patterns(heads):
        if config.layout == "strided":
            second = (i - j) % s == 0
        else:
            second = ((j % s >= begin) & (j % s < end)).expand_as(first)
        for head in group:
            kinds[head] = {"first": first, "second": second, "union": first | second}[kind]
    return torch.cat(kinds, 1)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Each pattern is a call of softmax attention on contiguous keys, and the two are merged by their log-sum-exps:
    N (s + N / s) pairs with ``strided``."""
    n, m = q.shape[2], k.shape[2]
    if n != m or call.lengths is not call.memory_lengths:
        placed = place_queries(q, m, call.lengths, call.memory_lengths)
        whole = parallel(call.replace(lengths=call.memory_lengths), placed, k, v).output
        return Result(take_queries(whole, n, call.lengths, call.memory_lengths))
    return Result(_by_heads(call, q, k, v, _whole))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens."""
    state, where = extend(call, k, v, q.shape[2])
    if call.state is None:
        return Result(parallel(call, q, k, v).output, state)
    config: Config = call.config

    def hidden(i: Tensor, j: Tensor) -> Tensor:
        return torch.where(pattern_mask(config, i, j, heads=q.shape[1]), 0.0, -torch.inf)

    output = attend_to_part(call, q, state.k, state.v, where, Visibility(causal=True), position_bias=hidden)[0]
    return Result(output, state)


def step(call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 v"]) -> Result:
    """One token: only the keys that it sees are read."""
    state, where = extend(call, k, v, 1)
    slots = state.ranks.shape[1]
    # the slot of each rank; empty slots go to an extra rank, which is never requested
    at = torch.where(state.ranks >= 0, state.ranks, slots)
    found = torch.zeros(at.shape[0], slots + 1, dtype=torch.long, device=q.device)
    found = found.scatter(1, at, torch.arange(slots, device=q.device).expand_as(at))
    i = where.queries.expand(q.shape[0], 1)

    def read(
        call: Call, q: Tensor, k: Tensor, v: Tensor, kind: str, columns: tuple[int, int]
    ) -> Float[Tensor, "b h 1 v"]:
        wanted = _seen_by(call.config, i, slots, kind, columns)
        places = found.gather(1, wanted.clamp(min=0))[:, None, :, None]
        k, v = (x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
        return attend_to_part(call, q, k, v, Ranks(i, wanted, None, None, plain=False), Visibility())[0]

    return Result(_by_heads(call, q, state.k, state.v, read), state)


def _seen_by(
    config: Config, i: Int[Tensor, "b 1"], total: int, kind: str, columns: tuple[int, int]
) -> Int[Tensor, "b seen"]:
    """Ranks of the keys that queries of rank `i` < `total` see in causal-self; -1 for no key."""
    s, wanted = config.stride, []
    count = -(-total // s)
    if config.layout == "strided":
        if kind != "second":
            wanted.append(i - torch.arange(s, device=i.device))
        if kind != "first":
            wanted.append(i - s * torch.arange(int(kind == "union"), count, device=i.device))
    else:
        block = block_numbers(i, s)
        if kind != "second":
            wanted.append(block * s + torch.arange(s, device=i.device))
        if kind != "first":
            ends = _column_slots(count, s, columns, i.device)[None]
            own = block_numbers(ends, s) == block
            wanted.append(torch.where(own, -1, ends) if kind == "union" else ends.expand(i.shape[0], -1))
    ranked = torch.cat(wanted, 1)
    return torch.where((ranked >= 0) & (ranked <= i), ranked, -1)


def _column_slots(count: int, stride: int, columns: tuple[int, int], device: torch.device) -> Int[Tensor, " slots"]:
    """Places of the columns in `count` blocks."""
    starts = stride * torch.arange(count, device=device)[:, None]
    return (starts + torch.arange(*columns, device=device)).flatten()


def _by_heads(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Callable[[Call, Tensor, Tensor, Tensor, str, tuple[int, int]], Tensor],
) -> Tensor:
    """Outputs of all heads; heads with the same pattern are computed together."""
    patterns = call.config.patterns(q.shape[1])
    if len(patterns) == 1:
        kind, _, columns = patterns[0]
        return attend(call, q, k, v, kind, columns)
    parts, order = [], []
    for kind, group, columns in patterns:
        parts.append(attend(call, _heads(q, group), _heads(k, group), _heads(v, group), kind, columns))
        order += group
    joined = torch.cat(parts, 1)
    return joined if order == sorted(order) else joined[:, torch.tensor(order, device=q.device).argsort()]


def _heads(x: Tensor, group: list[int]) -> Tensor:
    """Select a group of heads, as a view if they are contiguous."""
    whole = group == list(range(group[0], group[-1] + 1))
    return x[:, group[0] : group[-1] + 1] if whole else x[:, group]


def _whole(call: Call, q: Tensor, k: Tensor, v: Tensor, kind: str, columns: tuple[int, int]) -> Tensor:
    """Apply a pattern to a whole sequence, where the query and key of a slot are the same token."""
    if kind == "first":
        return _near(call, q, k, v)[0]
    second = _strided if call.config.layout == "strided" else _fixed
    if kind == "second":
        return second(call, q, k, v, columns, others=False)[0]
    dtype = v.dtype  # avoids rounding the parts before they are merged
    q, k, v = (wide(x) for x in (q, k, v))
    outputs, lses = zip(_near(call, q, k, v), second(call, q, k, v, columns, others=True), strict=True)
    return merge(outputs, lses).to(dtype)


def _near(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the first pattern."""
    size, causal = call.config.stride, call.pattern.causal
    if call.config.layout == "fixed":
        rule = Visibility(causal=causal, block=size)
    else:
        rule = Visibility(causal=causal, left=size - 1, right=None if causal else size - 1)
    return attend_to_part(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device), rule)


def _strided(
    call: Call, q: Tensor, k: Tensor, v: Tensor, columns: tuple[int, int], *, others: bool
) -> tuple[Tensor, Tensor]:
    """Apply the second pattern of the strided layout; with `others`, without the query's own key, which is near.

    Tokens a stride apart form a separate sequence."""
    batch, _, n, _ = q.shape
    size, causal, device = call.config.stride, call.pattern.causal, q.device
    rows = -(-n // size)

    def fold(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, rows * size - n)) if rows * size > n else x
        return padded.unflatten(2, (rows, size)).permute(0, 3, 1, 2, 4).flatten(0, 1)

    where: Ranks
    blocks = None
    if causal:  # padding comes after all valid queries
        where = CountedRanks(rows, rows, -1 if others else 0, True, device)
    else:
        counts = torch.full((1,), n, device=device) if call.lengths is None else call.lengths
        counts = (counts[:, None] - torch.arange(size, device=device) + size - 1).div(size, rounding_mode="floor")
        counts = counts.expand(batch, -1).reshape(-1, 1)
        row = torch.arange(rows, device=device)[None]
        where = Ranks(row, torch.where(row < counts, row, -1), 0, 0, plain=False)
        blocks = BlockMask(~torch.eye(rows, dtype=torch.bool, device=device)[None, None], 1) if others else None
    output, lse = attend_to_part(call, fold(q), fold(k), fold(v), where, Visibility(causal=causal), blocks=blocks)
    output = output.unflatten(0, (batch, size)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return output[:, :, :n], lse.unflatten(0, (batch, size)).permute(0, 2, 3, 1).flatten(2, 3)[:, :, :n]


def _fixed(
    call: Call, q: Tensor, k: Tensor, v: Tensor, columns: tuple[int, int], *, others: bool
) -> tuple[Tensor, Tensor]:
    """Apply the second pattern of the fixed layout; with `others`, without the query's own block, which is near."""
    n, size, device = q.shape[2], call.config.stride, q.device
    count = -(-n // size)
    slots = _column_slots(count, size, columns, device)
    total = n if call.lengths is None else call.lengths[:, None]
    places = torch.where(slots[None] < total, slots[None], -1)
    where = Ranks(torch.arange(n, device=device)[None], places, None, None, plain=False)
    k, v = (x.index_select(2, slots.clamp(max=max(n - 1, 0))) for x in (k, v))
    blocks = BlockMask(~torch.eye(count, dtype=torch.bool, device=device)[None, None], size) if others else None
    return attend_to_part(call, q, k, v, where, Visibility(causal=call.pattern.causal), blocks=blocks)


def _seen(config: Config, kind: str, columns: tuple[int, int], block: int, place: int) -> int:
    """The number of keys that the query at `place` of a block sees in causal-self."""
    if config.layout == "strided":
        first = config.stride if block else place + 1
        return {"first": first, "second": block + 1, "union": first + block}[kind]
    begin, end = columns
    own = max(0, min(place + 1, end) - begin)
    return {"first": place + 1, "second": block * (end - begin) + own, "union": place + 1 + block * (end - begin)}[kind]


def count_pairs(config: Config, n: int, heads: int) -> float:
    """The exact number of query-key pairs for a causal sequence of `n` tokens, averaged over heads."""
    blocks, rest = divmod(n, config.stride)
    total = 0
    for kind, group, columns in config.patterns(heads):
        pairs = 0
        for place in range(min(config.stride, n)):
            count = blocks + (place < rest)
            # from the second block on, each block adds the same number of keys
            pairs += _seen(config, kind, columns, 0, place)
            once = _seen(config, kind, columns, 1, place)
            more = _seen(config, kind, columns, 2, place) - once
            pairs += (count - 1) * once + more * (count - 1) * (count - 2) // 2
        total += pairs * len(group)
    return total / heads


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (scaled in proportion for n < M queries)."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    pairs = count_pairs(config, shape.m, shape.heads) * shape.n / max(shape.m, 1)
    block, place = divmod(shape.m, config.stride)
    last = sum(_seen(config, kind, c, block, place) * len(group) for kind, group, c in config.patterns(shape.heads))
    return Cost(
        flops=2.0 * heads * pairs * width,
        memory=float(heads * shape.n * (2 * shape.dim_key + 3 * shape.dim_value)),
        state=float(shape.heads * shape.m * width),
        step_flops=2.0 * shape.batch * last * width,
    )


NO_PLACE = "memory tokens have no position relative to a query"

MECHANISM = Mechanism(
    name="sparse_strided",
    aliases=("sparse_transformer", "strided"),
    kind=Kind.ATTENTION,
    summary="Softmax over nearby tokens and every s-th earlier token (or the last few of every s).",
    paper=Paper("Generating Long Sequences with Sparse Transformers", "1904.10509", 2019),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": step},
    config=Config,
    variants={
        "strided": {"stride": 4},
        "heads apart": {"stride": 5, "combine": "heads"},
        "second": {"stride": 3, "combine": "second"},
        "first": {"stride": 3, "combine": "first"},
        "fixed": {"layout": "fixed", "stride": 4, "columns": 1},
        "fixed, columns by head": {"layout": "fixed", "stride": 6, "columns": 2, "head_columns": True},
        "fixed, heads apart": {"layout": "fixed", "stride": 5, "columns": 2, "combine": "heads", "head_columns": True},
        "fixed, second": {"layout": "fixed", "stride": 4, "columns": 3, "combine": "second"},
    },
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"dropout"}),
    weights="exact",
    waivers=(Waiver("layer_lengths", "its number of blocks is fixed when the program is compiled"),),
)
