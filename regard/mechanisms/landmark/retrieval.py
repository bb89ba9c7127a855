"""Retrieval: attention to cached blocks chosen by their landmarks, in addition to nearby tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Result
from regard.core.precision import wide
from regard.core.visibility import Ranks
from regard.engines import grouped_attention as grouped
from regard.engines import retrieved_attention as retrieved
from regard.engines.grouped_attention import grouped_attention, log_sum, own_groups
from regard.engines.merging import merge
from regard.engines.retrieved_attention import retrieved_attention, retrieving_step
from regard.mechanisms.landmark.cache import LandmarkState, grown, settled
from regard.mechanisms.landmark.definition import Config, dropout_of, from_end, miss_scores, opened

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def ranks_of(queries: Tensor, keys: Tensor) -> Ranks:
    """Ranks of queries and keys in arbitrary order."""
    return Ranks(queries, keys, offset=None, first=None, plain=False)


def groups_of(call: Call, landmark: Tensor, where: Ranks) -> tuple[Ranks, Tensor, Tensor | None]:
    """Ranks, landmarks and own groups for the engine; softmax without groups is one group shared by all."""
    if call.config.softmax == "grouped":
        return where, landmark, None if call.pattern.cross else own_groups(where, landmark)
    if call.config.softmax == "ignore":
        where = Ranks(where.queries, torch.where(landmark, -1, where.keys), where.offset, where.first, plain=False)
    return where, torch.zeros_like(landmark), torch.zeros_like(where.queries)


def continue_retrieving(
    call: Call, q: Tensor, k: Tensor, v: Tensor, landmark: Tensor, past: LandmarkState, miss: Tensor | None
) -> Result:
    """Process one chunk after a cache: attend to retrieved blocks and nearby tokens, then cache the chunk."""
    config, lengths = call.config, call.memory_lengths
    state = grown(past, k, v, landmark, lengths, config)
    alone = lengths is None and miss is None and call.backend is None
    if alone and q.shape[2] == 1 and config.selection != "max_over_heads":  # for one token the other selections agree
        step = retrieving_step(q, state.k, state.v, problem_of(call, state))
        if step is not None:
            closes = any(step.closes) or max(step.open, default=0) >= config.block
            return Result(step.output.to(v.dtype), settled(state, k, None, config, closes=closes))
    output = _retrieve(call, q, k, v, landmark, past, miss)
    return Result(output, settled(state, k, lengths, config))


def read_blocks(call: Call, q: Tensor, memory: LandmarkState) -> Float[Tensor, "b h n v"]:
    """Grouped softmax over the memory blocks that each query and head chooses."""
    problem = problem_of(call, memory)
    problem = replace(problem, chosen=_chosen(call, q, problem))
    return retrieved_attention(wide(q), memory.k, memory.v, problem, call.backend)[0].to(memory.v.dtype)


def problem_of(call: Call, state: LandmarkState) -> retrieved.Problem:
    """The engine's problem for a cache and the options."""
    config: Config = call.config
    assert config.top_k is not None and state.marks is not None and state.closed is not None
    return retrieved.Problem(
        state.marks,
        state.closed,
        state.landmark,
        state.cached,
        state.length,
        config.block,
        config.top_k,
        call.scale,
        rotate=call.rotate,
        softmax=config.softmax,
        dropout=dropout_of(call),
    )


def _retrieve(
    call: Call, q: Tensor, k: Tensor, v: Tensor, landmark: Tensor, past: LandmarkState, miss: Tensor | None
) -> Float[Tensor, "b h t v"]:
    """Grouped softmax over the blocks that each token and head retrieves, the incomplete block and the chunk.

    The incomplete block and the chunk are attended to separately, and the two results are merged.
    """
    config: Config = call.config
    problem = problem_of(call, past)
    batch, _, t = q.shape[:3]
    size, slots = config.block + 1, past.k.shape[2]
    width = min(slots, config.block)
    recent = torch.arange(slots - width, slots, device=q.device) >= slots - past.cached[:, None]
    unfinished = recent & (from_end(past.landmark[:, slots - width :]) == 0)
    count = retrieved.blocks_of(problem).count
    chunk_start = count.clamp(max=problem.top_k + 1) * size + unfinished.sum(-1)
    near = torch.arange(width + t, device=q.device)
    exists = torch.ones(batch, t, dtype=torch.bool, device=q.device)
    if call.memory_lengths is not None:
        exists = near[:t] < call.memory_lengths[:, None]
    key_ranks = torch.where(torch.cat([unfinished, exists], -1), near, -1)
    near_keys = torch.cat([past.k[:, :, slots - width :].to(q.device), k.to(past.k.dtype)], 2)
    near_values = torch.cat([past.v[:, :, slots - width :].to(q.device), v.to(past.v.dtype)], 2)
    near_landmark = torch.cat([torch.zeros_like(unfinished), landmark], -1)
    q, near_keys, near_values = wide(q), wide(near_keys), wide(near_values)
    if call.rotate is not None:
        positions = (chunk_start[:, None] - width + near).clamp(min=0)
        q, near_keys = call.rotate(q, positions[:, width:]), call.rotate(near_keys, positions)

    problem = replace(problem, chosen=_chosen(call, q, problem))
    far, far_lse = retrieved_attention(q, past.k, past.v, problem, call.backend)
    where = ranks_of(near[None, width:], key_ranks)
    groups = groups_of(call, near_landmark, where)
    near_problem = grouped.Problem(*groups, causal=True, scale=call.scale, dropout=dropout_of(call), want_lse=True)
    close, _, lse = grouped_attention(q, near_keys, near_values, near_problem, call.backend)
    assert lse is not None
    if miss is None:
        return merge([close, far], [lse, far_lse]).to(v.dtype)
    share = (miss_scores(call, q, miss) - lse).sigmoid()[..., None]
    return ((1 - share) * close + opened(call, share) * far).to(v.dtype)


def _chosen(call: Call, q: Float[Tensor, "b h t d"], problem: retrieved.Problem) -> Int[Tensor, "b h #t k"] | None:
    """Indices of the blocks that heads or tokens choose jointly; None if each chooses on its own."""
    config: Config = call.config
    if config.selection == "per_token_and_head":
        return None
    blocks = retrieved.blocks_of(problem)
    scores = retrieved.landmark_scores(q, problem, blocks)
    margin = retrieved.margin_of(q, problem, blocks)
    shares = scores - log_sum(scores)[..., None]  # logarithms, in which ties are as far apart as in the scores
    if config.selection == "max_over_heads":
        shares, margin = (x.amax(1, keepdim=True).expand(-1, q.shape[1], -1, -1) for x in (shares, margin))
    else:
        valid = call.valid_keys(q.shape[2])
        if valid is not None:
            hidden = ~valid[:, None, :, None]
            shares = shares.masked_fill(hidden, torch.finfo(shares.dtype).min)
            margin = margin.masked_fill(hidden, 0.0)
        shares, margin = (x.amax(2, keepdim=True) for x in (shares, margin))
    return retrieved.best(torch.where(blocks.exists[:, None, None], shares, -torch.inf), margin, problem.top_k)
