"""The base of all segmentation networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract import Unsupported, at_least
from regard.models.vision.backbone import check_network
from regard.models.vision.released import load_released

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """The options that every segmentation network has.

    Attributes:
        channels: channels of the images.
        num_classes: number of classes, >= 1; with one class, the logit is of foreground against background.
    """

    channels: int = 1
    num_classes: int = 2

    def __post_init__(self) -> None:
        check_network(self)
        at_least("channels", self.channels, 1)
        at_least("num_classes", self.num_classes, 1)


class Segmenter(nn.Module):
    """The base class of segmentation networks: :meth:`forward` returns logits of the size of the images.

    Attributes:
        Config: the config class.
        sizes: options of each named size.
        scales: as for :class:`regard.models.vision.Backbone`.
        config: the config.
    """

    Config: ClassVar[type[SegmenterConfig]]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    scales: ClassVar[Mapping[str, str | int]] = {}

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config: Any = config

    @classmethod
    def multiples(cls, config: Any) -> tuple[int, ...]:
        """Return the numbers that must divide the sides of images, one for each axis."""
        raise NotImplementedError

    @classmethod
    def fitted(cls, options: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
        """Return `options` with defaults fitted to images of this size."""
        return dict(options)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Rename weights of the official repository to the names here; names used here are kept."""
        return dict(state)

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Load released weights, like :meth:`regard.models.vision.Backbone.load_released`."""
        load_released(self, checkpoint)

    def check_images(self, images: Float[Tensor, "b c *spatial"]) -> None:
        """Raise Unsupported for images of an unsupported shape."""
        config, shape = self.config, tuple(images.shape)
        axes = len(self.multiples(config))
        if len(shape) != axes + 2 or not images.is_floating_point():
            sides = "height, width" if axes == 2 else "depth, height, width"
            raise Unsupported(f"images of {images.dtype} and shape {shape}", supported=f"floats (B, channels, {sides})")
        if shape[1] != config.channels:
            raise Unsupported(f"images of {shape[1]} channels", supported=f"{config.channels}", nearest="channels=")
        self.check_size(config, shape[2:])

    @classmethod
    def check_size(cls, config: Any, size: Sequence[int]) -> None:
        """Raise Unsupported for images of a size that a network of this config cannot take."""
        multiples = cls.multiples(config)
        if len(size) != len(multiples):
            raise Unsupported(f"images of {len(size)} axes", supported=f"{len(multiples)} axes")
        if any(side % of for side, of in zip(size, multiples, strict=True)):
            near = [max(of, round(side / of) * of) for side, of in zip(size, multiples, strict=True)]
            raise Unsupported(
                f"images of {' x '.join(map(str, size))} pixels",
                supported=f"sides that are multiples of {' and '.join(map(str, dict.fromkeys(multiples)))}",
                nearest=" x ".join(map(str, near)),
            )
