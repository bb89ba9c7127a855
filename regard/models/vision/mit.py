r"""The mix transformer (MiT), the encoder of SegFormer.

Xie et al., arXiv 2105.15203. Four stages, each at half the resolution of the one before. A stage is an overlapping
convolution (7 x 7 with stride 4, then 3 x 3 with stride 2) with a norm, blocks

    x <- x + DropPath(attend(LN(x))),   x <- x + DropPath(W_2 gelu(DW3x3(W_1 LN(x))))

and a norm. ``attend`` is that of PVT (:mod:`regard.models.vision.agent_pvt`), with reductions 8, 4, 2, 1. There are no
position embeddings, since the convolutions convey positions, and no class token. The head reads the mean of the last
map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract import Loss, Result, Unsupported
from regard.core.grids import tokens_of
from regard.layers.norms import LayerNorm
from regard.models.losses import add_losses
from regard.models.vision import agent_pvt
from regard.models.vision.blocks import Blocks
from regard.models.vision.patch_tokens import initialise_convolution
from regard.models.vision.van import ConvolutionalMLP

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class MiTConfig(agent_pvt.PVTConfig):
    """The configuration of a :class:`MiT`: that of :class:`regard.models.vision.agent_pvt.PVT`, without a class token.

    Attributes:
        patch: stride of the first convolution, whose kernel is 2 patch - 1 pixels wide.
    """

    widths: tuple[int, ...] = (32, 64, 160, 256)
    expansions: tuple[int, ...] = (4, 4, 4, 4)
    class_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_token:
            raise Unsupported("class_token=True in a mix transformer", supported="class_token=False")


_LARGE = (64, 128, 320, 512)
SIZES: dict[str, dict[str, Any]] = {
    "b0": {},
    "b1": {"widths": _LARGE},
    "b2": {"widths": _LARGE, "depths": (3, 4, 6, 3)},
}
NANO = agent_pvt.NANO
"""Preset for images of about 32 pixels."""


class MiT(agent_pvt.PVT):
    """The mix transformer, see the module; sizes ``mit_b0`` to ``mit_b2`` and ``mit_nano``."""

    Config = MiTConfig
    sizes: ClassVar = {
        "mit_nano": NANO,
        **{f"mit_{size}": {"drop_path": 0.1, **options} for size, options in SIZES.items()},
    }

    def make_head(self, features: int) -> None:
        self.apply(initialise_convolution)
        super().make_head(features)

    def make_stage(self, config: agent_pvt.PVTConfig, number: int, channels: int, rates: list[float]) -> nn.Module:
        return Stage(config, number, channels, rates)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: agent_pvt.PVTConfig) -> dict[str, Tensor]:
        """Translate weights of NVlabs/SegFormer (`mix_transformer.py`) or transformers, before and since version 5."""
        names = (
            (r"^(segformer\.)?encoder\.", ""),
            (r"^segformer\.", ""),
            (r"^(stages\.\d+)\.patch_embeddings\.proj\.", r"\1.embedding."),
            (r"^(stages\.\d+)\.patch_embeddings\.layer_norm\.", r"\1.embedding_norm."),
            (r"^(stages\.\d+)\.layer_norm\.", r"\1.norm."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.q_proj\.", ".attention.query."),
            (r"\.attention\.k_proj\.", ".attention.key."),
            (r"\.attention\.v_proj\.", ".attention.value."),
            (r"\.attention\.o_proj\.", ".attention.output."),
            (r"\.attention\.sequence_reduction\.sequence_reduction\.", ".reduction."),
            (r"\.attention\.sequence_reduction\.layer_norm\.", ".reduction_norm."),
            (r"^patch_embeddings\.(\d+)\.proj\.", r"stages.\1.embedding."),
            (r"^patch_embeddings\.(\d+)\.layer_norm\.", r"stages.\1.embedding_norm."),
            (r"^patch_embed(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.embedding."),
            (r"^patch_embed(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.embedding_norm."),
            (r"^block\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"^block(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"^layer_norm\.(\d+)\.", r"stages.\1.norm."),
            (r"^norm(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
            (r"\.layer_norm_(\d)\.", r".norm\1."),
            (r"\.attention\.self\.(query|key|value)\.", r".attention.\1."),
            (r"\.attn\.q\.", ".attention.query."),
            (r"\.(attention\.output\.dense|attn\.proj)\.", ".attention.output."),
            (r"\.(attention\.self|attn)\.sr\.", ".reduction."),
            (r"\.(attention\.self\.layer_norm|attn\.norm)\.", ".reduction_norm."),
            (r"\.mlp\.(dense1|fc1)\.", ".mlp.up."),
            (r"\.mlp\.(dense2|fc2)\.", ".mlp.down."),
            (r"\.mlp\.dwconv\.dwconv\.", ".mlp.depthwise."),
            (r"^classifier\.", "head."),
        )
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".attn.kv." in name:
                for part, own in zip(value.chunk(2), ("key", "value"), strict=True):
                    found[name.replace(".attn.kv.", f".attention.{own}.")] = part
                continue
            found[name] = value
        return found


class Stage(nn.Module):
    """An overlapping embedding, blocks and a norm: a map (B, C, H, W) -> tokens (B, N, width) on a grid.

    Args:
        config, number, channels, rates: as for :class:`regard.models.vision.agent_pvt.Stage`.
    """

    def __init__(self, config: agent_pvt.PVTConfig, number: int, channels: int, rates: list[float]) -> None:
        super().__init__()
        width, stride = config.widths[number], 2 if number else config.patch
        kernel = 2 * stride - 1
        self.embedding, self.embedding_norm = nn.Conv2d(channels, width, kernel, stride, kernel // 2), LayerNorm(width)
        self.blocks = Blocks(Block(config, number, rate) for rate in rates)
        self.norm = LayerNorm(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c h w"], class_token: None = None) -> tuple[Result, tuple[int, int]]:
        """Return a Result with the tokens, and the rows and columns of the map."""
        x = self.embedding(x)
        height, width = x.shape[2:]
        x = self.embedding_norm(tokens_of(x))
        losses: dict[str, Loss] = {}
        for block in self.blocks:
            result = self.blocks.run(block, x, (height, width))
            add_losses(losses, result.losses)
            x = result.output
        return Result(self.norm(x), None, losses), (height, width)


class Block(agent_pvt.Block):
    """PVT's block, with a depthwise convolution in the feed-forward network."""

    def make_mlp(self, width: int, hidden: int, dropout: float) -> nn.Module:
        return ConvolutionalMLP(width, hidden, dropout)

    def feed_forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        return self.mlp(x, grid)
