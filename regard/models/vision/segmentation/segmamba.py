"""SegMamba, a U-Net for volumes whose encoder is Mamba in three orientations.

Xing et al., arXiv 2401.13560. A stage of the encoder computes, with IN the instance norm:

    G = X + relu(IN(conv1(relu(IN(conv3(relu(IN(conv3(X)))))) + relu(IN(conv1(X))))))     (gated spatial convolution)
    X <- X + ToM(LN(X))                                                                     (as often as `depths` says)

ToM is the layer of the mechanism ``bidirectional_mamba`` with three paths: row by row, the reverse, and across the
slices of the first axis; their outputs are added. The official code fixes the number of slices for crops of 128 voxels;
here it is that of the map. A stage's skip connection to the decoder is IN(X) followed by two 1 x 1 convolutions with a
GELU in between.

The decoder is that of UNETR: residual blocks of two 3 x 3 x 3 convolutions on the skip connections and on the volume
itself, with transposed convolutions of stride 2 between them. Its norms have no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Unsupported, at_least
from regard.create import create_layer
from regard.layers.norms import LayerNorm
from regard.models.vision.backbone import check_stages
from regard.models.vision.segmentation.base import Segmenter, SegmenterConfig

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class SegMambaConfig(SegmenterConfig):
    """The configuration of a :class:`SegMamba`.

    Attributes:
        widths, depths: channels and Mamba layers of each encoder stage, from the finest, which has half the volume's
            sides.
        bottom: channels of the decoder at the coarsest stage.
        mixer: options of the mechanism ``bidirectional_mamba``.
    """

    widths: tuple[int, ...] = (48, 96, 192, 384)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottom: int = 768
    mixer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("stages of widths", len(self.widths), 2)
        at_least("bottom", self.bottom, 1)
        check_stages(self, "widths", "depths")


class SegMamba(Segmenter):
    """SegMamba, see the module; sizes ``segmamba`` and ``segmamba_nano``."""

    Config = SegMambaConfig
    scales: ClassVar = {"widths": 4, "bottom": 4}
    encoder_parts = ("reductions.", "stages.", "skips.")
    sizes: ClassVar = {
        "segmamba": {},
        "segmamba_nano": {"widths": (12, 24, 48), "depths": (1, 1, 1), "bottom": 48},
    }

    def __init__(self, config: SegMambaConfig) -> None:
        super().__init__(config)
        widths, options = config.widths, {"scan": "slices", "combine": "sum", "axes": 3, **(config.mixer or {})}
        self.reductions, self.stages = nn.ModuleList(), nn.ModuleList()
        self.skips, self.blocks = nn.ModuleList(), nn.ModuleList([ResidualBlock(config.channels, widths[0])])
        for s, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
            if s:
                reduction = nn.Sequential(nn.InstanceNorm3d(widths[s - 1]), nn.Conv3d(widths[s - 1], width, 2, 2))
            else:
                reduction = nn.Sequential(nn.Conv3d(config.channels, width, 7, 2, 3))
            self.reductions.append(reduction)
            layers = (TriMamba(width, options) for _ in range(depth))
            self.stages.append(nn.Sequential(GatedSpatialConvolution(width), *layers))
            mixing = nn.Conv3d(width, 2 * width, 1), nn.GELU(), nn.Conv3d(2 * width, width, 1)
            self.skips.append(nn.Sequential(nn.InstanceNorm3d(width), *mixing))
            self.blocks.append(ResidualBlock(width, (*widths, config.bottom)[s + 1]))
        before = (*widths[1:], config.bottom)
        self.decoder = nn.ModuleList(UpBlock(*pair) for pair in zip(before[::-1], widths[::-1], strict=True))
        self.last = ResidualBlock(widths[0], widths[0])
        self.head = self.make_head(widths[0])

    def forward(self, images: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b k x y z"]:
        """Return logits (B, num_classes, X, Y, Z)."""
        self.check_images(images)
        x, levels = images, [self.blocks[0](images)]
        for s, (reduction, stage) in enumerate(zip(self.reductions, self.stages, strict=True)):
            x = stage(reduction(x))
            levels.append(self.blocks[s + 1](self.skips[s](x)))
        x = levels.pop()
        for block in self.decoder:
            x = block(x, levels.pop())
        return self.head(self.last(x))

    @classmethod
    def multiples(cls, config: SegMambaConfig) -> tuple[int, ...]:
        return (2 ** len(config.widths),) * 3

    @classmethod
    def check_size(cls, config: SegMambaConfig, size: Any) -> None:
        super().check_size(config, size)
        if tuple(size) == cls.multiples(config):
            raise Unsupported(
                f"images of {' x '.join(map(str, size))}, which {len(config.widths)} stages reduce to one position, too few to "
                "norm",
                supported="larger images, or fewer stages",
                nearest=f"widths={list(config.widths[:-1])},depths={list(config.depths[:-1])}",
            )

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: SegMambaConfig) -> dict[str, Tensor]:
        """Translate weights of ge-xing/SegMamba (`model_segmamba/segmamba.py`)."""
        found, rest = dict[str, Tensor](), dict(state)
        for place in [name.removesuffix("A_log") for name in state if name.endswith(".mamba.A_log")]:
            for own, parts in ORIENTATIONS.items():
                keys = [place + part for part in parts]
                if all(key in rest for key in keys):
                    found[_renamed(place + own, config)] = torch.stack([rest.pop(key) for key in keys])
        for name, value in rest.items():
            own = _renamed(name, config)
            found[own] = value.flatten(1) if ".mamba.convs." in own and value.ndim > 2 else value
        return found


ORIENTATIONS = {
    "A_log": ("A_log", "A_b_log", "A_s_log"),
    "D": ("D", "D_b", "D_s"),
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias", "dt_proj_s.bias"),
}
"""Names of the layer's tensors -> names in the official code, path by path."""


