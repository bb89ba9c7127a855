"""Distillation losses, which measure how a student differs from its teacher.

Every function averages over what it compares, in the dtype of the student, and passes no gradient to the teacher. For a
student equal to its teacher, loss and gradient are 0, except for :func:`feature_loss` with a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Unsupported, at_least, one_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

POOLED = (4, 2, 1)
"""Sizes of the pooled maps that :func:`context_loss` compares in addition to the maps themselves."""


def response_loss(
    student: Float[Tensor, "... k"], teacher: Float[Tensor, "... k"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T), softmax(student / T)), averaged over all but the last axis (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits, classes last.
        temperature: T > 0; the factor T^2 preserves the scale of gradients.
    """
    _alike(student, teacher)
    positive("temperature", temperature)
    own, told = (x.flatten(0, -2).div(temperature).log_softmax(-1) for x in (student, teacher.detach()))
    return temperature**2 * F.kl_div(own, told, reduction="batchmean", log_target=True)


def feature_loss(
    student: Float[Tensor, "... c"],
    teacher: Float[Tensor, "... d"],
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of hidden states, the student's after `projection` (TinyBERT, arXiv 1909.10351).

    Args:
        projection: from the student's width to the teacher's, trained with the student; not needed for equal widths.
    """
    own = student if projection is None else projection(student)
    _alike(own, teacher)
    return F.mse_loss(own, teacher.detach())


def attention_transfer_loss(
    student: Float[Tensor, "b h n m"], teacher: Float[Tensor, "b h n m"], queries: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, ""]:
    """KL(teacher, student) of attention weights, averaged over queries and heads (MobileBERT, arXiv 2004.02984).

    Args:
        student, teacher: weights after the softmax, with the same number of heads; a key without weight costs nothing
            if the teacher gives it none either.
        queries: the queries that count; all when None.
    """
    _alike(student, teacher)
    own, told = student, teacher.detach()
    if queries is not None:
        own, told = (x.transpose(1, 2)[queries] for x in (own, told))
    logs = own.clamp(min=torch.finfo(own.dtype).tiny).log()
    return F.kl_div(logs, told, reduction="sum") / max(1, told[..., 0].numel())


def relation_loss(
    student: Float[Tensor, "b h n d"],
    teacher: Float[Tensor, "b h n e"],
    mask: Float[Tensor, "b #h #n n"] | None = None,
    queries: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher, student) of value relations softmax(V V^T / sqrt(width)), by query and head (MiniLM, arXiv 2002.10957).

    MiniLM adds it to :func:`attention_transfer_loss` for the same layer, the last of both models. The widths of heads
    may differ, so the student can be as narrow and shallow as desired, but the number of heads must be equal.

    Args:
        student, teacher: values, or queries or keys (MiniLMv2), by head.
        mask: added to the relations, -inf for padded tokens.
        queries: the tokens whose relations to all others count; all when None.
    """
    if student.shape[:3] != teacher.shape[:3]:
        raise Unsupported(
            f"student shape {tuple(student.shape)} and teacher shape {tuple(teacher.shape)}",
            supported="as many heads and tokens; widths may differ",
        )
    related = [x @ x.mT * x.shape[-1] ** -0.5 for x in (student, teacher.detach())]
    own, told = ((x if mask is None else x + mask).softmax(-1) for x in related)
    return attention_transfer_loss(own, told, queries)


def patient_loss(
    students: Sequence[Float[Tensor, "b c"]], teachers: Sequence[Float[Tensor, "b c"]]
) -> Float[Tensor, ""]:
    """Mean squared difference of normalised pooled hidden states, over pairs of layers (PKD, arXiv 1908.09355).

    Args:
        students, teachers: the hidden state of [CLS], or another pooled one, after each layer of the pairs;
            :func:`patient_layers` pairs the teacher's layers with the student's.
    """
    if len(students) != len(teachers) or not students:
        raise Unsupported(
            f"{len(students)} layers of a student for {len(teachers)} of its teacher",
            supported="as many of both, 1 or more",
        )
    found = []
    for own, told in zip(students, teachers, strict=True):
        _alike(own, told)
        found.append(F.mse_loss(F.normalize(own, dim=-1), F.normalize(told.detach(), dim=-1)))
    return torch.stack(found).mean()


def patient_layers(student: int, teacher: int, strategy: str = "skip") -> tuple[int, ...]:
    """The teacher's layers (counted from 1) that the student's layers 1 to ``student - 1`` learn from.

    Args:
        student, teacher: numbers of layers. The last layers of both are left to the loss on the outputs.
        strategy: ``skip`` every k-th layer, k = teacher / student, or the ``last`` ones before the final layer.
    """
    at_least("student", student, 2)
    one_of("strategy", strategy, ("skip", "last"))
    if teacher < student or (strategy == "skip" and teacher % student):
        raise Unsupported(
            f"{strategy} layers of {teacher} for a student of {student}",
            supported="a multiple of the student's layers, or strategy='last' with no fewer than it has",
            nearest="strategy='last'" if teacher >= student else f"a student of {teacher} layers",
        )
    if strategy == "last":
        return tuple(range(teacher - student + 1, teacher))
    return tuple(range(teacher // student, teacher, teacher // student))


def context_loss(
    students: Sequence[Float[Tensor, "b c h w"]], teachers: Sequence[Float[Tensor, "b c h w"]]
) -> Float[Tensor, ""]:
    """The hierarchical context loss (Knowledge Review, arXiv 2104.09044), summed over pairs of maps.

    For a pair it is ``(MSE + sum_l c_l MSE_l) / (1 + sum_l c_l)``, where MSE_l compares the maps average-pooled to l x
    l, for each l of 4, 2 and 1 that is less than the height; c is 1/2 for the first of them and halves with each
    further one.
    """
    total = None
    for own, told in zip(students, teachers, strict=True):
        _alike(own, told)
        told = told.detach()
        loss, share, weights = F.mse_loss(own, told), 1.0, 1.0
        for side in POOLED:
            if side < own.shape[2]:
                share /= 2
                weights += share
                pooled, expected = (F.adaptive_avg_pool2d(x, side) for x in (own, told))
                loss = loss + share * F.mse_loss(pooled, expected)
        loss = loss / weights
        total = loss if total is None else total + loss
    if total is None:
        raise Unsupported("a context loss of no maps", supported="one pair or more")
    return total


def channel_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """:func:`response_loss` over the positions of each channel (channel-wise distillation, arXiv 2011.13256)."""
    _alike(student, teacher)
    return response_loss(student.flatten(2), teacher.flatten(2), temperature)


def place_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """:func:`response_loss` over the channels at each position, as if they were classes."""
    return response_loss(student.movedim(1, -1), teacher.movedim(1, -1), temperature)


def positive(name: str, value: object) -> None:
    """Raise Unsupported unless `value` is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise Unsupported(f"{name}={value!r}", supported="a number above 0", nearest=f"{name}=1")


def _alike(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise Unsupported(
            f"student shape {tuple(student.shape)} and teacher shape {tuple(teacher.shape)}", supported="equal shapes"
        )
