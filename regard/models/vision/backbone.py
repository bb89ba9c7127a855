"""The base of all backbones: images in, feature maps and logits out, with timm's method names.

A backbone is one module of this package, with a config, its published sizes, and two methods: :meth:`Backbone.encode`,
from images to features, and :meth:`Backbone.pool`, from features to one vector per image. Maps are (B, C, H, W) in the
channels-last memory format, so that the mechanisms can view the same memory as tokens (B, H * W, C), row by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Result, Unsupported, an_instance, at_least, check_types
from regard.core.grids import image_of
from regard.layers.checks import check_repeatable
from regard.layers.linear import make_linear
from regard.measurement.units import counted
from regard.models.vision.blocks import Blocks
from regard.models.vision.released import HEADS, load_released

if TYPE_CHECKING:
    from jaxtyping import Float

PLACE = re.compile(r"(?:stages\.(\d+)\.)?(?:blocks\.(\d+)\.|(norm)\.)?")
"""The beginning of a parameter's name: its stage, and its block in it or the norm after the blocks."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The options that every backbone has.

    Attributes:
        image_size: height and width of the images, or one number for both; some backbones take no other size later.
        channels: channels of the images.
        num_classes: width of the output; 0 for the pooled features themselves.
        dropout: dropout probability of the features before the head.
        drop_path: stochastic depth probability of the last block, to which it rises linearly from 0
            (`regard.layers.drop_path`).
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

    @property
    def sides(self) -> tuple[int, int]:
        """The smallest side of an image in pixels, and the step from each side that is taken to the next."""
        return 1, 1

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of `sides` that are nearest to the given ones."""
        least, step = self.sides
        high, wide = (least + max(0, (side - least + step // 2) // step) * step for side in (height, width))
        return high, wide

    def check_size(self, height: int, width: int) -> None:
        """Raise Unsupported for images of a size that a backbone of this config cannot cut up."""
        least, step = self.sides
        if min(height, width) < least or (height - least) % step or (width - least) % step:
            odd = step == 1 or least % step
            told = f"from {least} in steps of {step}" if odd else f"in multiples of {step} from {least}"
            raise Unsupported(
                f"images of {height} x {width} pixels",
                supported=f"a height and width {told}",
                nearest=self._way_to(*self.nearest_size(height, width)),
            )

    def _way_to(self, height: int, width: int) -> str:
        """What to try for images of a size that `sides` has."""
        try:
            self.check_size(height, width)
        except Unsupported as error:  # it is refused for another reason
            return error.nearest
        return f"{height} x {width} pixels"


def check_network(config: Any) -> None:
    """Raise Unsupported for an option of the wrong type, or a dropout that is not a probability."""
    check_types(config)
    for name, value in vars(config).items():
        if name.endswith("dropout") and not 0 <= value <= 1:
            raise Unsupported(f"{name}={value}", supported="probabilities from 0 to 1")


def check_stages(config: Any, *names: str, least: int = 1) -> None:
    """Raise Unsupported for options that do not have a number >= `least` for each of the config's `widths`."""
    at_least("the stages in widths", len(config.widths), 1)
    for name in names:
        numbers = getattr(config, name)
        if len(numbers) != len(config.widths):
            raise Unsupported(f"{name}={numbers} of {len(config.widths)} stages", supported="a number for each stage")
        at_least(f"the least of {name}", min(numbers), least)


@dataclass(frozen=True)
class Level:
    """A feature map that a backbone can return: its channels and its stride in pixels."""

    channels: int
    stride: int


