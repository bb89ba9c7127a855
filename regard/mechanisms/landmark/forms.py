"""The forms of landmark that are run: parallel, in chunks, and from a state."""

from __future__ import annotations

import dataclasses
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
    state_field,
)
from regard.core.precision import wide
from regard.core.visibility import Ranks, ranks
from regard.engines.cache import append, mapped, take
from regard.engines.grouped_attention import (
    PAIRS_AT_ONCE,
    Problem,
    grouped_attention,
    logits,
    normalized,
    own_groups,
    product,
)
from regard.mechanisms.landmark.definition import (
    DISK,
    Config,
    _controlled,
    _dropout,
    _landmarks,
    _opened,
    _rotated,
    check,
    check_choice,
    check_miss,
    from_end,
    miss_scores,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


NUMBERS_AT_ONCE = 1 << 24
"""Numbers of retrieved keys above which queries are taken block by block."""


@dataclass(frozen=True)
class LandmarkState(State):
    """Cached tokens of each row: complete blocks, then the incomplete one.

    The last `cached` slots of a row hold tokens, in order; the slots before them are empty. Keys are rotated at their
    ranks, but with `top_k`, where they take other places each time that their block is retrieved, they are not.
    """

    k: Float[Tensor, "b g past d"] = state_field(newest_last=True)
    v: Float[Tensor, "b g past v"] = state_field(newest_last=True)
    landmark: Bool[Tensor, "b past"] = state_field(newest_last=True)
    cached: Int[Tensor, " b"] = state_field()
    length: Int[Tensor, " b"] = state_field()
    marks: Float[Tensor, "b g blocks d"] | None = state_field(newest_last=True, default=None)
    """With `top_k` the landmarks' keys of the complete blocks that hold a token, the newest last; k and v have them too."""
    closed: Int[Tensor, "b blocks"] | None = state_field(fill=-1, newest_last=True, default=None)
    """The ranks of these landmarks; -1 where a row has fewer."""

    def select(self, indices: Int[Tensor, " rows"]) -> LandmarkState:
        return self._map(lambda t, _: t.index_select(0, indices.to(t.device)))

    def reset(self, rows: Bool[Tensor, " b"]) -> LandmarkState:
        def emptied(t: Tensor, fill: float) -> Tensor:
            marked = rows.to(t.device).view(-1, *[1] * (t.ndim - 1))
            return torch.where(marked, torch.full_like(t, fill), t)

        return self._map(emptied)

    def present(self) -> Bool[Tensor, "b past"]:
        """Slots that hold a token."""
        past = self.k.shape[2]
        return torch.arange(past, device=self.cached.device) >= past - self.cached[:, None]

    def ranks(self) -> Int[Tensor, "b past"]:
        """Rank of each slot's token in its sequence; -1 for an empty slot."""
        past = self.k.shape[2]
        rank = torch.arange(past, device=self.length.device) + (self.length[:, None] - past)
        return torch.where(self.present(), rank, -1)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Result:
    check(call, miss)
    if call.pattern.cross and call.config.bounded:
        return read(call.replace(state=absorb(call, k, v)), q)
    landmark = _landmarks(call, k)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    q, k = _rotated(call, q, k, where, landmark)
    return _attend(call, q, k, v, landmark, where, miss)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens, in chunks of `call.chunk_size`, or of the option
    `chunk`; also the step.

    The chunk size matters only where the past is not seen whole (`top_k`, `cache_blocks`).
    """
    check(call, miss)
    if call.state is not None and (call.bias is not None or call.blocks is not None):
        raise Unsupported("landmark with a bias or a block mask beside a state", supported="whole calls")
    if call.config.position_jump and call.training:
        raise Unsupported("position_jump in training with a state", supported="whole calls")
    if miss is not None and call.training:
        raise Unsupported("a miss key in training with a state", supported="whole calls")
    if not call.config.bounded:
        return _continue(call, q, k, v, miss)
    n = q.shape[2]
    if n != k.shape[2] or call.lengths is not call.memory_lengths:
        raise Unsupported(
            "landmark with top_k or cache_blocks and other queries than keys", supported="one query for each key"
        )
    _check_plain(call)
    size = call.chunk_size or call.config.chunk or max(n, 1)
    if n <= size:
        return _continue(call, q, k, v, miss)
    outputs, state = [], call.state
    for start in range(0, n, size):
        rows = slice(start, start + size)
        lengths = None if call.lengths is None else (call.lengths - start).clamp(0, min(size, n - start))
        part = call.replace(
            state=state,
            lengths=lengths,
            memory_lengths=lengths,
            roles=None if call.roles is None else call.roles[:, rows],
        )
        result = _continue(part, q[:, :, rows], k[:, :, rows], v[:, :, rows], miss)
        outputs.append(result.output)
        state = result.state
    return Result(torch.cat(outputs, 2), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> LandmarkState:
    """Memory with its landmarks into a cache; more may follow."""
    check(call, miss)
    return _append(_past(call, k, v), k, v, _landmarks(call, k), call.memory_lengths, call.config)


def read(call: Call, q: Float[Tensor, "b h n d"], miss: Float[Tensor, "g d"] | None = None) -> Result:
    """Queries on absorbed memory; with `top_k` each on the blocks that it chooses."""
    check_miss(call, miss)
    check_choice(call)
    state: LandmarkState = call.state
    if call.config.bounded:
        _check_plain(call)
    if call.config.top_k is not None and q.shape[2] and state.k.shape[2]:
        return Result(_read_blocks(call, q, state), state)
    where = _ranks(torch.arange(q.shape[2], device=q.device)[None], state.ranks())
    return _attend(call, q, state.k, state.v, state.landmark, where, miss, state)


def _check_plain(call: Call) -> None:
    """Refuse what choosing among blocks, or dropping them, does not honour."""
    if call.bias is not None or call.blocks is not None or call.position_bias is not None or "weights" in call.want:
        raise Unsupported(
            "landmark with a bias, a block mask, position biases or weights under top_k or cache_blocks",
            supported="these with top_k=None and cache_blocks=None, or in causal-self without a state",
        )


def _ranks(queries: Tensor, keys: Tensor) -> Ranks:
    return Ranks(queries, keys, offset=None, first=None, plain=False)


def _groups(call: Call, landmark: Tensor, where: Ranks) -> tuple[Ranks, Tensor, Tensor | None]:
    """Ranks, landmarks and own groups that the engine is given: without a second level, one group that is everyone's."""
    if call.config.softmax == "grouped":
        return where, landmark, None if call.pattern.cross else own_groups(where, landmark)
    if call.config.softmax == "ignore":
        where = Ranks(where.queries, torch.where(landmark, -1, where.keys), where.offset, where.first, plain=False)
    return where, torch.zeros_like(landmark), torch.zeros_like(where.queries)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmark: Tensor,
    where: Ranks,
    miss: Tensor | None,
    state: LandmarkState | None = None,
) -> Result:
    """Grouped softmax over the given keys."""
    if miss is not None and q.shape[2] and k.shape[2]:
        return _attend_missing(call, q, k, v, landmark, where, miss, state)
    problem = Problem(
        *_groups(call, landmark, where),
        causal=call.pattern.causal and not call.pattern.cross,
        scale=call.scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=_dropout(call),
        want_weights="weights" in call.want,
    )
    output, weights = grouped_attention(q, k, v, problem, call.backend)
    return Result(output, state, extras={} if weights is None else {"weights": weights})


