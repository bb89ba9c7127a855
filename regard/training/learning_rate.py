"""Learning rate search: the same few rates, in the same short runs, for every mechanism.

A comparison at a single rate would favour the mechanisms that the rate happens to suit.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from regard.contract import Unsupported
from regard.tasks.protocol import Task
from regard.training.loop import TrainConfig
from regard.training.runner import runner_of

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SLICE = 128
"""Number of held-out items used to choose a rate; a final score should skip them: ``evaluate(..., first=SLICE)``."""


@dataclass(frozen=True)
class Trial:
    """A short run at one rate; loss and score are on the held-out slice, nan if the run diverged."""

    rate: float
    loss: float
    score: float
    diverged: bool


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        trials: a trial for each rate tried, in increasing order.
        best: the rate with the lowest held-out loss; None if every run diverged.
        on_edge: whether the best rate is the first or last of the grid, so that a better one may be outside.
        scored_items: number of held-out items used for the choice, the first ones of the task.
    """

    trials: tuple[Trial, ...]
    best: float | None
    on_edge: bool
    scored_items: int


def search(
    build_model: Callable[[], nn.Module],
    task: Task,
    config: TrainConfig,
    rates: Sequence[float] = RATES,
    *,
    steps: int | None = None,
    items: int = SLICE,
    on_trial: Callable[[Trial], None] | None = None,
    deadline: float | None = None,
) -> Search:
    """Try each rate from the same initial weights and choose the one with the lowest loss on a held-out slice.

    The loss decides instead of the score, since after a short run the accuracy is often still at chance for all rates.
    Warns when the best rate is on the edge of the grid.

    Args:
        build_model: builds the model; called once per rate, each time after the same `torch.manual_seed`.
        config: the config of the real run; its rate is ignored.
        rates: the grid of rates.
        steps: steps of each short run; a fifth of the real run's when None.
        items: size of the held-out slice.
        on_trial: called after each rate.
        deadline: a time of `time.monotonic`. Rates not finished by then are left out; at least one must finish.

    Raises:
        Unsupported: for an empty grid, or a deadline that leaves no trial.
    """
    if not rates:
        raise Unsupported("a search over no rates", supported="one rate or more", nearest=f"rates={RATES}")
    grid = sorted(set(rates))
    short = replace(config, steps=max(1, config.steps // 5) if steps is None else steps, measure_memory=False)
    trials: list[Trial] = []
    for rate in grid:
        if deadline is not None and time.monotonic() >= deadline:
            break
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = build_model()
        history = runner_of(task).train(model, task, replace(short, learning_rate=rate), deadline=deadline)
        if not history.finished and not history.diverged:
            break
        trial = Trial(rate, math.nan, math.nan, True)
        if not history.diverged:
            found = runner_of(task).evaluate(model, task, config.batch_size, last=items)
            trial = Trial(rate, found.loss, found.score, not math.isfinite(found.loss))
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
    if not trials:
        raise Unsupported("a learning-rate search whose deadline left no trial", supported="a later deadline")
    sound = [trial for trial in trials if not trial.diverged]
    best = min(sound, key=lambda trial: trial.loss).rate if sound else None
    on_edge = best is not None and len(grid) > 1 and best in (grid[0], grid[-1])
    if on_edge:
        warnings.warn(
            f"the best learning rate, {best:g}, is on the edge of the grid {grid[0]:g} to {grid[-1]:g}; "
            "a better one may lie outside",
            stacklevel=2,
        )
    return Search(tuple(trials), best, on_edge, items)
