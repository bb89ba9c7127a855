"""Caches of keys and values as states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, State, state_field
from regard.engines.attention import Ranks, ranks

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class KeyValueState(State):
    """Every key and value so far. A row with fewer tokens than others has empty slots, whose rank is -1."""

    k: Float[Tensor, "b g past d"] = state_field()
    v: Float[Tensor, "b g past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    length: Int[Tensor, " b"] = state_field()


def extend(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int) -> tuple[KeyValueState, Ranks]:
    """The cache of `call.state` followed by new keys and values, and the ranks of `n` queries that come with them.

    Queries are the last n tokens of what is cached after the call (bottom-right alignment).
    """
    past: KeyValueState | None = call.state
    batch, m = k.shape[0], k.shape[2]
    cached = k.new_zeros((batch, 0), dtype=torch.long) if past is None else past.ranks
    where = ranks(call, n, m, k.device, cached)
    lengths = torch.full((batch,), m, device=k.device) if call.memory_lengths is None else call.memory_lengths
    if past is None:
        return KeyValueState(k, v, where.keys, lengths), where
    k, v = torch.cat([past.k, k.to(past.k.dtype)], 2), torch.cat([past.v, v.to(past.v.dtype)], 2)
    return KeyValueState(k, v, where.keys, past.length + lengths), where
