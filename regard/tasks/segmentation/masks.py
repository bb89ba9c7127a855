"""Images with masks that are read: a user's folder, in the end one array of pixels and one of class numbers."""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.contract import Unsupported
from regard.tasks.documents import file_name, names_of, nearest_path, walk
from regard.tasks.image_files import IMAGE_SUFFIXES, Images, images_among, read_image, stacked, unreadable
from regard.tasks.images import ImageReader
from regard.tasks.protocol import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8
    from PIL.Image import Image as Picture

    from regard.tasks.image_files import Pixels

Colour = tuple[int, int, int]
CLASSES = "classes.txt"
VOID = 255
"""The value of a mask's pixels that are ignored, where masks have more than two values and nothing else is said."""
MOST_CLASSES = 64
"""Values that masks may have without a file of their names: more is the sign of smoothed edges, or of no mask at all."""
MASK_SUFFIXES = frozenset({".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm"})
"""Files that keep each pixel as it is."""
ORIENTATION = 0x0112
"""The field of EXIF that says how a picture is turned; from 5 on its sides change places."""


@dataclass(frozen=True, kw_only=True)
class MaskReader(ImageReader):
    """From images to the inputs of a model that segments, and what its classes are in masks.

    Attributes:
        values: of each class in a mask.
        colours: of each class, red, green and blue.
        background: number of the class that is not scored; None for none.
    """

    values: tuple[int, ...]
    colours: tuple[Colour, ...]
    background: int | None

    def opened(self, path: Path) -> Pixels:
        """The pixels of a file: all of the picture, as its mask has."""
        return read_image(path, (self.height, self.width), self.channels, squeezed=True)[0]

    def seen(self, picture: Picture) -> Picture:
        """All of a picture."""
        return picture

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> MaskReader:
        """From :meth:`as_record`."""
        read: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in record.items()}
        return cls(**{**read, "colours": tuple((r, g, b) for r, g, b in record["colours"])})


@dataclass(frozen=True)
class Masked:
    """Images, and the class of each of their pixels.

    Attributes:
        images: whose labels are (n, h, w) numbers of classes, `IGNORED` where there is none.
        values, colours: of the classes in masks.
        background: as in :class:`MaskReader`.
        split: training and held-out images, and how they were told apart; None to draw images to hold out.
    """

    images: Images
    values: tuple[int, ...]
    colours: tuple[Colour, ...]
    background: int | None
    split: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], str] | None = None

    def largest(self, count: int) -> Masked:
        """The same with the `count` classes of most pixels beside the background, of which the others become part.

        Raises:
            Unsupported: for a number that there is not, and without a background.
        """
        images, background = self.images, self.background
        if background is None or not 1 <= count < len(self.values):
            raise Unsupported(
                f"classes={count} of {len(self.values)} classes"
                + ("" if background is not None else " and no background"),
                supported=f"1 to {len(self.values) - 1}, beside a background",
            )
        numbers = np.bincount(images.labels[images.labels != IGNORED], minlength=len(self.values))
        others = [i for i in np.argsort(-numbers, kind="stable") if i != background][:count]
        kept = sorted([background, *others])
        table = np.full(len(self.values) + 1, kept.index(background))
        table[kept] = np.arange(len(kept))
        table[-1] = IGNORED
        labels = table[np.where(images.labels == IGNORED, len(self.values), images.labels)]
        note = (
            f"the {count} largest of {len(self.values) - 1} classes; the others count as {images.classes[background]}"
        )
        return replace(
            self,
            images=replace(
                images, labels=labels, classes=tuple(images.classes[i] for i in kept), notes=[*images.notes, note]
            ),
            values=tuple(self.values[i] for i in kept),
            colours=tuple(self.colours[i] for i in kept),
            background=kept.index(background),
        )


def colours_of(count: int) -> tuple[Colour, ...]:
    """Colours that are easily told apart: black, then hues a golden section apart."""
    found: list[Colour] = [(0, 0, 0)]
    for i in range(1, count):
        red, green, blue = colorsys.hsv_to_rgb(0.618034 * i % 1, 0.7 if i % 2 else 0.9, 0.95 if i % 3 else 0.7)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(found[:count])


