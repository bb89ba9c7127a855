"""The factorization ``fixed``: tokens of the own row, and one summary of each other row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import BlockMask, Call, Result, valid_from_lengths
from regard.core.precision import wide
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention
from regard.engines.attention_forms import attend_to_part
from regard.engines.cache import append_rows
from regard.engines.merging import merge
from regard.mechanisms.combiner.definition import Learned, activated, check, drop
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
    from jaxtyping import Bool, Float, Int


def whole(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> Float[Tensor, "b h n v"]:
    """Whole sequences."""
    config, n, m, device = call.config, q.shape[2], k.shape[2], q.device
    valid = valid_tokens(call.memory_lengths, m, device)
    asking = k if call.pattern.cross else q
    rows_q, rows_k, rows_v = (in_rows(wide(x), config.segment) for x in (asking, k, v))
    keys, values, exists = _summaries(call, rows_q, rows_k, rows_v, in_rows(valid, config.segment, 1), maps)
    if call.pattern.cross:
        return _far_only(call, q, keys, values, exists)
    slots, row = torch.arange(n, device=device)[None], torch.arange(keys.shape[2], device=device)[None]
    near = Ranks(slots, torch.where(valid, slots, -1), 0, 0, plain=call.lengths is None)
    causal, own = call.pattern.causal, block_numbers(slots, config.segment)
    # in causal-self a query sees the rows up to the one before its own
    far = Ranks(own - 1 if causal else own, torch.where(exists, row, -1), None, None, plain=False)
    hidden = None
    if config.exclude_self_segment and not causal:
        hidden = BlockMask(~torch.eye(keys.shape[2], dtype=torch.bool, device=device)[None, None], 1)
    return _near_and_far(call, q, (k, v, near), (keys, values, far), hidden)


def continued(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> Result:
    """Continue a state of finished rows by any number of tokens."""
    s, n, device = call.config.segment, q.shape[2], q.device
    found = _extend(call, q, k, v, maps)
    places = found.open[:, None] + torch.arange(n, device=device)
    near = Ranks(places, torch.arange(s + n, device=device)[None], None, None, plain=False)
    finished = (found.state.length - new_tokens(call, k)) // s
    keys, values = found.state.keys[:, :, :, 0], found.state.values[:, :, :, 0]
    # slots beyond a sequence's finished rows rank after its queries, and are hidden
    rows = torch.arange(keys.shape[2], device=device)[None]
    far = Ranks(places // s + finished[:, None] - 1, rows, None, None, plain=False)
    return Result(_near_and_far(call, q, (found.k, found.v, near), (keys, values, far)), found.state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    pool_q: Float[Tensor, "d d"] | None = None,
    pool_k: Float[Tensor, "d d"] | None = None,
) -> RowState:
    """Absorb memory into rows; may be called repeatedly."""
    maps = check(call, k, k, residual, {"pool_q": pool_q, "pool_k": pool_k})
    return _extend(call, k, k, v, maps).state


def read(call: Call, q: Float[Tensor, "b h n d"], **learned: Tensor) -> Result:
    """Attend to the summaries of absorbed memory, including that of the open row."""
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
    asked = finish(config, reduce_tokens(config, activated(config, call.scale * q, maps.pool_q), exists), count)
    told = finish(config, reduce_tokens(config, activated(config, k, maps.pool_k), exists), count)
    weights = softmax_over((asked[..., None, :] @ k.mT)[..., 0, :], exists)
    return told, (drop(call, weights)[..., None, :] @ v)[..., 0, :], count[:, 0] > 0


def _near_and_far(
    call: Call,
    q: Tensor,
    near: tuple[Tensor, Tensor, Ranks],
    far: tuple[Tensor, Tensor, Ranks],
    blocks: BlockMask | None = None,
) -> Float[Tensor, "b h n v"]:
    """One softmax over the own row's tokens and other rows' summaries: two attentions merged by their log-sum-exps."""
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
    """A state extended by new tokens, and the keys and values near their queries: `k` and `v` from the start of the row
    that was open, whose first `open` slots are older tokens."""

    state: RowState
    k: Tensor
    v: Tensor
    open: Int[Tensor, " b"]


def _extend(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> _Extended:
    """Extend a state by new tokens and finish its full rows. Sequences of the batch may have different lengths."""
    s, batch, m, device = call.config.segment, k.shape[0], k.shape[2], k.device
    past: RowState = _no_rows(call, q, k, v) if call.state is None else call.state
    new = torch.full((batch,), m, device=device) if call.memory_lengths is None else call.memory_lengths
    open_, finished = past.length % s, past.length // s
    slots = torch.arange(s + m, device=device)
    source = torch.where(slots < open_[:, None], slots, s + slots - open_[:, None]).clamp(max=s + m - 1)
    q, k, v = (
        take(torch.cat([before, x.to(before.dtype)], 2), source)
        for before, x in ((past.q, q), (past.k, k), (past.v, v))
    )
    total = open_ + new
    closed = total // s
    exists = valid_from_lengths(total, s + m)
    rows_q, rows_k, rows_v = (in_rows(wide(x), s) for x in (q, k, v))
    keys, values, _ = _summaries(call, rows_q, rows_k, rows_v, in_rows(exists, s, 1), maps)

    keys, values = (
        append_rows(old[:, :, :, 0], finished, x, closed) for old, x in ((past.keys, keys), (past.values, values))
    )
    left = closed[:, None] * s + torch.arange(s, device=device)
    remain = (left < total[:, None])[:, None, :, None]
    q, open_k, open_v = (torch.where(remain, take(x, left.clamp(max=s + m - 1)), 0) for x in (q, k, v))
    state = dataclasses.replace(
        past,
        length=past.length + new,
        q=q,
        k=open_k,
        v=open_v,
        keys=keys[:, :, :, None],
        values=values[:, :, :, None],
    )
    return _Extended(state, k, v, open_)


def _no_rows(call: Call, q: Tensor, k: Tensor, v: Tensor) -> RowState:
    """The state before the first token."""
    batch, heads, s = *k.shape[:2], call.config.segment
    open_q, open_k, open_v = (x.new_zeros(batch, heads, s, x.shape[-1]) for x in (q, k, v))
    keys, values = (wide(x[:, :, :0])[:, :, :, None] for x in (k, v))
    return RowState(
        length=torch.zeros(batch, dtype=torch.long, device=k.device),
        q=open_q,
        k=open_k,
        v=open_v,
        residual=None,
        keys=keys,
        values=values,
        asked=None,
        told=None,
        column_values=None,
    )
