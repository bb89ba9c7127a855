"""Segmentation losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Unsupported
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

IGNORED = -100
"""The label of a pixel without loss, that of tasks (:data:`regard.tasks.protocol.IGNORED`) and torch."""


def dice_loss(
    logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"], *, ignore_index: int = IGNORED
) -> Float[Tensor, ""]:
    """1 - the soft Dice coefficient, as in VM-UNet's code; 0 for a correct and certain prediction.

    For one class, with a sigmoid, the coefficient is ``(2 sum p t + 1) / (sum p + sum t + 1)`` for each image. For
    several classes, with a softmax, it is ``(2 sum p t + s) / (sum p^2 + sum t^2 + s)`` for each class over the batch,
    with s = 1e-5. Both are finite if a class is absent. Computed and returned in at least float32.

    Args:
        logits: (B, classes, *spatial).
        labels: (B, *spatial), 0 or 1 for one class, otherwise class indices.
        ignore_index: label of pixels that do not count. Images of one class without other pixels do not count either;
            the loss of a batch without other pixels is 0.

    Raises:
        Unsupported: for labels of another shape, and labels that are no class.
    """
    return _dice(*_checked(logits, labels, ignore_index))


def _dice(
    logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"], counted: Bool[Tensor, "b *spatial"]
) -> Float[Tensor, ""]:
    if logits.shape[1] == 1:
        p, t = logits[:, 0].sigmoid().where(counted, 0).flatten(1), labels.flatten(1).to(logits.dtype)
        each = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        return _mean(each, counted.flatten(1).any(1))
    p = logits.softmax(1).where(counted[:, None], 0).transpose(0, 1).flatten(1)
    t = (F.one_hot(labels, logits.shape[1]) * counted[..., None]).flatten(0, -2).mT.to(logits.dtype)
    return (1 - (2 * (p * t).sum(1) + 1e-5) / (p.square().sum(1) + t.sum(1) + 1e-5)).mean()


def segmentation_loss(
    logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"], *, ignore_index: int = IGNORED
) -> Float[Tensor, ""]:
    """Cross entropy (binary for one class) plus :func:`dice_loss`, with equal weights; same arguments and errors."""
    logits, labels, counted = _checked(logits, labels, ignore_index)
    if logits.shape[1] == 1:
        nats = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    else:
        nats = F.cross_entropy(logits, labels, reduction="none")
    return _mean(nats, counted) + _dice(logits, labels, counted)


def _checked(
    logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"], ignore_index: int
) -> tuple[Float[Tensor, "b k *spatial"], Int[Tensor, "b *spatial"], Bool[Tensor, "b *spatial"]]:
    """The logits in at least float32 and the labels as indices, both 0 at ignored pixels, and which pixels count."""
    if labels.shape != (logits.shape[0], *logits.shape[2:]) or labels.is_floating_point():
        raise Unsupported(
            f"labels of {labels.dtype} and shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}",
            supported="integers of the logits' shape without the axis of classes",
        )
    labels, classes = labels.long(), max(2, logits.shape[1])
    counted = labels != ignore_index
    labels = labels.where(counted, 0)
    if not torch.compiler.is_compiling():  # a look at the values
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            label = int(wrong[0])
            raise Unsupported(
                f"the label {label} for logits of shape {tuple(logits.shape)}",
                supported=f"labels from 0 to {classes - 1}, and {ignore_index} for pixels that do not count",
                nearest=f"ignore_index={label}",
            )
    return wide(logits).where(counted[:, None], 0), labels, counted


def _mean(values: Float[Tensor, "*n"], counted: Bool[Tensor, "*n"]) -> Float[Tensor, ""]:
    """The mean of the values that count; 0 without any."""
    return values.where(counted, 0).sum() / counted.sum().clamp(min=1)
