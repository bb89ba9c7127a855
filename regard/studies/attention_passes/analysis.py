"""How often a cascade has to traverse its keys, and what that costs in memory traffic (FuseMax, arXiv 2406.10491).

A tensor is *full* if it has every coordinate of the keys, *complete* once the keys are reduced (or if it is derived
from a complete tensor), and *partial* if it has a value for each tile or is a running value. A statement that reads a
full tensor belongs to a traversal of the keys: not before the traversals of the full tensors that it reads, and after
those of the complete ones, since a reduction is only known at the end of its traversal. The number of traversals is the
largest of these numbers: no mapping needs fewer without computing something twice or rewriting the algorithm.

Deviation: a value for each tile that is derived from a complete tensor (a correction by the overall largest score) can
only be read in the next traversal, which the paper's wording leaves open.
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
    """Result of :func:`passes`.

    Attributes:
        rank: the rank whose traversals were counted.
        count: number of traversals needed.
        of: the traversal to which each tensor belongs; inputs have none.
        status: status of each tensor: full, partial, complete, or free of the rank.
    """

    rank: str
    count: int
    of: Mapping[str, int]
    status: Mapping[str, str]


def passes(cascade: Cascade, rank: str | None = None) -> Passes:
    """Count the traversals of a rank that a cascade needs.

    Args:
        cascade: a cascade from :func:`regard.studies.attention_passes.parse`.
        rank: the rank to count; that of the keys when None.

    Raises:
        Unsupported: for a rank that the cascade does not have.
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
    """The least traffic of score fibers for one head, in numbers.

    Attributes:
        kept: traffic if fibers stay in the buffer, which is 0; None where not even the fiber of one query fits.
        reread: traffic with a buffer of one tile: fibers are written once and read again in each later traversal.
    """

    kept: int | None
    reread: int

    @property
    def least(self) -> int:
        """The smaller of the two."""
        return self.reread if self.kept is None else min(self.kept, self.reread)


def min_traffic(count: int, keys: int, queries: int, buffer: int) -> MinimalTraffic:
    """The least traffic of score fibers for one head whose keys are traversed `count` times.

    The scores (or weights) of a query are a fiber of `keys` numbers. A single traversal uses them as it makes them;
    several traversals either keep a query's fiber in the buffer, or write it and read it once in each later traversal.

    Args:
        count: number of traversals, >= 1.
        keys, queries: numbers of keys and queries of the head, >= 1.
        buffer: how many numbers fit in the buffer, >= 1.

    Returns:
        Numbers moved in addition to queries, keys, values and outputs; 0 where no fiber has to leave the buffer.
    """
    for name, value in (("count", count), ("keys", keys), ("queries", queries), ("buffer", buffer)):
        at_least(name, value, 1)
    reread = 0 if count == 1 else count * keys * queries
    return MinimalTraffic(0 if count == 1 or keys <= buffer else None, reread)


def tiles(size: int, tile: int) -> int:
    """The number of tiles, counting a shorter last one."""
    return math.ceil(size / tile)
