"""Volumes drawn together with their masks: bodies in noise, and ellipsoids whose class a distant corner shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Drawn = tuple[np.ndarray, np.ndarray]
"""A volume (X, Y, Z), and the class index of each voxel."""


def bodies(rng: np.random.Generator, sides: tuple[int, ...]) -> Drawn:
    """Draw two to five balls, boxes, rods and shells (hollow balls), in any shade and rotation, later over earlier.

    The shade gives no information about the class; the background has a gradient, and the whole volume has noise.
    """
    places = _places(sides)
    volume = rng.uniform(80, 180) + np.tensordot(rng.normal(0, 40, 3), places, 1)
    classes = np.zeros(sides, dtype=np.int16)
    for _ in range(rng.integers(2, 6)):
        kind = int(rng.integers(1, 5))
        inside = _inside(kind, places, rng)
        volume[inside] = rng.uniform(0, 255)
        classes[inside] = kind
    return volume + rng.normal(0, 20, sides), classes


def _inside(kind: int, places: Float[np.ndarray, "3 x y z"], rng: np.random.Generator) -> Bool[np.ndarray, "x y z"]:
    """The voxels of a body: ball, box, rod or shell."""
    size, turn = rng.uniform(0.1, 0.2), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    away = places - rng.uniform(-0.35, 0.35, (3, 1, 1, 1))
    if kind in (1, 4):
        radius = np.sqrt((away**2).sum(0))
        return (radius < size) & ((radius > 0.6 * size) | (kind == 1))
    a, b, c = np.tensordot(turn, away, 1)
    if kind == 2:
        return np.maximum(np.maximum(abs(a), abs(b)), abs(c)) < 0.75 * size
    return (np.hypot(a, b) < 0.45 * size) & (abs(c) < 1.6 * size)


def corner_cue(rng: np.random.Generator, sides: tuple[int, ...], *, far: bool) -> Drawn:
    """Draw one to three ellipsoids in noise, all of one of two classes, at least a fifth of a side from the border.

    With `far`, they look alike, and their class is shown by a small cube in one of the eight corners, bright or dark;
    otherwise the ellipsoids themselves are bright or dark, and there is no cube.
    """
    places = _places(sides)
    volume, classes = 128 + rng.normal(0, 25, sides), np.zeros(sides, dtype=np.int16)
    sign = int(rng.integers(2))
    blobs = np.zeros(sides, dtype=bool)
    for _ in range(rng.integers(1, 4)):
        away = places - rng.uniform(-0.15, 0.15, (3, 1, 1, 1))
        turned = np.tensordot(np.linalg.qr(rng.normal(size=(3, 3)))[0], away, 1)
        blobs |= ((turned / rng.uniform(0.07, 0.14, (3, 1, 1, 1))) ** 2).sum(0) < 1
    volume[blobs] += 60 if far else 60 * (2 * sign - 1)
    classes[blobs] = 1 + sign
    if far:
        marker = [max(2, side // 8) for side in sides]
        corner = [int(rng.choice([0, side - own])) for side, own in zip(sides, marker, strict=True)]
        x, y, z = (slice(begin, begin + own) for begin, own in zip(corner, marker, strict=True))
        volume[x, y, z] = 245 if sign else 10
    return volume, classes


def far_cue(rng: np.random.Generator, sides: tuple[int, ...]) -> Drawn:
    """:func:`corner_cue` with the cue in a corner."""
    return corner_cue(rng, sides, far=True)


def near_cue(rng: np.random.Generator, sides: tuple[int, ...]) -> Drawn:
    """:func:`corner_cue` with the cue in the ellipsoids themselves: the control."""
    return corner_cue(rng, sides, far=False)


def _places(sides: tuple[int, ...]) -> Float[np.ndarray, "3 x y z"]:
    """Coordinates of the voxels, -0.5 to 0.5 along each axis."""
    return np.stack(np.meshgrid(*((np.arange(side) + 0.5) / side - 0.5 for side in sides), indexing="ij"))


Draw = Callable[[np.random.Generator, tuple[int, ...]], Drawn]
SCENES: dict[str, tuple[Draw, tuple[str, ...], float]] = {
    "bodies": (bodies, ("background", "ball", "box", "rod", "shell"), 1.5),
    "far-cue": (far_cue, ("background", "dark", "bright"), 1.0),
    "near-cue": (near_cue, ("background", "dark", "bright"), 1.0),
}
"""Function that draws a scene, classes, and ratio of a scene's side to a crop's, so that crops contain the cue."""
