"""The fast forms of routing: parallel, chunked, step, and reading from a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Result,
    State,
    Unsupported,
    lengths_after,
    state_field,
)
from regard.core.padding import pad_tokens
from regard.core.precision import wide, wide_dtype
from regard.core.ragged import group_queries, take_tokens
from regard.core.visibility import CountedRanks
from regard.engines.attention import Visibility, attention, ranks
from regard.mechanisms.routing.definition import Config, _scores, check

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


QUERIES_AT_ONCE = 64
"""Maximum number of queries that share one table of keys."""


@dataclass(frozen=True)
class RoutingState(State):
    """The keys of each cluster that later queries can see: in causal-self the last ones, in order and right-aligned; in
    cross patterns those with the highest scores."""

    k: Float[Tensor, "b h c w d"] = state_field()
    v: Float[Tensor, "b h c w v"] = state_field()
    score: Float[Tensor, "b h c w"] = state_field(fill=-torch.inf)
    """Scores at the cluster's centroid; -inf for an empty slot."""
    length: Int[Tensor, " b"] = state_field()


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    centroids: Float[Tensor, "h c d"],
    null_k: Float[Tensor, "h c d"] | None = None,
    null_v: Float[Tensor, "h c v"] | None = None,
) -> Result:
    """Softmax within clusters of at most `window` keys, with queries grouped by cluster: about N w pairs and N C scores
    at centroids. In training the result includes the commitment loss."""
    check(call, q.shape[1])
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
    """Causal-self with state in and out, for any number of tokens."""
    check(call, q.shape[1])
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
    """One token: its key replaces the oldest key of its cluster."""
    check(call, q.shape[1])
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
    """Keep the memory keys that score highest at each centroid; more may follow, in any order."""
    check(call, k.shape[1])
    scores = _visible_scores(_scores(k, centroids), call.valid_keys(k.shape[2]))
    window, missing = call.config.window, max(0, call.config.window - k.shape[2])
    score, chosen = F.pad(scores, (0, missing), value=-torch.inf).topk(window)
    k, v = (take_tokens(pad_tokens(x, 0, missing), chosen.flatten(2)).unflatten(2, chosen.shape[2:]) for x in (k, v))
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
    """Attend from each query to its cluster's keys in absorbed memory."""
    check(call, q.shape[1])
    state: RoutingState = call.state
    batch, heads, n, _ = q.shape
    clusters = centroids.shape[1]
    if n == 0 or state.k.shape[-2] == 0:
        return Result(q.new_zeros(batch, heads, n, state.v.shape[-1]), state)
    cluster = _scores(q, centroids).argmax(2)
    blocks = group_queries(cluster, clusters, block_size(call.config, n))
    asked = cluster.gather(2, blocks.first)  # (b, h, blocks)
    k, v = (take_tokens(x.flatten(3), asked).unflatten(3, x.shape[3:]) for x in (state.k, state.v))
    seen = take_tokens(state.score, asked)[:, :, :, None] != -torch.inf
    output = _attend(call, take_tokens(q, blocks.table.flatten(2)), k, v, seen, _null(null_k, null_v), asked)
    return Result(take_tokens(output, blocks.place).to(q.dtype), state)


@dataclass(frozen=True)
class _Tokens:
    """The keys of causal-self in order, with scores at their clusters' centroids; padding has an extra cluster."""

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
    """Put all tokens of local heads in one cluster, whose last keys are then the nearby ones."""
    if not call.config.local_heads:
        return cluster
    local = torch.arange(cluster.shape[1], device=cluster.device) < call.config.local_heads
    return cluster.masked_fill(local[:, None], 0)


def _causal(
    call: Call, q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, null: Null, tokens: _Tokens
) -> Float[Tensor, "b h n v"]:
    """Sort keys by (cluster, position): then a query sees a stretch of `window` keys that ends at its own place.

    Queries whose stretches end in the same chunk of their cluster form blocks, each attending to the keys of two
    chunks.
    """
    window, clusters = call.config.window, centroids.shape[1]
    batch, heads, n, _ = q.shape
    total = tokens.k.shape[2]
    if n == 0 or total == 0:
        return v.new_zeros(batch, heads, n, v.shape[3])
    ordered, order = tokens.cluster.sort(dim=-1, stable=True)
    cluster = _local(call, _scores(q, centroids).argmax(2))
    seen = ranks(call, n, k.shape[2], q.device).queries + 1  # number of new keys up to the query
    seen = (seen.clamp(min=0) + (total - k.shape[2]))[:, None]
    # number of keys in earlier clusters, or in the query's cluster and before it
    stop = torch.searchsorted(ordered * (total + 1) + order, cluster * (total + 1) + seen)
    start = torch.searchsorted(ordered, cluster)
    chunk = (stop - start - 1).clamp(min=0).div(window, rounding_mode="floor")
    blocks = group_queries(cluster * (total + 1) + chunk, total // window + clusters, block_size(call.config, n))
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
    """The state with the last keys of each cluster."""
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
    """Noncausal-self: each centroid takes the same number of queries and keys."""
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


def block_size(config: Config, n: int) -> int:
    """The number of queries of a cluster that are computed together, given `n` in all."""
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
    """Softmax attention from each block of queries to its own keys and to its cluster's null memory."""
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


def _visible_scores(scores: Float[Tensor, "b h c n"], valid: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b h c n"]:
    return scores if valid is None else scores.masked_fill(~valid[:, None, None], -torch.inf)


def _commitment(call: Call, q: Tensor, k: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens and heads of the mean squared distance to the nearest centroid, and the number of terms."""
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
