"""Memory for keys and values in pages."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.engines.paged_cache import PagedState, Rows
from regard.serving.engine import Row

PAGE_SIZE = 32
"""Tokens of a page. Prefixes are shared in whole pages."""
SHARE = 0.25
"""Share of the machine's memory that the pools may take by default."""


class Pools:
    """A pool of keys and a pool of values for each layer with a paged cache.

    Args:
        samples: keys and values of one token, (1, G, 1, D), by layer.
        rows, context: maximum number of sequences in the batch, and maximum tokens of each.
        cache_tokens: tokens of all sequences together; when None, rows times context, within a quarter of the machine's
            memory.
        page_size: tokens of a page.

    Attributes:
        pages: number of pages in each pool.
        token_bytes: bytes of one token in all pools together.

    Raises:
        Unsupported: if `cache_tokens` is less than a page, or the pools do not fit in memory.
    """

    def __init__(
        self,
        samples: dict[int, tuple[Tensor, Tensor]],
        *,
        rows: int,
        context: int,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        at_least("page_size", page_size, 1)
        self.page_size = page_size
        self.token_bytes = sum(x.numel() * x.element_size() for pair in samples.values() for x in pair)
        if cache_tokens is None:
            cache_tokens = default_tokens(rows, context, self.token_bytes)
        at_least("cache_tokens", cache_tokens, page_size)
        self.pages = -(-cache_tokens // page_size)
        try:
            self.layers = {layer: (self._pool(k), self._pool(v)) for layer, (k, v) in samples.items()}
        except RuntimeError as error:  # torch's allocator raises no more specific error
            raise Unsupported(
                f"a cache of {cache_tokens} tokens, {self.token_bytes * cache_tokens / 2**30:.1f} GiB ({error})",
                supported="what fits the memory",
                nearest=f"--cache-tokens {cache_tokens // 4}",
            ) from None

    def _pool(self, sample: Tensor) -> Tensor:
        return sample.new_zeros((self.pages, sample.shape[1], self.page_size, sample.shape[3]))

    def states(self, rows: Sequence[Row]) -> dict[int, PagedState]:
        """Return the paged state of these rows in each layer."""
        longest = max(len(row.pages) for row in rows)
        table = torch.tensor([row.pages + [-1] * (longest - len(row.pages)) for row in rows], device="cpu")
        counts = torch.tensor([row.length for row in rows], device="cpu")
        shared = Rows(table, counts)  # one object for all layers, so that the slots of new tokens are looked up once
        return {layer: PagedState.of(k, v, shared) for layer, (k, v) in self.layers.items()}


def default_tokens(rows: int, context: int, token_bytes: int) -> int:
    """Return the tokens that all rows may need, within a quarter of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(rows * context, int(SHARE * memory) // token_bytes)


def padded(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens right-padded with 0, (B, longest), and the number of tokens of each row."""
    lengths = [len(row) for row in tokens]
    ids = torch.zeros((len(tokens), max(lengths)), dtype=torch.int64, device="cpu")
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64, device="cpu")
    return ids.to(device), torch.tensor(lengths, device=device)
