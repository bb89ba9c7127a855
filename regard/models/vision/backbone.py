"""What all backbones share: images in, maps of features and logits out, under the names that timm's users know.

A backbone is one file beside this one, with a config, its published sizes, and two methods: :meth:`Backbone.encode`, from
images to features, and :meth:`Backbone.pool`, from features to one vector an image. Maps are (B, C, H, W) in the
channels-last memory format, so that the same memory is tokens (B, H * W, C), row by row, for the mechanisms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Result, Unsupported, an_instance, at_least, check_types
from regard.layers.checks import check_repeatable
from regard.layers.linear import make_linear
from regard.models.vision.blocks import Blocks
from regard.models.vision.released import load_released

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What every backbone is told.

    Attributes:
        image_size: height and width, or one number for both, of the images; backbones with tables of positions take no
            others later.
        channels: of the images.
        num_classes: width of the output; 0 for the pooled features themselves.
        dropout: of the features before the head.
        drop_path: stochastic depth of the last block; the others' rises evenly to it from 0 (`regard.layers.drop_path`).
    """

    image_size: int | tuple[int, int] = 224
    channels: int = 3
    num_classes: int = 1000
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        check_network(self)
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise Unsupported(f"image_size={self.image_size!r}", supported="a side in pixels, or (height, width)")
        object.__setattr__(self, "image_size", size)
        at_least("channels", self.channels, 1)
        at_least("num_classes", self.num_classes, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image_size  # type: ignore[return-value]


def check_network(config: Any) -> None:
    """Raise Unsupported for an option of another type than its config says, or a dropout that is no probability."""
    check_types(config)
    for name, value in vars(config).items():
        if name.endswith("dropout") and not 0 <= value <= 1:
            raise Unsupported(f"{name}={value}", supported="probabilities from 0 to 1")


def check_stages(config: Any, *names: str, least: int = 1) -> None:
    """Raise Unsupported for options that have not a number for each of the config's `widths`, `least` or more."""
    at_least("the stages in widths", len(config.widths), 1)
    for name in names:
        numbers = getattr(config, name)
        if len(numbers) != len(config.widths):
            raise Unsupported(f"{name}={numbers} of {len(config.widths)} stages", supported="a number for each stage")
        at_least(f"the least of {name}", min(numbers), least)


@dataclass(frozen=True)
class Level:
    """A map of features that a backbone can give: its channels, and the pixels from one place to the next."""

    channels: int
    stride: int


class Backbone(nn.Module):
    """The base of image models: :meth:`forward` gives logits, :meth:`forward_intermediates` maps of features.

    A subclass sets `levels`, and at the end of its constructor calls :meth:`make_head`; it defines :meth:`encode` and
    :meth:`pool`, and :meth:`translate` where released weights have other names.

    Attributes:
        Config: class of its config.
        sizes: options of each published size, by name.
        scales: the options that are widths, and what each is a multiple of: a number, or the name of an option with the
            number of heads.
        channels_last: whether images are laid out so before the first layer, for its convolutions.
        config: its own.
        levels: the maps that it can give, from the finest to the last.
        num_features: width of a pooled vector.
        head: from it to the classes; the identity where there are none.
    """

    Config: ClassVar[type[BackboneConfig]]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    scales: ClassVar[Mapping[str, str | int]] = {}
    channels_last: ClassVar[bool] = True
    levels: Sequence[Level]

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config: Any = config

    def make_head(self, features: int) -> None:
        """The head over `features` numbers; called last, so that seeds give the same trunk for any number of classes."""
        self.num_features = features
        self.reset_classifier(self.config.num_classes)

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b ..."], dict[int, Float[Tensor, "b c h w"]]]:
        """The features that :meth:`pool` reads, and the maps of the levels in `keep`.

        Features are (B, C, H, W) or (B, N, C). Where `keep` is not empty a subclass need not go on after the last of them
        but may not leave out what comes before.
        """
        raise NotImplementedError

    def pool(self, features: Float[Tensor, "b ..."]) -> Float[Tensor, "b c"]:
        """One vector an image, after the last norm."""
        raise NotImplementedError

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Weights of the official repository, or of timm, under the names here; those here stay as they are."""
        return dict(state)

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Load weights of the official repository, of timm, or of this class, all of them and nothing else.

        Args:
            checkpoint: a state dict, or a checkpoint with one among its entries. What `DistributedDataParallel`,
                `torch.compile` or Lightning put before all names is left out.

        Raises:
            Unsupported: where names or shapes do not fit, or there are several state dicts; nothing is changed then.
        """
        load_released(self, checkpoint)

    def forward_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """Features before the pool."""
        return self.encode(self.check_images(images))[0]

    def forward_head(self, features: Float[Tensor, "b ..."], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Logits of features; the pooled vectors with `pre_logits`."""
        pooled = F.dropout(self.pool(features), self.config.dropout, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits (B, num_classes); pooled features (B, num_features) where there are no classes."""
        return self.forward_head(self.forward_features(images))

    def forward_with_losses(self, images: Float[Tensor, "b c h w"]) -> Result:
        """Logits as the output, with the auxiliary losses of layers that have some, each (sum, count), for training to add."""
        return Result(self(images))

    def forward_intermediates(
        self,
        images: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of features on the way, as timm's method of this name gives them.

        Args:
            images: (B, C, H, W).
            indices: of `levels`, negative ones from the end; a number means the last so many; all when None.
            norm, stop_early: accepted for timm's sake; maps come as the next level reads them, and all levels are run.
            output_fmt: ``NCHW`` only.
            intermediates_only: the maps alone, without the features that the pool reads.

        Raises:
            Unsupported: for levels that the backbone does not have, or another format.
        """
        if output_fmt != "NCHW":
            raise Unsupported(f"output_fmt={output_fmt!r}", supported="NCHW")
        chosen = self.choose_levels(indices)
        features, maps = self.encode(self.check_images(images), chosen)
        found = [maps[level] for level in chosen]
        return found if intermediates_only else (features, found)

    def choose_levels(self, indices: int | Sequence[int] | None) -> list[int]:
        """Levels by their number, in order."""
        count = len(self.levels)
        if indices is None:
            return list(range(count))
        wanted = range(count - indices, count) if isinstance(indices, int) else indices
        chosen = [index + count if index < 0 else index for index in wanted]
        if not all(0 <= index < count for index in chosen):
            raise Unsupported(f"maps {indices} of {an_instance(self)}", supported=f"0 to {count - 1}")
        return sorted(chosen)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """As timm's: channels (`num_chs`), stride (`reduction`) and a name (`module`) for each level."""
        return [
            {"num_chs": level.channels, "reduction": level.stride, "module": f"levels.{index}"}
            for index, level in enumerate(self.levels)
        ]

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, untrained, for other classes; none for ``num_classes=0``.

        Raises:
            Unsupported: for another pool than the backbone's own.
        """
        if global_pool is not None:
            raise Unsupported(f"global_pool={global_pool!r}", supported="the backbone's own pool (None)")
        at_least("num_classes", num_classes, 0)
        self.num_classes = num_classes
        some = next(self.parameters(), torch.empty(0))
        head = make_linear(self.num_features, num_classes, bias=True) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(device=some.device, dtype=some.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether only the inputs of blocks are kept for gradients, for which they are computed again (:class:`Blocks`).

        Raises:
            Unsupported: for layers that change themselves from call to call.
        """
        if enable:
            check_repeatable(self)
        for module in self.modules():
            if isinstance(module, Blocks):
                module.recomputed = enable

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` asks for first; raises Unsupported, where it would fail at a type that it does not know."""
        raise self._no_script()

    def _no_script(self) -> Unsupported:
        return Unsupported(
            f"TorchScript of {an_instance(self)}",
            supported="torch.compile, torch.export and ONNX",
            nearest="regard.integrations.export.export",
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters beside norms and biases that a weight decay should spare."""
        return set()

    def check_images(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Images as the first layer reads them fastest; raises Unsupported for another shape than it takes, and in
        `torch.jit.trace`."""
        if torch.jit.is_tracing():  # where sizes are tensors
            raise self._no_script()
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            what = (
                f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else repr(type(images))
            )
            raise Unsupported(f"images as {what}", supported="floats of shape (B, channels, height, width)")
        if images.shape[1] != self.config.channels:
            raise Unsupported(
                f"images of {images.shape[1]} channels",
                supported=f"{self.config.channels}",
                nearest=f"channels={images.shape[1]}",
            )
        self.check_size(images.shape[2], images.shape[3])
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def check_size(self, height: int, width: int) -> None:
        """Raise Unsupported for a height and width that it cannot take; any by default."""


class Pyramid(Backbone):
    """Stages of maps, each of which reads the map before it; the levels are their outputs.

    Attributes:
        stages: (B, C, H, W) -> (B, C', H', W').
    """

    stages: nn.ModuleList

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b c h w"], dict[int, Float[Tensor, "b c h w"]]]:
        x, maps = images, {}
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in keep:
                maps[number] = x
        return x, maps


def tokens_of(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """A map as tokens, row by row; the same memory where it is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(tokens: Float[Tensor, "b n c"], grid: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Tokens, row by row, as a map, channels-last; raises Unsupported for fewer tokens, as where some were merged."""
    if tokens.shape[1] != math.prod(grid):
        raise Unsupported(f"a map of {tokens.shape[1]} tokens", supported=" x ".join(map(str, grid)) + " tokens")
    return tokens.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
