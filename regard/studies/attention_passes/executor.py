"""Executor: runs a cascade in tiles of its keys, and counts the numbers that it reads, writes and holds."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.studies.attention_passes.expressions import (
    Coordinate,
    Expression,
    Number,
    Read,
    Size,
    factors,
)
from regard.studies.attention_passes.language import Cascade, Statement
from regard.studies.attention_passes.traversals import Walk, walks

_INFIX: Mapping[str, Callable[..., Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div, "neg": torch.neg,
    "<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "max": torch.maximum, "min": torch.minimum,
}  # fmt: skip
_REDUCE: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.sum, "max": torch.amax, "min": torch.amin, "mul": lambda x, dim: _product(x, dim)
}  # fmt: skip
_JOIN: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "max": torch.maximum, "min": torch.minimum, "mul": torch.mul
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Result of running a cascade.

    Attributes:
        output: the cascade's output: leading axes, then its ranks in their order.
        values: values of all tensors without keys, by name.
        traversals: number of walks over the keys in which a full tensor was read.
        reads, writes: how many numbers were read from and written to memory, by tensor.
        high_water: the most numbers held at once.
    """

    output: Tensor
    values: Mapping[str, Tensor]
    traversals: int
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    high_water: int

    @property
    def traffic(self) -> int:
        """How many numbers were read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


def run_cascade(
    cascade: Cascade,
    tensors: Mapping[str, Tensor],
    *,
    tile: int | None = None,
    keep: bool = True,
    sizes: Mapping[str, int] | None = None,
) -> Run:
    """Evaluate a cascade, walking over its keys in tiles.

    Args:
        cascade: the cascade to run.
        tensors: its inputs by name, of one floating dtype. The last axes are the ranks in their order; leading axes
            (batch, heads) are the same for all tensors that have them.
        tile: keys in a tile, the last of which may be shorter; all keys when None.
        keep: whether intermediate fibers that a later traversal reads stay in the buffer. Otherwise they are written to
            memory and read again, so that a buffer of one tile is enough.
        sizes: sizes of ranks that no input has.

    Raises:
        Unsupported: for missing inputs, inputs of several dtypes, wrong shapes, and ranks of unknown size or without
            coordinates (no keys).
    """
    return _Machine(cascade, tensors, tile, keep, sizes or {}).run()


class _Machine:
    """The state of a run: values of tensors, and the contents of the buffer."""

    def __init__(
        self, cascade: Cascade, tensors: Mapping[str, Tensor], tile: int | None, keep: bool, sizes: Mapping[str, int]
    ) -> None:
        self.cascade, self.fiber, self.keep = cascade, cascade.fiber, keep
        self.ranks, self.iterates = cascade.tensors(), cascade.iterates()
        self.inputs = _given(cascade, tensors)
        self.sizes = rank_sizes(cascade, self.inputs, sizes)
        self.tile = self.sizes[self.fiber.rank] if tile is None else tile
        if not isinstance(self.tile, int) or self.tile < 1:
            raise Unsupported(f"tile={self.tile!r}", supported="a whole number of keys, 1 or more, or None for all")
        self.like = next(iter(self.inputs.values()))
        self.plan = walks(cascade)
        self.begins = {one.target: one for one in cascade.statements if one.first}
        self.values: dict[str, Tensor] = {}  # tensors without keys: complete, or the last value of an iterated one
        self.stored: dict[str, list[Tensor]] = {}  # values by tile, for later walks
        self.steps: dict[str, int] = {}  # keys in each tile of `stored`
        self.live: dict[str, int] = {}
        self.high_water = 0
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()

    def run(self) -> Run:
        traversals = 0
        for number, walk in enumerate(self.plan):
            later = {read.tensor for rest in self.plan[number + 1 :] for one in rest.statements for read in one.reads}
            if walk.once:
                for one in walk.statements:
                    self._hold_inputs(one)
                    self.values[one.target] = _Tile(self, 0, 0, 0).evaluate(one)
                    self._hold(one.target, self.values[one.target])
            else:
                traversals += walk.counted
                self._walk(walk, later)
            for name in [name for name in self.live if name not in later]:
                del self.live[name]
        output = self.values.get(self.cascade.output)
        if output is None or self.cascade.output in self.iterates:
            output = self.joined(self.cascade.output)
        else:
            self.writes[self.cascade.output] += output.numel()
        return Run(output, dict(self.values), traversals, self.reads, self.writes, self.high_water)

    def _walk(self, walk: Walk, later: set[str]) -> None:
        step = walk.step or self.tile
        order = {one.target: at for at, one in enumerate(walk.statements)}
        last_use = {read.tensor: at for at, one in enumerate(walk.statements) for read in one.reads}
        for one in walk.statements:
            self._hold_inputs(one)
            if one.target in self.begins:
                self.values[one.target] = _Tile(self, 0, 0, 0).evaluate(self.begins[one.target])
                self._hold(one.target, self.values[one.target])
        for number, start in enumerate(range(0, self.sizes[self.fiber.rank], step)):
            here = _Tile(self, number, start, min(start + step, self.sizes[self.fiber.rank]))
            for at, one in enumerate(walk.statements):
                for read in one.reads:
                    here.fetch(read.tensor, order)
                value = here.evaluate(one)
                self._settle(here, one, value, later, step)
                for name in [name for name in here.held if last_use.get(name, order.get(name, at)) <= at]:
                    here.held.discard(name)
                    self.live.pop(f"{name} of a tile", None)
            for name, value in here.next.items():
                self.values[name] = value
            for name in here.next:
                self.live.pop(f"{name} of a tile", None)

    def _settle(self, here: _Tile, one: Statement, value: Tensor, later: set[str], step: int) -> None:
        """Store or accumulate a value computed in a tile."""
        name = one.target
        needed = name in later or name == self.cascade.output
        if one.iterates is not None:
            here.next[name] = value
            here.hold(name, value)
            if needed and self._history(name):
                self._store(name, value, step, kept=True)
        elif {self.fiber.rank, self.fiber.outer} & set(self.ranks[name]):
            here.own[name] = value
            here.hold(name, value)
            if needed:
                self._store(name, value, step, kept=self.fiber.rank not in self.ranks[name] or self.keep)
        else:
            before = self.values.get(name)
            self.values[name] = value if before is None else _JOIN[one.reduction](before, value)
            self._hold(name, value)

    def _history(self, name: str) -> bool:
        """Return whether all values of an iterated tensor are read, not only its last."""
        inside = {
            one.target for walk in self.plan if name in {s.target for s in walk.statements} for one in walk.statements
        }
        return name == self.cascade.output or any(
            index.at in ("here", "next") and index.rank == self.iterates[name]
            for one in self.cascade.statements
            if one.target not in inside
            for read in one.reads
            if read.tensor == name
            for index in read.indices
        )

    def _store(self, name: str, value: Tensor, step: int, kept: bool) -> None:
        self.steps[name] = step
        self.stored.setdefault(name, []).append(value)
        if name == self.cascade.output:
            self.writes[name] += value.numel()
        elif kept:
            self.live[name] = self.live.get(name, 0) + value.numel()
            self.mark()
        else:
            self.writes[name] += value.numel()

    def spilled(self, name: str) -> bool:
        return name in self.inputs or (not self.keep and self.fiber.rank in self.ranks[name])

    def _hold_inputs(self, one: Statement) -> None:
        """Read inputs without keys, once; they are held while they are needed."""
        for read in one.reads:
            name = read.tensor
            if name in self.inputs and self.fiber.rank not in self.ranks[name] and not self.reads[name]:
                self.reads[name] += self.inputs[name].numel()
                self._hold(name, self.inputs[name])

    def _hold(self, name: str, value: Tensor) -> None:
        self.live[name] = value.numel()
        self.mark()

    def mark(self) -> None:
        self.high_water = max(self.high_water, sum(self.live.values()))

    def joined(self, name: str) -> Tensor:
        values, ranks = self.stored[name], self.ranks[name]
        lead = values[0].dim() - (len(ranks) - (self.fiber.rank not in ranks or name in self.iterates))
        if self.fiber.rank in ranks and name not in self.iterates:
            return torch.cat(values, lead + ranks.index(self.fiber.rank))
        axis = self.iterates.get(name, str(self.fiber.outer))
        return torch.stack(values, lead + ranks.index(axis))


class _Tile:
    """The values in one tile: tensors have no tile axis, and their keys are those of the tile."""

    def __init__(self, machine: _Machine, number: int, start: int, stop: int) -> None:
        self.machine, self.fiber = machine, machine.fiber
        self.number, self.start, self.stop = number, start, stop
        self.own: dict[str, Tensor] = {}
        self.next: dict[str, Tensor] = {}
        self.held: set[str] = set()

    def hold(self, name: str, value: Tensor) -> None:
        self.held.add(name)
        self.machine.live[f"{name} of a tile"] = value.numel()
        self.machine.mark()

    def fetch(self, name: str, order: Mapping[str, int]) -> None:
        """Fetch a tensor's values for this tile from memory or from an earlier walk."""
        machine = self.machine
        if name in self.own or name in order or name in machine.iterates:
            return
        ranks = machine.ranks[name]
        if self.fiber.rank in ranks:
            self.own[name] = self._keys_of(name)
            if machine.spilled(name):
                machine.reads[name] += self.own[name].numel()
                self.hold(name, self.own[name])
        elif self.fiber.outer in ranks:
            self.own[name] = machine.stored[name][self.number]

    def _keys_of(self, name: str) -> Tensor:
        machine, ranks = self.machine, self.machine.ranks[name]
        if name not in machine.inputs and machine.steps[name] == self.stop - self.start == machine.tile:
            return machine.stored[name][self.number]
        whole = machine.inputs[name] if name in machine.inputs else machine.joined(name)
        axis = whole.dim() - len(ranks) + ranks.index(self.fiber.rank)
        return whole.narrow(axis, self.start, self.stop - self.start)

    def evaluate(self, one: Statement) -> Tensor:
        """The value of a statement in this tile, with axes in the order of its ranks."""
        axes = tuple(dict.fromkeys(name for rank in one.space if (name := self._axis(rank)) is not None))
        own = tuple(rank for rank in axes if rank in one.ranks)
        own = tuple(rank for rank in own if rank != one.iterates)  # has one coordinate here
        product = factors(one.expression)
        if product is not None and one.reduction == "add" and len(axes) > len(own):
            return self._einsum(product, own, axes)
        value = self._points(one.expression, axes)
        lead = max(0, value.dim() - len(axes))
        value = value.expand([*value.shape[:lead], *(self._size(rank) for rank in axes)])
        away = [lead + at for at, rank in enumerate(axes) if rank not in own]
        return _REDUCE[one.reduction](value, dim=away) if away else value.contiguous()

    def _axis(self, rank: str) -> str | None:
        """The axis of a rank in a tile; None for the rank that counts tiles."""
        return None if rank == self.fiber.outer else self.fiber.rank if rank == self.fiber.inner else rank

    def _size(self, rank: str) -> int:
        return self.stop - self.start if rank == self.fiber.rank else self.machine.sizes[rank]

    def _einsum(self, product: Sequence[Read], own: tuple[str, ...], axes: tuple[str, ...]) -> Tensor:
        letters = {rank: chr(ord("a") + at) for at, rank in enumerate(axes)}
        found = [self._read(read) for read in product]
        words = ["..." + "".join(letters[rank] for rank in ranks) for _, ranks in found]
        return torch.einsum(
            ",".join(words) + "->..." + "".join(letters[rank] for rank in own), *(value for value, _ in found)
        )

    def _points(self, expression: Expression, axes: tuple[str, ...]) -> Tensor:
        """The values of an expression at all points, broadcastable."""
        like = self.machine.like
        if isinstance(expression, Number):
            return like.new_tensor(expression.value).view((1,) * len(axes))
        if isinstance(expression, Size):
            return like.new_tensor(self._whole_size(expression.rank)).view((1,) * len(axes))
        if isinstance(expression, Coordinate):
            return self._coordinate(expression.rank, axes)
        if isinstance(expression, Read):
            value, ranks = self._read(expression)
            lead = value.dim() - len(ranks)
            order = sorted(range(len(ranks)), key=lambda at: axes.index(ranks[at]))
            value = value.permute([*range(lead), *(lead + at for at in order)])
            sizes = [self._size(rank) if rank in ranks else 1 for rank in axes]
            return value.reshape(*value.shape[:lead], *sizes)
        values = [self._points(argument, axes) for argument in expression.arguments]
        if expression.op == "where":
            return torch.where(values[0].bool(), values[1], values[2])
        function = _INFIX.get(expression.op) or getattr(torch, expression.op)
        return function(*values)

    def _whole_size(self, rank: str) -> int:
        sizes, tile = self.machine.sizes, self.machine.tile
        if rank == self.fiber.outer:
            return math.ceil(sizes[self.fiber.rank] / tile)
        return tile if rank == self.fiber.inner else sizes[rank]

    def _coordinate(self, rank: str, axes: tuple[str, ...]) -> Tensor:
        like = self.machine.like
        ones = (1,) * len(axes)
        if rank == self.fiber.outer or self._axis(rank) not in axes:
            return like.new_tensor(self.number if rank == self.fiber.outer else self.start).view(ones)
        start = self.start if rank == self.fiber.rank else 0
        numbers = torch.arange(start, start + self._size(str(self._axis(rank))), device=like.device).to(like.dtype)
        shape = [-1 if one == self._axis(rank) else 1 for one in axes]
        return numbers.view(shape)

    def _read(self, read: Read) -> tuple[Tensor, tuple[str, ...]]:
        """The tensor of a read, and its axes in this tile."""
        machine, name = self.machine, read.tensor
        iterated = machine.iterates.get(name)
        ranks = tuple(rank for rank in machine.ranks[name] if rank not in (self.fiber.outer, iterated))
        if iterated is None:
            for source in (self.own, machine.values, machine.inputs):
                if name in source:
                    return source[name], ranks
        at = next(index.at for index in read.indices if index.at == "first" or index.rank == iterated)
        if at == "first":
            return self.evaluate(machine.begins[name]), ranks
        if at == "last" or name not in machine.stored or self.number >= len(machine.stored[name]):
            return (self.next[name] if at == "next" else machine.values[name]), ranks
        history = machine.stored[name]
        if at == "next":
            return history[self.number], ranks
        return (history[self.number - 1] if self.number else self.evaluate(machine.begins[name])), ranks


