"""Training in phases, each with its own parameters and loss, that can be resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, at_least
from regard.models.weights import load_tensors
from regard.training.checkpoint import Checkpoint, damaged, load_checkpoint, restore, save_checkpoint
from regard.training.loop import step_seed
from regard.training.optimizer import scheduled_rate

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Returns the images and classes of a step; always the same for the same step."""


@dataclass(frozen=True)
class Phase:
    """Steps that train some of the parameters.

    Attributes:
        name: for errors, and to identify a checkpoint.
        groups: parameters, each group with Adam's learning rate.
        steps: number of steps.
        loss: from images and classes, returns the loss and numbers to report. Random draws must use torch's global
            generator.
        schedule: learning-rate schedule: ``constant`` or ``cosine``.
    """

    name: str
    groups: Sequence[tuple[Sequence[nn.Parameter], float]]
    steps: int
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Mapping[str, float]]]
    schedule: str = "constant"


def run_phases(
    model: nn.Module,
    phases: Sequence[Phase],
    batches: Batches,
    *,
    settings: Mapping[str, Any],
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    on_step: Callable[[int, int, float, Mapping[str, float]], None] = lambda phase, step, loss, told: None,
) -> None:
    """Run phases one after another, in place, in the mode (training or evaluation) that the model is in.

    Everything random in a step is drawn from the seed and the number of the step, so that a resumed run ends with the
    same result as one that was never stopped.

    Args:
        model: saved in the checkpoint; it has all parameters of the phases.
        batches: returns the batch of each step, counted through all phases.
        settings: everything else that the losses depend on, as JSON values: a checkpoint with other settings is
            refused.
        seed: seed of random draws.
        checkpoint: file to save to, and to resume from if it exists.
        checkpoint_every: number of steps between saves.
        on_step: called with the number of the phase, the step in it, its loss, and the numbers that the phase reports.

    Raises:
        Unsupported: for a checkpoint of another run, and a loss that is not finite (the weights are then those before).
    """
    at_least("checkpoint_every", checkpoint_every, 1)
    path = None if checkpoint is None else Path(checkpoint)
    run = {
        "settings": dict(settings),
        "seed": seed,
        "phases": [[phase.name, phase.steps, phase.schedule, *(rate for _, rate in phase.groups)] for phase in phases],
    }
    found = load_checkpoint(path) if path is not None and path.exists() else None
    begun, first = (0, 0) if found is None else _place(path, found, run)
    if found is not None and begun == len(phases):
        load_tensors(model, found.model, source="a checkpoint")
        return

    def save(optimizer: torch.optim.Optimizer, phase: int, step: int) -> None:
        if path is not None:
            save_checkpoint(path, model, optimizer, {"run": run, "phase": phase, "step": step})

    for number, phase in enumerate(phases):
        if number < begun:
            continue
        before = sum(earlier.steps for earlier in phases[:number])
        optimizer = torch.optim.Adam({"params": list(parameters), "lr": rate} for parameters, rate in phase.groups)
        if found is not None and number == begun:
            restore(found, model, optimizer)
        step, updating = first if number == begun else 0, False
        try:
            while step < phase.steps:
                images, labels = batches(before + step)
                with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
                    torch.manual_seed(step_seed(seed, before + step))
                    loss, told = phase.loss(images, labels)
                    _differentiate(loss, phase)
                updating = True
                for group, (_, rate) in zip(optimizer.param_groups, phase.groups, strict=True):
                    group["lr"] = scheduled_rate(step, phase.steps, peak=rate, warmup=0.0, schedule=phase.schedule)
                optimizer.step()
                optimizer.zero_grad()
                step, updating = step + 1, False
                on_step(number, step - 1, loss.item(), told)
                if (before + step) % checkpoint_every == 0 and step < phase.steps:
                    save(optimizer, number, step)
        except KeyboardInterrupt:
            if not updating:
                save(optimizer, number, step)
            raise
        if number + 1 == len(phases):
            save(optimizer, len(phases), 0)


def _differentiate(loss: Tensor, phase: Phase) -> None:
    """Compute gradients of the phase's parameters only."""
    if not math.isfinite(loss.item()):
        raise Unsupported(f"a loss of {phase.name} that is not finite", supported="a smaller rate")
    parameters = [parameter for group, _ in phase.groups for parameter in group]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _place(path: Path | None, found: Checkpoint, run: Mapping[str, Any]) -> tuple[int, int]:
    """The phase and step at which a checkpoint resumes; raises Unsupported for a checkpoint of another run."""
    assert path is not None
    try:
        before, place = found.record["run"], (int(found.record["phase"]), int(found.record["step"]))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if before != run:
        raise Unsupported(
            f"going on from {path}, a run with other settings", supported="the same settings", nearest="another path"
        )
    return place
