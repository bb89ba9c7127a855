"""Methods that keep part of the cache: which tokens of a prompt stay, and which are evicted by new ones."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from regard.compression.sparse.cache import EvictingCache, HeadCache, RollingCache, with_room
from regard.compression.sparse.method import Method, Place, count_whole
from regard.compression.sparse.prefilling import asked
from regard.compression.sparse.scores import grouped, key_sums, pooled, top
from regard.contract import Unsupported, at_least, one_of
from regard.engines.decoder_layer import Eviction

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

POSITIONS = ("cache", "text")
"""Where the positions of keys are counted."""
NO_RANK = 1 << 62
"""A rank that no token has."""


@dataclass(frozen=True)
class SnapKV(Method):
    """Keep the tokens that the last queries of a prompt attend to, and their neighbours; the same number in every head.

    Neighbours among the last tokens count as those elsewhere, as in the sparse-frontier benchmark; the authors' code
    (FasterDecoding/SnapKV) averages zeros in their place, which matters to the kernel // 2 tokens before them.

    Attributes:
        capacity: tokens of the prompt that each kv head keeps.
        window: number of last queries that decide.
        kernel: neighbours over which importance is averaged, an odd number.
        local: last tokens that are always kept.
        prefix: first tokens that are always kept.
    """

    phases: ClassVar = ("decode",)
    summary: ClassVar = "The cache keeps the tokens that the prompt's last queries look at, as many in every head."
    capacity: int = 1024
    window: int = 256
    kernel: int = 21
    local: int = 128
    prefix: int = 4

    def __post_init__(self) -> None:
        for name, least in (("capacity", 1), ("window", 1), ("kernel", 1), ("local", 0), ("prefix", 0)):
            at_least(name, getattr(self, name), least)
        if self.kernel % 2 == 0:
            raise Unsupported(f"kernel={self.kernel}", supported="an odd number", nearest=f"kernel={self.kernel + 1}")
        self.check_capacity(self.capacity)

    def check_capacity(self, capacity: int) -> None:
        """Raise Unsupported if the always-kept tokens would leave no room for chosen ones."""
        if capacity <= self.local + self.prefix:
            raise Unsupported(
                f"capacity={capacity} with local={self.local} and prefix={self.prefix}, which are always kept",
                supported="a greater capacity than both together",
                nearest=f"local={max(capacity // 2, 0)}, prefix={min(self.prefix, max(capacity // 2 - 1, 0))}",
            )

    def importance(self, q: Tensor, k: Tensor, place: Place) -> Float[Tensor, "b g n"]:
        """Importance of each key for a kv head: its attention from the last `window` queries, summed, averaged over the
        query heads of the group and pooled over `kernel` neighbours; infinite for always-kept tokens."""
        weights = grouped(asked(q, k, self.window, place), k.shape[1])
        return self._always(pooled(weights.mean(2).sum(2), self.kernel))

    def keep(self, q: Tensor, k: Tensor, place: Place) -> Bool[Tensor, "b g n"] | None:
        if k.shape[2] <= self.capacity:
            return None
        return top(self.importance(q, k, place), self.capacity)

    def _always(self, importance: Tensor) -> Tensor:
        n = importance.shape[-1]
        j = torch.arange(n, device=importance.device)
        return importance.masked_fill((j < self.prefix) | (j >= n - self.local), math.inf)


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """SnapKV with a budget shared by the heads of a layer: heads with more important tokens keep more.

    Attributes:
        capacity: tokens per kv head, on average over the layer.
        share: the least share of the capacity that every head keeps.
    """

    summary: ClassVar = "As snapkv, with a budget that the heads of a layer divide by importance."
    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise Unsupported(f"share={self.share}", supported="0 to 1", nearest="share=0.2")

    def importance(self, q: Tensor, k: Tensor, place: Place) -> Float[Tensor, "b g n"]:
        """SnapKV's importance, with the maximum over queries and query heads instead of sum and mean."""
        weights = grouped(asked(q, k, self.window, place), k.shape[1])
        return self._always(pooled(weights.amax((2, 3)), self.kernel))

    def keep(self, q: Tensor, k: Tensor, place: Place) -> Bool[Tensor, "b g n"] | None:
        groups, n = k.shape[1:3]
        if n <= self.capacity:
            return None
        importance = self.importance(q, k, place)
        least = max(int(self.share * self.capacity), self.local + self.prefix)
        own = top(importance, least)
        others = importance.masked_fill(own, -math.inf).flatten(1)
        rest = top(others, (self.capacity - least) * groups)
        return own | rest.view_as(own)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more tokens in the first layers and fewer in the last (arXiv 2406.02069).

    The capacities fall linearly from layer to layer, and average exactly `capacity`; the authors' code rounds the step
    between layers down, and gives all layers as much where a prompt is shorter than twice the capacity.

    Attributes:
        beta: the last layer keeps 1 / beta of the tokens that can be chosen at `capacity`.
    """

    summary: ClassVar = "As snapkv, with a budget that falls from the first layer to the last."
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("beta", self.beta, 1)

    def capacity_of(self, place: Place) -> int:
        """Number of tokens that a layer keeps."""
        always, layers = self.local + self.prefix, place.layers
        free = self.capacity - always
        last = max(free // self.beta, 1)
        # rounding cumulative sums over the layers keeps the total exact
        before = [0.0]
        for layer in range(layers):
            share = 0.5 if layers == 1 else 1 - layer / (layers - 1)
            before.append(before[-1] + last + 2 * (free - last) * share)
        return always + max(round(before[place.layer + 1]) - round(before[place.layer]), 1)

    def keep(self, q: Tensor, k: Tensor, place: Place) -> Bool[Tensor, "b g n"] | None:
        capacity = self.capacity_of(place)
        if k.shape[2] <= capacity:
            return None
        return top(self.importance(q, k, place), capacity)


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the first tokens and the last ones, in the prompt and after it (arXiv 2309.17453).

    After the prompt, keys are rotated to their places in the cache, 0 to capacity - 1, and a query to the place of its
    token, the last one: distances are never longer than the cache, however long the text. The cache holds keys that are
    not rotated, and each token rotates all of them. The prompt itself is read in full, at its own positions. Several
    tokens after a prompt are read one after the other, each with a full cache, where the authors' code drops as many
    tokens beforehand.

    Attributes:
        capacity: tokens in the cache, including the first ones.
        sinks: first tokens that stay.
        positions: ``cache``, or ``text``: keys keep the positions of their tokens in the text, as rotated once.
    """

    phases: ClassVar = ("decode",)
    summary: ClassVar = "The cache keeps the first tokens and the last ones."
    pads: ClassVar = True
    capacity: int = 1024
    sinks: int = 4
    positions: str = "cache"

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)
        at_least("capacity", self.capacity, self.sinks + 1)
        one_of("positions", self.positions, POSITIONS)

    @property
    def places_keys(self) -> bool:
        return self.positions == "cache"

    def compress(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> RollingCache:
        n, lengths = k.shape[2], place.lengths
        if lengths is None:
            lengths = torch.full((k.shape[0],), n, dtype=torch.int64, device=k.device)
        cache = RollingCache.rolled(k, v, lengths, self.capacity, self.sinks)
        place.meter.count_prompt(float(cache.counts[:, 0].sum()) / max(float(lengths.sum()), 1))
        return cache

    def decode(self, q: Tensor, cache: HeadCache, place: Place) -> tuple[Tensor, HeadCache]:
        if place.rotate is None:
            return super().decode(q, cache, place)
        assert isinstance(cache, RollingCache)
        count_whole(cache, place, q.shape[1])
        newest = cache.counts[:, :1].to(q.device) - 1
        rotated = dataclasses.replace(cache, k=place.rotate(cache.k, cache.places()))
        return rotated.read(place.rotate(q, newest), place.scale), cache

    @property
    def in_kernel(self) -> bool:
        return True


@dataclass(frozen=True)
class Evicting(Method):
    """A method that drops a token from a full cache after each new one has attended.

    Attributes:
        capacity: tokens in the cache, the same number in every head.
    """

    phases: ClassVar = ("decode",)
    capacity: int = 1024

    def __post_init__(self) -> None:
        at_least("capacity", self.capacity, 1)

    def compress(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> EvictingCache:
        return EvictingCache.made(super().compress(q, k, v, place), self.capacity)

    @property
    def in_kernel(self) -> bool:
        return True

    def evicting(self, cache: HeadCache) -> Eviction:
        return Eviction(cache.weight, cache.ranks, self.capacity, self.kept_from(cache))

    def kept_from(self, cache: HeadCache) -> int:
        """The rank from which on tokens are not dropped."""
        return NO_RANK

    def decoded(self, cache: HeadCache, place: Place, heads: int, tokens: int) -> None:
        assert isinstance(cache, EvictingCache) and tokens == 1
        count_whole(dataclasses.replace(cache, counts=cache.counts + int(cache.dropped)), place, heads)


@dataclass(frozen=True)
class TOVA(Evicting):
    """Keep the tokens that the last query attends to most, averaged over all heads of a layer, in the prompt and after
    each new token (arXiv 2401.06104). All heads keep the same tokens."""

    summary: ClassVar = "The cache drops the token that the newest query looks at least, the same in all heads."

    def keep(self, q: Tensor, k: Tensor, place: Place) -> Bool[Tensor, "b g n"] | None:
        if k.shape[2] <= self.capacity:
            return None
        weights = asked(q, k, 1, place)
        return top(weights.mean(1), self.capacity).expand(-1, k.shape[1], -1)

    def decode(self, q: Tensor, cache: HeadCache, place: Place) -> tuple[Tensor, HeadCache]:
        weights, output = _weigh(q, cache, place)
        worth = weights.mean((1, 2))[:, None].expand(-1, cache.k.shape[1], -1)
        return output, _evict(cache, self.capacity, worth)


@dataclass(frozen=True)
class H2O(Evicting):
    """Heavy hitters: keep the tokens with most attention from all queries so far, and the last ones (arXiv 2306.14048).

    Attributes:
        recent: the share of the capacity that goes to the last tokens, of which there is at least one: a new token
            has had little attention yet.
    """

    summary: ClassVar = "The cache keeps the last tokens and those that all queries so far looked at most."
    recent: float = 0.5

    def __post_init__(self) -> None:
        at_least("capacity", self.capacity, 2)
        if not 0 <= self.recent <= 1:
            raise Unsupported(f"recent={self.recent}", supported="0 to 1", nearest="recent=0.5")

    @property
    def last(self) -> int:
        """Number of last tokens that stay."""
        return max(int(self.recent * self.capacity), 1)

    def compress(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> EvictingCache:
        n = k.shape[2]
        sums = grouped(key_sums(q, k, place.scale), k.shape[1]).sum(2)
        place.meter.index["prefill"] += q.shape[0] * q.shape[1] * n * (n + 1) * q.shape[-1]
        kept = None
        if n > self.capacity:
            j = torch.arange(n, device=k.device)
            kept = top(sums.masked_fill(j >= n - self.last, math.inf), self.capacity)
        place.meter.count_prompt(1.0 if kept is None else self.capacity / n)
        cache = HeadCache.of(k, v, kept)
        used = int(cache.counts.max()) if cache.counts.numel() else 0
        weight = sums.gather(2, cache.ranks[..., :used])
        weighted = dataclasses.replace(cache, weight=with_room(weight[..., None])[..., 0])
        return EvictingCache.made(weighted, self.capacity)

    def kept_from(self, cache: HeadCache) -> int:
        return int(cache.length[0]) - self.last

    def decode(self, q: Tensor, cache: HeadCache, place: Place) -> tuple[Tensor, HeadCache]:
        weights, output = _weigh(q, cache, place)
        assert cache.weight is not None
        used = weights.shape[-1]
        with torch.no_grad():
            cache.weight[..., :used] += weights.sum(2)
        recent = cache.ranks[..., :used] >= self.kept_from(cache)
        worth = cache.weight[..., :used].masked_fill(recent, math.inf)
        return output, _evict(cache, self.capacity, worth)


def _weigh(q: Tensor, cache: HeadCache, place: Place) -> tuple[Float[Tensor, "b g r s"], Tensor]:
    """Softmax weights of a token's queries over the cache, and the attention output."""
    count_whole(cache, place, q.shape[1])
    weights = grouped(cache.scores(q, place.scale).softmax(-1), cache.k.shape[1])
    values = cache.v[:, :, : weights.shape[-1]].to(weights.dtype)
    return weights, (weights @ values).flatten(1, 2)[:, :, None].to(q.dtype)


def _evict(cache: HeadCache, capacity: int, worth: Tensor) -> HeadCache:
    """Evict the token with the least worth from heads above the capacity."""
    over = cache.counts > capacity
    if not bool(over.any()):
        return cache
    empty = torch.arange(worth.shape[-1], device=worth.device) >= cache.counts.to(worth.device)[..., None]
    return cache.without(worth.masked_fill(empty, math.inf).argmin(-1), over.to(worth.device))
