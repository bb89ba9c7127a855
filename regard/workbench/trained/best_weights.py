"""The best weights of a run: those that score highest, at some of its steps, on held-out items kept for this choice."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from regard.core.files import write_atomically
from regard.models.weights import distinct_tensors, load_tensors, read_tensors
from regard.tasks import Task
from regard.training import WeightAverage, runner_of
from regard.training.step import Alone

MOMENTS = 8
"""Steps at which a run looks for its best weights where nobody says how many."""


def moments(steps: int, count: int) -> frozenset[int]:
    """The steps (counted from 1), evenly spread and the last among them, after which a run looks."""
    return frozenset(round(steps * (i + 1) / count) for i in range(count)) - {0}


@dataclass(frozen=True)
class Found:
    """Weights that were looked at: after which step, whether they are the running mean, and how they score."""

    step: int
    averaged: bool
    score: float
    loss: float
    items: int

    def __str__(self) -> str:
        mean = "the mean of the weights up to" if self.averaged else "those after"
        items = f"{self.items} items that chose them" if self.items != 1 else "one item that chose them"
        return f"{mean} step {self.step} ({self.score:.4g} on the {items})"


class BestWeights:
    """Keeps the best weights so far in a file, which a run that is resumed goes on with.

    Args:
        path: of the file.
        task: its first `items` held-out items choose, `at_once` at a time: by score, and where that is equal by loss.
        average: of the run, looked at beside the weights themselves; None for none.
        together: the processes that look, of which one writes; one when None.
    """

    def __init__(
        self,
        path: Path,
        task: Task,
        items: int,
        at_once: int,
        average: WeightAverage | None,
        together: Alone | None = None,
    ) -> None:
        self.path, self.task, self.items, self.at_once, self.average = path, task, items, at_once, average
        self.together = Alone(nn.Module()) if together is None else together
        self.found: Found | None = None
        if path.is_file():
            self.found = Found(**json.loads(read_tensors(path)[1]["found"]))

    def look(self, model: nn.Module, step: int) -> None:
        """Score the weights after so many steps, and their mean, and keep what is better than all before.

        An interruption comes through when that is done, since a run that goes on does not look at this step again.
        """
        try:
            self._look(model, step)
        except KeyboardInterrupt:
            self._look(model, step)
            raise

    def _look(self, model: nn.Module, step: int) -> None:
        for averaged in (False, True)[: 1 + (self.average is not None)]:
            with self.average.in_place_of(model) if averaged and self.average else contextlib.nullcontext():
                evaluated = runner_of(self.task).evaluate(model, self.task, self.at_once, last=self.items)
                found = self.together.agreed(Found(step, averaged, evaluated.score, evaluated.loss, self.items))
                if self.found is None or self._order(found) > self._order(self.found):
                    self._keep(model, found)

    def take(self, model: nn.Module) -> None:
        """Put the best weights into `model`."""
        self.together.wait()  # for the one that writes
        load_tensors(model, read_tensors(self.path)[0], source=str(self.path))

    def _order(self, found: Found) -> tuple[float, float]:
        sign = 1 if self.task.higher_is_better else -1
        score, loss = (x if math.isfinite(x) else math.inf for x in (found.score, found.loss))
        return (sign * score if math.isfinite(score) else -math.inf), -loss

    def _keep(self, model: nn.Module, found: Found) -> None:
        tensors, told = distinct_tensors(model), {"format": "pt", "found": json.dumps(asdict(found))}
        if self.together.writes:
            write_atomically(self.path, lambda path: save_file(tensors, path, metadata=told))
        self.found = found

    def as_record(self) -> dict[str, Any] | None:
        """Numbers for JSON; None where nothing was looked at."""
        return None if self.found is None else asdict(self.found)
