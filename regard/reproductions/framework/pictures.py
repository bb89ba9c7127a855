"""Shared parts of reproductions on images: pictures on a canvas, and backbones trained on them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from regard import Context, backends
from regard.contract import Pattern
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.reproductions.framework.training import cached_task, trained_score
from regard.tasks import Batch, Task, counter_generator
from regard.tasks.protocol import in_batches

CANVAS = 32
"""Side in pixels: a power of two, so that patches and regions of many sizes fit."""
PICTURES = {"data": "fashion-mnist", "steps": 300, "batch_size": 32, "learning_rate": 3e-3, "items": 2000}
"""Fashion-MNIST: training for a sixth of an epoch, and the number of test images that are scored."""
SMALL_PICTURES = {"data": "digits", "steps": 2, "batch_size": 2, "items": 8}
"""Options that shrink :data:`PICTURES` to seconds, with data that comes with scikit-learn."""


class GridTask(Task):
    """Classification of grey images on a canvas; a subclass draws images (B, side, side) and classes.

    Args:
        items: number of held-out images.
        side: side of the canvas in pixels.
        patch: side in pixels of the square patches that are the tokens.
    """

    pattern, objective = Pattern.NONCAUSAL_SELF, "classification"

    def __init__(self, items: int, side: int = CANVAS, patch: int = 1) -> None:
        self.items, self.side, self.patch = items, side, patch
        self.grid = (side // patch, side // patch)
        self.length, self.features = self.grid[0] * self.grid[1], patch**2

    def draw(self, draws: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw images (count, side, side), float, and classes (count,)."""
        raise NotImplementedError

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self.batch(*self.draw(counter_generator(seed, step), batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(self.items, batch_size):
            yield self.batch(*self.draw(counter_generator(2**40, int(rows.start)), rows.stop - rows.start))

    def batch(self, images: np.ndarray, classes: np.ndarray) -> Batch:
        """Return images as a batch of patches, row by row."""
        return Batch(
            cut(torch.from_numpy(images.astype(np.float32)), self.patch), torch.from_numpy(classes), grid=self.grid
        )


class Canvas(Task):
    """Images of the task ``images`` on a square black canvas, enlarged by the largest whole factor that fits.

    Args:
        data: one of the task's data sets, of square grey images.
        items: number of held-out images.
        side: side of the canvas in pixels.
        patch: side in pixels of the square patches that are the tokens.
    """

    name, pattern, objective = "pictures", Pattern.NONCAUSAL_SELF, "classification"

    def __init__(self, data: str, items: int, side: int = CANVAS, patch: int = 1) -> None:
        images: Any = cached_task("images", data=data, patch=1, evaluation_items=items)
        self.images, self.side, self.patch = images, side, patch
        self.grid, self.features = (side // patch, side // patch), patch**2
        self.length, self.num_classes, self.chance = self.grid[0] * self.grid[1], images.num_classes, images.chance
        reader = images.reader
        self.black = -reader.mean[0] / reader.deviation[0]

    def describe(self) -> str:
        return f"on a canvas of {self.side} x {self.side} pixels in patches of {self.patch}: {self.images.describe()}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self.place(self.images.training_batch(step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.images.evaluation_batches(batch_size):
            yield self.place(batch)

    def place(self, batch: Batch) -> Batch:
        """Place the images in the middle of the canvas."""
        images = batch.inputs.unflatten(1, self.images.grid).squeeze(-1)
        times = self.side // images.shape[1]
        images = images.repeat_interleave(times, 1).repeat_interleave(times, 2)
        left = (self.side - images.shape[1]) // 2
        right = self.side - images.shape[1] - left
        images = F.pad(images, (left, right, left, right), value=self.black)
        return Batch(cut(images, self.patch), batch.targets, grid=self.grid)


@functools.cache
def canvas(data: str, items: int, patch: int = 1) -> Canvas:
    """Return a :class:`Canvas`, made once per process."""
    return Canvas(data, items, patch=patch)


def cut(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, side, side) into patches (B, n, p p), row by row."""
    rows = images.shape[1] // patch
    return images.unflatten(2, (rows, patch)).unflatten(1, (rows, patch)).transpose(2, 3).flatten(3).flatten(1, 2)


def backbone(task: Task, setting: Mapping[str, Any]) -> ImageModel:
    """Return the setting's ``backbone`` with its ``options``, for the task's images."""
    return ImageModel(ImageModelConfig.for_task(task, setting["backbone"], setting.get("options", {})))


def start_large(model: nn.Module) -> None:
    """Initialise for a run of a few hundred steps: linear layers except the head as torch does, positions with
    deviation 1.

    So few steps do not lead away from the published deviation of 0.02 for both: the patches would stay a bag without
    order.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("positions"):
            nn.init.normal_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("head"):
            module.reset_parameters()


def transformer_score(task: Task, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Return the :func:`trained_score` and multiply-adds of a :func:`backbone` that :func:`start_large` initialised."""
    model = backbone(task, setting)
    start_large(model)
    return {"multiply-adds": multiply_adds(model, task), **trained_score(model, task, setting, seed)}


@torch.no_grad()
def multiply_adds(model: nn.Module, task: Task) -> float:
    """Return the multiply-adds of the matrix products and convolutions for one image, including attention."""
    batch = next(iter(task.evaluation_batches(1)))
    # the math backend, since the counter does not count torch's CPU kernel for attention
    with backends.only("torch"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(batch.inputs, context=Context(grid=batch.grid))
    model.train()
    return counter.get_total_flops() / 2
