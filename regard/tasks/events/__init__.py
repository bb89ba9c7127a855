"""Events: predict which event comes next, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern
from regard.tasks.events.hawkes import Hawkes
from regard.tasks.events.likelihood import constant_output, event_nats
from regard.tasks.protocol import (
    EVALUATION,
    SPLIT,
    TRAINING,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Drawn = tuple[Float[np.ndarray, "b n"], Int[np.ndarray, "b n"]]

MAX_LENGTH = 1 << 14
RULE_RUNS = 256
"""Runs of the process from which the baseline takes its rates."""
NEAR = 0.1
"""The task counts as solved within this share of the way from the process's score to the baseline's."""


class EventsTask(Task):
    """Predict the time and the mark of the next event from those before it (as in arXiv 2405.13956, section 4.2).

    Events are drawn from a Hawkes process (:class:`regard.tasks.events.hawkes.Hawkes`) with one event per unit of time
    in the long run: each event triggers `excitation` others on average, mostly with the next mark, soon after. A token
    is an event: the time since the previous event, its logarithm, the time since the start, and the one-hot mark; the
    first token is empty. At each token, a model predicts the intensity of every mark until the next event
    (:mod:`regard.tasks.events.likelihood`). The loss and score are the negative log-likelihood of the next event, its
    time and mark together, in nats; the difference from the process itself is reported too. The baseline is a Poisson
    process with the mean rate of each mark. The task counts as solved nine tenths of the way from the baseline to the
    process.

    Args:
        length: events per item, 2 to 16384.
        marks: number of different marks, 1 to 256.
        excitation: mean number of events that an event triggers directly, 0 (a Poisson process) to 0.95.
        decay: rate at which the excitation fades, 0.01 to 100.
        evaluation_items: number of held-out runs of the process, 1 to 65536.
        seed: seed of the held-out runs.
    """

    name = "events"
    pattern = Pattern.CAUSAL_SELF
    objective = "events"
    metric = "nats per event"
    higher_is_better = False

    def __init__(
        self,
        *,
        length: int = 64,
        marks: int = 3,
        excitation: float = 0.8,
        decay: float = 2.0,
        evaluation_items: int = 256,
        seed: int = 0,
    ) -> None:
        self.length = check_integer("length", length, 2, MAX_LENGTH)
        self.marks = check_integer("marks", marks, 1, 256)
        self.process = Hawkes.cyclic(
            marks, check_fraction("excitation", excitation, 0, 0.95), check_fraction("decay", decay, 0.01, 100)
        )
        self.evaluation_items = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        self.features = 3 + marks
        self.num_targets = 3 * marks
        self.excitation, self.decay = float(excitation), float(decay)

    def batch(self, gaps: Float[np.ndarray, "b n"], marks: Int[np.ndarray, "b n"]) -> Batch:
        """Make a batch of runs: each token is the event before its target."""
        inputs = np.zeros((*gaps.shape, self.features), dtype=np.float32)
        before = gaps[:, :-1]
        inputs[:, 1:, 0], inputs[:, 1:, 1] = before, np.log(np.maximum(before, np.finfo(np.float32).tiny))
        inputs[:, 1:, 2] = before.cumsum(1) / self.length
        inputs[:, 1:, 3:] = np.eye(self.marks)[marks[:, :-1]]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(np.stack([gaps, marks], -1)).float())

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        return self.batch(*self.process.draw(counter_generator(seed, step, TRAINING), batch_size, self.length))

    @cached_property
    def held_out(self) -> Drawn:
        """Times and marks of the held-out runs."""
        return self.process.draw(counter_generator(self.seed, 0, EVALUATION), self.evaluation_items, self.length)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        gaps, marks = self.held_out
        for rows in in_batches(self.evaluation_items, batch_size):
            yield self.batch(gaps[rows], marks[rows])

    def score(self, logits: Float[Tensor, "b n c3"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        return event_nats(logits.double(), batch)

    def figures(
        self, output: Float[Tensor, "b n c3"], batch: Batch
    ) -> Mapping[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        nats, counted = event_nats(output.double(), batch)
        gaps, marks = batch.targets.double().unbind(-1)
        least = -self.process.log_density(gaps.cpu().numpy(), marks.long().cpu().numpy()).sum(1)
        return {"nats above the process itself": (nats - torch.from_numpy(least).to(nats), counted)}

    @cached_property
    def process_score(self) -> float:
        """The score of the process that generated the held-out events."""
        return float(-self.process.log_density(*self.held_out).mean())

    @cached_property
    def baseline(self) -> Baseline:  # type: ignore[override]
        """A Poisson process with the mean rates of runs that are not held out."""
        gaps, marks = self.process.draw(counter_generator(self.seed, 0, SPLIT), RULE_RUNS, self.length)
        rates = torch.from_numpy(np.bincount(marks.ravel(), minlength=self.marks) / gaps.sum())
        rule = constant_output(rates)
        return Baseline.of("Poisson process", self, lambda batch: rule.expand(*batch.inputs.shape[:2], -1))

    @property
    def chance(self) -> float:  # type: ignore[override]
        """The score of the Poisson process, which ignores earlier events."""
        return self.baseline.score

    @property
    def solved(self) -> float | None:  # type: ignore[override]
        """`NEAR` of the way from the process to the Poisson process; None where the two are the same."""
        if self.excitation == 0:
            return None
        return self.process_score + NEAR * (self.baseline.score - self.process_score)

    def describe(self) -> str:
        gaps, marks = (x[0, :6] for x in self.held_out)
        sample = " ".join(f"{time:.2f}:{mark}" for time, mark in zip(gaps.cumsum(), marks, strict=True))
        return "\n".join(
            [
                f"events: {self.length} of {self.marks} marks, from a Hawkes process; an event makes {self.excitation:g} "
                f"others, after {1 / self.decay:.2g} on average",
                f"training: drawn afresh at each step; held out: {self.evaluation_items} runs (seed {self.seed})",
                f"scored in {self.metric}, lower is better; {self.baseline.name}: {self.baseline.score:.3f}; the process "
                f"itself: {self.process_score:.3f}" + ("" if self.solved is None else f"; solved at {self.solved:.3f}"),
                f"sample (time:mark): {sample}" + (" ..." if self.length > 6 else ""),
            ]
        )
