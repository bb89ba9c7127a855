"""The forms of combiner that are run: parallel, in chunks, and from a state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    BlockMask,
    Call,
    Result,
    State,
    lengths_after,
    state_field,
    valid_from_lengths,
)
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention
from regard.engines.attention_forms import attend_to_part
from regard.engines.cache import append, append_rows
from regard.engines.grouped_attention import normalized
from regard.engines.merging import merge
from regard.mechanisms.combiner.definition import Config, Learned, _projected, activated, check, drop

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class CombinerState(State):
    """The part that both kinds of state share: the tokens of each row so far."""

    length: Int[Tensor, " b"] = state_field()


@dataclass(frozen=True)
class RowState(CombinerState):
    """Open and finished rows of s tokens: token t of the open row is in slot t, and row g of the finished ones in slot g.

    `keys` and `values` have one entry for each finished row (`fixed`), one for each of its columns (`axial_rowmajor`), or
    those of its tokens, then of the parts left of each column, then right (axial). `asked` and `told` are the running
    reductions of queries and keys over finished rows in each column, `column_values` the summaries that go with them.
    """

    q: Float[Tensor, "b h s d"] = state_field()
    k: Float[Tensor, "b h s d"] = state_field()
    v: Float[Tensor, "b h s v"] = state_field()
    residual: Float[Tensor, "b s c"] | None = state_field()
    keys: Float[Tensor, "b h rows parts d"] = state_field()
    values: Float[Tensor, "b h rows parts v"] = state_field()
    asked: Float[Tensor, "b h s d"] | None = state_field()
    told: Float[Tensor, "b h s d"] | None = state_field()
    column_values: Float[Tensor, "b h s v"] | None = state_field()


@dataclass(frozen=True)
class BlockState(CombinerState):
    """State of `logn`: all keys and values, with the rank of each slot (-1: empty), and of each level the last block of an even
    number: running reductions of its queries and keys, and its value."""

    k: Float[Tensor, "b h past d"] = state_field()
    v: Float[Tensor, "b h past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    asked: Float[Tensor, "b h levels d"] = state_field()
    told: Float[Tensor, "b h levels d"] = state_field()
    values: Float[Tensor, "b h levels v"] = state_field()


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    **learned: Tensor,
) -> Float[Tensor, "b h n v"]:
    """Whole sequences: local and summarised parts in one softmax, without an N x N matrix."""
    maps = check(call, q, k, residual, learned)
    factorization = call.config.factorization
    if factorization == "fixed":
        return _fixed(call, q, k, v, maps)[0]
    if factorization == "logn":
        return _logn(call, q, k, v, maps)[0]
    return _grid(call, q, k, v, residual, maps)[0]


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    **learned: Tensor,
) -> Result:
    """Causal-self with state in and out; also the step."""
    maps = check(call, q, k, residual, learned)
    factorization = call.config.factorization
    if factorization == "fixed":
        return _fixed_chunk(call, q, k, v, maps)
    if call.state is None:
        if factorization == "logn":
            return Result(*_logn(call, q, k, v, maps))
        output, summaries = _grid(call, q, k, v, residual, maps)
        return Result(output, _rows_so_far(call, q, k, v, residual, maps, summaries))
    state, outputs = call.state, []
    for t in range(q.shape[2]):
        lengths = None if call.lengths is None else (call.lengths > t).long()
        part = call.replace(state=state, lengths=lengths, memory_lengths=lengths)
        token = q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1]
        if factorization == "logn":
            output, state = _logn_step(part, *token, maps)
        else:
            output, state = _grid_step(part, *token, None if residual is None else residual[:, t : t + 1], maps)
        outputs.append(output)
    return Result(torch.cat(outputs, 2) if outputs else torch.zeros_like(v), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    pool_q: Float[Tensor, "d d"] | None = None,
    pool_k: Float[Tensor, "d d"] | None = None,
) -> RowState:
    """Memory into rows; more may follow."""
    maps = check(call, k, k, residual, {"pool_q": pool_q, "pool_k": pool_k})
    return _extend(call, k, k, v, maps).state


def read(call: Call, q: Float[Tensor, "b h n d"], **learned: Tensor) -> Result:
    """Queries on the summaries of absorbed memory, the open row's among them."""
    state: RowState = call.state
    maps = check(call, q, q, None, learned)
    s = call.config.segment
    finished, open_ = state.length // s, state.length % s
    valid = valid_from_lengths(open_, s)[:, None]
    row_q, row_k, row_v = (wide(x)[:, :, None] for x in (state.q, state.k, state.v))
    key, value, _ = _summaries(call, row_q, row_k, row_v, valid, maps)
    keys = torch.cat([state.keys[:, :, :, 0], key], 2)
    values = torch.cat([state.values[:, :, :, 0], value], 2)
    slots = torch.arange(state.keys.shape[2], device=q.device)
    exists = torch.cat([slots < finished[:, None], (open_ > 0)[:, None]], -1)
    return Result(_far_only(call, q, keys, values, exists), state)


