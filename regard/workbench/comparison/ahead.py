"""The training runs of a comparison made ahead on other processes; the comparison then finds their rows.

Decisions are those of :class:`regard.workbench.comparison.trainer.Trainer`, which afterwards goes through all runs and
makes the missing ones: first the given learning rates for all mechanisms at once, then further rates where those do
not settle which is best, then all other seeds, then longer runs for the failed seeds of mechanisms that solved the
task with others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from regard.measurement.store import Store
from regard.measurement.sweeps import Sweep
from regard.workbench.comparison.settings import MORE_RATES
from regard.workbench.comparison.trainer import Trainer, best_of, further_rate
from regard.workbench.comparison.work import Work

Run = tuple[str, float, int]
"""Mechanism, learning rate and seed."""


def make_ahead(sweep: Sweep, trainer: Trainer, work: Work, names: Sequence[str]) -> None:
    """Make the runs of these mechanisms on a task that are not in the store."""
    settings, first = trainer.settings, trainer.settings.first_seed
    rates = {name: list(settings.rates) for name in names}

    def tried(name: str) -> list[dict[str, object]]:
        rows = (trainer.stored(work, name, rate, first) for rate in rates[name])
        return [row for row in rows if row is not None]

    _fill(sweep, trainer, work, [(name, rate, first) for name in names for rate in rates[name]])
    for _ in range(MORE_RATES if len(settings.rates) > 1 else 0):
        further = [(name, rate) for name in names if (rate := further_rate(work, tried(name))) is not None]
        _fill(sweep, trainer, work, [(name, rate, first) for name, rate in further])
        for name, rate in further:
            rates[name].append(rate)
    best = {name: best_of(tried(name))["lr"] for name in names}
    others = range(first + 1, first + settings.seeds)
    _fill(sweep, trainer, work, [(name, best[name], seed) for seed in others for name in names])
    seeds = range(first, first + settings.seeds)
    rows = [
        row for name in names for seed in seeds if (row := trainer.stored(work, name, best[name], seed)) is not None
    ]
    longer, chosen = trainer.longer(work, rows)
    failed = [rows[i] for i in chosen if trainer.affords_run(longer, rows[i]["mechanism"])]
    _fill(sweep, trainer, longer, [(row["mechanism"], row["lr"], row["seed"]) for row in failed])


def _fill(sweep: Sweep, trainer: Trainer, work: Work, runs: Sequence[Run]) -> None:
    missing = [run for run in runs if trainer.stored(work, *run) is None]
    if not missing:
        return
    began, planned = time.monotonic(), 0.0

    def on_done(run: Run, left: int) -> None:
        nonlocal planned
        seconds = work.run_seconds(run[0])
        planned += seconds
        trainer.counted.add((work.task.name, work.frame, *run))
        trainer.progress.pace = (time.monotonic() - began) / planned
        trainer.doing(f"{work.task.name}: {len(missing) - left} of {len(missing)} runs came back")
        trainer.advance(seconds)

    trainer.doing(f"{work.task.name}: {len(missing)} runs on other processes")
    threads, device = torch.get_num_threads(), trainer.settings.device
    sweep.run(make_run, work, missing, trainer.store, threads=threads, device=device, on_done=on_done)


def make_run(work: Work, run: Run, store: Store, folder: Path) -> None:
    """Make one run and store its row and, if models are kept, its model."""
    quiet = Trainer(store, work.settings, folder, store.command, lambda _: None, lambda _: None, None)
    quiet.run(work, *run)
