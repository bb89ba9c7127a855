"""Code that the native operations of layers share: checks and differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import Operator, Packed
from regard.contract import Unsupported

SMALLEST = {"rms_norm": 1 << 15, "gated_product": 1 << 18}
"""Number of elements in the smallest input for which the native operation is faster."""


def small(engine: str, x: Tensor) -> str | None:
    """The reason to leave a small input to torch, which is faster; None for a large one."""
    # a traced graph may run on any number of tokens
    if not torch.compiler.is_compiling() and x.numel() < SMALLEST[engine]:
        return f"fewer than {SMALLEST[engine]} numbers, which are faster elsewhere"
    return None


def unreadable(x: Tensor, *others: Tensor | None) -> str | None:
    """The reason why a kernel cannot read tensors together (all in the dtype of x, on the CPU); None if it can."""
    if x.dtype not in library.DTYPES or any(t is not None and t.dtype != x.dtype for t in others):
        return "inputs in several dtypes, or in another than float32 and bfloat16"
    if any(t is not None and t.device.type != "cpu" for t in (x, *others)):
        return "tensors on several devices"
    return None


def refuse(reason: str | None, what: str) -> None:
    """Raise Unsupported if there is a reason."""
    if reason is not None:
        raise Unsupported(f"the native {what} with {reason}", nearest="backend='torch'")


def addresses(grads: Sequence[Tensor]) -> list[int | None]:
    """Addresses of gradients; None for those that are not needed."""
    return [library.pointer(x) if x.numel() else None for x in grads]


def save(ctx: Any, inputs: tuple[Packed], output: Any) -> None:
    """Save what :func:`differentiate` needs."""
    inputs[0].keep(ctx)


def differentiate(kind: type[Packed], backward: Operator, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a problem, by its backward operator (gradients of the outputs, problem, flags of those needed)."""
    problem, _ = kind.kept(ctx)
    needed = problem.needed(ctx)
    return problem.gradients(backward(*grads, problem, needed), needed)
