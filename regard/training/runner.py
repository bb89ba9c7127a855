"""Runners: what turns a model and a budget into scored items. `compare`, `train` and the reproductions go through one.

Gradient steps on a task's batches are the usual one. A task whose models learn in another way, from rewards or from a
stream that is seen once, names its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from torch import nn

from regard.tasks.protocol import Task
from regard.training.loop import Evaluation, History, Point, TrainConfig, evaluate, train


class Runner(Protocol):
    """Trains models of a task and scores them."""

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
        """Train `model` in place for ``config.steps`` steps, each of about the same work, as
        :func:`regard.training.train` does: it tells each step to `on_step`, goes on from `checkpoint` where that file
        exists, and begins no step after `deadline`."""
        ...

    def evaluate(
        self, model: nn.Module, task: Task, batch_size: int, *, first: int = 0, last: int | None = None
    ) -> Evaluation:
        """Score held-out items from number `first` up to but not including `last`, the same ones in every call."""
        ...


class Supervised:
    """Gradient steps on the task's batches, and the task's score on its held-out items."""

    train = staticmethod(train)
    evaluate = staticmethod(evaluate)


SUPERVISED = Supervised()


def runner_of(task: Task) -> Runner:
    """The task's own runner, or :class:`Supervised`."""
    own = getattr(task, "runner", None)
    return SUPERVISED if own is None else own
