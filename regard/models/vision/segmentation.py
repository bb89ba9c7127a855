r"""Networks that give every pixel or voxel its class: a residual U-Net, U-Mamba, and VM-UNet.

Images (B, C, \*spatial) become logits (B, classes, \*spatial) of the same size; there is no pooled head.

**U-Mamba** (Ma et al., arXiv 2401.04722) is the residual U-Net of nnU-Net with Mamba in its encoder, for images of two and
three axes. Block: ``X <- leaky_relu(IN(conv3(leaky_relu(IN(conv3(X))))) + X)``, with a 1 x 1 convolution for X where the
channels or the places become others. What Mamba gives takes the place of the features, without a residual:

| `mamba` | where |
|---|---|
| ``none`` | nowhere: the plain residual U-Net, the control |
| ``bottleneck`` | after the deepest stage (U-Mamba_Bot) |
| ``encoder`` | after every stage (U-Mamba_Enc); with two axes after every second, the deepest among them, as the code has it |

Tokens are places, row by row; in ``encoder``, where a stage has no more places than channels, they are the channels, each as
wide as there are places. The decoder repeats each place as often as the encoder's stride, takes a 1 x 1 convolution, and
joins the features of the encoder at that size; with two axes those of the finest are left out, as in the code.

**VM-UNet** (Ruan & Xiang, arXiv 2402.02491) has blocks of VMamba's first version only. Each stage of the encoder but the
first begins with patch merging, each of the decoder but the first with its opposite, before which what entered the
encoder's stage is added. The last step makes 4 x 4 pixels of each place.
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

from regard.contract import Unsupported, at_least, check_options, closest, one_of
from regard.core.precision import without_autocast
from regard.create import create_layer
from regard.layers.drop_path import drop_path_rates
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.models.vision import vmamba
from regard.models.vision.backbone import Backbone, map_of, tokens_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


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
        at_least("channels", self.channels, 1)
        at_least("num_classes", self.num_classes, 1)


class Segmenter(nn.Module):
    """The base: :meth:`forward` gives logits of the size of the images.

    Attributes:
        Config: class of its config.
        sizes: options of each named size.
        config: its own.
        axes: of the images, 2 or 3.
        multiples: of which the sides of images are, one for each axis.
    """

    Config: ClassVar[type[SegmenterConfig]]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    axes: int
    multiples: Sequence[int]

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config: Any = config

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Weights of the official repository under the names here; those here stay as they are."""
        return dict(state)

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """As :meth:`regard.models.vision.Backbone.load_released`."""
        Backbone.load_released(self, state)  # type: ignore[arg-type]  # it wants a config, translate, and weights alone

    def check_images(self, images: Float[Tensor, "b c *spatial"]) -> None:
        """Raise Unsupported for another shape than it takes."""
        config, shape = self.config, tuple(images.shape)
        if len(shape) != self.axes + 2 or not images.is_floating_point():
            sides = "height, width" if self.axes == 2 else "depth, height, width"
            raise Unsupported(f"images of {images.dtype} and shape {shape}", supported=f"floats (B, channels, {sides})")
        if shape[1] != config.channels:
            raise Unsupported(f"images of {shape[1]} channels", supported=f"{config.channels}", nearest="channels=")
        if any(side % of for side, of in zip(shape[2:], self.multiples, strict=True)):
            raise Unsupported(
                f"images of {' x '.join(map(str, shape[2:]))}",
                supported=f"sides that are multiples of {' and '.join(map(str, self.multiples))}",
            )


