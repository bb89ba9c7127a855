"""The fast forms of stochastic_subsampling: parallel, chunked, and reading from a state."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Pattern, Result, Unsupported
from regard.core.draws import uniform
from regard.core.precision import wide_dtype
from regard.core.ragged import take_queries
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines.attention import Ranks, ranks
from regard.engines.attention_forms import attend
from regard.engines.cache import KeyValueState, extend
from regard.mechanisms.stochastic_subsampling.definition import (
    _ratio,
    _slots,
    _visibility,
    by_windows,
    draw_keys,
    draw_windows,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Softmax attention to the drawn keys, a fraction `ratio`; to all keys in evaluation."""
    return _attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device), k, v)


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    state, where = extend(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, where, k, v, state)


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Attend from queries to absorbed memory."""
    state: KeyValueState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    return _attend(call, q, state.k, state.v, where, state.k, state.v, state)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Ranks,
    new_k: Tensor,
    new_v: Tensor,
    state: KeyValueState | None = None,
) -> Result:
    """Attend to keys `k` and values `v`; `new_k` and `new_v` are those that came with the queries."""
    ratio = _ratio(call)
    if ratio == 1 or q.numel() == 0 or k.shape[2] == 0:
        return attend(call, q, k, v, where, state, visibility=_visibility(call))
    if call.want & {"weights", "lse"}:
        raise Unsupported(
            "weights or the log-sum-exp of subsampled attention", supported="them with ratio=1 or in evaluation"
        )
    if by_windows(call):
        if state is not None or call.pattern.cross or q.shape[2] != k.shape[2]:
            raise Unsupported(
                f"subsampling by windows in {call.pattern.value}" + ("" if state is None else " with a state"),
                supported="whole sequences in self patterns",
                nearest="mode='unbiased'",
            )
        output, lse, member = _windowed(call, q, k, v, where, ratio)
    else:
        output, lse, member = _sampled(call, q, k, v, where, ratio)
    if call.pattern is Pattern.CAUSAL_SELF:
        assert lse is not None and member is not None
        output = _with_own_key(call, q, new_k, new_v, where, output, lse, member)
    return Result(output, state)


def _engine(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, *, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    result = attend(call, q, k, v, where, visibility=_visibility(call), want_lse=want_lse)
    return result.output, result.extras.get("lse")


def take(x: Float[Tensor, "b g m d"], slots: Int[Tensor, "#b ..."]) -> Float[Tensor, "b g ... d"]:
    """Keys or values at slots; arbitrary where a slot is missing."""
    rows, places = slots.shape[0], slots.clamp(min=0).flatten(1)
    if rows == 1:
        taken = x.index_select(2, places[0])
    else:
        taken = x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return taken.unflatten(2, slots.shape[1:])


def _ranks_at(keys: Int[Tensor, "#b m"], slots: Int[Tensor, "#b ..."]) -> Int[Tensor, "#b ..."]:
    batch = max(keys.shape[0], slots.shape[0])
    found = keys.expand(batch, -1).gather(1, slots.clamp(min=0).flatten(1).expand(batch, -1))
    return torch.where(slots < 0, -1, found.unflatten(1, slots.shape[1:]))


def _sampled(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, ratio: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, log-sum-exp, and whether each query's own key was drawn, for draws shared by all queries."""
    if call.config.per_head:
        heads, groups = q.shape[1], k.shape[1]
        shared = call.replace(config=dataclasses.replace(call.config, per_head=False))
        found = []
        for head in range(heads):
            g = head // (heads // groups)
            own = slice(head, head + 1)
            found.append(_sampled(_of_head(shared, head), q[:, own], k[:, g : g + 1], v[:, g : g + 1], where, ratio))
        outputs, lses, members = zip(*found, strict=True)
        if lses[0] is None:
            return torch.cat(outputs, 1), None, None
        batch = max(member.shape[0] for member in members)
        return torch.cat(outputs, 1), torch.cat(lses, 1), torch.cat([m.expand(batch, -1, -1) for m in members], 1)
    kept = draw_keys(call, ratio, where.keys, q.shape[0])
    bias = call.bias
    if call.config.mode == "bernoulli":
        keys = torch.where(kept, where.keys, -1)
    else:
        slots = _slots(kept, ratio)
        keys, k, v = _ranks_at(where.keys, slots), take(k, slots), take(v, slots)
        if bias is not None and bias.shape[-1] > 1:
            columns = slots.clamp(min=0)[:, None, None]
            bias = bias.expand(max(len(bias), len(slots)), -1, -1, -1)
            bias = bias.gather(-1, columns.expand(len(bias), *bias.shape[1:3], -1))
    causal = call.pattern is Pattern.CAUSAL_SELF
    chosen = Ranks(where.queries, keys, None, None, plain=False)
    output, lse = _engine(call.replace(bias=bias), q, k, v, chosen, want_lse=causal)
    return output, lse, _member(where.queries, keys)[:, None] if causal else None


