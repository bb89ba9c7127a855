"""The machines and mappings that FuseMax (arXiv 2406.10491) compares, as closed forms of cycles, for four models.

The designs, each with its change to the one before: ``unfused`` (three kernels that write scores and weights to
memory), ``flat`` (three passes, fused), ``cascade`` (one pass on the same machine), ``architecture`` (cells that also
add, compare and exponentiate), ``binding`` (the steps of neighbouring tiles interleaved).

The traffic of `unfused` and `flat` depends on mappings that the authors found by search; those bytes, and all energies,
are loaded from the authors' tables (:func:`recorded`). Everything else is computed here.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regard.contract import Unsupported, one_of
from regard.studies.attention_passes.language import Cascade, parse
from regard.studies.attention_passes.machine import Cost, Machine, cost, read_machine

DESIGNS = ("unfused", "flat", "cascade", "architecture", "binding")
SIDES = (16, 32, 64, 128, 256, 512)
"""Sides of the 2D arrays that the paper compares, at 262,144 tokens."""

LENGTHS = tuple(2**power for power in range(10, 21, 2))
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Workload:
    """A model: sequences and heads; widths of queries and keys, of values, of the model, of its feed-forward layer."""

    name: str
    batch: int
    heads: int
    dim: int
    dim_value: int
    model: int
    hidden: int


WORKLOADS = {
    one.name: one
    for one in (
        Workload("BERT", 64, 12, 64, 64, 768, 3072),
        Workload("TrXL", 64, 16, 64, 64, 1024, 4096),
        Workload("T5", 64, 8, 64, 64, 512, 2048),
        Workload("XLM", 64, 16, 128, 128, 2048, 8192),
    )
}


@dataclass(frozen=True)
class Estimate:
    """Estimate for one layer's attention: seconds, bytes moved, and the busy share of each array."""

    seconds: float
    bytes: float
    util_2d: float
    util_1d: float


@dataclass(frozen=True)
class Recorded:
    """A row of the authors' tables; energy in picojoules, utilisations None where not given."""

    bytes: float
    seconds: float
    energy: float
    util_2d: float | None
    util_1d: float | None


