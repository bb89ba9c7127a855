"""KV caches as states.

A state is immutable data: continuing it does not change it. Copying a whole cache for each new token would cost more
than attending to it, however, so without gradients a cache grows inside memory with spare room (:func:`append`).
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from regard.backends.operators import in_transform, runs_plainly
from regard.contract import Call, State, lengths_after, state_field
from regard.core.ragged import values_known
from regard.core.visibility import CountedRanks
from regard.engines.attention import Ranks, ranks

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

ROOM = 4
"""A cache is copied to memory with spare room for 1 / ROOM of its length."""


@dataclass(frozen=True)
class KeyValueState(State):
    """All keys and values so far. Rows with fewer tokens than others have empty slots, whose rank is -1.

    Keys and values may be views of longer memory (:func:`append`), and are then not contiguous."""

    k: Float[Tensor, "b g past d"] = state_field()
    v: Float[Tensor, "b g past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    length: Int[Tensor, " b"] = state_field()

    def extended(
        self, call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int
    ) -> tuple[KeyValueState, Ranks]:
        """See :func:`extend`; the new keys and values follow the cache's slots, in the same order."""
        where = _ranks_after(call, self, n, k.shape[2])
        length = lengths_after(self.length, call.memory_lengths, k.shape[0], k.shape[2], k.device)
        k, v = append(self.k, k.to(self.k.dtype), 2), append(self.v, v.to(self.v.dtype), 2)
        return KeyValueState(k, v, where.keys.expand(k.shape[0], -1), length), where


