"""Tiles of a cascade on two arrays: a list scheduler that shows the benefit of interleaving neighbouring tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from regard.contract import at_least
from regard.studies.attention_passes.analysis import tiles
from regard.studies.attention_passes.language import Cascade
from regard.studies.attention_passes.machine import Machine, cost
from regard.studies.attention_passes.traversals import Walk, walks


@dataclass(frozen=True)
class Slot:
    """A statement of a tile on an array, with its first and last cycle."""

    target: str
    tile: int
    on_cells: bool
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """When each statement of each tile ran.

    Attributes:
        slots: by walk, tile and statement.
        cycles: cycles until the last slot has ended.
        util_2d, util_1d: share of the cycles in which each array is busy.
    """

    slots: tuple[Slot, ...]
    cycles: float
    util_2d: float
    util_1d: float


def schedule(cascade: Cascade, machine: Machine, sizes: Mapping[str, int], *, ahead: int = 1) -> Schedule:
    """Schedule the tiles of one head: each array runs its statements in order, each as soon as its inputs are ready.

    Args:
        sizes: size of each rank; the keys should be whole tiles of the machine.
        ahead: how many further tiles may begin before a tile is finished; 0 runs tile by tile.
    """
    at_least("ahead", ahead, 0)
    found = cost(cascade, machine, {**sizes, cascade.fiber.rank: machine.tile})
    count = tiles(sizes[cascade.fiber.rank], machine.tile)
    free = {True: 0.0, False: 0.0}
    slots: list[Slot] = []
    begun = 0.0
    for walk in walks(cascade):
        ended: list[dict[str, float]] = []
        for tile in range(1 if walk.once else count):
            begun_here = begun if tile <= ahead else max(begun, *ended[tile - 1 - ahead].values())
            ended.append({})
            for target, needed in _needs(cascade, walk):
                unit = target in found.on_cells
                waits = [ended[tile + shift][name] for name, shift in needed if tile + shift >= 0]
                start = max(free[unit], begun_here, *waits, 0.0)
                free[unit] = ended[tile][target] = start + found.cycles[target]
                slots.append(Slot(target, tile, unit, start, free[unit]))
        begun = max(free.values())
    busy = {unit: sum(slot.end - slot.start for slot in slots if slot.on_cells == unit) for unit in (True, False)}
    return Schedule(tuple(slots), begun, busy[True] / begun, busy[False] / begun)


def _needs(cascade: Cascade, walk: Walk) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each statement of a walk with the statements it depends on, in the same tile (0) or the one before (-1)."""
    own, iterates = {one.target for one in walk.statements}, cascade.iterates()
    return [
        (
            one.target,
            [
                (
                    read.tensor,
                    -any(index.at == "here" and index.rank == iterates.get(read.tensor) for index in read.indices),
                )
                for read in one.reads
                if read.tensor in own
            ],
        )
        for one in walk.statements
    ]
