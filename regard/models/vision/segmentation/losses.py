"""Segmentation losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def dice_loss(logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"]) -> Float[Tensor, ""]:
    """1 - the soft Dice coefficient, as in VM-UNet's code; 0 for a correct and certain prediction.

    For one class, with a sigmoid, the coefficient is ``(2 sum p t + 1) / (sum p + sum t + 1)`` for each image. For
    several classes, with a softmax, it is ``(2 sum p t + s) / (sum p^2 + sum t^2 + s)`` for each class over the batch,
    with s = 1e-5. Both are finite if a class is absent.

    Args:
        logits: (B, classes, *spatial).
        labels: (B, *spatial), 0 or 1 for one class, otherwise class indices.
    """
    classes = logits.shape[1]
    if labels.shape != (logits.shape[0], *logits.shape[2:]) or labels.is_floating_point():
        raise Unsupported(
            f"labels of {labels.dtype} and shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}",
            supported="integers of the logits' shape without the axis of classes",
        )
    if classes == 1:
        p, t = logits.sigmoid().flatten(1), labels.flatten(1).to(logits.dtype)
        return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()
    p = logits.softmax(1).transpose(0, 1).flatten(1)
    t = F.one_hot(labels.long(), classes).flatten(0, -2).mT.to(logits.dtype)
    return (1 - (2 * (p * t).sum(1) + 1e-5) / (p.square().sum(1) + t.sum(1) + 1e-5)).mean()


def segmentation_loss(logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"]) -> Float[Tensor, ""]:
    """Cross entropy (binary for one class) plus :func:`dice_loss`, with equal weights; same arguments."""
    dice = dice_loss(logits, labels)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype)) + dice
    return F.cross_entropy(logits, labels.long()) + dice
