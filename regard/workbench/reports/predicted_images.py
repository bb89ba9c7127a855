"""A model's predictions for single held-out images: samples, its most confident mistakes, and a confusion matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regard.models.evaluating import evaluation_mode
from regard.tasks import Task
from regard.tasks.images import ImageReader
from regard.training.step import batch_context, run_model
from regard.workbench.reports.png import address

MOST = 512
"""Most held-out images that are used."""
SAMPLES, MISTAKES = 10, 10
MOST_CLASSES = 20
"""Most classes for which a confusion matrix is kept."""
LARGEST = 64
"""Length in pixels of a picture's longer side; larger pictures are downscaled."""


@torch.no_grad()
def predicted(model: nn.Module, task: Task, at_once: int, first: int = 0) -> dict[str, Any] | None:
    """Samples, mistakes and confusion matrix of a model, for JSON; None for tasks other than image classification.

    Args:
        at_once: images per batch.
        first: index of the first held-out item that is used.

    Returns:
        ``classes``, their names; ``images``, the number used; ``samples`` and ``mistakes``, lists of ``picture`` (a PNG
        as a data URI), ``truth``, ``prediction`` (class indices) and ``confidence`` (the prediction's probability); and
        ``confusion``, counts by true and predicted class, None for more than 20 classes.
    """
    reader = getattr(task, "reader", None)
    if task.objective != "classification" or not isinstance(reader, ImageReader):
        return None
    device = next(model.parameters()).device
    inputs, truths, chances = [], [], []
    seen = 0
    with evaluation_mode(model):
        for batch in task.evaluation_batches(at_once):
            begin, end = max(first - seen, 0), min(first + MOST - seen, batch.size)
            seen += batch.size
            if begin >= end:
                continue
            chosen = batch.items(begin, end).to(device)
            chances.append(run_model(model, chosen, batch_context(chosen)).output.float().softmax(-1).cpu())
            inputs.append(chosen.inputs.cpu())
            truths.append(chosen.targets.cpu())
    if not chances:
        return None
    patches, truth = torch.cat(inputs), torch.cat(truths)
    confidence, prediction = torch.cat(chances).max(-1)

    def told(i: int) -> dict[str, Any]:
        return {
            "picture": address(reader.pixels(patches[i : i + 1])[0], largest=LARGEST),
            "truth": int(truth[i]),
            "prediction": int(prediction[i]),
            "confidence": float(confidence[i]),
        }

    wrong = (prediction != truth).nonzero().flatten()
    surest = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
    count = len(reader.classes)
    confusion = None
    if count <= MOST_CLASSES:
        confusion = torch.bincount(truth * count + prediction, minlength=count * count).view(count, count).tolist()
    return {
        "classes": list(reader.classes),
        "images": len(truth),
        "samples": [told(i) for i in range(min(SAMPLES, len(truth)))],
        "mistakes": [told(int(i)) for i in surest],
        "confusion": confusion,
    }
