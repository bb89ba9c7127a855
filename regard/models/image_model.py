"""An image backbone as a model for tasks, which give images as patches.

::

    config = ImageModelConfig("van_b0", num_classes=10, grid=(8, 8), patch=4, channels=3)
    logits = ImageModel(config)(patches, context=Context(grid=(8, 8))).output      # (B, 10)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract import Context, Result, Unsupported, at_least, check_types
from regard.core.patches import joined
from regard.layers.checks import given_context
from regard.models.vision import Backbone, read_backbone

if TYPE_CHECKING:
    from jaxtyping import Float

    from regard.tasks.protocol import Task


@dataclass(frozen=True)
class ImageModelConfig:
    """The configuration of an :class:`ImageModel`.

    Attributes:
        backbone: a name of :func:`regard.models.vision.list_backbones`.
        num_classes: width of the output.
        grid: rows and columns of patches; three numbers for volumes, whose patches are cubes.
        patch: side of a patch in pixels; its features are its pixels row by row, channels last.
        channels: number of channels of the images.
        options: options of the backbone.
        feed_forward: unused; the backbone sets its own widths.
    """

    backbone: str
    num_classes: int
    grid: tuple[int, ...]
    patch: int = 1
    channels: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    feed_forward: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_types(self)
        at_least("num_classes", self.num_classes, 1)
        at_least("patch", self.patch, 1)
        at_least("channels", self.channels, 1)
        object.__setattr__(self, "grid", tuple(self.grid))
        self.read()

    @property
    def image_size(self) -> tuple[int, ...]:
        """Sides of the images in pixels."""
        return tuple(side * self.patch for side in self.grid)

    def read(self) -> tuple[type[Backbone], Any]:
        """Return the backbone's class and config; raises Unsupported for unknown options or unsupported sizes."""
        given: dict[str, Any] = {"image_size": self.image_size, "channels": self.channels}
        for name in (*given, "num_classes"):
            if name in self.options:
                raise Unsupported(f"{name} of {self.backbone}, which the task sets", supported=f"no {name}")
        with _named(self.backbone):
            return read_backbone(self.backbone, **given, num_classes=self.num_classes, **self.options)

    @classmethod
    def for_task(cls, task: Task, backbone: str, options: Mapping[str, Any]) -> ImageModelConfig:
        """Return the configuration for an image classification task.

        Raises:
            Unsupported: for another task.
        """
        if task.objective != "classification" or task.features is None or len(task.grid or ()) != 2:
            raise Unsupported(
                f"{backbone} on the task {task.name}",
                supported="tasks that classify images, such as images",
                nearest="--task images",
            )
        patch, channels = patches_of(task, backbone)
        return cls(backbone, task.num_classes or 0, task.grid, patch, channels, dict(options))  # type: ignore[arg-type]


def patches_of(task: Task, name: str) -> tuple[int, int]:
    """Infer the side of a task's patches in pixels and the number of channels; `name` is the model named in errors."""
    assert task.features is not None and task.grid is not None
    axes = len(task.grid)
    own = getattr(task, "patch", None)
    if isinstance(own, int) and task.features % own**axes == 0:
        return own, task.features // own**axes
    for channels in (1, 3):
        patch = round((task.features / channels) ** (1 / axes))
        if channels * patch**axes == task.features:
            return patch, channels
    raise Unsupported(
        f"{name} on patches of {task.features} numbers",
        supported=f"{'square patches' if axes == 2 else 'cubes'} of 1 or 3 channels",
    )


@contextmanager
def _named(backbone: str) -> Iterator[None]:
    """Name the backbone in any Unsupported error raised inside the block."""
    try:
        yield
    except Unsupported as error:
        if backbone in error.asked:
            raise
        raise Unsupported(f"{backbone} with {error.asked}", supported=error.supported, nearest=error.nearest) from None


class ImageModel(nn.Module):
    """Joins patches into images and applies a backbone; see :class:`ImageModelConfig`.

    Raises:
        Unsupported: for images of a size that the backbone cannot take.
    """

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__()
        self.config = config
        backbone, inner = config.read()
        with _named(config.backbone):
            self.backbone: Any = backbone(inner)  # or a module around it that leaves out tokens

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Compute the logits of the classes.

        Args:
            inputs: patches, row by row.
            context: the grid, which may differ from the config's if the backbone takes any size.

        Returns:
            output (B, num_classes), and the losses of the backbone's layers.

        Raises:
            Unsupported: for padding, and inputs of another shape.
        """
        return self.backbone.forward_with_losses(self.images(inputs, self.grid_of(context)))

    @property
    def unsaved(self) -> tuple[str, str]:
        """What was changed in the model that its config does not tell, in words, and what to do; empty if nothing was."""
        backbone = getattr(self.backbone, "model", self.backbone)  # inside a module that leaves out tokens
        if isinstance(backbone, Backbone) and backbone.altered:
            return f"{backbone.altered} of its backbone", ""
        classes = backbone.num_classes
        if classes == self.config.num_classes:
            return "", ""
        wanted = f"model.config = dataclasses.replace(model.config, num_classes={classes})" if classes else ""
        return f"a backbone of {classes} classes and a config of {self.config.num_classes}", wanted

    @property
    def tokens_record(self) -> dict[str, Any] | None:
        """How the backbone leaves out tokens, if it has learned to (:mod:`regard.compression.tokens.trained`); else
        None."""
        return getattr(self.backbone, "tokens_record", None)

    def grid_of(self, context: Context | None) -> tuple[int, ...] | None:
        """Return the grid of a call's context, if given; raises Unsupported for padding and roles."""
        context = given_context(context)
        if context.mask is not None or context.roles is not None:
            name = self.config.backbone
            raise Unsupported(f"a mask or roles in {name}", supported="whole images", nearest="Encoder")
        return context.grid

    def images(self, inputs: Float[Tensor, "b n f"], grid: tuple[int, ...] | None = None) -> Float[Tensor, "b c h w"]:
        """Join patches into images, on the config's grid or the given one; raises Unsupported for another shape."""
        grid, patch, channels = grid or self.config.grid, self.config.patch, self.config.channels
        tokens, width = math.prod(grid), patch ** len(grid) * channels
        if inputs.ndim != 3 or inputs.shape[1:] != (tokens, width):
            raise Unsupported(
                f"inputs of shape {tuple(inputs.shape)}",
                supported=f"(B, {tokens}, {width}), the patches of a grid of {' x '.join(map(str, grid))}",
            )
        return joined(inputs, grid, patch)
