"""The prefix cache: parts of sequences that were read, from which a sequence with the same prefix continues.

The cache is a tree of blocks of tokens, each as long as a page. A block has the page with its keys and values, and it
may have a snapshot: the states of recurrent layers after the block, which cannot be shared block by block. In a model
with such layers, a sequence can only continue from a block with a snapshot. The other blocks still record that a prefix
was seen before, so that the next sequence with that prefix stops there for a snapshot (the branching points of Marconi,
arXiv 2411.19379).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from regard.serving.pages import Pages

SEARCHES = 64
"""Maximum number of searches in which a full tree is replaced: each eviction removes at least one block in 64."""


@dataclass(eq=False)
class Block:
    """A block of tokens that follows the tokens of `parent`.

    Attributes:
        page: the page with their keys and values; None in models without pages, and in the root.
        snapshot: states after the block's last token; None if none are kept.
        used: time of the last use, by a counter.
    """

    tokens: tuple[int, ...] = ()
    parent: Block | None = None
    page: int | None = None
    snapshot: Any = None
    used: int = 0
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)


class Prefixes:
    """The tree of blocks.

    Args:
        size: tokens of a block.
        pages: the pages of the model's cache; None for models without pages.
        blocks: maximum number of blocks for a model without pages; for other models the pool is the limit.
        snapshot_bytes: maximum bytes of all snapshots together.
    """

    def __init__(self, size: int, pages: Pages | None, *, blocks: int = 1 << 14, snapshot_bytes: int = 1 << 28) -> None:
        self.size, self.pages, self.most, self.snapshot_bytes = size, pages, blocks, snapshot_bytes
        self.root = Block()
        self.count = 0
        self._kept: dict[Block, int] = {}  # bytes of each snapshot, least recently used first
        self._clock = itertools.count(1)

    def path(self, tokens: Sequence[int]) -> list[Block]:
        """Return the blocks that a sequence begins with, except its last token, which must be read for new logits."""
        found, block = [], self.root
        for start in range(0, (len(tokens) - 1) // self.size * self.size, self.size):
            child = block.children.get(tuple(tokens[start : start + self.size]))
            if child is None:
                break
            self._touch(child)
            found.append(child)
            block = child
        return found

    def add(self, parent: Block, tokens: tuple[int, ...], page: int | None) -> Block:
        """Return the child of `parent` with these tokens; a new child becomes an owner of `page`."""
        child = parent.children.get(tokens)
        if child is None:
            child = parent.children[tokens] = Block(tokens, parent, page)
            self.count += 1
            if self.pages is not None and page is not None:
                self.pages.share([page])
        self._touch(child)
        if self.pages is None and self.count > self.most:
            self.evict(self.count - self.most * 3 // 4)
        return child

    def keep(self, block: Block, snapshot: Any, nbytes: int) -> None:
        """Store the snapshot of a block; the least recently used ones are dropped if there is no room."""
        if nbytes > self.snapshot_bytes or not self.alive(block):
            return
        block.snapshot = snapshot
        self._kept.pop(block, None)
        self._kept[block] = nbytes
        while sum(self._kept.values()) > self.snapshot_bytes:
            self._drop(next(iter(self._kept)))

    def alive(self, block: Block) -> bool:
        """Return whether a block is still in the tree."""
        return block is self.root or (block.parent is not None and block.parent.children.get(block.tokens) is block)

    def evict(self, count: int) -> None:
        """Remove up to `count` blocks whose pages have no other owner: leaves first, least recently used first.

        A few more are removed from a large tree, so that it is not searched again for the next page.
        """
        count = max(count, self.count // SEARCHES)
        while count > 0:
            ends = sorted((b for b in self._ends() if self._loose(b)), key=lambda b: b.used)[:count]
            if not ends:
                return
            for block in ends:
                self._remove(block)
            count -= len(ends)

    def clear(self) -> None:
        """Remove every block that no sequence is using."""
        self.evict(self.count)

    def _loose(self, block: Block) -> bool:
        return self.pages is None or block.page is None or self.pages.owners[block.page] == 1

    def _ends(self) -> Iterator[Block]:
        waiting = list(self.root.children.values())
        while waiting:
            block = waiting.pop()
            if not block.children:
                yield block
            waiting.extend(block.children.values())

    def _remove(self, block: Block) -> None:
        assert block.parent is not None
        del block.parent.children[block.tokens]
        self.count -= 1
        self._drop(block)
        if self.pages is not None and block.page is not None:
            self.pages.give_back([block.page])

    def _drop(self, block: Block) -> None:
        block.snapshot = None
        self._kept.pop(block, None)

    def _touch(self, block: Block) -> None:
        block.used = next(self._clock)
        if block in self._kept:
            self._kept[block] = self._kept.pop(block)
