"""Loss and scores for classes of pixels: the training loss, and the Dice coefficient and IoU of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Unsupported
from regard.core.precision import wide
from regard.tasks.protocol import IGNORED, Batch, Objective, Task, register_objective

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SMOOTH = 1e-5
"""Added to numerator and denominator of the soft Dice coefficient."""


def dice_and_cross_entropy(
    output: Float[Tensor, "b n pk"], batch: Batch
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Mean cross entropy of an image's pixels plus 1 - its mean soft Dice coefficient, and the image's weight 1.

    With p from a softmax and t one-hot, the soft coefficient of a class is ``(2 sum p t + s) / (sum p^2 + sum t^2 +
    s)``. The mean is over the classes in the image; predictions of other classes are penalised by the cross entropy.
    Ignored pixels do not count; an image with only ignored pixels has the weight 0.
    """
    logits, targets = _pixels(wide(output), batch.targets)
    counted = targets != IGNORED
    classes = logits.shape[-1]
    nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
    number = counted.sum(1)
    truth = F.one_hot(torch.where(counted, targets, 0), classes) * counted[..., None]
    p = torch.where(counted[..., None], logits.softmax(-1), 0)
    here = truth.sum(1)
    soft = (2 * (p * truth).sum(1) + SMOOTH) / (p.square().sum(1) + here + SMOOTH)
    present = here > 0
    dice = torch.where(present, 1 - soft, 0).sum(1) / present.sum(1).clamp(min=1)
    return nats / number.clamp(min=1) + dice, (number > 0).to(nats.dtype)


def _targets(task: Task) -> tuple[int, ...]:
    return task.length, task.num_targets or 0


SEGMENTATION = Objective(
    "segmentation", _targets, dice_and_cross_entropy, ("num_classes", "the number of classes of a pixel, 2 or more")
)
register_objective(SEGMENTATION)


def sizes(
    predicted: Int[Tensor, "b pixels"], targets: Int[Tensor, "b pixels"], classes: int
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Pixels of each class in both, in the prediction and in the truth, in float64; ignored pixels do not count."""
    counted = targets != IGNORED
    both = counted & (predicted == targets)

    def count(labels: Tensor, where: Tensor) -> Tensor:
        found = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
        return found.scatter_add_(1, torch.where(where, labels, 0), where.double())

    return count(targets, both), count(predicted, counted), count(targets, counted)


def overlap_by_image(
    predicted: Int[Tensor, "b pixels"],
    targets: Int[Tensor, "b pixels"],
    classes: int,
    background: int | None,
    measure: str = "dice",
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The Dice coefficient or intersection over union, averaged over classes, for each image, and its weight 1, in
    float64.

    The mean is over the classes in an image's truth or prediction, without the background. An image without any such
    class in either scores 1: there was nothing to find, and nothing was found. An image with only ignored pixels has
    the score and the weight 0.

    Args:
        predicted, targets: class indices; targets may be `IGNORED`.
        classes: number of classes.
        background: class that is not scored; None for none.
        measure: ``dice`` or ``iou``.
    """
    both, found, there = sizes(predicted, targets, classes)
    above, below = (2 * both, found + there) if measure == "dice" else (both, found + there - both)
    occurs = found + there > 0
    if background is not None:
        occurs[:, background] = False
    each = torch.where(occurs, above / below.clamp(min=1), 0)
    count, weights = occurs.sum(1), there.any(1).double()
    return torch.where(count > 0, each.sum(1) / count.clamp(min=1), weights), weights


def predicted_classes(output: Float[Tensor, "b n pk"], batch: Batch) -> tuple[Int[Tensor, "b np"], Int[Tensor, "b np"]]:
    """The likeliest class of each pixel, and its target."""
    logits, targets = _pixels(output, batch.targets)
    return logits.argmax(-1), targets


def _pixels(output: Tensor, targets: Tensor) -> tuple[Float[Tensor, "b np k"], Int[Tensor, "b np"]]:
    if output.ndim != 3 or output.shape[:2] != targets.shape[:2] or output.shape[2] % targets.shape[2]:
        raise Unsupported(
            f"outputs of shape {tuple(output.shape)} for targets of shape {tuple(targets.shape)}",
            supported=f"outputs of shape {(*targets.shape[:2], f'{targets.shape[2]} * classes')}",
        )
    return output.unflatten(2, (targets.shape[2], -1)).flatten(1, 2), targets.flatten(1)
