"""The cache of landmark: all tokens in order, and the landmarks of complete blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Call, State, Unsupported, state_field
from regard.engines.cache import append, mapped, newest, take
from regard.mechanisms.landmark.definition import DISK, Config, from_end

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class LandmarkState(State):
    """Cached tokens of each row: complete blocks, then the incomplete one.

    The last `cached` slots of a row hold tokens, in order; the slots before them are empty. Keys are rotated by their
    ranks, except with `top_k`: there they get new positions each time their block is retrieved, and are kept unrotated.
    """

    k: Float[Tensor, "b g past d"] = state_field(newest_last=True)
    v: Float[Tensor, "b g past v"] = state_field(newest_last=True)
    landmark: Bool[Tensor, "b past"] = state_field(newest_last=True)
    cached: Int[Tensor, " b"] = state_field()
    length: Int[Tensor, " b"] = state_field()
    marks: Float[Tensor, "b g blocks d"] | None = state_field(newest_last=True, default=None)
    """With `top_k`, the landmark keys of complete nonempty blocks, newest last; k and v hold them too."""
    closed: Int[Tensor, "b blocks"] | None = state_field(fill=-1, newest_last=True, default=None)
    """The ranks of the landmarks in `marks`; -1 where a row has fewer."""

    def select(self, indices: Int[Tensor, " rows"]) -> LandmarkState:
        return self._map(lambda t, _: t.index_select(0, indices.to(t.device)))

    def reset(self, rows: Bool[Tensor, " b"]) -> LandmarkState:
        def emptied(t: Tensor, fill: float) -> Tensor:
            marked = rows.to(t.device).view(-1, *[1] * (t.ndim - 1))
            return torch.where(marked, torch.full_like(t, fill), t)

        return self._map(emptied)

    def present(self) -> Bool[Tensor, "b past"]:
        """True for slots that hold a token."""
        past = self.k.shape[2]
        return torch.arange(past, device=self.cached.device) >= past - self.cached[:, None]

    def ranks(self) -> Int[Tensor, "b past"]:
        """Rank of each slot's token in its sequence; -1 for an empty slot."""
        past = self.k.shape[2]
        rank = torch.arange(past, device=self.length.device) + (self.length[:, None] - past)
        return torch.where(self.present(), rank, -1)


def past_of(call: Call, k: Tensor, v: Tensor) -> LandmarkState:
    """The state that a call continues; an empty state at the start of a sequence."""
    if call.state is not None:
        return call.state
    none = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    landmark = torch.zeros(k.shape[0], 0, dtype=torch.bool, device=k.device)
    found = LandmarkState(_moved(k[:, :, :0], call), _moved(v[:, :, :0], call), landmark, none, none)
    if call.config.top_k is None:
        return found
    return dataclasses.replace(found, marks=k[:, :, :0], closed=torch.zeros_like(landmark, dtype=torch.long))


def _moved(x: Tensor, call: Call) -> Tensor:
    """Move a tensor to the device of the cache."""
    device = call.config.cache_device
    return x if device is None else x.to(device)


def extended(
    past: LandmarkState, k: Tensor, v: Tensor, landmark: Tensor, lengths: Tensor | None, config: Config
) -> LandmarkState:
    """Append each row's `lengths` valid new tokens to the cache, and drop the oldest blocks when it is full."""
    return settled(grown(past, k, v, landmark, lengths, config), k, lengths, config)


def grown(
    past: LandmarkState, k: Tensor, v: Tensor, landmark: Tensor, lengths: Tensor | None, config: Config
) -> LandmarkState:
    """Append new tokens to the cache, without updating the landmarks of complete blocks."""
    m = k.shape[2]
    empty = mapped if config.offload == DISK else Tensor.new_empty
    keys, values = append(past.k, k.to(past.k), 2, empty), append(past.v, v.to(past.v), 2, empty)
    flags = append(past.landmark, landmark, 1)
    if lengths is not None and flags.shape[1]:
        # Shift each row right by its padding, so that its tokens stay contiguous.
        index = torch.arange(flags.shape[1], device=k.device) - (m - lengths)[:, None]
        first = index.clamp(min=0)
        keys, values = (take(x, first.to(x.device)) for x in (keys, values))
        # Vacated slots are copies of the first slot: a landmark in them must not count again.
        flags = flags.gather(1, first) & (index >= 0)
    new = m if lengths is None else lengths
    return LandmarkState(keys, values, flags, past.cached + new, past.length + new, past.marks, past.closed)


