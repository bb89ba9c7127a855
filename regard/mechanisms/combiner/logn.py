"""The factorization ``logn``: the token itself, and at most one block of each level of 1, 2, 4, ... tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Call
from regard.core.padding import pad_tokens
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.engines.cache import append
from regard.mechanisms.combiner.definition import Learned, activated, drop
from regard.mechanisms.combiner.pooling import finish, new_tokens, reduce_tokens, softmax_over, take, valid_tokens
from regard.mechanisms.combiner.state import BlockState

if TYPE_CHECKING:
    from jaxtyping import Float


def whole(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> tuple[Float[Tensor, "b h n v"], BlockState]:
    """Whole sequences, and the state after them."""
    config, n, device = call.config, q.shape[2], q.device
    length, rank = new_tokens(call, k), torch.arange(n, device=device)
    after = -n % (1 << max(n.bit_length() - 4, 0))  # so that most levels divide into whole blocks
    queries, keys, values = (pad_tokens(x, 0, after) for x in (call.scale * wide(q), wide(k), wide(v)))
    asking, telling = activated(config, queries, maps.pool_q), activated(config, keys, maps.pool_k)
    scores, blocks, last = [(queries * keys).sum(-1)], [], []
    for level in range(n.bit_length()):
        size = 1 << level
        # In each pair of blocks, the tokens of the second read the summary of the first.
        asked, told, k_first, v_first = (_halves(x, size)[:, :, :, 0] for x in (asking, telling, keys, values))
        asked, told = (x.amax(3) if config.reduce == "max" else x.sum(3) for x in (asked, told))
        count = torch.tensor(size, device=device)
        weights = _products(k_first, finish(config, asked, count)).softmax(-1)
        block = (drop(call, weights)[..., None, :] @ v_first)[..., 0, :]
        read = _products(_halves(queries, size)[:, :, :, 1], finish(config, told, count))
        scores.append(F.pad(read[:, :, :, None], (0, 0, 1, 0), value=-torch.inf).flatten(2)[:, :, : n + after])
        blocks.append(block)
        latest = (((length >> level) - 1).clamp(min=0) >> 1)[:, None]
        last.append([take(x, latest) for x in (asked, told, block)])
    shares = torch.stack(scores, -1).softmax(-1)
    output = drop(call, shares[..., :1]) * values
    for level, block in enumerate(blocks):
        share, sums = (_halves(x, 1 << level) for x in (shares[..., level + 1, None], output))  # 0 in first halves
        output = torch.addcmul(sums, share, block[:, :, :, None, None]).flatten(2, 4)[:, :, : n + after]
    slots = torch.where(valid_tokens(call.lengths, n, device), rank, -1).expand(k.shape[0], -1)
    levels = [torch.cat(x, 2) for x in zip(*last, strict=True)] if last else [queries, keys, values]
    return output[:, :, :n].to(v.dtype), BlockState(length, k, v, slots, *levels)


def step(call: Call, q: Tensor, k: Tensor, v: Tensor, maps: Learned) -> tuple[Float[Tensor, "b h 1 v"], BlockState]:
    """One token after a state of blocks: it reads the blocks of its rank's set bits, then completes a block."""
    config, state, device = call.config, call.state, q.device
    new = new_tokens(call, k)
    rank, active = state.length, new > 0
    ranks = append(state.ranks, torch.where(active, rank, -1)[:, None], 1)
    all_k, all_v = (append(past, x.to(past.dtype), 2) for past, x in ((state.k, k), (state.v, v)))
    levels = max(state.asked.shape[2], ranks.shape[1].bit_length())
    asked, told, values = (F.pad(x, (0, 0, 0, levels - x.shape[2])) for x in (state.asked, state.told, state.values))
    level = torch.arange(levels, device=device)
    query, key, value = call.scale * wide(q), wide(k), wide(v)
    keys = torch.cat([key, finish(config, told, 1 << level)], 2)
    bits = (rank[:, None] >> level & 1).bool()
    visible = torch.cat([torch.ones_like(bits[:, :1]), bits], -1)[:, None, None]
    weights = softmax_over(query @ keys.mT, visible)
    weights = torch.cat([drop(call, weights[..., :1]), weights[..., 1:]], -1)
    output = (weights @ torch.cat([value, values], 2)).to(v.dtype)

    # The token and the blocks of the levels below the lowest zero bit of its rank form the block that is now complete.
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
        return reduce_tokens(config, torch.cat([activated(config, x, weight), past], 2), parts)

    asks, tells = reduced(query, asked, maps.pool_q), reduced(key, told, maps.pool_k)
    pooled = finish(config, asks, (1 << top)[:, None])[:, :, None]
    weights = drop(call, softmax_over(pooled @ wide(recent_k).mT, members[:, None, None]))
    block = (weights @ wide(recent_v))[:, :, 0]
    here = ((level == top[:, None]) & active[:, None])[:, None, :, None]
    asked, told, values = (
        torch.where(here, x[:, :, None], past) for x, past in ((asks, asked), (tells, told), (block, values))
    )
    return output, BlockState(rank + new, all_k, all_v, ranks, asked, told, values)


def _halves(x: Float[Tensor, "b h n d"], size: int) -> Float[Tensor, "b h pairs 2 size d"]:
    """Group tokens into pairs of blocks, with zeros after the last token."""
    after = -x.shape[2] % (2 * size)
    return (pad_tokens(x, 0, after) if after else x).unflatten(2, (-1, 2, size))


def _products(x: Float[Tensor, "... size d"], y: Float[Tensor, "... d"]) -> Float[Tensor, "... size"]:
    """x_i . y; for small blocks elementwise, since many tiny matrix products would cost more."""
    return (x @ y[..., None])[..., 0] if x.shape[-2] >= 16 else (x * y[..., None, :]).sum(-1)
