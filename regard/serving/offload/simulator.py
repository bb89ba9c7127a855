"""Discrete-event simulation of micro-batches that go through stages; a stage serves one micro-batch at a time."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from regard.contract import Unsupported, at_least
from regard.serving.offload.costs import Stages


class Stage(NamedTuple):
    """A stage of work.

    Attributes:
        place: resource that does the work, for one micro-batch at a time in order of arrival; None for mere waiting.
        seconds: duration.
    """

    place: str | None
    seconds: float


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation.

    Attributes:
        steps: time at which all micro-batches had finished each step.
        busy: seconds that each place worked.
    """

    steps: list[float]
    busy: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds until all micro-batches have finished the last step."""
        return self.steps[-1]


def simulate(work: Sequence[Sequence[Stage]], steps: int = 1, *, together: bool = False) -> Simulated:
    """Simulate `steps` steps of micro-batches.

    Args:
        work: the stages of a step, for each micro-batch.
        steps: number of steps.
        together: whether a step only starts when all micro-batches have finished the one before, as with a scheduler
            that chooses each batch.
    """
    at_least("steps", steps, 1)
    if not work or not all(work):
        raise Unsupported("micro-batches without work", supported="at least one stage each")
    free: dict[str, float] = defaultdict(float)
    busy: dict[str, float] = defaultdict(float)
    done = [0] * len(work)
    ends = [0.0] * steps
    events = [(0.0, turn, turn, 0) for turn in range(len(work))]  # time, order of arrival, micro-batch, stage
    arrivals = len(work)
    while events:
        now, _, i, at = heapq.heappop(events)
        if at < len(work[i]):
            place, seconds = work[i][at]
            start = now
            if place is not None:
                start = max(now, free[place])
                free[place] = start + seconds
                busy[place] += seconds
            heapq.heappush(events, (start + seconds, arrivals, i, at + 1))
            arrivals += 1
            continue
        ends[done[i]] = max(ends[done[i]], now)
        done[i] += 1
        ready = [i] if not together else list(range(len(work))) if len(set(done)) == 1 else []
        if done[i] < steps:
            for j in ready:
                heapq.heappush(events, (now, arrivals, j, 0))
                arrivals += 1
    return Simulated(ends, dict(busy))


def step_stages(stages: Stages, layers: int, *, last: bool = False) -> list[Stage]:
    """Return the stages of one micro-batch in a step through all layers.

    Args:
        stages: times of one layer.
        layers: number of layers.
        last: whether the model computes once more after the attention of the last layer.
    """
    layer = [
        Stage("model", stages.model),
        Stage("send", stages.send),
        Stage(None, stages.latency),
        Stage("attention", stages.attention),
        Stage("receive", stages.receive),
        Stage(None, stages.latency),
    ]
    return layer * layers + ([Stage("model", stages.model)] if last else [])