def read_masked(
    folder: Path,
    validation: Path | None,
    size: int,
    channels: int,
    background: int | str | None,
    ignore: int | str | None,
) -> Masked:
    """The images and masks of a folder, resized to squares of `size` pixels: masks by their nearest pixel.

    Args:
        folder: with `images` and `masks`, whose files have the same names but for their suffixes, and perhaps a file
            `classes.txt` with a line for each value of masks: the value and a name.
        validation: another, whose images are held out.
        background: the value of pixels that are not scored; None for none, ``auto`` for 0 where masks have it.
        ignore: the value of pixels without loss and score; None for none, ``auto`` for 255 where there are more than two.

    Raises:
        Unsupported: for what is missing or unreadable, or does not belong together, with the first file of its kind.
    """
    pairs, notes = _pairs(folder)
    names = _names(folder / CLASSES)
    training = len(pairs)
    if validation is not None:
        more, more_notes = _pairs(validation)
        pairs, notes = pairs + more, notes + more_notes
    read = [_read_mask(mask, image) for image, mask in pairs]
    masks = [mask for mask, _ in read]
    palette = next((colours for _, colours in read if colours is not None), None)
    values = sorted({int(value) for mask in masks[:training] for value in np.unique(mask)})
    void = (VOID if len(values) > 2 and VOID not in names else None) if ignore == "auto" else ignore
    values = sorted(names) or [value for value in values if value != void]
    quiet = (0 if 0 in values else None) if background == "auto" else background
    assert not isinstance(void, str) and not isinstance(quiet, str)  # "auto" is the only word
    _check_values(pairs, masks, values, bool(names), void, quiet)
    read_images = [read_image(image, (size, size), channels, squeezed=True)[0] for image, _ in pairs]
    pixels, span, count = stacked(read_images)
    if span is not None:
        notes.append(
            f"{count} images of more than 8 bits a pixel: {span[0]:g} to {span[1]:g} are taken as dark to light"
        )
    table = np.full(256, IGNORED)
    table[values] = np.arange(len(values))
    labels = table[np.stack([_resized(mask, size) for mask in masks])]
    images = Images(
        names_of(folder),
        (size, size, channels),
        np.stack(pixels),
        labels,
        tuple(names.get(value, str(value)) for value in values),
        None if validation is None else np.arange(training, len(pairs)),
        notes,
        span,
    )
    drawn = colours_of(len(values)) if palette is None else tuple(palette[value] for value in values)
    return Masked(images, tuple(values), drawn, None if quiet is None else values.index(quiet))


def _check_values(
    pairs: Sequence[tuple[Path, Path]],
    masks: Sequence[np.ndarray],
    values: Sequence[int],
    named: bool,
    ignore: int | None,
    background: int | None,
) -> None:
    """Raise Unsupported for values of masks that are no classes, too many of them, or too few.

    Args:
        values: of the classes.
        named: whether these are those of a file of names.
        ignore, background: as of :func:`read_masked`, decided.
    """
    listed = ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")
    for (_, path), mask in zip(pairs, masks, strict=True):
        odd = sorted({int(value) for value in np.unique(mask)} - {*values, ignore})
        if odd:
            raise Unsupported(
                f"{path} with the unknown class {odd[0]}, which "
                + (f"{CLASSES} does not name" if named else "no training mask has"),
                supported=f"classes {listed}" + ("" if ignore is None else f", and {ignore} for ignored pixels"),
                nearest=f"ignore={odd[0]}",
            )
    if len(values) < 2:
        raise Unsupported(
            f"masks with {len(values)} class" + ("" if ignore is None else f" beside the ignored value {ignore}"),
            supported="masks with two classes or more, such as background and one other",
            nearest="" if ignore is None else "ignore=None",
        )
    if not named and len(values) > MOST_CLASSES:
        raise Unsupported(
            f"{pairs[0][1].parent} with {len(values)} values of pixels, as smoothed or lossy masks have",
            supported=f"up to {MOST_CLASSES} classes, or a file {CLASSES} with a line `value name` for each",
        )
    if background is not None and background not in values:
        raise Unsupported(f"background={background}, a value of no class", supported=f"{listed}, or None")


