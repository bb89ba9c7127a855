r"""The residual U-Net of nnU-Net, and U-Mamba.

Ma et al., arXiv 2401.04722: U-Mamba is the U-Net with Mamba in its encoder, for images of two or three axes. Its block
is ``X <- leaky_relu(IN(conv3(leaky_relu(IN(conv3(X))))) + X)``, with a 1 x 1 convolution for X if the channels or the
resolution change. Mamba's output replaces the features, without a residual:

| `mamba` | where |
|---|---|
| ``none`` | nowhere: the plain residual U-Net, the control |
| ``bottleneck`` | after the deepest stage (U-Mamba_Bot) |
| ``encoder`` | after every stage (U-Mamba_Enc); with two axes every second one, with the deepest, as in the code |

Tokens are positions, row by row; in ``encoder``, in stages with no more positions than channels, tokens are the
channels, with the positions as features. The decoder upsamples by the encoder's stride (nearest neighbour), applies a
1 x 1 convolution, and concatenates the encoder's features of that size; with two axes those of the finest stage are
left out, as in the code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Unsupported, at_least, one_of
from regard.core.precision import without_autocast
from regard.create import create_layer
from regard.layers.norms import LayerNorm
from regard.models.vision.backbone import check_stages
from regard.models.vision.segmentation.base import Segmenter, SegmenterConfig

if TYPE_CHECKING:
    from jaxtyping import Float

CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@dataclass(frozen=True, kw_only=True)
class UMambaConfig(SegmenterConfig):
    """The configuration of a :class:`UMamba`; the defaults are those of nnU-Net in 2D.

    Attributes:
        axes: number of axes of the images, 2 or 3.
        widths: channels of each stage, from the finest.
        strides: stride of each stage, one number or one for each axis; 1, then 2, when None.
        blocks, decoder_blocks: number of blocks in a stage of the encoder and of the decoder; stages in the deeper half
            of the encoder and the finer half of the decoder have one block, as in the code.
        mamba: see the table.
        mixer: options of the mechanism ``mamba``.
        deep_supervision: whether task models add the losses of the decoder's coarser stages in training, see
            :mod:`regard.models.levels`.
        image_size: required with ``mamba="encoder"``, since it determines whether tokens are positions or channels.
    """

    axes: int = 2
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512)
    strides: tuple[int | tuple[int, ...], ...] | None = None
    blocks: int = 2
    decoder_blocks: int = 2
    mamba: str = "bottleneck"
    mixer: Mapping[str, Any] | None = None
    deep_supervision: bool = False
    image_size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("axes", self.axes, (2, 3))
        one_of("deep_supervision", self.deep_supervision, (False, True))
        one_of("mamba", self.mamba, ("none", "bottleneck", "encoder"))
        at_least("blocks", self.blocks, 1)
        at_least("decoder_blocks", self.decoder_blocks, 1)
        at_least("stages of widths", len(self.widths), 2)
        check_stages(self, "widths")
        if len(self.all_strides) != len(self.widths) or any(len(each) != self.axes for each in self.all_strides):
            raise Unsupported(
                f"strides={self.strides} of {len(self.widths)} stages with {self.axes} axes",
                supported="one for each stage, a number or one for each axis",
            )
        if self.mamba == "encoder" and (self.image_size is None or len(self.image_size) != self.axes):
            raise Unsupported(
                f"mamba='encoder' with image_size={self.image_size}",
                supported=f"an image_size of {self.axes} axes, on which it depends whether tokens are places or channels",
                nearest="mamba='bottleneck'",
            )

    @property
    def all_strides(self) -> tuple[tuple[int, ...], ...]:
        """The stride of each stage along each axis."""
        given = (1, *[2] * (len(self.widths) - 1)) if self.strides is None else self.strides
        return tuple((each,) * self.axes if isinstance(each, int) else tuple(each) for each in given)


class UMamba(Segmenter):
    """The residual U-Net and U-Mamba, see the module.

    Sizes: ``unet_2d``, ``umamba_bot_2d``, ``umamba_enc_2d``, the same in 3-D (``unet_3d``, ...), and small ones of both
    (``unet_nano``, ``unet_nano_3d``, ...).
    """

    Config = UMambaConfig
    scales: ClassVar = {"widths": 4}
    classifier = "heads"
    encoder_parts = ("stem.", "encoder.", "mambas.")
    sizes: ClassVar = {
        f"{name}_{size}": {
            "axes": axes,
            "mamba": mamba,
            **({} if widths is None else {"widths": widths}),
            **({"image_size": image_size} if mamba == "encoder" else {}),
        }
        for size, axes, widths, image_size in (
            ("nano", 2, (16, 32, 64, 64), (64, 64)),
            ("nano_3d", 3, (8, 16, 32, 32), (32, 32, 32)),
            ("2d", 2, None, (256, 256)),
            ("3d", 3, (32, 64, 128, 256, 320, 320), (64, 128, 128)),
        )
        for name, mamba in (("unet", "none"), ("umamba_bot", "bottleneck"), ("umamba_enc", "encoder"))
    }

    def __init__(self, config: UMambaConfig) -> None:
        super().__init__(config)
        widths, strides = config.widths, config.all_strides
        stages = len(widths)
        unit = (1,) * config.axes
        fine = math.ceil(stages / 2)
        counts = [config.blocks if s < fine else 1 for s in range(stages)]
        self.stem = _stage(config.axes, config.channels, widths[0], unit, counts[0])
        self.encoder, self.mambas = nn.ModuleList(), nn.ModuleDict()
        before, size = widths[0], config.image_size
        for s, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            self.encoder.append(_stage(config.axes, before, width, stride, counts[s]))
            size = None if size is None else tuple(a // b for a, b in zip(size, stride, strict=True))
            if _has_mamba(config, s):
                places = math.prod(size) if size is not None and config.mamba == "encoder" else None
                self.mambas[str(s)] = MambaLayer(width, places, config.mixer or {})
            before = width
        self.decoder, self.upsample, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        deep = math.ceil((stages - 1) / 2 + 0.5)
        for s in range(stages - 1):
            width, convolution = widths[-s - 2], CONVOLUTIONS[config.axes]
            joined = width if self._is_left_out(s) else 2 * width
            self.upsample.append(convolution(widths[-s - 1], width, 1))
            count = config.decoder_blocks if s < deep else 1
            self.decoder.append(_stage(config.axes, joined, width, unit, count))
            self.heads.append(super().make_head(width))
        self.apply(_initialise)

    def make_head(self, channels: int) -> nn.Module:
        head = super().make_head(channels)
        _initialise(head)
        return head

    def _is_left_out(self, s: int) -> bool:
        """Return whether a decoder stage has no skip connection from the encoder."""
        return self.config.axes == 2 and s == len(self.config.widths) - 2

    def forward_levels(self, images: Float[Tensor, "b c *spatial"]) -> list[Float[Tensor, "b k *coarser"]]:
        """Return logits at the size of each decoder stage, finest first, for deep supervision."""
        return [head(x) for head, x in zip(self.heads, self._decoded(images), strict=True)][::-1]

    def forward(self, images: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b k *spatial"]:
        """Return logits (B, num_classes, *spatial)."""
        return self.heads[-1](self._decoded(images)[-1])

    def _decoded(self, images: Float[Tensor, "b c *spatial"]) -> list[Float[Tensor, "b c2 *coarser"]]:
        """Return the features of the decoder stages, coarsest first."""
        self.check_images(images)
        config = self.config
        if config.mamba == "encoder" and tuple(images.shape[2:]) != tuple(config.image_size):
            raise Unsupported(
                f"images of {tuple(images.shape[2:])} with mamba='encoder' for {tuple(config.image_size)}",
                supported="the config's image_size",
                nearest=f"image_size={tuple(images.shape[2:])}",
            )
        x, skips = self.stem(images), []
        for s, stage in enumerate(self.encoder):
            x = stage(x)
            x = self.mambas[str(s)](x) if str(s) in self.mambas else x
            skips.append(x)
        decoded = []
        for s, (up, stage) in enumerate(zip(self.upsample, self.decoder, strict=True)):
            x = up(F.interpolate(x, scale_factor=tuple(map(float, config.all_strides[-s - 1])), mode="nearest"))
            x = stage(x if self._is_left_out(s) else torch.cat([x, skips[-s - 2]], 1))
            decoded.append(x)
        return decoded

    @classmethod
    def multiples(cls, config: UMambaConfig) -> tuple[int, ...]:
        return tuple(math.prod(sides) for sides in zip(*config.all_strides, strict=True))

    @classmethod
    def fitted(cls, options: Mapping[str, Any], size: Sequence[int], given: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the stages that have a stride, or without `strides` as many as halve all sides together.

        Sides are halved while they are all even and at least 4 remains of each. nnU-Net's plans halve each axis on its
        own; for images that are much thinner along one axis, give `strides`.
        """
        stages, sides, strides = 1, tuple(size), given.get("strides")
        while all(side % 2 == 0 and side >= 8 for side in sides):
            stages, sides = stages + 1, tuple(side // 2 for side in sides)
        if isinstance(strides, Sequence):
            stages = len(strides)
        return {**options, "widths": tuple(options.get("widths", cls.Config.widths))[: max(stages, 2)]}

    @classmethod
    def check_size(cls, config: UMambaConfig, size: Sequence[int]) -> None:
        super().check_size(config, size)
        if tuple(size) == cls.multiples(config):
            raise Unsupported(
                f"images of {' x '.join(map(str, size))}, which {len(config.widths)} stages reduce to one position, too few to "
                "norm",
                supported="larger images, or fewer stages",
                nearest=f"widths={list(config.widths[:-1])}",
            )

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: UMambaConfig) -> dict[str, Tensor]:
        """Translate weights of bowang-lab/U-Mamba (`umamba/nnunetv2/nets`)."""
        names = (
            (r"^encoder\.stem\.", "stem."),
            (r"^encoder\.stages\.", "encoder."),
            (r"^encoder\.mamba_layers\.", "mambas."),
            (r"^mamba_layer\.", f"mambas.{len(config.widths) - 1}."),
            (r"^decoder\.stages\.", "decoder."),
            (r"^decoder\.upsample_layers\.(\d+)\.conv\.", r"upsample.\1."),
            (r"^decoder\.seg_layers\.", "heads."),
            (r"\.conv(\d)\.conv\.", r".conv\1."),
            (r"\.conv(\d)\.norm\.", r".norm\1."),
            (r"\.conv3\.", ".shortcut."),
            (r"\.mamba\.conv1d\.", ".mamba.conv."),
            (r"\.mamba\.dt_proj\.bias$", ".mamba.dt_bias"),
        )
        found = {}
        for name, value in state.items():
            if ".all_modules." in name or name.startswith("decoder.encoder."):
                continue  # the same tensors under another name
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            found[name] = value.flatten(1) if name.endswith(".mamba.conv.weight") else value
        return found


