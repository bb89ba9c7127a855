"""Images that models complete: held-out images whose upper half is given, continued pixel by pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regard.models import LanguageModel
from regard.tasks import Task
from regard.tasks.pixels import PixelsTask
from regard.workbench.reports.png import address
from regard.workbench.reports.predicted_images import LARGEST

SHOWN = 6
"""Number of held-out images that are completed."""
LONGEST = 4096
"""Most tokens in an image; drawing more takes too long."""


@torch.no_grad()
def completed(model: nn.Module, task: Task) -> dict[str, Any] | None:
    """Held-out images, and a model's completions of their upper halves, for JSON; None for other tasks, and for images
    that take too long.

    Returns:
        ``truths`` and ``drawings``, PNGs as data URIs.
    """
    if not isinstance(task, PixelsTask) or not isinstance(model, LanguageModel) or task.length > LONGEST:
        return None
    device = next(model.parameters()).device
    batch = next(iter(task.evaluation_batches(SHOWN)))
    given = task.length // task.sides[0] * (task.sides[0] // 2)
    generator = torch.Generator(device).manual_seed(0)
    known = batch.inputs[:, : given + 1].to(device)  # the sequence begins with a token that is not a pixel
    new = model.generate(known, task.length - given, temperature=1.0, generator=generator).cpu()
    whole = torch.cat([batch.targets[:, :given], new], dim=1)
    truths, drawings = (task.pictures(tokens.numpy()) for tokens in (batch.targets, whole))
    return {
        "truths": [address(one, largest=LARGEST) for one in truths],
        "drawings": [address(one, largest=LARGEST) for one in drawings],
    }
