"""A training stage of a retrofit: a number of steps, with checkpoints, a displayed loss and a time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Projection, Unsupported
from regard.retrofit.best import Best
from regard.retrofit.folder import Folder
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint
from regard.training.loop import step_seed
from regard.training.optimizer import BETAS, scheduled_rate

CHECKPOINT_SECONDS = 60.0
SMALLEST, NEWER = 0.05, 4.0
WARMUP = (0.1, 10, 0.5)
"""Share of the steps in which the rate rises, or the number of steps if that is more, but at most the second share: the
first steps of Adam are as large as the rate, whatever the gradients are."""
PATIENCE = 1.3
"""A stage stops early after this multiple of its planned time, as when the machine has become slower."""


@dataclass(frozen=True)
class Progress:
    """The progress of a retrofit.

    Attributes:
        doing: the stage, in words.
        loss: loss of its last step; nan if it has none.
        done, total: steps of the stage.
        remaining: seconds left in the stage at its pace, plus those planned for later stages.
    """

    doing: str
    loss: float
    done: int
    total: int
    remaining: float


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
        name: name of its checkpoint.
        doing: description in words.
        steps: optimizer steps.
        rate: peak learning rate, relative to the root mean square of each parameter.
        seed: seed of random draws.
        seconds: planned time; None if only the steps count.
        after: seconds planned for later stages.
        before: steps of the stages before, which count for a mechanism's schedule.
    """

    name: str
    doing: str
    steps: int
    rate: float
    seed: int
    seconds: float | None = None
    after: float = 0.0
    before: int = 0


def relative_groups(module: nn.Module, new: Collection[str], rate: float) -> list[dict[str, Any]]:
    """An optimizer group for each parameter that requires gradients, with a rate proportional to its root mean square.

    Adam's steps are as large as the rate whatever the weights are, and an output projection's weights may be a thousand
    times smaller than others after compensating the scale of attention without a normaliser. New parameters learn
    :data:`NEWER` times as fast, and count as no smaller than :data:`SMALLEST`; so do vectors, which often start at 0.
    Parameters for which a mechanism sets its own rate have that rate.
    """
    groups: list[dict[str, Any]] = []
    own = {
        id(part.get_parameter(name)): its
        for part in module.modules()
        if isinstance(part, Projection)
        for name, its in part.learning_rates.items()
        if name in part._parameters and part._parameters[name] is not None
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in own:
            groups.append({"params": [parameter], "lr": own[id(parameter)]})
            continue
        size = float(parameter.detach().square().mean().sqrt())
        fresh = name in new
        if fresh or parameter.ndim < 2:
            size = max(size, SMALLEST)
        groups.append({"params": [parameter], "lr": rate * size * (NEWER if fresh else 1.0)})
    return groups


Step = Callable[[int], Sequence[float]]
"""Computes the gradients of a step, given its number, and returns its losses, whose mean is displayed."""


def train_stage(
    stage: Stage,
    folder: Folder,
    module: nn.Module,
    new: Collection[str],
    step: Step,
    watch: Watch,
    *,
    clipped: Sequence[nn.Module] | None = None,
    best: Best | None = None,
) -> list[list[float]]:
    """Train the parameters of `module` that require gradients, in place, resuming from a checkpoint if there is one.

    Args:
        new: names of new parameters.
        clipped: modules whose gradients are clipped separately; the whole module when None.
        best: evaluates now and then; its parts end with their best weights. The last weights are the result when None.

    Returns:
        The losses of each step.

    Raises:
        Unsupported: if a loss is not finite; the last checkpoint stays.
    """
    groups = relative_groups(module, new, stage.rate)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    path, curve, spent, finished = folder.checkpoint(stage.name), list[list[float]](), 0.0, False
    if path.exists():
        checkpoint = load_checkpoint(path)
        restore(checkpoint, module, optimizer)
        curve, rates, spent, finished = (checkpoint.record[name] for name in ("curve", "rates", "spent", "finished"))
        if best is not None:
            best.restore(checkpoint.record.get("looks", []))  # first steps of earlier versions had none
    started = saved = time.monotonic()
    begun, updating = len(curve), False
    buffers: dict[str, Tensor] = {}  # as they were before the step in flight, which may change them
    warmup = min(max(WARMUP[0], WARMUP[1] / stage.steps), WARMUP[2])

    def elapsed() -> float:
        return spent + time.monotonic() - started

    def save(finished: bool = False) -> None:
        record = {"curve": curve, "rates": rates, "spent": elapsed(), "finished": finished, "planned": stage.steps}
        if best is not None:
            record["looks"] = best.record()
        save_checkpoint(path, module, optimizer, record)

    def late() -> bool:
        return stage.seconds is not None and elapsed() > PATIENCE * stage.seconds and len(curve) > 0

    if finished:
        if best is not None:
            best.discard()
        return curve
    try:
        with torch.random.fork_rng(devices=[]):
            while len(curve) < stage.steps and not late():
                number = len(curve)
                if best is not None and best.due(number, stage.steps):
                    best.look(number)
                torch.manual_seed(step_seed(stage.seed, number))
                optimizer.zero_grad(set_to_none=True)
                buffers = {name: x.detach().clone() for name, x in module.named_buffers()}
                losses = list(step(number))
                if not all(map(math.isfinite, losses)):
                    raise Unsupported(
                        f"{stage.doing} at a rate of {stage.rate:g}: the loss is not finite at step {number}",
                        supported="a rate at which it learns; the last checkpoint is kept",
                        nearest=f"a new folder and a rate of {stage.rate / 3:.1g}",
                    )
                for part in [module] if clipped is None else clipped:
                    nn.utils.clip_grad_norm_([p for p in part.parameters() if p.grad is not None], 1.0)
                updating = True
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scheduled_rate(number, stage.steps, peak=1.0, warmup=warmup, schedule="cosine")
                optimizer.step()
                curve.append(losses)
                buffers, updating = {}, False
                pace = (time.monotonic() - started) / (len(curve) - begun)
                left = (stage.steps - len(curve)) * pace + stage.after
                watch(Progress(stage.doing, math.fsum(losses) / len(losses), len(curve), stage.steps, left))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()
            if best is not None:
                best.look(len(curve))
                updating = True  # from here on the weights are not those of the last step
                best.put_back()
        save(finished=True)
        if best is not None:
            best.discard()
    except KeyboardInterrupt:
        if not updating:
            with torch.no_grad():
                for name, x in buffers.items():
                    module.get_buffer(name).copy_(x)
            save()
        raise
    finally:
        optimizer.zero_grad()
    return curve
