"""The auxiliary losses of a model's layers: name -> (sum, count)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from regard.contract import Loss

LOSS_WEIGHT = 0.01
"""Default weight of an auxiliary loss, as is usual for load balancing of routers (arXiv 2101.03961)."""

LOSS_WEIGHTS = {"position_contrast": 0.1, "position_transfer": 0.1, "commitment": 1e-4, "reconstruction": 1.0}
LOSS_WEIGHTS |= {"generator": 0.02}
"""Default weights of particular losses: sequential position encoding (arXiv 2506.13277), routing (public code),
compressive memory (arXiv 1911.05507), whose loss only reaches the compression, and the generator of a discriminator,
which weighs 50 times as much (arXiv 2003.10555)."""


def add_losses(losses: dict[str, Loss], more: Mapping[str, Loss]) -> None:
    """Add auxiliary losses, each (sum, count), to `losses` by name, in place."""
    for name, (total, count) in more.items():
        before = losses.get(name)
        losses[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def auxiliary_loss(losses: Mapping[str, Loss], weights: Mapping[str, float]) -> Tensor | float:
    """Return the weighted sum of the layers' auxiliary losses, each a mean (sum / count)."""
    known = {**LOSS_WEIGHTS, **weights}
    return sum(known.get(name, LOSS_WEIGHT) * total / count.clamp(min=1) for name, (total, count) in losses.items())
