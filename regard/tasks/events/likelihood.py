"""The likelihood of events under intensities that a model gives, exact because they are integrated in closed form.

From one event to the next the intensity of each mark goes exponentially from a value to another,

    intensity_c(t) = end_c + (start_c - end_c) exp(-decay_c t),

so that the expected number of events up to t, whose exponential is the chance of none, is

    end_c t + (start_c - end_c) (1 - exp(-decay_c t)) / decay_c.

A Hawkes process with exponential kernels is among them, with the base as the end, and so is a Poisson process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Unsupported
from regard.core.precision import wide
from regard.tasks.protocol import Batch, Objective, register_objective

if TYPE_CHECKING:
    from jaxtyping import Float

SLOWEST = 1e-4
"""The least rate of decay, whose inverse is taken."""
RAREST = 1e-6
"""The least intensity, whose logarithm is taken."""


def event_nats(output: Float[Tensor, "b n c3"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Negative log-likelihood of each item's events in nats, and their number, in at least float32.

    Args:
        output: for each mark what makes the start, the end and the decay of its intensity by a softplus.
        batch: with targets (B, N, 2), the time to the next event and its mark, nan where there is none.

    Raises:
        Unsupported: for outputs that are not three numbers a mark, and marks that they have not.
    """
    times, marks = batch.targets.unbind(-1)
    counted = ~times.isnan()
    count = output.shape[-1] // 3
    if output.shape[:-1] != times.shape or output.shape[-1] != 3 * count:
        raise Unsupported(
            f"outputs of shape {tuple(output.shape)} for events of shape {tuple(times.shape)}",
            supported="three numbers for each mark at each event",
        )
    rates = F.softplus(wide(output))
    start, end, decay = rates.unflatten(-1, (3, count)).unbind(-2)
    start, end, decay = start + RAREST, end + RAREST, decay + SLOWEST
    waited = torch.where(counted, times, 0).to(rates.dtype)[..., None]
    fading = torch.exp(-decay * waited)
    intensities = start * fading + end * (1 - fading)
    expected = end * waited - (start - end) * torch.expm1(-decay * waited) / decay
    which = torch.where(counted, marks, 0).long()[..., None]
    nats = expected.sum(-1) - intensities.gather(-1, which)[..., 0].log()
    return torch.where(counted, nats, 0).sum(1), counted.sum(1).to(nats.dtype)


def constant_output(rates: Float[Tensor, " c"]) -> Float[Tensor, " c3"]:
    """The output that stands for these intensities at all times."""
    wanted = (rates - RAREST).clamp(min=1e-12)
    raw = wanted + (-torch.expm1(-wanted)).log()  # the inverse of softplus
    return torch.cat([raw, raw, torch.zeros_like(raw)])


register_objective(
    Objective("events", lambda task: (task.length, 2), event_nats, ("num_targets", "three numbers for each mark"))
)
