"""What all networks that give every pixel or voxel its class share."""

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
    """What every network here is told.

    Attributes:
        channels: of the images.
        num_classes: >= 1; one class is a logit of foreground against background.
    """

    channels: int = 1
    num_classes: int = 2

    def __post_init__(self) -> None:
        check_network(self)
        at_least("channels", self.channels, 1)
        at_least("num_classes", self.num_classes, 1)


class Segmenter(nn.Module):
    """The base: :meth:`forward` gives logits of the size of the images.

    Attributes:
        Config: class of its config.
        sizes: options of each named size.
        scales: as of :class:`regard.models.vision.Backbone`.
        config: its own.
    """

    Config: ClassVar[type[SegmenterConfig]]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    scales: ClassVar[Mapping[str, str | int]] = {}

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config: Any = config

    @classmethod
    def multiples(cls, config: Any) -> tuple[int, ...]:
        """Numbers whose multiples the sides of images must be, one for each axis."""
        raise NotImplementedError

    @classmethod
    def fitted(cls, options: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
        """Options of a config, as they are chosen for images of this size where nobody says them."""
        return dict(options)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Weights of the official repository under the names here; those here stay as they are."""
        return dict(state)

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """As :meth:`regard.models.vision.Backbone.load_released`."""
        load_released(self, checkpoint)

    def check_images(self, images: Float[Tensor, "b c *spatial"]) -> None:
        """Raise Unsupported for another shape than it takes."""
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
