"""How often a cascade has to walk over its keys, and what that costs in memory traffic (FuseMax, arXiv 2406.10491).

A tensor is *full* while it carries every coordinate of the keys, *complete* once they are reduced (or once it is derived from
such), *partial* where tiles are left of them or where it is a running value. A statement that reads a full tensor belongs to a
traversal of the keys: not before those of the full tensors that it reads, and after those of the complete ones, since a
reduction is known when its traversal has ended. The number of traversals is the largest of these numbers: what no mapping can
go below without computing something twice or writing the algorithm otherwise.

Deviation: a value for each tile that is derived from a complete one (a correction by the largest score of all) may be read in
the traversal after it only, which the paper's wording leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from regard.contract import Unsupported, at_least
from regard.studies.attention_passes.expressions import Index
from regard.studies.attention_passes.language import Cascade, Fiber, Statement

FULL, PARTIAL, COMPLETE, FREE = "full", "partial", "complete", "free"


@dataclass(frozen=True)
class Passes:
    """What :func:`passes` found.

    Attributes:
        rank: whose traversals were counted.
        count: the traversals that are needed.
        of: the traversal that each tensor belongs to; inputs have none.
        status: of each tensor: full, partial, complete, or free of the rank.
    """

    rank: str
    count: int
    of: Mapping[str, int]
    status: Mapping[str, str]


def passes(cascade: Cascade, rank: str | None = None) -> Passes:
    """The traversals of a rank that a cascade needs.

    Args:
        cascade: as :func:`regard.studies.attention_passes.parse` reads it.
        rank: that of the keys when None.

    Raises:
        Unsupported: for a rank that the cascade lacks.
    """
    fiber = cascade.fiber
    if rank is not None and rank not in fiber.parts:
        if rank not in cascade.ranks:
            raise Unsupported(f"rank {rank!r} of {cascade.name}", supported=", ".join(cascade.ranks))
        fiber = Fiber(rank)
    iterates = cascade.iterates()
    status = {name: FULL if fiber.rank in ranks else FREE for name, ranks in cascade.inputs.items()}
    readable = dict.fromkeys(cascade.inputs, 1)
    of: dict[str, int] = {}
    count = 0
    for one in cascade.statements:
        if one.first:
            continue
        known = [
            (status[read.tensor], readable[read.tensor], read.indices) for read in one.reads if read.tensor in status
        ]
        begins = max((_after(*read, iterates=iterates, fiber=fiber) for read in known), default=1)
        whole = any(kind == FULL for kind, _, _ in known)
        own = [of[read.tensor] for read in one.reads if read.tensor in of]
        of[one.target] = begins if whole else max(own, default=1)
        count = max(count, of[one.target]) if whole else count
        status[one.target] = _status(one, {kind for kind, _, _ in known}, iterates, fiber)
        readable[one.target] = of[one.target] + 1 if status[one.target] == COMPLETE else max(begins, of[one.target])
    return Passes(fiber.rank, count, of, status)


def _after(kind: str, readable: int, indices: tuple[Index, ...], *, iterates: Mapping[str, str], fiber: Fiber) -> int:
    """The first traversal that may read a tensor."""
    ended = kind == PARTIAL and any(index.at == "last" and index.rank in fiber.parts for index in indices)
    return readable + 1 if ended else readable


def _status(one: Statement, kinds: set[str], iterates: Mapping[str, str], fiber: Fiber) -> str:
    if one.target in iterates and iterates[one.target] in fiber.parts:
        return PARTIAL
    if fiber.rank in one.ranks:
        return FULL
    if fiber.outer in one.ranks:
        return PARTIAL
    return FREE if kinds <= {FREE} else COMPLETE


@dataclass(frozen=True)
class MinimalTraffic:
    """The least traffic of a head with p traversals, in numbers.

    Attributes:
        kept: with the fibers of all queries of a tile in the buffer: what is read and written once, None where not even the
            fiber of one query fits.
        reread: with a buffer of a tile: each traversal reads its fiber again.
    """

    kept: int | None
    reread: int

    @property
    def least(self) -> int:
        """The smaller of the two."""
        return self.reread if self.kept is None else min(self.kept, self.reread)


def min_traffic(count: int, keys: int, queries: int, buffer: int) -> MinimalTraffic:
    """How much of fibers of scores has to move for one head whose keys are walked over `count` times.

    The scores (or weights) of a query are a fiber of `keys` numbers. One traversal makes and uses them on the way; more either
    keep the fiber of a query in the buffer, or write it and read it once in each later traversal.

    Args:
        count: traversals, >= 1.
        keys, queries: of the head, >= 1.
        buffer: numbers that fit, >= 1.

    Returns:
        Numbers beside queries, keys, values and outputs, which are moved in any case: 0 where nothing of a fiber has to leave.
    """
    for name, value in (("count", count), ("keys", keys), ("queries", queries), ("buffer", buffer)):
        at_least(name, value, 1)
    reread = 0 if count == 1 else count * keys * queries
    return MinimalTraffic(0 if count == 1 or keys <= buffer else None, reread)


def tiles(size: int, tile: int) -> int:
    """How many tiles there are, the last one shorter where they do not divide."""
    return math.ceil(size / tile)
