"""Machines with a 2D array of cells, a 1D array of lanes, a buffer and a memory, and the cost of a cascade on them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.contract import Unsupported, closest
from regard.measurement.data_files import read_data
from regard.measurement.speeds import Speeds
from regard.studies.attention_passes.analysis import tiles
from regard.studies.attention_passes.executor import complete_sizes
from regard.studies.attention_passes.expressions import operators
from regard.studies.attention_passes.language import Cascade, Statement
from regard.studies.attention_passes.traversals import Walk, walks

FOLDER = Path(__file__).parent / "machines"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))

_COSTS = {
    "+": ("add",), "-": ("add",), "neg": ("add",), "*": ("mul",), "/": ("div",), "sigmoid": ("exp", "add", "div"),
    "tanh": ("exp", "add", "div"), **dict.fromkeys(("exp", "log", "sqrt", "erf", "cos", "sin"), ("exp",)),
}  # fmt: skip
"""The operations that an operator counts as; comparisons, maxima and selections count as ``max``."""

OPERATIONS = ("mac", "mul", "add", "max", "exp", "div")


@dataclass(frozen=True)
class Machine:
    """A machine, as described by a small YAML file.

    Attributes:
        name: name of the machine.
        clock_hz: cycles per second.
        cells, lanes: units of the 2D and the 1D array; may be fractions for a measured machine.
        tile: keys in a tile.
        buffer_bytes: size of the on-chip buffer.
        bytes_per_second: bandwidth of the memory.
        word_bytes: bytes of a number.
        cell_costs, lane_costs: cycles of each operation (mac, mul, add, max, exp, div); cells may lack some.
        overlap: whether cells, lanes and memory work at the same time; otherwise the times of cells and lanes add up.
    """

    name: str
    clock_hz: float
    cells: float
    lanes: float
    tile: int
    buffer_bytes: int
    bytes_per_second: float
    word_bytes: int
    cell_costs: Mapping[str, float]
    lane_costs: Mapping[str, float]
    overlap: bool = True


@dataclass(frozen=True)
class Cost:
    """The cost of a cascade on a machine.

    Attributes:
        cycles: cycles of each statement.
        on_cells: the statements that the 2D array computes.
        bytes: bytes moved to and from memory.
        kept: whether fibers that a later traversal reads stay in the buffer; True if there are none.
        cells_seconds, lanes_seconds, memory_seconds: busy times of cells, lanes and memory.
        seconds: total time.
    """

    cycles: Mapping[str, float]
    on_cells: frozenset[str]
    bytes: float
    kept: bool
    cells_seconds: float
    lanes_seconds: float
    memory_seconds: float
    seconds: float


def read_machine(given: str | Path) -> Machine:
    """Read a machine by its name (fusemax, flat, edge) or from a YAML file.

    Raises:
        Unsupported: for a file that cannot be read, or with missing, unknown or ill-typed fields.
    """
    if str(given) in SHIPPED:
        return _shipped(str(given))
    path = Path(given)
    if not path.is_file():
        supported = f"{', '.join(SHIPPED)}, or a YAML file with the fields of one"
        raise Unsupported(f"machine {str(given)!r}", supported=supported, nearest=closest(str(given), SHIPPED))
    return machine_of(read_data(path, f"machine {path.name}"), path.name)


@functools.cache
def _shipped(name: str) -> Machine:
    path = FOLDER / f"{name}.yaml"
    return machine_of(read_data(path, f"machine {path.name}"), path.name)


def machine_of(found: Any, name: str = "machine") -> Machine:
    """Make a machine from its fields.

    Raises:
        Unsupported: for missing, unknown or ill-typed fields.
    """
    fields = [field.name for field in dataclasses.fields(Machine)]
    if not isinstance(found, Mapping):
        raise Unsupported(f"machine {name} without fields", supported=", ".join(fields))
    wrong = [one for one in found if one not in fields]
    if wrong:
        raise Unsupported(
            f"field {wrong[0]!r} of machine {name}", supported=", ".join(fields), nearest=closest(str(wrong[0]), fields)
        )
    missing = [one for one in fields if one not in found and one not in ("name", "overlap")]
    if missing:
        raise Unsupported(f"machine {name} without {', '.join(missing)}", supported=", ".join(fields))
    values = {**found, "name": str(found.get("name", name.rsplit(".", 1)[0]))}
    for one in ("clock_hz", "cells", "lanes", "tile", "buffer_bytes", "bytes_per_second", "word_bytes"):
        values[one] = _positive(values[one], f"{one} of machine {name}")
    for one in ("tile", "buffer_bytes", "word_bytes"):
        values[one] = int(values[one])
    for one in ("cell_costs", "lane_costs"):
        values[one] = _costs(values[one], f"{one} of machine {name}", all_of_them=one == "lane_costs")
    return Machine(**values)


def _costs(given: Any, what: str, all_of_them: bool) -> dict[str, float]:
    costs = given if isinstance(given, Mapping) else {}
    complete = set(costs) >= set(OPERATIONS) if all_of_them else bool(costs)
    if not complete or not set(costs) <= set(OPERATIONS):
        supported = f"{'all' if all_of_them else 'some'} of {', '.join(OPERATIONS)}, with the cycles of each"
        raise Unsupported(f"{what}: {given!r}", supported=supported)
    return {op: _positive(cycles, f"{what}: {op}") for op, cycles in costs.items()}


def _positive(value: Any, what: str) -> float:
    try:
        number = float(value)  # YAML reads 940e6 as a string
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise Unsupported(f"{what}: {value!r}", supported="a number above 0")
    return number


def this_processor(speeds: Speeds) -> Machine:
    """One core as a machine, by its measured speeds; its buffer is the L2 cache.

    A fused kernel works in registers, where an addition takes as long as a multiply-accumulate; so cells and lanes are
    the same units, as many as there are multiplications in a nanosecond. They run in turn on one core, so only memory
    overlaps.
    """
    costs = dict.fromkeys(OPERATIONS, 1.0)
    costs |= {"exp": speeds.products / speeds.exponentials, "div": speeds.products / speeds.divisions}
    each, buffer = speeds.products / 1e9, speeds.caches.get("L2", 2**20)
    return Machine("this processor", 1e9, each, each, 64, buffer, speeds.bytes, 4, costs, costs, overlap=False)


def points(statement: Statement, cascade: Cascade, sizes: Mapping[str, int], tile: int) -> int:
    """The number of points in a statement's iteration space, for one head."""
    fiber = cascade.fiber
    known = {**sizes, str(fiber.outer): tiles(sizes[fiber.rank], tile)}
    space = set(statement.space)
    if {fiber.outer, fiber.inner} <= space:
        space = space - {fiber.outer, fiber.inner} | {fiber.rank}
    return math.prod(known[str(rank)] for rank in space)


