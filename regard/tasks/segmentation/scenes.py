"""Scenes drawn together with their masks: shapes over a background, and ellipses whose class a distant corner shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8

Drawn = tuple[np.ndarray, np.ndarray]
"""Images (B, H, W, C) as bytes, and class indices (B, H, W)."""


def shapes(rng: np.random.Generator, count: int, sides: tuple[int, int]) -> Drawn:
    """Draw one to four discs, squares, triangles and rings of any colour and rotation, later ones over earlier ones.

    The colour gives no information about the class; the background has a gradient, and the whole image has noise.
    """
    row, column = (each - 0.5 for each in _places(sides))
    images = np.empty((count, *sides, 3))
    classes = np.zeros((count, *sides), dtype=np.int64)
    for image, found in zip(images, classes, strict=True):
        slope = rng.normal(0, 60, (2, 3))
        image[:] = rng.uniform(60, 200, 3) + row[..., None] * slope[0] + column[..., None] * slope[1]
        for _ in range(rng.integers(1, 5)):
            kind = int(rng.integers(1, 5))
            inside = _inside(kind, row, column, rng)
            image[inside] = rng.uniform(0, 255, 3)
            found[inside] = kind
    return _bytes(images + rng.normal(0, 20, images.shape)), classes


def _inside(kind: int, row: np.ndarray, column: np.ndarray, rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """The pixels of a shape: disc, square, triangle or ring."""
    size, turn = rng.uniform(0.1, 0.22), rng.uniform(0, 2 * math.pi)
    y, x = row - rng.uniform(-0.35, 0.35), column - rng.uniform(-0.35, 0.35)
    if kind in (1, 4):
        radius = np.hypot(y, x)
        return (radius < size) & ((radius > 0.55 * size) | (kind == 1))
    sides = 4 if kind == 2 else 3
    angles = turn + 2 * math.pi * np.arange(sides) / sides
    distance = np.stack([y * math.sin(a) + x * math.cos(a) for a in angles]).max(0)
    return distance < size * (0.8 if sides == 4 else 0.6)


def corner_cue(rng: np.random.Generator, count: int, sides: tuple[int, int], *, far: bool) -> Drawn:
    """Draw one to three grey ellipses in noise, all of one of two classes, a quarter of the side from the border or
    more.

    With `far`, they look alike, and their class is shown by a small square in one of the corners, bright or dark;
    otherwise the ellipses themselves are bright or dark, and there is no square.
    """
    row, column = _places(sides)
    images = 128 + rng.normal(0, 25, (count, *sides, 1))
    classes = np.zeros((count, *sides), dtype=np.int64)
    marker = max(2, min(sides) // 10)
    for image, found in zip(images, classes, strict=True):
        sign = int(rng.integers(2))
        blobs = np.zeros(sides, dtype=bool)
        for _ in range(rng.integers(1, 4)):
            blobs |= _ellipse(rng, row, column, rng.uniform(0.35, 0.65, 2), 0.1)
        image[blobs] += 60 if far else 60 * (2 * sign - 1)
        if far:
            y, x = rng.choice([0, 1], 2) * (np.array(sides) - marker)
            image[y : y + marker, x : x + marker] = 245 if sign else 10
        found[blobs] = 1 + sign
    return _bytes(images), classes


def own_corner(rng: np.random.Generator, count: int, sides: tuple[int, int]) -> Drawn:
    """Draw up to four grey ellipses in noise, all alike, one per quadrant at most, a quarter of the side from the
    border.

    Each of the four corners has a bright or dark square, which shows the class of the ellipse in its quadrant only: a
    single number for the whole map, as carried by norms, does not say to which ellipse it belongs.
    """
    row, column = _places(sides)
    images = 128 + rng.normal(0, 25, (count, *sides, 1))
    classes = np.zeros((count, *sides), dtype=np.int64)
    marker = max(2, min(sides) // 10)
    for image, found in zip(images, classes, strict=True):
        for quarter in rng.permutation(4):
            below, right = divmod(int(quarter), 2)
            sign = int(rng.integers(2))
            y, x = below * (sides[0] - marker), right * (sides[1] - marker)
            image[y : y + marker, x : x + marker] = 245 if sign else 10
            if found.any() and rng.integers(2):
                continue
            near = rng.uniform(0.33, 0.42, 2)
            blob = _ellipse(rng, row, column, np.where([below, right], 1 - near, near), 0.07)
            image[blob] += 60
            found[blob] = 1 + sign
    return _bytes(images), classes


def _ellipse(
    rng: np.random.Generator, row: np.ndarray, column: np.ndarray, centre: np.ndarray, longest: float
) -> Bool[np.ndarray, "h w"]:
    """The pixels of an ellipse of any rotation, whose half axes are at most `longest`."""
    axes, turn = rng.uniform(longest / 2, longest, 2), rng.uniform(0, math.pi)
    y, x = row - centre[0], column - centre[1]
    along, across = y * math.sin(turn) + x * math.cos(turn), y * math.cos(turn) - x * math.sin(turn)
    return (along / axes[0]) ** 2 + (across / axes[1]) ** 2 < 1


def far_cue(rng: np.random.Generator, count: int, sides: tuple[int, int]) -> Drawn:
    """:func:`corner_cue` with the cue in a corner."""
    return corner_cue(rng, count, sides, far=True)


def near_cue(rng: np.random.Generator, count: int, sides: tuple[int, int]) -> Drawn:
    """:func:`corner_cue` with the cue in the ellipses themselves: the control."""
    return corner_cue(rng, count, sides, far=False)


def _places(sides: tuple[int, int]) -> np.ndarray:
    """The row and the column of each pixel, 0 to 1 along its axis: in images that are not square, shapes are wider."""
    return np.mgrid[: sides[0], : sides[1]] / np.array(sides)[:, None, None]


def _bytes(images: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
    return np.clip(np.round(images), 0, 255).astype(np.uint8)


Draw = Callable[[np.random.Generator, int, tuple[int, int]], Drawn]
SCENES: dict[str, tuple[Draw, tuple[str, ...], int]] = {
    "shapes": (shapes, ("background", "disc", "square", "triangle", "ring"), 3),
    "far-cue": (far_cue, ("background", "dark", "bright"), 1),
    "own-corner": (own_corner, ("background", "dark", "bright"), 1),
    "near-cue": (near_cue, ("background", "dark", "bright"), 1),
}
"""Function that draws the scenes, classes, and number of channels."""
