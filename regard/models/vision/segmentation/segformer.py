"""SegFormer: a mix transformer, and a decoder that fuses all of its maps at once.

Xie et al., arXiv 2105.15203. Each map is projected to the decoder's width and interpolated (bilinearly) to the size of
the finest. The maps are concatenated, coarsest first, and fused into one map of that width by ``relu(BN(conv1(X)))``,
followed by a 1 x 1 convolution to the classes. The logits, at a stride of 4, are interpolated to the size of the image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import at_least
from regard.core.grids import tokens_of
from regard.layers.linear import make_linear
from regard.models.vision import mit
from regard.models.vision.backbone import map_of
from regard.models.vision.segmentation.base import Segmenter, SegmenterConfig

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class SegFormerConfig(SegmenterConfig):
    """The configuration of a :class:`SegFormer`.

    Attributes:
        image_size: as in :class:`regard.models.vision.BackboneConfig`; images of other sizes are accepted too if no
            layer of the plan has tables of positions.
        widths, depths, heads, expansions, patch, plan, reductions, drop_path: as in :class:`regard.models.vision.mit.MiTConfig`.
        decoder_width: width of the decoder's maps.
        dropout: dropout probability of whole channels of the last map.
    """

    channels: int = 3
    image_size: int | tuple[int, int] = 512
    widths: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    expansions: tuple[int, ...] = (4, 4, 4, 4)
    patch: int = 4
    plan: Any = "softmax"
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    drop_path: float = 0.1
    decoder_width: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("decoder_width", self.decoder_width, 1)
        self.encoder()

    def encoder(self) -> mit.MiTConfig:
        """Return the encoder's config; raises Unsupported for options that do not go together."""
        shared = {f.name for f in fields(mit.MiTConfig)} - {"num_classes", "dropout"}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in shared}
        return mit.MiTConfig(**given, num_classes=0)


class SegFormer(Segmenter):
    """SegFormer, see the module; sizes ``segformer_b0`` to ``segformer_b2`` and ``segformer_nano``."""

    Config = SegFormerConfig
    scales: ClassVar = {"widths": "heads", "decoder_width": 4}
    sizes: ClassVar = {
        "segformer_nano": {**mit.NANO, "decoder_width": 64, "image_size": 64, "drop_path": 0.0},
        **{
            f"segformer_{size}": {**options, "decoder_width": 256 if size in ("b0", "b1") else 768}
            for size, options in mit.SIZES.items()
        },
    }

    def __init__(self, config: SegFormerConfig) -> None:
        super().__init__(config)
        width = config.decoder_width
        self.encoder = mit.MiT(config.encoder())
        self.projections = nn.ModuleList(make_linear(each, width, bias=True) for each in config.widths)
        self.fuse = nn.Conv2d(len(config.widths) * width, width, 1, bias=False)
        self.norm, self.dropout = nn.BatchNorm2d(width), nn.Dropout2d(config.dropout)
        self.head = self.make_head(width)

    def make_head(self, channels: int) -> nn.Module:
        head = super().make_head(channels)
        nn.init.normal_(head.get_parameter("weight"), std=0.01)
        return head

    @classmethod
    def multiples(cls, config: SegFormerConfig) -> tuple[int, ...]:
        return (math.lcm(*(r * s for r, s in zip(config.reductions, config.encoder().strides, strict=True))),) * 2

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Return logits (B, num_classes, H, W)."""
        return F.interpolate(self.forward_coarse(images), images.shape[2:], mode="bilinear", align_corners=False)

    def forward_coarse(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        """Return logits at the encoder's first stride, by default every fourth pixel."""
        self.check_images(images)
        maps = self.encoder.forward_intermediates(images, intermediates_only=True)
        size, parts = maps[0].shape[2:], []
        for x, projection in zip(maps, self.projections, strict=True):
            projected = map_of(projection(tokens_of(x)), x.shape[2:])
            parts.append(F.interpolate(projected, size, mode="bilinear", align_corners=False))
        return self.head(self.dropout(F.relu(self.norm(self.fuse(torch.cat(parts[::-1], 1))))))

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: SegFormerConfig) -> dict[str, Tensor]:
        """Translate weights of NVlabs/SegFormer or transformers."""
        names = (
            (r"^decode_head\.linear_(?:c|projections)\.(\d+)\.proj\.", r"projections.\1."),
            (r"^decode_head\.linear_c(\d+)\.proj\.", lambda m: f"projections.{int(m[1]) - 1}."),
            (r"^decode_head\.linear_fuse\.(conv\.)?weight$", "fuse.weight"),
            (r"^decode_head\.(linear_fuse\.bn|batch_norm)\.", "norm."),
            (r"^decode_head\.(linear_pred|classifier)\.", "head."),
        )
        encoder: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            if not name.startswith(("decode_head.", "projections.", "fuse.", "norm.", "head.", "encoder.stages.")):
                encoder[re.sub(r"^(segformer|backbone)\.", "", name)] = value
                continue
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            found[name] = value
        translated = mit.MiT.translate(encoder, config.encoder())
        return found | {f"encoder.{name}": value for name, value in translated.items()}

    @classmethod
    def translate_encoder(cls, state: Mapping[str, Tensor], config: SegFormerConfig) -> dict[str, Tensor]:
        """Translate weights of a SegFormer or of a MiT, whose head is left out."""
        found = cls.translate(state, config)
        return {name: value for name, value in found.items() if not name.startswith("encoder.head.")}