def _reduced(config: Config, x: Float[Tensor, "... t d"], exists: Bool[Tensor, "... t"]) -> Float[Tensor, "... d"]:
    """Largest number or sum over the tokens that exist; 0 where none does."""
    if config.reduce != "max" or x.shape[-2] == 0:
        return torch.where(exists[..., None], x, 0).sum(-2)
    largest = torch.where(exists[..., None], x, -torch.inf).amax(-2)
    return torch.where(exists.any(-1)[..., None], largest, 0)


def _finished(config: Config, x: Float[Tensor, "... d"], count: Tensor) -> Float[Tensor, "... d"]:
    """The values that a running reduction over `count` tokens pools."""
    return x / count.clamp(min=1)[..., None] if config.reduce == "mean" else x


def _together(config: Config, first: Tensor, second: Tensor) -> Tensor:
    return torch.maximum(first, second) if config.reduce == "max" else first + second


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Over what is visible; 0 where nothing is."""
    return normalized(torch.where(visible, scores, -torch.inf))


def _summaries(
    call: Call,
    q: Float[Tensor, "b h rows s d"],
    k: Float[Tensor, "b h rows s d"],
    v: Float[Tensor, "b h rows s v"],
    exists: Bool[Tensor, "#b rows s"],
    maps: Learned,
) -> tuple[Float[Tensor, "b h rows d"], Float[Tensor, "b h rows v"], Bool[Tensor, "#b rows"]]:
    """Key and value of each row, and whether it has a token."""
    config, exists = call.config, exists[:, None]
    count = exists.sum(-1)
    asked = _finished(config, _reduced(config, activated(config, call.scale * q, maps.pool_q), exists), count)
    told = _finished(config, _reduced(config, activated(config, k, maps.pool_k), exists), count)
    weights = _softmax((asked[..., None, :] @ k.mT)[..., 0, :], exists)
    return told, (drop(call, weights)[..., None, :] @ v)[..., 0, :], count[:, 0] > 0


def _fixed(
    call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned
) -> tuple[Float[Tensor, "b h n v"], tuple[Tensor, Tensor]]:
    """Whole sequences; and the keys and values of all rows."""
    config, n, m, device = call.config, q.shape[2], k.shape[2], q.device
    valid = _valid(call.memory_lengths, m, device)
    asking = k if call.pattern.cross else q
    rows_q, rows_k, rows_v = (_in_rows(wide(x), config.segment) for x in (asking, k, v))
    keys, values, exists = _summaries(call, rows_q, rows_k, rows_v, _in_rows(valid, config.segment, 1), maps)
    if call.pattern.cross:
        return _far_only(call, q, keys, values, exists), (keys, values)
    slots, row = torch.arange(n, device=device)[None], torch.arange(keys.shape[2], device=device)[None]
    near = Ranks(slots, torch.where(valid, slots, -1), 0, 0, plain=call.lengths is None)
    causal, own = call.pattern.causal, block_numbers(slots, config.segment)
    # the rank of a row before the own one is at most that of the query
    far = Ranks(own - 1 if causal else own, torch.where(exists, row, -1), None, None, plain=False)
    hidden = None
    if config.exclude_self_segment and not causal:
        hidden = BlockMask(~torch.eye(keys.shape[2], dtype=torch.bool, device=device)[None, None], 1)
    return _near_and_far(call, q, (k, v, near), (keys, values, far), hidden), (keys, values)


def _near_and_far(
    call: Call,
    q: Tensor,
    near: tuple[Tensor, Tensor, Ranks],
    far: tuple[Tensor, Tensor, Ranks],
    blocks: BlockMask | None = None,
) -> Float[Tensor, "b h n v"]:
    """One softmax over tokens of the own row and the summaries of others: two attentions, joined by their sums."""
    causal, dtype = call.pattern.causal, q.dtype
    q = wide(q)
    direct, direct_sum = attend_to_part(call, q, *near, Visibility(causal=causal, block=call.config.segment))
    summed, summed_sum = attend_to_part(call, q, *far, Visibility(causal=causal), blocks=blocks, dropout=0.0)
    return merge([direct, summed], [direct_sum, summed_sum]).to(dtype)


def _far_only(call: Call, q: Tensor, keys: Tensor, values: Tensor, exists: Tensor) -> Float[Tensor, "b h n v"]:
    """Softmax over summaries alone."""
    slots = torch.arange(keys.shape[2], device=q.device)
    where = Ranks(torch.arange(q.shape[2], device=q.device)[None], torch.where(exists, slots, -1), None, None, False)
    output, _, _ = attention(
        wide(q), keys, values, where, visibility=Visibility(), scale=call.scale, backend=call.backend
    )
    return output.to(q.dtype)


@dataclass(frozen=True)
class _Extended:
    """A state of finished rows with new tokens, and what the new queries see: `k` and `v` from the start of the row that
    was open, whose first `open` slots came before."""

    state: RowState
    k: Tensor
    v: Tensor
    open: Int[Tensor, " b"]


def _extend(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> _Extended:
    """Finish rows with new tokens. Rows of the batch need not be at the same place."""
    s, batch, m, device = call.config.segment, k.shape[0], k.shape[2], k.device
    past: RowState = _no_rows(call, q, k, v, None) if call.state is None else call.state
    new = torch.full((batch,), m, device=device) if call.memory_lengths is None else call.memory_lengths
    open_, finished = past.length % s, past.length // s
    slots = torch.arange(s + m, device=device)
    source = torch.where(slots < open_[:, None], slots, s + slots - open_[:, None]).clamp(max=s + m - 1)
    q, k, v = (
        _take(torch.cat([before, x.to(before.dtype)], 2), source)
        for before, x in ((past.q, q), (past.k, k), (past.v, v))
    )
    total = open_ + new
    closed = total // s
    exists = valid_from_lengths(total, s + m)
    rows_q, rows_k, rows_v = (_in_rows(wide(x), s) for x in (q, k, v))
    keys, values, _ = _summaries(call, rows_q, rows_k, rows_v, _in_rows(exists, s, 1), maps)

    keys, values = (
        append_rows(old[:, :, :, 0], finished, x, closed) for old, x in ((past.keys, keys), (past.values, values))
    )
    left = closed[:, None] * s + torch.arange(s, device=device)
    remain = (left < total[:, None])[:, None, :, None]
    q, open_k, open_v = (torch.where(remain, _take(x, left.clamp(max=s + m - 1)), 0) for x in (q, k, v))
    state = RowState(
        past.length + new,
        q,
        open_k,
        open_v,
        None,
        keys[:, :, :, None],
        values[:, :, :, None],
        None,
        None,
        None,
    )
    return _Extended(state, k, v, open_)


def _fixed_chunk(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> Result:
    """Any number of tokens after a state of finished rows."""
    s, n, device = call.config.segment, q.shape[2], q.device
    found = _extend(call, q, k, v, maps)
    places = found.open[:, None] + torch.arange(n, device=device)
    near = Ranks(places, torch.arange(s + n, device=device)[None], None, None, plain=False)
    finished = (found.state.length - _new(call, k)) // s
    keys, values = found.state.keys[:, :, :, 0], found.state.values[:, :, :, 0]
    rows = torch.arange(keys.shape[2], device=device)[
        None
    ]  # those that a row of the batch lacks come after its queries
    far = Ranks(places // s + finished[:, None] - 1, rows, None, None, plain=False)
    return Result(_near_and_far(call, q, (found.k, found.v, near), (keys, values, far)), found.state)


def _new(call: Call, k: Tensor) -> Int[Tensor, " b"]:
    """Tokens of each row in this call."""
    return lengths_after(None, call.memory_lengths, k.shape[0], k.shape[2], k.device)


def _no_rows(call: Call, q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None) -> RowState:
    """The state before the first token."""
    config, (batch, heads), s = call.config, k.shape[:2], call.config.segment
    parts = 1 if config.factorization == "fixed" else 3 * s if config.horizontal else s
    key, value = wide(k[:, :, :0]), wide(v[:, :, :0])
    columns = [x.new_zeros(batch, heads, s, x.shape[-1]) if config.vertical else None for x in (key, key, value)]
    open_q, open_k, open_v = (x.new_zeros(batch, heads, s, x.shape[-1]) for x in (q, k, v))
    return RowState(
        torch.zeros(batch, dtype=torch.long, device=k.device),
        open_q,
        open_k,
        open_v,
        None if residual is None else residual.new_zeros(batch, s, residual.shape[-1]),
        key.new_zeros(batch, heads, 0, parts, key.shape[-1]),
        value.new_zeros(batch, heads, 0, parts, value.shape[-1]),
        *columns,
    )


def _valid(lengths: Tensor | None, m: int, device: torch.device) -> Bool[Tensor, "#b m"]:
    if lengths is None:
        return torch.ones(1, m, dtype=torch.bool, device=device)
    return valid_from_lengths(lengths, m)


def _in_rows(x: Tensor, s: int, axis: int = 2) -> Tensor:
    """The token axis as (rows, s), with zeros (False) after the last token; at least one row."""
    after = max(s - x.shape[axis], 0) if x.shape[axis] < s else -x.shape[axis] % s
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, after)).unflatten(axis, (-1, s))


def _take(x: Float[Tensor, "b h m d"], slots: Int[Tensor, "b j"]) -> Float[Tensor, "b h j d"]:
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@dataclass(frozen=True)
class _Part:
    """Scores of one part of the joint softmax, what they weigh, and how weights and values are multiplied."""

    scores: Float[Tensor, "b h rows s width"]
    visible: Bool[Tensor, "#b #h #rows #s width"]
    values: Float[Tensor, "b h rows s v"]
    along_columns: bool
    direct: bool = False

    def output(self, weights: Tensor) -> Tensor:
        if self.along_columns:
            return (weights.transpose(2, 3) @ self.values.transpose(2, 3)).transpose(2, 3)
        return weights @ self.values


def _along_columns(q: Tensor, keys: Tensor) -> Float[Tensor, "b h rows s rows2"]:
    """q_rc . key_tc for each t."""
    return (q.transpose(2, 3) @ keys.transpose(2, 3).mT).transpose(2, 3)


def _grid(
    call: Call, q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, maps: Learned
) -> tuple[Float[Tensor, "b h n v"], tuple[Tensor, Tensor]]:
    """Whole sequences on a grid of rows; and what a state keeps of each row."""
    config, n, device, dtype = call.config, q.shape[2], q.device, v.dtype
    s, causal = config.segment, call.pattern.causal
    exists = _in_rows(_valid(call.lengths, n, device), s, 1)[:, None]  # (b, 1, rows, s)
    q, k, v = (_in_rows(wide(x), s) for x in (call.scale * wide(q), k, v))
    number, place = torch.arange(q.shape[2], device=device), torch.arange(s, device=device)
    earlier = number < number[:, None]
    other = earlier if causal else number != number[:, None]
    own_row = (place <= place[:, None]) & exists[..., None, :] if causal else exists[..., None, :]
    parts = [_Part(q @ k.mT, own_row.expand(-1, -1, -1, s, -1), v, False, direct=True)]

    def column(keys: Tensor, values: Tensor, there: Tensor, rows: Tensor, *, direct: bool = False) -> _Part:
        visible = rows[:, None] & there.transpose(2, 3)[:, :, None]  # (b, 1, rows, s, rows)
        return _Part(_along_columns(q, keys), visible, values, True, direct)

    if config.factorization == "axial_rowmajor":
        keys, values = _row_summaries(call, q, k, v, exists, residual, maps)
        last = exists.sum(-1, keepdim=True) - 1
        at = torch.minimum(place, last).clamp(min=0)[..., None]
        asked_k, asked_v = (x.gather(3, at.expand(*x.shape[:2], -1, -1, x.shape[-1])) for x in (keys, values))
        rows = other if causal or config.exclude_self_segment else torch.ones_like(other)
        parts.append(column(asked_k, asked_v, exists.any(-1, keepdim=True).expand(-1, -1, -1, s), rows))
        return _joint(call, parts, n).to(dtype), (keys, values)
    parts.append(column(k, v, exists, other, direct=True))
    kept = [(k, v)]
    sides = (False,) if causal else (False, True)
    if config.vertical:
        lines_q, lines_k, lines_v, there = (x.transpose(2, 3) for x in (q, k, v, exists))
        for reverse in sides:
            beside = _beside(call, lines_q, lines_k, lines_v, there, maps, reverse)
            keys, values, some = (x.transpose(2, 3) for x in beside)
            visible = (place != place[:, None]) & some[..., None, :]
            parts.append(_Part(q @ keys.mT, visible, values, False))
    if config.horizontal:
        for reverse in (False, True):
            keys, values, some = _beside(call, q, k, v, exists, maps, reverse)
            kept.append((keys, values))
            parts.append(column(keys, values, some, other))
    keys, values = (torch.cat(x, 3) for x in zip(*kept, strict=True))
    return _joint(call, parts, n).to(dtype), (keys, values)


def _joint(call: Call, parts: list[_Part], n: int) -> Float[Tensor, "b h n v"]:
    """One softmax over all parts."""
    scores = torch.cat([torch.where(part.visible, part.scores, -torch.inf) for part in parts], -1)
    shares = normalized(scores).split([part.scores.shape[-1] for part in parts], -1)
    output = torch.zeros((), dtype=scores.dtype, device=scores.device)
    for part, share in zip(parts, shares, strict=True):
        output = output + part.output(drop(call, share) if part.direct else share)
    return output.flatten(2, 3)[:, :, :n]


def _beside(
    call: Call, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, maps: Learned, reverse: bool
) -> tuple[Float[Tensor, "b h lines c d"], Float[Tensor, "b h lines c v"], Bool[Tensor, "b 1 lines c"]]:
    """For each cell of each line, key and value of the cells before it (with `reverse` after it), and if there are any.

    Queries are scaled.
    """
    config, cells = call.config, torch.arange(q.shape[3], device=q.device)
    before = cells > cells[:, None] if reverse else cells < cells[:, None]
    members = before & exists[..., None, :]  # (b, 1, lines, c, c)
    count = members.sum(-1)

    def pooled(x: Tensor, weight: Tensor | None) -> Tensor:
        x = torch.where(exists[..., None], activated(config, x, weight), -torch.inf if config.reduce == "max" else 0)
        x = x.flip(3) if reverse else x
        x = x.cummax(3).values if config.reduce == "max" else x.cumsum(3)
        x = F.pad(x[:, :, :, :-1], (0, 0, 1, 0))
        x = x.flip(3) if reverse else x
        return torch.where(count[..., None] > 0, _finished(config, x, count), 0)

    weights = _softmax(pooled(q, maps.pool_q) @ k.mT, members)
    return pooled(k, maps.pool_k), drop(call, weights) @ v, count > 0


def _row_summaries(
    call: Call, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, residual: Tensor | None, maps: Learned
) -> tuple[Float[Tensor, "b h rows s d"], Float[Tensor, "b h rows s v"]]:
    """Keys and values of whole rows as each column asks for them. Queries are scaled."""
    config: Config = call.config
    weights = drop(call, _softmax(q @ k.mT, exists[..., None, :]))
    values, keys = weights @ v, k
    if config.row_keys in ("wsum", "wsum_proj"):
        keys = weights @ k
    if config.projected and residual is not None:
        rows = _in_rows(wide(residual), config.segment, 1)
        keys = _projected(maps, keys if config.row_keys == "wsum_proj" else values, rows, call)
    return keys, values


def _rows_so_far(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    maps: Learned,
    summaries: tuple[Tensor, Tensor],
) -> RowState:
    """The state after a whole sequence on a grid."""
    config, s, device = call.config, call.config.segment, k.device
    empty, length = _no_rows(call, q, k, v, residual), _new(call, k)
    slots = (length // s)[:, None] * s + torch.arange(s, device=device)
    remain = slots < length[:, None]

    def open_row(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, s))
        return torch.where(remain[:, None, :, None], _take(x, slots), 0)

    rows = q.shape[2] // s
    keys, values = (x[:, :, :rows].expand(k.shape[0], -1, -1, -1, -1) for x in summaries)
    asked = told = column_values = None
    if config.vertical:
        finished = torch.arange(rows, device=device) < (length // s)[:, None]
        cells = [_in_rows(wide(x), s)[:, :, :rows].transpose(2, 3) for x in (call.scale * wide(q), k)]
        pooled = zip(cells, (maps.pool_q, maps.pool_k), strict=True)
        asked, told = (_reduced(config, activated(config, x, w), finished[:, None, None]) for x, w in pooled)
        column_values = _column_values(call, asked, keys, values, finished)
    return RowState(
        empty.length + length,
        open_row(q),
        open_row(k),
        open_row(v),
        None if residual is None else open_row(residual[:, None])[:, 0],
        keys,
        values,
        asked,
        told,
        column_values,
    )


def _column_values(
    call: Call, asked: Tensor, keys: Tensor, values: Tensor, finished: Bool[Tensor, "b rows"]
) -> Float[Tensor, "b h s v"]:
    """Values of the columns of finished rows, whose own keys and values come first in the state's."""
    s = call.config.segment
    asked = _finished(call.config, asked, finished.sum(-1)[:, None, None])
    k, v = (x[:, :, :, :s].transpose(2, 3) for x in (keys, values))
    weights = _softmax((asked[..., None, :] @ k.mT)[..., 0, :], finished[:, None, None])
    return (drop(call, weights)[..., None, :] @ v)[..., 0, :]


