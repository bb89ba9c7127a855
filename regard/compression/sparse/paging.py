"""A method that keeps the whole cache and reads some pages of it: Quest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from regard.compression.sparse.cache import PAGE, HeadCache
from regard.compression.sparse.method import Method, Place, count_reads
from regard.compression.sparse.scores import grouped
from regard.contract import Unsupported, at_least

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Quest(Method):
    """The pages of the cache that may hold the largest scores (arXiv 2406.10774), and the page of the newest token.

    The smallest and the largest entries of a page's keys bound every score in it.

    Attributes:
        budget: tokens of the past pages that are read, a multiple of `page`.
        page: tokens a page.
        share: whether the query heads of a kv head read the same pages, by the sum of their bounds.
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
        low, high = bounds(cache.k, k.shape[2], self.page)
        return dataclasses.replace(cache, low=low, high=high)

    def decode(self, q: Tensor, cache: HeadCache, place: Place) -> tuple[Tensor, HeadCache]:
        cache = self._bounded(cache)
        length = int(cache.counts[0, 0]) if cache.counts.numel() else 0
        current, wanted = (length - 1) // self.page, self.budget // self.page
        if current <= wanted:
            count_reads(q, cache, place, cache.counts.flatten())
            return cache.read(q, place.scale), cache
        upper = page_bounds(q, cache, current)
        place.meter.index["decode"] += 4.0 * upper.numel() * q.shape[-1]
        if self.share:
            upper = grouped(upper, cache.k.shape[1]).sum(2)
        pages = upper.topk(wanted, -1).indices.sort(-1).values.flatten(0, 1).cpu()
        table = torch.cat([pages, torch.full((pages.shape[0], 1), current, dtype=torch.int64)], -1)
        counts = torch.full((pages.shape[0],), wanted * self.page + (length - 1) % self.page + 1, dtype=torch.int64)
        rows = cache.k.shape[0] * cache.k.shape[1]
        count_reads(q, cache, place, counts, 2.0 * rows * current * q.shape[-1])
        return cache.read(q, place.scale, table=table, counts=counts, page=self.page), cache

    def _bounded(self, cache: HeadCache) -> HeadCache:
        """With the newest key in the bounds of its page."""
        assert cache.low is not None and cache.high is not None
        key = cache.k[cache.place(-1)]  # every head has as many
        page = (int(cache.counts[0, 0]) - 1) // self.page if cache.counts.numel() else 0
        low, high = cache.low, cache.high
        if cache.k.shape[2] // self.page > low.shape[2]:
            more = cache.k.shape[2] // self.page - low.shape[2]
            low = torch.nn.functional.pad(low, (0, 0, 0, more), value=torch.inf)
            high = torch.nn.functional.pad(high, (0, 0, 0, more), value=-torch.inf)
        with torch.no_grad():
            low[:, :, page] = torch.minimum(low[:, :, page], key)
            high[:, :, page] = torch.maximum(high[:, :, page], key)
        return dataclasses.replace(cache, low=low, high=high)


def bounds(
    k: Float[Tensor, "b g s d"], length: int, page: int
) -> tuple[Float[Tensor, "b g pages d"], Float[Tensor, "b g pages d"]]:
    """Smallest and largest entries of the first `length` keys, by page; infinite where a page has none."""
    pages = k.unflatten(2, (k.shape[2] // page, page))
    there = (torch.arange(k.shape[2], device=k.device) < length).view(1, 1, -1, page, 1)
    low = pages.masked_fill(~there, torch.inf).amin(3)
    return low, pages.masked_fill(~there, -torch.inf).amax(3)


def page_bounds(q: Float[Tensor, "b h 1 d"], cache: HeadCache, pages: int) -> Float[Tensor, "b h pages"]:
    """The largest score that a key of each page could have with each query, without the scale."""
    assert cache.low is not None and cache.high is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    query = grouped(q[:, :, 0].to(wide), cache.k.shape[1])
    low, high = cache.low[:, :, :pages].to(wide), cache.high[:, :, :pages].to(wide)
    # max(q low, q high) is q high where q > 0 and q low where q < 0
    return (query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT).flatten(1, 2)
