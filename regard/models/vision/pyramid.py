"""Pyramids of token blocks with auxiliary losses, and the base classes of pyramids planned block by block."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract import Context, Loss, Pattern, Result, at_least
from regard.core.grids import tokens_of
from regard.layers.drop_path import DropPath
from regard.layers.feed_forward import MLP
from regard.layers.norms import LayerNorm
from regard.layers.residual import add_feed_forward
from regard.models.layer_plan import check_plan, read_plan
from regard.models.losses import add_losses
from regard.models.vision.backbone import BackboneConfig, Pyramid, check_stages, map_of
from regard.models.vision.blocks import Blocks

if TYPE_CHECKING:
    from jaxtyping import Float


class PyramidWithLosses(Pyramid):
    """A pyramid whose stages return a Result each: the map (B, C, H, W) as the output, and the losses of the layers."""

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b c h w"], dict[int, Float[Tensor, "b c h w"]]]:
        features, maps, _ = self._run(images, keep)
        return features, maps

    def forward_with_losses(self, images: Float[Tensor, "b c h w"]) -> Result:
        features, _, losses = self._run(self.check_images(images))
        return Result(self.forward_head(features), None, losses)

    def _run(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b c h w"], dict[int, Float[Tensor, "b c h w"]], dict[str, Loss]]:
        """Return the last map, the maps of the levels in `keep`, and the losses."""
        x = images
        maps: dict[int, Tensor] = {}
        losses: dict[str, Loss] = {}
        for number, stage in enumerate(self.stages):
            result = stage(x)
            add_losses(losses, result.losses)
            x = result.output
            if number in keep:
                maps[number] = x
        return x, maps, losses


class Stage(nn.Module):
    """An embedding, blocks and an optional norm: (B, C, H, W) -> a Result of (B, width, H / s, W / s).

    Args:
        embedding: a module from map to map.
        blocks: modules from tokens (B, N, width), row by row, and the rows and columns of their map to a Result of
            tokens.
        norm: a norm of the tokens at the end.
    """

    def __init__(self, embedding: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding, self.blocks, self.norm = embedding, Blocks(blocks), norm

    def forward(self, x: Float[Tensor, "b c h w"]) -> Result:
        x = self.embedding(x)
        grid = (x.shape[2], x.shape[3])
        tokens = tokens_of(x)
        losses: dict[str, Loss] = {}
        for block in self.blocks:
            result = self.blocks.run(block, tokens, grid)
            add_losses(losses, result.losses)
            tokens = result.output
        return Result(map_of(tokens if self.norm is None else self.norm(tokens), grid), None, losses)


@dataclass(frozen=True, kw_only=True)
class StagesConfig(BackboneConfig):
    """The configuration of a pyramid in which each map has half the sides of the one before.

    Attributes:
        widths, depths, heads: channels, blocks and heads of each stage.
        patch: stride of the first stage's map in pixels.
        branch_dropout: dropout probability in the feed-forward networks and at the end of each branch.
    """

    by_stage: ClassVar[tuple[str, ...]] = ("depths", "heads")
    """Options with a number >= 1 for each stage."""
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    patch: int = 4
    branch_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("patch", self.patch, 1)
        check_stages(self, "widths", *self.by_stage)

    @property
    def sides(self) -> tuple[int, int]:
        return self.strides[-1], self.strides[-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's map in pixels."""
        return tuple(self.patch * 2**stage for stage in range(len(self.widths)))


@dataclass(frozen=True, kw_only=True)
class PlannedConfig(StagesConfig):
    """The configuration of a :class:`StagesConfig` pyramid with a mechanism for each block.

    Attributes:
        widths, depths, heads, patch, branch_dropout: as for :class:`StagesConfig`.
        plan: a mechanism (with options) for each block, or one for all.
        expansion: hidden width of the feed-forward networks, as a multiple of the channels.
    """

    told: ClassVar[str]
    """The name of the model in error messages."""
    plan: Any = "softmax"
    expansion: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "plan", read_plan(self.plan, sum(self.depths)))
        check_plan(self.plan, Pattern.NONCAUSAL_SELF, self.told)

    def stages(self) -> list[list[tuple[str, dict[str, Any]]]]:
        """The plan, stage by stage."""
        starts = [sum(self.depths[:stage]) for stage in range(len(self.depths))]
        return [list(self.plan[start : start + depth]) for start, depth in zip(starts, self.depths, strict=True)]


def agents_first(blocks: Sequence[int], of: int, numbers: Sequence[int]) -> list[Any]:
    """Return a plan of `of` blocks: agent attention in the first `blocks` of the first stages, then softmax."""
    agents = [
        ("agent", {"num_agents": n, "agent_bias": "all"})
        for n, count in zip(numbers, blocks, strict=False)
        for _ in range(count)
    ]
    return [*agents, *["softmax"] * (of - len(agents))]


class PlannedBlock(nn.Module):
    """Attention and a feed-forward network, pre-norm: tokens (B, N, width) on a grid -> a Result of tokens.

    Args:
        config: the backbone's config.
        number: index of the stage.
        attention: a layer called with tokens and a context with their grid.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, config: PlannedConfig, number: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        width = config.widths[number]
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = attention
        self.mlp = MLP(width, config.expansion * width, bias=True, dropout=config.branch_dropout)
        self.dropout, self.drop_path = nn.Dropout(config.branch_dropout), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        """Return the new tokens, with the losses of the attention layer."""
        mixed = self.attend(self.norm1(x), grid)
        x = x + self.drop_path(self.dropout(mixed.output))
        return Result(add_feed_forward(x, self.norm2, self.mlp, self.dropout, self.drop_path), None, mixed.losses)

    def attend(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        """Apply the attention branch to normed tokens, without the residual."""
        mixed: Result = self.attention(x, context=Context(grid=grid))
        return mixed
