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
"""Share of the decrease by the gradient that a Newton step has to reach (Armijo)."""
HALVINGS = 40


@dataclass(frozen=True)
class Path:
    """A run of a solver.

    Attributes:
        x: where it ended, (..., d).
        losses: before each step and at the end, (steps + 1, ...).
        gradients: norms, likewise.
    """

    x: Float[Tensor, "*b d"]
    losses: Float[Tensor, "t *b"]
    gradients: Float[Tensor, "t *b"]


@torch.no_grad()
def newton(problem: Regression, x: Float[Tensor, "*b d"], steps: int, *, least: float = 1e-9) -> Path:
    """Newton's method: x - t (H + lambda I)^-1 g.

    Lambda is 0 where H is positive definite, and otherwise the least number that lifts its lowest eigenvalue to `least`; the
    step's length t is halved until the loss falls enough, so that no step makes it larger.
    """
    at_least("steps", steps, 0)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def step(x: Tensor) -> Tensor:
        g, h = problem.gradient(x), problem.hessian(x)
        lowest = torch.linalg.eigvalsh(h)[..., 0]
        lifted = h + (least - lowest).clamp(min=0)[..., None, None] * eye
        direction = torch.linalg.solve(lifted, g)
        slope, before = (g * direction).sum(-1), problem.value(x)
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
    """Gradient descent with a rate, or one for each problem; the loss falls in every step for rates up to 1 / |H|."""
    at_least("steps", steps, 0)
    eta = torch.as_tensor(rate, dtype=x.dtype, device=x.device)
    if bool((eta <= 0).any()):
        raise Unsupported(f"rate={rate}", supported="positive rates")
    eta = eta[..., None] if eta.ndim else eta
    return _path(problem, x, steps, lambda x: x - eta * problem.gradient(x))


def _path(problem: Regression, x: Tensor, steps: int, step: Callable[[Tensor], Tensor]) -> Path:
    losses, gradients = [problem.value(x)], [problem.gradient(x).norm(dim=-1)]
    for _ in range(steps):
        x = step(x)
        losses.append(problem.value(x))
        gradients.append(problem.gradient(x).norm(dim=-1))
    return Path(x, torch.stack(losses), torch.stack(gradients))