class Backbone(nn.Module):
    """The base class of image models: :meth:`forward` returns logits, :meth:`forward_intermediates` feature maps.

    A subclass sets `levels` and calls :meth:`make_head` at the end of its constructor; it defines :meth:`encode` and
    :meth:`pool`, and :meth:`translate` if released weights have other names.

    Attributes:
        Config: the config class.
        sizes: options of each published size, by name.
        scales: the options that are widths, and what each is a multiple of: a number, or the name of an option with the
            number of heads.
        made_for_size: what is made for images of `image_size` alone, in words; "" if other sizes are taken.
        channels_last: whether images are converted to the channels-last format before the first layer, for its
            convolutions.
        config: the config.
        levels: the feature maps that the backbone can return, from the finest to the last: the output of each of its
            `stages`, or else of each of its `blocks`.
        num_features, head_hidden_size: width of a pooled vector, under both of timm's names.
        pools: timm's words for the pools that :meth:`reset_classifier` can choose, the one of a new model first:
            ``token`` for class tokens, ``avg`` for the mean of all places.
        global_pool: the word chosen; "" if features are not pooled.
        head: maps pooled vectors to classes; the identity if there are none.
    """

    Config: ClassVar[type[BackboneConfig]]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    scales: ClassVar[Mapping[str, str | int]] = {}
    channels_last: ClassVar[bool] = True
    made_for_size: str = ""
    pools: Sequence[str] = ("avg",)
    global_pool: str
    levels: Sequence[Level]
    _pruned = False

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        config.check_size(*config.size)
        self.config: Any = config

    def make_head(self, features: int) -> None:
        """Create the head; called last, so that a seed gives the same trunk for any number of classes."""
        self.num_features = self.head_hidden_size = features
        self.reset_classifier(self.config.num_classes, self.pools[0])

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b ..."], dict[int, Float[Tensor, "b c h w"]]]:
        """Return the features that :meth:`pool` reads, and the maps of the levels in `keep`.

        Features are (B, C, H, W) or (B, N, C). If `keep` is not empty, a subclass may stop after its last level, but
        may not skip anything before.
        """
        raise NotImplementedError

    def pool(self, features: Float[Tensor, "b ..."]) -> Float[Tensor, "b c"]:
        """Pool features into one vector per image, after the last norm."""
        raise NotImplementedError

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Rename weights of the official repository or of timm to the names here; names used here are kept."""
        return dict(state)

    @classmethod
    def options_told(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return options that translated weights were made with, as far as these show it; named where they do not fit."""
        return {}

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Load weights of the official repository, of timm, or of this class; names must match exactly.

        Position tables for another image size are interpolated. Tables do not say their sides: one with more or fewer
        rows is taken to be that of a square grid, and one with as many rows to be that of this model's grid.

        Args:
            checkpoint: a state dict, or a checkpoint with one among its entries. Prefixes that
                `DistributedDataParallel`, `torch.compile` or Lightning add to all names are removed.

        Raises:
            Unsupported: if names or shapes do not fit, or there are several state dicts; the model is then left
                unchanged.
        """
        load_released(self, checkpoint)

    def forward_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """Return the features before the pool."""
        return self.encode(self.check_images(images))[0]

    def forward_head(self, features: Float[Tensor, "b ..."], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Return the logits of features, or the pooled vectors with `pre_logits` (the features if `global_pool` is "")."""
        pooled = F.dropout(self.pool(features) if self.global_pool else features, self.config.dropout, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return logits (B, num_classes), or pooled features (B, num_features) if there are no classes.

        Without a pool (`global_pool` is ""), features are returned as :meth:`forward_features` does.
        """
        return self.forward_head(self.forward_features(images))

    def forward_with_losses(self, images: Float[Tensor, "b c h w"]) -> Result:
        """Like :meth:`forward`, but as a Result with the layers' auxiliary losses, each (sum, count), for training."""
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
        """Return intermediate feature maps, like timm's method of this name.

        Args:
            images: (B, C, H, W).
            indices: indices into `levels`, negative ones from the end; an int n means the last n; None means all.
            norm: False only: maps are returned as the next level reads them.
            stop_early: accepted for compatibility with timm; all levels are run, see :meth:`prune_intermediate_layers`.
            output_fmt: ``NCHW`` only.
            intermediates_only: return only the maps, without the features that the pool reads.

        Raises:
            Unsupported: for levels that the backbone does not have, another format, or normed maps.
        """
        if norm:
            raise Unsupported(
                "maps with norm=True", supported="maps as the next level reads them", nearest="norm=False"
            )
        if output_fmt != "NCHW":
            raise Unsupported(f"output_fmt={output_fmt!r}", supported="NCHW")
        chosen = self.choose_levels(indices)
        features, maps = self.encode(self.check_images(images), chosen)
        found = [maps[level] for level in chosen]
        return found if intermediates_only else (features, found)

    def get_intermediate_layers(
        self, images: Float[Tensor, "b c h w"], n: int | Sequence[int] = 1, reshape: bool = False, *, norm: bool = False
    ) -> list[Float[Tensor, "b ..."]]:
        """Return the maps of :meth:`forward_intermediates` as tokens, like timm's method of this name.

        Args:
            images: (B, C, H, W).
            n, norm: `indices` and `norm` of :meth:`forward_intermediates`; an int n means the last n levels.
            reshape: return maps (B, C, H', W') instead of tokens (B, H' * W', C), which lie row by row.

        Returns:
            A list of tokens or maps, without class tokens.

        Raises:
            Unsupported: as :meth:`forward_intermediates` does.
        """
        maps = self.forward_intermediates(images, n, norm, intermediates_only=True)
        return maps if reshape else [each.flatten(2).mT for each in maps]

    def choose_levels(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the chosen levels' indices, sorted."""
        count = len(self.levels)
        if indices is None:
            return list(range(count))
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or not all(-count <= index < count for index in wanted):
            raise Unsupported(
                f"maps {indices} of {an_instance(self)}",
                supported=f"indices from 0 to {count - 1} or from the end, or the number of the last maps, 1 to {count}",
            )
        return sorted({index % count for index in wanted})

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Like timm's: channels (`num_chs`), stride (`reduction`) and name (`module`) of each level."""
        return [
            {"num_chs": level.channels, "reduction": level.stride, "module": f"{self._trunk}.{index}"}
            for index, level in enumerate(self.levels)
        ]

    @property
    def _trunk(self) -> str:
        """The name of the list whose modules end in the levels."""
        return "stages" if hasattr(self, "stages") else "blocks"

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of some levels do not need, as timm does for ``features_only``.

        Stages or blocks after the last of these levels go, and with them their levels.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: whether the norm after the last of all layers goes too.
            prune_head: whether the head goes too.

        Returns:
            The indices of the levels, sorted, from 0.
        """
        chosen = self.choose_levels(indices)
        self._pruned = True
        trunk: Any = self.get_submodule(self._trunk)
        del trunk[chosen[-1] + 1 :]
        self.levels = self.levels[: chosen[-1] + 1]
        if prune_norm and isinstance(getattr(self, "norm", None), nn.Module):
            self.add_module("norm", nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return chosen

    @property
    def altered(self) -> str:
        """In what the model differs from a new one of its config and number of classes, in words; "" if only in weights."""
        if self.global_pool != self.pools[0]:
            return f"global_pool={self.global_pool!r}"
        if self._pruned:
            return "pruned intermediate layers"
        if any("reduction" in vars(module) for module in self.modules()):
            return "fewer tokens, as by reduce_tokens"
        return ""

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by an untrained one for other classes; no head for ``num_classes=0``.

        Args:
            num_classes: the number of classes.
            global_pool: one of `pools`; "", without classes, for none; None for as it is.

        Raises:
            Unsupported: for another pool, or classes without a pool.
        """
        at_least("num_classes", num_classes, 0)
        word = self.global_pool if global_pool is None else global_pool
        if word not in ("", *self.pools):
            raise Unsupported(
                f"global_pool={word!r} of this {type(self).__name__}" + " without a class token" * (word == "token"),
                supported=f"{' or '.join(map(repr, self.pools))}, or '' for none",
            )
        if num_classes and not word:
            raise Unsupported(
                f"num_classes={num_classes} with global_pool=''",
                supported=f"num_classes=0, or classes of pooled features (global_pool={self.pools[0]!r})",
            )
        self.global_pool = word
        self.num_classes = num_classes
        some = next(self.parameters(), torch.empty(0))
        head = make_linear(self.num_features, num_classes, bias=True) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(device=some.device, dtype=some.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether blocks keep only their inputs for the backward pass, which recomputes the rest (:class:`Blocks`).

        Raises:
            Unsupported: for layers whose calls cannot be repeated.
        """
        if enable:
            check_repeatable(self)
        for module in self.modules():
            if isinstance(module, Blocks):
                module.recomputed = enable

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise Unsupported from `torch.jit.script`, which would otherwise fail at a type that it does not know."""
        raise self._no_script()

    def _no_script(self) -> Unsupported:
        return Unsupported(
            f"TorchScript of {an_instance(self)}",
            supported="torch.compile, torch.export and ONNX",
            nearest="regard.integrations.export.export",
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters, other than norms and biases, that should have no weight decay.

        By default those marked ``_no_weight_decay``, such as time constants of state-space mechanisms.
        """
        return {name for name, parameter in self.named_parameters() if getattr(parameter, "_no_weight_decay", False)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from a parameter's name to its depth, by which timm's layer decay scales learning rates.

        What comes before the first stage or block has depth 0. Each block (each stage, with `coarse`) is one deeper;
        what a stage has beside its blocks belongs to the first of them, a norm at the end to the last. Heads are one
        deeper than the last block.
        """
        trunk: Any = self.get_submodule(self._trunk)
        counts = [1 if coarse else len(stage.blocks) for stage in trunk] if self._trunk == "stages" else [len(trunk)]
        starts = list(accumulate(counts, initial=1))

        def depth(name: str) -> int:
            if name.startswith(HEADS):
                return starts[-1]
            place = PLACE.match(name)
            stage, block, norm = place.groups() if place else (None, None, None)
            if not (stage or block or norm):
                return 0
            number = int(stage) if stage else len(counts) - 1
            last = counts[number] - 1
            return starts[number] + (last if norm else min(int(block or 0), last))

        return depth

    def check_images(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the images in the memory format that is fastest for the first layer.

        Raises Unsupported for an unsupported shape, and in `torch.jit.trace`.
        """
        if torch.jit.is_tracing():  # sizes are tensors there
            raise self._no_script()
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            what = (
                f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else repr(type(images))
            )
            raise Unsupported(f"images as {what}", supported="floats of shape (B, channels, height, width)")
        if images.shape[1] != self.config.channels:
            raise Unsupported(
                f"images of {counted(images.shape[1], 'channel')}",
                supported=f"{self.config.channels}",
                nearest=f"channels={images.shape[1]}",
            )
        self.check_size(images.shape[2], images.shape[3])
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def check_size(self, height: int, width: int) -> None:
        """Raise Unsupported for images of a size that is not taken."""
        config = self.config
        if self.made_for_size and (height, width) != config.size:
            fitting = config.nearest_size(height, width)
            other = f"image_size={fitting}, and load_released, which fits weights to it"
            raise Unsupported(
                f"images of {height} x {width} pixels",
                supported=f"{config.size[0]} x {config.size[1]}, the size of {self.made_for_size}",
                nearest=other if fitting != config.size else f"{fitting[0]} x {fitting[1]} pixels",
            )
        config.check_size(height, width)


class Pyramid(Backbone):
    """A backbone of stages, each of which maps the previous feature map to a new one; the levels are their outputs.

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


def map_of(tokens: Float[Tensor, "b n c"], grid: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Return tokens, row by row, as a channels-last map; raises Unsupported if their number differs (merged tokens)."""
    if tokens.shape[1] != math.prod(grid):
        raise Unsupported(f"a map of {tokens.shape[1]} tokens", supported=" x ".join(map(str, grid)) + " tokens")
    return image_of(tokens, grid)
