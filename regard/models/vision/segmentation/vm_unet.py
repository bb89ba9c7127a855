"""VM-UNet, a U-Net of VMamba's blocks.

Ruan & Xiang, arXiv 2402.02491. All blocks are those of VMamba's first version. Each encoder stage except the first
begins with patch merging. Each decoder stage except the first adds the input of the encoder blocks of the same size,
then begins with patch expanding, the reverse of merging. The last step expands each position to 4 x 4 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.core.grids import tokens_of
from regard.layers.drop_path import drop_path_rates
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.models.vision import vmamba
from regard.models.vision.backbone import check_stages, map_of
from regard.models.vision.segmentation.base import Segmenter, SegmenterConfig

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class VMUNetConfig(SegmenterConfig):
    """The configuration of a :class:`VMUNet`.

    Attributes:
        widths: channels of the encoder's stages, each twice the one before; the decoder has them in the reverse order.
        depths, decoder_depths: blocks of the encoder's and the decoder's stages, in order of execution.
        drop_path: stochastic depth probability of the deepest blocks, to which it rises linearly from 0 at both ends.
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
        check_stages(self, "widths", "depths", "decoder_depths")
        if self.widths[0] % 4 or any(b != 2 * a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise Unsupported(f"widths={self.widths}", supported="multiples of 4, each twice the one before")


class VMUNet(Segmenter):
    """VM-UNet, see the module; sizes ``vm_unet`` and ``vm_unet_nano``.

    Grey images are repeated if the config has three channels, as in the code.
    """

    Config = VMUNetConfig
    scales: ClassVar = {"widths": 4}
    sizes: ClassVar = {
        "vm_unet_nano": {"widths": (24, 48, 96), "depths": (1, 1, 1), "decoder_depths": (1, 1, 1), "drop_path": 0.0},
        "vm_unet": {},
    }

    def __init__(self, config: VMUNetConfig) -> None:
        super().__init__(config)
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
        self.head = self.make_head(before // 4)
        self.apply(vmamba.initialise)
        for module in self.modules():
            if isinstance(module, PatchExpanding) and isinstance(module.expand, nn.Linear):
                nn.init.trunc_normal_(module.expand.weight, std=0.02)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Return logits (B, num_classes, H, W), without a sigmoid or softmax."""
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
    def multiples(cls, config: VMUNetConfig) -> tuple[int, ...]:
        return (4 * 2 ** (len(config.widths) - 1),) * 2

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: VMUNetConfig) -> dict[str, Tensor]:
        """Translate weights of JCruan519/VM-UNet (`models/vmunet`)."""
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

    @classmethod
    def translate_encoder(cls, state: Mapping[str, Tensor], config: VMUNetConfig) -> dict[str, Tensor]:
        """Translate weights of a VM-UNet or of a VMamba of version v0. Of a stage with more blocks than here, the first
        ones are taken, as in the official code."""
        bare = {re.sub(r"^vmunet\.", "", name): value for name, value in state.items()}
        found: dict[str, Tensor] = {}
        for name, value in vmamba.VMamba.translate(bare, vmamba.VMambaConfig(version="v0")).items():
            name = re.sub(r"^stages\.", "encoder.", name)
            block = re.match(r"encoder\.(\d+)\.blocks\.(\d+)\.", name)
            if block is None or int(block[1]) >= len(config.depths) or int(block[2]) < config.depths[int(block[1])]:
                found[name] = value
        return found


class PatchExpanding(nn.Module):
    """Expands each position to several, (B, C, H, W) -> (B, hidden / factor^2, factor H, factor W).

    Args:
        channels: C.
        hidden: width of the projection: the channels of all positions that one position becomes.
        factor: upsampling factor along each axis.
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
