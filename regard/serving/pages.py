"""Ownership of cache pages, which sequences can share: the owners of each page, and the free pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from regard.contract import at_least


class Pages:
    """Reference counts of the pages of a pool.

    Args:
        count: number of pages.
        size: tokens per page.
        evict: called with the number of missing pages; gives pages back if it can.
    """

    def __init__(self, count: int, size: int, evict: Callable[[int], None] = lambda missing: None) -> None:
        at_least("pages", count, 1)
        at_least("page_size", size, 1)
        self.count, self.size, self.evict = count, size, evict
        self.owners = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of pages without an owner."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Return the number of pages that `tokens` tokens need."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """Take `count` pages for a new owner; take none and return None if there are fewer."""
        if count > len(self._free):
            self.evict(count - len(self._free))
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.owners[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self.owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Remove an owner from each page; pages without owners become free."""
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self._free.append(page)
