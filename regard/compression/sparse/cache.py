"""The cache of one layer under a sparse method: the keys and values of each head that the method has kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import State
from regard.core.visibility import Visibility
from regard.engines.attention import decode
from regard.engines.paged_cache import attend

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PAGE = 64
"""Number of slots by which memory grows: a multiple of all page sizes."""
ROOM = 4
"""A full cache grows by this fraction of its length: one part in so many."""


@dataclass(frozen=True)
class MethodCache(State):
    """What a method stores of a sequence in one layer."""

    def appended(self, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 e"]) -> Self:
        """Append one token in each row and head."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeadCache(MethodCache):
    """Keys and values of each row and head, with spare room after them.

    Unlike other states it is written in place: after it was continued, it must not be continued again. :meth:`select`
    copies.

    Attributes:
        k, v: (B, G, S, D); slots from `counts` on are empty.
        counts: (B, G) tokens kept; on the CPU.
        ranks: (B, G, S) position in the sequence of the token in each slot.
        weight: (B, G, S) a method's running score of each slot; None if the method keeps none.
        low, high: (B, G, S / page, D) smallest and largest entries of the keys of each full page; None if not needed.
        length: (B,) tokens of each row so far, kept or not.
    """

    k: Float[Tensor, "b g s d"]
    v: Float[Tensor, "b g s e"]
    counts: Int[Tensor, "b g"]
    ranks: Int[Tensor, "b g s"]
    length: Int[Tensor, " b"]
    weight: Float[Tensor, "b g s"] | None = None
    low: Float[Tensor, "b g pages d"] | None = None
    high: Float[Tensor, "b g pages d"] | None = None

    @classmethod
    def of(cls, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], kept: Tensor | None = None) -> HeadCache:
        """Build a cache from a prompt.

        Args:
            kept: (B, G, N) booleans, True for tokens that stay; None for all.
        """
        batch, groups, n = k.shape[:3]
        device = k.device
        length = torch.full((batch,), n, dtype=torch.int64, device=device)
        if kept is None:
            counts = torch.full((batch, groups), n, dtype=torch.int64, device="cpu")
            ranks = torch.arange(n, device=device).expand(batch, groups, n)
        else:
            counts = kept.sum(-1).cpu()
            most = int(counts.max()) if counts.numel() else 0
            # kept tokens first, in order
            ranks = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
            k, v = (x.gather(2, ranks[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
        return cls(with_room(k), with_room(v), counts, with_room(ranks[..., None])[..., 0], length)

    def appended(self, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 e"]) -> Self:
        least, most = self._extent()
        cache = self._grown() if self.counts.numel() and most == self.k.shape[2] else self
        rank = cache.length.view(-1, 1, 1)
        with torch.no_grad():
            # optimised for speed, since this runs for each token in each layer
            for where, x in ((cache.k, k), (cache.v, v), (cache.ranks, rank)):
                if least == most:
                    where.narrow(2, most, 1).copy_(x)
                else:
                    where[cache._each(0)] = x.expand(*cache.counts.shape, 1, *x.shape[3:])[:, :, 0].to(where.dtype)
            if cache.weight is not None:
                cache.weight[cache._each(0)] = 0
        return dataclasses.replace(cache, counts=cache.counts + 1, length=cache.length + 1)

    def even(self, tokens: int) -> int | None:
        """The number of tokens that every row and head holds beside the next `tokens`; None if it differs, if there is more
        to keep than float32 keys and values on the CPU, and for several tokens with pages that have bounds."""
        least, most = self._extent()
        alike = all(x.is_cpu and x.dtype == torch.float32 for x in (self.k, self.v))
        return most if self._plain(tokens) and alike and least == most else None

    def _plain(self, tokens: int) -> bool:
        """Whether a kernel can write the next `tokens` without more than keys, values and what the method tells it."""
        return self.weight is None and (self.low is None or tokens == 1)

    def replaced(self) -> int:
        """The slot of a token, the same in all rows and heads, that the next one replaces; -1 if it goes behind all."""
        return -1

    def extended(self, tokens: int) -> Self:
        """The cache after more tokens in every row, whose keys and values the caller writes: a single token in the slot
        :meth:`replaced`, others in the slots after :meth:`even`."""
        used, cache = int(self.counts.flatten()[0]), self
        while used + tokens > cache.k.shape[2]:
            cache = cache._grown()
        later = torch.arange(tokens, device=cache.length.device)
        cache.ranks.narrow(2, used, tokens).copy_((cache.length[:, None] + later)[:, None])
        return dataclasses.replace(cache, counts=cache.counts + tokens, length=cache.length + tokens)

    def without(self, slots: Int[Tensor, "b g"], where: Tensor) -> HeadCache:
        """Remove one slot in each row and head where `where` (B, G) is true: the last token moves into it."""
        row, head, last = self._each(-1)
        to = row, head, torch.where(where, slots, last)
        with torch.no_grad():
            for x in (self.k, self.v, self.ranks, self.weight):
                if x is not None:
                    x[to] = x[row, head, last]
        return dataclasses.replace(self, counts=self.counts - where.cpu().long())

    def read(self, q: Float[Tensor, "b h 1 d"], scale: float) -> Float[Tensor, "b h 1 e"]:
        """Attend from a token's queries to the kept keys."""
        batch, heads = q.shape[:2]
        groups, slots = self.k.shape[1:3]
        least, most = self._extent()
        if least == most:
            # all heads have the same count: this is faster than paging
            output = decode(q, self.k[:, :, :most], self.v[:, :, :most], scale) if q.dtype == self.k.dtype else None
            if output is not None:
                return output
        # the slots of each row and head form a single page
        counts = self.counts.flatten()
        pool_k, pool_v = (x.view(batch * groups, 1, slots, x.shape[-1]) for x in (self.k, self.v))
        output, _ = attend(
            q.reshape(batch * groups, heads // groups, 1, q.shape[-1]).to(self.k.dtype),
            (pool_k, pool_v, torch.arange(batch * groups, device="cpu")[:, None], counts),
            (counts - 1)[:, None],
            visibility=Visibility(),
            scale=scale,
        )
        return output.view(batch, heads, 1, -1).to(q.dtype)

    def scores(self, q: Float[Tensor, "b h 1 d"], scale: float) -> Float[Tensor, "b h s"]:
        """Scores of a token's queries with every slot, -inf for empty slots; at least in float32."""
        batch, heads = q.shape[:2]
        groups = self.k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        used = int(self.counts.max()) if self.counts.numel() else 0
        k = self.k[:, :, :used].to(wide)
        found = scale * q.to(wide).view(batch, groups, heads // groups, -1) @ k.mT
        empty = torch.arange(used, device=q.device) >= self.counts.to(q.device)[..., None]
        return found.masked_fill(empty[:, :, None], -torch.inf).flatten(1, 2)

    def _extent(self) -> tuple[int, int]:
        """The smallest and largest token count of any head."""
        held = self.counts.flatten().tolist()
        return min(held, default=0), max(held, default=0)

    def _each(self, behind: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, groups = self.counts.shape
        device = self.k.device
        row, head = torch.arange(batch, device=device)[:, None], torch.arange(groups, device=device)
        return row, head, self.counts.to(device) + behind

    def _grown(self) -> Self:
        slots = self.k.shape[2]
        more = -(-max(slots // ROOM, 1) // PAGE) * PAGE
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        longer = {
            name: F.pad(x, (0, 0) * (x.ndim - 3) + (0, more * x.shape[2] // slots))
            for name, x in given.items()
            if name in ("k", "v", "ranks", "weight", "low", "high") and x is not None
        }
        return dataclasses.replace(self, **longer)


@dataclass(frozen=True)
class RollingCache(HeadCache):
    """The first tokens and the last ones, the same in all heads: from a full cache on, a new token takes the slot of the
    oldest that is not among the first. Rows may have different lengths.

    The last tokens go round the slots after the first ones: if token r of a row is in slot s, r - s is a multiple of the
    number of those slots.

    Attributes:
        capacity: tokens that it holds when it is full.
        sinks: first tokens, which stay.
    """

    capacity: int = 1
    sinks: int = 0

    @classmethod
    def rolled(
        cls,
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n e"],
        lengths: Int[Tensor, " b"],
        capacity: int,
        sinks: int,
    ) -> RollingCache:
        """Build a cache from right-padded prompts with `lengths` tokens."""
        groups, n = k.shape[1:3]
        slots, newest = torch.arange(min(n, capacity), device=k.device), lengths[:, None] - 1
        ranks = torch.where(slots < sinks, slots, newest - (newest - slots) % (capacity - sinks)).clamp(min=0)
        ranks = ranks[:, None].expand(-1, groups, -1)
        k, v = (x.gather(2, ranks[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
        counts = lengths.clamp(max=capacity).cpu()[:, None].repeat(1, groups)
        held = with_room(ranks[..., None])[..., 0]
        return cls(with_room(k), with_room(v), counts, held, lengths, capacity=capacity, sinks=sinks)

    def appended(self, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 e"], there: Tensor | None = None) -> Self:
        """Append one token in each row, or only in the rows where `there` (B,) is true."""
        slots, cache = self._next(), self
        while max(slots, default=-1) >= cache.k.shape[2]:
            cache = cache._grown()
        with torch.no_grad():
            # a row that has no token is written to as well: its next token takes the same slot
            for where, x in ((cache.k, k), (cache.v, v), (cache.ranks, cache.length.view(-1, 1, 1))):
                if len({*slots}) == 1:
                    where.narrow(2, slots[0], 1).copy_(x)
                else:
                    rows = torch.arange(len(slots), device=where.device)
                    where[rows, :, torch.tensor(slots, device=where.device)] = x[:, :, 0].to(where.dtype)
        more = torch.ones_like(cache.length) if there is None else there.long()
        counts = (cache.counts + more.cpu()[:, None]).clamp(max=self.capacity)
        return dataclasses.replace(cache, counts=counts, length=cache.length + more)

    def even(self, tokens: int) -> int | None:
        held = super().even(tokens)
        if held is None or held + tokens <= self.capacity:
            return held
        return held - 1 if tokens == 1 and held == self.capacity and len({*self._next()}) == 1 else None

    def replaced(self) -> int:
        slot = next(iter(self._next()), -1)
        return slot if self._extent()[0] == self.capacity else -1

    def extended(self, tokens: int) -> Self:
        slot = self.replaced()
        if slot < 0:
            return super().extended(tokens)
        with torch.no_grad():
            self.ranks.narrow(2, slot, 1).copy_(self.length.view(-1, 1, 1))
        return dataclasses.replace(self, length=self.length + 1)

    def places(self) -> Int[Tensor, "b s"]:
        """The place of each slot's token among those that its row holds, in the order of the text; 0 for empty slots."""
        ranks = self.ranks[:, 0]
        dropped = self.length - self.counts[:, 0].to(ranks.device)
        return torch.where(ranks < self.sinks, ranks, ranks - dropped[:, None]).clamp(min=0)

    def _next(self) -> list[int]:
        """The slot of the next token of each row."""
        held, ring = self.counts[:, 0].tolist(), self.capacity - self.sinks
        return [
            count if count < self.capacity else self.sinks + (length - self.sinks) % ring
            for count, length in zip(held, self.length.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class EvictingCache(HeadCache):
    """As many tokens in every head; a method drops one when a new token has attended to more.

    Attributes:
        capacity: tokens that it holds when it is full.
        full_at: number of tokens in the sequence from which on it is full.
    """

    capacity: int = 1
    full_at: int = 1

    @classmethod
    def made(cls, cache: HeadCache, capacity: int) -> EvictingCache:
        """The cache of a prompt, of which at most `capacity` tokens are left."""
        held = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
        return cls(**held, capacity=capacity, full_at=max([capacity, *cache.length.tolist()]))

    @property
    def dropped(self) -> bool:
        """Whether the newest token made the cache drop one."""
        return any(length > self.full_at for length in self.length.tolist())

    def _plain(self, tokens: int) -> bool:
        return tokens == 1 and (self.weight is None or self.weight.dtype == torch.float32)

    def extended(self, tokens: int) -> Self:
        """As in the base class, after the kernel has dropped what the method lets it drop."""
        longer = super().extended(tokens)
        return dataclasses.replace(longer, counts=longer.counts.clamp(max=self.capacity))


def with_room(x: Tensor) -> Tensor:
    """A copy whose number of slots is a multiple of :data:`PAGE`, with at least one empty slot."""
    used = x.shape[2]
    return F.pad(x, (0, 0, 0, (used // PAGE + 1) * PAGE - used))
