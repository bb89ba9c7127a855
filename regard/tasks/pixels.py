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
"""Of a channel of a pixel."""
LONGEST = 1 << 16
FITTED = 4096
"""Training images that the simple rule is fitted on and that colours are counted in, at most."""
LOOKED_AT, MOVING = 256, 1000
"""Images that a palette is chosen for, and pixels that may still change their colour when it is done."""
SHADES = 16
"""Shades of a neighbour that the simple rule tells apart."""
PRIOR = 16.0
"""Pixels that the frequencies of all values count for in the rule's histogram of one neighbourhood."""


class PixelsTask(Task):
    """Predict an image pixel by pixel, row by row (PixelRNN, van den Oord et al., arXiv 1601.06759); scored in bits per
    dimension of held-out images.

    A token is the value of a channel of a pixel, 0 to 255; the channels of a pixel follow each other. With a palette it is a
    colour of it. The input begins with a 0 and is the sequence before each token; nothing tells a model how wide the image
    is. Data and splits are those of the task images. The simple rule is a histogram of the values by the shades of the pixels
    to the left and above, fitted on training images.

    Args:
        data: ``digits`` (8x8, from scikit-learn; the default), ``fashion-mnist`` (28x28, where Debian's
            dataset-fashion-mnist is installed), a folder with one sub-folder a class, or one with MNIST's IDX files.
        validation: a folder with the same sub-folders, for data that is a folder; its images are what is held out.
        size: side that images are resized to, 4 to 256; 32 for a folder's images, other data are as they come.
        channels: 3 (colour) or 1 (grey), for a folder's images.
        palette: most colours to tell apart, 2 to 256, the nearest of which stands for each pixel; None for the values of the
            channels. All colours of the training images where there are no more, else those that Pillow chooses (median cut
            and k-means).
        skip_unreadable: whether files of a folder that cannot be read are named and left out.
        held_out: share of each class held out where the data has no split of its own, 0.01 to 0.5.
        evaluation_items: most held-out images that are scored, 1 to 65536.
        seed: of the split.
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
        self._images = images = distinct(loaded)
        height, width, depth = images.shape
        self.sides = height, width, depth if palette is None else 1
        self.length = math.prod(self.sides)
        if self.length > LONGEST:
            raise Unsupported(
                f"images of {height}x{width} pixels as sequences of {self.length:,} tokens",
                supported=f"up to {LONGEST:,} tokens",
                nearest=f"size={math.isqrt(LONGEST // self.sides[2])}",
            )
        self._training, self._held_out = split_images(images, held_out, seed)
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
        """Bits spent and values predicted, of each image."""
        return bits_per_byte(logits, batch, torch.ones(self.vocab_size, dtype=torch.long))

    def describe(self) -> str:
        images, rule = self._images, self.baseline
        assert rule is not None
        height, width, depth = images.shape
        what = "grey values" if depth == 1 else "values of three channels"
        told = f"{what}, {VALUES} of each" if self.palette is None else f"{self.vocab_size} colours"
        lines = [
            f"pixels: {images.source}, {height}x{width} pixels row by row, {self.length} tokens, {told}",
            f"training: {len(self._training):,} images; held out: {len(self._held_out):,}, {len(self._scored):,} of them "
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
        """The images that sequences of all tokens make."""
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
        """A number for the channel of each token, the shade to its left and the one above; outside of the image is a shade too."""
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
    """The number of the colour that is nearest to each pixel, the first of those that are equally near."""
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
    """The different colours of pixels, and which of them each pixel has."""
    weights = VALUES ** np.arange(pixels.shape[-1])
    codes, places = np.unique((pixels.astype(np.int64) @ weights).ravel(), return_inverse=True)
    return (codes[:, None] // weights % VALUES).astype(np.uint8), places


def _palette(pixels: UInt8[np.ndarray, "b h w c"], count: int) -> UInt8[np.ndarray, "k c"]:
    """At most `count` colours for some images, from dark to light."""
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
