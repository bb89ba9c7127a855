"""Reference learners: what can be known of a label from the examples before it.

A learner maps inputs (B, m, n) and labels (B, m), -1 and +1, to a number for each example, which it makes of its input and of
the examples before it; the sign is the prediction, and 0 is wrong. All examples of all contexts are computed at once.
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
    from jaxtyping import Float

Learner = Callable[[Tensor, Tensor], Tensor]

MOST_HYPOTHESES = 20_000
"""Functions that :func:`best_guess` weighs at most."""


def null(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """Always -1."""
    return -torch.ones_like(y)


def neighbours(count: int) -> Learner:
    """The mean label of the `count` nearest inputs before (Euclidean; of those as near, the earliest), 0 before any."""

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        before = _before(x.shape[1])
        distance = torch.where(before, -(x @ x.mT), torch.inf)  # all inputs have one norm
        ranks = distance.argsort(dim=-1, stable=True).argsort(-1)
        near = (before & (ranks < count)).to(x.dtype)
        return (near @ y[..., None])[..., 0] / near.sum(-1).clamp(min=1)

    return learner


def nearest_cosine(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """The label of the input before with the largest cosine, the earliest of those; inputs of -1 and +1 have one norm."""
    return neighbours(1)(x, y)


def averaging(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """w.x with the mean w of y x over the examples before; -1 before any."""
    sums = F.pad((y[..., None] * x).cumsum(1), (0, 0, 1, 0))[:, :-1]
    means = (sums * x).sum(-1) / torch.arange(x.shape[1]).clamp(min=1)
    means[:, 0] = -1
    return means


def elimination(*, monotone: bool, disjunction: bool = False) -> Learner:
    """A conjunction of all literals that held in every positive example before; of none such, one that never holds.

    It is never wrong where it says +1, and right everywhere once the examples leave one conjunction.

    Args:
        monotone: whether no literal is negated.
        disjunction: learns the negated labels as a conjunction of negated literals: a disjunction.
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
    """Gaussian elimination over GF(2): the label that every parity that fits gives, 0 where they differ."""
    bits = torch.cat([x > 0, (y > 0)[..., None]], -1)  # an equation a row: bits, label
    count, points, n = x.shape
    basis, held = bits.new_zeros(count, n, n + 1), bits.new_zeros(count, n)  # a row for each leading coordinate
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
    """A network of one hidden layer (ReLU) for each example, trained by Adam on the examples before it; -1 before any."""

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        count, points, n = x.shape
        generator = torch.Generator().manual_seed(seed)
        shapes = {"w": (n, hidden), "a": (1, hidden), "v": (hidden, 1), "b": (1, 1)}
        bounds = {"w": n**-0.5, "a": n**-0.5, "v": hidden**-0.5, "b": hidden**-0.5}  # as torch's linear layers begin
        weights = {
            name: nn.Parameter((torch.rand(count, points, *shape, generator=generator) * 2 - 1).to(x) * bounds[name])
            for name, shape in shapes.items()
        }

        def outputs(inputs: Tensor) -> Tensor:
            return ((inputs @ weights["w"] + weights["a"]).relu() @ weights["v"] + weights["b"])[..., 0]

        optimizer = torch.optim.Adam(weights.values(), lr=rate)
        before = _before(points).to(x)
        share = before / before.sum(-1, keepdim=True).clamp(min=1)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                losses = F.softplus(-y[:, None] * outputs(x[:, None]))  # (count, network, example)
                (losses * share).sum().backward()
                optimizer.step()
        found = outputs(x[:, :, None])[..., 0].detach()
        found[:, 0] = -1
        return found

    return learner


def best_guess(
    kind: FunctionClass, dimensions: int, *, literals: float | None = None, taught: float | None = None
) -> Learner:
    """The likelier label, given how functions and inputs of the class are drawn: no learner is right more often.

    The examples before, their inputs and the input itself are weighed under every function of the class. Inputs whose free bits
    are even are assumed.

    Args:
        literals, taught: as of the contexts; the class's own when None.

    Raises:
        Unsupported: for classes of several clauses, integers or drawn thresholds, and for too many functions.
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
    functions = with_thresholds(kind, weights)
    sizes = torch.from_numpy(np.abs(weights[:, 0]).sum(1)).double()
    with np.errstate(divide="ignore"):
        chance = np.log([1 - share, share / (2 if kind.signed else 1)])
    # 0 * -inf where the share is 0 or 1 would not be a number
    prior = torch.where(sizes > 0, sizes * chance[1], 0.0)
    prior = prior + torch.where(sizes < dimensions, (dimensions - sizes) * chance[0], 0.0)
    share_taught = float(kind.teaches) if taught is None else taught
    teaching = None
    if share_taught:
        teaching = [torch.from_numpy(one) for one in teaching_sequences(weights, signed=kind.signed)]

    def one_context(x: Tensor, y: Tensor) -> Tensor:
        labels = torch.from_numpy(functions(np.broadcast_to(x.long().numpy(), (count, *x.shape)))).double()
        fits = torch.where(labels == y, 0.0, -torch.inf)  # (functions, m)
        # chances of an input, relative to one of even bits
        likelier = torch.where(labels == kind.planted_label, 2.0 ** sizes[:, None], 0.0)
        free = torch.log1p(kind.planted * (likelier - 1))
        told = prior[:, None] + F.pad(fits.cumsum(1), (1, 0))[:, :-1]
        weighed = told + free.cumsum(1)
        if teaching is not None:
            sequences, lengths = teaching
            shown = min(x.shape[0], sequences.shape[1])
            same = (sequences[:, :shown] == x[:shown]).all(-1)
            given = free.clone()
            within = torch.arange(shown) < lengths[:, None]
            certain = torch.where(same, dimensions * math.log(2), -torch.inf).double()
            given[:, :shown] = torch.where(within, certain, free[:, :shown])
            shares = torch.tensor([share_taught, 1 - share_taught], dtype=torch.float64).log()
            weighed = torch.logaddexp(told + given.cumsum(1) + shares[0], weighed + shares[1])
        up, down = (torch.where(labels == sign, weighed, -torch.inf).logsumexp(0) for sign in (1, -1))
        return (up - down).nan_to_num(nan=0.0)  # labels that no function gives

    def learner(x: Float[Tensor, "b m n"], y: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        odds = torch.stack([one_context(*pair) for pair in zip(x.double(), y.double(), strict=True)])
        return odds.clamp(-1e3, 1e3).to(x.dtype)

    return learner


def _before(points: int) -> Tensor:
    return torch.ones(points, points, dtype=torch.bool).tril(-1)
