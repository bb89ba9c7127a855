"""A segmentation network as a model for tasks, which give images or volumes as patches and want a class for each point.

::

    config = SegmentationModelConfig("unet_nano", num_classes=4, grid=(16, 16), patch=4, channels=3)
    logits = SegmentationModel(config)(patches, context=Context(grid=(16, 16))).output      # (B, 256, 16 * 4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Context, Result, Unsupported, closest
from regard.core.patches import cut, joined
from regard.models.image_model import ImageModel, ImageModelConfig, patches_of
from regard.models.levels import Level, level_weights
from regard.models.vision.segmentation import list_segmenters, read_segmenter

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.protocol import Task


@dataclass(frozen=True)
class SegmentationModelConfig(ImageModelConfig):
    """The configuration of a :class:`SegmentationModel`: that of an image model with a segmenter as its `backbone`.

    Attributes:
        backbone: a name of :func:`regard.models.vision.segmentation.list_segmenters`.
        num_classes: number of classes of a point.
        grid: number of patches along each of the network's two or three axes.
        options: options of the network.
    """

    def read(self) -> tuple[type[Any], Any]:
        """Return the network's class and config; raises Unsupported for unknown options or unsupported sizes."""
        size = self.image_size
        given: dict[str, Any] = {"channels": self.channels, "num_classes": self.num_classes, "image_size": size}
        for name in given:
            if name in self.options:
                raise Unsupported(f"{name} of {self.backbone}, which the task sets", supported=f"no {name}")
        network, _ = read_segmenter(self.backbone)
        if "image_size" not in network.Config.__dataclass_fields__:
            del given["image_size"]
        network, config = read_segmenter(self.backbone, **given, **self.options)
        try:
            network.check_size(config, size)
        except Unsupported as error:
            told = f"{self.backbone} on {error.asked}"
            raise Unsupported(told, supported=error.supported, nearest=error.nearest) from None
        return network, config

    @classmethod
    def for_task(cls, task: Task, backbone: str, options: Mapping[str, Any]) -> SegmentationModelConfig:
        """Return the config for a segmentation task; options that depend on the image size are fitted to the task.

        Raises:
            Unsupported: for another task, or one whose images have another number of axes than the network.
        """
        grid = task.grid or ()
        if task.objective != "segmentation" or task.features is None or len(grid) not in (2, 3):
            raise Unsupported(
                f"{backbone} on the task {task.name}",
                supported="tasks that segment images of two axes, such as segmentation, or of three, such as segmentation_3d",
                nearest="--task segmentation",
            )
        axes = _axes(backbone, options)
        if axes != len(grid):
            others = [name for name in list_segmenters() if _axes(name, {}) == len(grid)]
            raise Unsupported(
                f"{backbone} on images of {len(grid)} axes", supported=f"{axes} axes", nearest=closest(backbone, others)
            )
        patch, channels = patches_of(task, backbone)
        network, _ = read_segmenter(backbone)
        published = network.sizes[backbone]
        fitted = network.fitted(published, tuple(side * patch for side in grid), options)
        chosen = {name: value for name, value in fitted.items() if value != published.get(name)}
        return cls(backbone, task.num_classes or 0, tuple(grid), patch, channels, chosen | dict(options))


def _axes(backbone: str, options: Mapping[str, Any]) -> int:
    """Return the number of axes of the images that a network takes."""
    network, config = read_segmenter(backbone, **{name: options[name] for name in ("axes",) if name in options})
    return len(network.multiples(config))


class SegmentationModel(ImageModel):
    """Joins patches into images, applies the network, and cuts its logits into patches again."""

    config: SegmentationModelConfig

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Compute the class logits of all points.

        Args:
            inputs: patches, row by row.
            context: the grid, which may differ from the config's if the network takes any size.

        Returns:
            output (B, N, points of a patch * num_classes): the points of a patch row by row, classes last. In training
            with deep supervision, ``extras["levels"]`` has the outputs of the coarser stages, for
            :func:`regard.models.levels.level_loss`.

        Raises:
            Unsupported: for padding, and inputs of another shape.
        """
        grid, patch = self.grid_of(context) or self.config.grid, self.config.patch
        images = self.images(inputs, grid)
        if not (self.training and getattr(self.backbone.config, "deep_supervision", False)):
            return Result(cut(self.backbone(images), patch))
        finest, *coarser = self.backbone.forward_levels(images)
        _, *weights = level_weights(1 + len(coarser))
        levels = [
            Level(logits.flatten(2).mT, _targets_of(logits.shape[2:], grid, patch, logits.device), weight)
            for logits, weight in zip(coarser, weights, strict=True)
            if weight
        ]
        return Result(cut(finest, patch), extras={"levels": levels})


def _targets_of(sides: Sequence[int], grid: Sequence[int], patch: int, device: torch.device) -> Int[Tensor, " places"]:
    """Return the indices of an item's targets (ordered patch by patch) nearest to the positions of a coarser map."""
    count = torch.arange(torch.Size(grid).numel() * patch ** len(grid), device=device)
    numbers = joined(count.view(1, torch.Size(grid).numel(), -1), grid, patch)[0, 0]
    for axis, (side, whole) in enumerate(zip(sides, numbers.shape, strict=True)):
        middle = (2 * torch.arange(side, device=device) + 1) * whole // (2 * side)
        numbers = numbers.index_select(axis, middle)
    return numbers.flatten()
