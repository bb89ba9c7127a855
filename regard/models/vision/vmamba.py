"""VMamba: a pyramid whose token mixer scans the map along its rows and columns, forward and reversed (SS2D).

Liu et al., arXiv 2401.10166. A block, where SS2D is the layer of the mechanism ``bidirectional_mamba``:

    X <- X + DropPath(SS2D(LN(X))),   X <- X + DropPath(W_2 gelu(W_1 LN(X)))

The code has several versions of SS2D and of the network around it:

| `version` | SS2D | patches | between stages |
|---|---|---|---|
| ``v05_noz`` | one state per channel, no gate, convolution without bias | two 3 x 3 of stride 2 | 3 x 3 of stride 2 |
| ``v0`` | 16 states, gated by silu(z) | 4 x 4 | patch merging (2 x 2 to one) |

Images of any size are accepted, by ``v0`` in multiples of 4; patch merging pads odd sides with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import Context, at_least, one_of
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.feed_forward import MLP
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.layers.residual import add_feed_forward
from regard.models.vision.backbone import BackboneConfig, Level, Pyramid, check_stages, map_of
from regard.models.vision.blocks import Blocks

if TYPE_CHECKING:
    from jaxtyping import Float

VERSIONS: dict[str, dict[str, Any]] = {"v05_noz": {"gate": False, "d_state": 1, "conv_bias": False}, "v0": {}}
"""Options of the mechanism in each version, on top of those of its alias ``ss2d``."""


@dataclass(frozen=True, kw_only=True)
class VMambaConfig(BackboneConfig):
    """The configuration of a :class:`VMamba`.

    Attributes:
        widths, depths: channels and blocks of each stage.
        version: see the table.
        expand: inner width of SS2D as a multiple of the channels.
        mlp_ratio: hidden width of the feed-forward networks as a multiple of the channels; 0 for none.
        mixer: further options of the mechanism ``bidirectional_mamba``.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    version: str = "v05_noz"
    expand: float = 1.0
    mlp_ratio: float = 4.0
    mixer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("version", self.version, tuple(VERSIONS))
        at_least("mlp_ratio", self.mlp_ratio, 0)
        check_stages(self, "widths", "depths")

    @property
    def sides(self) -> tuple[int, int]:
        return (4, 4) if self.version == "v0" else super().sides


