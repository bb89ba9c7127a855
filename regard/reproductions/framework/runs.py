"""Running cells into a store, and collecting what it holds. Every cell is a row, written the moment it is done."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from regard.contract import Unsupported
from regard.measurement.store import Store
from regard.reproductions.framework.catalogue import get_reproduction
from regard.reproductions.framework.judging import Measurements
from regard.reproductions.framework.protocol import Cell, Reproduction, Setting

KIND = "reproduction"
_OF_A_CELL = ("setting", "seed", "machine")
"""What `collect` says of a cell besides its measurements."""


def plan(names: Sequence[str], seeds: int | None = None, *, timings: bool | None = None) -> list[Cell]:
    """The cells of reproductions; see :meth:`Reproduction.cells`."""
    if seeds is not None and seeds < 1:
        raise Unsupported(f"seeds={seeds}", supported="1 or more; 2 or more give a verdict", nearest="seeds=2")
    return [cell for name in names for cell in get_reproduction(name).cells(seeds, timings=timings)]


def key(cell: Cell) -> dict[str, Any]:
    """The row of a cell: its setting is part of it, so that rows of another protocol do not count."""
    reproduction = get_reproduction(cell.reproduction)
    return {
        "reproduction": cell.reproduction,
        "protocol": reproduction.protocol,
        "setting": cell.setting,
        "options": dict(reproduction.settings[cell.setting]),
        "seed": cell.seed,
    }


def run_cell(reproduction: Reproduction, setting: Setting, seed: int) -> dict[str, Any]:
    """The measurements of one run, on one thread, leaving torch's random state as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            measured = reproduction.run_cell(setting, seed)
    finally:
        torch.set_num_threads(threads)
    return {name: _finite(value) for name, value in measured.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return None if any(_finite(v) is None for v in value.values()) else dict(value)
    return value if math.isfinite(value) else None


def run(
    cells: Sequence[Cell], store: Store, *, on_cell: Callable[[Cell, int, float], None] | None = None
) -> dict[Cell, Measurements]:
    """Run the cells that the store lacks.

    Args:
        cells: what to run, in this order.
        store: rows of earlier runs are not made again; each new one is committed at once.
        on_cell: called before each cell with it, the number of cells still to run, and the seconds that they will take
            by the pace of the cells before (by the reproductions' own estimates at the start).

    Returns:
        Measurements of the cells that were run now.
    """
    waiting = [cell for cell in cells if store.get(KIND, key(cell)) is None]
    done: dict[Cell, Measurements] = {}
    spent, expected = 0.0, 0.0
    for i, cell in enumerate(waiting):
        reproduction = get_reproduction(cell.reproduction)
        ahead = sum(get_reproduction(c.reproduction).seconds for c in waiting[i:])
        if on_cell is not None:
            on_cell(cell, len(waiting) - i, ahead * (spent / expected if expected else 1.0))
        started = time.perf_counter()
        done[cell] = run_cell(reproduction, reproduction.settings[cell.setting], cell.seed)
        seconds = time.perf_counter() - started
        store.put(KIND, key(cell), {"measured": done[cell], "seconds": seconds})
        spent, expected = spent + seconds, expected + reproduction.seconds
    return done


def collect(names: Sequence[str], store: Store | None, seeds: int | None = None) -> list[dict[str, Any]]:
    """What a store holds of reproductions, with verdicts, as JSON could say it; nothing is run.

    Of each: name, mechanisms, paper, claim, instead, outcome, findings, cells (done, planned, missing), its protocol, the
    measurements and the machine of each of its cells and the rows of its table, where it has one. Seeds beyond the plan
    count too where the store has them.
    """
    rows = [] if store is None else store.rows(KIND)
    found = []
    for name in names:
        reproduction = get_reproduction(name)
        planned = reproduction.cells(seeds)
        own = {row.key["seed"] for row in rows if row.key["reproduction"] == name}
        cells = [Cell(name, setting, seed) for seed in sorted(own) for setting in reproduction.settings]
        measured: dict[tuple[str, int], Measurements] = {}
        machines: dict[tuple[str, int], str] = {}
        for cell in dict.fromkeys([*planned, *cells]):
            row = None if store is None else store.get(KIND, key(cell))
            if row is not None:
                measured[cell.setting, cell.seed] = row.payload["measured"]
                machines[cell.setting, cell.seed] = row.payload.get("machine") or row.machine["cpu"]
        missing = [cell for cell in planned if (cell.setting, cell.seed) not in measured]
        found.append(_record(reproduction, measured, machines, len(planned), missing))
    return found


def restore(records: Sequence[Mapping[str, Any]], store: Store) -> int:
    """Put the cells of what `collect` told back into a store, with the machine that each was measured on.

    Cells of another protocol, and settings or reproductions that are no more, are left out; cells that the store has
    stay as they are.

    Returns:
        How many cells were put.
    """
    put = 0
    for record in records:
        try:
            reproduction = get_reproduction(record["name"])
        except Unsupported:
            continue
        if (reproduction.name, reproduction.protocol) != (record["name"], record["protocol"]):
            continue
        for told in record["cells"]:
            measured = {name: value for name, value in told.items() if name not in _OF_A_CELL}
            if told["setting"] in reproduction.settings:
                cell = Cell(reproduction.name, told["setting"], told["seed"])
                put += store.put(KIND, key(cell), {"measured": measured, "machine": told["machine"]})
    return put


def _record(
    reproduction: Reproduction,
    measured: Mapping[tuple[str, int], Measurements],
    machines: Mapping[tuple[str, int], str],
    planned: int,
    missing: Sequence[Cell],
) -> dict[str, Any]:
    verdict = reproduction.judge(measured)
    findings = [dataclasses.asdict(f) for f in verdict.findings]
    return {
        "name": reproduction.name,
        "mechanisms": list(reproduction.mechanisms),
        "paper": dataclasses.asdict(reproduction.paper),
        "claim": reproduction.claim,
        "instead": reproduction.instead,
        "outcome": verdict.outcome.value,
        "findings": [{k: None if v != v else v for k, v in f.items()} for f in findings],
        "done": planned - len(missing),
        "planned": planned,
        "missing": [f"{cell.setting} {cell.seed}" for cell in missing],
        "protocol": reproduction.protocol,
        "cells": [{"setting": s, "seed": n, "machine": machines[s, n], **m} for (s, n), m in measured.items()],
        "table": [] if reproduction.table is None else reproduction.table(measured),
    }