@dataclass(frozen=True, kw_only=True)
class UMambaConfig(SegmenterConfig):
    """The configuration of a :class:`UMamba`; the defaults are those of nnU-Net in two axes.

    Attributes:
        axes: of the images, 2 or 3.
        widths: channels of each stage, from the finest.
        strides: of each stage, one number or one for each axis; 1, then 2, when None.
        blocks, decoder_blocks: of a stage of the encoder and of the decoder; the deeper half of the encoder and the finer
            half of the decoder have one, as in the code.
        mamba: see the table.
        mixer: options of the mechanism ``mamba``.
        image_size: needed with ``mamba="encoder"``, whose channels may be tokens as wide as the image has places.
    """

    axes: int = 2
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512)
    strides: tuple[int | tuple[int, ...], ...] | None = None
    blocks: int = 2
    decoder_blocks: int = 2
    mamba: str = "bottleneck"
    mixer: Mapping[str, Any] | None = None
    image_size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("axes", self.axes, (2, 3))
        one_of("mamba", self.mamba, ("none", "bottleneck", "encoder"))
        at_least("blocks", self.blocks, 1)
        at_least("decoder_blocks", self.decoder_blocks, 1)
        at_least("stages of widths", len(self.widths), 2)
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
        """Of each stage along each axis."""
        given = (1, *[2] * (len(self.widths) - 1)) if self.strides is None else self.strides
        return tuple((each,) * self.axes if isinstance(each, int) else tuple(each) for each in given)


class UMamba(Segmenter):
    """See the module; sizes ``unet_2d``, ``umamba_bot_2d``, ``umamba_enc_2d``, and the same in 3-D."""

    Config = UMambaConfig
    sizes: ClassVar = {
        f"{name}_{axes}d": {
            "axes": axes,
            "mamba": mamba,
            **({"widths": (32, 64, 128, 256, 320, 320)} if axes == 3 else {}),
            **({"image_size": (64, 128, 128) if axes == 3 else (256, 256)} if mamba == "encoder" else {}),
        }
        for axes in (2, 3)
        for name, mamba in (("unet", "none"), ("umamba_bot", "bottleneck"), ("umamba_enc", "encoder"))
    }

    def __init__(self, config: UMambaConfig) -> None:
        super().__init__(config)
        self.axes, widths, strides = config.axes, config.widths, config.all_strides
        stages = len(widths)
        self.multiples = [math.prod(sides) for sides in zip(*strides, strict=True)]
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
            self.heads.append(convolution(width, config.num_classes, 1))
        self.apply(_initialise)

    def _is_left_out(self, s: int) -> bool:
        """Whether the decoder's stage has no features of the encoder beside those from below."""
        return self.axes == 2 and s == len(self.config.widths) - 2

    def forward_levels(self, images: Float[Tensor, "b c *spatial"]) -> list[Float[Tensor, "b k *coarser"]]:
        """Logits at the size of each stage of the decoder, from the finest, for deep supervision."""
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
        levels = []
        for s, (up, stage, head) in enumerate(zip(self.upsample, self.decoder, self.heads, strict=True)):
            x = up(F.interpolate(x, scale_factor=tuple(map(float, config.all_strides[-s - 1])), mode="nearest"))
            x = stage(x if self._is_left_out(s) else torch.cat([x, skips[-s - 2]], 1))
            levels.append(head(x))
        return levels[::-1]

    def forward(self, images: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b k *spatial"]:
        """Logits (B, num_classes, *spatial)."""
        return self.forward_levels(images)[0]

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: UMambaConfig) -> dict[str, Tensor]:
        """From `umamba/nnunetv2/nets` of bowang-lab/U-Mamba."""
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
                continue  # the same tensors by another name
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
    """Two convolutions with instance norms and what came in, (B, C, *spatial) -> (B, width, *spatial / stride).

    Args:
        axes: 2 or 3.
        channels, width: before and after.
        stride: of the first convolution; with one, X comes through a 1 x 1 convolution. None for a block of equal sizes.
    """

    def __init__(self, axes: int, channels: int, width: int, stride: tuple[int, ...] | None = None) -> None:
        super().__init__()
        convolution, norm = CONVOLUTIONS[axes], NORMS[axes]
        self.conv1 = convolution(channels, width, 3, 1 if stride is None else stride, 1)
        self.conv2 = convolution(width, width, 3, 1, 1)
        self.norm1, self.norm2 = norm(width, affine=True), norm(width, affine=True)
        self.shortcut = None if stride is None else convolution(channels, width, 1, stride)

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c2 *spatial2"]:
        y = self.norm2(self.conv2(F.leaky_relu(self.norm1(self.conv1(x)))))
        return F.leaky_relu(y + (x if self.shortcut is None else self.shortcut(x)))


