"""The best weights of a run: those that scored highest, at some of its steps, on held-out items kept for this."""

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
"""Default number of looks for the best weights in a run."""


def moments(steps: int, count: int) -> frozenset[int]:
    """The steps (counted from 1) after which a run looks: evenly spaced, including the last."""
    return frozenset(round(steps * (i + 1) / count) for i in range(count)) - {0}


@dataclass(frozen=True)
class Found:
    """A candidate for the best weights: its step, whether it is the running mean, and its score."""

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
    """Keeps the best weights so far in a file, with which a resumed run continues.

    Args:
        path: path of the file.
        task: the task whose first `items` held-out items choose, in batches of `at_once`: by score and, if equal, by
            loss.
        average: the run's running mean of the weights, which is a candidate too; None for none.
        together: the processes that look together, of which one writes; a single process when None.
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
        """Score the weights after `step` steps, and their mean, and keep them if they are the best so far.

        An interruption is raised only after this is done, since a resumed run does not look at this step again.
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
        """Load the best weights into `model`."""
        self.together.wait()  # until the writing process is done
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
        """The best candidate's numbers for JSON; None if there is none."""
        return None if self.found is None else asdict(self.found)
