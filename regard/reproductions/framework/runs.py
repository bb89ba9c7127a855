"""Runs cells into a store, and collects results from it. Every cell is a row, written as soon as the cell is done."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regard.catalogue import plugin_code
from regard.contract import Unsupported
from regard.measurement.statistics import t_quantile
from regard.measurement.store import Store
from regard.measurement.sweeps import Sweep
from regard.reproductions.framework.catalogue import get_reproduction
from regard.reproductions.framework.judging import Finding, Measurements, Outcome, Verdict
from regard.reproductions.framework.protocol import PILOT, Cell, Reproduction, Setting

KIND = "reproduction"
MOST_SEEDS = 10
"""Maximum seeds of an experiment: one that needs more should be made larger instead."""

_OF_A_CELL = ("setting", "seed", "machine", "seconds")
"""Fields of a cell in `collect`'s records, in addition to its measurements."""


def plan(
    names: Sequence[str | Reproduction],
    seeds: int | None = None,
    *,
    timings: bool | None = None,
    pilot: int | None = None,
) -> list[Cell]:
    """Return the cells of reproductions, given as names or objects: those of :meth:`Reproduction.cells`, or of a pilot
    with `pilot` seeds."""
    if pilot is not None:
        if pilot < 1:
            raise Unsupported(f"pilot={pilot}", supported="1 or more; 2 or more give a spread", nearest="pilot=2")
        return [cell for one in names for cell in _resolved(one).pilot(pilot)]
    if seeds is not None and seeds < 1:
        raise Unsupported(f"seeds={seeds}", supported="1 or more; 2 or more give a verdict", nearest="seeds=2")
    return [cell for one in names for cell in _resolved(one).cells(seeds, timings=timings)]


def _resolved(one: str | Reproduction) -> Reproduction:
    return one if isinstance(one, Reproduction) else get_reproduction(one)


def key(cell: Cell) -> dict[str, Any]:
    """Return the store key of a cell. It contains protocol and options, and the code of plugins that the options name, so
    that rows of other versions do not count."""
    options = dict(cell.reproduction.settings[cell.setting])
    code = plugin_code(options)
    return {
        "reproduction": cell.reproduction.name,
        "protocol": cell.reproduction.protocol,
        "setting": cell.setting,
        "options": options,
        "seed": cell.seed,
        **({"plugins": code} if code else {}),
    }


