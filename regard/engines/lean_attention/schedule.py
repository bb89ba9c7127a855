"""Schedules, which say who computes which tiles; integers only, no tensors.

A *unit* is an output tile: a request, a head of keys and a block of queries; its number of key tiles depends on how
many keys the queries reach. A schedule assigns parts of units to workers.

- ``per_head``: whole units, each to the worker that is free first (FlashAttention-2 in decoding);
- ``fixed_split``: each unit in the same number of parts, assigned likewise (FlashDecoding);
- ``lean``: all tiles in one line, cut into equal spans (stream-K; LeanAttention, arXiv 2405.10480): loads differ by at
  most one tile, and each worker continues at most one unit that another began.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from regard.contract import Unsupported, at_least, one_of

SCHEMES = ("per_head", "fixed_split", "lean")
GOOD_ENOUGH, BUSY_ENOUGH, MOST_SPLITS = 0.85, 0.8, 128
"""Constants of the heuristic for splits: how full the last wave must be relative to the best choice, how many units per
worker need no splits, and the largest number of splits."""


@dataclass(frozen=True)
class Part:
    """Tiles [first, end) of a unit."""

    unit: int
    first: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """Which tiles each worker computes, in order.

    Attributes:
        scheme: one of `SCHEMES`.
        counts: number of tiles in each unit.
        workers: the parts of each worker.
    """

    scheme: str
    counts: tuple[int, ...]
    workers: tuple[tuple[Part, ...], ...]

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Number of tiles of each worker."""
        return tuple(sum(part.end - part.first for part in parts) for parts in self.workers)

    @property
    def makespan(self) -> int:
        """Tiles of the busiest worker, to which the run time is proportional if all tiles take equally long."""
        return max(self.loads, default=0)

    @cached_property
    def cut(self) -> frozenset[int]:
        """Units with more than one part, whose results have to be merged."""
        parts = Counter(part.unit for worker in self.workers for part in worker)
        return frozenset(unit for unit, times in parts.items() if times > 1)


def lean_schedule(counts: Sequence[int], workers: int) -> Schedule:
    """Equal spans of the line of all tiles.

    Args:
        counts: number of tiles in each unit.
        workers: largest number of workers; fewer are used if there are fewer tiles.
    """
    at_least("workers", workers, 1)
    ends = list(accumulate(counts))
    total = ends[-1] if ends else 0
    count = max(1, min(workers, total))
    most = -(-total // count)
    high = total - (most - 1) * count  # workers with `most` tiles; the others have one fewer
    made, start = [], 0
    for worker in range(count):
        end = start + (most if worker < high else most - 1)
        parts = []
        while start < end:
            unit = bisect_right(ends, start)
            stop = min(end, ends[unit])
            begin = ends[unit] - counts[unit]
            parts.append(Part(unit, start - begin, stop - begin))
            start = stop
        made.append(tuple(parts))
    return Schedule("lean", tuple(counts), tuple(made))


def split_schedule(counts: Sequence[int], workers: int, splits: int = 1) -> Schedule:
    """Cut each unit into `splits` parts of equal length (the last may be shorter), each for the worker that is free
    first."""
    at_least("workers", workers, 1)
    at_least("splits", splits, 1)
    made: list[list[Part]] = [[] for _ in range(workers)]
    free = [(0, worker) for worker in range(workers)]
    for unit, count in enumerate(counts):
        size = -(-count // splits)
        for first in range(0, count, max(size, 1)):
            end = min(first + size, count)
            load, worker = free[0]
            heapq.heapreplace(free, (load + end - first, worker))
            made[worker].append(Part(unit, first, end))
    return Schedule("per_head" if splits == 1 else "fixed_split", tuple(counts), tuple(map(tuple, made)))


def choose_splits(units: int, tiles: int, workers: int) -> int:
    """FlashDecoding's heuristic for `units` of `tiles` tiles each: the smallest number of splits that fills the last
    wave of workers nearly as well as the best one."""
    if units >= BUSY_ENOUGH * workers:
        return 1
    candidates = [
        splits
        for splits in range(1, min(MOST_SPLITS, workers, max(tiles, 1)) + 1)
        if splits == 1 or -(-tiles // splits) != -(-tiles // (splits - 1))
    ]
    waves = {splits: units * splits / workers for splits in candidates}
    filled = {splits: wave / max(1, -(-units * splits // workers)) for splits, wave in waves.items()}
    best = max(filled.values())
    return next(splits for splits in candidates if filled[splits] >= GOOD_ENOUGH * best)


def make_schedule(counts: Sequence[int], workers: int, *, scheme: str = "lean", splits: int | None = None) -> Schedule:
    """Make a schedule by the name of its scheme.

    Args:
        splits: number of splits for ``fixed_split``; from :func:`choose_splits` for the longest unit when None.

    Raises:
        Unsupported: for an unknown scheme, or `splits` with a scheme other than ``fixed_split``.
    """
    one_of("scheme", scheme, SCHEMES)
    if splits is not None and scheme != "fixed_split":
        raise Unsupported(f"splits={splits} with scheme={scheme!r}", supported="scheme='fixed_split'")
    if scheme == "lean":
        return lean_schedule(counts, workers)
    if scheme == "fixed_split" and splits is None:
        splits = choose_splits(len(counts), max(counts, default=0), workers)
    return split_schedule(counts, workers, 1 if scheme == "per_head" or splits is None else splits)


def worker_count(counts: Sequence[int], processors: int, *, least_tiles: int = 2, most_splits: int = 32) -> int:
    """The number of workers that the authors' code launches: with little work, as many as get at least `least_tiles`
    each; else two per processor. On average, no unit has more than `most_splits` parts."""
    total, longest = sum(counts), max(counts, default=0)
    if not total:
        return 1
    if total <= 2 * least_tiles * processors:
        count = min((total + least_tiles - 1) // least_tiles, -(-most_splits * total // longest))
    else:
        count = min(2 * processors, most_splits * len(counts))
    return max(1, min(count, total))


@dataclass(frozen=True)
class Units:
    """The units of a call, ordered by request, head of keys and block of queries.

    Attributes:
        lengths: number of keys in each request.
        kv_heads: number of key heads.
        queries: number of queries in each request; if `causal`, the last one is aligned with the last key.
        tile: keys per tile.
        rows: queries per block.
    """

    lengths: tuple[int, ...]
    kv_heads: int
    queries: int
    tile: int
    rows: int
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("kv_heads", "tile", "rows"):
            at_least(name, getattr(self, name), 1)
        at_least("queries", self.queries, 0)
        for length in self.lengths:
            at_least("lengths", length, 0)

    @property
    def blocks(self) -> int:
        """Number of query blocks per request and head."""
        return -(-self.queries // self.rows)

    def keys(self, request: int, block: int) -> int:
        """Number of keys that the queries of a block reach."""
        length = self.lengths[request]
        if not self.causal:
            return length
        last = length - self.queries + min((block + 1) * self.rows, self.queries)
        return max(0, min(length, last))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of tiles in each unit."""
        return tuple(
            -(-self.keys(request, block) // self.tile)
            for request in range(len(self.lengths))
            for _ in range(self.kv_heads)
            for block in range(self.blocks)
        )

    def at(self, unit: int) -> tuple[int, int, int]:
        """Request, head of keys and block of queries of a unit."""
        rest, block = divmod(unit, self.blocks)
        request, head = divmod(rest, self.kv_heads)
        return request, head, block
