"""A training step: running a model on a batch, its losses, and the hooks for several processes that step together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Mask, Result
from regard.models.exits import joint_loss
from regard.models.levels import level_loss
from regard.models.losses import auxiliary_loss
from regard.tasks.protocol import Batch, Task, mean_loss


def batch_context(batch: Batch, **more: Any) -> Context:
    """Return the context of a task's batch."""
    mask = None if batch.valid is None else Mask(valid=batch.valid)
    memory_mask = None if batch.memory_valid is None else Mask(valid=batch.memory_valid)
    return Context(mask=mask, memory_mask=memory_mask, grid=batch.grid, **more)


def run_model(model: nn.Module, batch: Batch, context: Context) -> Result:
    """Run `model` on a batch, with the batch's memory if there is one."""
    if batch.memory is None:
        return model(batch.inputs, context=context)
    return model(batch.inputs, batch.memory, context=context)


def answered(task: Task, run: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Return the output for a held-out batch, through `task.answer` if the task defines it."""
    return task.answer(run, batch) if hasattr(task, "answer") else run(batch)


def losses_of(
    model: nn.Module,
    task: Task,
    batch: Batch,
    context: Context,
    within: AbstractContextManager[Any],
    *,
    called: nn.Module | None = None,
    mean: Callable[[Task, Tensor, Batch], Tensor] = mean_loss,
) -> tuple[Tensor, Tensor | float]:
    """Compute the task's loss and the auxiliary loss to be added to it; see :class:`regard.training.Point`.

    Args:
        within: a context manager that is active during the model's call.
        called: the module through which the model is called, if it is not the model itself.
        mean: computes the mean of the task's loss over the targets.
    """
    with within:
        result = run_model(model if called is None else called, batch, context)
    loss = mean(task, result.output, batch)
    auxiliary = auxiliary_loss(result.losses, getattr(getattr(model, "config", None), "loss_weights", {}))
    if "levels" in result.extras:
        whole = level_loss(result.extras["levels"], batch, loss, lambda output, part: mean(task, output, part))
        auxiliary = auxiliary + whole - loss
    if "exits" in result.extras:
        auxiliary = auxiliary + joint_loss(result, lambda output: mean(task, output, batch)) - loss
    return loss, auxiliary


class Alone:
    """A single process that takes every step by itself; :mod:`regard.distributed.together` has groups of processes.

    Args:
        model: the model to train.

    Attributes:
        count: number of processes that train the model.
        draws: offset of the seed of a step's draws.
        writes: whether this process writes the run's files.
    """

    count = 1
    draws = 0
    writes = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def part(self, batch: Batch) -> Batch:
        """Return the part of a batch that this process computes."""
        return batch

    def losses(
        self, task: Task, batch: Batch, context: Context, within: AbstractContextManager[Any]
    ) -> tuple[Tensor, Tensor | float]:
        """Like :func:`losses_of`, for this process's part; the reduced gradients are those of the whole batch."""
        return losses_of(self.model, task, batch, context, within)

    def add_gradients(self) -> None:
        """Finish the gradients after the backward pass, if anything is left to do."""

    def clip(self, limit: float) -> Tensor:
        """Clip the norm of the whole gradient; returns the norm before clipping."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def told(self, loss: Tensor, auxiliary: Tensor | float) -> tuple[float, float]:
        """Return the losses of the whole batch, the same in every process."""
        return loss.item(), float(torch.as_tensor(auxiliary).detach())

    def agreed(self, value: Any) -> Any:
        """Return the writing process's value in every process."""
        return value

    def wait(self) -> None:
        """Wait until every process has reached this point."""
