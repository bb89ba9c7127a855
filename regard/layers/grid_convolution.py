"""Depthwise convolution of the values on their grid, added to the head outputs of a mechanism.

This is agent attention's DWC (arXiv 2312.08874, equation 8) and BiFormer's local context enhancement (arXiv 2303.08810,
equation 7).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    Context,
    LayerCall,
    LayerSpec,
    Mask,
    Merge,
    Pattern,
    Result,
    Role,
    Tensors,
    Unsupported,
    valid_from_lengths,
)
from regard.core.grids import image_of, tokens_of
from regard.core.ragged import Gathering, gathering, gathering_in_place, values_known

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class GridConvolution(Merge):
    """Adds a depthwise convolution of the values (or of the layer's input) on the grid to the head outputs.

    A sequence without a grid counts as a grid with one row. Places without a token are zeros.

    Args:
        spec: the layer's specification.
        side: side of the filters, odd, with zero padding; 0 for no convolution.
        of: ``value``, or ``input``, which needs dim = heads * value_dim.
        asked: the option that turns it on, as written in a call, for errors.
        without: the option that turns it off.

    Raises:
        Unsupported: in patterns other than noncausal-self, and for inputs and values of unequal width.
    """

    def __init__(self, spec: LayerSpec, side: int, of: str, *, asked: str, without: str) -> None:
        super().__init__()
        self.heads, width = spec.heads, spec.heads * spec.value_dim
        self.of, self.asked, self.without = of, asked, without
        if side and spec.pattern is not Pattern.NONCAUSAL_SELF:
            raise Unsupported(f"{asked} in {spec.pattern.value}", supported="noncausal-self", nearest=without)
        if side and of == "input" and spec.dim != width:
            raise Unsupported(
                f"{asked} with dim={spec.dim} and values of {width}", supported="equal widths", nearest=without
            )
        self.convolution = nn.Conv2d(width, width, side, padding=side // 2, groups=width) if side else None

    def forward(self, output: Tensor, heads: Tensors, call: LayerCall, result: Result) -> Tensor:
        x, context, lengths = call.x, call.context, call.lengths
        assert x is not None  # there is an output for each token, so there are tokens
        if self.convolution is None or x.shape[1] == 0:
            return output
        n = x.shape[1]
        source = x
        if self.of == "value":
            v = heads["v"]
            v = v if v.shape[1] == self.heads else v.repeat_interleave(self.heads // v.shape[1], 1)
            source = v.transpose(1, 2).flatten(2)
        whole = lengths is None and (context.mask is None or not context.mask.ragged)
        first = leading(n, context.grid, context.roles) if whole else None
        if first is not None:
            sides = self._sides(context.grid, n, torch.full((1, 1), n - first, device="cpu"), padded=False)
            local = F.pad(self._convolved(source[:, first:], sides), (0, 0, first, 0))
            return output + local.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        layout = self._layout(x, context, lengths)
        placed = layout.gather(source, axis=1)
        total = torch.full((1, 1), n, device="cpu") if layout.lengths is None else layout.lengths[:, None]
        height, width = self._sides(context.grid, n, total, padded=lengths is not None)
        spare = n - height * width
        if spare:
            placed = F.pad(placed, (0, 0, 0, -spare))  # a negative pad cuts slots that hold no token
        local = self._convolved(placed, (height, width))
        if spare:
            local = F.pad(local, (0, 0, 0, spare))
        return output + layout.scatter(local, axis=1).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _convolved(self, placed: Float[Tensor, "b n c"], sides: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Convolve the places of a whole grid, given row by row."""
        assert self.convolution is not None
        return tokens_of(self.convolution(image_of(placed, sides)))

    @staticmethod
    def _layout(x: Tensor, context: Context, lengths: Tensor | None) -> Gathering:
        if lengths is None and context.roles is None and context.grid is not None:  # already in place
            return gathering_in_place(context.mask, x.shape[0], x.shape[1], context.grid, x.device)
        tokens = grid_tokens(context, x, lengths)
        return gathering(None if tokens is None else Mask(valid=tokens), x.shape[0], x.shape[1], x.device)

    def _sides(self, grid: tuple[int, ...] | None, n: int, total: Tensor, *, padded: bool) -> tuple[int, int]:
        if grid is None:
            return 1, n
        if len(grid) > 2:
            raise Unsupported(
                f"{self.asked} on a grid {tuple(grid)}", supported="one or two sides", nearest=self.without
            )
        check_grid(grid, total, padded=padded)
        return (1, grid[0]) if len(grid) == 1 else (grid[0], grid[1])


def leading(n: int, grid: tuple[int, ...] | None, roles: Int[Tensor, "b n"] | None) -> int | None:
    """How many of the `n` tokens in each row (no padding) precede those of the grid, such as a class token.

    None if tokens are ordered differently, and if reading the roles would break a graph or wait for a device. Meta
    tensors, which have no order, are taken to be in this one, so that their operations are those of a CPU.
    """
    places = n if grid is None else math.prod(grid)
    if not 0 < places <= n:
        return None
    if roles is None:
        return 0 if places == n else None
    if roles.device.type == "meta" and not torch.compiler.is_compiling():
        return n - places
    if not roles.is_cpu or not values_known(roles):
        return None
    on = roles.numpy() == int(Role.TOKEN)  # each operator of PyTorch would take as long as all of this
    return n - places if on[:, n - places :].all() and not on[:, : n - places].any() else None


def grid_tokens(context: Context, x: Tensor, lengths: Tensor | None) -> Bool[Tensor, "b n"] | None:
    """Mask of the tokens in a layer's right-padded `x` that lie on the grid; None when all do."""
    roles = context.roles
    if roles is not None:
        roles = gathering(context.mask, roles.shape[0], roles.shape[1], roles.device).gather(roles, axis=1)
    return tokens_alone(None if lengths is None else valid_from_lengths(lengths, x.shape[1]), roles)


def tokens_alone(valid: Bool[Tensor, "b n"] | None, roles: Int[Tensor, "b n"] | None) -> Bool[Tensor, "b n"] | None:
    """Mask of the valid tokens with the role TOKEN; None when all have it."""
    if roles is None:
        return valid
    ordinary = roles == int(Role.TOKEN)  # int(): a graph would compare with the name, not the number
    return ordinary if valid is None else valid & ordinary


def check_grid(grid: tuple[int, ...], total: Int[Tensor, "#b 1"], *, padded: bool) -> None:
    """Raise Unsupported unless each row's tokens fill the grid (padded rows may fill less of it).

    Not checked in a graph, or while values are unknown. A `total` that is known without reading the mask is on the CPU,
    so checking it waits for no device.
    """
    if torch.compiler.is_compiling() or total.is_meta or total.numel() == 0:
        return
    least, most, places = int(total.min()), int(total.max()), math.prod(grid)
    if most > places or (least < places and not padded):
        raise Unsupported(
            f"a grid {tuple(grid)} of {least if most <= places else most} tokens", supported=f"{places} tokens"
        )