def _of_head(call: Call, head: int) -> Call:
    """The call restricted to the biases and blocks of one head."""
    own = slice(head, head + 1)
    bias, blocks, position_bias = call.bias, call.blocks, call.position_bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, own]
    if blocks is not None and blocks.visible.shape[1] > 1:
        blocks = dataclasses.replace(blocks, visible=blocks.visible[:, own])
    if isinstance(position_bias, DistanceBias):
        by_distance = position_bias.by_distance
        position_bias = DistanceBias(lambda distances: by_distance(distances)[own])
    elif position_bias is not None:
        by_rank: PositionBias = position_bias
        position_bias = lambda i, j: by_rank(i, j)[:, own]  # noqa: E731
    return call.replace(bias=bias, blocks=blocks, position_bias=position_bias)


def _member(queries: Int[Tensor, "#b n"], keys: Int[Tensor, "#b m"]) -> Bool[Tensor, "#b n"]:
    """Return, for each query, whether the key of its own rank is among `keys`."""
    rows = torch.broadcast_shapes(queries.shape[:-1], keys.shape[:-1])
    queries, keys = queries.expand(*rows, -1).contiguous(), keys.sort(-1).values.expand(*rows, -1).contiguous()
    place = torch.searchsorted(keys, queries).clamp(max=keys.shape[-1] - 1)
    return keys.gather(-1, place) == queries


def _windowed(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, ratio: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Like :func:`_sampled`, by windows: each window is a row of a batch of small attentions."""
    batch, n = q.shape[0], q.shape[2]
    windows = draw_windows(call, ratio, where.keys, batch)
    number, width = windows.queries.shape
    own = windows.queries[None].clamp(min=0)

    def rows(x: Tensor) -> Tensor:
        return x.movedim(2, 1).flatten(0, 1)  # (b * windows, h, w, d)

    key_ranks = _ranks_at(where.keys, windows.keys)
    query_ranks = _ranks_at(where.queries, windows.queries[None])
    bias, blocks = call.bias, call.blocks
    if bias is not None:
        bias = bias.expand(batch, -1, n, k.shape[2])[:, :, own[0]]  # (b, h, windows, w, m)
        columns = windows.keys.clamp(min=0)[:, None, :, None].expand(batch, bias.shape[1], -1, width, -1)
        bias = rows(bias.gather(-1, columns))
    if blocks is not None and blocks.visible.shape[0] > 1:
        blocks = dataclasses.replace(blocks, visible=blocks.visible.repeat_interleave(number, 0))
    causal = call.pattern is Pattern.CAUSAL_SELF
    inner = Ranks(
        query_ranks.expand(batch, -1, -1).flatten(0, 1),
        key_ranks.expand(batch, -1, -1).flatten(0, 1),
        None,
        None,
        plain=False,
    )
    output, lse = _engine(
        call.replace(bias=bias, blocks=blocks),
        rows(take(q, own)),
        rows(take(k, windows.keys)),
        rows(take(v, windows.keys)),
        inner,
        want_lse=causal,
    )
    back = windows.queries.flatten()
    back = torch.where(back < 0, n, back).argsort(stable=True)[:n]  # place of each query among the windows

    def whole(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, number)).movedim(1, 2).flatten(2, 3)[:, :, back]

    if lse is None:
        return whole(output), None, None
    member = _member(query_ranks, key_ranks).flatten(1)[:, back]
    return whole(output), whole(lse), member[:, None]


def _with_own_key(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, output: Tensor, lse: Tensor, member: Tensor
) -> Float[Tensor, "b h n v"]:
    """Add each query's own key, from the new keys `k`, to outputs that were computed without it."""
    n, heads = q.shape[2], q.shape[1]
    if n != k.shape[2] or call.lengths is not call.memory_lengths:
        k, v = (take_queries(x, n, call.lengths, call.memory_lengths) for x in (k, v))
    dtype = wide_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    score = call.scale * (q * k).sum(-1)
    own = where.queries
    if call.bias is not None:
        columns = own if call.bias.shape[-1] > 1 else torch.zeros_like(own)
        bias = call.bias.expand(max(len(call.bias), len(own)), -1, n, -1)
        columns = columns.clamp(0, bias.shape[-1] - 1)[:, None, :, None].expand(len(bias), bias.shape[1], -1, 1)
        score = score + bias.gather(-1, columns)[..., 0].to(dtype)
    if call.position_bias is not None:
        alone = own.reshape(-1, 1)
        by_rank = call.position_bias(alone, alone)[..., 0, 0]  # (b * n or 1, h)
        score = score + by_rank.expand(alone.shape[0], -1).unflatten(0, own.shape).transpose(1, 2).to(dtype)
    joins = (own >= 0)[:, None] & ~member
    if call.blocks is not None:
        diagonal = call.blocks.visible.diagonal(dim1=-2, dim2=-1)
        block = own.clamp(min=0).div(call.blocks.block_size, rounding_mode="floor")
        inside = block < diagonal.shape[-1]
        diagonal = diagonal.expand(max(len(diagonal), len(own)), -1, -1)
        block = block.clamp(max=diagonal.shape[-1] - 1)[:, None].expand(len(diagonal), diagonal.shape[1], -1)
        joins = joins & inside[:, None] & diagonal.gather(-1, block)
    joins = joins & (score != -torch.inf)
    share = torch.where(joins, torch.sigmoid(torch.where(joins, score, 0) - lse.to(dtype)), 0)[..., None]
    if call.dropout:
        draw = uniform(share.shape, call.generator, device=share.device)
        v = torch.where(draw < call.dropout, 0, v / (1 - call.dropout))
    return ((1 - share) * output.to(dtype) + share * v).to(output.dtype)
