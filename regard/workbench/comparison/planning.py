"""The plan of a comparison: the number of threads, and how many steps each run gets within the budget."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from regard.contract import Unsupported
from regard.measurement import provenance
from regard.measurement.budget import Budget
from regard.measurement.store import Store
from regard.training import TrainConfig, runner_of
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import build
from regard.workbench.comparison.work import Work

CALIBRATION_SECONDS = 20.0
FEWEST_STEPS = 20
SAFETY = 0.93
"""Share of a time budget that is planned; the rest is a reserve in case the machine slows down."""
OF_SOLVABLE = 1.5
"""Relative time for a task that can be solved, against 1 for an open-ended one. Until it is solved, its scores say
little, and with half the steps that it needs they mislead, while half the text just makes all models equally worse."""


def plan(
    store: Store, works: Sequence[Work], settings: CompareSettings, started: float, say: Callable[[str], None]
) -> None:
    """Decide how many steps each run gets; the plan is stored, so that a resumed comparison uses the same."""
    key = {
        "works": [w.identity for w in works],
        "mechanisms": list(settings.names),
        "budget": str(settings.budget),
        "seeds": [settings.first_seed, settings.seeds],
        "frames": [*settings.frames, settings.leaders],
        "rates": list(settings.rates),
        "machine": provenance.fingerprint()["machine_id"],
        **works[0].code_of(),
    }
    row = store.get("plan", key)
    if row is None:
        seconds = calibration_seconds(settings.budget)
        say(f"calibrating for about {seconds:.0f} s")
        threads = best_threads(works[0])
        torch.set_num_threads(threads)
        for work in works:
            work.calibrate(seconds / len(works))
        _count_steps(works, settings, time.monotonic() - started)
        planned = [
            {"steps": w.steps, "step_seconds": w.step_seconds, "evaluation_seconds": w.evaluation_seconds}
            for w in works
        ]
        store.put("plan", key, {"threads": threads, "works": planned})
        row = store.get("plan", key)
        assert row is not None
    torch.set_num_threads(row.payload["threads"])
    for work, planned in zip(works, row.payload["works"], strict=True):
        work.steps = planned["steps"]
        work.step_seconds, work.evaluation_seconds = planned["step_seconds"], planned["evaluation_seconds"]
        counts = sorted(set(work.steps.values()))
        tokens = " to ".join(f"{n * work.batch_size * work.item_tokens:,}" for n in counts[:1] + counts[1:][-1:])
        say(
            f"{work.task.name}: {work.sizes}, {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} steps of "
            f"{work.batch} ({tokens} tokens a run)"
        )


def best_threads(work: Work) -> int:
    """The number of threads that trains the first model fastest, right now.

    Threads in excess of idle cores can be many times slower than one thread, since they wait for each other in every
    operator. The number is part of the plan: sums are split over threads, so the last digits of scores depend on it.
    """
    counts = sorted({1, torch.get_num_threads()})
    if len(counts) == 1:
        return counts[0]
    config = next(iter(work.configs.values()))
    seconds = {}
    for count in counts:
        torch.set_num_threads(count)
        few = TrainConfig(steps=6, batch_size=work.batch_size, measure_memory=False)
        model = work.prepare(build(config, 0, work.settings.device))
        history = runner_of(work.task).train(model, work.task, few, deadline=time.monotonic() + 5.0)
        # if the machine is too busy for a single step in time, any number will do
        seconds[count] = statistics.median(point.seconds for point in history.curve) if history.curve else math.inf
    return min(seconds, key=lambda count: seconds[count])


def calibration_seconds(budget: Budget) -> float:
    """Seconds of calibration; budgets in tokens, steps or FLOPs need it only to estimate the remaining time."""
    share = CALIBRATION_SECONDS / 4 if budget.unit != "seconds" else 0.1 * budget.amount
    return min(CALIBRATION_SECONDS, share)


def _count_steps(works: Sequence[Work], settings: CompareSettings, spent: float) -> None:
    if settings.budget.unit == "seconds":
        share_steps(works, SAFETY * settings.budget.amount - spent - cost_seconds(works, settings))
    else:
        for work in works:
            work.steps = {name: work.steps_for(name, settings.budget) for name in work.configs}
    for work in works:
        if min(work.steps.values()) < FEWEST_STEPS:
            kept = "" if settings.match is None else ", which goes on with the widths that were found"
            raise Unsupported(
                f"budget {settings.budget}, which leaves fewer than {FEWEST_STEPS} steps a run on {work.task.name}",
                supported="a larger budget, fewer mechanisms, tasks or seeds",
                nearest=f'--budget "{_least_budget(works, settings)}"{kept}',
            )


def share_steps(works: Sequence[Work], seconds: float) -> None:
    """Divide the seconds among these tasks, and give all runs of a task the same number of steps."""
    shares = [OF_SOLVABLE if work.task.solved is not None else 1.0 for work in works]
    for work, share in zip(works, shares, strict=True):
        steps = int((seconds * share / sum(shares) - work.seconds_besides()) / work.seconds_a_step())
        work.steps = dict.fromkeys(work.configs, steps)


def cost_seconds(works: Sequence[Work], settings: CompareSettings) -> float:
    """A generous estimate of the seconds that measuring costs takes, which the settings bound."""
    kinds = {work.kind for work in works}
    return len(kinds) * (len(settings.lengths) + 1) * 0.5 * len(settings.mechanisms) + 5.0


def _least_budget(works: Sequence[Work], settings: CompareSettings) -> Budget:
    """A budget for twice the fewest steps; time already spent on matching widths is excluded, since they are stored."""
    if settings.budget.unit == "steps":
        return Budget("steps", 2.0 * FEWEST_STEPS)
    if settings.budget.unit == "tokens":
        return Budget("tokens", float(max(2 * FEWEST_STEPS * w.batch_size * w.item_tokens for w in works)))
    if settings.budget.unit == "flops":
        return Budget("flops", max(2 * FEWEST_STEPS * w.flops_a_step(n) for w in works for n in w.configs))
    work = max(w.seconds_besides() + 2 * FEWEST_STEPS * w.seconds_a_step() for w in works)
    seconds = work * len(works) + cost_seconds(works, settings) + CALIBRATION_SECONDS
    minutes = math.ceil(seconds / SAFETY / 60)
    return Budget("seconds", 60.0 * minutes)
