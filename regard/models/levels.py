"""Deep supervision: the coarser decoder stages of a segmentation network have losses of their own.

As in nnU-Net (Isensee et al., arXiv 1904.08128) and U-Mamba, each stage of the decoder except the coarsest has a loss
against the targets nearest to its positions, with half the weight of the next finer stage; the weights add up to 1. In
inference the coarser stages have no outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.protocol import Batch


class Level(NamedTuple):
    """The output of a coarser stage, with its targets.

    Attributes:
        logits: class logits at its M positions.
        targets: for each position, the index of its target among all targets of an item.
        weight: weight of its loss.
    """

    logits: Float[Tensor, "b m k"]
    targets: Int[Tensor, " m"]
    weight: float


def level_weights(count: int) -> tuple[float, ...]:
    """Return the loss weights of `count` stages, finest first, each half of the one before; 0 for the coarsest."""
    weights = [0.5**i for i in range(count)]
    if count > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def level_loss(
    levels: Sequence[Level], batch: Batch, finest: Tensor, loss: Callable[[Tensor, Batch], Tensor]
) -> Float[Tensor, ""]:
    """Return the weighted mean of the finest stage's loss, given as `finest`, and the losses of the coarser stages.

    Args:
        loss: a function of an output and a batch.
    """
    total = (1 - sum(level.weight for level in levels)) * finest
    for level in levels:
        targets = batch.targets.flatten(1)[:, level.targets, None]
        total = total + level.weight * loss(level.logits, replace(batch, targets=targets))
    return total
