"""Reference learners: what can be inferred about a label from the examples before it.

A learner maps inputs (B, m, n) and labels (B, m), -1 and +1, to a number for each example, computed from its input and
the examples before it. The sign is the prediction; 0 counts as wrong. All examples of all contexts are computed at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Unsupported
from regard.tasks.in_context_functions.functions import FunctionClass, with_thresholds
from regard.tasks.in_context_functions.teaching import teaching_sequences

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Learner = Callable[[Tensor, Tensor], Tensor]

MOST_HYPOTHESES = 20_000
"""Largest number of functions that :func:`best_guess` weighs."""
LEAST_ODDS = 1e-9
"""Log-odds below which both labels are equally likely to :func:`best_guess`: such differences are rounding errors."""


def null(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """Always answer -1."""
    return -torch.ones_like(y)


def neighbours(count: int) -> Learner:
    """The mean label of the `count` nearest earlier inputs (Euclidean; ties go to the earliest), or 0 without any."""

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        before = _before(x.shape[1])
        distance = torch.where(before, -(x @ x.mT), torch.inf)  # all inputs have the same norm
        ranks = distance.argsort(dim=-1, stable=True).argsort(-1)
        near = (before & (ranks < count)).to(x.dtype)
        return (near @ y[..., None])[..., 0] / near.sum(-1).clamp(min=1)

    return learner


def nearest_cosine(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """The label of the earlier input with the largest cosine (ties go to the earliest); inputs all have one norm."""
    return neighbours(1)(x, y)


def averaging(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """w.x, with w the mean of y x over the earlier examples; -1 if there are none."""
    sums = F.pad((y[..., None] * x).cumsum(1), (0, 0, 1, 0))[:, :-1]
    means = (sums * x).sum(-1) / torch.arange(x.shape[1]).clamp(min=1)
    means[:, 0] = -1
    return means


def elimination(*, monotone: bool, disjunction: bool = False) -> Learner:
    """A conjunction of all literals that held in every positive example so far; of all literals, before the first.

    It is never wrong when it answers +1, and always right once the examples determine a single conjunction.

    Args:
        monotone: whether literals are never negated.
        disjunction: whether to learn a disjunction, as a conjunction of negated literals with negated labels.
    """
    sign = -1.0 if disjunction else 1.0

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        literals = sign * x if monotone else torch.cat([sign * x, -sign * x], -1)
        broken = (literals < 0) & (sign * y > 0)[..., None]
        kept = F.pad(broken.cumsum(1), (0, 0, 1, 0))[:, :-1] == 0
        holds = ~((literals < 0) & kept).any(-1)
        return sign * torch.where(holds, 1.0, -1.0).to(x.dtype)

    return learner


def gaussian(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """Gaussian elimination over GF(2): the label on which all consistent parities agree, 0 where they differ."""
    bits = torch.cat([x > 0, (y > 0)[..., None]], -1)  # one equation per row: bits, label
    count, points, n = x.shape
    basis, held = bits.new_zeros(count, n, n + 1), bits.new_zeros(count, n)  # one row per leading coordinate
    found = torch.zeros_like(y)
    for point in range(points):
        row = bits[:, point].clone()
        for column in range(n):
            row ^= basis[:, column] & (row[:, column] & held[:, column])[:, None]
        unknown = row[:, :n]
        known = ~unknown.any(-1)
        found[:, point] = torch.where(known, torch.where(row[:, n] ^ (y[:, point] > 0), 1.0, -1.0), 0.0)
        new, leading = (~known).nonzero()[:, 0], unknown.to(torch.uint8).argmax(-1)
        basis[new, leading[new]], held[new, leading[new]] = row[new], True
    return found


def gradient_descent(seed: int = 0, *, hidden: int = 64, steps: int = 100, rate: float = 5e-3) -> Learner:
    """One network with a hidden layer (ReLU) per example, trained by Adam on the examples before it; -1 without any."""

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        count, points, n = x.shape
        generator = torch.Generator().manual_seed(seed)
        shapes = {"w": (n, hidden), "a": (1, hidden), "v": (hidden, 1), "b": (1, 1)}
        bounds = {"w": n**-0.5, "a": n**-0.5, "v": hidden**-0.5, "b": hidden**-0.5}  # as in torch's linear layers
        start = {
            name: (torch.rand(count, points, *shape, generator=generator) * 2 - 1).to(x) * bounds[name]
            for name, shape in shapes.items()
        }
        found = []
        for first in range(0, points, TOGETHER):
            own = slice(first, first + TOGETHER)
            weights = {name: nn.Parameter(part[:, own].clone()) for name, part in start.items()}
            found.append(_trained(weights, x, y, first, steps, rate))
        said = torch.cat(found, 1)
        said[:, 0] = -1
        return said

    return learner


TOGETHER = 6
"""Networks of a context that are trained together: none of them reads examples after the last network's own."""


