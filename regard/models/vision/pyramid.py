"""Pyramids of blocks of tokens whose layers may have auxiliary losses, as those of routed heads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from regard.contract import Loss, Result
from regard.models.blocks import add_losses
from regard.models.vision.backbone import Pyramid, map_of, tokens_of

if TYPE_CHECKING:
    from jaxtyping import Float


class PyramidWithLosses(Pyramid):
    """A pyramid each of whose stages gives a Result: its map (B, C, H, W) as the output, and the losses of its layers."""

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
        """The last map, the maps of the levels in `keep`, and the losses."""
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
    """An embedding, blocks and perhaps a norm: (B, C, H, W) -> a Result of (B, width, H / s, W / s).

    Args:
        embedding: from map to map.
        blocks: each from tokens (B, N, width), row by row, and the rows and columns of their map to a Result of tokens.
        norm: of the tokens at the end.
    """

    def __init__(self, embedding: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding, self.blocks, self.norm = embedding, nn.ModuleList(blocks), norm

    def forward(self, x: Float[Tensor, "b c h w"]) -> Result:
        x = self.embedding(x)
        grid = (x.shape[2], x.shape[3])
        tokens = tokens_of(x)
        losses: dict[str, Loss] = {}
        for block in self.blocks:
            result = block(tokens, grid)
            add_losses(losses, result.losses)
            tokens = result.output
        return Result(map_of(tokens if self.norm is None else self.norm(tokens), grid), None, losses)