def _with_miss(
    call: Call, near: Float[Tensor, "b h n m"], apart: Float[Tensor, "b h n r"], scores: Float[Tensor, "b h n"]
) -> tuple[Float[Tensor, "b h n m"], Float[Tensor, "b h n r"]]:
    """Weights of the tokens beside the miss key and of those that it controls, from their logits and its scores."""
    weights = normalized(torch.cat([near, scores[..., None]], -1))
    return weights[..., :-1], _opened(call, weights[..., -1:]) * normalized(apart)


def _attend_missing(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmark: Tensor,
    where: Ranks,
    miss: Tensor,
    state: LandmarkState | None,
) -> Result:
    """Grouped softmax beside a miss key, which in training controls some landmarks."""
    controlled = _controlled(call, landmark[:, None, None], miss)[:, 0, 0]
    slots = torch.arange(k.shape[2], device=k.device)
    closing = torch.where(landmark, slots, k.shape[2] - 1).flip(-1).cummin(-1).values.flip(-1)
    group = landmark.cumsum(-1) - landmark.long()
    own = own_groups(where, landmark)
    step = max(1, PAIRS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    outputs, all_weights = [], []
    for start in range(0, q.shape[2], step):
        rows, mine = q[:, :, start : start + step], own[:, start : start + step]
        here = _ranks(where.queries[:, start : start + step], where.keys)
        problem = Problem(
            here,
            landmark,
            mine,
            causal=True,
            scale=call.scale,
            bias=None if call.bias is None else _rows(call.bias, start, step),
            position_bias=call.position_bias,
            blocks=call.blocks,
            dropout=_dropout(call),
        )
        found, factors = logits(rows, k, problem)
        apart = (controlled.gather(-1, closing)[:, None] & (group[:, None] != mine[..., None]))[:, None]
        near, far = (found.masked_fill(hidden, -torch.inf) for hidden in (apart, ~apart))
        weights, opened = _with_miss(call, near, far, miss_scores(call, rows, miss))
        weights = weights + opened
        all_weights.append(weights if factors is None else weights * factors)
        outputs.append(product(_dropout(call).of_weights(all_weights[-1]), wide(v)).to(v.dtype))
    extras = {"weights": torch.cat(all_weights, 2)} if "weights" in call.want else {}
    return Result(torch.cat(outputs, 2), state, extras=extras)


def _rows(bias: Float[Tensor, "#b #h #n #m"], start: int, step: int) -> Float[Tensor, "#b #h #n #m"]:
    return bias if bias.shape[2] == 1 else bias[:, :, start : start + step]


def _past(call: Call, k: Tensor, v: Tensor) -> LandmarkState:
    if call.state is not None:
        return call.state
    none = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    landmark = torch.zeros(k.shape[0], 0, dtype=torch.bool, device=k.device)
    found = LandmarkState(_moved(k[:, :, :0], call), _moved(v[:, :, :0], call), landmark, none, none)
    if call.config.top_k is None:
        return found
    return dataclasses.replace(found, marks=k[:, :, :0], closed=torch.zeros_like(landmark, dtype=torch.long))


def _moved(x: Tensor, call: Call) -> Tensor:
    """Where the cache is."""
    offload = call.config.offload
    return x if offload is None else x.to("cpu" if offload == DISK else offload)


def _continue(call: Call, q: Tensor, k: Tensor, v: Tensor, miss: Tensor | None) -> Result:
    """One chunk: attend to the cache and the chunk, then cache the chunk."""
    config, past, landmark = call.config, _past(call, k, v), _landmarks(call, k)
    if config.top_k is not None and past.k.shape[2] > 0 and q.shape[2] > 0:
        few = q.shape[2] == 1 and call.memory_lengths is None and miss is None and not _dropout(call).random
        plain = config.softmax == "grouped" and config.selection != "max_over_heads" and config.cache_blocks is None
        begun = _unfinished(past) if few and plain else None
        state = _append(past, k, v, landmark, call.memory_lengths, config, begun)
        if begun is not None:
            return Result(_retrieve_one(call, q, k, v, landmark, past, begun), state)
        return Result(_retrieve(call, q, k, v, landmark, past, miss), state)
    where = ranks(call, q.shape[2], k.shape[2], q.device, past.ranks(), past.length)
    new = _ranks(where.queries, where.keys[:, past.k.shape[2] :])
    q, rotated = _rotated(call, q, k, new, landmark)
    state = _append(past, rotated if config.top_k is None else k, v, landmark, call.memory_lengths, config)
    if config.bounded or call.memory_lengths is not None:
        # the state has lost what this call still sees, or has it in other slots
        keys = torch.cat([past.k.to(k.device), rotated.to(past.k.dtype)], 2)
        values = torch.cat([past.v.to(v.device), v.to(past.v.dtype)], 2)
        landmark = torch.cat([past.landmark, landmark], -1)
    else:
        keys, values, landmark = state.k, state.v, state.landmark
    return _attend(call, q, keys, values, landmark, where, miss, state)


def _append(
    past: LandmarkState,
    k: Tensor,
    v: Tensor,
    landmark: Tensor,
    lengths: Tensor | None,
    config: Config,
    begun: int | None = None,
) -> LandmarkState:
    """The cache with new tokens, and without the oldest blocks when it is full.

    Args:
        begun: tokens of the incomplete block, where that is known of one row.
    """
    batch, m = k.shape[0], k.shape[2]
    new = torch.full((batch,), m, device=k.device) if lengths is None else lengths
    empty = mapped if config.offload == DISK else Tensor.new_empty
    keys, values = append(past.k, k.to(past.k), 2, empty), append(past.v, v.to(past.v), 2, empty)
    flags = append(past.landmark, landmark, 1)
    if lengths is not None and flags.shape[1]:
        # Move each row to the right over its padding, so that tokens stay next to each other.
        index = torch.arange(flags.shape[1], device=k.device) - (m - lengths)[:, None]
        first = index.clamp(min=0)
        keys, values = (take(x, first.to(x.device)) for x in (keys, values))
        # The first slot is copied over the slots that become empty: a landmark there must not count again.
        flags = flags.gather(1, first) & (index >= 0)
    state = LandmarkState(keys, values, flags, past.cached + new, past.length + new)
    if not config.bounded:
        return state
    if begun is not None and begun < config.block and not bool(landmark[0, 0]):  # a token that fits its block
        return dataclasses.replace(state, marks=past.marks, closed=past.closed)
    _check_blocks(state, m, config)
    if config.top_k is not None:
        state = _closed(past, k, state, new, config)
    if config.cache_blocks is None:
        return state
    kept = from_end(state.landmark) <= config.cache_blocks
    most = config.cache_blocks * (config.block + 1) + config.block
    return LandmarkState(
        state.k[:, :, -most:],
        state.v[:, :, -most:],
        (state.landmark & kept)[:, -most:],
        (state.present() & kept).sum(-1),
        state.length,
        state.marks,
        state.closed,
    )


def _closed(past: LandmarkState, k: Tensor, state: LandmarkState, new: Tensor, config: Config) -> LandmarkState:
    """The state with the marks of the blocks that its `new` last tokens close, which are the last ones of `k`.

    What it takes does not grow with the cache. A landmark right after another, or before any token, closes nothing.
    """
    assert past.marks is not None and past.closed is not None
    m, slots, old = k.shape[2], state.k.shape[2], past.closed.shape[1]
    if m == 0:
        return dataclasses.replace(state, marks=past.marks, closed=past.closed)
    width = min(slots, m + 1)
    place = torch.arange(slots - width, slots, device=k.device)
    landmark = state.landmark[:, slots - width :]
    token = (place >= slots - state.cached[:, None]) & ~landmark
    fresh = landmark & F.pad(token[:, :-1], (1, 0)) & (place >= slots - new[:, None])
    added = fresh.sum(-1)  # of each row
    most = (m + 1) // 2 if torch.compiler.is_compiling() or not k.shape[0] else int(added.max())
    if most == 0:
        return dataclasses.replace(state, marks=past.marks, closed=past.closed)
    order = fresh.int().argsort(dim=-1, descending=True, stable=True)[:, :most]  # places of the fresh ones first
    ranks = (place + (state.length - slots)[:, None]).gather(1, order)
    keys = take(k, (order - width + new[:, None]).clamp(0, m - 1)).to(past.marks.dtype)
    if not torch.compiler.is_compiling() and bool((added == most).all()):
        marks, closed = append(past.marks, keys, 2), append(past.closed, ranks, 1)
    else:
        blocks = min(old + most, _most_blocks(slots, config))
        column = torch.arange(blocks, device=k.device) + (old - blocks) + added[:, None]
        index = column.clamp(min=0)
        closed = torch.where(column < 0, -1, torch.cat([past.closed, ranks], 1).gather(1, index))
        marks = take(torch.cat([past.marks, keys], 2), index)
    kept = slice(None if config.cache_blocks is None else -config.cache_blocks, None)
    return dataclasses.replace(state, marks=marks[:, :, kept], closed=closed[:, kept])


def _most_blocks(past: int, config: Config) -> int:
    """Most complete blocks among `past` slots."""
    return past // (config.block + 1) + 1 if config.cache_blocks is None else min(config.cache_blocks, past)


def _check_blocks(state: LandmarkState, m: int, config: Config) -> None:
    """Refuse blocks, of which some have tokens among the `m` last slots, that are not as long as the options say."""
    past = state.k.shape[2]
    if torch.compiler.is_compiling() or state.landmark.numel() == 0:
        return
    width = min(past, m + config.block + 1)
    slots, landmark = torch.arange(past - width, past, device=state.landmark.device), state.landmark[:, past - width :]
    ends = torch.where(landmark, slots, -1).cummax(-1).values
    first = (past - state.cached[:, None]).clamp(min=past - width) - 1
    ends = torch.maximum(F.pad(ends[:, :-1], (1, 0), value=-1), first)
    tokens = torch.where((slots > first) & ~landmark, slots - ends, 0)
    longest = int(tokens.max())
    if longest > config.block:
        raise Unsupported(
            f"a block of {longest} tokens or more with block={config.block} and top_k or cache_blocks",
            supported="a landmark after each block",
            nearest=f"block={longest}",
        )
    if config.cache_blocks is None and int(state.landmark.sum(-1).max()) > _most_blocks(past, config):
        raise Unsupported(
            f"blocks of fewer than block={config.block} tokens with top_k={config.top_k}",
            supported="fewer tokens in the first block only, or any number of them with cache_blocks",
        )


def _retrieve(
    call: Call, q: Tensor, k: Tensor, v: Tensor, landmark: Tensor, past: LandmarkState, miss: Tensor | None
) -> Float[Tensor, "b h t v"]:
    """Grouped softmax over the blocks that each token and head retrieves, the incomplete block and the chunk."""
    config: Config = call.config
    batch, _, t = q.shape[:3]
    size, slots, top_k = config.block + 1, past.k.shape[2], config.top_k
    assert top_k is not None
    blocks = _cached_blocks(call, past)
    width = min(slots, config.block)
    recent = torch.arange(slots - width, slots, device=q.device) >= slots - past.cached[:, None]
    unfinished = recent & (from_end(past.landmark[:, slots - width :]) == 0)
    chunk_start = blocks.count.clamp(max=top_k + 1) * size + unfinished.sum(-1)
    near = torch.arange(width + t, device=q.device)
    exists = torch.ones(batch, t, dtype=torch.bool, device=q.device)
    if call.memory_lengths is not None:
        exists = near[:t] < call.memory_lengths[:, None]
    exists = torch.cat([unfinished, exists], -1)
    near_keys = torch.cat([past.k[:, :, slots - width :].to(q.device), k.to(past.k.dtype)], 2)
    near_values = torch.cat([past.v[:, :, slots - width :].to(q.device), v.to(past.v.dtype)], 2)
    near_landmark = torch.cat([torch.zeros_like(unfinished), landmark], -1)
    key_ranks = torch.where(exists, near, -1)
    q = wide(q)
    if call.rotate is not None:
        positions = (chunk_start[:, None] - width + near).clamp(min=0)
        q, near_keys = call.rotate(q, positions[:, width:]), call.rotate(wide(near_keys), positions)

    chosen = _chosen(call, q, blocks)
    together = config.selection == "max_over_tokens"
    far = _gathered(call, chosen, past, blocks) if together else None
    step = t if together else _at_once(call, q, v, chosen)
    outputs = []
    for start in range(0, t, step):
        rows = q[:, :, start : start + step]
        here = _ranks(near[None, width + start : width + start + rows.shape[2]], key_ranks)
        groups = _groups(call, near_landmark, here)
        problem = Problem(*groups, causal=True, scale=call.scale, dropout=_dropout(call))
        close_logits, factors = logits(rows, near_keys, problem)
        taken = _gathered(call, chosen[:, :, start : start + step], past, blocks) if far is None else far
        far_logits, far_factors = _far_logits(call, rows, taken)
        if miss is None:
            weights = normalized(torch.cat([far_logits, close_logits], -1))
        else:
            beside, apart = _with_miss(call, close_logits, far_logits, miss_scores(call, rows, miss))
            weights = torch.cat([apart, beside], -1)
        if factors is not None and far_factors is not None:
            weights = weights * torch.cat([far_factors, factors], -1)
        weights = _dropout(call).of_weights(weights)
        distant, close = weights.split([far_logits.shape[-1], close_logits.shape[-1]], -1)
        output = taken.read(distant) + product(close, wide(near_values))
        outputs.append(output.to(v.dtype))
    return torch.cat(outputs, 2)


def _unfinished(past: LandmarkState) -> int | None:
    """Tokens of the incomplete block of a single row whose cache has lost nothing; None for other caches, and where a block
    without a token follows the last one."""
    if (
        torch.compiler.is_compiling()
        or past.closed is None
        or past.closed.shape[0] != 1
        or past.k.device != past.closed.device
    ):
        return None
    slots, blocks = past.k.shape[2], past.closed.shape[1]
    if not blocks or not slots == int(past.length) == int(past.cached) or int(past.closed[0, 0]) < 0:
        return None
    last = int(past.closed[0, -1])
    return None if bool(past.landmark[0, last + 1 :].any()) else slots - 1 - last


def _retrieve_one(
    call: Call, q: Tensor, k: Tensor, v: Tensor, landmark: Tensor, past: LandmarkState, open_tokens: int
) -> Float[Tensor, "1 h 1 v"]:
    """As :func:`_retrieve` of one token of one row, in as few operations as it takes: each costs more than its arithmetic."""
    config: Config = call.config
    assert config.top_k is not None and past.marks is not None and past.closed is not None
    size, slots, blocks, heads = config.block + 1, past.k.shape[2], past.closed.shape[1], q.shape[1]
    begin = min(blocks, config.top_k + 1) * size
    near_keys = torch.cat([past.k[:, :, slots - open_tokens :], k.to(past.k.dtype)], 2)
    near_values = torch.cat([past.v[:, :, slots - open_tokens :], v.to(past.v.dtype)], 2)
    q, near_keys, marks = wide(q), wide(near_keys), wide(past.marks)
    if call.rotate is not None:
        near = torch.arange(begin, begin + open_tokens + 1, device=q.device)[None]
        q, near_keys = call.rotate(q, near[:, -1:]), call.rotate(near_keys, near)
        place = (torch.arange(begin // size - blocks, begin // size, device=q.device)).clamp(min=0)
        marks = call.rotate(marks, (place * size + config.block)[None])
    q = call.scale * q
    number = min(config.top_k, blocks)
    chosen = product(q, marks.mT)[0, :, 0].detach().topk(number, -1).indices.sort(-1).values  # (h, k)
    within = torch.arange(size, device=q.device)
    ends = past.closed[0]
    slot = ends[chosen][..., None] + (within - config.block)  # (h, k, size)
    inside = slot > F.pad(ends[:-1], (1, 0), value=-1)[chosen][..., None]
    slot = slot.clamp(min=0)
    inside = inside & ~past.landmark[0][slot]
    head = (torch.arange(heads, device=q.device) // (heads // past.k.shape[1]))[:, None, None]
    keys, values = wide(past.k[0][head, slot]).flatten(1, 2), wide(past.v[0][head, slot]).flatten(1, 2)
    if call.rotate is not None:
        at = chosen
        if blocks > config.top_k:
            at = torch.arange(number, device=q.device) + (chosen >= blocks - config.top_k)
        keys = call.rotate(keys[:, None], (at[..., None] * size + within).flatten(1))[:, 0]
    scores = (keys @ q[0].mT)[..., 0].unflatten(1, (number, size))  # (h, k, size)
    tokens = scores.masked_fill(~inside, -torch.inf)
    far = (tokens - tokens.logsumexp(-1, keepdim=True) + scores[..., -1:]).flatten(1)
    close = product(q, near_keys.mT)[0, :, 0]
    if bool(landmark[0, 0]):
        close = close[:, :-1]
        near_values = near_values[:, :, :-1]
    weights = torch.cat([far, close], -1).softmax(-1)[:, None]
    distant, close = weights.split([far.shape[-1], close.shape[-1]], -1)
    return ((distant @ values)[None] + product(close[None], wide(near_values))).to(v.dtype)


def _read_blocks(call: Call, q: Tensor, memory: LandmarkState) -> Float[Tensor, "b h n v"]:
    """Grouped softmax over the blocks of a memory that each query and head chooses."""
    blocks = _cached_blocks(call, memory)
    q = wide(q)
    chosen = _chosen(call, q, blocks)
    outputs = []
    for rows, block in zip(*(x.split(_at_once(call, q, memory.v, chosen), 2) for x in (q, chosen)), strict=True):
        taken = _gathered(call, block, memory, blocks)
        found, factors = _far_logits(call, rows, taken)
        weights = normalized(found) if factors is None else normalized(found) * factors
        outputs.append(taken.read(_dropout(call).of_weights(weights)).to(memory.v.dtype))
    return torch.cat(outputs, 2)


def _at_once(call: Call, q: Tensor, v: Tensor, chosen: Tensor) -> int:
    """Queries whose retrieved keys and values are gathered at once."""
    numbers = q.shape[0] * q.shape[1] * chosen.shape[-1] * (call.config.block + 1) * max(q.shape[3], v.shape[3])
    return max(1, min(q.shape[2], NUMBERS_AT_ONCE // max(numbers, 1)))


@dataclass(frozen=True)
class _CachedBlocks:
    """The complete blocks of a cache that hold a token, in order of time: the newest is the last column.

    Attributes:
        count: how many there are.
        begins, ends: slot before each one's tokens, and of its landmark.
        exists: whether a column is a block; there may be fewer blocks than columns.
        keys: landmark keys, rotated for scoring.
    """

    count: Int[Tensor, " b"]
    begins: Int[Tensor, "b blocks"]
    ends: Int[Tensor, "b blocks"]
    exists: Bool[Tensor, "b blocks"]
    keys: Float[Tensor, "b g blocks d"]


def _cached_blocks(call: Call, past: LandmarkState) -> _CachedBlocks:
    config: Config = call.config
    assert config.top_k is not None and past.marks is not None and past.closed is not None
    slots, blocks, size = past.k.shape[2], past.closed.shape[1], config.block + 1
    exists = past.closed >= (past.length - past.cached)[:, None]
    count, ends = exists.sum(-1), past.closed + (slots - past.length)[:, None]
    begins = F.pad(torch.where(exists, ends, -1)[:, :-1], (1, 0), value=-1)[:, :blocks]
    keys = wide(past.marks)
    if call.rotate is not None:
        number = torch.arange(blocks, device=count.device)
        place = (number - blocks + count.clamp(max=config.top_k + 1)[:, None]).clamp(min=0)
        keys = call.rotate(keys, place * size + config.block)
    return _CachedBlocks(count, begins, ends.clamp(min=0), exists, keys)


def _chosen(call: Call, q: Float[Tensor, "b h t d"], cached: _CachedBlocks) -> Int[Tensor, "b h #t k"]:
    """Columns of the blocks that are retrieved, in order of time; -1 where there are fewer."""
    config: Config = call.config
    assert config.top_k is not None
    scores = (call.scale * product(q, cached.keys.mT)).detach()
    scores = scores.masked_fill(~cached.exists[:, None, None], -torch.inf)
    if config.selection != "per_token_and_head":
        scores = torch.where(cached.exists[:, None, None], normalized(scores), -torch.inf)
        if config.selection == "max_over_heads":
            scores = scores.amax(1, keepdim=True).expand(-1, q.shape[1], -1, -1)
        else:
            valid = call.valid_keys(q.shape[2])
            seen = scores if valid is None else scores.masked_fill(~valid[:, None, :, None], 0.0)
            scores = torch.where(cached.exists[:, None, None], seen, -torch.inf).amax(2, keepdim=True)
    best = scores.topk(min(config.top_k, scores.shape[-1]), -1)
    return torch.where(best.values != -torch.inf, best.indices, -1).sort(-1).values


@dataclass(frozen=True)
class _Gathered:
    """Tokens of retrieved blocks, on the device of the call.

    Attributes:
        keys, values: placed keys, and values; the axis of queries has size 1 where all retrieve the same.
        inside: whether a place holds a token of its block, or its landmark, which is the last.
        found: whether there is a block.
    """

    keys: Float[Tensor, "b h #t k size d"]
    values: Float[Tensor, "b h #t k size v"]
    inside: Bool[Tensor, "b h #t k size"]
    found: Bool[Tensor, "b h #t k"]

    def scores(self, q: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t k size"]:
        keys = self.keys.flatten(3, 4)
        found = q @ keys[:, :, 0].mT if keys.shape[2] == 1 else (keys @ q[..., None])[..., 0]
        return found.unflatten(-1, self.keys.shape[3:5])

    def read(self, weights: Float[Tensor, "b h t r"]) -> Float[Tensor, "b h t v"]:
        values = self.values.flatten(3, 4)
        if values.shape[2] == 1:
            return weights @ wide(values[:, :, 0])
        return (weights[..., None, :] @ wide(values))[..., 0, :]


def _gathered(call: Call, block: Int[Tensor, "b h #t k"], past: LandmarkState, cached: _CachedBlocks) -> _Gathered:
    """The tokens of the chosen blocks, in the places that they take."""
    config: Config = call.config
    assert config.top_k is not None
    blocks, size, chosen = cached.ends.shape[1], config.block + 1, block.shape[-1]
    found, block = block >= 0, block.clamp(min=0)
    row = torch.arange(block.shape[0], device=block.device)[:, None, None, None]
    within = torch.arange(size, device=block.device)
    slot = cached.ends[row, block][..., None] + (within - config.block)  # (b, h, t, k, size)
    inside = (slot >= 0) & found[..., None]
    slot = slot.clamp(min=0)
    row = row[..., None]
    token = ~past.landmark[row, slot] & (slot >= past.k.shape[2] - past.cached[:, None, None, None, None])
    inside = inside & (token | (within == config.block)) & (slot > cached.begins[row[..., 0], block][..., None])
    head = torch.arange(block.shape[1], device=block.device) // (block.shape[1] // past.k.shape[1])
    place = [index.to(past.k.device) for index in (row, head[None, :, None, None, None], slot)]
    keys, values = (x[tuple(place)].to(block.device) for x in (past.k, past.v))  # (b, h, t, k, size, d)
    keys = wide(keys)
    if call.rotate is not None:
        order = config.top_k - chosen + torch.arange(chosen, device=block.device)
        newest = (block >= blocks - config.top_k).long()
        count = cached.count[:, None, None, None]
        at = torch.where(count <= config.top_k, block - blocks + count, order + newest).clamp(min=0)
        positions = at[..., None] * size + within
        flat = call.rotate(keys.flatten(3, 4).flatten(0, 2)[:, None], positions.flatten(3, 4).flatten(0, 2))
        keys = flat[:, 0].view(keys.shape)
    if config.softmax != "plain":
        inside = torch.cat([inside[..., :-1], torch.zeros_like(inside[..., -1:])], -1)
    return _Gathered(keys, values, inside, found)


def _far_logits(
    call: Call, q: Float[Tensor, "b h t d"], taken: _Gathered
) -> tuple[Float[Tensor, "b h t r"], Float[Tensor, "b h t r"] | None]:
    """Logits of the tokens of retrieved blocks, for each query and head; factors when gates are dropped."""
    config: Config = call.config
    scores, inside = call.scale * taken.scores(q), taken.inside
    if config.softmax != "grouped":
        return scores.masked_fill(~inside, -torch.inf).flatten(3), None
    gate = scores[..., -1:]
    total = torch.where(inside | ~taken.found[..., None], scores, -torch.inf).logsumexp(-1, keepdim=True)
    found = torch.where(inside, scores - total + gate, -torch.inf)
    kept = _dropout(call).of_gates(gate.shape, q)
    return found.flatten(3), None if kept is None else kept.expand_as(found).flatten(3)
