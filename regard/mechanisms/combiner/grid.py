"""The factorizations on a grid of rows: ``axial_vertical``, ``axial_horizontal``, ``axial_mixture`` and ``axial_rowmajor``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Call
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.engines.grouped_attention import normalized
from regard.mechanisms.combiner.definition import Config, Learned, activated, drop, projected_keys
from regard.mechanisms.combiner.pooling import (
    finish,
    in_rows,
    new_tokens,
    reduce_tokens,
    softmax_over,
    take,
    valid_tokens,
)
from regard.mechanisms.combiner.state import RowState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def whole(
    call: Call, q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, maps: Learned
) -> tuple[Float[Tensor, "b h n v"], tuple[Tensor, Tensor]]:
    """Outputs of whole sequences on a grid of rows, and the keys and values that a state keeps of each row."""
    config, n, device, dtype = call.config, q.shape[2], q.device, v.dtype
    s, causal = config.segment, call.pattern.causal
    exists = in_rows(valid_tokens(call.lengths, n, device), s, 1)[:, None]  # (b, 1, rows, s)
    q, k, v = (in_rows(wide(x), s) for x in (call.scale * wide(q), k, v))
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


@dataclass(frozen=True)
class _Part:
    """One part of the joint softmax: its scores, the values they weight, and how weights and values are multiplied."""

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
    """Summary key and value of the cells before each cell of a line (after it with `reverse`), and if there are any.

    The queries are already scaled.
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
        return torch.where(count[..., None] > 0, finish(config, x, count), 0)

    weights = softmax_over(pooled(q, maps.pool_q) @ k.mT, members)
    return pooled(k, maps.pool_k), drop(call, weights) @ v, count > 0


def _row_summaries(
    call: Call, q: Tensor, k: Tensor, v: Tensor, exists: Tensor, residual: Tensor | None, maps: Learned
) -> tuple[Float[Tensor, "b h rows s d"], Float[Tensor, "b h rows s v"]]:
    """Summary keys and values of whole rows, for each column's query. The queries are already scaled."""
    config: Config = call.config
    weights = drop(call, softmax_over(q @ k.mT, exists[..., None, :]))
    values, keys = weights @ v, k
    if config.row_keys in ("wsum", "wsum_proj"):
        keys = weights @ k
    if config.projected and residual is not None:
        rows = in_rows(wide(residual), config.segment, 1)
        keys = projected_keys(maps, keys if config.row_keys == "wsum_proj" else values, rows, call)
    return keys, values


def rows_so_far(
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
    length = new_tokens(call, k)
    slots = (length // s)[:, None] * s + torch.arange(s, device=device)
    remain = slots < length[:, None]

    def open_row(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, s))
        return torch.where(remain[:, None, :, None], take(x, slots), 0)

    rows = q.shape[2] // s
    keys, values = (x[:, :, :rows].expand(k.shape[0], -1, -1, -1, -1) for x in summaries)
    asked = told = column_values = None
    if config.vertical:
        finished = torch.arange(rows, device=device) < (length // s)[:, None]
        cells = [in_rows(wide(x), s)[:, :, :rows].transpose(2, 3) for x in (call.scale * wide(q), k)]
        pooled = zip(cells, (maps.pool_q, maps.pool_k), strict=True)
        asked, told = (reduce_tokens(config, activated(config, x, w), finished[:, None, None]) for x, w in pooled)
        column_values = _column_values(call, asked, keys, values, finished)
    return RowState(
        length=length,
        q=open_row(q),
        k=open_row(k),
        v=open_row(v),
        residual=None if residual is None else open_row(residual[:, None])[:, 0],
        keys=keys,
        values=values,
        asked=asked,
        told=told,
        column_values=column_values,
    )


def _column_values(
    call: Call, asked: Tensor, keys: Tensor, values: Tensor, finished: Bool[Tensor, "b rows"]
) -> Float[Tensor, "b h s v"]:
    """Summary values of the columns of finished rows, whose tokens come first in `keys` and `values`."""
    s = call.config.segment
    asked = finish(call.config, asked, finished.sum(-1)[:, None, None])
    k, v = (x[:, :, :, :s].transpose(2, 3) for x in (keys, values))
    weights = softmax_over((asked[..., None, :] @ k.mT)[..., 0, :], finished[:, None, None])
    return (drop(call, weights)[..., None, :] @ v)[..., 0, :]


def step(
    call: Call, q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, maps: Learned
) -> tuple[Float[Tensor, "b h 1 v"], RowState]:
    """One token after a state of rows."""
    config, s, device = call.config, call.config.segment, q.device
    state: RowState = call.state
    new = new_tokens(call, k)
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
    for part in range(state.keys.shape[3] // s):  # the column's tokens (or summaries), parts left, parts right
        at = (part * s + open_)[:, None, None, None, None]
        for found, x in ((keys, state.keys), (values, state.values)):
            found.append(x.gather(3, at.expand(*x.shape[:3], 1, x.shape[4]))[:, :, :, 0])
        inside = torch.ones_like(open_) if part == 0 else open_ if part == 1 else s - 1 - open_
        visible.append(earlier & (inside > 0)[:, None])
    if config.vertical:
        assert state.told is not None and state.column_values is not None
        keys.append(finish(config, state.told, finished[:, None, None]))
        values.append(state.column_values)
        visible.append((slots != open_[:, None]) & (finished > 0)[:, None])
    scores = (call.scale * wide(q)) @ torch.cat(keys, 2).mT
    weights = softmax_over(scores, torch.cat(visible, -1)[:, None, None])
    direct = s + (state.keys.shape[2] if config.factorization != "axial_rowmajor" else 0)
    weights = torch.cat([drop(call, weights[..., :direct]), weights[..., direct:]], -1)
    output = (weights @ torch.cat(values, 2)).to(v.dtype)
    row = dataclasses.replace(state, length=state.length + new, q=row_q, k=row_k, v=row_v, residual=row_x)
    closes = (new > 0) & (open_ == s - 1)
    if not values_known(closes) or bool(closes.any()):
        row = _close(call, row, closes, finished, maps)
    return output, row


def _close(call: Call, state: RowState, closes: Tensor, finished: Tensor, maps: Learned) -> RowState:
    """Turn open rows that are full into finished ones."""
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
            both = torch.maximum(past, x) if config.reduce == "max" else past + x
            return torch.where(now, torch.where(first, x, both), past)

        asked, told = grown(asked, q, maps.pool_q), grown(told, k, maps.pool_k)
        after = torch.arange(width, device=device) < (finished + closes)[:, None]
        column_values = torch.where(now, _column_values(call, asked, keys, values, after), column_values)
    return dataclasses.replace(state, keys=keys, values=values, asked=asked, told=told, column_values=column_values)
