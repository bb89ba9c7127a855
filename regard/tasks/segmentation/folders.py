"""Folders with sub-folders images and masks: which files belong together, and which values in masks are classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from regard.contract import Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import file_name, names_of, nearest_path, walk
from regard.tasks.image_files import IMAGE_SUFFIXES
from regard.tasks.protocol import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int

CLASSES = "classes.txt"
VOID = 255
"""Value of ignored pixels in masks, by default if masks have more than two values."""
MOST_CLASSES = 64
"""Largest number of values in masks without a file of names: more values suggest smoothed edges, or no masks at all."""


@dataclass(frozen=True)
class Kind:
    """The kind of files in a folder.

    Attributes:
        word: word for one image.
        point: word for a point that has a class.
        images, masks: suffixes of files; those of masks are lossless.
        written: suffixes of masks that a model may write, the default first.
        task: task that reads the files.
    """

    word: str
    point: str
    images: frozenset[str]
    masks: frozenset[str]
    written: tuple[str, ...]
    task: str

    @property
    def usual(self) -> str:
        """Default suffix of masks."""
        return self.written[0]


PICTURES = Kind(
    "image",
    "pixel",
    IMAGE_SUFFIXES,
    frozenset({".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm"}),
    (".png",),
    "segmentation",
)
NIFTI = (".nii.gz", ".nii")
VOLUMES = Kind("volume", "voxel", frozenset(NIFTI), frozenset(NIFTI), NIFTI, "segmentation_3d")


def suffix_of(path: Path) -> str:
    """Lower-case suffix of a file; ``.nii.gz`` counts as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def holds_volumes(folder: Path) -> bool:
    """Return whether the sub-folder images holds volumes."""
    return any(suffix_of(path) in VOLUMES.images for path in walk(folder / "images")[0])


def files_of(given: Path, kind: Kind) -> list[Path]:
    """The file itself, or the images in a folder in sorted order.

    Raises:
        Unsupported: if there are none.
    """
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise Unsupported(
            f"{given}, which does not exist",
            supported=f"{kind.word} files, or folders of them",
            nearest=nearest_path(given),
        )
    found = [path for path in walk(given)[0] if suffix_of(path) in kind.images]
    if not found:
        raise Unsupported(
            f"{given}, which holds no {kind.word}", supported="files ending in " + " ".join(sorted(kind.images))
        )
    return found


