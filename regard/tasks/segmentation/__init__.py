"""Segmentation: a class for each pixel of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.measurement.units import counted
from regard.tasks.image_sets import check_span, distinct
from regard.tasks.images import choose_patch
from regard.tasks.protocol import (
    AUGMENTATION,
    EVALUATION,
    IGNORED,
    SPLIT,
    TRAINING,
    Baseline,
    Batch,
    check_integer,
    check_sides,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import in_epochs, spread
from regard.tasks.segmentation.base import METRICS, MaskTask, letters
from regard.tasks.segmentation.folders import PICTURES
from regard.tasks.segmentation.heads import HEADS, is_head, read_slices
from regard.tasks.segmentation.masks import Masked, MaskReader, colours_of, read_masked
from regard.tasks.segmentation.scenes import SCENES

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped, UInt8

SAMPLED = 256
"""Scenes from which the statistics and the baseline of drawn data are taken; fewer if larger than 64 x 64 pixels."""


class SegmentationTask(MaskTask):
    """Classify every pixel of images that are cut into square patches; the patches are the tokens, row by row.

    Features are the pixels of a patch, normalised per channel by the training images' mean and deviation. The score of
    an image is the Dice coefficient or the intersection over union, averaged over the classes in its mask or prediction
    (without the background); both are reported. Exact duplicates of an image count once, and images without a labelled
    pixel not at all.

    Args:
        data: ``shapes`` (drawn: four kinds of coloured shapes; the default), ``far-cue`` (drawn: ellipses whose class
            is shown by a mark in a corner), ``own-corner`` (for each ellipse, by the mark in its own corner) or
            ``near-cue`` (by its own brightness), ``colin27`` (a head with 116 regions, from Debian's mricron-data, or a
            folder with its files), ``mni152`` (a head with its tissues, from nilearn), or a folder with `images` and
            `masks` of the same names, and optionally `classes.txt` with a line ``value name`` for each class.
        validation: a folder like `data`, if that is a folder; its images are held out.
        length: number of patches, as an alternative to `patch`.
        patch: side of a patch in pixels, a divisor of both sides; by default close to 4.
        size: side of the squares in which images and masks are drawn or to which they are resized, or their height and
            width, each 16 to 1024.
        channels: 3 (colour) or 1 (grey), for images from a folder.
        skip_unreadable: whether unreadable images or masks in a folder are left out and reported, instead of refused.
        span: values of images of more than 8 bits from a folder that are black and white, as a list of two; by default
            the least and the greatest of `data`. Values beyond are clipped.
        augment: augmentation of training images from a folder or a head, together with their masks: ``none``, ``light``
            (shifted and mirrored) or ``standard`` (also rotated, scaled, and with changed shades and noise).
        flip: whether half of the images are mirrored, left to right; by default with `augment` if no class is named for
            a side.
        classes: keep only this many classes, those with the most pixels; others become background. For a folder or a
            head.
        background: value in a folder's masks that is not scored; ``None`` scores all values, ``auto`` means 0.
        ignore: value in a folder's masks without loss and score; ``None`` for none, ``auto`` means 255 if there are
            more than two values.
        metric: ``dice`` or ``iou``, the metric of the comparison.
        held_out: share of a folder's images, or of a head's slices, to hold out, 0.01 to 0.5.
        evaluation_items: largest number of held-out images, 1 to 65536.
        seed: seed of the split and of drawn held-out images.
    """

    name = "segmentation"
    kind, scenes = PICTURES, SCENES
    named = (*SCENES, *HEADS)
    mirrored, placed = ((1,), "left to right"), True

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        validation: str | Path | None = None,
        length: int | None = None,
        patch: int | None = None,
        size: int | Sequence[int] = 64,
        channels: int | None = None,
        skip_unreadable: bool = False,
        span: Sequence[float] | None = None,
        augment: str = "none",
        flip: bool | None = None,
        classes: int | None = None,
        background: int | str | None = "auto",
        ignore: int | str | None = "auto",
        metric: str = "dice",
        held_out: float = 0.2,
        evaluation_items: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(metric, held_out, evaluation_items, seed, augment)
        height, width = check_sides(size, 2, 16, 1024)
        self.size = height, width
        self.patch = choose_patch(self.size, length, patch)
        self.grid: tuple[int, ...] = (height // self.patch, width // self.patch)
        self.length = self.grid[0] * self.grid[1]
        self.num_targets: int = self.patch**2

        if classes is not None:
            check_integer("classes", classes, 1, 255)
        chosen = "shapes" if data is None else str(data)
        values_of_masks = {"background": background, "ignore": ignore}
        of_read = {"classes": classes, "augment": None if augment == "none" else augment, "flip": flip or None}
        of_folders = {
            "validation": validation,
            "channels": channels,
            "skip_unreadable": skip_unreadable or None,
            "span": span,
        }
        self.check_data(chosen, values_of_masks, of_folders, of_read)
        if channels not in (None, 1, 3):
            raise Unsupported(f"channels={channels}", supported="3 (colour) or 1 (grey)", nearest="channels=3")
        self._scene = chosen if chosen in SCENES else None
        self._masked = (
            None
            if self._scene
            else self._read(chosen, validation, channels, values_of_masks, held_out, skip_unreadable, span, classes)
        )
        number: int | None = 0
        if self._masked is None:
            _, names, depth = SCENES[chosen]
            values, colours = tuple(range(len(names))), colours_of(len(names))
            count = min(SAMPLED, max(16, SAMPLED * 64**2 // (height * width)))
            pixels, labels = self._drawn(count, counter_generator(seed, 0, SPLIT))
            self._scored = self._drawn(evaluation_items, counter_generator(seed, 0, EVALUATION))
            self._held_out = evaluation_items
        else:
            images: Any = self._masked.images  # its pixels are a single array
            parts = self._masked.split
            if parts is None:
                images = distinct(images, scored=self.scored is not None)
                self.shared: int = images.shared
                everything, held = np.arange(len(images.pixels)), images.held_out
                if held is not None:
                    parts = np.setdiff1d(everything, held), held, "by image, as the data set comes"
            labelled = (images.labels != IGNORED).any((1, 2))
            images = replace(images, notes=[*images.notes, *self.unlabelled_told(labelled)])
            self._training, held, self._split = self.told_apart(images.source, labelled, parts, held_out)
            if classes is not None:
                self._masked = replace(self._masked, images=images).largest(classes, self._training, self._known)
                images = self._masked.images
            names, values, colours = images.classes, self._masked.values, self._masked.colours
            number = self._masked.background
            pixels, labels = images.pixels[self._training], images.labels[self._training]
            scored = held[spread(len(held), evaluation_items)]
            self._images, self._scored = images, (images.pixels[scored], images.labels[scored])
            self._held_out, depth = len(held), pixels.shape[-1]
        self.num_classes: int = len(names)
        self.features: int = self.num_targets * depth
        flat = pixels.reshape(-1, depth)
        deviation = flat.std(0, dtype=np.float64)
        self.reader = MaskReader(
            height=height,
            width=width,
            channels=depth,
            patch=self.patch,
            mean=tuple(flat.mean(0, dtype=np.float64).tolist()),
            deviation=tuple(np.where(deviation > 0, deviation, 1.0).tolist()),
            classes=names,
            span=None if self._masked is None else self._images.span,
            values=values,
            colours=colours,
            background=number,
        )
        self.augmentation = self.augmentation_of(augment, flip)
        self.repeats = self._masked is not None and self.augmentation is None
        self._counts = np.bincount(labels[labels != IGNORED], minlength=len(names))
        self._seen = np.array([(labels == i).any((1, 2)).sum() for i in range(len(names))])
        self._ignored = float((labels == IGNORED).mean())
        self._measured = len(labels)
        self._example = labels[len(labels) // 2]
        self.baseline: Baseline | None = self._commonest(labels)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        if self._masked is None:
            return self._batch(*self._drawn(batch_size, counter_generator(seed, step, TRAINING)))
        chosen = in_epochs(self._training, step, seed, batch_size)
        pixels, labels = self._images.pixels[chosen], self._images.labels[chosen]
        if self.augmentation is not None:
            rng = counter_generator(seed, step, AUGMENTATION)
            pairs = [self.augmentation(*item, rng) for item in zip(pixels, labels, strict=True)]
            pixels, labels = (np.stack(part) for part in zip(*pairs, strict=True))
            pixels = pixels.clip(0, 255)
        return self._batch(pixels, labels)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        pixels, labels = self._scored
        for rows in in_batches(len(pixels), batch_size):
            yield self._batch(pixels[rows], labels[rows])

    def picture(self, batch: Batch) -> UInt8[np.ndarray, "h w c"]:
        return self.reader.pixels(batch.inputs)[0]

    def mask(self, classes: Int[Tensor, "1 n p"], batch: Batch) -> Int[np.ndarray, "h w"]:
        return self.whole(classes)[0]

    def whole(self, targets: Int[Tensor, "b n p"]) -> Int[np.ndarray, "b h w"]:
        """Reassemble the masks from which a batch's targets were cut."""
        (rows, columns), p = self.grid, self.patch
        return targets.numpy().reshape(-1, rows, columns, p, p).transpose(0, 1, 3, 2, 4).reshape(-1, *self.size)

    def describe(self) -> str:
        scored, shares = len(self._scored[0]), self._counts / max(1, self._counts.sum())
        if self._masked is None:
            source, notes = f"the scenes {self._scene}, drawn", list[str]()
            training = "drawn afresh at each step"
            split = f"held-out scenes are drawn from a seed of their own ({self.seed})"
        else:
            source, notes, split = self._images.source, self._images.notes, self._split
            training = counted(len(self._training), "image")
        size = "x".join(map(str, self.size))
        lines = [
            f"segmentation: {source}, {size} pixels, {'grey' if self.reader.channels == 1 else 'colour'}",
            f"{self.length} tokens ({self.grid[0]}x{self.grid[1]}), patches of {self.patch}x{self.patch} pixels",
            self.classes_told(shares, self._seen, self._measured),
            f"training: {training}; held out: {counted(self._held_out, 'image')}, {scored:,} of them scored",
            *([] if self._masked is None else self.varied_told("training images")),
            *self.rest_told(split, self._ignored, notes),
        ]
        return "\n".join([*lines, "sample of a mask:", *letters(self._example, self.reader.background)])

    def _read(
        self,
        data: str,
        validation: str | Path | None,
        channels: int | None,
        values: Mapping[str, int | str | None],
        held_out: float,
        skip_unreadable: bool,
        span: Sequence[float] | None,
        classes: int | None,
    ) -> Masked:
        if is_head(data):
            return read_slices(data, self.size, held_out, self.seed)
        return read_masked(
            Path(data),
            None if validation is None else Path(validation),
            self.size,
            3 if channels is None else channels,
            **values,
            skip_unreadable=skip_unreadable,
            span=check_span(span),
            known=self._known,
            merged=classes is not None,
        )

    def _drawn(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        assert self._scene is not None
        return SCENES[self._scene][0](rng, count, self.size)

    def _batch(self, pixels: Shaped[np.ndarray, "b h w c"], labels: Int[np.ndarray, "b h w"]) -> Batch:
        (rows, columns), p = self.grid, self.patch
        cut = labels.reshape(-1, rows, p, columns, p).transpose(0, 1, 3, 2, 4).reshape(-1, self.length, p * p)
        return Batch(self.reader.patches(pixels), torch.from_numpy(np.ascontiguousarray(cut, np.int64)), grid=self.grid)

    def _commonest(self, labels: Int[np.ndarray, "n h w"]) -> Baseline:
        """The rule that answers, at each position, with the class that most training masks have there."""
        counts = np.stack([(labels == i).sum(0) for i in range(self.num_classes)])
        best = torch.from_numpy(counts.argmax(0)).flatten()[None]
        targets = torch.from_numpy(self._scored[1]).flatten(1)
        items = self.of_images(best.expand_as(targets), targets)
        return Baseline("the commonest class of each place", torch.stack(items, -1).numpy())


__all__ = ["METRICS", "MaskReader", "MaskTask", "SegmentationTask"]