def run_cell(reproduction: Reproduction, setting: Setting, seed: int) -> dict[str, Any]:
    """Return the measurements of one run, on one thread; torch's random state is left unchanged."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            measured = reproduction.run_cell(setting, seed)
    finally:
        torch.set_num_threads(threads)
    taken = set(measured) & set(_OF_A_CELL)
    if taken:
        raise ValueError(f"a measurement called {sorted(taken)[0]!r}, which is a fact of each cell")
    return {name: _finite(value) for name, value in measured.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, Mapping):
        return None if any(_finite(v) is None for v in value.values()) else dict(value)
    return value if math.isfinite(value) else None


def run(
    cells: Sequence[Cell],
    store: Store,
    *,
    on_cell: Callable[[Cell, int, float], None] | None = None,
    within: float | None = None,
    sweep: Sweep | None = None,
) -> dict[Cell, Measurements]:
    """Run the cells that the store lacks.

    Args:
        cells: cells to run, in this order.
        store: cells with a row in the store are not run again; each new row is committed at once.
        on_cell: called before each cell with the cell, the number of cells left, and the seconds that they will take at
            the pace so far (at first, by the reproductions' own estimates); for a cell of a sweep, called when it is
            done.
        within: seconds for all cells; running ends before the first cell that would exceed them at the pace so far.
        sweep: runs all cells except timings; the timings follow here, one after the other.

    Returns:
        Measurements of the cells that were run in this call.

    Raises:
        Unsupported: for `within` together with `sweep`.
    """
    waiting = [cell for cell in cells if store.get(KIND, key(cell)) is None]
    done: dict[Cell, Measurements] = {}
    if sweep is not None:
        if within is not None:
            raise Unsupported("a budget of time beside a sweep, whose machines may differ", supported="no budget")
        done = _swept([cell for cell in waiting if not cell.timed], store, sweep, on_cell)
        waiting = [cell for cell in waiting if cell not in done]
    spent, expected, began = 0.0, 0.0, time.perf_counter()
    for i, cell in enumerate(waiting):
        reproduction = cell.reproduction
        pace = spent / expected if expected else 1.0
        if within is not None and time.perf_counter() - began + cell.seconds * pace > within:
            break
        if on_cell is not None:
            on_cell(cell, len(waiting) - i, sum(c.seconds for c in waiting[i:]) * pace)
        started = time.perf_counter()
        done[cell] = run_cell(reproduction, reproduction.settings[cell.setting], cell.seed)
        seconds = time.perf_counter() - started
        store.put(KIND, key(cell), {"measured": done[cell], "seconds": seconds})
        spent, expected = spent + seconds, expected + cell.seconds
    return done


def _swept(
    cells: Sequence[Cell], store: Store, sweep: Sweep, on_cell: Callable[[Cell, int, float], None] | None
) -> dict[Cell, Measurements]:
    """Run cells in the workers of a sweep."""
    began, sent = time.perf_counter(), {(cell.reproduction.name, cell.setting, cell.seed): cell for cell in cells}

    def on_done(name: tuple[str, str, int], left: int) -> None:
        if on_cell is not None:
            on_cell(sent[name], left, (time.perf_counter() - began) / (len(sent) - left) * left)

    # workers only measure; checks and tables stay here
    bare = {
        cell.reproduction.name: dataclasses.replace(cell.reproduction, checks=(), needs=(), table=None, picture=None)
        for cell in cells
    }
    sweep.run(_make_cell, bare, list(sent), store, on_done=on_done)
    rows = {cell: store.get(KIND, key(cell)) for cell in cells}
    return {cell: row.payload["measured"] for cell, row in rows.items() if row is not None}


def _make_cell(shared: Mapping[str, Reproduction], cell: tuple[str, str, int], store: Store, folder: Path) -> None:
    name, setting, seed = cell
    run([Cell(shared[name], setting, seed)], store)


def collect(names: Sequence[str | Reproduction], store: Store | None, seeds: int | None = None) -> list[dict[str, Any]]:
    """Return the results of reproductions in a store, with verdicts, as JSON values; nothing is run.

    Each record has: name, mechanisms, paper, claim, instead, claims left out, outcome, findings, results of its needs,
    the cost of deciding, cells (done, planned, missing), protocol and settings, the measurements, machine and seconds
    of each cell, and the rows of its table, if it has one. Seeds in the store beyond the plan count too; those of a
    pilot do not.
    """
    rows = [] if store is None else store.rows(KIND)
    found = []
    for one in names:
        reproduction = _resolved(one)
        planned, name = reproduction.cells(seeds), reproduction.name
        own = {row.key["seed"] for row in rows if row.key["reproduction"] == name and row.key["seed"] < PILOT}
        cells = [Cell(reproduction, setting, seed) for seed in sorted(own) for setting in reproduction.settings]
        measured: dict[tuple[str, int], Measurements] = {}
        told: dict[tuple[str, int], dict[str, Any]] = {}
        for cell in dict.fromkeys([*planned, *cells]):
            row = None if store is None else store.get(KIND, key(cell))
            if row is not None:
                measured[cell.setting, cell.seed] = row.payload["measured"]
                machine = row.payload.get("machine") or row.machine["cpu"]
                told[cell.setting, cell.seed] = {"machine": machine, "seconds": row.payload.get("seconds")}
        missing = [cell for cell in planned if (cell.setting, cell.seed) not in measured]
        found.append(_record(reproduction, measured, told, len(planned), missing))
    return found


def restore(
    records: Sequence[Mapping[str, Any]],
    store: Store,
    find: Callable[[Mapping[str, Any]], Reproduction] = lambda record: get_reproduction(record["name"]),
) -> int:
    """Put the cells of records from `collect` back into a store, with the machine that each was measured on.

    Cells with another protocol or other options, or of settings or reproductions that no longer exist, are left out.
    Cells that are already in the store are not changed.

    Args:
        records: records from :func:`collect`.
        store: the store to write to.
        find: function from a record to its reproduction; raises Unsupported if it no longer exists.

    Returns:
        The number of cells added.
    """
    put = 0
    for record in records:
        try:
            reproduction = find(record)
        except Unsupported:
            continue
        if (reproduction.name, reproduction.protocol) != (record["name"], record["protocol"]):
            continue
        published = record.get("settings")
        for told in record["cells"]:
            measured = {name: value for name, value in told.items() if name not in _OF_A_CELL}
            setting = told["setting"]
            if setting in reproduction.settings and (
                published is None or published.get(setting) == _plain(reproduction.settings[setting])
            ):
                cell = Cell(reproduction, setting, told["seed"])
                payload = {"measured": measured, "machine": told["machine"], "seconds": told.get("seconds")}
                put += store.put(KIND, key(cell), payload)
    return put


def _plain(setting: Setting) -> Any:
    """Return a setting as it would be read back from JSON."""
    return json.loads(json.dumps(dict(setting)))


def pilot(name: str, store: Store | None) -> dict[str, Any]:
    """Return the results of a pilot's cells, which are not a verdict.

    Each need and check has: the expectation (`says`), the `mean` over the `seeds` of the pilot, their `spread`
    (standard deviation), the `half_width` of the interval that ten seeds would have, and `seeds_to_decide` if mean and
    spread stayed the same.
    """
    reproduction = get_reproduction(name)
    seeds: dict[int, dict[str, Measurements]] = {}
    for row in () if store is None else store.rows(KIND):
        setting, seed = row.key["setting"], row.key["seed"]
        if (
            seed >= PILOT
            and setting in reproduction.settings
            and row.key == _plain(key(Cell(reproduction, setting, seed)))
        ):
            seeds.setdefault(seed, {})[setting] = row.payload["measured"]
    findings = []
    for check in (*reproduction.needs, *reproduction.checks):
        found = check.judge(list(seeds.values()))
        spread = found.standard_error * math.sqrt(found.seeds)
        half = t_quantile(MOST_SEEDS - 1) * spread / math.sqrt(MOST_SEEDS)
        told = {"says": found.says, "mean": found.mean, "seeds": found.seeds, "spread": spread, "half_width": half}
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}
        findings.append(plain | {"seeds_to_decide": check.seeds_to_decide(found)})
    return {"name": name, "findings": findings}


def _hours_to_decide(
    reproduction: Reproduction,
    verdict: Verdict,
    measured: Mapping[tuple[str, int], Measurements],
    told: Mapping[tuple[str, int], Mapping[str, Any]],
) -> float | None:
    """Return the hours on one core for enough seeds if means and spreads stay the same; None if seeds cannot decide."""
    open_ = [
        (check, finding)
        for check, finding in zip(
            [*reproduction.checks, *reproduction.needs], [*verdict.findings, *verdict.needs], strict=True
        )
        if finding.outcome is Outcome.UNDECIDED
    ]
    failed = any(finding.outcome is Outcome.DID_NOT_HOLD for finding in verdict.needs)
    if verdict.outcome is not Outcome.UNDECIDED or failed or any(f.seeds_to_decide is None for _, f in open_):
        return None
    first = {setting: cell for (setting, _), cell in measured.items()}
    wanted: dict[str, int] = {}
    for check, finding in open_:
        for setting in check.reads(first):
            wanted[setting] = max(wanted.get(setting, 0), finding.seeds_to_decide or 0)
    seconds = 0.0
    for setting, seeds in wanted.items():
        took = [cell["seconds"] for (own, _), cell in told.items() if own == setting and cell["seconds"] is not None]
        done = sum(own == setting for own, _ in measured)
        seconds += (seeds - done) * (sum(took) / len(took) if took else Cell(reproduction, setting, 0).seconds)
    return seconds / 3600


def _told(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [{k: None if v != v else v for k, v in dataclasses.asdict(f).items()} for f in findings]


def _record(
    reproduction: Reproduction,
    measured: Mapping[tuple[str, int], Measurements],
    told: Mapping[tuple[str, int], Mapping[str, Any]],
    planned: int,
    missing: Sequence[Cell],
) -> dict[str, Any]:
    verdict = reproduction.judge(measured)
    return {
        "name": reproduction.name,
        "mechanisms": list(reproduction.mechanisms),
        "paper": dataclasses.asdict(reproduction.paper),
        "claim": reproduction.claim,
        "instead": reproduction.instead,
        "left_out": list(reproduction.left_out),
        "outcome": verdict.outcome.value,
        "findings": _told(verdict.findings),
        "needs": _told(verdict.needs),
        "hours_to_decide": _hours_to_decide(reproduction, verdict, measured, told),
        "done": planned - len(missing),
        "planned": planned,
        "missing": [f"{cell.setting} {cell.seed}" for cell in missing],
        "protocol": reproduction.protocol,
        "settings": {name: dict(options) for name, options in reproduction.settings.items()},
        "cells": [{"setting": s, "seed": n, **told[s, n], **m} for (s, n), m in measured.items()],
        "table": [] if reproduction.table is None else reproduction.table(measured),
        "picture": None if reproduction.picture is None else list(reproduction.picture),
    }
