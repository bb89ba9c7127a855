"""The auxiliary losses of a model's layers, each (sum, count) by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from regard.contract import Loss

LOSS_WEIGHT = 0.01
"""Weight of an auxiliary loss that a config does not name, as is usual for the balance of routers (arXiv 2101.03961)."""

LOSS_WEIGHTS = {"position_contrast": 0.1, "position_transfer": 0.1, "commitment": 1e-4, "reconstruction": 1.0}
LOSS_WEIGHTS |= {"generator": 0.02}
"""Other weights of losses that a config does not name: of sequential position encoding (arXiv 2506.13277), of routing (public
code), of compressive memory (arXiv 1911.05507), whose loss reaches the compression alone, and of the generator beside a
discriminator, which weighs 50 times as much (arXiv 2003.10555)."""


def add_losses(losses: dict[str, Loss], more: Mapping[str, Loss]) -> None:
    """Add auxiliary losses, each (sum, count), to those of the same name."""
    for name, (total, count) in more.items():
        before = losses.get(name)
        losses[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def auxiliary_loss(losses: Mapping[str, Loss], weights: Mapping[str, float]) -> Tensor | float:
    """The layers' auxiliary losses (each a mean, sum / count), weighted by name."""
    known = {**LOSS_WEIGHTS, **weights}
    return sum(known.get(name, LOSS_WEIGHT) * total / count.clamp(min=1) for name, (total, count) in losses.items())
