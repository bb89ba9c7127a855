"""Image data sets, by name or from a folder: read, deduplicated, and split into training and held-out images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from regard.contract import Unsupported, closest
from regard.measurement.units import counted
from regard.tasks.documents import nearest_path
from regard.tasks.idx import FASHION_MNIST, has_idx, load_fashion_mnist, load_idx
from regard.tasks.image_files import Images, load_folders
from regard.tasks.protocol import SPLIT, check_sides, counter_generator, in_batches
from regard.tasks.sampling import without_repetitions

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

NAMED = ("digits", FASHION_MNIST)
DIGITS = tuple("0123456789")
FOLDER_SIDE = 32
"""Side to which images from a folder are resized by default."""
_SUPPORTED = f"digits, {FASHION_MNIST}, a folder with one sub-folder per class, or a folder of MNIST's four IDX files"


def load_images(
    data: Any,
    validation: Any,
    size: int | Sequence[int] | None,
    channels: int | None,
    *,
    skip_unreadable: bool,
    span: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> Images:
    """Load the images that a task's options name. Unless they are from a folder, they are bytes of one shape.

    Args:
        data: one of `NAMED`, a folder with one sub-folder per class, or one with MNIST's IDX files.
        validation: a folder like `data`, whose images are held out.
        size: side to which images are resized, or height and width; None keeps their size, but means 32 for a folder's.
        channels: 3 or 1, for images from a folder.
        skip_unreadable: whether unreadable files in a folder are left out and reported, instead of refused.
        span: least and greatest value of images with more than 8 bits, from a folder.
        classes: the classes that a model knows, of which a folder may have any; None for those of `data`.

    Raises:
        Unsupported: for data that cannot be used.
    """
    if not isinstance(data, str | Path):
        raise Unsupported(f"data={data!r} for images", supported=_SUPPORTED, nearest="a folder of folders")
    folder, name = Path(data), str(data).replace("_", "-")
    is_classes = name not in NAMED and not has_idx(folder)
    of_folders = {"channels": channels, "validation": validation, "skip_unreadable": skip_unreadable, "span": span}
    for option, value in of_folders.items():
        if value and not is_classes:
            raise Unsupported(
                f"{option}={value} for {data}, which comes as it is",
                supported=f"{option} with a folder of images",
                nearest=f"no {option}",
            )
    sides = None if size is None else check_sides(size, 2, 4, 1024)
    if name == "digits" or (name == FASHION_MNIST and not has_idx(folder)):
        images = _resized(_load_digits() if name == "digits" else load_fashion_mnist(), sides)
        passed_over = [f"the folder {folder} is passed over; ./{folder} reads it"] if folder.is_dir() else []
        return replace(images, notes=[*images.notes, *passed_over])
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        near = closest(str(data), NAMED) or ("" if folder.exists() else nearest_path(folder))
        raise Unsupported(f"data={data} for images, which {wrong}", supported=_SUPPORTED, nearest=near)
    if not is_classes:
        return _resized(load_idx(folder), sides)
    depth = 3 if channels is None else channels
    if depth not in (1, 3):
        raise Unsupported(f"channels={channels}", supported="3 (colour) or 1 (grey)", nearest="channels=3")
    held_out = None if validation is None else Path(validation)
    height, width = sides or (FOLDER_SIDE,) * 2
    return load_folders(
        folder,
        held_out,
        (height, width),
        depth,
        skip_unreadable=skip_unreadable,
        span=check_span(span),
        known=classes,
    )


def check_span(span: Sequence[float] | None) -> tuple[float, float] | None:
    """The option `span` as a pair; raises Unsupported for anything but two ascending numbers."""
    if span is None:
        return None
    given = list(span) if isinstance(span, list | tuple) else []
    if len(given) != 2 or not all(isinstance(value, int | float) for value in given) or not given[0] <= given[1]:
        raise Unsupported(
            f"span={span!r}", supported="the least and the greatest value, as in span=[0,4095]", nearest="no span"
        )
    return float(given[0]), float(given[1])


def _load_digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unsupported(
            "images data=digits without scikit-learn, which holds them",
            supported="a folder with one sub-folder per class, or the extra",
            nearest="pip install 'regard[data]'",
        ) from None
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return Images("scikit-learn's digits", (8, 8, 1), pixels, digits.target.astype(np.int64), DIGITS)


def _resized(images: Images, sides: tuple[int, ...] | None) -> Images:
    """Resize images to this height and width, as bytes of one shape."""
    height, width, depth = images.shape
    if sides is None or (height, width) == sides:
        return images
    given = torch.from_numpy(np.asarray(images.pixels))
    made = np.empty((len(given), *sides, depth), dtype=np.uint8)
    for rows in in_batches(len(given), 1024):
        floats = given[rows].permute(0, 3, 1, 2).float()
        large = F.interpolate(floats, sides, mode="bicubic", antialias=True).round().clamp(0, 255)
        made[rows] = large.permute(0, 2, 3, 1).numpy()
    return replace(
        images,
        shape=(sides[0], sides[1], depth),
        pixels=made,
        notes=[*images.notes, f"resized from {height}x{width} pixels"],
    )


def distinct(images: Images, *, scored: bool = False) -> Images:
    """Leave out exact duplicates.

    Args:
        scored: as for :func:`regard.tasks.sampling.without_repetitions`.
    """
    digests = [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in images.pixels]
    apart = () if images.held_out is None else images.held_out.tolist()
    kept, shared = without_repetitions(digests, apart, scored=scored)
    repeated = len(digests) - len(kept)
    if not (repeated or shared):
        return images
    held_out = None if images.held_out is None else np.flatnonzero(np.isin(kept, images.held_out))
    notes = [*images.notes, f"{counted(repeated, 'exact repetition')} left out"] if repeated else images.notes
    if shared and not scored:
        notes = [*notes, f"{counted(shared, 'image')} of the held-out data also in the training data: not trained on"]
    pixels = images.pixels[kept] if isinstance(images.pixels, np.ndarray) else [images.pixels[i] for i in kept]
    return replace(images, pixels=pixels, labels=images.labels[kept], held_out=held_out, notes=notes, shared=shared)


def split_images(
    images: Images, share: float, seed: int, *, scored: bool = False
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Indices of training and held-out images: the data set's own split, or `share` of each class held out.

    Raises:
        Unsupported: if a class has no images to train on, unless a trained model is `scored`, or none to hold out.
    """
    everything = np.arange(len(images.labels))
    if images.held_out is not None:
        training = np.setdiff1d(everything, images.held_out)
        missing = [name for i, name in enumerate(images.classes) if not (images.labels[training] == i).any()]
        if missing and not scored:
            raise Unsupported(
                f"held-out images that include every training image of the class {missing[0]}",
                supported="other images to score on than to train on",
            )
        return training, images.held_out
    held_out: list[np.ndarray] = []
    for label, name in enumerate(images.classes):
        members = np.flatnonzero(images.labels == label)
        if len(members) < 2:
            raise Unsupported(
                f"the class {name} with {counted(len(members), 'different image')}",
                supported="2 or more different images in each class",
            )
        order = counter_generator(seed, label, SPLIT).permutation(members)
        held_out.append(order[: max(1, round(share * len(members)))])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(everything, chosen), chosen


def drawn(pixels: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]) -> list[str]:
    """The image as a few lines of characters, from dark to light."""
    shades = " .:-=+*#%@"
    stride = max(1, -(-max(pixels.shape[:2]) // 28))
    grey = pixels[::stride, ::stride].mean(-1)
    return ["  " + "".join(shades[int(value) * len(shades) // 256] * 2 for value in row) for row in grey]
