"""Augmentation of training images and volumes together with their masks: shifts, mirroring, rotation, scaling, shades.

Spatial changes apply to points and their classes alike; changes of shade leave the classes as they are. All randomness
comes from the generator passed to a call, so that a resumed run sees the same items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from regard.tasks.augmentation import sided_class

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

    Varied = tuple[Float[np.ndarray, "*sides c"], Int[np.ndarray, "*sides"]]

BORDER = 8
"""Shifts are up to 1 / BORDER of a side; beyond its border, the image is mirrored."""
TURN, LARGER = 15, 1.4
"""Largest rotation, in degrees, and largest scale factor (or its inverse) of ``standard``."""
OFTEN = 0.3
"""Share of the items to which ``standard`` applies each of its changes of shade."""


class MaskAugmentation:
    """Augmentation of the items of a training batch.

    Args:
        name: ``light`` shifts and mirrors; ``standard`` also rotates, scales, and changes brightness, contrast, gamma
            and noise, like nnU-Net (Isensee et al., arXiv 1904.08128); ``none`` mirrors at most.
        classes: names of the task's classes.
        flip: whether half of the items are mirrored, independently along each axis of `mirrored`; None for yes if no
            class is named for a side.
        mirrored: the axes, and their name in words.
        shift: whether items are shifted; unnecessary for random crops.
    """

    def __init__(
        self, name: str, classes: Sequence[str], *, flip: bool | None, mirrored: tuple[Sequence[int], str], shift: bool
    ) -> None:
        self.name, self.shift = name, shift
        self.sided = sided_class(classes) if flip is None else None
        self.flip = self.sided is None if flip is None else flip
        self.axes, self.along = mirrored

    def __call__(
        self, points: Shaped[np.ndarray, "*sides c"], labels: Int[np.ndarray, "*sides"], rng: np.random.Generator
    ) -> Varied:
        """Augment an item and its classes, keeping its shape.

        Args:
            points: points in any range of values, which is kept.
            labels: integers, which move with the points.
            rng: generator of all draws.
        """
        points = points.astype(np.float32)
        if self.flip:
            turned = [axis for axis in self.axes if rng.random() < 0.5]
            points, labels = np.flip(points, tuple(turned)), np.flip(labels, tuple(turned))
        if self.name == "standard":
            points, labels = self._moved(points, labels, rng)
            points = _shaded(points, rng)
        elif self.shift:
            points, labels = _shifted(points, labels, rng)
        return np.ascontiguousarray(points, np.float32), np.ascontiguousarray(labels)

    def __str__(self) -> str:
        parts = [f"shifted by up to a part in {BORDER} of a side"] * self.shift
        parts += [f"mirrored half the time, {self.along}"] * self.flip
        parts += [f"not mirrored, for the class {self.sided}"] * (self.sided is not None)
        if self.name == "standard":
            parts += [f"turned by up to {TURN} degrees, up to {LARGER} times larger or smaller, other shades and noise"]
        return ", ".join(parts) or "as they are"

    def _moved(
        self, points: Float[np.ndarray, "*sides c"], labels: Int[np.ndarray, "*sides"], rng: np.random.Generator
    ) -> Varied:
        """Rotate in the plane of the first two axes, scale and shift: points linearly, classes by the nearest point."""
        sides = labels.shape
        turn, size = math.radians(rng.uniform(-TURN, TURN)), LARGER ** rng.uniform(-1, 1)
        shift = rng.uniform(-2 / BORDER, 2 / BORDER, len(sides)) * self.shift
        matrix = np.eye(len(sides)) / size
        matrix[-2:, -2:] = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) / size
        half = np.array(sides[::-1]) / 2  # torch names the last axis first, and gives each side the length 2
        place = np.concatenate([matrix * half / half[:, None], shift[:, None]], 1)
        theta = torch.from_numpy(place.astype(np.float32))[None]

        def taken(values: np.ndarray, mode: str) -> np.ndarray:
            given = torch.from_numpy(np.ascontiguousarray(values, np.float32)).movedim(-1, 0)[None]
            grid = F.affine_grid(theta, list(given.shape), align_corners=False)
            return F.grid_sample(given, grid, mode, "reflection", align_corners=False)[0].movedim(0, -1).numpy()

        found = taken(labels[..., None], "nearest")[..., 0]
        return taken(points, "bilinear"), found.round().astype(labels.dtype)


def _shifted(
    points: Float[np.ndarray, "*sides c"], labels: Int[np.ndarray, "*sides"], rng: np.random.Generator
) -> Varied:
    """Shift by whole points, mirroring at the border."""
    room = [max(1, side // BORDER) for side in labels.shape]
    around = [(most, most) for most in room]
    begin = [int(rng.integers(2 * most + 1)) for most in room]
    window = tuple(slice(first, first + side) for first, side in zip(begin, labels.shape, strict=True))
    return np.pad(points, [*around, (0, 0)], mode="symmetric")[window], np.pad(labels, around, mode="symmetric")[window]


def _shaded(points: Float[np.ndarray, "*sides c"], rng: np.random.Generator) -> Float[np.ndarray, "*sides c"]:
    """Change brightness, contrast and gamma of each channel and add noise, in units of its standard deviation."""
    axes = tuple(range(points.ndim - 1))
    channels = points.shape[-1:]
    deviation = points.std(axes)
    ways: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x + deviation * rng.uniform(-0.3, 0.3, channels),
        lambda x: (x - x.mean(axes)) * rng.uniform(0.75, 1.25, channels) + x.mean(axes),
        lambda x: _gamma(x, rng.uniform(0.7, 1.5, channels)),
        lambda x: x + rng.normal(size=x.shape) * deviation * rng.uniform(0, 0.3),
    ]
    for way in ways:
        if rng.random() < OFTEN:
            points = way(points)
    return points


def _gamma(points: Float[np.ndarray, "*sides c"], power: Float[np.ndarray, " c"]) -> Float[np.ndarray, "*sides c"]:
    """Raise values to a power, relative to the range from the least to the greatest value of their channel."""
    axes = tuple(range(points.ndim - 1))
    low, high = points.min(axes), points.max(axes)
    span = np.where(high > low, high - low, 1.0)
    return low + span * ((points - low) / span).clip(0, 1) ** power
