"""AdamW (arXiv 1711.05101) with weight decay only where it belongs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from regard.measurement.outliers import is_norm

BETAS = (0.9, 0.95)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = False, decay_norms: bool = False
) -> list[dict[str, Any]]:
    """Split the trainable parameters into two groups: with and without weight decay.

    The group without weight decay has parameters of fewer than two axes (biases, per-head gains, and the weights of
    norms unless `decay_norms`; the OPT models of arXiv 2306.12929 decay norms), embeddings unless `decay_embeddings`,
    parameters marked ``parameter._no_weight_decay = True`` (such as time constants of state-space mechanisms, for which
    zero is not neutral), and parameters that a module names in a method ``no_weight_decay()``, like the image backbones
    here and in timm (position tables, class tokens). A matrix tied to an embedding counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    norms = [module for name, module in model.named_modules() if decay_norms and is_norm(name, module)]
    spared = {
        id(parameter)
        for module in model.modules()
        if callable(named := getattr(module, "no_weight_decay", None))
        for names in [named()]
        for name, parameter in module.named_parameters()
        if name in names
    }
    gammas = {id(module.weight) for module in norms}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        exempt = (
            (parameter.ndim < 2 and id(parameter) not in gammas)
            or getattr(parameter, "_no_weight_decay", False)
            or id(parameter) in spared
            or (id(parameter) in embeddings and not decay_embeddings)
        )
        (kept if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    decay_embeddings: bool = False,
    decay_norms: bool = False,
) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, with betas 0.9 and 0.95 as is usual for sequence models."""
    groups = parameter_groups(model, weight_decay, decay_embeddings=decay_embeddings, decay_norms=decay_norms)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


SCHEDULES = ("cosine", "constant")
FINAL_SHARE = 0.1
"""Final rate of the cosine schedule, as a share of the peak."""


def scheduled_rate(step: int, steps: int, *, peak: float, warmup: float, schedule: str) -> float:
    """Return the learning rate of a step (from 0): linear warmup over `warmup` (a share of `steps`), then the schedule.

    ``cosine`` falls from the peak to a tenth of it along half a period (arXiv 1608.03983, equation 5 without restarts);
    ``constant`` stays at the peak.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    progress = (step - rising) / max(1, steps - 1 - rising)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