def operations(statement: Statement) -> Counter[str]:
    """The operations at each point: multiply-accumulates for a contraction, otherwise the operators as written."""
    names = list(operators(statement.expression))
    if statement.reduced and statement.reduction == "add" and set(names) == {"*"}:
        return Counter({"mac": len(names)})
    found = Counter(op for name in names for op in _COSTS.get(name, ("max",)))
    if statement.reduced:
        found[{"add": "add", "mul": "mul"}.get(statement.reduction, "max")] += 1
    return found


def cost(cascade: Cascade, machine: Machine, sizes: Mapping[str, int], batch: int = 1, tile: int | None = None) -> Cost:
    """The cost of a cascade on a machine.

    Matrix products, and other statements on full tensors if the cells support their operations, go to the 2D array, the
    rest to the 1D array.

    Args:
        sizes: size of each rank, for one head.
        batch: number of heads over all sequences.
        tile: keys in a tile; the machine's when None.
    """
    step = machine.tile if tile is None else tile
    sizes = complete_sizes(cascade, sizes)
    cycles: dict[str, float] = {}
    on_cells = set()
    for one in cascade.statements:
        if one.first:
            continue
        needed = operations(one)
        costs, units = machine.lane_costs, machine.lanes
        matrices = "mac" in needed and len(one.ranks) > 1
        if (matrices or _whole(one, cascade)) and set(needed) <= set(machine.cell_costs):
            on_cells.add(one.target)
            costs, units = machine.cell_costs, machine.cells
        each = sum(count * costs[op] for op, count in needed.items())
        cycles[one.target] = batch * points(one, cascade, sizes, step) * each / units
    moved, kept = traffic(cascade, sizes, machine.buffer_bytes // machine.word_bytes, step)
    cells = sum(value for name, value in cycles.items() if name in on_cells) / machine.clock_hz
    lanes = sum(value for name, value in cycles.items() if name not in on_cells) / machine.clock_hz
    memory = batch * moved * machine.word_bytes / machine.bytes_per_second
    seconds = max(cells, lanes, memory) if machine.overlap else max(cells + lanes, memory)
    return Cost(
        cycles, frozenset(on_cells), float(batch * moved * machine.word_bytes), kept, cells, lanes, memory, seconds
    )


def _whole(one: Statement, cascade: Cascade) -> bool:
    tensors, iterates = cascade.tensors(), cascade.iterates()
    return any(cascade.fiber.rank in tensors[read.tensor] and read.tensor not in iterates for read in one.reads)


def traffic(cascade: Cascade, sizes: Mapping[str, int], buffer: int, tile: int) -> tuple[int, bool]:
    """The numbers that one head moves, by the cheaper of two ways, and whether its fibers stay in the buffer.

    Queries are processed in blocks, as large as fit in the buffer with a tile of the inputs that have keys: each block
    walks over the keys once in every traversal. Intermediate fibers that a later traversal reads either stay in the
    buffer, which makes blocks smaller, or are written and read again.

    Args:
        sizes: size of each rank.
        buffer: how many numbers fit in the buffer.
        tile: keys in a tile.
    """
    fiber, ranks, iterates = cascade.fiber, cascade.tensors(), cascade.iterates()
    plan = walks(cascade)
    queries = sizes.get("p", 1)
    with_keys = {name for name in ranks if fiber.rank in ranks[name] and name not in iterates}

    def numbers(name: str) -> int:
        return math.prod(sizes[rank] for rank in ranks[name] if rank != fiber.outer and rank != iterates.get(name))

    rereads = {
        name: sum(_reads(walk, name) for walk in plan[at + 1 :])
        for at, walk in enumerate(plan)
        for name in {one.target for one in walk.statements} & with_keys - {cascade.output}
    }
    later = [name for name, times in rereads.items() if times]
    streamed = [name for name in cascade.inputs if name in with_keys and "p" not in ranks[name]]
    keys_of_tile = sum(numbers(name) * min(tile, sizes[fiber.rank]) // sizes[fiber.rank] for name in streamed)
    a_query = sum(numbers(name) // queries for name in _carried(cascade) if "p" in ranks[name])
    fibers = sum(numbers(name) // queries for name in later if "p" in ranks[name])

    def moved(kept: bool) -> int:
        room = max(1, (buffer - keys_of_tile) // max(1, a_query + (fibers if kept else 0)))
        blocks = tiles(queries, room)
        total = numbers(cascade.output)
        for name in cascade.inputs:
            times = (
                sum(_reads(walk, name) for walk in plan) if name in with_keys else any(_reads(w, name) for w in plan)
            )
            total += numbers(name) * times * (blocks if name in streamed else 1)
        return total if kept else total + sum(numbers(name) * (1 + rereads[name]) for name in later)

    fits = not later or fibers + a_query + keys_of_tile <= buffer
    spilled = moved(False)
    if not fits:
        return spilled, False
    kept = moved(True)
    return (kept, True) if kept <= spilled else (spilled, False)


def _reads(walk: Walk, name: str) -> int:
    return int(any(read.tensor == name for one in walk.statements for read in one.reads))


def _carried(cascade: Cascade) -> list[str]:
    """Tensors held for a block of queries during a walk: inputs without keys, running values, unfinished reductions."""
    fiber, ranks, iterates = cascade.fiber, cascade.tensors(), cascade.iterates()
    reduced = {
        one.target
        for one in cascade.statements
        if not {fiber.rank, fiber.outer} & set(one.ranks) and {*fiber.parts} & set(one.reduced)
    }
    inputs = {name for name in cascade.inputs if fiber.rank not in ranks[name]}
    return sorted(reduced | inputs | set(iterates))
