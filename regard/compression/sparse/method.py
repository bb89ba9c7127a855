"""The interface of sparse attention at inference: three hooks, of which a method overrides the ones that it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from regard.compression.sparse.cache import HeadCache
from regard.compression.sparse.selection import Everything, Selection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from regard.engines.decoder_layer import Codes, Eviction, Reading

PHASES = ("prefill", "decode")


@dataclass
class Meter:
    """Counters of a layer's computation.

    Attributes:
        kept, all: pairs of a query and a key that were computed, and that dense causal attention would compute, by
            phase; summed over rows and query heads.
        index: multiplications spent on estimating importance, by phase, as :mod:`regard.compression.sparse.cost` counts
            them.
        read: bytes read of keys, values, their steps and the bounds of pages in decoding.
        prompts: number of prompts that were kept in caches.
        cache: the shares of these prompts that stayed, added up.
    """

    kept: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    all: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    index: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    read: float = 0.0
    prompts: int = 0
    cache: float = 0.0

    def count(self, phase: str, kept: float, of: float) -> None:
        """Add computed pairs, and the pairs that dense attention would compute."""
        self.kept[phase] += kept
        self.all[phase] += of

    def count_prompt(self, share: float) -> None:
        """Add a prompt of which this share stayed in the cache."""
        self.prompts += 1
        self.cache += share

    def sparsity(self, phase: str) -> float:
        """The share of causal pairs that was skipped; 0 if nothing ran."""
        return 1 - self.kept[phase] / self.all[phase] if self.all[phase] else 0.0


@dataclass(frozen=True)
class Place:
    """The layer in which a hook runs, and its call.

    Attributes:
        layer: its number, from 0.
        layers: number of layers.
        scale: scale of the scores.
        meter: counters of the layer.
        rotate: rotates queries or keys (B, H, N, D) to positions (B or 1, N), for a method that places keys itself; None
            for other methods, and where the model rotates nothing.
        lengths: number of tokens of the call in each row, which is right-padded; None if all have as many.
    """

    layer: int = 0
    layers: int = 1
    scale: float = 1.0
    meter: Meter = field(default_factory=Meter)
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    lengths: Int[Tensor, " b"] | None = None


@dataclass(frozen=True)
class Method:
    """Dense attention, and the base class of every method.

    Tensors: q (B, H, N, D), k (B, G, N, D), v (B, G, N, E); G divides H.

    Attributes:
        phases: the phases in which it saves work.
        summary: a one-sentence description.
        pads: whether it takes padded prompts.
    """

    phases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "Every query sees every key before it."
    pads: ClassVar[bool] = False

    @property
    def places_keys(self) -> bool:
        """Whether it decides at which positions keys are rotated: it then gets queries and keys that are not rotated,
        except for those of the first hook, and :attr:`Place.rotate`."""
        return False

    def select(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], place: Place) -> Selection:
        """Select the keys that each query of a prompt sees."""
        return Everything(q.shape[0] * q.shape[1], q.shape[2])

    def keep(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], place: Place
    ) -> Bool[Tensor, "b g n"] | None:
        """Mask of the prompt tokens that stay in the cache; None for all."""
        return None

    def prefill(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], place: Place
    ) -> Float[Tensor, "b h n e"]:
        """The first hook: attention of a prompt."""
        selection = self.select(q, k, place)
        n = q.shape[2]
        place.meter.count("prefill", selection.pairs(), q.shape[0] * q.shape[1] * n * (n + 1) / 2)
        return selection.attend(q, k, v, place.scale)

    def compress(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], place: Place
    ) -> HeadCache:
        """The second hook: the cache after a prompt."""
        kept = self.keep(q, k, place)
        share = 1.0 if kept is None else float(kept.sum()) / max(kept.numel(), 1)
        place.meter.count_prompt(share)
        return HeadCache.of(k, v, kept)

    def decode(
        self, q: Float[Tensor, "b h 1 d"], cache: HeadCache, place: Place
    ) -> tuple[Float[Tensor, "b h 1 e"], HeadCache]:
        """The third hook: attention of one token, whose key and value are already cached, and the cache after it."""
        count_whole(cache, place, q.shape[1])
        return cache.read(q, place.scale), cache

    @property
    def in_kernel(self) -> bool:
        """Whether :attr:`places_keys`, :meth:`reading`, :meth:`evicting` and :meth:`rounded` say all that the third hook does,
        so that a kernel can do it in its place."""
        return type(self).decode is Method.decode

    def reading(self, cache: HeadCache) -> Reading | None:
        """What the third hook reads of a cache; None for everything."""
        return None

    def evicting(self, cache: HeadCache) -> Eviction | None:
        """How the cache of a new token, counted but not yet computed, drops a token; None if it drops none."""
        return None

    def rounded(self, cache: Any) -> Sequence[Codes]:
        """The tokens in 8 bits that come before those of a cache."""
        return ()

    def decoded(self, cache: Any, place: Place, heads: int, tokens: int) -> None:
        """Bring cache and meter up to date after a kernel has decoded `tokens` tokens."""
        for before in reversed(range(tokens)):
            then = dataclasses.replace(cache, counts=cache.counts - before, length=cache.length - before)
            count_whole(then, place, heads)


@dataclass(frozen=True)
class Combined(Method):
    """Read prompts by one method, and keep and read the cache by another."""

    first: Method = field(default_factory=Method)
    second: Method = field(default_factory=Method)

    @property
    def places_keys(self) -> bool:
        return self.second.places_keys

    def select(self, q: Tensor, k: Tensor, place: Place) -> Selection:
        return self.first.select(q, k, place)

    def keep(self, q: Tensor, k: Tensor, place: Place) -> Tensor | None:
        return self.second.keep(q, k, place)

    def compress(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> HeadCache:
        return self.second.compress(q, k, v, place)

    def decode(self, q: Tensor, cache: HeadCache, place: Place) -> tuple[Tensor, HeadCache]:
        return self.second.decode(q, cache, place)

    @property
    def in_kernel(self) -> bool:
        return self.second.in_kernel

    def reading(self, cache: HeadCache) -> Reading | None:
        return self.second.reading(cache)

    def evicting(self, cache: HeadCache) -> Eviction | None:
        return self.second.evicting(cache)

    def rounded(self, cache: Any) -> Sequence[Codes]:
        return self.second.rounded(cache)

    def decoded(self, cache: Any, place: Place, heads: int, tokens: int) -> None:
        self.second.decoded(cache, place, heads, tokens)


def count_reads(cache: HeadCache, place: Place, heads: int, tokens: float, lines: int, more: float = 0.0) -> None:
    """Count the reads of one token in the meter: `tokens` keys and values over all `lines`, plus `more` other numbers.
    A line is a (row, kv head) if the query `heads` read together, else a (row, query head)."""
    batch = len(cache.length)
    place.meter.count("decode", tokens * (batch * heads / max(lines, 1)), float(sum(cache.length.tolist())) * heads)
    place.meter.read += (tokens * (cache.k.shape[-1] + cache.v.shape[-1]) + more) * cache.k.element_size()


def count_whole(cache: HeadCache, place: Place, heads: int) -> None:
    """Count one token's reads of the whole cache by the query `heads`."""
    count_reads(cache, place, heads, float(cache.counts.sum()), cache.counts.numel())


def call(
    method: Method, q: Tensor, k: Tensor, v: Tensor, state: Any, place: Place, *, keeps: bool
) -> tuple[Tensor, Any]:
    """Run a prompt (without a state), or tokens after one; return the output, and the cache if requested."""
    if state is None:
        output = method.prefill(*_rotated(q, k, place), v, place)
        return output, method.compress(q, k, v, place) if keeps else None
    outputs = []
    for i in range(q.shape[2]):
        here = slice(i, i + 1)
        there = () if place.lengths is None else (place.lengths > i,)
        state = state.appended(k[:, :, here], v[:, :, here], *there)
        output, state = method.decode(q[:, :, here], state, place)
        outputs.append(output)
    return torch.cat(outputs, 2) if outputs else v.new_zeros(*q.shape[:3], v.shape[3]), state


def _rotated(q: Tensor, k: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Queries and keys of a prompt at their positions in it."""
    if place.rotate is None:
        return q, k
    positions = torch.arange(q.shape[2], device=q.device)[None]
    return place.rotate(q, positions), place.rotate(k, positions)
