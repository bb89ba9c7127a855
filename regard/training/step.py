"""A training step: the model on a batch, its losses, and what differs where several processes take the step together."""

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
    """The context of a task's batch."""
    mask = None if batch.valid is None else Mask(valid=batch.valid)
    memory_mask = None if batch.memory_valid is None else Mask(valid=batch.memory_valid)
    return Context(mask=mask, memory_mask=memory_mask, grid=batch.grid, **more)


def run_model(model: nn.Module, batch: Batch, context: Context) -> Result:
    """`model` on a batch, with its memory where it has one."""
    if batch.memory is None:
        return model(batch.inputs, context=context)
    return model(batch.inputs, batch.memory, context=context)


def answered(task: Task, run: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """The output for a held-out batch; a task that is not derived from `Task` may have no way of its own."""
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
    """The task's loss, and what is added to it; see :class:`regard.training.Point`.

    Args:
        within: what the model is called in.
        called: what the model is called through, where that is another module.
        mean: of the task's loss over the targets.
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
    """One process that takes every step by itself. Those of :mod:`regard.distributed.together` take them with others.

    Args:
        model: that is trained.

    Attributes:
        count: processes that train the model.
        draws: added to the seed of a step's draws.
        writes: whether this process writes what the run leaves behind.
    """

    count = 1
    draws = 0
    writes = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def part(self, batch: Batch) -> Batch:
        """The part of a batch that this process computes."""
        return batch

    def losses(
        self, task: Task, batch: Batch, context: Context, within: AbstractContextManager[Any]
    ) -> tuple[Tensor, Tensor | float]:
        """As :func:`losses_of`, of its part, so that gradients come out as those of the whole batch."""
        return losses_of(self.model, task, batch, context, within)

    def add_gradients(self) -> None:
        """Whatever is left to do for the gradients after the backward pass."""

    def clip(self, limit: float) -> Tensor:
        """Limit the norm of the whole gradient; the norm before."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def told(self, loss: Tensor, auxiliary: Tensor | float) -> tuple[float, float]:
        """The losses of the whole batch, the same in every process."""
        return loss.item(), float(torch.as_tensor(auxiliary).detach())

    def agreed(self, value: Any) -> Any:
        """What the process that writes says, in every process."""
        return value

    def wait(self) -> None:
        """Until every process has come so far."""
