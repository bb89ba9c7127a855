"""Newton's method with backtracking, and gradient descent, on batches of regressions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.studies.softmax_regression.regression import Regression

if TYPE_CHECKING:
    from jaxtyping import Float

SUFFICIENT = 1e-4
"""Share of the linearly predicted decrease that a Newton step has to reach (Armijo)."""
HALVINGS = 40


@dataclass(frozen=True)
class Path:
    """A run of a solver.

    Attributes:
        x: the final weight, (..., d).
        losses: the loss before each step and at the end, (steps + 1, ...).
        gradients: gradient norms at the same points.
    """

    x: Float[Tensor, "*b d"]
    losses: Float[Tensor, "t *b"]
    gradients: Float[Tensor, "t *b"]


@torch.no_grad()
def newton(problem: Regression, x: Float[Tensor, "*b d"], steps: int, *, least: float = 1e-9) -> Path:
    """Newton's method: x - t (H + lambda I)^-1 g.

    Lambda is the least number >= 0 that lifts the lowest eigenvalue of H to `least`; the step length t is halved until
    the loss falls enough, and is 0 if it never does, so that no step increases the loss.
    """
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def step(x: Tensor, before: Tensor, g: Tensor) -> Tensor:
        h = problem.hessian(x)
        lowest = torch.linalg.eigvalsh(h)[..., 0]
        lifted = h + (least - lowest).clamp(min=0)[..., None, None] * eye
        direction = torch.linalg.solve(lifted, g)
        slope = (g * direction).sum(-1)
        length = torch.ones_like(before)
        for _ in range(HALVINGS):
            enough = problem.value(x - length[..., None] * direction) <= before - SUFFICIENT * length * slope
            if bool(enough.all()):
                break
            length = torch.where(enough, length, length / 2)
        else:
            length = torch.where(enough, length, 0)
        return x - length[..., None] * direction

    return _path(problem, x, steps, step)


@torch.no_grad()
def descend(problem: Regression, x: Float[Tensor, "*b d"], steps: int, rate: float | Tensor) -> Path:
    """Gradient descent with one rate or one for each problem; the loss falls in every step for rates up to 1 / |H|."""
    eta = _rates(x, rate)
    return _path(problem, x, steps, lambda x, _, gradient: x - eta * gradient)


@torch.no_grad()
def descended(problem: Regression, x: Float[Tensor, "*b d"], steps: int, rate: float | Tensor) -> Float[Tensor, "*b d"]:
    """The weight at which :func:`descend` ends, without computing losses on the way."""
    at_least("steps", steps, 0)
    eta = _rates(x, rate)
    for _ in range(steps):
        x = x - eta * problem.gradient(x)
    return x


def _rates(x: Tensor, rate: float | Tensor) -> Tensor:
    eta = torch.as_tensor(rate, dtype=x.dtype, device=x.device)
    if bool((eta <= 0).any()):
        raise Unsupported(f"rate={rate}", supported="positive rates")
    return eta[..., None] if eta.ndim else eta


def _path(problem: Regression, x: Tensor, steps: int, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Path:
    """The path of a solver whose step computes the next x from x, its loss and its gradient."""
    at_least("steps", steps, 0)
    losses, gradients = [problem.value(x)], [problem.gradient(x)]
    for _ in range(steps):
        x = step(x, losses[-1], gradients[-1])
        losses.append(problem.value(x))
        gradients.append(problem.gradient(x))
    return Path(x, torch.stack(losses), torch.stack(gradients).norm(dim=-1))