def _has_mamba(config: UMambaConfig, s: int) -> bool:
    last = len(config.widths) - 1
    if config.mamba == "encoder":
        return config.axes == 3 or (last - s) % 2 == 0
    return config.mamba == "bottleneck" and s == last


def _stage(axes: int, channels: int, width: int, stride: tuple[int, ...], blocks: int) -> nn.Sequential:
    first = ResidualBlock(axes, channels, width, stride)
    return nn.Sequential(first, *(ResidualBlock(axes, width, width) for _ in range(blocks - 1)))


class ResidualBlock(nn.Module):
    """A residual block of two convolutions with instance norms, (B, C, *spatial) -> (B, width, *spatial / stride).

    Args:
        axes: 2 or 3.
        channels, width: channels before and after.
        stride: stride of the first convolution; X then passes a 1 x 1 convolution. None for a block that keeps all
            sizes.
    """

    def __init__(self, axes: int, channels: int, width: int, stride: tuple[int, ...] | None = None) -> None:
        super().__init__()
        convolution, norm = CONVOLUTIONS[axes], NORMS[axes]
        self.conv1 = convolution(channels, width, 3, 1 if stride is None else stride, 1)
        self.conv2 = convolution(width, width, 3, 1, 1)
        self.norm1, self.norm2 = norm(width, affine=True), norm(width, affine=True)
        self.shortcut = None if stride is None else convolution(channels, width, 1, stride)

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c2 *spatial2"]:
        y = _normed(self.norm2, self.conv2(F.leaky_relu(_normed(self.norm1, self.conv1(x)))))
        return F.leaky_relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _normed(norm: nn.Module, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
    """Apply an instance norm with weights, which torch refuses for a batch of 0; in an export the batch is open."""
    return norm(x) if torch.compiler.is_compiling() or len(x) else x


class MambaLayer(nn.Module):
    """Mamba over the positions of a map, or over its channels, without a residual; never in autocast.

    Args:
        width: number of channels.
        places: number of positions; if it is at most `width`, the channels are the tokens. With None, positions always
            are.
        options: options of the mechanism ``mamba``.
    """

    def __init__(self, width: int, places: int | None, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.of_channels = places is not None and places <= width
        dim = places if places is not None and self.of_channels else width
        self.norm = LayerNorm(dim)
        self.mamba = create_layer("mamba", dim, 1, pattern="causal-self", **options)

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        assert self.norm.weight is not None  # a parametric norm
        with without_autocast(x.device):
            tokens = x.to(self.norm.weight.dtype).flatten(2)
            tokens = tokens if self.of_channels else tokens.mT
            y = self.mamba(self.norm(tokens)).output
            return (y if self.of_channels else y.mT).reshape(x.shape).to(x.dtype)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
