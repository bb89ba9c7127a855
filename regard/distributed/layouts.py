"""Which tokens each rank has, and which pairs of tokens see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from regard.contract import at_least

if TYPE_CHECKING:
    from torch import Tensor

Span = tuple[int, int]
"""The tokens from the first number up to, but not including, the second."""


@dataclass(frozen=True)
class Layout:
    """A sequence split over ranks.

    Attributes:
        length: tokens of the whole sequence; it need not divide evenly.
        ranks: number of ranks.
        zigzag: whether rank p has chunks p and 2 P - 1 - p of 2 P, so that causal attention gives all ranks the same
            work; otherwise it has chunk p of P.
    """

    length: int
    ranks: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        at_least("length", self.length, 0)
        at_least("ranks", self.ranks, 1)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The spans of a rank's tokens, in the order in which the rank holds them; some may be empty."""
        if not self.zigzag:
            return (self._chunk(rank, self.ranks),)
        return self._chunk(rank, 2 * self.ranks), self._chunk(2 * self.ranks - 1 - rank, 2 * self.ranks)

    def _chunk(self, i: int, count: int) -> Span:
        return i * self.length // count, (i + 1) * self.length // count

    def size(self, rank: int) -> int:
        """Number of tokens of a rank."""
        return count(self.spans(rank))

    def take(self, x: Tensor, rank: int, dim: int = -2) -> Tensor:
        """Take the tokens of a rank from those of the whole sequence."""
        pieces = [x.narrow(dim, start, stop - start) for start, stop in self.spans(rank)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def join(self, pieces: Sequence[Tensor], dim: int = -2) -> Tensor:
        """Join the tokens of all ranks in sequence order: the inverse of :meth:`take`."""
        found: dict[Span, Tensor] = {}
        for rank, piece in enumerate(pieces):
            spans = self.spans(rank)
            found.update(zip(spans, piece.split([stop - start for start, stop in spans], dim), strict=True))
        return torch.cat([found[span] for span in sorted(found)], dim)


def count(spans: Sequence[Span]) -> int:
    """Number of tokens in the spans."""
    return sum(stop - start for start, stop in spans)


@dataclass(frozen=True)
class Block:
    """Query rows and key rows in which all pairs see each other, or (`diagonal`) those of a causal square."""

    queries: Span
    keys: Span
    diagonal: bool

    @property
    def pairs(self) -> int:
        """Number of pairs that see each other."""
        n, m = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        return n * (n + 1) // 2 if self.diagonal else n * m


def blocks(queries: Sequence[Span], keys: Sequence[Span], causal: bool) -> Iterator[Block]:
    """The non-empty blocks of visible pairs. Any two spans must be equal or disjoint."""
    if not causal:
        block = Block((0, count(queries)), (0, count(keys)), False)
        if block.pairs:
            yield block
        return
    row = 0
    for start, stop in queries:
        rows, row = (row, row + stop - start), row + stop - start
        column, run = 0, None  # adjacent keys that these queries see all of
        found = []
        for first, last in keys:
            columns, column = (column, column + last - first), column + last - first
            if first == start and last == stop:
                found.append(Block(rows, columns, True))
            elif last <= start:
                if run is not None and found[run].keys[1] == columns[0]:
                    found[run] = Block(rows, (found[run].keys[0], columns[1]), False)
                else:
                    run = len(found)
                    found.append(Block(rows, columns, False))
        yield from (block for block in found if block.pairs)
