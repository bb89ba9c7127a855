"""Images as sequences of pixels, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.measurement.units import counted
from regard.tasks.image_files import require_pillow
from regard.tasks.image_sets import NAMED, distinct, drawn, load_images, split_images
from regard.tasks.protocol import (
    Baseline,
    Batch,
    Task,
    bits_per_byte,
    check_fraction,
    check_integer,
    in_batches,
)
from regard.tasks.sampling import in_epochs, one_of_each_in_turn, spread

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

VALUES = 256
"""Number of values of a pixel's channel."""
LONGEST = 1 << 16
FITTED = 4096
"""Largest number of training images for fitting the baseline and counting colours."""
LOOKED_AT, MOVING = 256, 1000
"""Number of images from which a palette is chosen, and of pixels that may still change colour when that is finished."""
SHADES = 16
"""Number of shades of a neighbour that the baseline distinguishes."""
PRIOR = 16.0
"""Weight, in pixels, of the overall value frequencies in the baseline's histogram for one neighbourhood."""


class PixelsTask(Task):
    """Predict an image pixel by pixel, row by row (PixelRNN, van den Oord et al., arXiv 1601.06759); scored in bits per
    dimension of held-out images.

    A token is the value of one channel of a pixel, 0 to 255; the channels of a pixel follow each other. With a palette,
    a token is one of its colours. The input is a 0 followed by the sequence before each token; a model is not given the
    width of the image. Data and splits are those of the task images. The baseline is a histogram of the values given
    the shades of the pixels to the left and above, fitted on training images.

    Args:
        data: ``digits`` (8x8, from scikit-learn; the default), ``fashion-mnist`` (28x28, if Debian's
            dataset-fashion-mnist is installed), a folder with one sub-folder per class, or one with MNIST's IDX files.
        validation: a folder with the same sub-folders, or some of them, if `data` is a folder; its images are held out.
        size: side to which images are resized, 4 to 256; by default 32 for images from a folder, while other data keep
            their size.
        channels: 3 (colour) or 1 (grey), for images from a folder.
        palette: largest number of colours, 2 to 256; each pixel is replaced by the nearest colour. None for the values
            of the channels. The palette has all colours of the training images if there are few enough, else those
            chosen by Pillow (median cut and k-means).
        skip_unreadable: whether unreadable files in a folder are left out and reported, instead of refused.
        held_out: share of each class to hold out if the data has no split of its own, 0.01 to 0.5.
        evaluation_items: largest number of held-out images that are scored, 1 to 65536.
        seed: seed of the split.
    """

    name = "pixels"
    pattern = Pattern.CAUSAL_SELF
    objective = "next-token"
    metric = "bits per dimension"
    higher_is_better = False
    named = NAMED

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        validation: str | Path | None = None,
        size: int | None = None,
        channels: int | None = None,
        palette: int | None = None,
        skip_unreadable: bool = False,
        held_out: float = 0.2,
        evaluation_items: int = 256,
        seed: int = 0,
    ) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_fraction("held_out", held_out, 0.01, 0.5)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        if size is not None:
            check_integer("size", size, 4, 256)
        if palette is not None:
            check_integer("palette", palette, 2, VALUES)
        loaded = load_images(
            "digits" if data is None else data, validation, size, channels, skip_unreadable=skip_unreadable
        )
        scored = self.scored is not None
        self._images = images = distinct(loaded, scored=scored)
        self.shared: int = images.shared
        height, width, depth = images.shape
        self.sides = height, width, depth if palette is None else 1
        self.length = math.prod(self.sides)
        if self.length > LONGEST:
            raise Unsupported(
                f"images of {height}x{width} pixels as sequences of {self.length:,} tokens",
                supported=f"up to {LONGEST:,} tokens",
                nearest=f"size={math.isqrt(LONGEST // self.sides[2])}",
            )
        self._training, self._held_out = split_images(images, held_out, seed, scored=scored)
        self._scored = one_of_each_in_turn(self._held_out, images.labels)[:evaluation_items]
        fitted = self._training[spread(len(self._training), FITTED)]
        self.palette = None if palette is None else _palette(self._bytes(fitted), palette)
        self.vocab_size: int = VALUES if self.palette is None else len(self.palette)
        self.chance = math.log2(self.vocab_size)
        self.baseline: Baseline | None = self._rule(fitted)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self._batch(in_epochs(self._training, step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._batch(self._scored[rows])

    def score(self, logits: Float[Tensor, "b n v"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Bits spent and values predicted, for each image."""
        return bits_per_byte(logits, batch, torch.ones(self.vocab_size, dtype=torch.long))

    def describe(self) -> str:
        images, rule = self._images, self.baseline
        assert rule is not None
        height, width, depth = images.shape
        what = "grey values" if depth == 1 else "values of three channels"
        told = f"{what}, {VALUES} of each" if self.palette is None else f"{self.vocab_size} colours"
        lines = [
            f"pixels: {images.source}, {height}x{width} pixels row by row, {self.length} tokens, {told}",
            f"training: {counted(len(self._training), 'image')}; held out: {len(self._held_out):,}, {len(self._scored):,} of them "
            "scored, in bits per dimension",
            f"all values alike: {self.chance:.3f}; {rule.name}: {rule.score:.3f}",
            "split: by image, "
            + (
                "as the data set comes"
                if images.held_out is not None
                else f"the same share of each class (seed {self.seed})"
            ),
        ]
        lines += [f"note: {note}" for note in images.notes]
        shown = self.pictures(self._tokens(self._training[:1]))[0]
        return "\n".join([*lines, "sample:", *drawn(shown)])

    def pictures(self, tokens: Int[np.ndarray, "b n"]) -> UInt8[np.ndarray, "b h w c"]:
        """Convert complete token sequences to images."""
        if self.palette is not None:
            return self.palette[tokens].reshape(len(tokens), *self._images.shape)
        return tokens.astype(np.uint8).reshape(len(tokens), *self.sides)

    def _bytes(self, chosen: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        pixels = self._images.centres(chosen)
        return pixels if pixels.dtype == np.uint8 else pixels.round().clip(0, VALUES - 1).astype(np.uint8)

    def _tokens(self, chosen: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b n"]:
        pixels = self._bytes(chosen)
        values = pixels if self.palette is None else nearest_colour(pixels, self.palette)
        return values.reshape(len(chosen), -1).astype(np.int64)

    def _batch(self, chosen: Int[np.ndarray, " b"]) -> Batch:
        targets = torch.from_numpy(self._tokens(chosen))
        return Batch(F.pad(targets[:, :-1], (1, 0)), targets)

    def _neighbourhoods(self, tokens: Int[np.ndarray, "b n"]) -> Int[np.ndarray, "b n"]:
        """An index for the channel of each token and the shades to its left and above; outside counts as a shade."""
        shade = tokens.reshape(len(tokens), *self.sides) * SHADES // self.vocab_size + 1
        left, above = np.zeros_like(shade), np.zeros_like(shade)
        left[:, :, 1:], above[:, 1:] = shade[:, :, :-1], shade[:, :-1]
        channel = np.arange(self.sides[2])
        return ((channel * (SHADES + 1) + left) * (SHADES + 1) + above).reshape(tokens.shape)

    def _rule(self, fitted: Int[np.ndarray, " b"]) -> Baseline:
        kinds = self.sides[2] * (SHADES + 1) ** 2
        found = np.zeros(kinds * self.vocab_size)
        for rows in in_batches(len(fitted), 256):
            tokens = self._tokens(fitted[rows])
            places = self._neighbourhoods(tokens) * self.vocab_size + tokens
            found += np.bincount(places.ravel(), minlength=len(found))
        counts = found.reshape(kinds, self.vocab_size)
        every = counts.sum(0) + 1
        chances = counts + PRIOR * every / every.sum()
        bits = -np.log2(chances / chances.sum(1, keepdims=True))
        items = []
        for rows in in_batches(len(self._scored), 256):
            tokens = self._tokens(self._scored[rows])
            items.append(bits[self._neighbourhoods(tokens), tokens].sum(1))
        spent = np.concatenate(items)
        return Baseline(
            "histogram by the pixels left and above", np.stack([spent, np.full_like(spent, self.length)], -1)
        )


def nearest_colour(pixels: UInt8[np.ndarray, "*b c"], palette: UInt8[np.ndarray, "k c"]) -> Int[np.ndarray, "*b"]:
    """Index of the palette colour nearest to each pixel; the first one in case of a tie."""
    colours, places = _colours(pixels)
    chosen = []
    for rows in in_batches(len(colours), 4096):
        apart = torch.cdist(
            torch.from_numpy(colours[rows]).double(),
            torch.from_numpy(palette).double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        chosen.append(apart.argmin(1).numpy())
    found: np.ndarray = np.concatenate(chosen)[places].reshape(pixels.shape[:-1])
    return found


def _colours(pixels: UInt8[np.ndarray, "*b c"]) -> tuple[UInt8[np.ndarray, "k c"], Int[np.ndarray, " n"]]:
    """The distinct colours of pixels, and the index of each pixel's colour."""
    weights = VALUES ** np.arange(pixels.shape[-1])
    codes, places = np.unique((pixels.astype(np.int64) @ weights).ravel(), return_inverse=True)
    return (codes[:, None] // weights % VALUES).astype(np.uint8), places


def _palette(pixels: UInt8[np.ndarray, "b h w c"], count: int) -> UInt8[np.ndarray, "k c"]:
    """A palette of at most `count` colours for images, from dark to light."""
    colours, _ = _colours(pixels)
    if len(colours) > count:
        require_pillow()
        from PIL import Image

        channels = pixels.shape[-1]
        some = pixels[spread(len(pixels), LOOKED_AT)]
        flat = np.repeat(some, 3 // channels, axis=-1).reshape(-1, pixels.shape[2], 3)
        chosen = Image.fromarray(flat).quantize(count, kmeans=MOVING).getpalette() or []
        colours, _ = _colours(np.array(chosen, dtype=np.uint8).reshape(-1, 3)[:count, :channels])
    ordered: np.ndarray = colours[np.argsort(colours.sum(1, dtype=np.int64), kind="stable")]
    return ordered
