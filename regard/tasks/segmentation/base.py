"""What the tasks that give every pixel or voxel its class share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from regard.contract import Pattern, Unsupported
from regard.tasks.protocol import IGNORED, Batch, Task
from regard.tasks.segmentation.scores import overlap_by_image, predicted_classes

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

METRICS = {"dice": "mean Dice", "iou": "mean IoU"}


class MaskTask(Task):
    """Items with a class for each of their points, scored by the overlap of prediction and truth.

    Attributes:
        reader: has the names, values and colours of the classes, and which of them is background.
        measure: ``dice`` or ``iou``, which is the score.
    """

    pattern = Pattern.NONCAUSAL_SELF
    objective = "segmentation"
    num_classes: int
    reader: Any
    measure: str

    def score(self, logits: Float[Tensor, "b n pk"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        each = self.of_images(*predicted_classes(logits, batch))
        return each, each.new_ones(len(each))

    def figures(self, output: Float[Tensor, "b n pk"], batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        predicted, targets = predicted_classes(output, batch)
        found = {told: self.of_images(predicted, targets, name) for name, told in METRICS.items()}
        return {told: (each, each.new_ones(len(each))) for told, each in found.items()}

    def of_images(
        self, predicted: Int[Tensor, "b pixels"], targets: Int[Tensor, "b pixels"], measure: str | None = None
    ) -> Float[Tensor, " b"]:
        """The score of each item by ``dice`` or ``iou``; by the task's own measure when None."""
        return overlap_by_image(predicted, targets, self.num_classes, self.reader.background, measure or self.measure)

    def picture(self, batch: Batch) -> UInt8[np.ndarray, "h w c"]:
        """A picture of the one item of a batch."""
        raise NotImplementedError

    def mask(self, classes: Int[Tensor, "1 n p"], batch: Batch) -> Int[np.ndarray, "h w"]:
        """Classes of the tokens of a batch of one item, as they lie in its :meth:`picture`."""
        raise NotImplementedError


def check_mask_value(name: str, value: Any) -> None:
    """Raise Unsupported for a value of masks that there cannot be; ``auto`` and None are none."""
    if not (value in ("auto", None) or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255)):
        raise Unsupported(f"{name}={value!r}", supported="a value of masks, 0 to 255, None or auto", nearest="auto")


def largest_classes(
    numbers: Int[np.ndarray, " k"], background: int | None, count: int
) -> tuple[list[int], Int[np.ndarray, " k"], str]:
    """The `count` classes of most points beside the background, of which the others become part.

    Args:
        numbers: of points of each class.
        background: the class that is not scored; None for none.

    Returns:
        The classes that are kept, the new number of each class, and a note without the background's name.

    Raises:
        Unsupported: for a number that there is not, and without a background.
    """
    number = len(numbers)
    if background is None or not 1 <= count < number:
        raise Unsupported(
            f"classes={count} of {number} classes" + ("" if background is not None else " and no background"),
            supported=f"1 to {number - 1}, beside a background",
        )
    others = [int(i) for i in np.argsort(-numbers, kind="stable") if i != background][:count]
    kept = sorted([background, *others])
    table = np.full(number, kept.index(background))
    table[kept] = np.arange(len(kept))
    return kept, table, f"the {count} largest of {number - 1} classes; the others count as"


def letters(labels: Int[np.ndarray, "h w"], background: int | None) -> list[str]:
    """A mask as a few lines of letters."""
    stride = max(1, -(-max(labels.shape) // 28))
    signs = "abcdefghijklmnopqrstuvwxyz"

    def sign(value: int) -> str:
        return "?" if value == IGNORED else "." if value == background else signs[value % len(signs)]

    return ["  " + "".join(2 * sign(int(value)) for value in row) for row in labels[::stride, ::stride]]