@dataclass(frozen=True)
class WindowState(State):
    """The last keys and values of each row, as many as the next token may reach, right-aligned: the last slot holds the
    row's last token, and slots before its first token are zero."""

    k: Float[Tensor, "b g width d"] = state_field()
    v: Float[Tensor, "b g width v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


@dataclass(frozen=True)
class CountedState(KeyValueState):
    """All keys and values so far, and the number of queries that have read them in cross patterns (0 in self patterns),
    for mechanisms that depend on a query's position."""

    queries: Int[Tensor, " b"] = state_field()


def extend(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int) -> tuple[KeyValueState, Ranks]:
    """Append new keys and values to the cache of `call.state`; also return the ranks of their `n` queries.

    In self patterns the last query is aligned with the last of the new keys.
    """
    past: KeyValueState | None = call.state
    if past is not None:
        return past.extended(call, k, v, n)
    length = lengths_after(None, call.memory_lengths, k.shape[0], k.shape[2], k.device)
    where = ranks(call, n, k.shape[2], k.device)
    return KeyValueState(k, v, where.keys.expand(k.shape[0], -1), length), where


def _ranks_after(call: Call, past: KeyValueState, n: int, m: int) -> Ranks:
    """The ranks of `n` queries against the cache followed by `m` keys. They are counted if no row has an empty slot, as
    far as that can be tested cheaply: kernels then need no rank tensors, and decoding needs nothing else."""
    length, slots = past.length, past.k.shape[2]
    whole = call.lengths is call.memory_lengths is None and not call.pattern.cross
    if whole and runs_plainly(length) and length.tolist() == [slots] * length.shape[0]:
        return CountedRanks(n, slots + m, slots + m - n, True, past.k.device)
    return ranks(call, n, m, past.k.device, past.ranks, length)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> KeyValueState:
    """Absorb memory into a cache; more may follow."""
    return extend(call, k, v, 0)[0]


def extend_counted(
    call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int
) -> tuple[CountedState, Ranks]:
    """:func:`extend` for a state that counts its queries; their number stays the same."""
    cache, where = extend(call, k, v, n)
    queries = torch.zeros_like(cache.length) if call.state is None else call.state.queries
    return CountedState(cache.k, cache.v, cache.ranks, cache.length, queries), where


def read_on(call: Call, n: int, device: torch.device) -> tuple[Call, CountedState, Ranks]:
    """Let `n` more queries of a cross pattern read the memory of `call.state`, counted on from earlier queries.

    Returns:
        The call, with a position bias that takes these ranks; the state after the queries; and the ranks.
    """
    state: CountedState = call.state
    before = state.queries[:, None]
    where = ranks(call, n, 0, device, state.ranks, state.length)
    where = Ranks(where.queries + before, where.keys, None, None, plain=False)
    if call.position_bias is not None:
        told = call.position_bias  # the layer's bias adds the earlier queries already
        call = call.replace(position_bias=lambda i, j: told(i - before, j))
    after = state.queries + (n if call.lengths is None else call.lengths)
    return call, CountedState(state.k, state.v, state.ranks, state.length, after), where


Empty = Callable[[Tensor, Sequence[int]], Tensor]
"""Makes memory with a shape, and with the dtype and device of a tensor."""

_LOCK = threading.Lock()


@dataclass
class Memory:
    """The memory that caches are views of. Slots from `used` on are free."""

    slots: Tensor
    used: int

    @classmethod
    def of(cls, past: Tensor, end: int, axis: int, empty: Empty = Tensor.new_empty) -> Memory:
        """Memory that starts with `past`, with its first `end` slots along an axis in use and spare room after."""
        shape = list(past.shape)
        shape[axis] = end + end // ROOM
        made = cls(empty(past, shape), end)
        made.slots.narrow(axis, 0, past.shape[axis]).copy_(past)
        return made

    def take(self, used: int, end: int, axis: int) -> bool:
        """Take the slots from `used` to `end`. Only the first caller to continue at `used` succeeds; returns False, and
        takes nothing, for later callers and if there is too little room."""
        with _LOCK:
            if self.used != used or end > self.slots.shape[axis]:
                return False
            if self.slots.is_inference() and not torch.is_inference_mode_enabled():
                return False  # inference tensors cannot be written outside inference mode
            self.used = end
            return True


_MEMORIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The memory of each cache, and the slot at which the cache begins in it."""


def append(
    past: Shaped[Tensor, "..."], new: Shaped[Tensor, "..."], axis: int, empty: Empty = Tensor.new_empty
) -> Shaped[Tensor, "..."]:
    """Like `torch.cat` of `past` and `new` along an axis, but usually in time that does not grow with `past`.

    Results of this function are views of memory with spare room. The first call that continues a result writes into
    that room and returns a longer view of the same memory; later calls that continue it, and calls with other tensors,
    copy to new memory with room. Results therefore never change. With gradients and in compiled graphs, `torch.cat` is
    used. `axis` must not be negative. `empty` makes the memory, for example :func:`mapped` in a file.
    """
    if not grows_in_place(past, new, axis):
        return torch.cat([past, new], axis)
    grown = with_room(past, new.shape[axis], axis, empty)
    # `data`: tensors saved for backward are in other slots and must not count as modified
    grown.data.narrow(axis, past.shape[axis], new.shape[axis]).copy_(new)
    return grown


def with_room(
    past: Shaped[Tensor, "..."], count: int, axis: int, empty: Empty = Tensor.new_empty
) -> Shaped[Tensor, "..."]:
    """`past` followed by `count` slots along an axis for the caller to write, in memory as in :func:`append`."""
    end = past.shape[axis] + count
    found: tuple[Memory, int] | None = _MEMORIES.get(past)
    if found is None or not found[0].take(found[1] + past.shape[axis], found[1] + end, axis):
        found = Memory.of(past, end, axis, empty), 0
    memory, start = found
    grown = memory.slots.narrow(axis, start, end)
    _MEMORIES[grown] = found
    return grown


def newest(x: Shaped[Tensor, "..."], axis: int, count: int) -> Shaped[Tensor, "..."]:
    """The last `count` slots along an axis, or all if there are fewer. A cache from :func:`append` stays in its memory;
    the dropped slots are freed when it moves to new memory."""
    dropped = x.shape[axis] - count
    if dropped <= 0:
        return x
    kept = x.narrow(axis, dropped, count)
    found = None if torch.compiler.is_compiling() or in_transform() else _MEMORIES.get(x)
    if found is not None:
        _MEMORIES[kept] = found[0], found[1] + dropped
    return kept


def mapped(like: Tensor, shape: Sequence[int]) -> Tensor:
    """CPU memory in a file of its own, which is unlinked at once and disappears with the tensor: parts that are not
    read need not stay in RAM."""
    count = math.prod(shape)
    handle, path = tempfile.mkstemp(prefix="regard-cache-")
    os.close(handle)
    try:
        found = torch.from_file(path, shared=True, size=max(count, 1), dtype=like.dtype, device="cpu")
    finally:
        os.unlink(path)
    return found[:count].view(*shape)


def grows_in_place(past: Tensor, new: Tensor, axis: int) -> bool:
    """Return whether `new` can be written behind `past` in memory: no gradients, no graph, matching tensors."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    if torch.is_grad_enabled() and (past.requires_grad or new.requires_grad):
        return False
    fits = past.ndim == new.ndim and past.dtype == new.dtype and past.device == new.device
    return fits and past.shape[:axis] == new.shape[:axis] and past.shape[axis + 1 :] == new.shape[axis + 1 :]


def extend_window(
    call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int, width: int
) -> tuple[WindowState, Tensor, Tensor, Ranks]:
    """Append new keys and values to a window: the state with the last `width` tokens of each row, and the keys, values
    and ranks for the `n` queries that come with them.

    The last query is aligned with the last of the new keys.
    """
    past: WindowState | None = call.state
    if past is None:
        keys, values, where = k, v, ranks(call, n, k.shape[2], k.device)
    else:
        cached = past.length[:, None] + torch.arange(-width, 0, device=k.device)
        where = ranks(call, n, k.shape[2], k.device, cached, past.length)
        if call.lengths is call.memory_lengths:
            # in each row, query slot 0 follows the cached slots directly (n = m, or bottom-right aligned)
            where = Ranks(where.queries, where.keys, width + k.shape[2] - n, None, plain=False)
        keys, values = _followed(past.k, k), _followed(past.v, v)
    before = None if past is None else past.length
    total = lengths_after(before, call.memory_lengths, k.shape[0], k.shape[2], k.device)
    kept = [last_slots(x, call.memory_lengths, width, past is not None) for x in (keys, values)]
    return WindowState(kept[0], kept[1], total), keys, values, where


def next_in_window(
    call: Call,
    past: WindowState | None,
    k: Float[Tensor, "b g 1 d"],
    v: Float[Tensor, "b g 1 v"],
    width: int,
    least: int = 0,
) -> tuple[WindowState, Tensor, Tensor, int] | None:
    """:func:`extend_window` by one token, for rows that have the same number of tokens, `least` or more before the new
    one, if that can be tested cheaply: returns the number instead of ranks, so that the keys to read can be sliced. None
    otherwise."""
    if past is None or k.shape[2] != 1 or not (call.lengths is call.memory_lengths is None and k.shape[0]):
        return None
    if not runs_plainly(past.length):
        return None
    counts = past.length.tolist()
    if counts != counts[:1] * len(counts) or counts[0] < least:
        return None
    keys, values = _followed(past.k, k), _followed(past.v, v)
    kept = WindowState(newest(keys, 2, width), newest(values, 2, width), past.length + 1)
    return kept, keys, values, counts[0] + 1


def _followed(past: Float[Tensor, "b g width d"], new: Float[Tensor, "b g m d"]) -> Float[Tensor, "b g both d"]:
    """The slots of a window followed by new tokens; if these are few, in the same memory, replaced now and then."""
    new = new.to(past.dtype)
    return append(past, new, 2) if new.shape[2] <= past.shape[2] else torch.cat([past, new], 2)


def last_slots(
    x: Float[Tensor, "b g m d"], lengths: Int[Tensor, " b"] | None, width: int, cached: bool
) -> Float[Tensor, "b g width d"]:
    """The last `width` tokens of each row, right-aligned, with zeros if there are fewer.

    Args:
        x: new tokens; if `cached`, after `width` right-aligned earlier ones.
        lengths: number of valid new tokens in each row; None for all.
    """
    if lengths is not None:
        x = x if cached else F.pad(x, (0, 0, width, 0))
        return take(x, lengths[:, None] + torch.arange(width, device=x.device))
    if not cached and x.shape[2] < width:
        return F.pad(x, (0, 0, width - x.shape[2], 0))
    kept = newest(x, 2, width)
    # A view would keep a long sequence in memory. A program must not depend on the length.
    return kept.clone() if torch.compiler.is_compiling() or x.shape[2] > 2 * width + 1 else kept


def take(x: Float[Tensor, "b g m d"], slots: Int[Tensor, "b width"]) -> Float[Tensor, "b g width d"]:
    """Select slots in each row, the same ones in all heads."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def append_rows(
    past: Shaped[Tensor, "b h past d"],
    counts: Int[Tensor, " b"],
    new: Shaped[Tensor, "b h new d"],
    new_counts: Int[Tensor, " b"],
) -> Shaped[Tensor, "b h both d"]:
    """Join the first `counts` slots of each row of `past` and the first `new_counts` of `new`.

    The result has as many slots as the longest row needs; if counts are not known, as many as `past` and `new`
    together.
    """
    width = past.shape[2] + new.shape[2]
    if values_known(counts):
        width = int((counts + new_counts).max()) if past.shape[0] else 0
    slots = torch.arange(width, device=past.device)
    source = torch.where(slots < counts[:, None], slots, past.shape[2] + slots - counts[:, None])
    return take(torch.cat([past, new], 2), source.clamp(max=past.shape[2] + new.shape[2] - 1))