def settled(
    state: LandmarkState, k: Tensor, lengths: Tensor | None, config: Config, *, closes: bool = True
) -> LandmarkState:
    """Update a :func:`grown` cache: add the landmarks of the blocks that its newest tokens close, and drop the oldest
    blocks when it is full.

    Args:
        k: keys of the newest tokens.
        lengths: how many of them are valid in each row; all when None.
        closes: whether the newest tokens may close a block; if False, each is known to fit in the incomplete block.
    """
    if not config.bounded:
        return state
    if closes:
        _check_blocks(state, k.shape[2], config)
        if config.top_k is not None:
            state = _closed(state, k, lengths, config)
    if config.cache_blocks is None:
        return state
    most = config.cache_blocks * (config.block + 1) + config.block
    flags, cached = state.landmark, state.cached
    if closes:
        kept = from_end(flags) <= config.cache_blocks
        flags, cached = flags & kept, (state.present() & kept).sum(-1)
    k, v, flags = newest(state.k, 2, most), newest(state.v, 2, most), newest(flags, 1, most)
    return LandmarkState(k, v, flags, cached, state.length, state.marks, state.closed)


def _closed(state: LandmarkState, k: Tensor, lengths: Tensor | None, config: Config) -> LandmarkState:
    """The state with the landmarks of the blocks that its newest tokens, the last ones of `k`, close.

    The work does not grow with the cache. A landmark right after another, or before any token, closes nothing.
    """
    assert state.marks is not None and state.closed is not None
    m, slots, old = k.shape[2], state.k.shape[2], state.closed.shape[1]
    if m == 0:
        return state
    new = torch.full((k.shape[0],), m, device=k.device) if lengths is None else lengths
    width = min(slots, m + 1)
    place = torch.arange(slots - width, slots, device=k.device)
    landmark = state.landmark[:, slots - width :]
    token = (place >= slots - state.cached[:, None]) & ~landmark
    fresh = landmark & F.pad(token[:, :-1], (1, 0)) & (place >= slots - new[:, None])
    added = fresh.sum(-1)  # per row
    most = (m + 1) // 2 if torch.compiler.is_compiling() or not k.shape[0] else int(added.max())
    if most == 0:
        return state
    order = fresh.int().argsort(dim=-1, descending=True, stable=True)[:, :most]  # places of fresh landmarks first
    ranks = (place + (state.length - slots)[:, None]).gather(1, order)
    keys = take(k, (order - width + new[:, None]).clamp(0, m - 1)).to(state.marks.dtype)
    if not torch.compiler.is_compiling() and bool((added == most).all()):
        marks, closed = append(state.marks, keys, 2), append(state.closed, ranks, 1)
    else:
        blocks = min(old + most, _most_blocks(slots, config))
        column = torch.arange(blocks, device=k.device) + (old - blocks) + added[:, None]
        index = column.clamp(min=0)
        closed = torch.where(column < 0, -1, torch.cat([state.closed, ranks], 1).gather(1, index))
        marks = take(torch.cat([state.marks, keys], 2), index)
    if config.cache_blocks is not None:
        marks, closed = newest(marks, 2, config.cache_blocks), newest(closed, 1, config.cache_blocks)
    return dataclasses.replace(state, marks=marks, closed=closed)


def _most_blocks(past: int, config: Config) -> int:
    """The maximum number of complete blocks among `past` slots."""
    return past // (config.block + 1) + 1 if config.cache_blocks is None else min(config.cache_blocks, past)


def _check_blocks(state: LandmarkState, m: int, config: Config) -> None:
    """Refuse blocks with tokens among the last `m` slots whose length differs from what the options require."""
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
