"""What the properties share: a row of the equality matrix, the measurement of errors, and the claims of a subject."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract import Pattern, Tensors
from regard.workbench.verification.subjects import Subject, axes_of

PRIME = 13


class NotApplicable(Exception):
    """Raised when the card claims nothing that this property could test."""


class Broken(Exception):
    """Raised when an exact property does not hold."""


@dataclass(frozen=True)
class Property:
    """One row of the equality matrix.

    Attributes:
        name: name in reports, waivers and tests.
        meaning: the property in one sentence.
        check: function that measures the error for a subject.
        dtypes: dtypes in which the property is measured.
        level: ``function`` or ``layer``.
        native: whether native kernels can be involved.
    """

    name: str
    meaning: str
    check: Callable[..., float]
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    level: str = "function"
    native: bool = True

    def dtypes_on(self, backend: str) -> tuple[torch.dtype, ...]:
        """Dtypes in which the property is measured on a backend. Native kernels compute in float32, so they are held to
        the tolerance of float32 (and of bfloat16) in every property."""
        if backend != "native":
            return self.dtypes
        return (torch.float32, *(d for d in self.dtypes if d is torch.bfloat16)) if self.native else ()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected value."""
    if found.shape != expected.shape:
        raise Broken(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    if not torch.isfinite(found).all():
        return math.inf
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / (largest or 1.0)


def worst(errors: list[float]) -> float:
    """The largest error; 0 if there are none."""
    return max(errors, default=0.0)


def exactly(condition: Any, failure: str) -> float:
    """Return 0 if an exact condition holds.

    Raises:
        Broken: if it does not.
    """
    if not bool(condition):
        raise Broken(failure)
    return 0.0


def copies(tensors: Tensors) -> Tensors:
    """Copies of inputs before a call; see :func:`left_as_they_were`."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def left_as_they_were(tensors: Tensors, copies: Tensors, what: str) -> None:
    """Check that a call has not changed its inputs, which the caller may use again."""
    for name, tensor in tensors.items():
        exactly(torch.equal(tensor, copies[name]), f"a call changes {name} of {what} in place")


def fast_forms(subject: Subject) -> list[str]:
    """The fast forms that the subject's pattern has; ``absorb+read`` if a memory can be absorbed first."""
    if subject.pattern is Pattern.CAUSAL_SELF:
        forms = ("parallel",) if subject.waives("state") else ("parallel", "chunked")
        return [f for f in forms if f in subject.card.forms]
    found = ["parallel"] if "parallel" in subject.card.forms else []
    if subject.absorbs:
        found.append("absorb+read")
    if not found and "chunked" in subject.card.forms:
        found.append("chunked")
    return found


def batched(subject: Subject, name: str) -> bool:
    """Whether an input has an entry for each row in the batch."""
    return name == "roles" or axes_of(subject.card, name).startswith("b")


def as_leaves(inputs: Tensors) -> Tensors:
    """Copies of inputs for which gradients are computed."""
    return {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
