"""Which statements of a cascade run in which walk over the keys, found greedily: the plan of the executor."""

from __future__ import annotations

from dataclasses import dataclass

from regard.studies.attention_passes.expressions import Read
from regard.studies.attention_passes.language import Cascade, Statement


@dataclass(frozen=True)
class Walk:
    """Statements that run together.

    Attributes:
        statements: the statements in order.
        once: whether they run a single time, without a walk over tiles.
        counted: whether the walk reads a full tensor and so counts as a traversal of the keys.
        step: 1 if the keys have to be walked over one by one; None for tiles.
    """

    statements: tuple[Statement, ...]
    once: bool = False
    counted: bool = False
    step: int | None = None


def walks(cascade: Cascade) -> list[Walk]:
    """The walks of a cascade: each as early as its inputs allow, with as many statements as possible."""
    schedule = _Schedule(cascade)
    found = []
    while schedule.waiting:
        walk = schedule.next()
        schedule.finish(walk)
        found.append(walk)
    return found


class _Schedule:
    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.fiber = cascade.fiber
        self.ranks = cascade.tensors()
        self.iterates = cascade.iterates()
        self.begins = {one.target: one for one in cascade.statements if one.first}
        self.waiting = [one for one in cascade.statements if not one.first]
        self.done = set(cascade.inputs)

    def along(self, tensor: str) -> bool:
        """Return whether a tensor has a value for each key or tile."""
        return tensor in self.iterates or bool({self.fiber.rank, self.fiber.outer} & set(self.ranks[tensor]))

    def whole(self, one: Statement) -> bool:
        """Return whether a statement reads a full tensor."""
        return any(
            self.fiber.rank in self.ranks[read.tensor] and read.tensor not in self.iterates for read in one.reads
        )

    def _of_tiles(self, one: Statement) -> bool:
        """Return whether a statement needs no walk over keys but only their tiles; what coordinates make for each key is
        left to the walk that reads it."""
        return not self.whole(one) and self.fiber.rank not in self.ranks[one.target]

    def next(self) -> Walk:
        at_once = tuple(one for one in self.waiting if self._at_once(one))
        if at_once:
            return Walk(at_once, once=True)
        for candidates in ([one for one in self.waiting if self._of_tiles(one)], self.waiting):
            group = self._possible(candidates)
            if group:
                singly = self.fiber.outer is None and any(one.iterates is not None for one in group)
                counted = any(self.whole(one) for one in group)
                return Walk(tuple(group), counted=counted, step=1 if singly else None)
        raise AssertionError(f"{self.cascade.name} cannot go on")

    def finish(self, walk: Walk) -> None:
        self.done |= {one.target for one in walk.statements}
        self.waiting = [one for one in self.waiting if one.target not in self.done]

    def _at_once(self, one: Statement) -> bool:
        ended = all(
            read.tensor in self.done and (not self.along(read.tensor) or _at_an_end(read)) for read in one.reads
        )
        return ended and not self.along(one.target)

    def _possible(self, candidates: list[Statement]) -> list[Statement]:
        """The largest set of statements that can run in one walk."""
        group = list(candidates)
        while True:
            own = {one.target for one in group}
            left = [one for one in group if self._ready(one, own)]
            if len(left) == len(group):
                return left
            group = left

    def _ready(self, one: Statement, group: set[str]) -> bool:
        begin = self.begins.get(one.target)
        if begin is not None and not all(read.tensor in self.done for read in begin.reads):
            return False
        for read in one.reads:
            on_the_way = read.tensor in group and self.along(read.tensor) and not _at_an_end(read)
            if read.tensor not in self.done and not on_the_way:
                return False
        return True


def _at_an_end(read: Read) -> bool:
    return any(index.at in ("first", "last") for index in read.indices)
