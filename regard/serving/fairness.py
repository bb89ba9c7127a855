"""Fair scheduling: each client has a queue of its own, and the client that was served least is next.

Service is counted in tokens read and generated, like the virtual token counter of Sheng et al. (arXiv 2401.00588): the
count of a client that returns after a pause is raised to the lowest among the waiting clients, so that it cannot save
up credit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Lines(Generic[T]):
    """Queues of waiting items, one for each client."""

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self._lines: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def push(self, client: str, item: T, *, first: bool = False) -> None:
        """Put an item at the end of its client's queue, or at the front if `first`."""
        line = self._lines.get(client)
        if line is None:
            others = [self.served[other] for other in self._lines]
            least = min(others, default=max(self.served.values(), default=0))
            self.served[client] = max(self.served.get(client, 0), least)
            line = self._lines[client] = deque()
        line.appendleft(item) if first else line.append(item)

    def peek(self) -> tuple[str, T] | None:
        """Return the next item and its client; None if nothing waits."""
        if not self._lines:
            return None
        client = min(self._lines, key=lambda name: self.served[name])  # ties go to the queue that began first
        return client, self._lines[client][0]

    def remove(self, client: str, item: T) -> None:
        """Remove an item from its client's queue, wherever it is in the queue."""
        line = self._lines[client]
        line.remove(item)
        if not line:
            del self._lines[client]

    def charge(self, client: str, tokens: int) -> None:
        """Add tokens to the service that a client has received."""
        self.served[client] = self.served.get(client, 0) + tokens

    def forget(self, active: set[str]) -> None:
        """Drop the counts of clients that are neither waiting nor in `active`, once there are many counts."""
        if len(self.served) > 4096:
            self.served = {c: n for c, n in self.served.items() if c in active or c in self._lines}
