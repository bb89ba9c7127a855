"""The base of all segmentation networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract import Unsupported, at_least
from regard.measurement.units import counted
from regard.models.vision.backbone import check_network
from regard.models.vision.released import load_encoder, load_released

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
        classifier: name of the attribute that is the head.
        encoder_parts: prefixes of the names of the encoder's weights.
        config: the config.
        num_classes: number of classes of the head.
    """

    Config: ClassVar[type[SegmenterConfig]]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    scales: ClassVar[Mapping[str, str | int]] = {}
    classifier: ClassVar[str] = "head"
    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder.",)

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.num_classes = config.num_classes

    @classmethod
    def multiples(cls, config: Any) -> tuple[int, ...]:
        """Return the numbers that must divide the sides of images, one for each axis."""
        raise NotImplementedError

    @classmethod
    def fitted(cls, options: Mapping[str, Any], size: Sequence[int], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `options` of a published size, fitted to images of this size and to the options that are `given`."""
        return dict(options)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Rename weights of the official repository to the names here; names used here are kept."""
        return dict(state)

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Load released weights, like :meth:`regard.models.vision.Backbone.load_released`."""
        load_released(self, checkpoint)

    @classmethod
    def translate_encoder(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Rename weights for :meth:`load_encoder` to the names here; other weights than the encoder's may be among
        them."""
        return cls.translate(state, config)

    def load_encoder(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the encoder's weights alone: those of a network of this class, whose decoder and classes may be others,
        or those of the backbone that the encoder is (:class:`SegFormer`: MiT; :class:`VMUNet`: VMamba, version v0).

        Args:
            checkpoint: as for :meth:`regard.models.vision.Backbone.load_released`, under the names here, those of the
                official repository, or the backbone's.

        Raises:
            Unsupported: if names or shapes of the encoder do not fit; the network is then left unchanged.
        """
        load_encoder(self, checkpoint)

    def make_head(self, channels: int) -> nn.Module:
        """Create an untrained 1 x 1 convolution from features to the logits of `num_classes`."""
        convolution: Any = nn.Conv2d if len(self.multiples(self.config)) == 2 else nn.Conv3d
        head: nn.Module = convolution(channels, self.num_classes, 1)
        return head

    def get_classifier(self) -> nn.Module:
        """Return the head: a 1 x 1 convolution, or a list of them, one for each of the decoder's stages."""
        head: nn.Module = getattr(self, self.classifier)
        return head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by an untrained one for other classes.

        Raises:
            Unsupported: for less than one class.
        """
        at_least("num_classes", num_classes, 1)
        self.num_classes = num_classes
        some, old = next(self.parameters()), self.get_classifier()

        def fresh(each: Any) -> nn.Module:
            return self.make_head(each.in_channels)

        head = nn.ModuleList(map(fresh, old)) if isinstance(old, nn.ModuleList) else fresh(old)
        setattr(self, self.classifier, head.to(device=some.device, dtype=some.dtype))

    def check_images(self, images: Float[Tensor, "b c *spatial"]) -> None:
        """Raise Unsupported for images of an unsupported shape."""
        config, shape = self.config, tuple(images.shape)
        axes = len(self.multiples(config))
        if len(shape) != axes + 2 or not images.is_floating_point():
            sides = "height, width" if axes == 2 else "depth, height, width"
            raise Unsupported(f"images of {images.dtype} and shape {shape}", supported=f"floats (B, channels, {sides})")
        if shape[1] != config.channels:
            raise Unsupported(
                f"images of {counted(shape[1], 'channel')}", supported=f"{config.channels}", nearest="channels="
            )
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
