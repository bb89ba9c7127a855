"""A network that segments as a model of tasks, which give images as patches and want a class for each pixel of a patch.

::

    config = SegmentationModelConfig("unet_nano", num_classes=4, grid=(16, 16), patch=4, channels=3)
    logits = SegmentationModel(config)(patches, context=Context(grid=(16, 16))).output      # (B, 256, 16 * 4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regard.contract import Context, Result, Unsupported
from regard.models.image_model import ImageModel, ImageModelConfig, patches_of
from regard.models.vision.segmentation import read_segmenter

if TYPE_CHECKING:
    from jaxtyping import Float

    from regard.tasks.protocol import Task


@dataclass(frozen=True)
class SegmentationModelConfig(ImageModelConfig):
    """The configuration of a :class:`SegmentationModel`: that of an image model with a segmenter as its `backbone`.

    Attributes:
        backbone: a name of :func:`regard.models.vision.segmentation.list_segmenters`.
        num_classes: of a pixel.
        options: of the network.
    """

    def read(self) -> tuple[type[Any], Any]:
        """Class and config of the network; raises Unsupported for unknown options and sizes that it cannot take."""
        size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        given: dict[str, Any] = {"channels": self.channels, "num_classes": self.num_classes, "image_size": size}
        for name in given:
            if name in self.options:
                raise Unsupported(f"{name} of {self.backbone}, which the task says", supported=f"no {name}")
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
        """Of a task that wants a class for each pixel; what depends on the size of images is chosen for the task's.

        Raises:
            Unsupported: for another task.
        """
        if task.objective != "segmentation" or task.features is None or task.grid is None or len(task.grid) != 2:
            raise Unsupported(
                f"{backbone} on the task {task.name}",
                supported="tasks that segment images of two axes, such as segmentation",
                nearest="--task segmentation",
            )
        patch, channels = patches_of(task, backbone)
        size = (task.grid[0] * patch, task.grid[1] * patch)
        network, _ = read_segmenter(backbone)
        published = network.sizes[backbone]
        fitted = network.fitted(published, size)
        chosen = {name: value for name, value in fitted.items() if value != published.get(name)}
        return cls(
            backbone, task.num_classes or 0, (task.grid[0], task.grid[1]), patch, channels, chosen | dict(options)
        )


class SegmentationModel(ImageModel):
    """Patches put together to images, the network, and its logits cut like the patches."""

    config: SegmentationModelConfig

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Logits of the classes of all pixels.

        Args:
            inputs: patches, row by row.
            context: its grid, whose rows and columns may be others than the config's where the network takes any size.

        Returns:
            output (B, N, patch * patch * num_classes): the pixels of a patch row by row, the classes of a pixel together.

        Raises:
            Unsupported: for padding, and inputs of another shape.
        """
        grid, patch = self.grid_of(context) or self.config.grid, self.config.patch
        logits = self.backbone(self.images(inputs, grid))
        parts = logits.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))  # (B, K, rows, p, columns, p)
        return Result(parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
