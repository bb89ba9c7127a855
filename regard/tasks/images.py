"""Image classification on pixels or patches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern, Unsupported, one_of
from regard.measurement.units import counted
from regard.tasks.augmentation import AUGMENTATIONS, Augmentation
from regard.tasks.image_files import Images, centre, read_image, stacked
from regard.tasks.image_sets import NAMED, distinct, drawn, load_images, split_images
from regard.tasks.protocol import (
    AUGMENTATION,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import in_epochs, one_of_each_in_turn

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8
    from PIL.Image import Image as Picture

    from regard.tasks.image_files import Pixels

SHOWN = 384
"""Pixels along the shorter side of a picture for display."""


@dataclass(frozen=True)
class ImageReader:
    """Converts images to model inputs: everything that a trained model must keep from its task to read other images.

    Attributes:
        height, width, channels: size of the images.
        patch: side of a patch in pixels.
        mean, deviation: mean and standard deviation of each channel of the training images.
        classes: names of the classes.
        span: as in :class:`Images`.
    """

    height: int
    width: int
    channels: int
    patch: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[str, ...]
    span: tuple[float, float] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch

    def patches(self, pixels: Shaped[np.ndarray, "b h w c"]) -> Float[Tensor, "b n f"]:
        """Normalised patches, row by row; the pixels of a patch are row by row too, with their channels together."""
        (rows, columns), p = self.grid, self.patch
        normal = (pixels - np.array(self.mean)) / np.array(self.deviation)
        cut = normal.reshape(len(pixels), rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5)
        return torch.from_numpy(cut.reshape(len(pixels), rows * columns, -1).astype(np.float32))

    def read(self, paths: Sequence[Path]) -> Float[Tensor, "b n f"]:
        """Patches of image files. Images are rotated by their EXIF orientation, resized, and cropped to the centre.

        Raises:
            Unsupported: for files that cannot be read, and for images of more than 8 bits if the model was trained on
                none.
        """
        images = [self._image(path, (self.height, self.width)) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.dtype == np.float32 and self.span is None:
                raise Unsupported(
                    f"{path}, an image of more than 8 bits", supported="images of 8 bits, as the model was trained on"
                )
        return self.patches(np.stack(stacked(images, self.span)[0]))

    def _image(self, path: Path, size: tuple[int, int]) -> Pixels:
        """Read an image at a height and width, in the value range of its file."""
        return centre(read_image(path, size, self.channels)[0], size)

    def picture(self, path: Path) -> Picture:
        """The image that :meth:`read` sees, in colour and with `SHOWN` pixels along its shorter side: rotated, cropped
        (or stretched, as there), on white and in the model's value range.

        Raises:
            Unsupported: for a file that cannot be read.
        """
        from PIL import Image

        size = (round(SHOWN * side / min(self.height, self.width)) for side in (self.height, self.width))
        high, wide = size
        shown = self._image(path, (high, wide))
        values = stacked([shown], self.span)[0][0].round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(np.broadcast_to(values, (high, wide, 3)).copy())

    def pixels(self, patches: Float[Tensor, "b n f"]) -> UInt8[np.ndarray, "b h w c"]:
        """The images from which :meth:`patches` made patches, as bytes."""
        (rows, columns), p = self.grid, self.patch
        cut = patches.double().cpu().numpy().reshape(-1, rows, columns, p, p, self.channels)
        normal = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.height, self.width, self.channels)
        values = normal * np.array(self.deviation) + np.array(self.mean)
        return values.round().clip(0, 255).astype(np.uint8)

    def as_record(self) -> dict[str, Any]:
        """A record for JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Restore a reader from :meth:`as_record`."""
        return cls(**{key: as_tuples(value) for key, value in record.items()})


def as_tuples(value: Any) -> Any:
    """Convert the lists in a JSON value to tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


