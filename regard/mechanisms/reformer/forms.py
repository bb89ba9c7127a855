"""The fast forms of reformer: parallel, chunked, and from a state."""

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
from regard.core.precision import wide_dtype
from regard.core.ragged import take_tokens
from regard.core.visibility import CountedRanks
from regard.engines.attention import Visibility, attention
from regard.engines.attention_forms import attend_to_part
from regard.engines.cache import append
from regard.engines.merging import merge
from regard.mechanisms.reformer.definition import Config, _keys, hash_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


NOWHERE = -(1 << 62)
"""Address of a slot that holds no token."""


BUCKET = 1 << 32
"""Stride of addresses between buckets: the chunks of a bucket are numbered from its multiple of this."""


PAIRS_AT_ONCE = 1 << 22
"""Number of pairs of new queries and cached keys above which queries are processed in blocks."""


@dataclass(frozen=True)
class ReformerState(State):
    """Every token so far; a row with fewer tokens than others has empty slots."""

    q: Float[Tensor, "b h past d"] = state_field()
    v: Float[Tensor, "b h past v"] = state_field()
    addresses: Int[Tensor, "b h r past"] = state_field(fill=NOWHERE)
    """Bucket times `BUCKET` plus the token's chunk in it."""
    counts: Int[Tensor, "b h r buckets"] = state_field()
    """Number of tokens in each bucket."""
    length: Int[Tensor, " b"] = state_field()


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n v"],
    rotations: Float[Tensor, "h r d p"],
) -> Result:
    """Sort tokens by bucket; in each round, softmax within chunks and the chunks before them; merge rounds by their
    log-sum-exps. O(R N log N) to sort, and O(R N c) pairs."""
    return Result(_attend(call, q, v, _sort(call, q, rotations)))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n v"],
    rotations: Float[Tensor, "h r d p"],
) -> Result:
    """Causal-self with state in and out, for any number of tokens; also used as the step."""
    new = _sort(call, q, rotations)
    past: ReformerState | None = call.state
    buckets = 2 * rotations.shape[-1]
    if past is not None and (past.addresses.shape[2], past.counts.shape[-1]) != (rotations.shape[1], buckets):
        raise Unsupported(
            f"{rotations.shape[1]} rounds of {buckets} buckets after {past.addresses.shape[2]} of {past.counts.shape[-1]}",
            supported="the rotations that the state was begun with",
        )
    before = new.bucket.new_zeros(*new.bucket.shape[:3], buckets) if past is None else past.counts
    # padding has its own bucket, which is dropped
    rank = new.rank + F.pad(before, (0, 1)).gather(-1, new.bucket)
    chunk = rank.div(call.config.chunk, rounding_mode="floor")
    addresses = torch.where(new.bucket < buckets, new.bucket * BUCKET + chunk, NOWHERE)
    counts = F.pad(before, (0, 1)).scatter_add(-1, new.bucket, torch.ones_like(new.bucket))[..., :-1]
    length = lengths_after(None if past is None else past.length, call.lengths, q.shape[0], q.shape[2], q.device)
    if past is None:
        return Result(_attend(call, q, v, new), ReformerState(q, v, addresses, counts, length))
    state = ReformerState(
        append(past.q, q.to(past.q.dtype), 2),
        append(past.v, v.to(past.v.dtype), 2),
        append(past.addresses, addresses, 3),
        counts,
        length,
    )
    size = max(1, PAIRS_AT_ONCE // max(1, state.addresses.numel()))
    own = torch.arange(past.addresses.shape[-1], state.addresses.shape[-1], device=q.device)
    parts = [slice(start, start + size) for start in range(0, q.shape[2], size)]
    outputs = [_look_up(call, q[:, :, p], v[:, :, p], addresses[..., p], state, own[p]) for p in parts]
    return Result(torch.cat(outputs, 2) if outputs else v, state)


@dataclass(frozen=True)
class _Sorted:
    """The tokens of a call in the order of their buckets.

    Attributes:
        buckets: number of buckets.
        bucket: bucket of each token; `buckets` for padding.
        rank: rank of each token within its bucket.
        order: token at each sorted place.
        place: sorted place of each token.
    """

    buckets: int
    bucket: Int[Tensor, "b h r n"]
    rank: Int[Tensor, "b h r n"]
    order: Int[Tensor, "b h r n"]
    place: Int[Tensor, "b h r n"]


def _sort(call: Call, q: Tensor, rotations: Tensor) -> _Sorted:
    bucket = hash_tokens(q, rotations)
    valid = call.valid_queries(q.shape[2])
    if valid is not None:
        bucket = bucket.masked_fill(~valid[:, None, None], 2 * rotations.shape[-1])
    ordered, order = bucket.sort(dim=-1, stable=True)
    place = torch.zeros_like(order).scatter_(-1, order, torch.arange(q.shape[2], device=q.device).expand_as(order))
    first = torch.searchsorted(ordered, ordered)
    return _Sorted(2 * rotations.shape[-1], bucket, place - first.gather(-1, place), order, place)


def _attend(call: Call, q: Tensor, v: Tensor, tokens: _Sorted) -> Float[Tensor, "b h n v"]:
    """Attend in whole rows, round by round: chunks of sorted queries to the chunks of sorted keys they may see."""
    config: Config = call.config
    batch, heads, n, _ = q.shape
    if n == 0:
        return v
    size, dtype = config.chunk, wide_dtype(q)
    count = -(-n // size)
    q, values, k = q.to(dtype), v.to(dtype), _keys(call, q.to(dtype))
    pairs = _pairs(call, tokens)
    index = pairs.near.flatten(1)[:, None, :, None].expand(batch, heads, -1, size)

    def rows(x: Tensor, chosen: Tensor) -> Tensor:
        """Tokens (b, h, chunks, slots) of x (b, h, n, d), each chunk a row."""
        return take_tokens(x, chosen.flatten(2)).view(-1, 1, chosen.shape[-1], x.shape[-1])

    outputs, lses = [], []
    for this in range(tokens.order.shape[2]):
        queries = F.pad(tokens.order[:, :, this], (0, size * count - n)).unflatten(-1, (count, size))
        keys = queries.gather(2, index).view(batch, heads, count, size * pairs.near.shape[2])
        output, lse = attend_to_part(
            call,
            rows(q, queries),
            rows(k, keys),
            rows(values, keys),
            CountedRanks(size, keys.shape[-1], 0, True, q.device),
            Visibility(),
            bias=_hiding(pairs, queries, keys, this, earlier=not config.count_duplicates, dtype=dtype),
        )
        back = tokens.place[:, :, this]
        outputs.append(take_tokens(output.view(batch, heads, count * size, v.shape[3]), back))
        lses.append(lse.view(batch, heads, count * size).gather(2, back))
    alone = torch.stack(lses).amax(0) == -torch.inf
    return torch.where(alone[..., None], values, merge(outputs, lses)).to(v.dtype)


@dataclass(frozen=True)
class _Pairs:
    """Integers that encode which pairs of sorted query and key see each other.

    Tokens of a round see each other when the query's address minus the key's is from 0 to `lookback`, with or without
    `around` added. Addresses use the shortest possible integers: masks cost more than the attention itself.

    Attributes:
        near: for each sorted chunk of queries, the sorted chunks of keys that it looks at.
        exists: whether each place of these chunks holds a token.
        others: 0 for key places other than the query's own (in causal-self, for those before it), else a number >
            `lookback`.
        addresses: address of each token.
        nowhere: an address that no query sees.
        lookback: number of chunks.
        around: number of chunks in each row, for wrapping around; None if chunks do not wrap.
    """

    near: Int[Tensor, "#b chunks near"]
    exists: Bool[Tensor, "#b 1 chunks 1 slots"]
    others: Int[Tensor, "size slots"]
    addresses: Int[Tensor, "b h r n"]
    nowhere: int
    lookback: int
    around: Int[Tensor, "#b 1 1 1 1"] | None


def _pairs(call: Call, tokens: _Sorted) -> _Pairs:
    """The pairs to consider. In causal-self a bucket's chunks begin anywhere, so one more sorted chunk is needed."""
    size, causal, n = call.config.chunk, call.pattern.causal, tokens.order.shape[-1]
    count, device = -(-n // size), tokens.order.device
    lookback = min(call.config.lookback, count)
    back = torch.arange(min(lookback + (2 if causal else 1), count), device=device)
    chunk, place = torch.arange(count, device=device)[:, None], torch.arange(size, device=device)
    total = torch.full((1,), n, device=device) if call.lengths is None else call.lengths
    chunks = -(-total // size)
    if causal:
        near = (chunk - back)[None]
        exists = (near >= 0)[..., None].expand(-1, -1, -1, size)
        near = near.clamp(min=0)
        hidden = place >= place[:, None, None] + size * back[:, None]  # (size, near, size)
    else:
        near = (chunk - back) % chunks.clamp(min=1)[:, None, None]
        exists = (back < chunks[:, None])[:, None, :, None] & (
            size * near[..., None] + place < total[:, None, None, None]
        )
        hidden = (back == 0)[:, None] & (place == place[:, None, None])
    address = (tokens.rank if causal else tokens.place).div(size, rounding_mode="floor")
    nowhere = 3 * count
    if causal or call.config.same_bucket:  # keep buckets farther apart than chunks that see each other
        apart = count + lookback + 1
        address = address + apart * tokens.bucket
        nowhere = apart * (tokens.buckets + 2)
    exporting = torch.compiler.is_exporting()  # perhaps to ONNX Runtime, which cannot select int16
    short = torch.int32 if exporting or 2 * (nowhere + count + lookback) >= 1 << 15 else torch.int16
    return _Pairs(
        near,
        exists.flatten(2)[:, None, :, None],
        hidden.flatten(1).to(short) * (lookback + 1),
        address.to(short),
        nowhere,
        lookback,
        None if causal else chunks.to(short)[:, None, None, None, None],
    )


def _hiding(
    pairs: _Pairs,
    queries: Int[Tensor, "b h chunks size"],
    keys: Int[Tensor, "b h chunks slots"],
    this: int,
    *,
    earlier: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "rows 1 size slots"]:
    """The bias of a round: 0 for its pairs that no earlier round has (with `earlier`), and -inf elsewhere.

    Integers are compared by arithmetic, and only once at the end: comparisons are several times slower.
    """
    reach = pairs.lookback

    def distance(of: int) -> Tensor:
        """Distance between queries and keys in a round; at most `reach` if they see each other."""
        address = pairs.addresses[:, :, of]
        asked = address.gather(2, queries.flatten(2)).view(*queries.shape, 1)
        found = address.gather(2, keys.flatten(2)).view(*keys.shape[:3], 1, keys.shape[3])
        if of == this:
            found = torch.where(pairs.exists, found, pairs.nowhere)
        apart = (2 * asked - reach) - 2 * found
        if pairs.around is None:
            return apart.abs_()
        return torch.minimum((apart + 2 * pairs.around).abs_(), apart.abs_())

    far = torch.maximum(distance(this), pairs.others)
    if earlier and this:
        nearest = distance(0)
        for other in range(1, this):
            nearest = torch.minimum(nearest, distance(other))
        far = torch.maximum(far, (2 * reach + 1) - nearest)
    seen = (reach + 1 - far).clamp_(0, 1).to(dtype)
    return seen.reciprocal_().neg_().add_(1).flatten(0, 2)[:, None]


def _look_up(
    call: Call,
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n v"],
    addresses: Int[Tensor, "b h r n"],
    state: ReformerState,
    own: Int[Tensor, " n"],
) -> Float[Tensor, "b h n v"]:
    """Attend from new queries, whose own slots are given, to the cached tokens."""
    config: Config = call.config
    rounds, n = addresses.shape[2:]
    slots = state.addresses.shape[-1]
    dtype = wide_dtype(q)
    apart = addresses[..., None] - state.addresses[..., None, :]
    seen = (apart >= 0) & (apart <= config.lookback) & (torch.arange(slots, device=q.device) < own[:, None])
    times = seen.sum(2)  # (b, h, n, slots)
    keys, values = state.q, state.v
    if n == 1:
        most = min(slots, rounds * (config.lookback + 1) * config.chunk)
        times, chosen = times.topk(most, sorted=False)
        keys, values = take_tokens(keys, chosen[:, :, 0]), take_tokens(values, chosen[:, :, 0])
    bias = times.clamp(min=1).to(dtype).log() if config.count_duplicates else q.new_zeros((), dtype=dtype)
    output = attention(
        q.to(dtype),
        _keys(call, keys),
        values.to(dtype),
        CountedRanks(n, keys.shape[2], 0, True, q.device),
        visibility=Visibility(),
        scale=call.scale,
        bias=bias.masked_fill(times == 0, -torch.inf),
        dropout=call.dropout,
        generator=call.generator,
        backend=call.backend,
    )[0]
    return torch.where((times > 0).any(-1, keepdim=True), output.to(v.dtype), v)
