"""Images, masks and predictions side by side in a report, as small embedded pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context
from regard.models.evaluating import evaluation_mode
from regard.tasks import Batch, Task
from regard.tasks.sampling import spread
from regard.tasks.segmentation import MaskTask
from regard.workbench.reports.png import address
from regard.workbench.trained.segment import mask_image

SHOWN = 4
"""Number of held-out images shown."""
SIDE = 160
"""Length in pixels of a picture's longer side; larger pictures are downscaled."""


def shown(task: Task) -> dict[str, Any] | None:
    """The images (slices, for volumes) that a report shows, with masks, and the names and colours of the classes in
    them; None for other tasks."""
    if not isinstance(task, MaskTask):
        return None
    chosen, reader = _chosen(task), task.reader
    there = [i for i in range(len(reader.classes)) if any((batch.targets == i).any() for batch in chosen)]
    truths = [mask_image(task.mask(batch.targets, batch), reader) for batch in chosen]
    return {
        "images": [address(task.picture(batch), largest=SIDE) for batch in chosen],
        "truths": [address(*truth, largest=SIDE) for truth in truths],
        "classes": [[reader.classes[i], "#{:02x}{:02x}{:02x}".format(*reader.colours[i])] for i in there],
    }


def predicted(model: nn.Module, task: Task) -> dict[str, Any] | None:
    """A model's masks for the images in :func:`shown`, and their scores; None for other tasks."""
    if not isinstance(task, MaskTask):
        return None
    device, masks, scores = next(model.parameters()).device, list[str](), list[float]()

    def run(batch: Batch) -> Tensor:
        return model(batch.inputs.to(device), context=Context(grid=batch.grid)).output.float().cpu()

    with evaluation_mode(model), torch.inference_mode():
        for batch in _chosen(task):
            output = task.answer(run, batch)
            found = output.unflatten(2, (batch.targets.shape[2], -1)).argmax(-1)
            masks.append(address(*mask_image(task.mask(found, batch), task.reader), largest=SIDE))
            scores += task.of_images(found.flatten(1), batch.targets.flatten(1))[0].tolist()
    return {"masks": masks, "scores": scores}


def table(pictures: Mapping[str, Any] | None, found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """The table for a task in a report: each row has an image, its mask, and the picture and score of each model.

    Args:
        pictures: the result of :func:`shown`, if any.
        found: names and rows of models, in column order, with the result of :func:`predicted` under ``masks``.
    """
    drawn = [(name, row) for name, row in found if row.get("masks")]
    if not pictures or not drawn:
        return None
    rows = [
        {
            "image": image,
            "truth": truth,
            "models": [(name, row["masks"]["masks"][i], row["masks"]["scores"][i]) for name, row in drawn],
        }
        for i, (image, truth) in enumerate(zip(pictures["images"], pictures["truths"], strict=True))
    ]
    return {"rows": rows, "models": drawn, "classes": pictures["classes"]}


def _chosen(task: MaskTask) -> list[Batch]:
    """Some held-out items, evenly spaced after the first quarter, which may have chosen a learning rate."""
    count = sum(batch.size for batch in task.evaluation_batches(1))
    chosen = set((count // 4 + spread(count - count // 4, SHOWN)).tolist())
    return [batch for i, batch in enumerate(task.evaluation_batches(1)) if i in chosen]
