"""Read images from files: single images in any mode, and folders with a sub-folder per class."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.contract import Unsupported, closest
from regard.measurement.units import counted
from regard.tasks.documents import class_folders, file_name, names_of, nearest_path, walk

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8
    from PIL import Image as Pillow

    Pixels = UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
LONGEST = 4
"""Largest ratio of an image's longer to its shorter side; the rest is cut off at both ends."""
WITHOUT = "another file, or --skip-unreadable"
"""Advice for a file that does not match another one."""
TOLD = 5
"""Number of unreadable files that are named; further ones are only counted."""


class Unreadable(Unsupported):
    """A file that is damaged, not an image, or does not match its image; some data can do without it."""


@dataclass(frozen=True)
class Images:
    """Images and their classes.

    Attributes:
        source: the data set, in words.
        shape: height, width and channels that a model sees.
        pixels: uint8, or float32 from 0 to 255 where some images have more than 8 bits. An array if all images have the
            size of `shape`; else a list, with some images higher or wider.
        labels: class of each image, or of each of its pixels.
        classes: names of the classes.
        held_out: indices of images that must not be trained on; None if the data set has no split of its own.
        notes: notes on what was left out.
        shared: number of held-out images that are also among the others, which are not trained on.
        span: least and greatest value of images with more than 8 bits, which become black and white; None without such
            images.
    """

    source: str
    shape: tuple[int, int, int]
    pixels: Sequence[Pixels] | Shaped[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n ..."]
    classes: tuple[str, ...]
    held_out: Int[np.ndarray, " m"] | None = None
    notes: list[str] = field(default_factory=list)
    span: tuple[float, float] | None = None
    shared: int = 0

    def centres(self, chosen: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"] | Float[np.ndarray, "b h w c"]:
        """Centre crops of some images."""
        if isinstance(self.pixels, np.ndarray):
            return self.pixels[chosen]
        return np.stack([centre(self.pixels[i], self.shape[:2]) for i in chosen])


def centre(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The centre crop of an image, of this height and width."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def images_among(files: Sequence[Path], folder: Path) -> list[Path]:
    """The images among a folder's files; raises Unsupported if there is none."""
    kept = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not kept:
        raise Unsupported(
            f"{folder}, which holds no image", supported="files ending in " + " ".join(sorted(IMAGE_SUFFIXES))
        )
    return kept


def check_readable(folder: Path, validation: Path | None, training: int, kept: int, what: str) -> None:
    """Raise Unsupported for a folder of which no file was read.

    Args:
        training: number of files of `folder` that were read.
        kept: number of all files that were read.
        what: word for a file.
    """
    for place, number in ((folder, training), (validation, kept - training)):
        if place is not None and not number:
            raise Unsupported(f"{names_of(place)}, in which no {what} can be read", supported=f"one {what} or more")


def unused_name(name: str, taken: set[str]) -> str:
    """Return `name`, with underscores appended if it is taken already, and add the result to `taken`."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def load_folders(
    folder: Path,
    validation: Path | None,
    size: tuple[int, int],
    channels: int,
    *,
    skip_unreadable: bool = False,
    span: tuple[float, float] | None = None,
    known: Sequence[str] | None = None,
) -> Images:
    """Load the images of a folder with a sub-folder per class, and those of a second folder as held-out images.

    Args:
        size: height and width that the resized images must cover.
        channels: 3 or 1.
        skip_unreadable: whether unreadable files are reported in the notes instead of refused.
        span: as in :class:`Images`; by default that of the images that are not held out.
        known: the classes of a trained model that is scored, of which the folders may have any; None for those of
            `folder`, of which the second may have any.

    Raises:
        Unsupported: for folders and files that cannot be used.
    """
    listed, notes = _list_folders(folder)
    classes = list(listed) if known is None else list(known)
    if len(classes) < 2:
        raise Unsupported(
            f"{folder} with {counted(len(classes), 'sub-folder')}",
            supported="a folder with one sub-folder per class, 2 or more of them",
        )
    paths, labels = _labelled(folder, listed, classes)
    held = 0
    if validation is not None:
        if not validation.is_dir():
            raise Unsupported(
                f"validation={validation}, which is not a folder",
                supported="a folder like data",
                nearest="" if validation.exists() else nearest_path(validation),
            )
        others, more_notes = _list_folders(validation)
        more, their_labels = _labelled(validation, others, classes)
        held = len(more)
        paths, labels, notes = paths + more, labels + their_labels, notes + more_notes
    check_memory(folder, len(paths), size, channels)
    require_pillow()

    images: list[Pixels] = []
    kept, unread, moving = [], [], 0
    for i, path in enumerate(paths):
        try:
            image, frames = read_image(path, size, channels)
        except Unreadable as error:
            if not skip_unreadable:
                raise
            unread.append(error.asked.replace(str(path), file_name(path.name)))
            continue
        images.append(image)
        kept.append(i)
        moving += frames > 1
    notes += left_out(unread)
    if moving:
        notes.append(f"{counted(moving, 'file')} of several pictures: the first of each")
    training = len(paths) - held
    counts = Counter(labels[i] for i in kept if i < training)
    for i, name in enumerate(classes if known is None else ()):
        if counts[i] < (2 if validation is None else 1):
            raise Unsupported(
                f"{folder / name} with {counted(counts[i], 'image')}" + " that can be read" * bool(unread),
                supported="2 or more images in each class's folder" if validation is None else "images of each class",
            )
    first = sum(i < training for i in kept)
    check_readable(folder, validation, first, len(kept), "image")
    pixels, span, count = stacked(images, span, training=first)
    if span is not None:
        low, high = span
        notes.append(
            f"{counted(count, 'image')} of more than 8 bits a pixel: values from {low:g} to {high:g} are taken as dark to "
            "light"
        )
    even = all(image.shape[:2] == size for image in pixels)
    return Images(
        names_of(folder),
        (*size, channels),
        np.stack(pixels) if even else pixels,
        np.array([labels[i] for i in kept], dtype=np.int64),
        tuple(classes),
        np.flatnonzero(np.array(kept) >= training) if validation is not None else None,
        notes,
        span,
    )


def several_pictures(paths: Sequence[Path]) -> list[str]:
    """A note on the image files that hold several pictures, such as animations; no note if there are none."""
    from PIL import Image

    moving = []
    for path in paths:
        with Image.open(path) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                moving.append(path)
    if len(moving) == 1:
        return [f"{moving[0]} holds several pictures: the first is read"]
    return [f"{counted(len(moving), 'file')} of several pictures: the first of each is read"] if moving else []


def left_out(unread: Sequence[str]) -> list[str]:
    """Notes on unreadable files: what is wrong with the first ones, and how many there are."""
    notes = [f"left out: {said}" for said in unread[:TOLD]]
    return notes + [f"{counted(len(unread), 'file')} that cannot be read left out"] * (len(unread) > TOLD)


def _list_folders(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The images of each class, by its name, and notes."""
    found, notes, others = dict[str, list[Path]](), list[str](), 0
    for one in class_folders(folder):
        files, links = walk(one)
        kept = images_among(files, one)
        found.setdefault(file_name(one.name), []).extend(kept)
        notes += links
        others += len(files) - len(kept)
    if list(found) == ["images", "masks"]:
        notes.append("classes named images and masks: where these belong together, --task segmentation reads them")
    if others:
        notes.append(f"{names_of(folder)}: {counted(others, 'file')} of other kinds than images not read")
    return found, notes


def _labelled(folder: Path, listed: Mapping[str, list[Path]], classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The images of a folder, and the index of the class of each."""
    odd = [name for name in listed if name not in classes]
    if odd or not listed:
        raise Unsupported(
            f"{folder} with the unknown class {odd[0]}" if odd else f"{folder} with 0 sub-folders",
            supported="sub-folders of the classes " + ", ".join(classes),
            nearest=closest(odd[0], classes) if odd else "",
        )
    paths = [path for files in listed.values() for path in files]
    return paths, [classes.index(name) for name, files in listed.items() for _ in files]


def machine_memory() -> float:
    """Bytes of memory of this machine; infinity if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return math.inf


def check_memory(folder: Path, count: int, size: tuple[int, int], channels: int) -> None:
    """Raise Unsupported for images that need more than half of this machine's memory."""
    memory, needed = machine_memory(), count * size[0] * size[1] * channels
    if needed > memory / 2:
        side = int((memory / 2 / count / channels) ** 0.5)
        raise Unsupported(
            f"{counted(count, 'image')} of {folder} at {size[0]}x{size[1]} pixels, {needed / 1e9:.0f} GB, which are held in memory",
            supported=f"up to half of this machine's {memory / 1e9:.0f} GB",
            nearest=f"size={side}",
        )


def require_pillow() -> None:
    """Raise Unsupported if pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise Unsupported(
            "a folder of images without pillow, which reads them",
            supported="the extra",
            nearest="pip install 'regard[data]'",
        ) from None


def read_image(path: Path, size: tuple[int, int], channels: int, *, stretch: bool = False) -> tuple[Pixels, int]:
    """Read an image so that it covers a height and width; also returns how many pictures its file has (the first is
    read).

    The image is rotated by its EXIF orientation and resized, keeping its proportions, until one side fits and the other
    is not smaller; with `stretch`, until both fit. Pixels are bytes, or float32 between the file's least and
    greatest value if its grey values have more than 8 bits. Transparent areas become white.

    Raises:
        Unsupported: for a file that is not an image, is truncated, or is smaller than 2x2 or larger than 89 million
            pixels.
    """
    require_pillow()
    from PIL import Image, ImageOps

    with opened_image(path) as opened:
        frames = getattr(opened, "n_frames", 1)
        opened.draft(None, (2 * max(size),) * 2)  # do not decode a JPEG much larger than needed
        turned = ImageOps.exif_transpose(opened)
        whole = np.asarray(turned, dtype=np.float32) if turned.mode[0] in "IF" else None
        image = turned.convert("RGBA") if whole is None else Image.fromarray(whole)
    if min(image.size) < 2:
        raise unreadable(path, f"it is {image.width} x {image.height} pixels small")
    image = image.resize(size[::-1], Image.Resampling.BICUBIC) if stretch else _covering(image, size)
    if whole is not None:
        values = np.asarray(image).clip(whole.min(), whole.max())  # interpolation goes beyond
        if not np.isfinite(values).all():
            raise unreadable(path, "it holds values that are no finite numbers")
        return np.repeat(values[..., None], channels, axis=2), frames
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    flat = flat.convert("RGB" if channels == 3 else "L")
    return np.asarray(flat, dtype=np.uint8).reshape(flat.height, flat.width, channels), frames


@contextmanager
def opened_image(path: Path) -> Iterator[Any]:
    """Open an image file with pillow; whatever fails while it is read is an Unreadable with the reason."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                yield opened
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):  # above the limit, and above twice the limit
        raise unreadable(path, f"it has more than {(Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels") from None
    except UnidentifiedImageError:
        raise unreadable(path, "it is of no known kind" if path.stat().st_size else "it is empty") from None
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise unreadable(path, error) from None


def _covering(image: Pillow.Image, size: tuple[int, int]) -> Pillow.Image:
    from PIL import Image

    height, width = size
    if image.width > LONGEST * image.height or image.height > LONGEST * image.width:
        wide, high = min(image.width, LONGEST * image.height), min(image.height, LONGEST * image.width)
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        image = image.crop((left, top, left + wide, top + high))
    scale = max(height / image.height, width / image.width)
    fitted = max(width, round(scale * image.width)), max(height, round(scale * image.height))
    return image.resize(fitted, Image.Resampling.BICUBIC)


def unreadable(path: Path, why: Any) -> Unreadable:
    """The error for a file that cannot be read."""
    return Unreadable(
        f"{path}, which cannot be read as an image ({why})",
        supported="whole images: " + " ".join(sorted(IMAGE_SUFFIXES)),
        nearest="repair it, take it out of the folder, or --skip-unreadable",
    )


def stacked(
    images: Sequence[Pixels], span: tuple[float, float] | None = None, *, training: int | None = None
) -> tuple[list[Pixels], tuple[float, float] | None, int]:
    """Bring images to one value range; also returns the span of those with more than 8 bits, and their number.

    Args:
        span: the least and greatest value, beyond which values are clipped; by default those of the images.
        training: number of images, from the first, whose values are the span if any of them has more than 8 bits.
    """
    deep = [i for i, image in enumerate(images) if image.dtype == np.float32]
    if not deep:
        return list(images), span, 0
    if span is None:
        measured = [images[i] for i in deep if training is None or i < training] or [images[i] for i in deep]
        span = float(min(image.min() for image in measured)), float(max(image.max() for image in measured))
    low, width = span[0], span[1] - span[0]
    found = [image.astype(np.float32) for image in images]
    for i in deep:
        found[i] = ((images[i].clip(*span) - low) * (255 / width if width else 0)).astype(np.float32)
    return found, span, len(deep)
