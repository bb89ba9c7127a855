"""Caches of keys and values as states.

A state is data: whoever continues it leaves it as it was. Copying a whole cache for each new token would however cost
more than to attend to it, so without gradients a cache grows inside memory that has room (:func:`append`).
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
"""A cache that is copied gets room for a part of its length: one in so many."""


@dataclass(frozen=True)
class KeyValueState(State):
    """Every key and value so far. A row with fewer tokens than others has empty slots, whose rank is -1.

    Keys and values may be parts of longer memory (:func:`append`), and then they are not contiguous."""

    k: Float[Tensor, "b g past d"] = state_field()
    v: Float[Tensor, "b g past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    length: Int[Tensor, " b"] = state_field()

    def extended(
        self, call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int
    ) -> tuple[KeyValueState, Ranks]:
        """See :func:`extend`; the new keys and values are in the order of the cache's slots, behind it."""
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
    """Every key and value so far, and the queries that have read them in cross patterns (0 in self patterns): for
    mechanisms to which the place of a query matters."""

    queries: Int[Tensor, " b"] = state_field()


def extend(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int) -> tuple[KeyValueState, Ranks]:
    """The cache of `call.state` followed by new keys and values, and the ranks of `n` queries that come with them.

    In self patterns the last query is aligned with the last of the new keys.
    """
    past: KeyValueState | None = call.state
    if past is not None:
        return past.extended(call, k, v, n)
    length = lengths_after(None, call.memory_lengths, k.shape[0], k.shape[2], k.device)
    where = ranks(call, n, k.shape[2], k.device)
    return KeyValueState(k, v, where.keys.expand(k.shape[0], -1), length), where


def _ranks_after(call: Call, past: KeyValueState, n: int, m: int) -> Ranks:
    """The ranks of `n` queries against the cache followed by `m` keys; counted where no row has an empty slot, which is
    looked at where that costs nothing: then kernels need no ranks, and nothing else for decoding."""
    length, slots = past.length, past.k.shape[2]
    whole = call.lengths is call.memory_lengths is None and not call.pattern.cross
    if whole and runs_plainly(length) and length.tolist() == [slots] * length.shape[0]:
        return CountedRanks(n, slots + m, slots + m - n, True, past.k.device)
    return ranks(call, n, m, past.k.device, past.ranks, length)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> KeyValueState:
    """Memory into a cache; more may follow."""
    return extend(call, k, v, 0)[0]


def extend_counted(
    call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int
) -> tuple[CountedState, Ranks]:
    """:func:`extend` for a state that counts its queries, which stay as many."""
    cache, where = extend(call, k, v, n)
    queries = torch.zeros_like(cache.length) if call.state is None else call.state.queries
    return CountedState(cache.k, cache.v, cache.ranks, cache.length, queries), where


def read_on(call: Call, n: int, device: torch.device) -> tuple[Call, CountedState, Ranks]:
    """`n` queries of a cross pattern, counted on from those that have read the memory of `call.state` before.

    Returns:
        The call, whose position bias takes these ranks; the state after the queries; and the ranks.
    """
    state: CountedState = call.state
    before = state.queries[:, None]
    where = ranks(call, n, 0, device, state.ranks, state.length)
    where = Ranks(where.queries + before, where.keys, None, None, plain=False)
    if call.position_bias is not None:
        told = call.position_bias  # of earlier queries, by the layer
        call = call.replace(position_bias=lambda i, j: told(i - before, j))
    after = state.queries + (n if call.lengths is None else call.lengths)
    return call, CountedState(state.k, state.v, state.ranks, state.length, after), where


Empty = Callable[[Tensor, Sequence[int]], Tensor]
"""Makes memory of a shape, of the dtype and on the device of a tensor."""

_LOCK = threading.Lock()


