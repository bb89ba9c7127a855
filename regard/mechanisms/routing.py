r"""Routing attention: learned centroids bring queries together with the keys of the same cluster.

When to pick it: long sequences in which a query needs few tokens, by content, from anywhere; unlike random hashing
(`reformer`) clusters follow the data, and queries and keys stay two different things.
When not: short sequences (`softmax` is cheaper), or short training, in which centroids do not find their places.

Definition (Roy et al., arXiv 2003.05997, section 4; survey arXiv 2103.14636, B9). The scores of a token x at the C centroids
mu_c are x . mu_c / |x|. With att(i, S) the softmax attention of query i over the keys S and the null memory of the cluster,
where it has one:

- noncausal-self: Q_c and K_c are the w queries and the w keys that score highest at centroid c;
  o_i = mean over the clusters c with i in Q_c of att(i, K_c), and 0 when there is none.
- causal-self: every query and key belongs to the centroid where it scores highest; o_i = att(i, S_i), S_i the last w keys
  of i's cluster up to i.
- cross patterns: o_i = att(i, K_c), c the cluster of query i and K_c the w keys of the memory that score highest at c.

A query without a key gives 0.

| paper | here |
|---|---|
| mu | `centroids` (H, C, D); the buffer `projection.centroids` of a layer, `clusters` of them |
| w | `window` |
| moving average of the centroids | `decay`; in training, from the mean of the unit tokens that are nearest, made a unit vector |
| spherical k-means loss | `losses["commitment"]`, mean squared distance of a unit token to its centroid; its weight in a model is 1e-4 |
| null memory (public code) | `null_k` (H, C, D), `null_v` (H, C, V); `null_memory` of a layer |
| half of the heads local | `local_heads`: so many first heads attend to the last w keys, or to w around the query |

Layout: q (B, H, N, D), k and v (B, H, M, D). State, in causal-self and in cross patterns: w keys and values of each cluster,
which is all that a later query can see; its size never changes.
Deviations: in causal-self the paper chooses the w highest of the whole row too, so that a later token can push an earlier one
out of its cluster; here membership is decided by a token alone, and a cluster shows the last w keys. The paper normalises
queries and keys and makes them the same in decoders; here they are normalised for routing only (`query_key_norm` of the
layer is for the rest). A layer whose activations are computed anew in the backward pass should have ``decay=1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Mask,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    lengths_after,
    state_field,
    valid_from_lengths,
)
from regard.core.precision import wide, wide_dtype
from regard.core.ragged import group_queries, take_tokens
from regard.core.visibility import CountedRanks
from regard.engines.attention import Visibility, attention, attention_reference, ranks
from regard.layers.parts import LayerCall, Projection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

QUERIES_AT_ONCE = 64
"""Queries that share one table of keys, at most."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        window: w, >= 1: keys (and in noncausal-self queries) of a cluster.
        clusters: C of a layer, >= 1; about the training length over the window.
        decay: of the moving average of the centroids, in [0, 1]; 1 keeps them.
        null_memory: whether a layer learns a null memory.
        local_heads: heads that are local instead, >= 0, in self patterns.
    """

    window: int = 64
    clusters: int = 16
    decay: float = 0.999
    null_memory: bool = True
    local_heads: int = 0

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("clusters", self.clusters, 1)
        if not 0 <= self.decay <= 1:
            raise Unsupported(f"decay={self.decay}", supported="0 <= decay <= 1", nearest="decay=0.999")
        at_least("local_heads", self.local_heads, 0)


@dataclass(frozen=True)
class RoutingState(State):
    """The keys of each cluster that later queries can see: the last ones in causal-self, in order and right-aligned, and
    those of the highest scores in cross patterns."""

    k: Float[Tensor, "b h c w d"] = state_field()
    v: Float[Tensor, "b h c w v"] = state_field()
    score: Float[Tensor, "b h c w"] = state_field(fill=-torch.inf)
    """At the cluster's centroid; -inf for a slot that holds no key."""
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, one cluster after the other."""
    config: Config = call.config
    _check(call, q.shape[1])
    n, m, w = q.shape[2], k.shape[2], config.window
    at_queries, at_keys = _scores(q, centroids), _scores(k, centroids)  # (b, h, c, n)
    i, j = torch.arange(n, device=q.device)[:, None] + m - n, torch.arange(m, device=q.device)
    output, count = v.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(*q.shape[:3], 1)
    for c in range(centroids.shape[1]):
        keys, queries = at_keys.argmax(2) == c, at_queries.argmax(2) == c
        if call.pattern.cross or not call.pattern.causal:
            keys = _among_highest(at_keys[:, :, c], w)
        if call.pattern is Pattern.NONCAUSAL_SELF:
            queries = _among_highest(at_queries[:, :, c], w)
        seen = keys[:, :, None].expand(-1, -1, n, -1)
        if call.pattern is Pattern.CAUSAL_SELF:
            seen = seen & (j <= i)
            seen = seen & (seen.flip(-1).cumsum(-1).flip(-1) <= w)
        scores = (call.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
        values = v
        if null_k is not None and null_v is not None:
            scores = torch.cat([scores, call.scale * q @ null_k[:, c, :, None]], -1)
            values = torch.cat([v, null_v[:, c, None].expand(*v.shape[:2], 1, -1)], 2)
        attended = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1) @ values
        chosen = (queries & seen.any(-1))[..., None]
        output, count = output + torch.where(chosen, attended, 0), count + queries[..., None]
    output = output / count.clamp(min=1)
    if config.local_heads:
        near = (i - j < w) & (j <= i) if call.pattern.causal else (i - j).abs() <= w // 2
        local = attention_reference(q, k, v, near[None, None], lambda x: x.softmax(-1), call.scale)
        output = torch.cat([local[:, : config.local_heads], output[:, config.local_heads :]], 1)
    return output


def _among_highest(scores: Float[Tensor, "b h n"], count: int) -> Bool[Tensor, "b h n"]:
    chosen = scores.topk(min(count, scores.shape[-1])).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Result:
    _check(call, q.shape[1])
    null = _null(null_k, null_v)
    if call.pattern.cross:
        state = absorb(call.replace(state=None), k, v, centroids)
        result = Result(read(call.replace(state=state), q, centroids, null_k, null_v).output)
    elif call.pattern.causal:
        result = Result(_causal(call, q, k, v, centroids, null, _own(call, k, v, centroids)))
    else:
        result = Result(_balanced(call, q, k, v, centroids, null))
    if call.training:
        result.losses["commitment"] = _commitment(call, q, k, centroids)
    return result


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Result:
    """Causal-self with state in and out, by any number of tokens."""
    _check(call, q.shape[1])
    tokens = _own(call, k, v, centroids)
    past: RoutingState | None = call.state
    if past is not None:
        kept = torch.arange(centroids.shape[1], device=k.device)[:, None]
        kept = torch.where(past.score != -torch.inf, kept, centroids.shape[1])
        tokens = _Tokens(
            torch.cat([past.k.flatten(2, 3), k.to(past.k.dtype)], 2),
            torch.cat([past.v.flatten(2, 3), v.to(past.v.dtype)], 2),
            torch.cat([past.score.flatten(2), tokens.score.to(past.score.dtype)], 2),
            torch.cat([kept.flatten(2), tokens.cluster], 2),
        )
    output = _causal(call, q, k, v, centroids, _null(null_k, null_v), tokens)
    before = None if past is None else past.length
    length = lengths_after(before, call.memory_lengths, k.shape[0], k.shape[2], k.device)
    return Result(output, _last_of_each(call.config.window, centroids.shape[1], tokens, length))


def step(
    call: Call,
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b h 1 d"],
    v: Float[Tensor, "b h 1 v"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Result:
    """One token: its key takes the place of the oldest of its cluster."""
    _check(call, q.shape[1])
    past: RoutingState = call.state
    token, clusters = _own(call, k, v, centroids), centroids.shape[1]
    exists = (token.cluster < clusters)[..., None, None]
    into = token.cluster.clamp(max=clusters - 1)  # (b, h, 1)
    rows = torch.arange(into.numel(), device=q.device) * clusters + into.flatten()

    def put(table: Float[Tensor, "b h c w x"], new: Float[Tensor, "b h 1 x"]) -> Float[Tensor, "b h c w x"]:
        old = take_tokens(table.flatten(3), into).unflatten(3, table.shape[3:])
        shifted = torch.cat([old[:, :, :, 1:], new[:, :, :, None].to(table.dtype)], 3)
        shifted = torch.where(exists, shifted, old).flatten(0, 2)
        return table.flatten(0, 2).index_copy(0, rows, shifted).view(table.shape)

    score = put(past.score[..., None], token.score[..., None])[..., 0]
    length = lengths_after(past.length, call.memory_lengths, k.shape[0], 1, k.device)
    state = RoutingState(put(past.k, k), put(past.v, v), score, length)
    asked = _local(call, _scores(q, centroids).argmax(2))
    keys, values = (take_tokens(x.flatten(3), asked).unflatten(3, x.shape[3:]) for x in (state.k, state.v))
    seen = take_tokens(state.score, asked)[:, :, :, None] != -torch.inf
    output = _attend(call, q, keys, values, seen, _null(null_k, null_v), asked)
    return Result(output.to(v.dtype), state)


def absorb(
    call: Call, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"], centroids: Float[Tensor, "h c d"]
) -> RoutingState:
    """The keys of the memory that score highest at each centroid; more may follow, in any order."""
    _check(call, k.shape[1])
    scores = _visible_scores(_scores(k, centroids), call.valid_keys(k.shape[2]))
    window, missing = call.config.window, max(0, call.config.window - k.shape[2])
    score, chosen = F.pad(scores, (0, missing), value=-torch.inf).topk(window)
    k, v = (take_tokens(F.pad(x, (0, 0, 0, missing)), chosen.flatten(2)).unflatten(2, chosen.shape[2:]) for x in (k, v))
    past: RoutingState | None = call.state
    if past is not None:
        score, chosen = torch.cat([past.score, score.to(past.score.dtype)], -1).topk(window)
        k, v = (
            torch.cat([old, new.to(old.dtype)], 3).gather(3, chosen[..., None].expand(*chosen.shape, old.shape[-1]))
            for old, new in ((past.k, k), (past.v, v))
        )
    before = None if past is None else past.length
    length = lengths_after(before, call.memory_lengths, scores.shape[0], scores.shape[3], scores.device)
    return RoutingState(k, v, score, length)


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Result:
    """Queries on absorbed memory: each on the keys of its cluster."""
    _check(call, q.shape[1])
    state: RoutingState = call.state
    batch, heads, n, _ = q.shape
    clusters = centroids.shape[1]
    if n == 0 or state.k.shape[-2] == 0:
        return Result(q.new_zeros(batch, heads, n, state.v.shape[-1]), state)
    cluster = _scores(q, centroids).argmax(2)
    blocks = group_queries(cluster, clusters, _block_size(call.config, n))
    asked = cluster.gather(2, blocks.first)  # (b, h, blocks)
    k, v = (take_tokens(x.flatten(3), asked).unflatten(3, x.shape[3:]) for x in (state.k, state.v))
    seen = take_tokens(state.score, asked)[:, :, :, None] != -torch.inf
    output = _attend(call, take_tokens(q, blocks.table.flatten(2)), k, v, seen, _null(null_k, null_v), asked)
    return Result(take_tokens(output, blocks.place).to(q.dtype), state)


@dataclass(frozen=True)
class _Tokens:
    """Keys of causal-self in order, with their scores at the centroids of their clusters; padding has a cluster more."""

    k: Float[Tensor, "b h m d"]
    v: Float[Tensor, "b h m v"]
    score: Float[Tensor, "b h m"]
    cluster: Int[Tensor, "b h m"]


def _own(call: Call, k: Tensor, v: Tensor, centroids: Tensor) -> _Tokens:
    score, cluster = _scores(k, centroids).max(2)
    cluster = _local(call, cluster)
    valid = call.valid_keys(k.shape[2])
    if valid is not None:
        cluster = cluster.masked_fill(~valid[:, None], centroids.shape[1])
    return _Tokens(k, v, score, cluster)


def _local(call: Call, cluster: Int[Tensor, "b h n"]) -> Int[Tensor, "b h n"]:
    """The last keys of a single cluster are those nearby."""
    if not call.config.local_heads:
        return cluster
    local = torch.arange(cluster.shape[1], device=cluster.device) < call.config.local_heads
    return cluster.masked_fill(local[:, None], 0)


def _causal(
    call: Call, q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, null: Null, tokens: _Tokens
) -> Float[Tensor, "b h n v"]:
    """Sorted by (cluster, position), what a query sees is a stretch of `window` keys, which ends at its own place among them.

    Queries whose stretches end in the same chunk of their cluster form blocks, each on the keys of two chunks.
    """
    window, clusters = call.config.window, centroids.shape[1]
    batch, heads, n, _ = q.shape
    total = tokens.k.shape[2]
    if n == 0 or total == 0:
        return v.new_zeros(batch, heads, n, v.shape[3])
    ordered, order = tokens.cluster.sort(dim=-1, stable=True)
    cluster = _local(call, _scores(q, centroids).argmax(2))
    seen = ranks(call, n, k.shape[2], q.device).queries + 1  # keys that came before, of the new ones
    seen = (seen.clamp(min=0) + (total - k.shape[2]))[:, None]
    # how many keys belong to earlier clusters, or to the query's and come before it
    stop = torch.searchsorted(ordered * (total + 1) + order, cluster * (total + 1) + seen)
    start = torch.searchsorted(ordered, cluster)
    chunk = (stop - start - 1).clamp(min=0).div(window, rounding_mode="floor")
    blocks = group_queries(cluster * (total + 1) + chunk, total // window + clusters, _block_size(call.config, n))
    begin = (start + window * chunk).gather(2, blocks.first) - window
    places = begin[..., None] + torch.arange(2 * window, device=q.device)  # (b, h, blocks, 2 window)
    chosen = order.gather(2, places.clamp(0, total - 1).flatten(2))
    low = torch.maximum(start, stop - window)
    low, high = (x.gather(2, blocks.table.flatten(2)).view(*blocks.table.shape, 1) for x in (low, stop))
    places = places[:, :, :, None]
    k, v = (take_tokens(x, chosen).unflatten(2, (places.shape[2], 2 * window)) for x in (tokens.k, tokens.v))
    visible = (places >= low) & (places < high)
    output = _attend(
        call, take_tokens(q, blocks.table.flatten(2)), k, v, visible, null, cluster.gather(2, blocks.first)
    )
    return take_tokens(output, blocks.place).to(v.dtype)


def _last_of_each(window: int, clusters: int, tokens: _Tokens, length: Tensor) -> RoutingState:
    """The last keys of each cluster."""
    ordered, order = tokens.cluster.sort(dim=-1, stable=True)
    numbers = torch.arange(clusters, device=order.device).expand(*order.shape[:2], -1).contiguous()
    start, stop = torch.searchsorted(ordered, numbers), torch.searchsorted(ordered, numbers, right=True)
    places = stop[..., None] + torch.arange(-window, 0, device=order.device)  # (b, h, c, w)
    exists = places >= start[..., None]
    if order.shape[2] == 0:
        order = torch.zeros_like(order[..., :0]).new_zeros(*order.shape[:2], 1)
    chosen = order.gather(2, places.clamp(0, order.shape[2] - 1).flatten(2))

    def table(x: Tensor, otherwise: float) -> Tensor:
        x = F.pad(x, (0, 0, 0, 1)) if x.shape[2] == 0 else x
        return take_tokens(x, chosen).unflatten(2, places.shape[2:]).masked_fill(~exists[..., None], otherwise)

    score = table(tokens.score[..., None], -torch.inf)[..., 0]
    return RoutingState(table(tokens.k, 0.0), table(tokens.v, 0.0), score, length)


def _balanced(call: Call, q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, null: Null) -> Float[Tensor, "b h n v"]:
    """Noncausal-self: each centroid takes as many queries and keys."""
    config: Config = call.config
    batch, _, n, _ = q.shape
    local = config.local_heads
    if n == 0:
        return v
    if local:
        half = config.window // 2
        near = attention(
            q[:, :local],
            k[:, :local],
            v[:, :local],
            ranks(call, n, n, q.device),
            visibility=Visibility(left=half, right=half),
            scale=call.scale,
            dropout=call.dropout,
            generator=call.generator,
            backend=call.backend,
        )[0]
        if local == q.shape[1]:
            return near
    valid = call.valid_keys(n)
    width = min(config.window, n)
    at_queries = _visible_scores(_scores(q[:, local:], centroids[local:]), valid).topk(width)
    at_keys = _visible_scores(_scores(k[:, local:], centroids[local:]), valid).topk(width)
    taken, shape = at_queries.indices.flatten(2), at_keys.indices.shape
    chosen = at_keys.indices.flatten(2)
    keys, values = (take_tokens(x[:, local:], chosen).unflatten(2, shape[2:]) for x in (k, v))
    asked = torch.arange(shape[2], device=q.device).expand(*shape[:2], -1)
    visible = (at_keys.values != -torch.inf)[:, :, :, None]
    if null is not None:
        null = (null[0][local:], null[1][local:])
    attended = _attend(call, take_tokens(q[:, local:], taken), keys, values, visible, null, asked)
    row = torch.arange(batch * shape[1], device=q.device).view(batch, shape[1], 1) * n
    rows = (taken + row).flatten()
    output = attended.new_zeros(batch * shape[1] * n, attended.shape[-1]).index_add(0, rows, attended.flatten(0, 2))
    count = attended.new_zeros(batch * shape[1] * n).index_add(0, rows, attended.new_ones(rows.shape))
    output = (output / count.clamp(min=1)[:, None]).view(batch, shape[1], n, attended.shape[-1]).to(v.dtype)
    return torch.cat([near, output], 1) if local else output


def _block_size(config: Config, n: int) -> int:
    return min(config.window, QUERIES_AT_ONCE, n)


def _attend(
    call: Call,
    q: Float[Tensor, "b h blocks*size d"],
    k: Float[Tensor, "b h blocks slots d"],
    v: Float[Tensor, "b h blocks slots v"],
    visible: Bool[Tensor, "b h blocks #size slots"],
    null: Null,
    asked: Int[Tensor, "b h blocks"],
) -> Float[Tensor, "b h blocks*size v"]:
    """Softmax attention of each block of queries on keys of its own, and on the null memory of the cluster it asks."""
    dtype = wide_dtype(q)
    if null is not None:
        k, v = (
            torch.cat([x, take_tokens(y.to(x.dtype).expand(x.shape[0], -1, -1, -1), asked)[:, :, :, None]], 3)
            for x, y in zip((k, v), null, strict=True)
        )
        some = visible.any(-1, keepdim=True)
        if call.config.local_heads and call.pattern.causal:
            some = some & (torch.arange(q.shape[1], device=q.device) >= call.config.local_heads)[:, None, None, None]
        visible = torch.cat([visible, some], -1)
    bias = torch.zeros((), dtype=dtype, device=q.device).masked_fill(~visible, -torch.inf)
    rows = k.shape[0] * k.shape[1] * k.shape[2]
    total = q.shape[2]
    q = q.to(dtype).reshape(rows, 1, total // k.shape[2], q.shape[-1])
    output = attention(
        q,
        k.to(dtype).reshape(rows, 1, *k.shape[3:]),
        v.to(dtype).reshape(rows, 1, *v.shape[3:]),
        CountedRanks(q.shape[2], k.shape[3], 0, True, q.device),
        visibility=Visibility(),
        scale=call.scale,
        bias=bias.flatten(0, 2)[:, None],
        dropout=call.dropout,
        generator=call.generator,
        backend=call.backend,
    )[0]
    return output.view(*k.shape[:2], total, output.shape[-1])


def _scores(x: Float[Tensor, "b h n d"], centroids: Float[Tensor, "h c d"]) -> Float[Tensor, "b h c n"]:
    """Affinities of unit tokens to the centroids. They choose, and have no gradient."""
    dtype = wide_dtype(x)
    return centroids.detach().to(dtype) @ F.normalize(x.detach().to(dtype), dim=-1).mT


def _visible_scores(scores: Float[Tensor, "b h c n"], valid: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b h c n"]:
    return scores if valid is None else scores.masked_fill(~valid[:, None, None], -torch.inf)


def _commitment(call: Call, q: Tensor, k: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance of each unit token to its nearest centroid, summed, and how many tokens there are."""
    sums, counts = [], []
    for x, valid in ((q, call.valid_queries(q.shape[2])), (k, call.valid_keys(k.shape[2]))):
        unit = F.normalize(wide(x), dim=-1)
        nearest = take_tokens(centroids.to(unit.dtype).expand(x.shape[0], -1, -1, -1), _scores(x, centroids).argmax(2))
        distance = (unit - nearest.detach()).square().mean(-1)
        valid = torch.ones_like(distance[:, 0], dtype=torch.bool) if valid is None else valid
        sums.append(distance.where(valid[:, None], 0).sum())
        counts.append(valid.sum() * x.shape[1])
    return sums[0] + sums[1], counts[0] + counts[1]


