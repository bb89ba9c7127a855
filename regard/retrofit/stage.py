"""A training stage of a retrofit: so many steps, with checkpoints, a shown loss and a pace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regard.contract import Projection, Unsupported
from regard.retrofit.best import Best
from regard.retrofit.folder import Folder
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint
from regard.training.loop import step_seed
from regard.training.optimizer import BETAS, scheduled_rate

CHECKPOINT_SECONDS = 60.0
SMALLEST, NEWER = 0.05, 4.0
WARMUP = (0.1, 10, 0.5)
"""Share of the steps in which the rate rises, or so many steps where that is more, but at most the second share: the first
steps of Adam are as large as the rate, whatever the gradients are."""
PATIENCE = 1.3
"""Times the planned time after which a stage stops where it is: the machine has become slower than it was."""


@dataclass(frozen=True)
class Progress:
    """Where a retrofit is.

    Attributes:
        doing: the stage, in words.
        loss: of its last step; nan where it has none.
        done, total: steps of the stage.
        remaining: seconds of the stage at its pace, and of those after it as planned.
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
        name: of its checkpoint.
        doing: in words.
        steps: optimizer steps.
        rate: peak learning rate, as a share of the size (root mean square) of what learns.
        seed: of what is drawn.
        seconds: planned; None where steps alone decide.
        after: seconds planned for later stages.
    """

    name: str
    doing: str
    steps: int
    rate: float
    seed: int
    seconds: float | None = None
    after: float = 0.0


def relative_groups(module: nn.Module, new: Collection[str], rate: float) -> list[dict[str, Any]]:
    """A group of an optimizer for each parameter that wants gradients, with a rate in proportion to its size.

    Adam's steps are as large as the rate whatever the weights are, and those of an output projection may be a thousand times
    smaller than others once they undo the scale of attention without a normaliser. What is new learns :data:`NEWER` times as
    fast, and is taken for no smaller than :data:`SMALLEST`; nor are vectors, whose start is often 0. What a mechanism has a rate
    of its own for has that one.
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
"""Gradients of a step by its number; its losses, of which the mean is shown."""


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
    """Train the parameters of `module` that want gradients, in place, going on from a checkpoint where there is one.

    Args:
        new: names of parameters that are new.
        clipped: modules whose gradients are clipped each alone; the whole module when None.
        best: asked now and then; its parts end with the weights that were best. The last ones are the result when None.

    Returns:
        The losses of each step.

    Raises:
        Unsupported: where a loss stops being finite; the last checkpoint stays.
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
            best.restore(checkpoint.record["looks"])
    started = saved = time.monotonic()
    begun, updating = len(curve), False
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
        return curve
    try:
        with torch.random.fork_rng(devices=[]):
            while len(curve) < stage.steps and not late():
                number = len(curve)
                if best is not None and best.due(number, stage.steps):
                    best.look(number)
                torch.manual_seed(step_seed(stage.seed, number))
                optimizer.zero_grad(set_to_none=True)
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
                updating = False
                pace = (time.monotonic() - started) / (len(curve) - begun)
                left = (stage.steps - len(curve)) * pace + stage.after
                watch(Progress(stage.doing, math.fsum(losses) / len(losses), len(curve), stage.steps, left))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()
            if best is not None:
                best.look(len(curve))
                best.put_back()
        save(finished=True)
    except KeyboardInterrupt:
        if not updating:
            save()
        raise
    finally:
        optimizer.zero_grad()
    return curve
