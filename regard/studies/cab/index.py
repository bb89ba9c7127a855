"""The compositional index: scores of different kinds on one scale, so that they may be averaged.

A metric is standardised over the models that compete, z = s (x - mean) / deviation, with s = -1 where less is better and
the deviation of a sample; metrics are averaged within a task, tasks within a pattern. One model that is far off stretches
the scale for all, so that ranks are told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Mapping[str, float]
"""Of one model, by metric."""
ScoresOf = dict[str, dict[str, float]]
"""Of some models, by task and ``"average"``."""
AVERAGE = "average"


@dataclass(frozen=True)
class Metric:
    """A metric, the task that it belongs to, and whether more is better."""

    name: str
    task: str
    higher: bool


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of a metric over the models that compete."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Standard:
        """Mean and deviation (over n - 1) of at least one value; a single one deviates by 0."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)


def standards(models: Mapping[str, Scores], metrics: Sequence[Metric]) -> dict[str, Standard]:
    """Standards of the metrics that a model has, over the models that have them."""
    found = {one.name: [scores[one.name] for scores in models.values() if one.name in scores] for one in metrics}
    return {name: Standard.of(values) for name, values in found.items() if values}


def indices(
    models: Mapping[str, Scores], metrics: Sequence[Metric], constants: Mapping[str, Standard] | None = None
) -> ScoresOf:
    """The index of each model in each task, and their average for models that have all tasks that any has.

    Args:
        models: scores by name.
        metrics: what they are.
        constants: of the metrics; those of these models when None. Where all score alike the index is 0.
    """
    known = standards(models, metrics) if constants is None else constants

    def index(value: float, one: Metric) -> float:
        standard = known[one.name]
        if not standard.deviation > 0:
            return 0.0
        return (1 if one.higher else -1) * (value - standard.mean) / standard.deviation

    return _by_task(
        {
            name: {one: index(scores[one.name], one) for one in metrics if one.name in scores}
            for name, scores in models.items()
        }
    )


def ranks(models: Mapping[str, Scores], metrics: Sequence[Metric]) -> ScoresOf:
    """As :func:`indices`: the place of each model, 1 for the best, half places where two are alike."""

    def place(value: float, one: Metric) -> float:
        others = [scores[one.name] for scores in models.values() if one.name in scores]
        better = sum(other > value if one.higher else other < value for other in others)
        return 1 + better + (sum(other == value for other in others) - 1) / 2

    return _by_task(
        {
            name: {one: place(scores[one.name], one) for one in metrics if one.name in scores}
            for name, scores in models.items()
        }
    )


def _by_task(values: Mapping[str, Mapping[Metric, float]]) -> ScoresOf:
    tasks = list(dict.fromkeys(one.task for own in values.values() for one in own))
    found: ScoresOf = {}
    for name, own in values.items():
        means = {
            task: float(np.mean([value for one, value in own.items() if one.task == task]))
            for task in tasks
            if any(one.task == task for one in own)
        }
        if len(means) == len(tasks) and tasks:
            means[AVERAGE] = float(np.mean(list(means.values())))
        found[name] = means
    return found


def correlation(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float | None, int]:
    """Pearson's correlation over the models that both have, and how many those are; None for fewer than three, or where one
    does not vary."""
    common = [name for name in first if name in second]
    if len(common) < 3:
        return None, len(common)
    one, other = (np.array([values[name] for name in common]) for values in (first, second))
    if not (one.std() > 0 and other.std() > 0):
        return None, len(common)
    return float(np.corrcoef(one, other)[0, 1]), len(common)
