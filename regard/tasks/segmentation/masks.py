"""Images with masks, read from a user's folder into an array of pixels and an array of class indices."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.measurement.units import counted
from regard.tasks.documents import file_name, names_of
from regard.tasks.image_files import (
    WITHOUT,
    Images,
    Unreadable,
    check_readable,
    left_out,
    opened_image,
    read_image,
    stacked,
)
from regard.tasks.images import ImageReader
from regard.tasks.protocol import IGNORED
from regard.tasks.segmentation.folders import (
    CLASSES,
    PICTURES,
    class_names,
    classes_among,
    largest_classes,
    merging,
    pairs_of,
)

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

    from regard.tasks.image_files import Pixels

Colour = tuple[int, int, int]
ORIENTATION = 0x0112
"""EXIF field for the orientation of a picture; from 5 on, its sides are swapped."""


@dataclass(frozen=True, kw_only=True)
class MaskReader(ImageReader):
    """Converts images to inputs of a segmentation model, and knows the classes' values in masks.

    Attributes:
        values: value of each class in a mask.
        colours: red, green and blue of each class.
        background: index of the class that is not scored; None for none.
    """

    values: tuple[int, ...]
    colours: tuple[Colour, ...]
    background: int | None

    def _image(self, path: Path, size: tuple[int, int]) -> Pixels:
        """Read the whole image, whatever its proportions, since a mask covers all of it."""
        return read_image(path, size, self.channels, stretch=True)[0]


@dataclass(frozen=True)
class Masked:
    """Images and the class of each of their pixels.

    Attributes:
        images: the images, with labels (n, h, w) that are class indices, or `IGNORED`.
        values, colours: values and colours of the classes in masks.
        background: as in :class:`MaskReader`.
        split: training and held-out images, and the rule in words; None to draw held-out images.
    """

    images: Images
    values: tuple[int, ...]
    colours: tuple[Colour, ...]
    background: int | None
    split: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], str] | None = None

    def largest(self, count: int, chosen: Int[np.ndarray, " m"], known: MaskReader | None = None) -> Masked:
        """Keep the `count` classes with the most pixels, without the background, into which the others are merged.

        Args:
            count: number of classes.
            chosen: the images that are counted.
            known: the reader of a trained model that is scored, whose classes are kept instead.

        Raises:
            Unsupported: for an impossible number, and without a background.
        """
        images, number = self.images, len(self.values)
        if known is None:
            seen = images.labels[chosen]
            kept = largest_classes(np.bincount(seen[seen != IGNORED], minlength=number), self.background, count)
        else:
            kept = [i for i, value in enumerate(self.values) if value in known.values]
        if len(kept) == number:
            return self
        indices, note = merging(kept, self.background, images.classes)
        labels = indices[np.where(images.labels == IGNORED, -1, images.labels)]
        return replace(
            self,
            images=replace(
                images, labels=labels, classes=tuple(images.classes[i] for i in kept), notes=[*images.notes, note]
            ),
            values=tuple(self.values[i] for i in kept),
            colours=tuple(self.colours[i] for i in kept),
            background=int(indices[self.background]),
        )


def colours_of(count: int) -> tuple[Colour, ...]:
    """Colours that are easy to distinguish: black, then hues a golden section apart."""
    found: list[Colour] = [(0, 0, 0)]
    for i in range(1, count):
        red, green, blue = colorsys.hsv_to_rgb(0.618034 * i % 1, 0.7 if i % 2 else 0.9, 0.95 if i % 3 else 0.7)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(found[:count])


def read_masked(
    folder: Path,
    validation: Path | None,
    size: tuple[int, int],
    channels: int,
    background: int | str | None,
    ignore: int | str | None,
    *,
    skip_unreadable: bool = False,
    span: tuple[float, float] | None = None,
    known: MaskReader | None = None,
    merged: bool = False,
) -> Masked:
    """Read the images and masks of a folder, resized to a height and width, masks by nearest neighbour.

    Args:
        folder: folder with `images` and `masks`, whose files have the same names except for suffixes, and optionally a
            file `classes.txt` with a line for each value in masks: the value and a name.
        validation: another such folder, whose images are held out.
        background: value of pixels that are not scored; None for none, ``auto`` for 0 if masks have it.
        ignore: value of pixels without loss and score; None for none, ``auto`` for 255 if there are more than two
            values.
        skip_unreadable: whether unreadable images or masks are reported in the notes instead of refused.
        span: as for :func:`regard.tasks.image_files.load_folders`.
        known: the reader of a trained model that is scored, of whose classes the masks may have any.
        merged: whether other values are its background.

    Raises:
        Unsupported: for files that are missing, unreadable or do not belong together, naming the first one.
    """
    pairs, notes = pairs_of(folder, PICTURES)
    names = class_names(folder / CLASSES)
    training = len(pairs)
    if validation is not None:
        more, more_notes = pairs_of(validation, PICTURES)
        pairs, notes = pairs + more, notes + more_notes
    masks, given, kept, unread = [], [], [], list[str]()
    palette = None
    for i, (image, drawn_mask) in enumerate(pairs):
        try:
            mask, colours = _read_mask(drawn_mask, image)
            given.append(read_image(image, size, channels, stretch=True)[0])
        except Unreadable as error:
            if not skip_unreadable:
                raise
            unread.append(error.asked.replace(f"{image.parent.parent}/", ""))
            continue
        masks.append(mask)
        kept.append(i)
        palette = palette or colours
    notes += left_out([file_name(one) for one in unread])
    training = sum(i < training for i in kept)
    pairs = [pairs[i] for i in kept]
    check_readable(folder, validation, training, len(kept), "image with its mask")
    values = classes_among(
        [path for _, path in pairs],
        [np.unique(mask) for mask in masks],
        training,
        names,
        background,
        ignore,
        known,
        merged=merged,
    )
    pixels, span, count = stacked(given, span, training=training)
    if span is not None:
        notes.append(
            f"{counted(count, 'image')} of more than 8 bits a pixel: {span[0]:g} to {span[1]:g} are taken as dark to light"
        )
    labels = values.indices[np.stack([_resized(mask, size) for mask in masks])]
    images = Images(
        names_of(folder),
        (*size, channels),
        np.stack(pixels),
        labels,
        tuple(names.get(value, str(value)) for value in values.classes) if known is None else known.classes,
        None if validation is None else np.arange(training, len(pairs)),
        notes,
        span,
    )
    if known is not None:
        drawn = known.colours
    else:
        drawn = (
            colours_of(len(values.classes)) if palette is None else tuple(palette[value] for value in values.classes)
        )
    return Masked(images, values.classes, drawn, values.background)


def _read_mask(path: Path, image: Path) -> tuple[UInt8[np.ndarray, "h w"], list[Colour] | None]:
    """Values of a mask, and its palette."""
    from PIL import ImageOps

    with opened_image(image) as opened:
        wide, high = _turned_size(opened)
    with opened_image(path) as opened:
        turned = ImageOps.exif_transpose(opened)
        mode, size, values = turned.mode, turned.size, np.asarray(turned)
        palette = turned.getpalette("RGB") if mode == "P" else None
    if mode not in ("1", "L", "P", "I;16", "I") or values.max(initial=0) > 255 or values.min(initial=0) < 0:
        what = "values above 255" if mode.startswith("I") else f"colours (mode {mode})"
        raise Unreadable(
            f"{path}, a mask of {what}",
            supported="a palette or grey image, whose values 0 to 255 are the classes",
            nearest=WITHOUT,
        )
    if size != (wide, high):
        raise Unreadable(
            f"{path} of {size[0]} x {size[1]} pixels, the mask of an image of {wide} x {high}",
            supported="masks of the size of their images",
            nearest=WITHOUT,
        )
    return values.astype(np.uint8), None if palette is None else _triples(palette)


def _turned_size(opened: Any) -> tuple[int, int]:
    """Width and height of an image after rotation by its EXIF orientation."""
    wide, high = opened.size
    return (high, wide) if opened.getexif().get(ORIENTATION, 1) >= 5 else (wide, high)


def _triples(palette: Sequence[int]) -> list[Colour]:
    whole = [*palette, *[0] * (768 - len(palette))]
    return [(whole[i], whole[i + 1], whole[i + 2]) for i in range(0, 768, 3)]


def _resized(mask: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2"]:
    from PIL import Image

    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
