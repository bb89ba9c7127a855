"""A trained model with early exits, compared with itself using all layers: ``entropy:0.3``, ``patience:2``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.measurement.statistics import score_of_items
from regard.measurement.timing import calm_clock, interleaved
from regard.models import exit_layers, set_exit_rule
from regard.models.exit_rules import HALTING, ExitRule
from regard.training.step import batch_context, run_model

if TYPE_CHECKING:
    from regard.tasks import Task
    from regard.training import Evaluation
    from regard.workbench.trained.folder import TrainedModel

OF_CLASSES = ("classification", "next-token", "masked-token")
"""Objectives whose models output classes, which exit rules can judge."""
AT_ONCE = 16
"""Most items in a timed batch."""
SECONDS = 2.0
"""Timing budget for the comparison of speeds."""


@dataclass(frozen=True)
class Exited:
    """What an exit rule costs in score and saves in time.

    Attributes:
        rule: the rule, as written.
        found: the score and loss with the rule.
        layers: number of layers in the model.
        passed: the share of tokens (or of sequences, if these exit as a whole) that passed each number of layers.
        seconds: time per batch with all layers and with the rule, measured in turn.
        batch: number of items in that batch.
    """

    rule: str
    found: Evaluation
    layers: int
    passed: dict[int, float]
    seconds: dict[str, float]
    batch: int

    @property
    def depth(self) -> float:
        """Average number of layers passed."""
        return sum(layer * share for layer, share in self.passed.items())

    @property
    def speedup(self) -> float:
        """Speed relative to using all layers."""
        return self.seconds["all"] / self.seconds["early"]

    def as_dict(self) -> dict[str, Any]:
        """The results as plain data, for JSON."""
        return {
            "rule": self.rule,
            "score": self.found.score,
            "standard_error": score_of_items(self.found.items)[1],
            "loss": self.found.loss,
            "depth": self.depth,
            "layers": self.layers,
            "passed": {str(layer): share for layer, share in self.passed.items()},
            "batch": self.batch,
            "seconds": self.seconds,
            "speedup": self.speedup,
        }

    def told(self, metric: str) -> str:
        """The results in words."""
        shares = ", ".join(f"{share:.0%} after {layer}" for layer, share in self.passed.items())
        return (
            f"{self.found.score:.4g} {metric} with {self.rule}: {self.depth:.2f} of {self.layers} layers on average ({shares}), "
            f"{self.speedup:.2f} times as fast as all layers (batches of {self.batch})."
        )


def leaving(model: nn.Module, rule: str) -> nn.Module:
    """A copy of the model with an exit rule; raises Unsupported as :func:`regard.models.set_exit_rule` does."""
    early = copy.deepcopy(model)
    set_exit_rule(early, rule)
    return early


def exited(
    trained: TrainedModel, model: nn.Module, rule: str, task: Task, *, own: bool = True, device: str = "cpu"
) -> Exited:
    """Score a trained model with an exit rule, and compare its time with that of all layers.

    Args:
        trained: the model's folder.
        model: the model in that folder, on the device.
        rule: a rule of :mod:`regard.models.exit_rules`.
        task: the task whose held-out items are scored.
        own: whether the model was trained on this task, with some held-out items having chosen its weights.

    Raises:
        Unsupported: for a model without exits, an unknown rule, and a rule about classes for a task without them.
    """
    early = leaving(model, rule)
    if not ExitRule.read(rule).halts and task.objective not in OF_CLASSES:
        raise Unsupported(
            f"--exit {rule} on {task.name}, whose answers are no single classes",
            supported="tasks of " + ", ".join(OF_CLASSES),
            nearest="regard train --exits all:halting",
        )
    with exit_layers(early) as seen:
        found = trained.score(task, own=own, device=device, model=early)
    whole = leaving(model, f"{HALTING}:0") if model.config.stack.halts else copy.deepcopy(model)  # type: ignore[union-attr]
    if not model.config.stack.halts:  # type: ignore[union-attr]
        set_exit_rule(whole, None)
    batch = next(iter(task.evaluation_batches(AT_ONCE))).to(device)
    actions = {
        name: partial(run_model, one.eval(), batch, batch_context(batch))
        for name, one in (("all", whole), ("early", early))
    }
    with torch.inference_mode():
        timings = interleaved(
            actions, seconds=SECONDS, most=500, device=batch.inputs.device, clock=calm_clock(batch.inputs.device)
        )
    seconds = {name: timing.median for name, timing in timings.items()}
    layers: Any = model.blocks
    return Exited(rule, found, layers.layers, shares(seen), seconds, batch.size)


def shares(passed: Sequence[Tensor]) -> dict[int, float]:
    """The share of tokens (or sequences) for each number of layers passed."""
    every = torch.cat([one.flatten() for one in passed])
    layers, counts = every.unique(return_counts=True)
    return {int(layer): int(count) / len(every) for layer, count in zip(layers, counts, strict=True)}
