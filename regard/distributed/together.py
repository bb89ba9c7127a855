"""Several processes that train one model, by torch's own means: copies that average their gradients
(`DistributedDataParallel`), shards of the weights (`fully_shard`), or pieces of the sequences
(:class:`ContextParallel`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from regard.contract import Context, Unsupported, one_of
from regard.distributed.communicators import Ranks
from regard.distributed.context_parallel import ContextParallel
from regard.models import LanguageModel, StackConfig
from regard.models.blocks import Block
from regard.models.weights import whole
from regard.tasks.protocol import Batch, Task
from regard.training.step import Alone, losses_of

WAYS = ("ddp", "fsdp", "context")
TORCHRUN = "torchrun --nproc-per-node 2 -m regard train ..."


def started_ranks() -> int:
    """Number of processes that torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """Join the process group of torchrun's processes; yields whether this is the first, which does the reporting.

    Raises:
        Unsupported: in a process that torchrun has not started.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise Unsupported(
            f"several processes where torchrun has started none ({missing[0]} is not set)",
            supported="a process of torchrun",
            nearest=TORCHRUN,
        )
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def train_together(way: str, model: nn.Module) -> Alone:
    """Set up the processes of the default group to train `model`, which has the same weights in each; the result is for
    :func:`regard.training.train`.

    Args:
        way: ``ddp``: each process has the whole model and some items of each batch; ``fsdp``: the same, with weights,
            gradients and the optimizer's state in shards, which changes the model in place; ``context``: each has the
            whole model and a piece of each sequence.

    Raises:
        Unsupported: without a process group, and for models that cannot be trained this way.
    """
    one_of("parallel", way, WAYS)
    return SequenceParallel(model) if way == "context" else DataParallel(model, sharded=way == "fsdp")


class _Together(Alone):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ranks = Ranks.of(None, None)
        (self.rank,) = self.ranks.local
        self.count = self.ranks.count
        self.writes = self.rank == 0

    def agreed(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.ranks.group)
        return box[0]

    def wait(self) -> None:
        dist.barrier(self.ranks.group)


class DataParallel(_Together):
    """Split a batch's items over ranks. Losses are means over the targets of all ranks, so that losses and gradients
    are those of one process; auxiliary losses are means of the ranks' own.

    Args:
        model: a model without batch norms, which would see only a rank's items.
        sharded: whether each rank has only a shard of the weights, gradients and the optimizer's state.
    """

    def __init__(self, model: nn.Module, *, sharded: bool) -> None:
        super().__init__(model)
        self.draws = self.rank
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise Unsupported(
                f"{type(model).__name__} in several processes, each with batch norms of its own items",
                supported="models without batch norms",
            )
        if sharded:
            _shard(model, self.count)
            self.called = model
        else:
            # with random depth, some parameters may be unused in a step; without it, the same ones are used in all
            by_chance = _stack(model).stochastic_depth > 0
            self.called = DistributedDataParallel(
                model, process_group=self.ranks.group, find_unused_parameters=by_chance, static_graph=not by_chance
            )

    def part(self, batch: Batch) -> Batch:
        if batch.size < self.count:
            raise Unsupported(
                f"batches of {batch.size} items in {self.count} processes",
                supported="an item or more for each",
                nearest="more --batch-tokens, a shorter --length or fewer processes",
            )
        begin, end = (batch.size * rank // self.count for rank in (self.rank, self.rank + 1))
        return batch.items(begin, end)

    def losses(
        self, task: Task, batch: Batch, context: Context, within: AbstractContextManager[Any]
    ) -> tuple[Tensor, Tensor | float]:
        return losses_of(self.model, task, batch, context, within, called=self.called, mean=self._mean)

    def _mean(self, task: Task, output: Tensor, batch: Batch) -> Tensor:
        """This rank's part of the mean over all targets, times the number of ranks, since gradients are averaged."""
        sums, weights = task.loss(output, batch)
        total = weights.detach().sum()
        dist.all_reduce(total, group=self.ranks.group)
        return sums.sum() * self.count / total.clamp(min=1)

    def clip(self, limit: float) -> Tensor:
        return whole(super().clip(limit))

    def told(self, loss: Tensor, auxiliary: Tensor | float) -> tuple[float, float]:
        added = torch.as_tensor(auxiliary, dtype=loss.dtype, device=loss.device)
        both = torch.stack([loss.detach(), added.detach()])
        dist.all_reduce(both, group=self.ranks.group)
        first, second = (both / self.count).tolist()
        return first, second


def _stack(model: nn.Module) -> StackConfig:
    return getattr(getattr(model, "config", None), "stack", StackConfig())


def _shard(model: nn.Module, count: int) -> None:
    """Shard the weights of each block, and of the rest of the model, in place."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise Unsupported(
            f"shards of {scalars[0]}, a single number", supported="parameters with an axis", nearest="ddp"
        )
    if _stack(model).stochastic_depth:
        raise Unsupported(
            "shards of blocks that are left out by chance, in some processes alone",
            supported="stochastic_depth=0",
            nearest="ddp",
        )
    device = next(model.parameters()).device
    spared = [name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)]
    mesh = dist.init_device_mesh(device.type, (count,))
    # blocks that share weights or run in parts are gathered with the rest of the model
    if _stack(model) == StackConfig():
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule) and device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo's mean is a sum (pytorch 162338)
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in spared:
        parameters[name]._no_weight_decay = True


class SequenceParallel(_Together):
    """Split sequences into pieces over ranks; see :class:`ContextParallel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not isinstance(model, LanguageModel) or model.config.stack.exits:
            raise Unsupported(
                f"sequences of {type(model).__name__} over several processes",
                supported="a LanguageModel without exits",
                nearest="ddp",
            )
        self.parallel = ContextParallel(model)

    def losses(
        self, task: Task, batch: Batch, context: Context, within: AbstractContextManager[Any]
    ) -> tuple[Tensor, Tensor | float]:
        if task.objective != "next-token" or type(task).loss is not Task.loss or batch.valid is not None:
            raise Unsupported(
                f"sequences of {task.name} over several processes",
                supported="tasks of whole texts whose next tokens are predicted",
                nearest="ddp",
            )
        with within:
            return self.parallel.loss(batch.inputs, batch.targets), 0.0

    def add_gradients(self) -> None:
        self.parallel.add_gradients()
