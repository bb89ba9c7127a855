"""Conversion of images and volumes to tokens, one per square or cubic patch, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


def cut(maps: Shaped[Tensor, "b c *sides"], patch: int) -> Shaped[Tensor, "b n pc"]:
    """Cut maps into patches, row by row. Within a patch, places go row by row too, with their channels side by side.

    Args:
        patch: side of a patch; the sides of the maps are multiples of it.
    """
    axes, parts = maps.ndim - 2, maps
    for axis in range(axes, 0, -1):
        parts = parts.unflatten(axis + 1, (maps.shape[axis + 1] // patch, patch))  # (B, C, rows, p, columns, p)
    places = (range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2))
    return parts.permute(0, *places[0], *places[1], 1).flatten(axes + 1).flatten(1, axes)


def joined(patches: Shaped[Tensor, "b n pc"], grid: Sequence[int], patch: int) -> Shaped[Tensor, "b c *sides"]:
    """Join the patches of a grid to maps again: the inverse of :func:`cut`."""
    axes = len(grid)
    parts = patches.unflatten(2, (*(patch,) * axes, patches.shape[2] // patch**axes)).unflatten(1, tuple(grid))
    order = (place + axis for axis in range(axes) for place in (1, 1 + axes))
    whole = parts.permute(0, 2 * axes + 1, *order)  # (B, C, rows, p, columns, p)
    return whole.reshape(*whole.shape[:2], *(side * patch for side in grid))
