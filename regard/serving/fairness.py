"""Who is next: requests wait in a line for each client, and the client that was served least is asked first.

Service is counted in tokens read and written, as by the virtual token counter of Sheng et al. (arXiv 2401.00588): a client
that comes back after a pause starts from the least that one of those waiting has had, so that it cannot save up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Lines(Generic[T]):
    """Waiting items by client."""

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self._lines: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def push(self, client: str, item: T, *, first: bool = False) -> None:
        """Behind the client's other items, or before them."""
        line = self._lines.get(client)
        if line is None:
            others = [self.served[other] for other in self._lines]
            least = min(others, default=max(self.served.values(), default=0))
            self.served[client] = max(self.served.get(client, 0), least)
            line = self._lines[client] = deque()
        line.appendleft(item) if first else line.append(item)

    def peek(self) -> tuple[str, T] | None:
        """The item that is next, with its client; None when nobody waits."""
        if not self._lines:
            return None
        client = min(self._lines, key=lambda name: self.served[name])  # the first of those that are even
        return client, self._lines[client][0]

    def remove(self, client: str, item: T) -> None:
        """Take an item of a client out of its line, wherever it stands there."""
        line = self._lines[client]
        line.remove(item)
        if not line:
            del self._lines[client]

    def charge(self, client: str, tokens: int) -> None:
        """Count service."""
        self.served[client] = self.served.get(client, 0) + tokens

    def forget(self, active: set[str]) -> None:
        """Drop the counts of clients that neither wait nor are in `active`, once there are many."""
        if len(self.served) > 4096:
            self.served = {c: n for c, n in self.served.items() if c in active or c in self._lines}
