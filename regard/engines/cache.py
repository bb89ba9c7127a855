"""Caches of keys and values as states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class WindowState(State):
    """The last keys and values of each row, as many as the next token may reach, right-aligned: the last slot holds the
    row's last token, and slots before its first token are zero."""

    k: Float[Tensor, "b g width d"] = state_field()
    v: Float[Tensor, "b g width v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def extend(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int) -> tuple[KeyValueState, Ranks]:
    """The cache of `call.state` followed by new keys and values, and the ranks of `n` queries that come with them.

    In self patterns the last query is aligned with the last of the new keys.
    """
    past: KeyValueState | None = call.state
    lengths = _new_lengths(call, k)
    if past is None:
        where = ranks(call, n, k.shape[2], k.device)
        return KeyValueState(k, v, where.keys.expand(k.shape[0], -1), lengths), where
    where = ranks(call, n, k.shape[2], k.device, past.ranks, past.length)
    k, v = torch.cat([past.k, k.to(past.k.dtype)], 2), torch.cat([past.v, v.to(past.v.dtype)], 2)
    return KeyValueState(k, v, where.keys, past.length + lengths), where


def extend_window(
    call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int, width: int
) -> tuple[WindowState, Tensor, Tensor, Ranks]:
    """The state that keeps the last `width` tokens of each row once new keys and values have come; and the keys, the
    values and the ranks with which the `n` queries that come with them are answered.

    The last query is aligned with the last of the new keys.
    """
    past: WindowState | None = call.state
    lengths = _new_lengths(call, k)
    if past is None:
        keys, values, where = k, v, ranks(call, n, k.shape[2], k.device)
        total = lengths
        wide_k, wide_v = F.pad(k, (0, 0, width, 0)), F.pad(v, (0, 0, width, 0))
    else:
        cached = past.length[:, None] + torch.arange(-width, 0, device=k.device)
        where = ranks(call, n, k.shape[2], k.device, cached, past.length)
        if call.lengths is call.memory_lengths:
            # every row's query slot 0 comes right after its cached slots (n = m, or bottom-right of them)
            where = Ranks(where.queries, where.keys, width + k.shape[2] - n, None, plain=False)
        keys, values = torch.cat([past.k, k.to(past.k.dtype)], 2), torch.cat([past.v, v.to(past.v.dtype)], 2)
        total = past.length + lengths
        wide_k, wide_v = keys, values
    last = lengths[:, None] + torch.arange(width, device=k.device)
    return WindowState(_take(wide_k, last), _take(wide_v, last), total), keys, values, where


def _take(x: Float[Tensor, "b g m d"], slots: Int[Tensor, "b width"]) -> Float[Tensor, "b g width d"]:
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _new_lengths(call: Call, k: Tensor) -> Int[Tensor, " b"]:
    if call.memory_lengths is not None:
        return call.memory_lengths
    return torch.full((k.shape[0],), k.shape[2], device=k.device)