@functools.cache
def recorded() -> Mapping[tuple[str, str, int], Recorded]:
    """The authors' tables, by design, model and length; ``projections flat`` and ``projections fusemax`` are the rest
    of a layer, without its attention."""
    with (FOLDER / "recorded.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found = {}
    for row in rows:
        shares = (float(row[name]) if row[name] else None for name in ("util_2d", "util_1d"))
        numbers = (float(row[name] or "nan") for name in ("bytes", "seconds", "energy"))
        found[row["design"], row["model"], int(row["length"])] = Recorded(*numbers, *shares)
    return found


@functools.cache
def shipped(name: str) -> Cascade:
    """Read a cascade from the folder `cascades` by name."""
    return parse((FOLDER / "cascades" / f"{name}.txt").read_text(encoding="utf-8"), name)


def estimate(design: str, workload: Workload, length: int, side: int = 256) -> Estimate:
    """A design's time, bytes and utilisation for `length` queries and keys, a multiple of `side`.

    Args:
        side: side of the 2D array and number of lanes of the 1D array; 256 for `unfused` and `flat`.

    Raises:
        Unsupported: for an unknown design, and for `unfused` and `flat` outside the recorded tables.
    """
    one_of("design", design, DESIGNS)
    if design in ("unfused", "flat"):
        if side != 256:
            raise Unsupported(f"{design} with side={side}", supported="side=256, whose traffic was recorded")
        return _three_passes(design, workload, length)
    if side < 1 or length % side:
        raise Unsupported(f"side={side} of {length} tokens", supported="a divisor of the tokens", nearest="side=256")
    machine = dataclasses.replace(
        read_machine("flat" if design == "cascade" else "fusemax"), cells=side * side, lanes=side, tile=side
    )
    sizes = {"m": length, "p": length, "e": workload.dim, "f": workload.dim_value}
    found = cost(shipped("one_pass"), machine, sizes, workload.batch * workload.heads)
    cells, lanes = (
        sum(value for name, value in found.cycles.items() if (name in found.on_cells) == inside)
        for inside in (True, False)
    )
    cycles = {"cascade": _busiest, "architecture": _stalled, "binding": interleaved_cycles}[design](found, machine)
    held = (
        2 * machine.tile if design == "cascade" else 0
    )  # a tile's scores and weights wait in the buffer for the lanes
    moved = one_pass_bytes(workload, length, 16 * 2**20, machine, held)
    seconds = max(cycles / machine.clock_hz, moved / machine.bytes_per_second)
    return Estimate(seconds, moved, cells / machine.clock_hz / seconds, lanes / machine.clock_hz / seconds)


def _busiest(found: Cost, _: Machine) -> float:
    cells = sum(value for name, value in found.cycles.items() if name in found.on_cells)
    return max(cells, sum(found.cycles.values()) - cells)


def _stalled(found: Cost, machine: Machine) -> float:
    c = found.cycles
    begin = max(c["QK"] + c["LM"], c["RD"] + c["AV"]) + machine.tile * c["LM"] + c["RM"]
    return begin + max(c["SLN"] + c["SLD"], c["PRM"] + c["SPD"]) + max(c["SLNV"], c["SPNV"] + c["RNV"])


def interleaved_cycles(found: Cost, _: Machine | None = None) -> float:
    """The cycles of the one-pass cascade when the steps of neighbouring tiles are interleaved."""
    c = found.cycles
    begin = max(c["QK"] + c["LM"], c["RD"] + c["RNV"] + c["AV"]) + c["RM"]
    return begin + max(c["SLN"] + c["SLD"], c["PRM"] + c["SPD"]) + max(c["SLNV"], c["SPNV"])


def _three_passes(design: str, workload: Workload, length: int) -> Estimate:
    """Softmax on the 1D array, one cycle per number and step since its units are pipelined; products on the 2D."""
    machine = read_machine("flat")
    scores = workload.batch * workload.heads * length * length
    softmax = 4 * scores / machine.lanes / machine.clock_hz
    products = (workload.dim + workload.dim_value) * scores / machine.cells / machine.clock_hz
    if (design, workload.name, length) not in recorded():
        raise Unsupported(
            f"{design} of {workload.name} at {length} tokens, whose traffic was not recorded",
            supported=f"lengths {', '.join(map(str, LENGTHS))} of {', '.join(WORKLOADS)}",
        )
    moved = recorded()[design, workload.name, length].bytes
    if design == "flat":
        seconds = max(softmax, products, moved / machine.bytes_per_second)
        return Estimate(seconds, moved, products / seconds, softmax / seconds)
    between = 2 * scores * machine.word_bytes  # softmax reads scores and writes weights
    waits = (moved - between) / machine.bytes_per_second
    seconds = max(softmax, between / machine.bytes_per_second) + max(products, waits)
    return Estimate(seconds, moved, products / seconds, softmax / seconds)


def one_pass_bytes(workload: Workload, length: int, buffer: int, machine: Machine, held: int = 0) -> float:
    """Bytes of the one-pass cascade: queries and outputs once, keys and values once for each block of queries that fits.

    Args:
        buffer: bytes of the on-chip buffer.
        held: numbers held for a query in addition to the query itself, its two running sums and its running values.
    """
    side, width = machine.tile, workload.dim + workload.dim_value
    room = (buffer - machine.word_bytes * side * width) // (machine.word_bytes * (width + 2 + held) * side)
    tiles = length // side
    block = max(divisor for divisor in range(1, tiles + 1) if tiles % divisor == 0 and divisor <= room)
    again = max(1.0, length / (block * side))
    return machine.word_bytes * workload.batch * workload.heads * (length * width + again * length * width)
