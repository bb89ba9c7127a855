"""The fast forms of core_context: parallel, chunked, and stepwise from a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    BlockMask,
    Call,
    Pattern,
    Result,
    State,
    lengths_after,
    state_field,
    valid_from_lengths,
)
from regard.core.padding import pad_tokens
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.core.visibility import CountedRanks, block_numbers
from regard.engines.attention import Ranks, Visibility, decode_part
from regard.engines.cache import WindowState, append, append_rows, extend_window, last_slots, newest, next_in_window
from regard.engines.merging import merge
from regard.mechanisms.core_context.definition import Config, _attend, _cores, check

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class CoreState(State):
    """The last tokens, and the cores of complete groups: slot r of a row holds the core of its group r; later slots are
    unused.

    `plain` are the last unrotated keys, as many as an unfinished group may have, if cores are made from unrotated keys.
    `summed` is the sum of the queries in the unfinished group, if the pooling needs it.
    """

    window: WindowState
    keys: Float[Tensor, "b c cores d"] = state_field()
    values: Float[Tensor, "b c cores v"] = state_field()
    plain: Float[Tensor, "b g open d"] | None = state_field()
    summed: Float[Tensor, "b h d"] | None = state_field()
    length: Int[Tensor, " b"] = state_field()


@dataclass(frozen=True)
class _Turned:
    """New tokens of a causal-self call.

    Attributes:
        q, k, v: queries, keys and values for attention, rotated if the call rotates.
        asking, told: queries and keys from which cores are made.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b g n d"]
    v: Float[Tensor, "b g n v"]
    asking: Float[Tensor, "b h n d"]
    told: Float[Tensor, "b g n d"]

    @classmethod
    def of(cls, call: Call, q: Tensor, k: Tensor, v: Tensor) -> _Turned:
        """The tokens of a call, each rotated once."""
        if call.rotate is None:
            return cls(q, k, v, q, k)
        places = _places(call, k)
        turned, keys = call.rotate(q, places), call.rotate(k, places)
        return cls(turned, keys, v, *((q, k) if _pools_plain(call) else (turned, keys)))


def _places(call: Call, k: Float[Tensor, "b g n d"]) -> Int[Tensor, "b n"]:
    """Ranks of new tokens."""
    before = torch.zeros(k.shape[0], dtype=torch.long, device=k.device) if call.state is None else call.state.length
    return before[:, None] + torch.arange(k.shape[2], device=k.device)


