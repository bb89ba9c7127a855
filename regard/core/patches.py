"""Images and volumes as tokens, which are square or cubic patches, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


def cut(maps: Shaped[Tensor, "b c *sides"], patch: int) -> Shaped[Tensor, "b n pc"]:
    """Patches of maps, row by row; so are the places of a patch, and the channels of a place lie together.

    Args:
        patch: places of a patch along each axis, of which the sides are multiples.
    """
    axes, parts = maps.ndim - 2, maps
    for axis in range(axes, 0, -1):
        parts = parts.unflatten(axis + 1, (maps.shape[axis + 1] // patch, patch))  # (B, C, rows, p, columns, p)
    places = (range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2))
    return parts.permute(0, *places[0], *places[1], 1).flatten(axes + 1).flatten(1, axes)


def joined(patches: Shaped[Tensor, "b n pc"], grid: Sequence[int], patch: int) -> Shaped[Tensor, "b c *sides"]:
    """The maps that :func:`cut` has cut into a grid of patches."""
    axes = len(grid)
    parts = patches.unflatten(2, (*(patch,) * axes, patches.shape[2] // patch**axes)).unflatten(1, tuple(grid))
    order = (place + axis for axis in range(axes) for place in (1, 1 + axes))
    whole = parts.permute(0, 2 * axes + 1, *order)  # (B, C, rows, p, columns, p)
    return whole.reshape(*whole.shape[:2], *(side * patch for side in grid))
