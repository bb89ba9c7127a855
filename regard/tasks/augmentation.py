"""Augmentation of training images by torchvision's transforms: crops, mirroring, colour changes, and mixing.

All randomness comes from the seed passed to a call, so that a resumed run sees the same images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.tasks.image_sets import DIGITS

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8

AUGMENTATIONS = ("none", "light", "standard")
BORDER = 8
"""A light crop may reach beyond the image by this fraction (1 / BORDER) of its side."""
SCALE = (0.35, 1.0)
"""Fraction of the area that a standard crop keeps."""
OPERATIONS, MAGNITUDE = 2, 9
"""Arguments of RandAugment, as in torchvision and timm."""
SIDED = re.compile(r"(^|[\W_])(left|right|l|r)($|[\W_])", re.IGNORECASE)
"""Names of classes that mirroring would exchange."""


def sided_class(classes: Sequence[str]) -> str | None:
    """The first class that is named for a side, which mirroring would exchange with another; None if none is."""
    return next((one for one in classes if SIDED.search(one)), None)


class Augmentation:
    """Augmentation of the images of a training batch.

    Args:
        name: ``light`` crops at random places, also beyond the border; ``standard`` crops parts of any size, and
            rotates, shifts or recolours them by RandAugment (arXiv 1909.13719); ``none`` does nothing but `flip` and
            `mix`.
        size: height and width of the results.
        classes: names of the task's classes.
        flip: whether half of the images are mirrored, left to right; None for yes with ``light`` and ``standard``, unless
            classes are digits or one is named for a side.
        mix: share of the batches whose images are mixed in pairs, together with their classes: half by mixup (arXiv
            1710.09412) and half by cutmix (arXiv 1905.04899).

    Raises:
        Unsupported: if torchvision is missing.
    """

    def __init__(
        self, name: str, size: tuple[int, int], classes: Sequence[str], *, flip: bool | None, mix: float
    ) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError:
            raise Unsupported(
                "images that are augmented without torchvision, which does it",
                supported="augment=none without flip and mix, or the extra",
                nearest="pip install 'regard[vision]'",
            ) from None
        self.name, self.size, self.mix = name, size, mix
        self.sided = sided_class(classes) if flip is None and name != "none" else None
        mirrored = name != "none" and self.sided is None and tuple(classes) != DIGITS
        self.flip = mirrored if flip is None else flip
        self.border = max(1, min(size) // BORDER)
        steps: list[Any] = []
        if name == "standard":
            steps.append(v2.RandomResizedCrop(size, scale=SCALE, antialias=True))
        elif name == "light":
            steps.append(v2.RandomCrop(size, padding=self.border, padding_mode="reflect"))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if name == "standard":
            steps.append(v2.RandAugment(OPERATIONS, MAGNITUDE))
        self._vary = v2.Compose(steps or [v2.Identity()])
        self._mix = v2.RandomChoice(
            [v2.MixUp(alpha=0.8, num_classes=len(classes)), v2.CutMix(alpha=1.0, num_classes=len(classes))]
        )

    @property
    def crops(self) -> bool:
        """Whether it cuts its own part out of an image of any shape; else images come as they are shown."""
        return self.name != "none"

    def __call__(
        self,
        images: Sequence[UInt8[np.ndarray, "h w c"]] | Sequence[Float[np.ndarray, "h w c"]],
        labels: Int[Tensor, " b"],
        seed: int,
    ) -> tuple[Shaped[np.ndarray, "b h w c"], Float[Tensor, "b classes"] | None]:
        """Augment images. Returns them in the same range from 0 to 255, and the share of each class in each image, or
        None if they were not mixed.

        Args:
            images: images of at least `size`.
            labels: their classes.
            seed: seed of all draws.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            varied = torch.stack([self._vary(_channels_first(image)) for image in images])
            shares = None
            if self.mix and float(torch.rand(())) < self.mix:
                scaled = varied if varied.dtype.is_floating_point else varied.float() / 255
                varied, shares = self._mix(scaled, labels)
        pixels = varied.permute(0, 2, 3, 1).numpy()
        return (pixels * 255 if pixels.dtype == np.float32 else pixels), shares

    def __str__(self) -> str:
        parts = []
        if self.name == "light":
            parts = [f"crops up to {self.border} pixels beside the image"]
        elif self.name == "standard":
            parts = [f"crops of {SCALE[0]:.0%} to {SCALE[1]:.0%} of the image, RandAugment ({OPERATIONS}, {MAGNITUDE})"]
        parts += ["mirrored half the time"] * self.flip
        parts += [f"not mirrored, for the class {self.sided}"] * (self.sided is not None)
        parts += [f"{self.mix:.0%} of the batches mixed (mixup, cutmix)"] * bool(self.mix)
        return ", ".join(parts)


def _channels_first(image: np.ndarray) -> Tensor:
    """Convert (H, W, C) from 0 to 255 to torchvision's layout: bytes, or floats from 0 to 1."""
    turned = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return turned / 255 if turned.dtype.is_floating_point else turned
