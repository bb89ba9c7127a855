"""Downsampling between two stages of a model: fewer tokens, which may be wider.

A sequence, or a grid of one to three axes, is cut into windows of `size` tokens along each axis; windows at an end may
be smaller. Each window becomes one token:

| kind | a window of tokens x_1 ... x_w becomes |
|---|---|
| ``merge`` | W norm([x_1; ...; x_w]): patch merging (Swin, Liu et al., arXiv 2103.14030, section 3.1) |
| ``convolution`` | a convolution around its first token, as wide as 2 size - 1 along each axis, and a norm: overlapping patches (PVTv2, arXiv 2106.13797; VAN, arXiv 2202.09741) |
| ``mean``, ``max`` | their mean, or the largest of each feature; a projection follows where the width changes |

Places without a token, at an end or in the padding, count as zeros in the first two kinds and are ignored in the
others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Unsupported, at_least, one_of, valid_from_lengths
from regard.core.grids import image_of, tokens_of
from regard.core.ragged import Gathering, inner_mask
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int, Shaped

SHORTENINGS = ("merge", "convolution", "mean", "max")


class Shortening(nn.Module):
    """Base class: shortens the sequence on the way in; on the way out, copies vectors back to the original tokens.

    A subclass defines :meth:`shorten` and :meth:`back`.
    """

    def forward(self, x: Float[Tensor, "b n c"], context: Context) -> tuple[Float[Tensor, "b s e"], Context]:
        """The shorter input of the next stage, and its context.

        Args:
            x: right-padded tokens.
            context: its mask has lengths or nothing, its grid the sides; other fields are passed on unchanged.
        """
        lengths = None if context.mask is None else context.mask.lengths
        shorter, left, grid = self.shorten(x, lengths, context.grid)
        rows, slots, device = *shorter.shape[:2], x.device
        layout = Gathering(rows, slots, rows, slots, device)
        if left is not None:
            layout = Gathering(rows, slots, rows, slots, device, left, valid_from_lengths(left, slots))
        return shorter, context.replace(mask=inner_mask(layout), grid=grid)

    def shorten(
        self, x: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"] | None, grid: tuple[int, ...] | None
    ) -> tuple[Float[Tensor, "b s e"], Int[Tensor, " b"] | None, tuple[int, ...] | None]:
        """The shorter sequence, its lengths and its grid; lengths and grid are None if they were None before."""
        raise NotImplementedError

    def back(
        self,
        y: Float[Tensor, "b s e"],
        n: int,
        lengths: Int[Tensor, " b"] | None,
        grid: tuple[int, ...] | None,
    ) -> Float[Tensor, "b n e"]:
        """Copy each vector of the shorter sequence to all the places that it was made from.

        Args:
            y: vectors of the shorter sequence.
            n: number of tokens before shortening.
            lengths: number of valid tokens in the shorter rows; None when all are valid.
            grid: sides of the grid before shortening.
        """
        raise NotImplementedError


class Windows(Shortening):
    """Turns windows of `size` tokens along each axis into one token each.

    Args:
        kind: one of `SHORTENINGS`.
        dim: width of the input tokens.
        out_dim: width of the output tokens.
        size: size of a window along each axis, >= 2.
        axes: number of axes of the inputs: 1 for sequences, 2 or 3 for grids.
        norm: norm of ``merge`` and ``convolution``, as in :func:`regard.layers.norms.make_norm`.

    Raises:
        Unsupported: for another kind, or sizes out of range; when called, for a grid with another number of axes.
    """

    def __init__(self, kind: str, dim: int, out_dim: int, *, size: int = 2, axes: int = 1, norm: str = "layer") -> None:
        super().__init__()
        one_of("shortening", kind, SHORTENINGS)
        at_least("size", size, 2)
        one_of("axes", axes, (1, 2, 3))
        self.kind, self.dim, self.out_dim, self.size, self.axes = kind, dim, out_dim, size, axes
        self.norm: nn.Module = nn.Identity()
        self.projection: nn.Module = nn.Identity()
        if kind == "merge":
            self.norm = make_norm(norm, size**axes * dim)
            self.projection = make_linear(size**axes * dim, out_dim, bias=False)
        elif kind == "convolution":
            convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
            self.projection = convolution(dim, out_dim, 2 * size - 1, stride=size, padding=size - 1)
            self.norm = make_norm(norm, out_dim)
        elif out_dim != dim:
            self.projection = make_linear(dim, out_dim, bias=False)

    def shorten(
        self, x: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"] | None, grid: tuple[int, ...] | None
    ) -> tuple[Float[Tensor, "b s e"], Int[Tensor, " b"] | None, tuple[int, ...] | None]:
        sides = self._sides(x.shape[1], grid)
        shorter = tuple(-(-side // self.size) for side in sides)
        left = exists = None
        if lengths is not None:
            valid = valid_from_lengths(lengths, x.shape[1])[..., None]
            x = torch.where(valid, x, 0)
            exists = windows(valid, sides, self.size)
            left = exists.any(2).sum((1, 2))  # windows that contain a token come first, even in a grid read row by row
        if self.kind == "convolution" and x.shape[1] == 0:
            y = x.new_zeros(x.shape[0], 0, self.out_dim)  # torch cannot convolve inputs shorter than the filter
        elif self.kind == "convolution":
            y = tokens_of(self.projection(image_of(x, sides)))
            y = self.norm(y)
        elif self.kind == "merge":
            y = self.projection(self.norm(windows(x, sides, self.size).flatten(2)))
        else:
            if exists is None:
                exists = windows(x.new_ones(1, x.shape[1], 1, dtype=torch.bool), sides, self.size)
            inside = windows(x, sides, self.size)
            if self.kind == "mean":
                pooled = inside.sum(2) / exists.sum(2).clamp(min=1)
            else:
                pooled = inside.where(exists, torch.finfo(x.dtype).min).amax(2).where(exists.any(2), 0)
            y = self.projection(pooled)
        return y, left, None if grid is None else shorter

    def back(
        self,
        y: Float[Tensor, "b s e"],
        n: int,
        lengths: Int[Tensor, " b"] | None,
        grid: tuple[int, ...] | None,
    ) -> Float[Tensor, "b n e"]:
        number = torch.zeros((), dtype=torch.int64, device=y.device)
        for side in self._sides(n, grid):
            along = torch.arange(side, device=y.device) // self.size
            number = number[..., None] * -(-side // self.size) + along
        return y[:, number.flatten()]

    def _sides(self, n: int, grid: tuple[int, ...] | None) -> tuple[int, ...]:
        sides = (n,) if grid is None else tuple(grid)
        if len(sides) != self.axes or math.prod(sides) != n:
            raise Unsupported(
                f"{n} tokens {'without a grid' if grid is None else f'on a grid {sides}'}",
                supported="a sequence" if self.axes == 1 else f"a grid of {self.axes} axes that the tokens fill",
            )
        return sides

    def extra_repr(self) -> str:
        return f"kind={self.kind}, size={self.size}, axes={self.axes}"


def windows(x: Shaped[Tensor, "b n c"], sides: Sequence[int], size: int) -> Shaped[Tensor, "b s w c"]:
    """Group tokens by windows of `size` along each grid axis, row by row within a window; zeros beyond the ends."""
    axes = len(sides)
    x = x.unflatten(1, tuple(sides))
    x = F.pad(x, [0, 0, *(end for side in reversed(sides) for end in (0, -(-side // size) * size - side))])
    for axis, side in enumerate(sides):
        x = x.unflatten(1 + 2 * axis, (-(-side // size), size))
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)  # (windows, places, features)
    return x.flatten(1 + axes, 2 * axes).flatten(1, axes)