@dataclass
class Memory:
    """Where a cache lies. Slots from `used` on belong to nobody yet."""

    slots: Tensor
    used: int

    @classmethod
    def of(cls, past: Tensor, end: int, axis: int, empty: Empty = Tensor.new_empty) -> Memory:
        """Memory that begins with `past`, whose first `end` slots along an axis are in use, with room behind them."""
        shape = list(past.shape)
        shape[axis] = end + end // ROOM
        made = cls(empty(past, shape), end)
        made.slots.narrow(axis, 0, past.shape[axis]).copy_(past)
        return made

    def take(self, used: int, end: int, axis: int) -> bool:
        """The slots behind the first `used`, up to `end`, for the first to come of those who know of so many; False, and nothing
        is taken, for the others, and where there are not as many."""
        with _LOCK:
            if self.used != used or end > self.slots.shape[axis]:
                return False
            if self.slots.is_inference() and not torch.is_inference_mode_enabled():
                return False  # such tensors refuse to be written elsewhere
            self.used = end
            return True


_MEMORIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each cache its memory, and the slot there in which it begins."""


def append(
    past: Shaped[Tensor, "..."], new: Shaped[Tensor, "..."], axis: int, empty: Empty = Tensor.new_empty
) -> Shaped[Tensor, "..."]:
    """`past` followed by `new` along an axis, as `torch.cat`, in time that does not grow with `past` most times.

    A result that this function returned lies in memory with room behind it. The first to continue it writes there and
    gets a longer view of the same memory; whoever continues it after that, or a tensor from elsewhere, gets a copy with
    new room. So what was returned never changes. Gradients and compiled graphs take `torch.cat`. `axis` is not negative.
    `empty` makes the memory: :func:`mapped` in a file.
    """
    if not grows_in_place(past, new, axis):
        return torch.cat([past, new], axis)
    grown = with_room(past, new.shape[axis], axis, empty)
    # `data`: what others saved for a backward pass lies in other slots, and does not count as changed
    grown.data.narrow(axis, past.shape[axis], new.shape[axis]).copy_(new)
    return grown


def with_room(
    past: Shaped[Tensor, "..."], count: int, axis: int, empty: Empty = Tensor.new_empty
) -> Shaped[Tensor, "..."]:
    """`past` followed by `count` slots along an axis that the caller writes, in memory as :func:`append` takes it."""
    end = past.shape[axis] + count
    found: tuple[Memory, int] | None = _MEMORIES.get(past)
    if found is None or not found[0].take(found[1] + past.shape[axis], found[1] + end, axis):
        found = Memory.of(past, end, axis, empty), 0
    memory, start = found
    grown = memory.slots.narrow(axis, start, end)
    _MEMORIES[grown] = found
    return grown


def newest(x: Shaped[Tensor, "..."], axis: int, count: int) -> Shaped[Tensor, "..."]:
    """The last `count` slots along an axis, all where there are fewer. A cache that :func:`append` returned goes on in its
    memory without those before them, which are given up when it moves to new memory."""
    dropped = x.shape[axis] - count
    if dropped <= 0:
        return x
    kept = x.narrow(axis, dropped, count)
    found = None if torch.compiler.is_compiling() or in_transform() else _MEMORIES.get(x)
    if found is not None:
        _MEMORIES[kept] = found[0], found[1] + dropped
    return kept


def mapped(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory on the CPU that lies in a file of its own, which has no name any more and goes with the tensor: what is not read
    need not be in memory."""
    count = math.prod(shape)
    handle, path = tempfile.mkstemp(prefix="regard-cache-")
    os.close(handle)
    try:
        found = torch.from_file(path, shared=True, size=max(count, 1), dtype=like.dtype, device="cpu")
    finally:
        os.unlink(path)
    return found[:count].view(*shape)


