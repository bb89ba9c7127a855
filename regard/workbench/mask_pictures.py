"""Images, masks and predictions beside each other in a report, as small pictures inside of it."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.contract import Context
from regard.models.blocks import evaluation_mode
from regard.tasks import Task
from regard.tasks.sampling import spread
from regard.tasks.segmentation import SegmentationTask
from regard.workbench.segment import logits_of, mask_image

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL import Image

SHOWN = 4
"""Held-out images that are shown."""
SIDE = 160
"""Pixels of a picture's longer side, to which larger ones are reduced."""


def shown(task: Task) -> dict[str, Any] | None:
    """The images that a report shows, their masks, and names and colours of the classes in them; None for other tasks."""
    if not isinstance(task, SegmentationTask) or importlib.util.find_spec("PIL") is None:
        return None
    from PIL import Image

    inputs, labels = _chosen(task)
    pixels, reader = task.reader.pixels(inputs), task.reader
    images = [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pixels]
    there = [i for i in range(len(reader.classes)) if (labels == i).any()]
    return {
        "images": [_address(image, Image.Resampling.BICUBIC) for image in images],
        "truths": [_address(mask_image(each, reader), Image.Resampling.NEAREST) for each in labels],
        "classes": [[reader.classes[i], "#{:02x}{:02x}{:02x}".format(*reader.colours[i])] for i in there],
    }


def predicted(model: nn.Module, task: Task) -> dict[str, Any] | None:
    """The masks that a model gives for the images of :func:`shown`, and their scores; None for other tasks."""
    if not isinstance(task, SegmentationTask) or importlib.util.find_spec("PIL") is None:
        return None
    from PIL import Image

    inputs, labels = _chosen(task)
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.inference_mode():
        output = model(inputs.to(device), context=Context(grid=task.reader.grid)).output.float().cpu()
    found = logits_of(output, task.reader).argmax(1)
    scores = task.of_images(found.flatten(1), torch.from_numpy(labels).flatten(1))
    masks = [_address(mask_image(each.numpy(), task.reader), Image.Resampling.NEAREST) for each in found]
    return {"masks": masks, "scores": scores.tolist()}


def table(pictures: Mapping[str, Any] | None, found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """What a report shows of a task: rows of an image, its mask, and picture and score of each model.

    Args:
        pictures: of :func:`shown`, if there are some.
        found: names and rows of models, whose ``masks`` are those of :func:`predicted`; the first columns first.
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


def _chosen(task: SegmentationTask) -> tuple[Float[Tensor, "b n f"], Int[np.ndarray, "b h w"]]:
    """Some held-out items, evenly spread over those after the first quarter, which may have chosen a learning rate."""
    batches = list(task.evaluation_batches(64))
    inputs, targets = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
    first = len(inputs) // 4
    chosen = torch.from_numpy(first + spread(len(inputs) - first, SHOWN))
    return inputs[chosen], task.whole(targets[chosen])


def _address(picture: Image.Image, how: Any) -> str:
    """A picture as an address that holds it."""
    share = SIDE / max(picture.size)
    if share < 1:
        picture = picture.resize((max(1, round(share * picture.width)), max(1, round(share * picture.height))), how)
    written = io.BytesIO()
    picture.save(written, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