Null = tuple[Tensor, Tensor] | None


def _null(null_k: Tensor | None, null_v: Tensor | None) -> Null:
    if (null_k is None) != (null_v is None):
        raise Unsupported("a null memory of keys or of values alone", supported="both null_k and null_v, or neither")
    return None if null_k is None or null_v is None else (null_k, null_v)


def _check(call: Call, heads: int) -> None:
    local = call.config.local_heads
    if local > heads:
        raise Unsupported(f"local_heads={local} of {heads}", supported=f"0 to {heads}", nearest=f"local_heads={heads}")
    if local and call.pattern.cross:
        raise Unsupported(
            f"local heads in {call.pattern.value}, where memory has no place near a query",
            supported="self patterns",
            nearest="local_heads=0",
        )


class Centroids(Projection):
    """Gives the heads of a layer their centroids and null memories, and moves the centroids in training.

    The centroids of a call are those before it. They stay where they are while a graph is being compiled.

    Args:
        spec: of the layer.
    """

    centroids: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.config: Config = spec.config
        shape = (spec.heads, self.config.clusters)
        self.register_buffer("centroids", F.normalize(torch.randn(*shape, spec.head_dim), dim=-1))
        null = self.config.null_memory and self.config.local_heads < spec.heads
        self.null_k = nn.Parameter(torch.randn(*shape, spec.head_dim)) if null else None
        self.null_v = nn.Parameter(torch.randn(*shape, spec.value_dim)) if null else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, memory, context = call.x, call.memory, call.context
        found = {**heads, "centroids": self.centroids}
        if self.null_k is not None and self.null_v is not None:
            found |= {"null_k": self.null_k, "null_v": self.null_v}
        if self.training and self.config.decay < 1 and not torch.compiler.is_compiling():
            own = None if x is None else context.mask
            with torch.no_grad():
                self._move({"q": own, "k": own if memory is x else context.memory_mask}, heads)
        return found

    def _move(self, masks: dict[str, Mask | None], heads: Tensors) -> None:
        old = self.centroids
        total, count = torch.zeros_like(old), old.new_zeros(old.shape[:2])
        for name, mask in masks.items():
            if name not in heads:
                continue
            tokens = heads[name]
            tokens = tokens.repeat_interleave(old.shape[0] // tokens.shape[1], 1)
            nearest = _scores(tokens, old).argmax(2)
            member = F.one_hot(nearest, old.shape[1]).to(old.dtype)  # (b, h, n, c)
            lengths = _lengths(mask)
            if lengths is not None:
                member = member * valid_from_lengths(lengths, member.shape[2])[:, None, :, None]
            total += (member.mT @ F.normalize(tokens.to(old.dtype), dim=-1)).sum(0)
            count += member.sum((0, 2))
        decay = self.config.decay
        moved = F.normalize(decay * old + (1 - decay) * F.normalize(total, dim=-1), dim=-1)
        self.centroids = torch.where(count[..., None] > 0, moved, old)


def _lengths(mask: Mask | None) -> Int[Tensor, " b"] | None:
    """Tokens of each row of the dense layout; None when all are valid."""
    if mask is None or not mask.ragged:
        return None
    if mask.cu_seqlens is not None:
        return mask.cu_seqlens.diff()
    return mask.lengths if mask.valid is None else mask.valid.sum(-1)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"c": config.clusters}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern, whose blocks of queries are on the keys of two chunks."""
    width, window = shape.dim_key + shape.dim_value, config.window
    heads = shape.batch * shape.heads
    size = max(1, _block_size(config, shape.n))
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
    waivers=(
        Waiver("layer_lengths", "its tokens in a cluster are a constant of the program"),
        Waiver("layer_onnx", "ONNX has no stable sort"),
    ),
)