def _renamed(name: str, config: SegMambaConfig) -> str:
    stages = len(config.widths)
    names = (
        (r"^vit\.downsample_layers\.", "reductions."),
        (r"^vit\.gscs\.(\d+)\.proj(\d?)\.", lambda m: f"stages.{m[1]}.0.conv{m[2] or 1}."),
        (r"^vit\.stages\.(\d+)\.(\d+)\.", lambda m: f"stages.{m[1]}.{int(m[2]) + 1}."),
        (r"^vit\.mlps\.(\d+)\.fc1\.", r"skips.\1.1."),
        (r"^vit\.mlps\.(\d+)\.fc2\.", r"skips.\1.3."),
        (r"^encoder(\d+)\.layer\.", lambda m: f"blocks.{int(m[1]) - 1}."),
        (r"^decoder1\.layer\.", "last."),
        (r"^decoder(\d+)\.transp_conv\.conv\.", lambda m: f"decoder.{stages + 1 - int(m[1])}.up."),
        (r"^decoder(\d+)\.conv_block\.", lambda m: f"decoder.{stages + 1 - int(m[1])}.block."),
        (r"^out\.conv\.conv\.", "head."),
        (r"\.conv(\d)\.conv\.", r".conv\1."),
        (r"\.mamba\.(conv1d|x_proj|dt_proj)(_b|_s)?\.(?!\d)", _of_path),
    )
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _of_path(found: re.Match[str]) -> str:
    path = {None: 0, "_b": 1, "_s": 2}[found[2]]
    return f".mamba.{found[1].replace('conv1d', 'convs')}.{path}."


class GatedSpatialConvolution(nn.Module):
    """The gated spatial convolution, see the module; (B, C, X, Y, Z) -> (B, C, X, Y, Z)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(width, width, 3, 1, 1), nn.Conv3d(width, width, 3, 1, 1)
        self.conv3, self.conv4 = nn.Conv3d(width, width, 1), nn.Conv3d(width, width, 1)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        def normed(y: Tensor) -> Tensor:
            return F.relu(F.instance_norm(y))

        spatial = normed(self.conv2(normed(self.conv1(x))))
        return x + normed(self.conv4(spatial + normed(self.conv3(x))))


class TriMamba(nn.Module):
    """A pre-norm residual layer of Mamba in three orientations over the positions of a map."""

    def __init__(self, width: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.mamba = create_layer("bidirectional_mamba", width, 1, pattern="noncausal-self", **options)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        y = self.mamba(self.norm(x.flatten(2).mT), context=Context(grid=tuple(x.shape[2:]))).output
        return x + y.mT.reshape(x.shape)


class ResidualBlock(nn.Module):
    """A residual block of two convolutions with norms; a 1 x 1 convolution adapts the input if the channels change."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.conv3 = None if channels == width else nn.Conv3d(channels, width, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c2 x y z"]:
        y = F.instance_norm(self.conv2(F.leaky_relu(F.instance_norm(self.conv1(x)))))
        return F.leaky_relu(y + (x if self.conv3 is None else F.instance_norm(self.conv3(x))))


class UpBlock(nn.Module):
    """Upsamples by a transposed convolution and fuses the encoder's features: (B, C, ...) -> (B, width, 2 ...)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(channels, width, 2, 2, bias=False)
        self.block = ResidualBlock(2 * width, width)

    def forward(
        self, x: Float[Tensor, "b c x y z"], beside: Float[Tensor, "b c2 x2 y2 z2"]
    ) -> Float[Tensor, "b c2 x2 y2 z2"]:
        return self.block(torch.cat([self.up(x), beside], 1))
