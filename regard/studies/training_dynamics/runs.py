"""Monitored runs: SGD on finite contexts, and the differential equation of infinitely long ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import at_least, one_of
from regard.studies.training_dynamics.facts import Facts
from regard.studies.training_dynamics.layer import Model, entropy

if TYPE_CHECKING:
    from jaxtyping import Float

METHODS = ("sgd", "adam")

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Descent:
    """How the model is trained.

    Attributes:
        steps: number of steps.
        batch: contexts in a step.
        length: tokens of a context, without its last token.
        rate: learning rate of z.
        ratio: learning rate of y over that of z; a sequence trains one run for each ratio on the same contexts, with
            stacked weights.
        momentum: momentum of ``sgd``.
        method: ``sgd`` or ``adam``.
        weight_decay: L2 penalty, added to the gradients.
    """

    steps: int = 100
    batch: int = 128
    length: int = 127
    rate: float = 1.0
    ratio: float | Sequence[float] = 1.0
    momentum: float = 0.9
    method: str = "sgd"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        for name in ("steps", "batch", "length"):
            at_least(name, getattr(self, name), 1)

    def optimizer(self, runs: Sequence[tuple[float, Weights]]) -> torch.optim.Optimizer:
        """The optimizer for (ratio, weights) of runs: y has its own rate, all other weights have that of z."""
        groups = [
            {"params": [tensor], "lr": self.rate * (ratio if name == "y" else 1)}
            for ratio, weights in runs
            for name, tensor in weights.items()
        ]
        if self.method == "adam":
            return torch.optim.Adam(groups, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)


@torch.no_grad()
def descend(
    model: Model, facts: Facts, start: Weights, how: Descent, generator: np.random.Generator
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the weights before each step and at the end, with the loss of the step that led to them (nan at first).
    With several runs both have a leading axis of runs.

    The tensors are changed in place by later steps: copy those to be kept.
    """
    several = isinstance(how.ratio, Sequence)
    ratios = how.ratio if isinstance(how.ratio, Sequence) else [how.ratio]
    lead = (len(ratios),) if several else ()
    weights = {name: tensor.expand(*lead, *tensor.shape).clone() for name, tensor in start.items()}
    places: list[Any] = list(range(len(ratios))) if several else [...]
    runs = [{name: tensor[at] for name, tensor in weights.items()} for at in places]  # views
    optimizer = how.optimizer(list(zip(ratios, runs, strict=True)))
    yield weights, torch.full(lead, torch.nan, dtype=torch.float64)
    for _ in range(how.steps):
        value, gradients = model.gradients(weights, facts.draw(how.batch, how.length, generator))
        for at, run in zip(places, runs, strict=True):
            for name, tensor in run.items():
                tensor.grad = -gradients[name][at]
        optimizer.step()
        yield weights, -value


@torch.no_grad()
def flow(
    model: Model, facts: Facts, start: Weights, rate: float, ratio: float, steps: int, parts: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Solve d y / dt = rate ratio dJ/dy, d z / dt = rate dJ/dz for infinitely long contexts by Euler's method.

    Yields the weights at the times 0, 1, ..., `steps`. One step of gradient descent is a time of 1, divided into
    `parts`.
    """
    weights = {name: tensor.clone() for name, tensor in start.items()}
    limit = facts.limit()
    yield weights
    for _ in range(steps):
        for _ in range(parts):
            _, gradients = model.gradients(weights, limit)
            for name, tensor in weights.items():
                tensor += rate * (ratio if name == "y" else 1) / parts * gradients[name]
        yield weights


@dataclass
class Watched:
    """The course of a run: a value for each moment, and the final attention.

    Attributes:
        losses: losses of the steps; nan at first.
        common: attention mass c on common tokens, mean over facts.
        entropy: entropy of c, mean over facts.
        change: norm of the step's update of z.
        conservation: largest change since the start in the sums that gradient descent conserves.
        attention: c at the end, (F, M).
    """

    losses: list[float]
    common: list[float]
    entropy: list[float]
    change: list[float]
    conservation: list[float]
    attention: Float[Tensor, "f m"]


COURSE = ("losses", "common", "entropy", "change", "conservation")


def watch(model: Model, facts: Facts, run: Iterator[tuple[Weights, Tensor]]) -> Watched:
    """Follow a run of :func:`descend` to its end."""
    (found,) = watch_each(model, facts, run)
    return found


def watch_each(model: Model, facts: Facts, runs: Iterator[tuple[Weights, Tensor]]) -> list[Watched]:
    """Follow several stacked runs to their end."""
    limit, common = facts.limit(), facts.common
    course: list[Tensor] = []
    first = before = None
    attention = facts.probabilities
    for weights, losses in runs:
        scores, conserved = model.scores(weights).clone(), model.conserved(weights).clone()
        if first is None or before is None:
            first, before = conserved, scores
        attention = model.attention(weights, limit)
        found = (
            losses,
            attention[..., common].sum(-1).mean(-1),
            entropy(attention).mean(-1),
            (scores - before).flatten(-2).norm(dim=-1),
            (conserved - first).abs().amax(-1),
        )
        course.append(torch.stack(found))
        before = scores
    told = torch.stack(course).reshape(len(course), len(COURSE), -1)  # (moment, quantity, run)
    each = attention.reshape(-1, *attention.shape[-2:])
    return [
        Watched(**dict(zip(COURSE, columns.T.tolist(), strict=True)), attention=one)
        for columns, one in zip(told.unbind(2), each, strict=True)
    ]


def in_order(attention: Float[Tensor, "f m"], facts: Facts) -> float:
    """Share of pairs of a fact's distinct tokens with different probabilities in which the likelier token has the
    larger z, which is log(c / P) up to a constant."""
    right, pairs = 0, 0
    for row, chances in zip(attention, facts.probabilities, strict=True):
        own = facts.distinct & (chances > 0)
        z, p = (row[own] / chances[own]).log(), chances[own]
        larger = p[:, None] > p + 1e-12
        right += int(((z[:, None] > z) & larger).sum())
        pairs += int(larger.sum())
    return right / pairs if pairs else float("nan")