def rank_sizes(cascade: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of each rank, from the inputs, from `sizes` and from the cascade.

    Raises:
        Unsupported: if two of them differ, an input has too few axes, or a size is unknown or 0.
    """
    known = {**{rank: size for rank, size in cascade.sizes.items() if isinstance(size, int)}, **sizes}
    said = dict.fromkeys(known, "sizes")
    lead: tuple[str, tuple[int, ...]] | None = None
    for name, ranks in cascade.inputs.items():
        shape = tuple(tensors[name].shape)
        told = f"{name}[{', '.join(ranks)}]"
        if len(shape) < len(ranks):
            raise Unsupported(
                f"{name} of shape {shape} for {cascade.name}", supported=f"an axis for each rank of {told}"
            )
        outer, own = shape[: len(shape) - len(ranks)], shape[len(shape) - len(ranks) :]
        if outer and lead is not None and lead[1] != outer:
            raise Unsupported(
                f"{name} with {outer} before its ranks, {lead[0]} with {lead[1]}",
                supported="the same leading axes, or none",
            )
        lead = (name, outer) if outer else lead
        for rank, size in zip(ranks, own, strict=True):
            if known.setdefault(rank, size) != size:
                raise Unsupported(
                    f"{name} of shape {shape} for {cascade.name}: {size} for rank {rank!r} of {told}",
                    supported=f"{known[rank]}, as in {said[rank]}",
                )
            said.setdefault(rank, name)
    return complete_sizes(cascade, known)


def complete_sizes(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
    """The given sizes, completed by those in the cascade.

    Raises:
        Unsupported: if a size is unknown or below 1.
    """
    known = dict(sizes)
    for rank, said in cascade.sizes.items():
        if rank not in known and (isinstance(said, int) or said in known):
            known[rank] = said if isinstance(said, int) else known[said]
    own_ranks = {rank for rank in cascade.ranks if rank not in cascade.fiber.parts} | {cascade.fiber.rank}
    unknown = sorted(own_ranks - set(known))
    if unknown:
        raise Unsupported(
            f"{cascade.name} without a size of rank {', '.join(unknown)}",
            supported=f"a line like sizes: {unknown[0]} = 64",
        )
    for rank, size in known.items():
        if size < 1:
            raise Unsupported(f"{cascade.name} with size {size} of rank {rank!r}", supported="sizes from 1 on")
    return known


def _given(cascade: Cascade, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a cascade, all there and of one floating dtype, and no others."""
    found: dict[str, Tensor] = {}
    for name in tensors:
        if name not in cascade.inputs:
            raise Unsupported(f"{name!r} as an input of {cascade.name}", supported=", ".join(cascade.inputs))
    for name in cascade.inputs:
        if name not in tensors:
            raise Unsupported(f"{cascade.name} without {name}", supported=f"tensors {', '.join(cascade.inputs)}")
        found[name] = tensors[name]
        if not found[name].is_floating_point():
            raise Unsupported(f"{name} of dtype {found[name].dtype}", supported="floating-point numbers")
    dtypes = {name: x.dtype for name, x in found.items()}
    if len(set(dtypes.values())) > 1:
        told = ", ".join(f"{name} of {dtype}" for name, dtype in dtypes.items())
        raise Unsupported(f"inputs of {cascade.name} in several dtypes ({told})", supported="one dtype for all")
    return found


def _product(x: Tensor, dim: Sequence[int]) -> Tensor:
    return functools.reduce(lambda value, axis: value.prod(axis), sorted(dim, reverse=True), x)