def _pools_plain(call: Call) -> bool:
    """Return whether cores are made from unrotated keys."""
    return call.rotate is not None and call.config.pool_keys == "pre_rope"


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    gate: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Attention to a window of tokens and to cores, merged by log-sum-exps; causal-self uses the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, gate).output
    config: Config = call.config
    check(config, call.pattern, q.shape[2], k.shape[2], gate)
    g, m, device = config.group, k.shape[2], q.device
    lengths = lengths_after(None, call.memory_lengths, k.shape[0], m, device)
    count = -(-m // g)
    exists = valid_from_lengths(lengths, count * g).unflatten(-1, (count, g))
    groups = [pad_tokens(x, 0, count * g - m).unflatten(2, (count, g)) for x in (k, v)]
    queries = None
    if config.pool == "cca" and not call.pattern.cross:
        asking = wide(q)
        if config.pool_query == "mean":
            padded = pad_tokens(asking, 0, count * g - m).unflatten(2, (count, g))
            queries = padded.sum(3) / exists.sum(-1).clamp(min=1)[:, None, :, None]
        else:
            last = torch.minimum(torch.arange(1, count + 1, device=device) * g, lengths[:, None]) - 1
            queries = _take(asking, last.clamp(min=0))
    keys, values = _cores(call, queries, groups[0], groups[1], exists)
    core = torch.arange(count, device=device)
    number = torch.where(exists.any(-1), core, -1)
    slots = torch.arange(q.shape[2], device=device)[None]
    if call.pattern.cross:
        return _attend(call, q, keys, values, Ranks(slots, number, None, None, False), Visibility())[0].to(q.dtype)
    reach = -(-config.window // g)
    hidden = BlockMask(((core - core[:, None]).abs() > reach)[None, None], 1)
    near = _attend(
        call,
        q,
        k,
        v,
        Ranks(slots, torch.where(slots < lengths[:, None], slots, -1), 0, 0, False),
        Visibility(block=g, lookback=reach, lookahead=reach),
    )
    far = _attend(
        call, q, keys, values, Ranks(block_numbers(slots, g), number, None, None, False), Visibility(), hidden
    )
    return _fused(gate, near, far).to(q.dtype)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    gate: Float[Tensor, " h"] | None = None,
) -> Result:
    """Causal-self from state to state, by any number of tokens; also the step."""
    config: Config = call.config
    check(config, call.pattern, q.shape[2], k.shape[2], gate)
    g, s = config.group, config.window
    tokens = _Turned.of(call, q, k, v)
    found = _next_token(call, tokens, gate)
    if found is not None:
        return found
    state, keys, values, where = _extend(call, tokens.asking, tokens.k, v, tokens.told)
    q = tokens.q
    # A key is read individually while its group is not before that of the rank s - 1 places back:
    # the rule on groups, for queries moved back by s - 1.
    back = max(s - 1, 0)
    asks = Ranks(
        where.queries - back,
        where.keys,
        None if where.offset is None else where.offset - back,
        None if where.first is None else where.first - back,
        plain=False,
    )
    if s == 0:  # as with a window of 1, except that the last query of a group reads no key individually
        asks = Ranks(torch.where((where.queries + 1) % g == 0, -1, where.queries), where.keys, None, None, plain=False)
    near = _attend(call, q, keys, values, asks, Visibility(right=back, block=g, lookahead=back // g + 1))
    # the first rank that reads each core
    opened = (torch.arange(state.keys.shape[2], device=q.device)[None] + 1) * g + s - 1
    far = _attend(
        call,
        q,
        state.keys,
        state.values,
        Ranks(_places(call, k), opened, None, None, plain=False),
        Visibility(causal=True),
    )
    return Result(_fused(gate, near, far).to(q.dtype), state)


def _next_token(call: Call, tokens: _Turned, gate: Tensor | None) -> Result | None:
    """One more token for rows of equal lengths: it reads slices of the last slots of the window and the first cores,
    and nothing else is read or moved. None for other calls."""
    config, past = call.config, call.state
    g, s = config.group, config.window
    if past is None or call.dropout:
        return None
    extended = next_in_window(call, past.window, tokens.k, tokens.v, config.cached)
    if extended is None:
        return None
    window, keys, values, count = extended
    asks = config.pool == "cca"
    summed = past.summed
    if asks and config.pool_query == "mean":
        added = wide(tokens.asking)[:, :, 0]
        summed = added if summed is None else summed + added
    plain = told = None
    if _pools_plain(call):
        told = append(past.plain, tokens.told.to(past.plain.dtype), 2)
        plain = newest(told, 2, g - 1)
    cores = [x.narrow(2, 0, (count - 1) // g) if x.shape[2] > (count - 1) // g else x for x in (past.keys, past.values)]
    if count % g == 0:
        group, members = (x.narrow(2, x.shape[2] - g, g)[:, :, None] for x in (keys if told is None else told, values))
        queries = None
        if asks:
            queries = wide(tokens.asking) if config.pool_query == "last" else summed[:, :, None] / g
        exists = torch.ones(1, 1, g, dtype=torch.bool, device=keys.device)
        key, value = _cores(call, queries, group, members, exists)
        if told is not None:
            key = call.rotate(key, _places(call, tokens.k))  # type: ignore[misc]
        cores = [append(x, core, 2) for x, core in zip(cores, (key, value), strict=True)]
        summed = None if summed is None else torch.zeros_like(summed)
    state = CoreState(window, cores[0], cores[1], plain, summed, past.length + 1)
    left = max(0, (count - s) // g)
    near, far = count - left * g, min(left, cores[0].shape[2])
    parts = []
    if near:
        parts.append(_read(call, tokens.q, *(x.narrow(2, x.shape[2] - near, near) for x in (keys, values))))
    if far:
        parts.append(_read(call, tokens.q, *(x.narrow(2, 0, far) for x in cores)))
    if len(parts) == 1:
        return Result(parts[0][0].to(tokens.q.dtype), state)
    (output, lse), (beyond, other) = parts
    share = torch.sigmoid(other - lse)[..., None] if gate is None else torch.sigmoid(-wide(gate))[:, None, None]
    return Result(torch.lerp(wide(output), wide(beyond), share.to(wide(output).dtype)).to(tokens.q.dtype), state)


def _read(
    call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> tuple[Float[Tensor, "b h 1 v"], Float[Tensor, "b h 1"]]:
    """Output and log-sum-exp of queries that see every key."""
    found = decode_part(q.to(k.dtype), k, v, call.scale) if call.backend is None else None
    if found is None:
        found = _attend(call, q, k, v, CountedRanks(q.shape[2], k.shape[2], 0, True, q.device), Visibility())
    return found


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> CoreState:
    """Absorb memory into cores; may be called repeatedly."""
    check(call.config, call.pattern, 0, k.shape[2], None)
    return _extend(call, None, k, v, k)[0]


def _fused(gate: Tensor | None, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Float[Tensor, "b h n v"]:
    """Combine the outputs from tokens and from cores, in one softmax or by a gate."""
    if gate is None:
        return merge(*zip(near, far, strict=True))
    share = torch.sigmoid(wide(gate))[:, None, None].to(near[0].dtype)
    both = ((near[1] != -torch.inf) & (far[1] > -torch.inf))[..., None]
    return torch.where(both, share * near[0] + (1 - share) * far[0], near[0] + far[0])


def _extend(
    call: Call, q: Tensor | None, k: Tensor, v: Tensor, told: Tensor
) -> tuple[CoreState, Tensor, Tensor, Ranks]:
    """The state extended by new tokens, and the keys, values and ranks that their queries read.

    Args:
        q: queries for pooling; None in cross patterns.
        told: keys to pool.
    """
    config, past, device = call.config, call.state, k.device
    g, m = config.group, k.shape[2]
    window_call = call.replace(state=None if past is None else past.window)
    window, keys, values, where = extend_window(window_call, k, v, 0 if q is None else m, config.cached)
    new = lengths_after(None, call.memory_lengths, k.shape[0], m, device)
    before = torch.zeros_like(new) if past is None else past.length
    complete = before // g
    closed = (before + new) // g - complete
    summed = None if past is None else past.summed
    asks = q is not None and config.pool == "cca"
    pooled, group_values = told, v
    if past is not None:
        first = past.window.k.shape[2] - (g - 1)
        open_keys = past.window.k[:, :, first:] if past.plain is None else past.plain
        pooled = torch.cat([open_keys, told.to(open_keys.dtype)], 2)
        group_values = torch.cat([past.window.v[:, :, first:], v.to(past.window.v.dtype)], 2)
    whole = past is None and call.memory_lengths is None
    count = m // g if whole else (m + g - 1) // g
    cores: tuple[Tensor, Tensor] | None = None
    if whole or not values_known(closed) or bool((closed > 0).any()):
        rank = (complete * g)[:, None] + torch.arange(count * g, device=device)
        if whole:
            groups = [x[:, :, : count * g].unflatten(2, (count, g)) for x in (pooled, group_values)]
        else:
            slot = (rank - before[:, None] + (0 if past is None else g - 1)).clamp(0, max(pooled.shape[2] - 1, 0))
            groups = [_take(x, slot).unflatten(2, (count, g)) for x in (pooled, group_values)]
        queries = None
        if asks and q is not None:
            queries = _queries(config, wide(q), rank - before[:, None], summed, g)
        exists = torch.ones(1, count, g, dtype=torch.bool, device=device)
        key, value = _cores(call, queries, groups[0], groups[1], exists)
        if _pools_plain(call):
            key = call.rotate(key, rank.unflatten(1, (count, g))[..., -1])  # type: ignore[misc]
        cores = key, value
    if asks and q is not None and config.pool_query == "mean":
        # tokens of the group that is unfinished now
        open_ = ((before + new) // g * g - before)[:, None]
        place = torch.arange(m, device=device)
        inside = ((place >= open_) & (place < new[:, None]))[:, None, :, None]
        added = torch.where(inside, wide(q), 0).sum(2)
        summed = added if summed is None else added + torch.where((closed > 0)[:, None, None], 0, summed)
    if past is None and whole:
        assert cores is not None
        old = list(cores)
    else:
        heads = k.shape[1] if not asks or config.share_gqa or q is None else q.shape[1]
        old = (
            [wide(x)[:, :1, :0].expand(-1, heads, -1, -1) for x in (k, v)] if past is None else [past.keys, past.values]
        )
        if cores is not None:
            old = [append_rows(x, complete, core, closed) for x, core in zip(old, cores, strict=True)]
    plain = None
    if _pools_plain(call):
        plain = last_slots(pooled, call.memory_lengths, g - 1, past is not None)
    return CoreState(window, old[0], old[1], plain, summed, before + new), keys, values, where


def _queries(
    config: Config, q: Tensor, place: Int[Tensor, "b tokens"], summed: Tensor | None, g: int
) -> Float[Tensor, "b h groups d"]:
    """Pooling query of each group, whose tokens are at `place` among the new queries; `summed` sums earlier ones."""
    last = place.unflatten(1, (-1, g))[..., -1]
    if config.pool_query == "last":
        return _take(q, last.clamp(0, q.shape[2] - 1))
    inside = (place >= 0) & (place < q.shape[2])
    tokens = torch.where(inside[:, None, :, None], _take(q, place.clamp(0, q.shape[2] - 1)), 0)
    totals = tokens.unflatten(2, (-1, g)).sum(3)
    if summed is not None:
        totals = torch.cat([totals[:, :, :1] + summed[:, :, None], totals[:, :, 1:]], 2)
    return totals / g


def _take(x: Float[Tensor, "b h m d"], slots: Int[Tensor, "b j"]) -> Float[Tensor, "b h j d"]:
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
