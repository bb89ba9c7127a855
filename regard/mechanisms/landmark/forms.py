"""The fast forms of landmark: parallel, chunked, and reading from a state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Result, Unsupported
from regard.core.precision import wide
from regard.core.visibility import Ranks, ranks
from regard.engines.grouped_attention import (
    PAIRS_AT_ONCE,
    Problem,
    grouped_attention,
    logits,
    normalized,
    own_groups,
    product,
)
from regard.mechanisms.landmark.cache import LandmarkState, extended, past_of
from regard.mechanisms.landmark.checks import check, check_choice, check_continued, check_miss, check_plain
from regard.mechanisms.landmark.definition import (
    controlled_by_miss,
    dropout_of,
    landmarks_of,
    miss_scores,
    opened,
    rotated,
)
from regard.mechanisms.landmark.retrieval import continue_retrieving, groups_of, ranks_of, read_blocks

if TYPE_CHECKING:
    from jaxtyping import Float


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Result:
    """Grouped softmax over all keys, block by block, without an N x M matrix; cross patterns that choose blocks absorb
    the memory and then read it."""
    check(call, miss)
    if call.pattern.cross and call.config.bounded:
        return read(call.replace(state=absorb(call, k, v)), q)
    landmark = landmarks_of(call, k)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    q, k = rotated(call, q, k, where, landmark)
    return _attend(call, q, k, v, landmark, where, miss)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens, in chunks of `call.chunk_size` or of the option `chunk`; also
    used as the step.

    The chunk size matters only if the past is not fully visible (`top_k`, `cache_blocks`).
    """
    check(call, miss)
    check_continued(call, miss)
    if not call.config.bounded:
        return _continue(call, q, k, v, miss)
    n = q.shape[2]
    if n != k.shape[2] or call.lengths is not call.memory_lengths:
        raise Unsupported(
            "landmark with top_k or cache_blocks and queries that do not match the keys",
            supported="one query for each key",
        )
    check_plain(call)
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
    """Append memory with its landmarks to the cache; more may follow."""
    check(call, miss)
    return extended(past_of(call, k, v), k, v, landmarks_of(call, k), call.memory_lengths, call.config)


def read(call: Call, q: Float[Tensor, "b h n d"], miss: Float[Tensor, "g d"] | None = None) -> Result:
    """Attend from queries to absorbed memory; with `top_k`, each query to the blocks that it chooses."""
    check_miss(call, miss)
    check_choice(call)
    state: LandmarkState = call.state
    if call.config.bounded:
        check_plain(call)
    if call.config.top_k is not None and q.shape[2] and state.k.shape[2]:
        return Result(read_blocks(call, q, state), state)
    where = ranks_of(torch.arange(q.shape[2], device=q.device)[None], state.ranks())
    return _attend(call, q, state.k, state.v, state.landmark, where, miss, state)


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
        *groups_of(call, landmark, where),
        causal=call.pattern.causal and not call.pattern.cross,
        scale=call.scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=dropout_of(call),
        want_weights="weights" in call.want,
    )
    output, weights, _ = grouped_attention(q, k, v, problem, call.backend)
    return Result(output, state, extras={} if weights is None else {"weights": weights})


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
    """Grouped softmax with a miss key, which in training controls some landmarks."""
    controlled = controlled_by_miss(call, landmark[:, None, None], miss)[:, 0, 0]
    slots = torch.arange(k.shape[2], device=k.device)
    closing = torch.where(landmark, slots, k.shape[2] - 1).flip(-1).cummin(-1).values.flip(-1)
    group = landmark.cumsum(-1) - landmark.long()
    own = own_groups(where, landmark)
    step = max(1, PAIRS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    outputs, all_weights = [], []
    for start in range(0, q.shape[2], step):
        rows, mine = q[:, :, start : start + step], own[:, start : start + step]
        here = ranks_of(where.queries[:, start : start + step], where.keys)
        problem = Problem(
            here,
            landmark,
            mine,
            causal=True,
            scale=call.scale,
            bias=None if call.bias is None else _rows(call.bias, start, step),
            position_bias=call.position_bias,
            blocks=call.blocks,
            dropout=dropout_of(call),
        )
        found, factors = logits(rows, k, problem)
        apart = (controlled.gather(-1, closing)[:, None] & (group[:, None] != mine[..., None]))[:, None]
        near, far = (found.masked_fill(hidden, -torch.inf) for hidden in (apart, ~apart))
        beside = normalized(torch.cat([near, miss_scores(call, rows, miss)[..., None]], -1))
        weights = beside[..., :-1] + opened(call, beside[..., -1:]) * normalized(far)
        all_weights.append(weights if factors is None else weights * factors)
        outputs.append(product(dropout_of(call).of_weights(all_weights[-1]), wide(v)).to(v.dtype))
    extras = {"weights": torch.cat(all_weights, 2)} if "weights" in call.want else {}
    return Result(torch.cat(outputs, 2), state, extras=extras)


def _rows(bias: Float[Tensor, "#b #h #n #m"], start: int, step: int) -> Float[Tensor, "#b #h #n #m"]:
    return bias if bias.shape[2] == 1 else bias[:, :, start : start + step]


def _continue(call: Call, q: Tensor, k: Tensor, v: Tensor, miss: Tensor | None) -> Result:
    """One chunk: attend to the cache and the chunk, then cache the chunk."""
    config, past, landmark = call.config, past_of(call, k, v), landmarks_of(call, k)
    if config.top_k is not None and past.k.shape[2] > 0 and q.shape[2] > 0:
        return continue_retrieving(call, q, k, v, landmark, past, miss)
    where = ranks(call, q.shape[2], k.shape[2], q.device, past.ranks(), past.length)
    new = ranks_of(where.queries, where.keys[:, past.k.shape[2] :])
    q, turned = rotated(call, q, k, new, landmark)
    state = extended(past, turned if config.top_k is None else k, v, landmark, call.memory_lengths, config)
    if config.bounded or call.memory_lengths is not None:
        # the state may have dropped tokens that this call still sees, or moved them to other slots
        keys = torch.cat([past.k.to(k.device), turned.to(past.k.dtype)], 2)
        values = torch.cat([past.v.to(v.device), v.to(past.v.dtype)], 2)
        landmark = torch.cat([past.landmark, landmark], -1)
    else:
        keys, values, landmark = state.k, state.v, state.landmark
    return _attend(call, q, keys, values, landmark, where, miss, state)
