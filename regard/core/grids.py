"""Tokens of a grid, read row by row, as images and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


def image_of(tokens: Shaped[Tensor, "b n c"], sides: Sequence[int]) -> Shaped[Tensor, "b c *sides"]:
    """Return the n = prod(sides) tokens of each row as an image with contiguous channels, a view.

    A batch of one image has the strides that PyTorch recognises as channels-last, which ``tokens.mT.unflatten(2, sides)``
    does not: depthwise convolutions and pooling would take 2 to 20 times as long.
    """
    return tokens.unflatten(1, tuple(sides)).movedim(-1, 1)


def tokens_of(image: Shaped[Tensor, "b c *sides"]) -> Shaped[Tensor, "b n c"]:
    """Return the places of an image, row by row, as tokens; a view if its channels are contiguous."""
    return image.movedim(1, -1).flatten(1, -2)