def _trained(
    weights: dict[str, nn.Parameter],
    x: Float[Tensor, "b m n"],
    y: Float[Tensor, "b m"],
    first: int,
    steps: int,
    rate: float,
) -> Float[Tensor, "b k"]:
    """Predictions of networks (b, k, ...), each for one example from `first` on, trained on the examples before it."""

    def outputs(inputs: Tensor) -> Tensor:
        return ((inputs @ weights["w"] + weights["a"]).relu() @ weights["v"] + weights["b"])[..., 0]

    own = slice(first, first + weights["w"].shape[1])
    before = _before(own.stop)[own, : own.stop - 1].to(x)
    share = before / before.sum(-1, keepdim=True).clamp(min=1)
    known, labels = x[:, None, : own.stop - 1], y[:, None, : own.stop - 1]
    optimizer = torch.optim.Adam(weights.values(), lr=rate, fused=True)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            losses = F.softplus(-labels * outputs(known))  # (b, k, example)
            (losses * share).sum().backward()
            optimizer.step()
    with torch.no_grad():
        return outputs(x[:, own, None])[..., 0]


def best_guess(
    kind: FunctionClass, dimensions: int, *, literals: float | None = None, taught: float | None = None
) -> Learner:
    """The likelier label, given how functions and inputs of the class are drawn; no learner is right more often.

    Every function of the class is weighed by the earlier examples, their inputs and the present input. Bits that are
    not set are assumed to be uniform. If both labels are equally likely, the answer is -1.

    Args:
        literals, taught: as for the contexts; None for the class's own.

    Raises:
        Unsupported: for classes with several clauses, integer weights or drawn thresholds, and for too many functions.
    """
    base = 3 if kind.signed else 2
    count = base**dimensions
    if kind.clauses > 1 or not kind.of_literals or kind.thresholds != (0, 0):
        raise Unsupported(f"the best guess of {kind.name}", supported="classes of one clause of literals")
    if count > MOST_HYPOTHESES:
        raise Unsupported(
            f"the best guess among {count:,} functions", supported=f"up to {MOST_HYPOTHESES:,}, so fewer dimensions"
        )
    share = kind.literals if literals is None else literals
    digits = np.arange(count)[:, None] // base ** np.arange(dimensions) % base
    weights = (digits - 1 if kind.signed else digits)[:, None]  # (functions, 1, n)
    sizes = torch.from_numpy(np.abs(weights[:, 0]).sum(1)).double()
    with np.errstate(divide="ignore"):
        chance = np.log([1 - share, share / (2 if kind.signed else 1)])
    # where the share is 0 or 1, 0 * -inf would be nan
    prior = torch.where(sizes > 0, sizes * chance[1], 0.0)
    prior = prior + torch.where(sizes < dimensions, (dimensions - sizes) * chance[0], 0.0)
    share_taught = float(kind.teaches) if taught is None else taught
    shares = torch.tensor([share_taught, 1 - share_taught], dtype=torch.float64).log()
    teaching = None
    if share_taught:
        sequences, lengths = (torch.from_numpy(one) for one in teaching_sequences(weights, signed=kind.signed))
        teaching = _numbered(sequences), torch.arange(sequences.shape[1]) < lengths[:, None]
    # log probabilities of an input with the planted label, and of others, relative to uniform bits
    likelier, rarer = torch.log1p(kind.planted * (2.0**sizes - 1)), math.log1p(-kind.planted)
    literals_of = torch.from_numpy(weights[:, 0]).float()
    thresholds_of = torch.from_numpy(with_thresholds(kind, weights).thresholds).float()

    def one_context(x: Tensor, y: Tensor) -> Tensor:
        up = labelled(x)  # (functions, m)
        fits = torch.where(up == (y > 0), 0.0, -torch.inf).double()
        free = torch.where(up == (kind.planted_label > 0), likelier[:, None], rarer)
        told = prior[:, None] + F.pad(fits.cumsum(1), (1, 0))[:, :-1]
        weighed = told + free.cumsum(1)
        if teaching is not None:
            sequences, within = teaching
            shown = min(len(x), sequences.shape[1])
            same = sequences[:, :shown] == _numbered(x[:shown])
            certain = free.new_full(same.shape, -torch.inf).masked_fill(same, dimensions * math.log(2))
            given = free.clone()
            given[:, :shown] = torch.where(within[:, :shown], certain, free[:, :shown])
            weighed = torch.logaddexp(told + given.cumsum(1) + shares[0], weighed + shares[1])
        chances = (weighed - weighed.amax(0)).exp()
        found = torch.where(up, chances, 0).sum(0).log() - torch.where(up, 0, chances).sum(0).log()
        return found.nan_to_num(nan=0.0)  # labels that no function gives

    def labelled(x: Tensor) -> Tensor:
        """A mask of the functions that answer +1; sums of so few integers are exact."""
        if kind.rule == "odd":
            return (literals_of @ (x > 0).float().mT) % 2 == 1
        return literals_of @ x.mT > thresholds_of

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        odds = torch.stack([one_context(*pair) for pair in zip(x.float(), y, strict=True)])
        odds = torch.where(odds.abs() < LEAST_ODDS, -LEAST_ODDS, odds)
        return odds.clamp(-1e3, 1e3).to(x.dtype)

    return learner


def _numbered(x: Float[Tensor, "*b n"]) -> Int[Tensor, "*b"]:
    """Inputs as the numbers that their bits represent."""
    return ((x > 0) * 2 ** torch.arange(x.shape[-1])).sum(-1)


def _before(points: int) -> Tensor:
    return torch.ones(points, points, dtype=torch.bool).tril(-1)