def pairs_of(folder: Path, kind: Kind) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pairs of an image and its mask, sorted by name, and notes.

    Raises:
        Unsupported: for missing folders and files.
    """
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
    for part, suffixes in (("images", kind.images), ("masks", kind.masks)):
        files, links = walk(folder / part)
        notes += links
        kept = [path for path in files if suffix_of(path) in suffixes]
        left += len(files) - len(kept)
        if not kept:
            there = {suffix_of(path) for path in files}
            lossy = " ".join(sorted(there & kind.images))  # images as they may be, but not masks
            others = [f"--task {each.task}" for each in (PICTURES, VOLUMES) if each is not kind and there & each.images]
            raise Unsupported(
                f"{folder / part} of files ending in {lossy}, which do not keep the values of masks"
                if lossy
                else f"{folder / part}, which holds no {kind.word}",
                supported="files ending in " + " ".join(sorted(suffixes)),
                nearest=f"masks drawn anew as {kind.usual}" if lossy else next(iter(others), ""),
            )
        by_name: dict[str, Path] = {}
        for path in kept:
            name = path.relative_to(folder / part).as_posix()[: -len(suffix_of(path))]
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
            + (f", one of {len(without)} {kind.word}s without" if len(without) > 1 else ""),
            supported="a file of the same name in masks: " + " ".join(sorted(kind.masks)),
            nearest=str(folder / "masks" / f"{without[0]}{kind.usual}"),
        )
    alone = len(found["masks"]) - len(found["images"])
    if alone:
        notes.append(f"{names_of(folder)}: {counted(alone, 'mask')} without {kind.word} not read")
    if left:
        notes.append(f"{names_of(folder)}: {counted(left, 'file')} of other kinds than {kind.word}s and masks not read")
    return [(path, found["masks"][name]) for name, path in sorted(found["images"].items())], notes


def class_names(path: Path) -> dict[int, str]:
    """Names of values, read from lines of a value and a name; empty without the file."""
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


class KnownClasses(Protocol):
    """A reader of masks whose classes are known.

    Attributes:
        values: value of each class in masks.
        background: index of the class that is not scored; None for none.
    """

    @property
    def values(self) -> Sequence[int]: ...

    @property
    def background(self) -> int | None: ...


@dataclass(frozen=True)
class MaskValues:
    """What the values in masks mean.

    Attributes:
        classes: value of each class.
        background: index of the class that is not scored; None for none.
        indices: index of the class of each value from 0 to 255, or `IGNORED`.
    """

    classes: tuple[int, ...]
    background: int | None
    indices: Int[np.ndarray, "256"]


def classes_among(
    paths: Sequence[Path],
    found: Sequence[Int[np.ndarray, " v"]],
    training: int,
    names: Mapping[int, str],
    background: int | str | None,
    ignore: int | str | None,
    known: KnownClasses | None = None,
    *,
    merged: bool = False,
) -> MaskValues:
    """The values in masks that are classes, and which of them is the background.

    Args:
        paths: the masks; the first `training` are for training.
        found: values in each mask.
        names: names of classes, if a file has them.
        background: value of points that are not scored; None for none, ``auto`` for 0 if masks have it.
        ignore: value of points without loss and score; None for none, ``auto`` for 255 if there are more than two
            values and no class is 255.
        known: the reader of a trained model, of whose classes masks may have any.
        merged: whether other values are the background of `known`, since it was trained on the largest classes alone.

    Raises:
        Unsupported: for values that are not classes, and for too many or too few classes.
    """
    named = {*names} if known is None else {*known.values}
    values = sorted({*named, *(int(value) for mask in found[:training] for value in mask)})
    void = (VOID if len(values) > 2 and VOID not in {*named, *names} else None) if ignore == "auto" else ignore
    values = [value for value in sorted(named) or values if value != void] if known is None else [*known.values]
    quiet = (0 if 0 in values else None) if background == "auto" else background
    assert not isinstance(void, str) and not isinstance(quiet, str)  # "auto" is the only string
    rest = IGNORED
    if merged and known is not None and known.background is not None:
        quiet, rest = values[known.background], known.background
    else:
        _check_values(paths, found, values, bool(names), void, quiet, of_model=known is not None)
    indices = np.full(256, rest)
    indices[values] = np.arange(len(values))
    if void is not None:
        indices[void] = IGNORED
    return MaskValues(tuple(values), None if quiet is None else values.index(quiet), indices)


def _check_values(
    paths: Sequence[Path],
    found: Sequence[Int[np.ndarray, " v"]],
    values: Sequence[int],
    named: bool,
    ignore: int | None,
    background: int | None,
    *,
    of_model: bool,
) -> None:
    """Raise Unsupported for values in masks that are not classes, and for too many or too few classes.

    Args:
        values: values of the classes.
        named: whether the values are from a file of names.
        ignore, background: as for :func:`read_masked`, with ``auto`` resolved.
        of_model: whether the values are those of a trained model.
    """
    listed = ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")
    lacking = "no training mask has" if not named else f"{CLASSES} does not name"
    for path, mask in zip(paths, found, strict=True):
        odd = sorted({int(value) for value in mask} - {*values, ignore})
        if odd:
            raise Unsupported(
                f"{path} with the unknown class {odd[0]}, which "
                + ("the model was not trained on" if of_model else lacking),
                supported=f"classes {listed}" + ("" if ignore is None else f", and {ignore} for ignored pixels"),
                nearest="" if of_model else f"ignore={odd[0]}",
            )
    if len(values) < 2:
        raise Unsupported(
            f"masks with {counted(len(values), 'class')}"
            + ("" if ignore is None else f" in addition to the ignored value {ignore}"),
            supported="masks with two classes or more, such as background and one other",
            nearest="" if ignore is None else "ignore=None",
        )
    if len(values) > MOST_CLASSES and not (named or of_model):
        raise Unsupported(
            f"{paths[0].parent} with {len(values)} values of pixels, as smoothed or lossy masks have",
            supported=f"up to {MOST_CLASSES} classes, or a file {CLASSES} with a line `value name` for each",
        )
    if background is not None and background not in values:
        raise Unsupported(f"background={background}, a value of no class", supported=f"{listed}, or None")


def largest_classes(numbers: Int[np.ndarray, " k"], background: int | None, count: int) -> list[int]:
    """Indices of the `count` classes with the most points, and of the background.

    Args:
        numbers: number of points of each class.
        background: class that is not scored; None for none.

    Raises:
        Unsupported: for an impossible number, and without a background.
    """
    number = len(numbers)
    if background is None or not 1 <= count < number:
        raise Unsupported(
            f"classes={count} of {counted(number, 'class')}" + ("" if background is not None else " and no background"),
            supported=f"1 to {number - 1}, in addition to a background",
        )
    others = [int(i) for i in np.argsort(-numbers, kind="stable") if i != background]
    return sorted([background, *others[:count]])


def merging(kept: Sequence[int], background: int | None, classes: Sequence[str]) -> tuple[Int[np.ndarray, "k+1"], str]:
    """The new index of each class if all but the `kept` become background, and then `IGNORED`, which stays; and a note."""
    assert background is not None  # without a background, largest_classes refuses
    indices = np.full(len(classes) + 1, kept.index(background))
    indices[kept] = np.arange(len(kept))
    indices[-1] = IGNORED
    return indices, f"{len(kept) - 1} of {len(classes) - 1} classes kept; the others count as {classes[background]}"
