"""The Pyramid Vision Transformer (PVT), and Agent-PVT.

Wang et al., arXiv 2102.12122; Han et al., arXiv 2312.08874. Four stages, each at half the resolution of the one before:
a patch embedding with a norm, learned positions (interpolated to the size of the map), and pre-norm blocks

    x <- x + DropPath(attend(LN(x))),   x <- x + DropPath(W_2 gelu(W_1 LN(x)))

``attend`` is a layer of the `plan`, which has an entry for each stage. With a reduction r > 1, keys and values are made
from LN(conv(LN(x))), a convolution with kernel size and stride r; queries are made from all tokens. PVT has softmax
attention with reductions 8, 4, 2, 1 and a class token in the last stage, which the head reads after a norm. Agent-PVT
has agent attention with 9, 16, 49 and 49 agents, no reductions and no class token; its head reads the mean of the last
map.

Agent attention with a reduction pools its agents from all queries; its biases for keys belong to positions on the
reduced map, and values are interpolated bilinearly to the whole map before the convolution that is added to the output.
The official code only takes square maps of one size; here any height and width that the strides divide are accepted.

Blocks are not :class:`regard.models.blocks.Block`, whose cross attention reads a memory without a norm; here keys and
values come from the same normed tokens as the queries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import Context, LayerCall, Loss, Merge, Pattern, Projection, Result, Tensors, Unsupported, one_of
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.layers.attention import AttentionLayer
from regard.layers.base import Layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.feed_forward import MLP
from regard.layers.norms import LayerNorm
from regard.mechanisms.agent import BiasTables, biases_on_map
from regard.models.layer_plan import read_plan
from regard.models.losses import add_losses
from regard.models.vision.backbone import Level, map_of
from regard.models.vision.blocks import Blocks
from regard.models.vision.patch_tokens import (
    agent_table,
    context_of,
    fit_tables,
    initialise_linear,
    options_on,
    resize_positions,
)
from regard.models.vision.pyramid import PyramidWithLosses, StagesConfig

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class PVTConfig(StagesConfig):
    """The configuration of a :class:`PVT`.

    Attributes:
        widths, depths, heads, expansions: channels, blocks, heads, and expansion factor of the feed-forward networks of
            each stage.
        patch: side of a first-stage patch in pixels; later stages embed 2 x 2 patches of the map before.
        plan: a mechanism (with options) for each stage, or one for all; with a reduction it needs a noncausal-cross pattern.
        reductions: r of each stage.
        class_token: whether the last stage, which then has no reduction, has a class token; without it, the head reads
            the mean of the last map.
        branch_dropout: dropout probability of each stage's input tokens, in the feed-forward networks, and at the end
            of each branch.
    """

    by_stage: ClassVar = ("depths", "heads", "expansions", "reductions")
    widths: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    expansions: tuple[int, ...] = (8, 8, 4, 4)
    plan: Any = "softmax"
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    class_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "plan", read_plan(self.plan, len(self.widths)))
        if self.class_token and self.reductions[-1] > 1:
            raise Unsupported(
                f"a class token in a stage with reduction {self.reductions[-1]}",
                supported="a last reduction of 1, or class_token=False",
                nearest="class_token=False",
            )

    @property
    def sides(self) -> tuple[int, int]:
        step = math.lcm(*(r * stride for r, stride in zip(self.reductions, self.strides, strict=True)))
        return step, step

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage's map."""
        return tuple((self.size[0] // stride, self.size[1] // stride) for stride in self.strides)


def _agents(*numbers: int) -> dict[str, Any]:
    plan = [("agent", {"num_agents": number, "agent_bias": "all"}) for number in numbers]
    return {"plan": plan, "reductions": (1,) * len(numbers), "class_token": False}


DEPTHS = {"t": (2, 2, 2, 2), "s": (3, 4, 6, 3), "m": (3, 4, 18, 3), "l": (3, 8, 27, 3)}
DROP_PATHS = {"t": 0.1, "s": 0.1, "m": 0.3, "l": 0.3}


NANO: dict[str, Any] = {
    "image_size": 32,
    "widths": (32, 64, 128),
    "depths": (1, 2, 1),
    "heads": (1, 2, 4),
    "expansions": (4, 4, 4),
    "patch": 2,
    "reductions": (4, 2, 1),
}
"""Preset for images of about 32 pixels."""


class PVT(PyramidWithLosses):
    """The Pyramid Vision Transformer, see the module; sizes ``pvt_t`` to ``_l`` and ``agent_pvt_t`` to ``_l``."""

    Config = PVTConfig
    scales: ClassVar = {"widths": "heads"}
    config: PVTConfig
    sizes: ClassVar = {
        "pvt_nano": NANO,
        "agent_pvt_nano": {**NANO, **_agents(4, 4, 4)},
        **{
            f"{family}pvt_{size}": {"depths": depths, "drop_path": DROP_PATHS[size], **options}
            for family, options in (("", {}), ("agent_", _agents(9, 16, 49, 49)))
            for size, depths in DEPTHS.items()
        },
    }

    def __init__(self, config: PVTConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList()
        channels = config.channels
        for number, width in enumerate(config.widths):
            self.stages.append(self.make_stage(config, number, channels, rates[number]))
            channels = width
        self.class_token = nn.Parameter(torch.empty(1, channels)) if config.class_token else None
        self.pools = ("token", "avg") if config.class_token else ("avg",)
        self.norm = LayerNorm(channels, eps=1e-6) if config.class_token else None
        self.levels = [Level(*level) for level in zip(config.widths, config.strides, strict=True)]
        self.apply(initialise_linear)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.make_head(channels)

    def make_stage(self, config: PVTConfig, number: int, channels: int, rates: list[float]) -> nn.Module:
        """Create stage `number`: maps (map, class token or None) to a Result of tokens and the grid of its map."""
        return Stage(config, number, channels, rates)

    def _run(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]], dict[str, Loss]]:
        """Return the last stage's tokens, the maps of the levels in `keep`, and the layers' losses."""
        x, last = images, len(self.stages) - 1
        maps: dict[int, Tensor] = {}
        losses: dict[str, Loss] = {}
        for number, stage in enumerate(self.stages):
            result, grid = stage(x, self.class_token if number == last else None)
            add_losses(losses, result.losses)
            x = map_of(result.output[:, -math.prod(grid) :], grid)
            if number in keep:
                maps[number] = x
        return result.output if self.norm is None else self.norm(result.output), maps, losses

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        if self.global_pool == "token":
            return features[:, 0]
        return features[:, int(self.config.class_token) :].mean(1)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        chosen = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.stages) < len(self.config.widths):
            self.class_token = None  # of the last stage
        return chosen

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | (set() if self.class_token is None else {"class_token"})

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: PVTConfig) -> dict[str, Tensor]:
        """Translate weights of whai362/PVT (`pvt.py`) or LeapLabTHU/Agent-Attention (`agent_pvt.py`).

        Tables of positions and of agent biases are interpolated if the images had another size.
        """
        names = (
            (r"^cls_token$", lambda m: "class_token"),
            (r"^patch_embed(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.embedding."),
            (r"^patch_embed(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.embedding_norm."),
            (r"^pos_embed(\d+)$", lambda m: f"stages.{int(m[1]) - 1}.positions"),
            (r"^block(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"\.attn\.q\.", r".attention.query."),
            (r"\.attn\.proj\.", r".attention.output."),
            (r"\.attn\.dwc\.", r".attention.merge.convolution."),
            (r"\.attn\.sr\.", r".reduction."),
            (r"\.attn\.norm\.", r".reduction_norm."),
            (r"\.attn\.(\w\w_bias)$", r".attention.\1"),
            (r"\.mlp\.fc1\.", r".mlp.up."),
            (r"\.mlp\.fc2\.", r".mlp.down."),
        )
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".attn.kv." in name:
                for part, own in zip(value.chunk(2), ("key", "value"), strict=True):
                    found[name.replace(".attn.kv.", f".attention.{own}.")] = part
                continue
            if (name == "class_token" or name.endswith(".positions")) and value.ndim == 3:
                value = value[0]
            name, value = agent_table(name, value)
            found[name] = value
        with torch.device("meta"):
            own_state = cls(config).state_dict()
        before = [0] * (len(config.grids) - 1) + [int(config.class_token)]
        grids = {f"stages.{i}.positions": each for i, each in enumerate(zip(before, config.grids, strict=True))}
        return fit_tables(found, own_state, grids, "bilinear")


class Stage(nn.Module):
    """A patch embedding, positions and blocks: a map (B, C, H, W) -> tokens (B, N, width) on a grid.

    Args:
        config: the backbone's config.
        number: index of the stage, from 0.
        channels: channels of the incoming map.
        rates: stochastic depth probabilities, one for each block.
    """

    def __init__(self, config: PVTConfig, number: int, channels: int, rates: list[float]) -> None:
        super().__init__()
        width, patch = config.widths[number], 2 if number else config.patch
        self.grid, last = config.grids[number], number == len(config.widths) - 1
        self.before = int(config.class_token and last)
        self.embedding, self.embedding_norm = nn.Conv2d(channels, width, patch, patch), LayerNorm(width)
        self.positions = nn.Parameter(torch.empty(self.before + math.prod(self.grid), width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(config.branch_dropout)
        self.blocks = Blocks(Block(config, number, rate) for rate in rates)

    def forward(
        self, x: Float[Tensor, "b c h w"], class_token: Float[Tensor, "1 width"] | None = None
    ) -> tuple[Result, tuple[int, int]]:
        """Return a Result with the tokens (the class token first, if given), and the rows and columns of the map."""
        x = self.embedding(x)
        height, width = x.shape[2:]
        x = self.embedding_norm(tokens_of(x))
        if class_token is not None:
            x = torch.cat([class_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
        positions = resize_positions(self.positions, self.before, self.grid, (height, width), "bilinear")
        x = self.dropout(x + positions.to(x.dtype))
        losses: dict[str, Loss] = {}
        for block in self.blocks:
            result = self.blocks.run(block, x, (height, width))
            add_losses(losses, result.losses)
            x = result.output
        return Result(x, None, losses), (height, width)


class Block(nn.Module):
    """Attention, with keys and values from a reduced map if the stage has a reduction, and a feed-forward network.

    Args:
        config: the backbone's config.
        number: index of the stage.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, config: PVTConfig, number: int, drop_path: float) -> None:
        super().__init__()
        width, reduction = config.widths[number], config.reductions[number]
        self.sees_class = "roles" in get_mechanism(config.plan[number][0]).honours
        self.norm1, self.norm2 = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        self.reduction = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.reduction_norm = LayerNorm(width) if reduction > 1 else None
        self.attention = make_attention(
            config.plan[number], width, config.heads[number], reduction, config.grids[number]
        )
        self.mlp = self.make_mlp(width, config.expansions[number] * width, config.branch_dropout)
        self.dropout, self.drop_path = nn.Dropout(config.branch_dropout), DropPath(drop_path)

    def make_mlp(self, width: int, hidden: int, dropout: float) -> nn.Module:
        """Create the feed-forward network, with hidden width `hidden`."""
        return MLP(width, hidden, bias=True, dropout=dropout)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        """Return the new tokens, with the losses of the attention layer."""
        mixed = self.attend(self.norm1(x), grid)
        x = x + self.drop_path(self.dropout(mixed.output))
        return Result(x + self.drop_path(self.feed_forward(self.norm2(x), grid)), None, mixed.losses)

    def feed_forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Apply the feed-forward branch to normed tokens, without the residual."""
        return self.dropout(self.mlp(x))

    def attend(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        """Apply the attention branch to normed tokens (a class token may come first), without the residual."""
        if self.reduction is not None and self.reduction_norm is not None:
            memory = self.reduction_norm(tokens_of(self.reduction(map_of(x, grid))))
            return self.attention(x, memory, context=Context(grid=grid))
        before = x.shape[1] - math.prod(grid)
        context = context_of(grid, before, x) if self.sees_class or not before else Context()
        return self.attention(x, context=context)


AGENT_DEFAULTS = {"agent_bias": "none", "bias_grid": None, "dwc": "auto"}
"""Options of agent attention that its layer only has in the noncausal-self pattern."""


def make_attention(
    entry: tuple[str, Mapping[str, Any]], width: int, heads: int, reduction: int, grid: tuple[int, int]
) -> Layer:
    """Create the layer of a stage's plan entry, with a cross pattern if keys and values come from a reduced map."""
    name, options = entry[0], options_on(entry, grid, bias=True)
    if reduction == 1:
        return create_layer(name, width, heads, pattern=Pattern.NONCAUSAL_SELF, **options)
    if name != "agent":
        return create_layer(name, width, heads, pattern=Pattern.NONCAUSAL_CROSS, **options)
    kind, lines, of = (options.pop(option, default) for option, default in AGENT_DEFAULTS.items())
    one_of("agent_bias", kind, ("none", "block", "lines", "all"))
    one_of("dwc", of, ("auto", "value", "none"))
    options = {"agent_source": "pool_q", **options}
    layer = create_layer(name, width, heads, pattern=Pattern.NONCAUSAL_CROSS, **options)
    assert isinstance(layer, AttentionLayer)
    if kind != "none":
        layer.projection = ReducedBiases(layer, kind, lines, reduction)
    if of != "none":
        layer.merge = UpsampledConvolution(width, reduction)
    return layer


class ReducedBiases(Projection):
    """Biases of agent attention whose keys are on a map reduced by r along each side.

    Args:
        layer: the layer that the biases belong to.
        kind: ``block``, ``lines`` or ``all``.
        lines: rows and columns of the queries' map, for ``lines`` and ``all``.
        reduction: r.
    """

    mixes_tokens = True

    def __init__(self, layer: AttentionLayer, kind: str, lines: tuple[int, int] | None, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        heads, number = layer.num_heads, layer.config.num_agents
        reduced = None if lines is None else (lines[0] // reduction, lines[1] // reduction)
        self.gather_bias = BiasTables(heads, number, kind, reduced)
        self.share_bias = BiasTables(heads, number, kind, lines)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        assert call.x is not None
        grid: Any = call.context.grid
        batch = len(call.x)
        reduced = grid[0] // self.reduction, grid[1] // self.reduction
        (gather,), (share,) = biases_on_map([self.gather_bias], *reduced), biases_on_map([self.share_bias], *grid)
        return {
            **heads,
            "gather_bias": gather.expand(batch, -1, -1, -1),
            "share_bias": share.mT.expand(batch, -1, -1, -1),
        }


class UpsampledConvolution(Merge):
    """Adds a 3 x 3 depthwise convolution of the values, interpolated to the map of the queries, to the head outputs.

    Args:
        width: width of all heads together.
        reduction: r, the ratio of the queries' map to the values' map along each side.
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(
        self, output: Float[Tensor, "b h n v"], heads: Tensors, call: LayerCall, result: Result
    ) -> Float[Tensor, "b h n v"]:
        grid: Any = call.context.grid
        values = map_of(heads["v"].transpose(1, 2).flatten(2), (grid[0] // self.reduction, grid[1] // self.reduction))
        local = tokens_of(self.convolution(F.interpolate(values, grid, mode="bilinear", align_corners=False)))
        return output + local.unflatten(-1, (output.shape[1], -1)).transpose(1, 2)