class ImagesTask(Task):
    """Classify images that are cut into square patches; the patches are the tokens, row by row.

    Features are the pixels of a patch, normalised per channel by the training images' mean and deviation. The split is
    by image, with the same share of each class; exact duplicates count once. An epoch shows each image once.

    Images from a folder keep their proportions: they are resized to cover `size` and the centre is cropped.
    Augmented training images are instead cropped anywhere.

    Args:
        data: ``digits`` (8x8, from scikit-learn; the default), ``fashion-mnist`` (28x28, if Debian's
            dataset-fashion-mnist is installed), a folder with one sub-folder per class, or one with MNIST's IDX files.
        validation: a folder with the same sub-folders, or some of them, if `data` is a folder; its images are held out.
        length: number of patches, as an alternative to `patch`.
        patch: side of a patch in pixels, a divisor of height and width; by default 1 for images up to 8x8, else close
            to 4.
        size: side of the squares to which images are resized, or their height and width, each 4 to 1024; by default 32
            for images from a folder, while other data keep their size.
        channels: 3 (colour) or 1 (grey), for images from a folder.
        augment: augmentation of training images: ``none``, ``light`` or ``standard``, see
            :class:`regard.tasks.augmentation.Augmentation`.
        flip: whether half of the training images are mirrored; None for augmented images, unless classes are digits or
            one is named for a side.
        mix: share of the training batches that are mixed, 0 to 1; None for half of them with ``standard``, else none.
        skip_unreadable: whether unreadable files in a folder are left out and reported, instead of refused.
        span: values of images of more than 8 bits from a folder that are black and white, as a list of two; by default
            the least and the greatest of `data`. Values beyond are clipped.
        held_out: share of each class to hold out if the data has no split of its own, 0.01 to 0.5.
        evaluation_items: largest number of held-out images, balanced over the classes, 1 to 65536.
        seed: seed of the split.
    """

    name = "images"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"
    named = NAMED

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        validation: str | Path | None = None,
        length: int | None = None,
        patch: int | None = None,
        size: int | Sequence[int] | None = None,
        channels: int | None = None,
        augment: str = "none",
        flip: bool | None = None,
        mix: float | None = None,
        skip_unreadable: bool = False,
        span: Sequence[float] | None = None,
        held_out: float = 0.2,
        evaluation_items: int = 1000,
        seed: int = 0,
    ) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_fraction("held_out", held_out, 0.01, 0.5)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        one_of("augment", augment, AUGMENTATIONS)
        loaded = load_images(
            "digits" if data is None else data,
            validation,
            size,
            channels,
            skip_unreadable=skip_unreadable,
            span=span,
            classes=None if self.scored is None else self.scored.reader.classes,
        )
        scored = self.scored is not None
        self._images = images = distinct(loaded, scored=scored)
        self.shared: int = images.shared
        self.num_classes: int = len(images.classes)
        height, width, depth = images.shape
        self.augmentation: Augmentation | None = None
        share = check_fraction("mix", (0.5 if augment == "standard" else 0.0) if mix is None else mix, 0, 1)
        if augment != "none" or flip or share:
            self.augmentation = Augmentation(augment, (height, width), images.classes, flip=flip, mix=share)
        self.repeats = self.augmentation is None
        self.patch = choose_patch((height, width), length, patch)
        self.grid: tuple[int, ...] = (height // self.patch, width // self.patch)
        self.length = self.grid[0] * self.grid[1]
        self.features: int = self.patch**2 * depth

        self._training, self._held_out = split_images(images, held_out, seed, scored=scored)
        self._scored = one_of_each_in_turn(self._held_out, images.labels)[:evaluation_items]
        mean, deviation = _statistics(images, self._training)
        self.reader = ImageReader(
            height,
            width,
            depth,
            self.patch,
            tuple(mean.tolist()),
            tuple(np.where(deviation > 0, deviation, 1.0).tolist()),
            images.classes,
            images.span,
        )
        scored_labels = images.labels[self._scored]
        self.chance = float(np.bincount(scored_labels).max() / len(scored_labels))
        self.baseline: Baseline | None = Baseline.majority_class(images.labels[self._training], scored_labels)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        chosen = in_epochs(self._training, step, seed, batch_size)
        if self.augmentation is None:
            return self._batch(chosen)
        labels = torch.from_numpy(self._images.labels[chosen])
        draws = int(counter_generator(seed, step, AUGMENTATION).integers(1 << 62))
        whole = self.augmentation.crops
        images = [self._images.pixels[i] for i in chosen] if whole else list(self._images.centres(chosen))
        pixels, shares = self.augmentation(images, labels, draws)
        return Batch(self.reader.patches(pixels), labels, grid=self.grid, class_shares=shares)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._batch(self._scored[rows])

    def describe(self) -> str:
        images = self._images
        height, width, depth = images.shape
        counts = Counter(images.labels[self._training].tolist())
        named = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(images.classes[:20]))
        lines = [
            f"images: {images.source}, {height}x{width} pixels, {'grey' if depth == 1 else 'colour'}",
            f"{self.length} tokens ({self.grid[0]}x{self.grid[1]}), patches of {self.patch}x{self.patch} pixels",
            f"training: {counted(len(self._training), 'image')} of {self.num_classes} classes ({named}"
            + (", ...)" if self.num_classes > 20 else ")"),
            f"held out: {counted(len(self._held_out), 'image')}, {len(self._scored):,} of them scored; chance "
            f"{self.chance:.3f}",
            "split: by image, "
            + (
                "as the data set comes"
                if images.held_out is not None
                else f"the same share of each class (seed {self.seed})"
            ),
        ]
        if not isinstance(images.pixels, np.ndarray):
            lines.append(
                f"other shapes: resized to cover {height}x{width} pixels, and the middle is seen"
                + (" of what is not varied" if self.augmentation and self.augmentation.crops else "")
            )
        lines.append(f"training images: {self.augmentation or 'as they are (augment=light or standard varies them)'}")
        lines += [f"note: {note}" for note in images.notes]
        first = self._training[0]
        shown = drawn(images.centres(np.array([first]))[0])
        return "\n".join([*lines, f"sample: {images.classes[images.labels[first]]}", *shown])

    def _batch(self, chosen: Int[np.ndarray, " b"]) -> Batch:
        labels = torch.from_numpy(self._images.labels[chosen])
        return Batch(self.reader.patches(self._images.centres(chosen)), labels, grid=self.grid)


