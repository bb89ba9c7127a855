"""The CSWin Transformer, and Agent-CSwin.

Dong et al., arXiv 2107.00652; Han et al., arXiv 2312.08874. Four stages, each at half the resolution of the one before.
A stage is an overlapping convolution (7 x 7 with stride 4, then 3 x 3 with stride 2) with a norm, followed by pre-norm
blocks

    x <- x + DropPath(attend(LN(x))),   x <- x + DropPath(W_2 gelu(W_1 LN(x)))

``attend`` is given by the `plan`, which has an entry for each block. ``softmax`` is CSWin's attention: half of the
heads attend within vertical stripes of the map, half within horizontal stripes, and a 3 x 3 depthwise convolution of
the values inside each stripe is added (LePE); in the last stage all heads attend to the whole map. Other mechanisms
attend to the whole map: Agent-CSwin has agent attention with 9 and 16 agents in the first two stages, and stripes in
the rest. The head reads the mean of the normed last map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.contract import Context, Pattern, Result, Unsupported, at_least
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.layers.drop_path import drop_path_rates
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.models.vision.backbone import Level, map_of
from regard.models.vision.patch_tokens import (
    agent_table,
    fit_tables,
    from_windows,
    initialise_linear,
    options_on,
    to_windows,
)
from regard.models.vision.pyramid import PlannedBlock, PlannedConfig, PyramidWithLosses, Stage, agents_first
from regard.models.vision.vmamba import ConvNorm

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class CSWinConfig(PlannedConfig):
    """The configuration of a :class:`CSWin`.

    Attributes:
        widths, depths, heads: channels, blocks and heads of each stage; the number of heads must be even in stages with
            stripes.
        patch: stride of the first convolution, whose kernel is 2 patch - 1 pixels wide.
        stripes: width of the stripes of each stage except the last; 0 for the sides of the last map, which are 7 for
            images of 224 pixels.
        plan, expansion, branch_dropout: as for :class:`regard.models.vision.pyramid.PlannedConfig`.
    """

    told: ClassVar = "a CSWin Transformer"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 2, 21, 1)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    stripes: tuple[int, ...] = (1, 2, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.widths) - 1
        if len(self.stripes) != count:
            raise Unsupported(f"stripes={self.stripes} of {count + 1} stages", supported=f"{count} numbers")
        at_least("the least of stripes", min(self.stripes, default=1), 0)

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        for number, (stride, entries) in enumerate(zip(self.strides, self.stages(), strict=True)):
            stripes, grid = self.stripes_of(number), (height // stride, width // stride)
            if stripes is None or not any(name == "softmax" for name, _ in entries):
                continue
            if grid[0] % stripes[0] or grid[1] % stripes[1]:
                raise Unsupported(
                    f"images of {height} x {width} pixels, whose map of {grid[0]} x {grid[1]} is not filled by whole stripes",
                    supported=f"maps that stripes of {stripes[0]} rows and of {stripes[1]} columns fill",
                    nearest=f"image_size=({height}, {width}) and stripes={self._stripes_for(height, width)}",
                )

    def _stripes_for(self, height: int, width: int) -> tuple[int, ...]:
        """Return `stripes` for images of another size: those that do not fill their maps become 0."""
        stages = zip(self.stripes, self.strides, strict=False)
        return tuple(0 if side and (height // at % side or width // at % side) else side for side, at in stages)

    def stripes_of(self, number: int) -> tuple[int, int] | None:
        """Rows of a stage's horizontal stripes and columns of its vertical ones; None if heads see the whole map."""
        if number == len(self.widths) - 1:
            return None
        grid = tuple(side // self.strides[number] for side in self.size)
        wanted = self.stripes[number]
        rows, columns = (wanted or max(1, side // self.strides[-1]) for side in self.size)
        return None if (rows, columns) == grid else (rows, columns)


def _agents(depths: tuple[int, ...], numbers: tuple[int, ...]) -> dict[str, Any]:
    return {"depths": depths, "plan": agents_first(depths, sum(depths), numbers)}


WIDE: dict[str, Any] = {"widths": (96, 192, 384, 768), "heads": (4, 8, 16, 32), "drop_path": 0.5}
NANO: dict[str, Any] = {
    "image_size": 32,
    "widths": (32, 64, 128),
    "depths": (1, 2, 1),
    "heads": (2, 4, 8),
    "patch": 2,
    "stripes": (1, 2),
}
"""Preset for images of about 32 pixels."""


class CSWin(PyramidWithLosses):
    """The CSWin Transformer, see the module; sizes ``cswin_t`` to ``_b`` and ``agent_cswin_t`` to ``_b``.

    ``cswin_nano`` and ``agent_cswin_nano`` are for images of about 32 pixels.
    """

    Config = CSWinConfig
    scales: ClassVar = {"widths": "heads"}
    config: CSWinConfig
    sizes: ClassVar = {
        "cswin_nano": NANO,
        "agent_cswin_nano": {**NANO, **_agents((1, 2, 1), (4, 4))},
        "cswin_t": {"drop_path": 0.2},
        "cswin_s": {"depths": (2, 4, 32, 2), "drop_path": 0.4},
        "cswin_b": {**WIDE, "depths": (2, 4, 32, 2)},
        "agent_cswin_t": {**_agents((2, 4, 18, 1), (9, 16)), "drop_path": 0.2},
        "agent_cswin_s": {**_agents((3, 6, 29, 2), (9, 16)), "drop_path": 0.4},
        "agent_cswin_b": {**WIDE, **_agents((3, 6, 29, 2), (9, 16))},
    }

    def __init__(self, config: CSWinConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList()
        channels = config.channels
        for number, (width, entries) in enumerate(zip(config.widths, config.stages(), strict=True)):
            patch = config.patch
            first = (2 * patch - 1, patch, patch // 2)
            embedding = ConvNorm(channels, width, *((3, 2, 1) if number else first))
            each = zip(entries, rates[number], strict=True)
            self.stages.append(Stage(embedding, [Block(entry, config, number, rate) for entry, rate in each]))
            channels = width
        self.levels = [Level(*level) for level in zip(config.widths, config.strides, strict=True)]
        self.norm = LayerNorm(channels)
        self.apply(initialise_linear)
        self.make_head(channels)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return self.norm(tokens_of(features)).mean(1)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: CSWinConfig) -> dict[str, Tensor]:
        """Translate weights of microsoft/CSWin-Transformer (`cswin.py`) or Agent-Attention (`agent_cswin.py`).

        Tables of agent biases are interpolated if the images had another size.
        """
        names = (
            (r"^stage1_conv_embed\.0\.", "stages.0.embedding.conv."),
            (r"^stage1_conv_embed\.2\.", "stages.0.embedding.norm."),
            (r"^merge(\d+)\.", r"stages.\1.embedding."),
            (r"^stage(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"\.attns\.(\d+)\.get_v\.", r".attention.convolutions.\1."),
            (r"\.attns\.0\.(\w\w_bias)$", r".attention.\1"),
            (r"\.proj\.", ".attention.output."),
            (r"\.mlp\.fc1\.", ".mlp.up."),
            (r"\.mlp\.fc2\.", ".mlp.down."),
        )
        with torch.device("meta"):
            own = cls(config).state_dict()
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".qkv." in name:
                for part, target in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                    found[name.replace(".qkv.", f".attention.{target}.")] = part
                continue
            whole = name.replace(".attention.convolutions.0.", ".attention.merge.convolution.")
            name, value = agent_table(whole if whole in own else name, value)
            found[name] = value
        return fit_tables(found, own, {}, "bicubic")


class Block(PlannedBlock):
    """Attention within stripes or over the whole map, and a feed-forward network.

    Args:
        entry: mechanism and options.
        config: the backbone's config.
        number: index of the stage.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(
        self, entry: tuple[str, Mapping[str, Any]], config: CSWinConfig, number: int, drop_path: float
    ) -> None:
        width, heads, stride = config.widths[number], config.heads[number], config.strides[number]
        attention: nn.Module
        if entry[0] == "softmax":
            if entry[1]:
                raise Unsupported(f"softmax with {dict(entry[1])} in stripes", supported="no options")
            attention = StripeAttention(width, heads, config.stripes_of(number))
        else:
            options = options_on(entry, (config.size[0] // stride, config.size[1] // stride), bias=True)
            attention = create_layer(entry[0], width, heads, pattern=Pattern.NONCAUSAL_SELF, **options)
        super().__init__(config, number, attention, drop_path)


class StripeAttention(nn.Module):
    """Softmax attention within stripes: vertical ones for the first half of the heads, horizontal ones for the second.

    Without `stripes` all heads attend to the whole map. A 3 x 3 depthwise convolution of the values inside each stripe
    is added.

    Args:
        width: C of the tokens (B, N, C).
        heads: number of heads, both halves together.
        stripes: rows of the horizontal stripes and columns of the vertical ones; None for the whole map.

    Raises:
        Unsupported: for an odd number of heads with stripes.
    """

    def __init__(self, width: int, heads: int, stripes: tuple[int, int] | None) -> None:
        super().__init__()
        self.stripes, parts = stripes, 1 if stripes is None else 2
        if heads % parts or width % heads:
            raise Unsupported(
                f"{heads} heads of {width} channels, half of them in stripes down and half in stripes across",
                supported="an even number that divides the channels",
            )
        self.head_dim, part = width // heads, width // parts
        self.query, self.key, self.value, self.output = (make_linear(width, width, bias=True) for _ in range(4))
        self.convolutions = nn.ModuleList(nn.Conv2d(part, part, 3, padding=1, groups=part) for _ in range(parts))

    def forward(self, x: Float[Tensor, "b n c"], *, context: Context) -> Result:
        """Attend among tokens (B, N, C); the context must have the grid."""
        assert context.grid is not None
        grid = context.grid[0], context.grid[1]
        shapes = [grid] if self.stripes is None else [(grid[0], self.stripes[1]), (self.stripes[0], grid[1])]
        maps = (project(x).unflatten(1, grid).chunk(len(shapes), -1) for project in (self.query, self.key, self.value))
        mixed = [
            from_windows(self._mix([to_windows(each, sides) for each in part], convolution, sides), sides, grid)
            for part, convolution, sides in zip(zip(*maps, strict=True), self.convolutions, shapes, strict=True)
        ]
        return Result(self.output(torch.cat(mixed, -1).flatten(1, 2)))

    def _mix(
        self, tensors: list[Float[Tensor, "windows n c"]], convolution: nn.Module, sides: tuple[int, int]
    ) -> Float[Tensor, "windows n c"]:
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in tensors)
        o = softmax_attention(q, k, v, pattern=Pattern.NONCAUSAL_SELF)
        return o.transpose(1, 2).flatten(2) + tokens_of(convolution(map_of(tensors[2], sides)))
