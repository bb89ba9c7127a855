"""Training by Adam that can resume where it was stopped, for the recipe steps that train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint

SECONDS = 60.0
"""The most seconds between two saves of a run's state."""
SCORED = 4
"""Batches whose loss is reported, before and after training."""


def descend(
    trained: nn.ParameterDict,
    groups: Sequence[dict[str, Any]],
    loss_of: Callable[[int], Tensor],
    *,
    what: str,
    steps: int,
    learning_rate: float,
    seconds: float | None = None,
    file: Path | None = None,
    after: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda done: None,
) -> tuple[int, float]:
    """Train parameters by Adam with a cosine schedule down to 0; return the number of steps done and the seconds spent.

    Args:
        trained: all parameters by name, as saved in the state.
        groups: the same parameters as optimizer groups, each with the ``factor`` of its learning rate.
        loss_of: returns the loss of a step, given its number.
        what: what is being trained, for error messages.
        seconds: time limit; the learning rate reaches 0 then.
        file: where the state is saved every minute, on interruption, and at the end.
        after: called after each step.
        on_step: called with the number of steps done.

    Raises:
        Unsupported: if the loss is not finite.
    """
    optimizer = torch.optim.Adam(list(groups))
    done, before = 0, 0.0
    if file is not None and file.is_file():
        checkpoint = load_checkpoint(file)
        restore(checkpoint, trained, optimizer)
        done, before = int(checkpoint.record["steps"]), float(checkpoint.record["seconds"])
    began = time.monotonic()

    def spent() -> float:
        return before + time.monotonic() - began

    def keep() -> None:
        if file is not None and done:
            save_checkpoint(file, trained, optimizer, {"steps": done, "seconds": spent()})

    with saving(keep) as save_in_time:
        while (share := max(done / steps, spent() / seconds if seconds else 0.0)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate * (1 + math.cos(math.pi * share)) / 2
            with torch.enable_grad():
                loss = loss_of(done)
                if not bool(torch.isfinite(loss.detach())):
                    raise Unsupported(
                        f"step {done + 1} of {what}, whose loss is {float(loss.detach())}",
                        supported="a loss that stays finite",
                        nearest=f"learning_rate={learning_rate / 10:g}",
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            after()
            done += 1
            on_step(done)
            save_in_time()
    return done, spent()


@contextmanager
def saving(save: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Save the state of a run on interruption and at the end; the given function does so if the last save was
    :data:`SECONDS` ago."""
    last = time.monotonic()

    def save_in_time() -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS:
            save()
            last = time.monotonic()

    try:
        yield save_in_time
    except KeyboardInterrupt:
        save()
        raise
    save()


@torch.no_grad()
def mean_loss(loss_of: Callable[[int], Tensor], batches: int) -> float:
    """Mean loss over the first batches, :data:`SCORED` at most, to report the effect of training."""
    few = min(SCORED, batches)
    return sum(float(loss_of(i)) for i in range(few)) / few


def by_path(parameters: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """Parameters by name, with dots replaced, which `ParameterDict` does not allow."""
    return nn.ParameterDict({name.replace(".", "/"): one for name, one in parameters.items()})