def _statistics(
    images: Images, chosen: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Mean and standard deviation of each channel over the centre crops of images, computed in chunks."""
    parts = [chosen[rows] for rows in in_batches(len(chosen), 512)]
    count = len(chosen) * images.shape[0] * images.shape[1]
    mean = sum(images.centres(part).sum((0, 1, 2), dtype=np.float64) for part in parts) / count
    squares = sum(((images.centres(part) - mean) ** 2).sum((0, 1, 2)) for part in parts)
    return mean, np.sqrt(squares / count)


def choose_patch(size: tuple[int, ...], length: int | None, patch: int | None) -> int:
    """The side of patches that cut images of a given size into `length` tokens; close to 4 if neither is given.

    Args:
        size: height and width, or the sides of volumes, whose patches are cubes.

    Raises:
        Unsupported: for a patch side or a number of tokens that is impossible.
    """
    places, told = math.prod(size), "x".join(map(str, size))
    sides = [side for side in range(1, min(size) + 1) if all(each % side == 0 for each in size)]
    lengths = {side: places // side ** len(size) for side in sides}
    if patch is not None and patch not in sides:
        near = min(sides, key=lambda side: abs(side - patch)) if isinstance(patch, int) else sides[0]
        raise Unsupported(
            f"patch={patch} for images of {told}",
            supported=", ".join(map(str, sides)),
            nearest=f"patch={near}",
        )
    if length is None:
        return patch or (1 if places <= 64 else min(sides, key=lambda side: abs(side - 4)))
    fitting = sides if patch is None else [patch]
    for side in fitting:
        if lengths[side] == length:
            return side
    accepted = [lengths[side] for side in fitting]
    near = min(accepted, key=lambda n: abs(n - length)) if isinstance(length, int) else accepted[0]
    raise Unsupported(
        f"length={length} for images of {told}" + (f" with patch={patch}" if patch is not None else ""),
        supported="lengths " + ", ".join(map(str, accepted)),
        nearest=f"length={near}",
    )
