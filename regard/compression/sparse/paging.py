"""Quest, a method that keeps the whole cache and reads some of its pages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from regard.compression.sparse.cache import PAGE, HeadCache
from regard.compression.sparse.method import Method, Place, count_reads
from regard.contract import Unsupported, at_least
from regard.engines.decoder_layer import Reading
from regard.engines.quest_attention import quest_attention

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Quest(Method):
    """Read the cache pages that may hold the largest scores (arXiv 2406.10774), and the page of the newest token.

    The smallest and the largest entries of a page's keys bound every score in it.

    Attributes:
        budget: tokens read from earlier pages, a multiple of `page`.
        page: tokens per page.
        share: whether the query heads of a kv head read the same pages, chosen by the sum of their bounds.
    """

    phases: ClassVar = ("decode",)
    summary: ClassVar = "Each token reads the pages of the cache whose bounds promise the largest scores."
    budget: int = 1024
    page: int = 16
    share: bool = True

    def __post_init__(self) -> None:
        at_least("page", self.page, 1)
        if PAGE % self.page:
            raise Unsupported(f"page={self.page}", supported=f"divisors of {PAGE}", nearest="page=16")
        if self.budget < self.page or self.budget % self.page:
            nearest = max(round(self.budget / self.page), 1) * self.page
            raise Unsupported(
                f"budget={self.budget} with pages of {self.page}",
                supported=f"a multiple of {self.page}",
                nearest=f"budget={nearest}",
            )

    def compress(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> HeadCache:
        cache = super().compress(q, k, v, place)
        low, high = bounds(cache.k, self.page)
        return dataclasses.replace(cache, low=low, high=high)

    def decode(self, q: Tensor, cache: HeadCache, place: Place) -> tuple[Tensor, HeadCache]:
        self.decoded(cache, place, q.shape[1], 1)
        low, high, page, chosen, shared = self.reading(cache)
        if (_used(cache) - 1) // page <= chosen:
            return cache.read(q, place.scale), cache
        output = quest_attention(
            q.to(cache.k.dtype),
            cache.k,
            cache.v,
            low,
            high,
            cache.counts,
            page=page,
            chosen=chosen,
            shared=shared,
            scale=place.scale,
        )
        return output.to(q.dtype), cache

    @property
    def in_kernel(self) -> bool:
        return True

    def reading(self, cache: HeadCache) -> Reading:
        assert cache.low is not None and cache.high is not None
        return Reading(cache.low, cache.high, self.page, self.budget // self.page, self.share)

    def decoded(self, cache: HeadCache, place: Place, heads: int, tokens: int) -> None:
        low, high, page, chosen, shared = self.reading(cache)
        used, (batch, groups) = _used(cache), cache.counts.shape
        past = (used - 1) // page
        if used and used % page == 0:
            # the newest page is now full; it needed no bounds before, since it is always read
            with torch.no_grad():
                low[:, :, past], high[:, :, past] = torch.aminmax(cache.k[:, :, past * page : used], dim=2)
        if past <= chosen:
            count_reads(cache, place, heads, float(batch * groups * used), batch * groups)
            return
        lines, width = batch * (groups if shared else heads), cache.k.shape[3]
        place.meter.index["decode"] += 4.0 * batch * heads * past * width
        read = float(lines * (used - (past - chosen) * page))
        count_reads(cache, place, heads, read, lines, 2.0 * batch * groups * past * width)


def _used(cache: HeadCache) -> int:
    """The number of keys, the same in every head."""
    return max(cache.counts.flatten().tolist(), default=0)


def bounds(k: Float[Tensor, "b g s d"], page: int) -> tuple[Float[Tensor, "b g pages d"], Float[Tensor, "b g pages d"]]:
    """Smallest and largest entries of the keys in each page."""
    pages = k.unflatten(2, (k.shape[2] // page, page))
    return pages.amin(3), pages.amax(3)