def _pairs(folder: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Image and mask of each name, in sorted order."""
    if not folder.is_dir():
        raise Unsupported(
            f"{folder}, which is not a folder" if folder.exists() else f"{folder}, which does not exist",
            supported="a folder with the folders images and masks",
            nearest="" if folder.exists() else nearest_path(folder),
        )
    lacking = [name for name in ("images", "masks") if not (folder / name).is_dir()]
    if lacking:
        raise Unsupported(
            f"{folder} without a folder {' and '.join(lacking)}",
            supported="a folder with images and masks, whose files have the same names",
            nearest="--task images" if len(lacking) == 2 else "",
        )
    found, notes, left = {}, list[str](), 0
    for part, suffixes in (("images", IMAGE_SUFFIXES), ("masks", MASK_SUFFIXES)):
        files, links = walk(folder / part)
        notes += links
        kept = [path for path in files if path.suffix.lower() in suffixes]
        left += len(files) - len(kept)
        if not kept:
            images_among(kept, folder / part)
        by_name: dict[str, Path] = {}
        for path in kept:
            name = path.relative_to(folder / part).with_suffix("").as_posix()
            if name in by_name:
                raise Unsupported(
                    f"{by_name[name]} and {path.name}, of one name", supported=f"one file of each name in {part}"
                )
            by_name[name] = path
        found[part] = by_name
    without = sorted(found["images"].keys() - found["masks"].keys())
    if without:
        raise Unsupported(
            f"{found['images'][without[0]]} without a mask"
            + (f", one of {len(without)} images without" if len(without) > 1 else ""),
            supported="a file of the same name in masks: " + " ".join(sorted(MASK_SUFFIXES)),
            nearest=str(folder / "masks" / f"{without[0]}.png"),
        )
    alone = len(found["masks"]) - len(found["images"])
    if alone:
        notes.append(f"{names_of(folder)}: {alone} masks without an image not read")
    if left:
        notes.append(f"{names_of(folder)}: {left} files that are no images or masks not read")
    return [(path, found["masks"][name]) for name, path in sorted(found["images"].items())], notes


def _names(path: Path) -> dict[int, str]:
    """Names of values, from lines of a value and a name; none without the file."""
    if not path.is_file():
        return {}
    found: dict[int, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unsupported(f"{path}, which cannot be read ({error})", supported="UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        value, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not value.isdecimal() or int(value) > 255 or int(value) in found or not name.strip():
            raise Unsupported(
                f"{path}, line {number}: {line.strip()[:40]!r}",
                supported="a value from 0 to 255, a space and a name; each once",
            )
        found[int(value)] = file_name(name.strip())
    return found


def _read_mask(path: Path, image: Path) -> tuple[UInt8[np.ndarray, "h w"], list[Colour] | None]:
    """Values of a mask, and the palette that it has."""
    wide, high = _opened(image, _turned_size)
    mode, size, palette, values = _opened(
        path, lambda x: (x.mode, x.size, x.getpalette("RGB") if x.mode == "P" else None, np.asarray(x))
    )
    if mode not in ("1", "L", "P", "I;16", "I") or values.max(initial=0) > 255 or values.min(initial=0) < 0:
        what = "values above 255" if mode.startswith("I") else f"colours (mode {mode})"
        raise Unsupported(
            f"{path}, a mask of {what}", supported="a palette or grey image, whose values 0 to 255 are the classes"
        )
    if size != (wide, high):
        raise Unsupported(
            f"{path} of {size[0]} x {size[1]} pixels, the mask of an image of {wide} x {high}",
            supported="masks of the size of their images",
        )
    return values.astype(np.uint8), None if palette is None else _triples(palette)


def _opened(path: Path, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of an image file."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return read(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise unreadable(path, error) from None


def _turned_size(opened: Any) -> tuple[int, int]:
    """Width and height of an image, turned as its camera says."""
    wide, high = opened.size
    return (high, wide) if opened.getexif().get(ORIENTATION, 1) >= 5 else (wide, high)


def _triples(palette: Sequence[int]) -> list[Colour]:
    whole = [*palette, *[0] * (768 - len(palette))]
    return [(whole[i], whole[i + 1], whole[i + 2]) for i in range(0, 768, 3)]


def _resized(mask: UInt8[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "s s"]:
    from PIL import Image

    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
