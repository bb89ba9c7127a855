"""The arguments of the gated recurrence as one object, which the engine's forms and operators share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.backends.operators import Operator, Packed
from regard.contract import Unsupported


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.gated_recurrence.gated_recurrence`; `reset` is merged into `log_decay`."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    inclusive: bool

    @property
    def learned(self) -> list[Tensor | None]:
        """The inputs that have gradients: the fields before `inclusive`."""
        return [self.q, self.k, self.v, self.log_decay, self.beta, self.state]


def save(ctx: Any, inputs: tuple[Problem, bool], output: tuple[Tensor, ...]) -> None:
    """Save what :func:`differentiate` needs."""
    problem, ctx.keep = inputs
    problem.keep(ctx, output[2])
    ctx.set_materialize_grads(False)


def differentiate(
    backward: Operator, ctx: Any, grad_o: Tensor | None, grad_final_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of a problem, and None for `keep`, computed by the backward operator."""
    if grad_o is None and grad_final_state is None:
        return (None,) * len(ctx.needs_input_grad)
    if not ctx.keep:
        raise Unsupported("the gradient of a recurrence called with keep=False", supported="keep=True")
    problem, (states,) = Problem.kept(ctx)
    needed = problem.needed(ctx)
    return *problem.gradients(backward(grad_o, grad_final_state, problem, states, needed), needed), None
