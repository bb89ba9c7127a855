"""Vision transformers as methods that leave out tokens see them: the parts before, in and after their blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Mask, Mechanism, Result, Unsupported, an_instance, valid_from_lengths
from regard.core.precision import wide
from regard.layers.attention import AttentionLayer
from regard.models.vision.patch_tokens import context_of
from regard.models.vision.vit import VisionBlock, VisionTransformer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

HOSTS = "regard's VisionTransformer"
Attend = Callable[[Tensor], Tensor]
"""A function from the scores of an attention layer (B, H, N, N) to its weights."""


class Host:
    """A :class:`regard.models.vision.vit.VisionTransformer` with one or more class tokens.

    Tokens that are left are a batch (B, N, C) with, if some were left out, their `places` (B, N), the numbers that they
    had among all tokens, class tokens included. A layer whose position scheme takes positions (``rotary``) gets these;
    layers that count ranks count the tokens that are left, and fill a grid with them row by row.

    Args:
        model: shared, not copied.

    Raises:
        Unsupported: for other models, and without a class token.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, VisionTransformer):
            raise Unsupported(f"fewer tokens in {an_instance(model)}", supported=HOSTS)
        if not model.config.class_tokens:
            raise Unsupported(
                f"fewer tokens in {an_instance(model)} without a class token",
                supported="vision transformers with a class token",
                nearest="pool='class'",
            )
        self.model = model

    @property
    def blocks(self) -> list[Any]:
        """The blocks, in order."""
        return list(self.model.blocks)

    @property
    def protected(self) -> int:
        """Number of class tokens, which come first."""
        return self.model.config.class_tokens

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.model.config.dim

    @property
    def heads(self) -> int:
        """Number of heads of a block."""
        return self.model.config.num_heads

    def check_softmax(self) -> None:
        """Raise Unsupported unless :meth:`run_under` can replace the softmax of every block."""
        for block in self.blocks:
            layer = attention_of(block)
            if layer is None or layer.card.name != "softmax":
                asked = f"a layer of {layer.card.name if layer else type(block.mixer).__name__}"
            elif layer.config != layer.card.options() or layer.convolutions:
                asked = "softmax attention with a window, softcap, sink or convolution"
            elif layer.positions.bias is not None:
                asked = f"{layer.positions.name} positions, which add to the scores,"
            else:
                continue
            raise Unsupported(
                f"{asked} in a block whose softmax follows a policy",
                supported="plain softmax, also in a mixture of heads",
            )

    @property
    def ends(self) -> list[nn.Module]:
        """The modules after the blocks."""
        parts = (self.model.norm, self.model.head, self.model.distillation_head)
        return [part for part in parts if part is not None]

    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights with the names of the official repositories; raises Unsupported if they do not fit."""
        self.model.load_released(weights)

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        return self.model.embedding.grid(*images.shape[2:])

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """All tokens, as the first block gets them."""
        return self.model.embed(self.model.check_images(images))

    def run(
        self,
        blocks: Sequence[VisionBlock],
        x: Float[Tensor, "b n c"],
        grid: tuple[int, int],
        *,
        alive: Bool[Tensor, "b n"] | None = None,
        places: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The output of blocks.

        Args:
            blocks: some of the host's, in order.
            x: tokens.
            grid: rows and columns of all patches.
            alive: tokens that attention sees, the others being masked; all when None.
            places: see the class; None while all tokens are there.
        """
        if alive is None and places is not None and any(block.sees_grid for block in blocks):
            alive = torch.ones_like(places, dtype=torch.bool)  # without a mask, tokens would have to fill the grid
        context = context_of(grid, self.protected, x)
        return self._through(blocks, x, context.replace(mask=None if alive is None else Mask(valid=alive)), places)

    def run_kept(
        self,
        blocks: Sequence[VisionBlock],
        x: Float[Tensor, "b n c"],
        grid: tuple[int, int],
        stays: Bool[Tensor, "b n"],
        places: Int[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"], Int[Tensor, "b m"]]:
        """The output of blocks for the tokens that stay, which may be more in some rows than in others.

        Returns:
            the tokens, padded on the right to the longest row, which of them are no padding, and their places.
        """
        lengths = stays.sum(1)
        longest = int(lengths.max()) if len(lengths) else 0
        alive = valid_from_lengths(lengths, longest)
        kept, where = x[stays], places[stays]
        places = _padded(where, alive)
        if bool(alive.all()):
            whole = longest == math.prod(grid) + self.protected
            left = kept.view(len(x), longest, x.shape[2])
            return self.run(blocks, left, grid, places=None if whole else places), alive, places
        return self.run(blocks, _padded(kept, alive), grid, alive=alive, places=places), alive, places

    def run_under(
        self, block: VisionBlock, x: Float[Tensor, "b n c"], grid: tuple[int, int], attend: Attend
    ) -> Float[Tensor, "b n c"]:
        """The output of a block whose softmax is replaced by `attend`; all tokens must be there."""
        layer = attention_of(block)
        assert layer is not None

        def mix(card: Mechanism, heads: dict[str, Tensor], **options: Any) -> Result:
            query, key, value = (heads[name] for name in "qkv")
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
            weights = attend(wide(query @ key.mT * query.shape[-1] ** -0.5)).to(value.dtype)
            return Result(F.dropout(weights, options.get("dropout", 0.0)) @ value)

        layer.mix = mix
        try:
            return self.run([block], x, grid)
        finally:
            del layer.mix

    def norm(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The features of the last block's output."""
        return self.model.norm(x)

    def logits(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b k"]:
        """The logits of features, of which only the class tokens' are read."""
        return self.model.forward_head(features)

    def _through(
        self, blocks: Sequence[VisionBlock], x: Tensor, context: Context, places: Tensor | None
    ) -> Float[Tensor, "b n c"]:
        for block in blocks:
            placed = context.replace(positions=places) if places is not None and _takes_positions(block) else context
            x = block(x, context=placed).output
        return x


def attention_of(block: VisionBlock) -> AttentionLayer | None:
    """The attention layer of a block, of a mixture of heads the one whose heads are routed; None if there is none."""
    mixer = getattr(block.mixer, "attention", block.mixer)
    return mixer if isinstance(mixer, AttentionLayer) else None


def _takes_positions(block: VisionBlock) -> bool:
    layer = attention_of(block)
    if layer is None or layer.places_keys or layer.positions.bias is not None:
        return False
    return layer.positions.embed is not None or layer.positions.rotate is not None


def _padded(rows: Tensor, alive: Bool[Tensor, "b m"]) -> Tensor:
    """Rows that follow one another (tokens, ...) as a batch (B, M, ...), with zeros in the padding."""
    padded = rows.new_zeros(*alive.shape, *rows.shape[1:])
    padded[alive] = rows
    return padded
