"""The compositional index: different metrics on one scale, so that they can be averaged.

A metric is standardised over the competing models, z = s (x - mean) / deviation, with s = -1 where lower is better and
the sample standard deviation; metrics are averaged within a task, tasks within a pattern. One outlier stretches the
scale for all models, so ranks are reported as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Mapping[str, float]
"""Scores of one model, by metric."""
ScoresOf = dict[str, dict[str, float]]
"""Scores of models by name, then by task and ``"average"``."""
AVERAGE = "average"


@dataclass(frozen=True)
class Metric:
    """A metric, its task, and whether higher is better."""

    name: str
    task: str
    higher: bool


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation of a metric over the competing models."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Standard:
        """Mean and standard deviation (over n - 1) of at least one value; the deviation of a single value is 0."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)


def standards(models: Mapping[str, Scores], metrics: Sequence[Metric]) -> dict[str, Standard]:
    """Standards of the metrics that at least one model has, each over the models that have it."""
    found = {one.name: [scores[one.name] for scores in models.values() if one.name in scores] for one in metrics}
    return {name: Standard.of(values) for name, values in found.items() if values}


def indices(
    models: Mapping[str, Scores], metrics: Sequence[Metric], constants: Mapping[str, Standard] | None = None
) -> ScoresOf:
    """The index of each model in each task, and the average for models that have every task that occurs.

    Args:
        models: scores of each model.
        metrics: the metrics to use.
        constants: standards of the metrics; computed from `models` when None. A metric in which all models are equal
            is left out of its task's mean; the index of a task that has no other is 0.
    """
    known = standards(models, metrics) if constants is None else constants
    apart = {one.task for one in metrics if one.name in known and known[one.name].deviation > 0}

    def index(value: float, one: Metric) -> float:
        standard = known[one.name]
        if not standard.deviation > 0:
            return 0.0
        return (1 if one.higher else -1) * (value - standard.mean) / standard.deviation

    return _by_task(
        {
            name: {
                one: index(scores[one.name], one)
                for one in metrics
                if one.name in scores and (known[one.name].deviation > 0 or one.task not in apart)
            }
            for name, scores in models.items()
        }
    )


def over_seeds(each: Sequence[ScoresOf], without: Mapping[str, Collection[str]]) -> ScoresOf:
    """The mean over seeds of scores from :func:`indices` or :func:`ranks`, of those that have them.

    Args:
        each: the scores of each seed.
        without: for models by name, tasks that are left out, and with them the model's average.
    """
    found: ScoresOf = {}
    for name in dict.fromkeys(name for one in each for name in one):
        lost = without.get(name, frozenset())
        kept: dict[str, list[float]] = {}
        for one in each:
            for task, value in one.get(name, {}).items():
                if task not in lost and not (lost and task == AVERAGE):
                    kept.setdefault(task, []).append(value)
        found[name] = {task: float(np.mean(values)) for task, values in kept.items()}
    return found


def ranks(models: Mapping[str, Scores], metrics: Sequence[Metric]) -> ScoresOf:
    """The rank of each model, as :func:`indices` gives the index: 1 for the best, shared ranks averaged."""

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
    """Pearson's correlation over the models that both have, and their number. The correlation is None for fewer than
    three models or where one side is constant."""
    common = [name for name in first if name in second]
    if len(common) < 3:
        return None, len(common)
    one, other = (np.array([values[name] for name in common]) for values in (first, second))
    if not (one.std() > 0 and other.std() > 0):
        return None, len(common)
    return float(np.corrcoef(one, other)[0, 1]), len(common)
