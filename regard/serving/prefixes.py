"""What is kept of sequences that were read, so that another one with the same beginning goes on from there.

A tree of blocks of tokens, each as long as a page. A block has the page with its keys and values, and it may have a
snapshot: the states of recurrent layers behind it, which cannot be shared block by block. Where a model has such layers,
only blocks with a snapshot can be gone on from; the others still say that a beginning was seen before, so that the next
sequence that has it stops there for a snapshot (the branching points of Marconi, arXiv 2411.19379).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from regard.serving.pages import Pages

SEARCHES = 64
"""How often a full tree is searched at most until all of it is replaced."""


@dataclass(eq=False)
class Block:
    """Tokens behind those of `parent`.

    Attributes:
        page: where their keys and values are; None in models without pages, and in the root.
        snapshot: states behind the block.
        used: when it was last gone through.
    """

    tokens: tuple[int, ...] = ()
    parent: Block | None = None
    page: int | None = None
    snapshot: Any = None
    used: int = 0
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)


class Prefixes:
    """The tree.

    Args:
        size: tokens of a block.
        pages: what pages are taken from; None for models without.
        blocks: most blocks of a model without pages; the pool limits the others.
        snapshot_bytes: most bytes of all snapshots.
    """

    def __init__(self, size: int, pages: Pages | None, *, blocks: int = 1 << 14, snapshot_bytes: int = 1 << 28) -> None:
        self.size, self.pages, self.most, self.snapshot_bytes = size, pages, blocks, snapshot_bytes
        self.root = Block()
        self.count = 0
        self._kept: dict[Block, int] = {}  # bytes of snapshots, the longest unused first
        self._clock = itertools.count(1)

    def path(self, tokens: Sequence[int]) -> list[Block]:
        """The blocks that a sequence begins with, without its last token: that one has to be read for what follows it."""
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
        """The block of these tokens behind another, which becomes an owner of `page` where it is new."""
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
        """Put a snapshot behind a block; those that were used least recently go where there is no room."""
        if nbytes > self.snapshot_bytes or not self.alive(block):
            return
        block.snapshot = snapshot
        self._kept.pop(block, None)
        self._kept[block] = nbytes
        while sum(self._kept.values()) > self.snapshot_bytes:
            self._drop(next(iter(self._kept)))

    def alive(self, block: Block) -> bool:
        """Whether it is in the tree still."""
        return block is self.root or (block.parent is not None and block.parent.children.get(block.tokens) is block)

    def evict(self, count: int) -> None:
        """Take out so many blocks that nobody else owns, if there are as many: ends first, by when they were used.

        Of a large tree a few more go, so that it is not searched anew for the next page.
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
        """Forget everything that nobody is using."""
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
