"""The Visual Attention Network: a convolutional pyramid whose token mixer is large kernel attention.

Guo et al., arXiv 2202.09741. A block, where Attn is the layer of the mechanism ``large_kernel``:

    X <- X + DropPath(gamma_1 * Attn(BN(X))),   X <- X + DropPath(gamma_2 * FF(BN(X)))
    FF(X) = W_2 gelu(DW3x3(W_1 X))

Attn has a residual connection of its own, so gamma_1 BN(X) passes even if its attention is zero. Stages begin with an
overlapping patch embedding (stride 4, then 2) and end with a LayerNorm. Any height and width are accepted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm, LayerScale
from regard.models.vision.backbone import BackboneConfig, Level, Pyramid, check_stages, map_of
from regard.models.vision.blocks import Blocks
from regard.models.vision.patch_tokens import initialise_convolution

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class VANConfig(BackboneConfig):
    """The configuration of a :class:`VAN`.

    Attributes:
        widths, depths, expansions: channels, blocks, and expansion factor of the feed-forward networks of each stage.
        strides: downsampling factor of each stage.
        attention: options of the mechanism ``large_kernel``.
        scale: initial LayerScale of both branches of a block.
        branch_dropout: dropout probability inside the feed-forward networks.
    """

    widths: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    expansions: tuple[int, ...] = (8, 8, 4, 4)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    attention: Mapping[str, Any] | None = None
    scale: float = 1e-2
    branch_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self, "widths", "depths", "expansions", "strides")


class VAN(Pyramid):
    """VAN, see the module. ``van_b0`` to ``van_b6`` are the paper's; ``van_nano`` is for images of about 32 pixels."""

    Config = VANConfig
    scales: ClassVar = {"widths": 4}
    sizes: ClassVar = {
        "van_nano": {
            "image_size": 32,
            "widths": (32, 64, 128),
            "depths": (1, 2, 1),
            "expansions": (4, 4, 4),
            "strides": (2, 2, 2),
            "attention": {"kernel": 14, "dilation": 3},
        },
        "van_b0": {"widths": (32, 64, 160, 256), "depths": (3, 3, 5, 2), "drop_path": 0.1},
        "van_b1": {"widths": (64, 128, 320, 512), "depths": (2, 2, 4, 2), "drop_path": 0.1},
        "van_b2": {"widths": (64, 128, 320, 512), "depths": (3, 3, 12, 3), "drop_path": 0.1},
        "van_b3": {"widths": (64, 128, 320, 512), "depths": (3, 5, 27, 3), "drop_path": 0.2},
        "van_b4": {"widths": (64, 128, 320, 512), "depths": (3, 6, 40, 3), "drop_path": 0.2},
        "van_b5": {"widths": (96, 192, 480, 768), "depths": (3, 3, 24, 3), "drop_path": 0.2},
        "van_b6": {"widths": (96, 192, 384, 768), "depths": (6, 6, 90, 6), "drop_path": 0.3},
    }

    def __init__(self, config: VANConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList()
        channels, pixels, levels = config.channels, 1, []
        shapes = zip(config.widths, config.expansions, config.strides, rates, strict=True)
        for number, (width, expansion, stride, probabilities) in enumerate(shapes):
            kernel = 7 if number == 0 else 3
            embedding = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
            blocks = [Block(width, expansion * width, config, probability) for probability in probabilities]
            self.stages.append(Stage(embedding, blocks, width))
            channels, pixels = width, pixels * stride
            levels.append(Level(width, pixels))
        self.levels = levels
        self.apply(_initialise)
        self.make_head(channels)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return features.mean((2, 3))

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: VANConfig) -> dict[str, Tensor]:
        """Translate weights of Visual-Attention-Network/VAN-Classification (`models/van.py`)."""
        names = (
            (r"^patch_embed(\d+)\.proj", lambda m: f"stages.{int(m[1]) - 1}.embedding"),
            (r"^patch_embed(\d+)\.norm", lambda m: f"stages.{int(m[1]) - 1}.embedding_norm"),
            (r"^block(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"^norm(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
            (r"\.attn\.proj_1\.", r".attention.input_proj."),
            (r"\.attn\.proj_2\.", r".attention.output_proj."),
            (r"\.attn\.spatial_gating_unit\.conv0\.", r".attention.weights.depthwise."),
            (r"\.attn\.spatial_gating_unit\.conv_spatial\.", r".attention.weights.dilated."),
            (r"\.attn\.spatial_gating_unit\.conv1\.", r".attention.weights.pointwise."),
            (r"(\.attention\.weights\.\w+)\.weight$", r"\1"),
            (r"(\.attention\.weights\.\w+)\.bias$", r"\1_bias"),
            (r"\.layer_scale_(\d)$", r".scale\1.factors"),
            (r"\.mlp\.fc1\.", r".mlp.up."),
            (r"\.mlp\.fc2\.", r".mlp.down."),
            (r"\.mlp\.dwconv\.dwconv\.", r".mlp.depthwise."),
        )
        found = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".attention.weights.depthwise" in name or ".attention.weights.dilated" in name:
                value = value.flatten(1) if value.ndim > 1 else value
            elif value.ndim == 4 and ".embedding" not in name and ".depthwise" not in name:
                value = value.flatten(1)  # 1 x 1 convolutions are projections of tokens here
            found[name] = value
        return found


class Stage(nn.Module):
    """An overlapping patch embedding, blocks, and a norm over the channels: (B, C, H, W) -> (B, width, H / s, W / s).

    Args:
        embedding: the convolution of the patch embedding.
        blocks: blocks of `width` channels.
        width: number of channels.
    """

    def __init__(self, embedding: nn.Conv2d, blocks: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.embedding, self.embedding_norm = embedding, nn.BatchNorm2d(width)
        self.blocks = Blocks(blocks)
        self.norm = LayerNorm(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.embedding_norm(self.embedding(x))
        for block in self.blocks:
            x = self.blocks.run(block, x)
        return map_of(self.norm(tokens_of(x)), x.shape[2:])


class Block(nn.Module):
    """Large kernel attention and a convolutional feed-forward network, (B, C, H, W) -> (B, C, H, W).

    Args:
        width: number of channels.
        hidden: hidden width of the feed-forward network.
        config: the backbone's config.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, width: int, hidden: int, config: VANConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.attention = create_layer("large_kernel", width, 1, pattern="noncausal-self", **(config.attention or {}))
        self.mlp = ConvolutionalMLP(width, hidden, config.branch_dropout)
        self.scale1, self.scale2 = LayerScale(width, config.scale), LayerScale(width, config.scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        grid = tuple(x.shape[2:])
        mixed = self.attention(tokens_of(self.norm1(x)), context=Context(grid=grid)).output
        x = x + self.drop_path(map_of(self.scale1(mixed), grid))
        return x + self.drop_path(map_of(self.scale2(self.mlp(tokens_of(self.norm2(x)), grid)), grid))


class ConvolutionalMLP(nn.Module):
    """W_2 gelu(DW3x3(W_1 x)) of tokens on a grid.

    Args:
        width, hidden: width of the tokens and hidden width.
        dropout: dropout probability after the activation and at the end.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = make_linear(width, hidden, bias=True), make_linear(hidden, width, bias=True)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        hidden = F.gelu(tokens_of(self.depthwise(map_of(self.up(x), grid))))
        return self.dropout(self.down(self.dropout(hidden)))


def _initialise(module: nn.Module) -> None:
    initialise_convolution(module)
    if isinstance(module, ConvolutionalMLP):
        for linear in (module.up, module.down):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=math.sqrt(2 / linear.out_features))
            nn.init.zeros_(linear.bias)