def _grid_step(
    call: Call, q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, maps: Learned
) -> tuple[Float[Tensor, "b h 1 v"], RowState]:
    """One token after a state of rows."""
    config, s, device = call.config, call.config.segment, q.device
    state: RowState = call.state
    new = _new(call, k)
    open_, finished = state.length % s, state.length // s
    slots = torch.arange(s, device=device)
    here = ((slots == open_[:, None]) & (new > 0)[:, None])[:, None, :, None]
    row_q, row_k, row_v = (
        torch.where(here, x.to(row.dtype), row) for x, row in ((q, state.q), (k, state.k), (v, state.v))
    )
    row_x = state.residual
    if row_x is not None and residual is not None:
        row_x = torch.where(here[:, 0], residual.to(row_x.dtype), row_x)

    earlier = torch.arange(state.keys.shape[2], device=device) < finished[:, None]
    keys, values, visible = [wide(row_k)], [wide(row_v)], [slots <= open_[:, None]]
    for part in range(state.keys.shape[3] // s):  # own tokens (or summaries), what is left of the column, what is right
        at = (part * s + open_)[:, None, None, None, None]
        for found, x in ((keys, state.keys), (values, state.values)):
            found.append(x.gather(3, at.expand(*x.shape[:3], 1, x.shape[4]))[:, :, :, 0])
        inside = torch.ones_like(open_) if part == 0 else open_ if part == 1 else s - 1 - open_
        visible.append(earlier & (inside > 0)[:, None])
    if config.vertical:
        assert state.told is not None and state.column_values is not None
        keys.append(_finished(config, state.told, finished[:, None, None]))
        values.append(state.column_values)
        visible.append((slots != open_[:, None]) & (finished > 0)[:, None])
    scores = (call.scale * wide(q)) @ torch.cat(keys, 2).mT
    weights = _softmax(scores, torch.cat(visible, -1)[:, None, None])
    direct = s + (state.keys.shape[2] if config.factorization != "axial_rowmajor" else 0)
    weights = torch.cat([drop(call, weights[..., :direct]), weights[..., direct:]], -1)
    output = (weights @ torch.cat(values, 2)).to(v.dtype)
    row = dataclasses.replace(state, length=state.length + new, q=row_q, k=row_k, v=row_v, residual=row_x)
    closes = (new > 0) & (open_ == s - 1)
    if not values_known(closes) or bool(closes.any()):
        row = _close(call, row, closes, finished, maps)
    return output, row


def _close(call: Call, state: RowState, closes: Tensor, finished: Tensor, maps: Learned) -> RowState:
    """The open rows that are full become finished ones."""
    config, device = call.config, state.k.device
    q, k, v = (wide(x)[:, :, None] for x in (call.scale * wide(state.q), state.k, state.v))
    exists = torch.ones(1, 1, 1, config.segment, dtype=torch.bool, device=device)
    if config.factorization == "axial_rowmajor":
        parts = [_row_summaries(call, q, k, v, exists, state.residual, maps)]
    else:
        parts = [(k, v)]
        if config.horizontal:
            parts += [_beside(call, q, k, v, exists, maps, reverse)[:2] for reverse in (False, True)]
    row = [torch.cat(x, 3) for x in zip(*parts, strict=True)]
    width = state.keys.shape[2] + 1
    if values_known(finished):
        width = max(state.keys.shape[2], int((finished + closes).max()))
    place = torch.arange(width, device=device)
    here = ((place == finished[:, None]) & closes[:, None])[:, None, :, None, None]
    keys, values = (
        torch.where(here, x, F.pad(past, (0, 0, 0, 0, 0, width - past.shape[2])))
        for x, past in zip(row, (state.keys, state.values), strict=True)
    )
    asked, told, column_values = state.asked, state.told, state.column_values
    if asked is not None and told is not None and column_values is not None:
        first, now = (finished == 0)[:, None, None, None], closes[:, None, None, None]

        def grown(past: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
            x = activated(config, x[:, :, 0], weight)
            return torch.where(now, torch.where(first, x, _together(config, past, x)), past)

        asked, told = grown(asked, q, maps.pool_q), grown(told, k, maps.pool_k)
        after = torch.arange(width, device=device) < (finished + closes)[:, None]
        column_values = torch.where(now, _column_values(call, asked, keys, values, after), column_values)
    return dataclasses.replace(state, keys=keys, values=values, asked=asked, told=told, column_values=column_values)


def _logn(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> tuple[Float[Tensor, "b h n v"], BlockState]:
    """Whole sequences, and the state after them."""
    config, n, device = call.config, q.shape[2], q.device
    length, rank = _new(call, k), torch.arange(n, device=device)
    after = -n % (1 << max(n.bit_length() - 4, 0))  # so that most levels part whole blocks
    queries, keys, values = (F.pad(x, (0, 0, 0, after)) for x in (call.scale * wide(q), wide(k), wide(v)))
    asking, telling = activated(config, queries, maps.pool_q), activated(config, keys, maps.pool_k)
    scores, blocks, last = [(queries * keys).sum(-1)], [], []
    for level in range(n.bit_length()):
        size = 1 << level
        # Of each two blocks the tokens of the second read the summary of the first.
        asked, told, k_first, v_first = (_halves(x, size)[:, :, :, 0] for x in (asking, telling, keys, values))
        asked, told = (x.amax(3) if config.reduce == "max" else x.sum(3) for x in (asked, told))
        count = torch.tensor(size, device=device)
        weights = _products(k_first, _finished(config, asked, count)).softmax(-1)
        block = (drop(call, weights)[..., None, :] @ v_first)[..., 0, :]
        read = _products(_halves(queries, size)[:, :, :, 1], _finished(config, told, count))
        scores.append(F.pad(read[:, :, :, None], (0, 0, 1, 0), value=-torch.inf).flatten(2)[:, :, : n + after])
        blocks.append(block)
        latest = (((length >> level) - 1).clamp(min=0) >> 1)[:, None]
        last.append([_take(x, latest) for x in (asked, told, block)])
    shares = torch.stack(scores, -1).softmax(-1)
    output = drop(call, shares[..., :1]) * values
    for level, block in enumerate(blocks):
        share, sums = (_halves(x, 1 << level) for x in (shares[..., level + 1, None], output))  # 0 in first halves
        output = torch.addcmul(sums, share, block[:, :, :, None, None]).flatten(2, 4)[:, :, : n + after]
    slots = torch.where(_valid(call.lengths, n, device), rank, -1).expand(k.shape[0], -1)
    levels = [torch.cat(x, 2) for x in zip(*last, strict=True)] if last else [queries, keys, values]
    return output[:, :, :n].to(v.dtype), BlockState(length, k, v, slots, *levels)


def _halves(x: Float[Tensor, "b h n d"], size: int) -> Float[Tensor, "b h pairs 2 size d"]:
    """Tokens by pairs of blocks, with zeros after the last one."""
    after = -x.shape[2] % (2 * size)
    return (F.pad(x, (0, 0, 0, after)) if after else x).unflatten(2, (-1, 2, size))


def _products(x: Float[Tensor, "... size d"], y: Float[Tensor, "... d"]) -> Float[Tensor, "... size"]:
    """x_i . y; many small matrix products would cost more than the numbers between."""
    return (x @ y[..., None])[..., 0] if x.shape[-2] >= 16 else (x * y[..., None, :]).sum(-1)


def _logn_step(
    call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned
) -> tuple[Float[Tensor, "b h 1 v"], BlockState]:
    """One token after a state of blocks: it reads the blocks of its bits, then completes one."""
    config, state, device = call.config, call.state, q.device
    new = _new(call, k)
    rank, active = state.length, new > 0
    ranks = append(state.ranks, torch.where(active, rank, -1)[:, None], 1)
    all_k, all_v = (append(past, x.to(past.dtype), 2) for past, x in ((state.k, k), (state.v, v)))
    levels = max(state.asked.shape[2], ranks.shape[1].bit_length())
    asked, told, values = (F.pad(x, (0, 0, 0, levels - x.shape[2])) for x in (state.asked, state.told, state.values))
    level = torch.arange(levels, device=device)
    query, key, value = call.scale * wide(q), wide(k), wide(v)
    keys = torch.cat([key, _finished(config, told, 1 << level)], 2)
    bits = (rank[:, None] >> level & 1).bool()
    visible = torch.cat([torch.ones_like(bits[:, :1]), bits], -1)[:, None, None]
    weights = _softmax(query @ keys.mT, visible)
    weights = torch.cat([drop(call, weights[..., :1]), weights[..., 1:]], -1)
    output = (weights @ torch.cat([value, values], 2)).to(v.dtype)

    # The blocks of the levels below the lowest zero bit of the rank, and the token, make the block that is complete now.
    below = (~bits).long().cumsum(-1) == 0
    top = below.sum(-1)  # its level
    width = ranks.shape[1]
    members = ranks >= (rank + 1 - (1 << top))[:, None]
    if values_known(active) and active.any():
        last = min(1 << int(top[active].max()), width)
        if not bool(members[:, : width - last].any()):
            members, recent_k, recent_v = members[:, width - last :], all_k[:, :, -last:], all_v[:, :, -last:]
        else:
            recent_k, recent_v = all_k, all_v
    else:
        recent_k, recent_v = all_k, all_v
    parts = torch.cat([torch.ones_like(below[:, :1]), below], -1)[:, None]

    def reduced(x: Tensor, past: Tensor, weight: Tensor | None) -> Tensor:
        return _reduced(config, torch.cat([activated(config, x, weight), past], 2), parts)

    asks, tells = reduced(query, asked, maps.pool_q), reduced(key, told, maps.pool_k)
    pooled = _finished(config, asks, (1 << top)[:, None])[:, :, None]
    weights = drop(call, _softmax(pooled @ wide(recent_k).mT, members[:, None, None]))
    block = (weights @ wide(recent_v))[:, :, 0]
    here = ((level == top[:, None]) & active[:, None])[:, None, :, None]
    asked, told, values = (
        torch.where(here, x[:, :, None], past) for x, past in ((asks, asked), (tells, told), (block, values))
    )
    return output, BlockState(rank + new, all_k, all_v, ranks, asked, told, values)