class VMamba(Pyramid):
    """VMamba, see the module; sizes ``vmamba_t`` (code: s1l8), ``vmamba_s``, ``vmamba_b`` (s2l15), ``vmamba_t_v0``."""

    Config = VMambaConfig
    scales: ClassVar = {"widths": 4}
    sizes: ClassVar = {
        "vmamba_nano": {"image_size": 32, "widths": (32, 64, 128), "depths": (1, 2, 1)},
        "vmamba_t": {"drop_path": 0.2},
        "vmamba_s": {"depths": (2, 2, 15, 2), "expand": 2.0, "drop_path": 0.3},
        "vmamba_b": {"widths": (128, 256, 512, 1024), "depths": (2, 2, 15, 2), "expand": 2.0, "drop_path": 0.6},
        "vmamba_t_v0": {"depths": (2, 2, 9, 2), "version": "v0", "expand": 2.0, "mlp_ratio": 0.0, "drop_path": 0.2},
    }

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        options = {**VERSIONS[config.version], "expand": config.expand, **(config.mixer or {})}
        self.stages, levels = nn.ModuleList(), []
        before = config.channels
        for number, width in enumerate(config.widths):
            hidden = round(config.mlp_ratio * width)
            blocks = [Block(width, hidden, options, rate) for rate in rates[number]]
            self.stages.append(Stage(_reduction(config.version, number == 0, before, width), blocks))
            levels.append(Level(width, 4 * 2**number))
            before = width
        self.levels = levels
        self.norm = LayerNorm(before)
        self.apply(initialise)
        self.make_head(before)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return self.norm(tokens_of(features)).mean(1)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: VMambaConfig) -> dict[str, Tensor]:
        """Translate weights of MzeroMiko/VMamba (`classification/models/vmamba.py`), under old or new names."""
        stem = "" if config.version == "v0" else ".0"
        names = (
            (r"^patch_embed\.(0|proj)\.", rf"stages.0.embedding{stem}.conv."),
            (r"^patch_embed\.(2|norm)\.", rf"stages.0.embedding{stem}.norm."),
            (r"^patch_embed\.5\.", r"stages.0.embedding.2.conv."),
            (r"^patch_embed\.7\.", r"stages.0.embedding.2.norm."),
            (r"^layers\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.embedding.conv."),
            (r"^layers\.(\d+)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.embedding.norm."),
            (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.embedding."),
            (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
            (r"^classifier\.", ""),
        )
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            found |= translate_block(name, value)
        return found


def translate_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """Rename a tensor of a block of the official code (after ``blocks.N.``); other tensors are kept as they are."""
    for pattern, replacement in (
        (r"(\.blocks\.\d+)\.(norm|ln_1)\.", r"\1.norm1."),
        (r"(\.blocks\.\d+)\.(op|self_attention)\.", r"\1.mixer."),
        (r"\.mixer\.conv2d\.", r".mixer.grid_conv."),
        (r"\.mixer\.out_norm\.", r".mixer.norm."),
        (r"\.mixer\.dt_projs_bias$", r".mixer.dt_bias"),
        (r"\.mlp\.fc1\.", r".mlp.up."),
        (r"\.mlp\.fc2\.", r".mlp.down."),
    ):
        name = re.sub(pattern, replacement, name)
    for each, own in (("x_proj_weight", "x_proj"), ("dt_projs_weight", "dt_proj")):
        if name.endswith(each):
            return {f"{name.removesuffix(each)}{own}.{p}.weight": matrix for p, matrix in enumerate(value)}
    if name.endswith((".A_logs", ".Ds")):  # the official code joins the channels of the four paths
        return {name[:-1]: value.unflatten(0, (4, -1))}
    if value.ndim == 4 and ".blocks." in name:
        value = value.flatten(1)  # depthwise filters, and projections that were 1 x 1 convolutions
    return {name: value}


class Stage(nn.Module):
    """A downsampling, then blocks: (B, C, H, W) -> (B, width, H / s, W / s).

    Args:
        embedding: the downsampling.
        blocks: blocks of `width` channels.
    """

    def __init__(self, embedding: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = embedding, Blocks(blocks)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.embedding(x)
        for block in self.blocks:
            x = self.blocks.run(block, x)
        return x


class Block(nn.Module):
    """SS2D and, if `hidden` > 0, a feed-forward network; (B, C, H, W) -> (B, C, H, W).

    Args:
        width: number of channels.
        hidden: hidden width of the feed-forward network; 0 for none.
        options: options of the mechanism, which override those of its alias ``ss2d``.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, width: int, hidden: int, options: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        chosen = {**get_mechanism("bidirectional_mamba").alias_options["ss2d"], "axes": 2, **options}
        self.mixer = create_layer("bidirectional_mamba", width, 1, pattern="noncausal-self", **chosen)
        self.norm2 = LayerNorm(width) if hidden else None
        self.mlp = MLP(width, hidden, bias=True) if hidden else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        grid = (x.shape[2], x.shape[3])
        tokens = tokens_of(x)
        tokens = tokens + self.drop_path(self.mixer(self.norm1(tokens), context=Context(grid=grid)).output)
        if self.norm2 is not None and self.mlp is not None:
            tokens = add_feed_forward(tokens, self.norm2, self.mlp, self.drop_path)
        return map_of(tokens, grid)


class ConvNorm(nn.Module):
    """A convolution and a norm over the channels, (B, C, H, W) -> (B, width, H / stride, W / stride).

    Args:
        channels, width: channels before and after.
        side, stride: kernel size and stride.
        border: zero padding; when None, 1 for a kernel size of 3 and 0 otherwise.
    """

    def __init__(self, channels: int, width: int, side: int, stride: int, border: int | None = None) -> None:
        super().__init__()
        border = int(side == 3) if border is None else border
        self.conv = nn.Conv2d(channels, width, side, stride, border)
        self.norm = LayerNorm(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.conv(x)
        return map_of(self.norm(tokens_of(y)), (y.shape[2], y.shape[3]))


class PatchMerging(nn.Module):
    """Merges 2 x 2 neighbours into one, (B, C, H, W) -> (B, width, H / 2, W / 2); odd sides are padded with zeros.

    Args:
        channels, width: channels before and after.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * channels)
        self.reduction = make_linear(4 * channels, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        parts = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        return map_of(self.reduction(self.norm(tokens_of(parts))), (parts.shape[2], parts.shape[3]))


def _reduction(version: str, first: bool, channels: int, width: int) -> nn.Module:
    if version == "v0":
        return ConvNorm(channels, width, 4, 4) if first else PatchMerging(channels, width)
    if first:
        return nn.Sequential(ConvNorm(channels, width // 2, 3, 2), nn.GELU(), ConvNorm(width // 2, width, 3, 2))
    return ConvNorm(channels, width, 3, 2)


def initialise(module: nn.Module) -> None:
    """Initialise projections from a truncated normal distribution; those inside the scans keep Mamba's own."""
    outer: list[nn.Module] = []
    if isinstance(module, Block):
        outer = [module.mixer.in_proj, module.mixer.out_proj]
        outer += [] if module.mlp is None else [module.mlp.up, module.mlp.down]
    elif isinstance(module, PatchMerging):
        outer = [module.reduction]
    for linear in outer:
        if isinstance(linear, nn.Linear):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
