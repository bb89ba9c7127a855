"""The likelihood of events under intensities that a model predicts; exact, because they are integrated in closed form.

Between two events, the intensity of each mark moves exponentially from a start value to an end value,

    intensity_c(t) = end_c + (start_c - end_c) exp(-decay_c t),

so the expected number of events up to time t (the probability of none is the exponential of its negative) is

    end_c t + (start_c - end_c) (1 - exp(-decay_c t)) / decay_c.

This family contains Hawkes processes with exponential kernels, whose base is the end value, and Poisson processes.
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
"""Smallest decay rate, since its inverse is used."""
RAREST = 1e-6
"""Smallest intensity, since its logarithm is used."""


def event_nats(output: Float[Tensor, "b n c3"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Negative log-likelihood of each item's events, in nats, and their number, in at least float32.

    Args:
        output: three numbers for each mark, whose softplus gives the start, the end and the decay rate of its
            intensity.
        batch: a batch with targets (B, N, 2): the time to the next event and its mark, nan where there is none.

    Raises:
        Unsupported: for outputs without three numbers per mark, and for marks that the outputs do not cover.
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
    """The output that stands for constant intensities."""
    wanted = (rates - RAREST).clamp(min=1e-12)
    raw = wanted + (-torch.expm1(-wanted)).log()  # the inverse of softplus
    return torch.cat([raw, raw, torch.zeros_like(raw)])


register_objective(
    Objective("events", lambda task: (task.length, 2), event_nats, ("num_targets", "three numbers for each mark"))
)
