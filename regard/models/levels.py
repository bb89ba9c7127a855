"""Deep supervision: a network that segments is also told what its coarser stages should have found.

As in nnU-Net (Isensee et al., arXiv 1904.08128) and U-Mamba: each stage of the decoder but the coarsest has a loss against
the targets nearest to its places, of half the weight of the next finer one; the weights add up to 1. In inference the coarser
stages have no outputs.
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
    """What a coarser stage gives.

    Attributes:
        logits: of the classes of its places.
        targets: for each place, which of an item's targets it has, counted over all tokens.
        weight: of its loss.
    """

    logits: Float[Tensor, "b m k"]
    targets: Int[Tensor, " m"]
    weight: float


def level_weights(count: int) -> tuple[float, ...]:
    """Weights of the losses of so many stages, from the finest: halved from one to the next, 0 for the coarsest of
    several."""
    weights = [0.5**i for i in range(count)]
    if count > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def level_loss(
    levels: Sequence[Level], batch: Batch, finest: Tensor, loss: Callable[[Tensor, Batch], Tensor]
) -> Float[Tensor, ""]:
    """The weighted mean of the loss of the finest stage, which is given, and of the coarser ones.

    Args:
        loss: of an output and a batch.
    """
    total = (1 - sum(level.weight for level in levels)) * finest
    for level in levels:
        targets = batch.targets.flatten(1)[:, level.targets, None]
        total = total + level.weight * loss(level.logits, replace(batch, targets=targets))
    return total
