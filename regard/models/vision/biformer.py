"""BiFormer: an image pyramid whose blocks route each region to the few regions that it attends to.

Zhu et al., arXiv 2303.08810. A block, where BRA is the layer of the mechanism ``bilevel_routing``:

    X <- X + DWConv3x3(X),   X <- X + DropPath(BRA(LN(X))),   X <- X + DropPath(MLP(LN(X)))

Stages route to `top` of at most windows^2 regions. If `top` is 0, every token attends to all tokens, as in the released
models at stride 32: with 8 heads, scores scaled by the head width, no biases of queries, keys and values, and a local
convolution of the layer's input. The layout ``swin``, from the paper's ablations, has non-overlapping patch embeddings
between stages and no 3 x 3 convolutions in blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract import Context, Unsupported, at_least, one_of
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.feed_forward import MLP
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.layers.residual import add_feed_forward
from regard.models.vision.backbone import BackboneConfig, Level, Pyramid, check_stages, map_of
from regard.models.vision.blocks import Blocks
from regard.models.vision.patch_tokens import initialise_linear

if TYPE_CHECKING:
    from jaxtyping import Float

FULL_HEADS = 8
"""Number of heads of blocks that attend to all tokens, at any width."""


@dataclass(frozen=True, kw_only=True)
class BiFormerConfig(BackboneConfig):
    """The configuration of a :class:`BiFormer`.

    Attributes:
        widths, depths: channels and blocks of each stage.
        top: number of regions that a region attends to, for each stage; 0 for all tokens.
        windows: maximum number of regions along each side.
        head_dim: width of a head in stages that route, a divisor of their widths.
        lce: kernel size of the convolution that is added to the attention output; 0 for none.
        attention: other options of the mechanism ``bilevel_routing`` in stages that route.
        expansion: hidden width of the feed-forward network, as a multiple of the channels.
        layout: ``biformer`` or ``swin``.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    top: tuple[int, ...] = (1, 4, 16, 0)
    windows: int = 7
    head_dim: int = 32
    lce: int = 5
    attention: Mapping[str, Any] | None = None
    expansion: int = 3
    layout: str = "biformer"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("layout", self.layout, ("biformer", "swin"))
        check_stages(self, "widths", "depths")
        check_stages(self, "top", least=0)
        at_least("head_dim", self.head_dim, 1)
        for width, top in zip(self.widths, self.top, strict=True):
            heads = self.head_dim if top else FULL_HEADS
            if width % heads:
                raise Unsupported(f"a width of {width} with top={top}", supported=f"multiples of {heads}")

    @property
    def sides(self) -> tuple[int, int]:
        return (4 << (len(self.widths) - 1), 1) if self.layout == "swin" else super().sides


class BiFormer(Pyramid):
    """BiFormer, see the module; sizes ``biformer_t``, ``biformer_s``, ``biformer_b`` and ``biformer_stl``."""

    Config = BiFormerConfig
    scales: ClassVar = {"widths": 2, "head_dim": 2}
    sizes: ClassVar = {
        "biformer_nano": {
            "image_size": 32,
            "widths": (32, 64, 128),
            "depths": (1, 2, 1),
            "top": (4, 4, 0),
            "windows": 4,
        },
        "biformer_t": {"drop_path": 0.1},
        "biformer_s": {"depths": (4, 4, 18, 4), "drop_path": 0.15},
        "biformer_b": {"widths": (96, 192, 384, 768), "depths": (4, 4, 18, 4), "drop_path": 0.1},
        "biformer_stl": {
            "widths": (96, 192, 384, 768),
            "depths": (2, 2, 6, 2),
            "expansion": 4,
            "layout": "swin",
            "drop_path": 0.1,
        },
    }

    def __init__(self, config: BiFormerConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList()
        channels, levels = config.channels, []
        for number, (width, top) in enumerate(zip(config.widths, config.top, strict=True)):
            blocks = [Block(width, top, config, rate) for rate in rates[number]]
            self.stages.append(Stage(_embedding(config.layout, number, channels, width), blocks))
            levels.append(Level(width, 4 << number))
            channels = width
        self.levels = levels
        self.norm = nn.BatchNorm2d(channels)
        self.apply(initialise_linear)
        self.make_head(channels)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return self.norm(features).mean((2, 3))

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: BiFormerConfig) -> dict[str, Tensor]:
        """Translate weights of rayleizhu/BiFormer (`models/biformer.py` and `models/biformer_stl.py`)."""
        names = (
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.embedding."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.pos_embed\.", ".position."),
            (r"\.attn\.qkv\.(qkv\.)?", ".attention.qkv."),
            (r"\.attn\.(wo|proj)\.", ".attention.output."),
            (r"\.attn\.lepe\.", ".attention.merge.convolution."),
            (r"\.mlp\.0\.", ".mlp.up."),
            (r"\.mlp\.[23]\.", ".mlp.down."),
        )
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".attention.qkv." in name:
                parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
                found |= {name.replace(".qkv.", f".{part}."): piece for part, piece in parts}
            else:
                found[name] = value
        return found


class Stage(nn.Module):
    """A patch embedding, then blocks: (B, C, H, W) -> (B, width, H / s, W / s).

    Args:
        embedding: convolutions and norms.
        blocks: blocks of the stage's width.
    """

    def __init__(self, embedding: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = embedding, Blocks(blocks)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.embedding(x)
        for block in self.blocks:
            x = self.blocks.run(block, x)
        return x


def _embedding(layout: str, number: int, channels: int, width: int) -> nn.Module:
    """Create a stage's patch embedding: stride 4 in the first stage, 2 in the others."""
    if layout == "swin":
        if number == 0:
            return nn.Sequential(nn.Conv2d(channels, width, 4, 4), nn.BatchNorm2d(width))
        return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 2, 2))
    if number == 0:
        half = width // 2
        first = (nn.Conv2d(channels, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU())
        return nn.Sequential(*first, nn.Conv2d(half, width, 3, 2, 1), nn.BatchNorm2d(width))
    return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width))


class Block(nn.Module):
    """Bi-level routing attention and a feed-forward network, (B, C, H, W) -> (B, C, H, W).

    Args:
        width: number of channels.
        top: number of regions that a region attends to; 0 for all tokens.
        config: the backbone's config.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, width: int, top: int, config: BiFormerConfig, drop_path: float) -> None:
        super().__init__()
        plain = config.layout == "swin"
        self.position = None if plain else nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1, self.norm2 = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        options: dict[str, Any] = {"windows": 1, "top": 1, "scale_by": "head_dim", "lce_of": "input"}
        if top:
            options = {"windows": config.windows, "top": top, "bias": True} | dict(config.attention or {})
        heads = width // config.head_dim if top else FULL_HEADS
        self.attention = create_layer(
            "bilevel_routing", width, heads, pattern="noncausal-self", lce=config.lce, **options
        )
        if not top:
            self.attention.output = make_linear(width, width, bias=True)
        self.mlp = MLP(width, config.expansion * width, bias=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = x if self.position is None else x + self.position(x)
        grid, tokens = tuple(x.shape[2:]), tokens_of(x)
        mixed = self.attention(self.norm1(tokens), context=Context(grid=grid)).output
        tokens = tokens + self.drop_path(mixed)
        return map_of(add_feed_forward(tokens, self.norm2, self.mlp, self.drop_path), grid)