class MambaLayer(nn.Module):
    """Mamba over the places of a map, or over its channels, without a residual; never in autocast.

    Args:
        width: channels.
        places: of the map, where channels are the tokens if there are no more places than channels; None for places.
        options: of the mechanism ``mamba``.
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


@dataclass(frozen=True, kw_only=True)
class VMUNetConfig(SegmenterConfig):
    """The configuration of a :class:`VMUNet`.

    Attributes:
        widths: channels of the encoder's stages, each twice those before; the decoder has them in the opposite order.
        depths, decoder_depths: blocks of the encoder's and the decoder's stages, in the order in which they are passed.
        drop_path: stochastic depth of the deepest blocks; it rises evenly to them from 0 at both ends.
        mixer: options of the mechanism ``bidirectional_mamba``.
    """

    channels: int = 3
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (2, 2, 2, 1)
    drop_path: float = 0.2
    mixer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depths", "decoder_depths"):
            if len(getattr(self, name)) != len(self.widths):
                raise Unsupported(f"{name}={getattr(self, name)}", supported=f"one number for each of {self.widths}")
        if self.widths[0] % 4 or any(b != 2 * a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise Unsupported(f"widths={self.widths}", supported="multiples of 4, each twice the one before")


class VMUNet(Segmenter):
    """See the module; size ``vm_unet``. Grey images are repeated where it has three channels, as in the code."""

    Config = VMUNetConfig
    sizes: ClassVar = {"vm_unet": {}}
    axes = 2

    def __init__(self, config: VMUNetConfig) -> None:
        super().__init__(config)
        self.multiples = [4 * 2 ** (len(config.widths) - 1)] * 2
        rates = drop_path_rates(config.drop_path, config.depths)
        descending = [each for stage in drop_path_rates(config.drop_path, config.decoder_depths) for each in stage][
            ::-1
        ]
        options = {"expand": 2.0, **(config.mixer or {})}
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        before = config.channels
        for number, width in enumerate(config.widths):
            reduction = vmamba.PatchMerging(before, width) if number else vmamba.ConvNorm(before, width, 4, 4)
            self.encoder.append(vmamba.Stage(reduction, [vmamba.Block(width, 0, options, r) for r in rates[number]]))
            before = width
        for number, width in enumerate(config.widths[::-1]):
            expanding = PatchExpanding(2 * width, 4 * width, 2) if number else nn.Identity()
            own = [descending.pop(0) for _ in range(config.decoder_depths[number])]
            self.decoder.append(vmamba.Stage(expanding, [vmamba.Block(width, 0, options, rate) for rate in own]))
        self.expanding = PatchExpanding(before := config.widths[0], 4 * before, 4)
        self.head = nn.Conv2d(before // 4, config.num_classes, 1)
        self.apply(vmamba.initialise)
        for module in self.modules():
            if isinstance(module, PatchExpanding) and isinstance(module.expand, nn.Linear):
                nn.init.trunc_normal_(module.expand.weight, std=0.02)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Logits (B, num_classes, H, W), without a sigmoid or a softmax."""
        if images.ndim == 4 and images.shape[1] == 1 and self.config.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        self.check_images(images)
        x, skips = images.contiguous(memory_format=torch.channels_last), []
        for stage in self.encoder:
            assert isinstance(stage, vmamba.Stage)
            x = stage.embedding(x)
            skips.append(x)
            for block in stage.blocks:
                x = block(x)
        for number, stage in enumerate(self.decoder):
            x = stage(x + skips[-number] if number else x)
        return self.head(self.expanding(x))

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: VMUNetConfig) -> dict[str, Tensor]:
        """From `models/vmunet` of JCruan519/VM-UNet."""
        names = (
            (r"^vmunet\.", ""),
            (r"^patch_embed\.proj\.", "encoder.0.embedding.conv."),
            (r"^patch_embed\.norm\.", "encoder.0.embedding.norm."),
            (r"^layers\.(\d+)\.downsample\.", lambda m: f"encoder.{int(m[1]) + 1}.embedding."),
            (r"^layers\.", "encoder."),
            (r"^layers_up\.(\d+)\.upsample\.", r"decoder.\1.embedding."),
            (r"^layers_up\.", "decoder."),
            (r"^final_up\.", "expanding."),
            (r"^final_conv\.", "head."),
        )
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            found |= vmamba.translate_block(name, value)
        return found


