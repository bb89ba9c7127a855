"""The Swin Transformer, and Agent-Swin.

Liu et al., arXiv 2103.14030; Han et al., arXiv 2312.08874. Four stages, each at half the resolution of the one before
(2 x 2 neighbours are merged into one token), of pre-norm blocks

    x <- x + DropPath(attend(LN(x))),   x <- x + DropPath(W_2 gelu(W_1 LN(x)))

``attend`` is a layer of the `plan`, which has an entry for each block. A mechanism that takes a bias for each query-key
pair, such as softmax attention, attends within windows of the map, with a learned relative position bias for each head.
In every other block of a stage the windows are shifted by half a window down and to the right; the map is shifted
cyclically, and tokens from opposite borders do not attend to each other. Other mechanisms attend to the whole map:
Agent-Swin has agent attention with 9, 16 and 49 agents in the first stages (in T the first three, in S the first two,
in B the first two and two blocks of the third) and Swin's windows in the rest. The head reads the mean of the normed
last map.
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

from regard.contract import Context, Mask, Pattern, Result, Unsupported, at_least
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.layers.drop_path import drop_path_rates
from regard.layers.norms import LayerNorm
from regard.models.layer_plan import mixing_card
from regard.models.vision.backbone import Level
from regard.models.vision.patch_tokens import (
    agent_table,
    fit_tables,
    from_windows,
    initialise_linear,
    options_on,
    to_windows,
)
from regard.models.vision.pyramid import PlannedBlock, PlannedConfig, PyramidWithLosses, Stage, agents_first
from regard.models.vision.vmamba import ConvNorm, PatchMerging

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True, kw_only=True)
class SwinConfig(PlannedConfig):
    """The configuration of a :class:`Swin`.

    Attributes:
        widths, depths, heads: channels, blocks and heads of each stage.
        patch: side of a first-stage patch in pixels.
        window: side of the windows; smaller maps are one window. When None, the windows have the sides of the last map
            (7 for images of 224 pixels), doubled until both are at least 4, so that they divide every map.
        plan, expansion, branch_dropout: as for :class:`regard.models.vision.pyramid.PlannedConfig`.
    """

    told: ClassVar = "a Swin Transformer"
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            at_least("window", self.window, 1)

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        for stride, entries in zip(self.strides, self.stages(), strict=True):
            grid, windows = (height // stride, width // stride), windows_of(self, stride)
            cut = any(side % window and side > window for side, window in zip(grid, windows, strict=True))
            if cut and any(map(reads_windows, entries)):
                raise Unsupported(
                    f"images of {height} x {width} pixels, whose map of {grid[0]} x {grid[1]} is not filled by whole windows",
                    supported=f"maps that windows of {windows[0]} x {windows[1]} fill",
                    nearest=f"image_size=({height}, {width})" + ("" if self.window is None else " and window=None"),
                )

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of the windows."""
        if self.window is not None:
            return self.window, self.window
        rows, columns = (max(1, side // self.strides[-1]) for side in self.size)
        while min(rows, columns) < 4:
            rows, columns = 2 * rows, 2 * columns
        return rows, columns


def reads_windows(entry: tuple[str, Mapping[str, Any]]) -> bool:
    """Return whether the mechanism of a plan's entry takes a bias for each query-key pair."""
    return "bias" in mixing_card(*entry).honours


def windows_of(config: SwinConfig, stride: int) -> tuple[int, int]:
    """Return the rows and columns of the windows in the stage with a stride: the config's, or the whole smaller map."""
    rows, columns = (
        min(window, max(1, side // stride)) for window, side in zip(config.windows, config.size, strict=True)
    )
    return rows, columns


AGENTS = (9, 16, 49)
"""Numbers of agents in the first stages."""

T: dict[str, Any] = {"drop_path": 0.2}
S: dict[str, Any] = {"depths": (2, 2, 18, 2), "drop_path": 0.3}
B: dict[str, Any] = {**S, "widths": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "drop_path": 0.5}
NANO: dict[str, Any] = {
    "image_size": 32,
    "widths": (32, 64, 128),
    "depths": (2, 2, 2),
    "heads": (2, 4, 8),
    "patch": 2,
}
"""Preset for images of about 32 pixels."""


class Swin(PyramidWithLosses):
    """The Swin Transformer, see the module; sizes ``swin_t`` to ``_b`` and ``agent_swin_t`` to ``_b``.

    ``swin_nano`` and ``agent_swin_nano`` are for images of about 32 pixels.
    """

    Config = SwinConfig
    scales: ClassVar = {"widths": "heads"}
    config: SwinConfig
    sizes: ClassVar = {
        "swin_nano": NANO,
        "agent_swin_nano": {**NANO, "plan": agents_first((2, 2), 6, (4, 4))},
        "swin_t": T,
        "swin_s": S,
        "swin_b": B,
        "agent_swin_t": {**T, "plan": agents_first((2, 2, 6), 12, AGENTS)},
        "agent_swin_s": {**S, "plan": agents_first((2, 2), 24, AGENTS)},
        "agent_swin_b": {**B, "plan": agents_first((2, 2, 2), 24, AGENTS)},
    }

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList()
        channels = config.channels
        for number, entries in enumerate(config.stages()):
            width = config.widths[number]
            first = number == 0
            embedding = (
                ConvNorm(channels, width, config.patch, config.patch) if first else PatchMerging(channels, width)
            )
            each = enumerate(zip(entries, rates[number], strict=True))
            blocks = [Block(entry, config, number, place % 2 == 1, rate) for place, (entry, rate) in each]
            self.stages.append(Stage(embedding, blocks))
            channels = width
        self.levels = [Level(*level) for level in zip(config.widths, config.strides, strict=True)]
        self.norm = LayerNorm(channels)
        self.apply(initialise_linear)
        self.make_head(channels)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return self.norm(tokens_of(features)).mean(1)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {
            name for name, _ in self.named_parameters() if name.endswith(".windows.table")
        }

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:
        """Translate weights of `swin_transformer.py` (official or timm's) or Agent-Attention's `agent_swin.py`.

        Tables of relative positions and of agent biases are interpolated if the images had another size.
        """
        late = int(any(name.startswith("layers.0.downsample.") for name in state))  # timm has it at a stage's start
        names = (
            (r"^patch_embed\.proj\.", "stages.0.embedding.conv."),
            (r"^patch_embed\.norm\.", "stages.0.embedding.norm."),
            (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + late}.embedding."),
            (r"^layers\.", "stages."),
            (r"\.attn\.proj\.", ".attention.output."),
            (r"\.attn\.dwc\.", ".attention.merge.convolution."),
            (r"\.attn\.relative_position_bias_table$", ".windows.table"),
            (r"\.attn\.(\w\w_bias)$", r".attention.\1"),
            (r"\.mlp\.fc1\.", ".mlp.up."),
            (r"\.mlp\.fc2\.", ".mlp.down."),
            (r"^head\.fc\.", "head."),
        )
        with torch.device("meta"):
            own = cls(config).state_dict()
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.endswith((".attn_mask", ".relative_position_index")):
                continue
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".attn.qkv." in name:
                for part, target in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                    found[name.replace(".attn.qkv.", f".attention.{target}.")] = part
                continue
            if name.endswith(".windows.table") and name in own:
                value = _table(value, own[name].shape)
            name, value = agent_table(name, value)
            found[name] = value
        return fit_tables(found, own, {}, "bicubic")


def _table(value: Tensor, shape: Sequence[int]) -> Float[Tensor, "heads rows columns"]:
    """Convert a relative position table from its official layout (places, heads), resized if the windows differ."""
    if value.ndim == 2:
        places = len(value)
        sides = shape[1:] if places == math.prod(shape[1:]) else (math.isqrt(places),) * 2
        value = value.mT.unflatten(-1, tuple(sides))
    if value.shape == shape:
        return value
    return F.interpolate(value[None], tuple(shape[1:]), mode="bicubic", align_corners=False)[0]


class Block(PlannedBlock):
    """Attention within windows or over the whole map, and a feed-forward network.

    Args:
        entry: mechanism and options.
        config: the backbone's config.
        number: index of the stage.
        shifted: whether windows are shifted by half a window.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(
        self, entry: tuple[str, Mapping[str, Any]], config: SwinConfig, number: int, shifted: bool, drop_path: float
    ) -> None:
        width, heads, stride = config.widths[number], config.heads[number], config.strides[number]
        grid = config.size[0] // stride, config.size[1] // stride
        options = options_on(entry, grid, bias=True)
        attention = create_layer(entry[0], width, heads, pattern=Pattern.NONCAUSAL_SELF, **options)
        windows = Windows(heads, windows_of(config, stride), shifted) if reads_windows(entry) else None
        super().__init__(config, number, attention, drop_path)
        self.windows = windows

    def attend(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        windows = self.windows
        if windows is None:
            return super().attend(x, grid)
        context = Context(grid=windows.sides_on(grid), mask=Mask(bias=windows.bias(grid, x.shape[0])))
        mixed = self.attention(windows.split(x, grid), context=context)
        return Result(windows.join(mixed.output, grid), None, mixed.losses)


class Windows(nn.Module):
    """Window partition of a map's tokens, and the relative position bias within a window.

    Args:
        heads: number of attention heads.
        sides: rows and columns of a window.
        shifted: whether windows are shifted by half a window down and to the right, along sides with more than one
            window.
    """

    def __init__(self, heads: int, sides: tuple[int, int], shifted: bool) -> None:
        super().__init__()
        self.sides, self.shifted = sides, shifted
        self.table = nn.Parameter(torch.empty(heads, *(2 * side - 1 for side in sides)))
        nn.init.trunc_normal_(self.table, std=0.02)

    def sides_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of a window on a map, which may be smaller than the window."""
        return min(self.sides[0], grid[0]), min(self.sides[1], grid[1])

    def shifts_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return how far the windows of a map are shifted down and to the right."""
        down, across = (
            side // 2 if self.shifted and side < extent else 0
            for side, extent in zip(self.sides_on(grid), grid, strict=True)
        )
        return down, across

    def split(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "windows m c"]:
        """Return the tokens of each window of each map, row by row."""
        down, across = self.shifts_on(grid)
        x = x.unflatten(1, grid)
        return to_windows(x.roll((-down, -across), (1, 2)) if down or across else x, self.sides_on(grid))

    def join(self, x: Float[Tensor, "windows m c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """The reverse of :meth:`split`."""
        down, across = self.shifts_on(grid)
        x = from_windows(x, self.sides_on(grid), grid)
        return (x.roll((down, across), (1, 2)) if down or across else x).flatten(1, 2)

    def bias(self, grid: tuple[int, int], batch: int) -> Float[Tensor, "#windows heads m m"]:
        """Return the relative position bias, -inf for pairs that the shift brought together from opposite borders."""
        device = self.table.device
        rows, columns = (
            torch.arange(side, device=device)[:, None] - torch.arange(side, device=device) + own - 1
            for side, own in zip(self.sides_on(grid), self.sides, strict=True)
        )
        bias = self.table[:, rows[:, None, :, None], columns[:, None, :]].flatten(3).flatten(1, 2)[None]
        if not any(self.shifts_on(grid)):
            return bias
        return bias.masked_fill(self._apart(grid)[:, None], -torch.inf).repeat(batch, 1, 1, 1)

    def _apart(self, grid: tuple[int, int]) -> Bool[Tensor, "windows m m"]:
        """Return which pairs in each window the cyclic shift brought together from opposite borders of the map."""
        down, across = (
            (torch.arange(extent, device=self.table.device) >= extent - shift).view(extent // side, side)
            for extent, shift, side in zip(grid, self.shifts_on(grid), self.sides_on(grid), strict=True)
        )
        moved = 2 * down[:, None, :, None].long() + across[None, :, None, :].long()
        moved = moved.flatten(2).flatten(0, 1)
        return moved[:, :, None] != moved[:, None, :]