def grows_in_place(past: Tensor, new: Tensor, axis: int) -> bool:
    """Whether memory behind `past` may be written in place of joining both: nobody records or compiles, and they fit."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    if torch.is_grad_enabled() and (past.requires_grad or new.requires_grad):
        return False
    fits = past.ndim == new.ndim and past.dtype == new.dtype and past.device == new.device
    return fits and past.shape[:axis] == new.shape[:axis] and past.shape[axis + 1 :] == new.shape[axis + 1 :]


def extend_window(
    call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int, width: int
) -> tuple[WindowState, Tensor, Tensor, Ranks]:
    """The state that keeps the last `width` tokens of each row once new keys and values have come; and the keys, the
    values and the ranks with which the `n` queries that come with them are answered.

    The last query is aligned with the last of the new keys.
    """
    past: WindowState | None = call.state
    if past is None:
        keys, values, where = k, v, ranks(call, n, k.shape[2], k.device)
    else:
        cached = past.length[:, None] + torch.arange(-width, 0, device=k.device)
        where = ranks(call, n, k.shape[2], k.device, cached, past.length)
        if call.lengths is call.memory_lengths:
            # every row's query slot 0 comes right after its cached slots (n = m, or bottom-right of them)
            where = Ranks(where.queries, where.keys, width + k.shape[2] - n, None, plain=False)
        keys, values = _followed(past.k, k), _followed(past.v, v)
    before = None if past is None else past.length
    total = lengths_after(before, call.memory_lengths, k.shape[0], k.shape[2], k.device)
    kept = [last_slots(x, call.memory_lengths, width, past is not None) for x in (keys, values)]
    return WindowState(kept[0], kept[1], total), keys, values, where


def next_in_window(
    call: Call, past: WindowState | None, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 v"], width: int
) -> tuple[WindowState, Tensor, Tensor, int] | None:
    """:func:`extend_window` by one token, where every row has as many tokens and it costs nothing to see it: how many there are
    now, instead of ranks, so that what the token reads can be cut out. None elsewhere."""
    if past is None or k.shape[2] != 1 or not (call.lengths is call.memory_lengths is None and k.shape[0]):
        return None
    if not runs_plainly(past.length):
        return None
    counts = past.length.tolist()
    if counts != counts[:1] * len(counts):
        return None
    keys, values = _followed(past.k, k), _followed(past.v, v)
    kept = WindowState(newest(keys, 2, width), newest(values, 2, width), past.length + 1)
    return kept, keys, values, counts[0] + 1


def _followed(past: Float[Tensor, "b g width d"], new: Float[Tensor, "b g m d"]) -> Float[Tensor, "b g both d"]:
    """The slots of a window and new tokens; few of them in its memory, which moves to new memory now and then."""
    new = new.to(past.dtype)
    return append(past, new, 2) if new.shape[2] <= past.shape[2] else torch.cat([past, new], 2)


def last_slots(
    x: Float[Tensor, "b g m d"], lengths: Int[Tensor, " b"] | None, width: int, cached: bool
) -> Float[Tensor, "b g width d"]:
    """The last `width` tokens of each row, right-aligned, zero where there are fewer.

    Args:
        x: new tokens, after `width` right-aligned ones that were `cached`, if they were.
        lengths: valid new tokens of each row; all when None.
    """
    if lengths is not None:
        x = x if cached else F.pad(x, (0, 0, width, 0))
        return take(x, lengths[:, None] + torch.arange(width, device=x.device))
    if x.shape[2] < width:
        return F.pad(x, (0, 0, width - x.shape[2], 0))
    kept = newest(x, 2, width)
    return kept if x.shape[2] <= 2 * width + 1 else kept.clone()  # the state of a long sequence must not hold all of it


def take(x: Float[Tensor, "b g m d"], slots: Int[Tensor, "b width"]) -> Float[Tensor, "b g width d"]:
    """Slots of each row, the same in all its heads."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def append_rows(
    past: Shaped[Tensor, "b h past d"],
    counts: Int[Tensor, " b"],
    new: Shaped[Tensor, "b h new d"],
    new_counts: Int[Tensor, " b"],
) -> Shaped[Tensor, "b h both d"]:
    """The first `counts` slots of each row of `past`, then the first `new_counts` of `new`.

    As many slots as the longest row needs; as `past` and `new` have together where counts are not known.
    """
    width = past.shape[2] + new.shape[2]
    if values_known(counts):
        width = int((counts + new_counts).max()) if past.shape[0] else 0
    slots = torch.arange(width, device=past.device)
    source = torch.where(slots < counts[:, None], slots, past.shape[2] + slots - counts[:, None])
    return take(torch.cat([past, new], 2), source.clamp(max=past.shape[2] + new.shape[2] - 1))