class PatchExpanding(nn.Module):
    """One place to several, (B, C, H, W) -> (B, hidden / factor^2, factor H, factor W).

    Args:
        channels: C.
        hidden: after the projection: the channels of all places that one becomes.
        factor: places along each axis.
    """

    def __init__(self, channels: int, hidden: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = make_linear(channels, hidden)
        self.norm = LayerNorm(hidden // factor**2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        height, width, factor = x.shape[2], x.shape[3], self.factor
        parts = self.expand(tokens_of(x)).unflatten(1, (height, width)).unflatten(3, (factor, factor, -1))
        tokens = parts.transpose(2, 3).flatten(1, 4)
        return map_of(self.norm(tokens), (factor * height, factor * width))


def dice_loss(logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"]) -> Float[Tensor, ""]:
    """1 - the soft Dice coefficient, as VM-UNet's code has it; 0 where the prediction is right and sure.

    Of one class, with a sigmoid: ``(2 sum p t + 1) / (sum p + sum t + 1)`` of each image. Of several, with a softmax: ``(2 sum
    p t + s) / (sum p^2 + sum t^2 + s)`` of each class over the batch, s = 1e-5. Both are finite where a class is absent.

    Args:
        logits: (B, classes, *spatial).
        labels: (B, *spatial), 0 or 1 for one class, otherwise the number of the class.
    """
    classes = logits.shape[1]
    if labels.shape != (logits.shape[0], *logits.shape[2:]) or labels.is_floating_point():
        raise Unsupported(
            f"labels of {labels.dtype} and shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}",
            supported="integers of the logits' shape without the axis of classes",
        )
    if classes == 1:
        p, t = logits.sigmoid().flatten(1), labels.flatten(1).to(logits.dtype)
        return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()
    p = logits.softmax(1).transpose(0, 1).flatten(1)
    t = F.one_hot(labels.long(), classes).flatten(0, -2).mT.to(logits.dtype)
    return (1 - (2 * (p * t).sum(1) + 1e-5) / (p.square().sum(1) + t.sum(1) + 1e-5)).mean()


def segmentation_loss(logits: Float[Tensor, "b k *spatial"], labels: Int[Tensor, "b *spatial"]) -> Float[Tensor, ""]:
    """Cross-entropy (binary of one class) and :func:`dice_loss`, with equal weights; arguments as there."""
    dice = dice_loss(logits, labels)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype)) + dice
    return F.cross_entropy(logits, labels.long()) + dice


SEGMENTERS: dict[str, type[Segmenter]] = {name: each for each in (UMamba, VMUNet) for name in each.sizes}
"""The class of each named size."""


def create_segmenter(name: str, **options: Any) -> Segmenter:
    """A network, untrained.

    Args:
        name: one of :data:`SEGMENTERS`.
        options: fields of its config that shall differ.

    Raises:
        Unsupported: for an unknown name or option, or a value that is not accepted.
    """
    if name not in SEGMENTERS:
        raise Unsupported(
            f"segmenter {name!r}", supported=", ".join(SEGMENTERS), nearest=closest(str(name), SEGMENTERS)
        )
    segmenter = SEGMENTERS[name]
    check_options(segmenter.Config, options, name)
    return segmenter(segmenter.Config(**{**segmenter.sizes[name], **options}))
