"""Pages of a cache that sequences own and share: who has which, and which are free."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from regard.contract import at_least


class Pages:
    """Counts the owners of each page of a pool.

    Args:
        count: pages.
        size: tokens a page.
        evict: called with how many more pages are wanted; gives some back if it can.
    """

    def __init__(self, count: int, size: int, evict: Callable[[int], None] = lambda missing: None) -> None:
        at_least("pages", count, 1)
        at_least("page_size", size, 1)
        self.count, self.size, self.evict = count, size, evict
        self.owners = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """So many pages for a new owner; None, and none is taken, where there are not as many."""
        if count > len(self._free):
            self.evict(count - len(self._free))
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.owners[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One owner more for each."""
        for page in pages:
            self.owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One owner less for each; a page without one is free."""
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self._free.append(page)
