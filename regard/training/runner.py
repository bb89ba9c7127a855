"""Runners, which train a model within a budget and score it; used by `compare`, `train` and the reproductions.

The default runner takes gradient steps on a task's batches. A task whose models learn in another way, such as from
rewards or from a stream that is seen once, has its own runner.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from torch import nn

from regard.tasks.protocol import Task
from regard.training.loop import Evaluation, History, Point, TrainConfig, evaluate, train


class Runner(Protocol):
    """The protocol of runners, which train a task's models and score them."""

    def train(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        *,
        on_step: Callable[[Point], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        deadline: float | None = None,
    ) -> History:
        """Train `model` in place for ``config.steps`` steps of about equal work, like :func:`regard.training.train`.

        `on_step` is called after each step, training resumes from `checkpoint` if that file exists, and no step begins
        after `deadline`.
        """
        ...

    def evaluate(
        self, model: nn.Module, task: Task, batch_size: int, *, first: int = 0, last: int | None = None
    ) -> Evaluation:
        """Score held-out items from index `first` up to but not including `last`, the same ones in every call."""
        ...


class Supervised:
    """The default runner: gradient steps on the task's batches, and the task's score on its held-out items."""

    train = staticmethod(train)
    evaluate = staticmethod(evaluate)


SUPERVISED = Supervised()


def runner_of(task: Task) -> Runner:
    """Return the task's own runner, or :class:`Supervised` if it has none."""
    own = getattr(task, "runner", None)
    return SUPERVISED if own is None else own
