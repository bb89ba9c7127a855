"""Convert scans to model inputs, and read a folder of scans into voxels and the class of each voxel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Unsupported
from regard.core.patches import cut
from regard.measurement.units import counted
from regard.tasks.documents import file_name, names_of
from regard.tasks.image_files import Unreadable, check_readable, left_out, machine_memory
from regard.tasks.images import as_tuples
from regard.tasks.protocol import IGNORED
from regard.tasks.sampling import without_repetitions
from regard.tasks.segmentation.folders import (
    CLASSES,
    VOLUMES,
    class_names,
    classes_among,
    largest_classes,
    merging,
    pairs_of,
)
from regard.tasks.segmentation.masks import Colour
from regard.tasks.segmentation.nifti import Scan, read_mask, read_scan

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

LEAST_SIDE = 8
"""Smallest side of a crop, in voxels."""
BYTES = 11
"""Bytes per voxel: raw value, normalised value, mask value and class."""
UNEVEN = 1.1
"""Ratio of voxel spacings between volumes from which a note is given."""


@dataclass(frozen=True, kw_only=True)
class VolumeReader:
    """Converts volumes to inputs of a segmentation model: everything that a trained model must keep from its task.

    Attributes:
        size: sides, in voxels, of the crops on which the model is trained, and of its windows.
        patch: side of a token in voxels.
        spacing: distance in millimetres to which voxels are resampled; None leaves them as they are.
        overlap: smallest share of a window that the next one overlaps.
        scale: least and greatest value, mean and deviation of each channel, by which all volumes are normalised; None
            normalises each volume by its own mean and deviation.
        classes: names of the classes.
        values: value of each class in a mask.
        colours: red, green and blue of each class.
        background: index of the class that is not scored; None for none.
        channels: number of values per voxel.
    """

    size: tuple[int, ...]
    patch: int
    spacing: float | None
    overlap: float
    scale: tuple[tuple[float, ...], ...] | None
    classes: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[Colour, ...]
    background: int | None
    channels: int = 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of tokens of a window along each axis."""
        return tuple(side // self.patch for side in self.size)

    def normalised(self, voxels: Shaped[np.ndarray, "x y z c"]) -> Float[np.ndarray, "x y z c"]:
        """Normalise each channel to values around 0, as the model expects."""
        if self.scale is None:
            mean, deviation = voxels.mean((0, 1, 2), dtype=np.float64), voxels.std((0, 1, 2), dtype=np.float64)
        else:
            low, high, mean, deviation = np.array(self.scale).T
            voxels = voxels.clip(low, high)
        return ((voxels - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)

    def read(self, path: Path) -> tuple[Float[Tensor, "1 n f"], tuple[int, ...], tuple[int, ...], Scan]:
        """Read a whole file: its tokens, their grid, the sides in voxels without padding, and the scan.

        Raises:
            Unsupported: for a file that cannot be read, a volume smaller than a window, and one with other channels.
        """
        scan = read_scan(path)
        check_channels(path, scan, self.channels, "as the model was trained on")
        voxels = resampled(scan.voxels, scan.spacing, self.spacing)
        sides = voxels.shape[:3]
        check_sides(path, sides, self.size, self.patch)
        inputs, grid = self.tokens(self.normalised(voxels))
        return inputs, grid, sides, scan

    def tokens(self, voxels: Float[np.ndarray, "x y z c"]) -> tuple[Float[Tensor, "1 n f"], tuple[int, ...]]:
        """Tokens of a normalised volume, padded to whole tokens by its border values, and their grid."""
        filled = np.pad(voxels, [*_missing(voxels.shape[:3], self.patch), (0, 0)], mode="edge")
        grid = tuple(side // self.patch for side in filled.shape[:3])
        return cut(torch.from_numpy(filled).movedim(-1, 0)[None], self.patch), grid

    def targets(self, labels: Int[np.ndarray, "x y z"]) -> Int[Tensor, "1 n p"]:
        """The class of each voxel of the tokens; padding is ignored."""
        filled = np.pad(labels, _missing(labels.shape, self.patch), constant_values=IGNORED)
        return cut(torch.from_numpy(filled.astype(np.int64))[None, None], self.patch)

    def as_record(self) -> dict[str, Any]:
        """A record for JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Restore a reader from :meth:`as_record`."""
        given = {key: as_tuples(value) for key, value in record.items()}
        if given.get("scale") and not isinstance(given["scale"][0], tuple):
            given["scale"] = (given["scale"],)  # the format from before several channels were supported
        return cls(**given)


@dataclass(frozen=True)
class Volumes:
    """Volumes and the class of each of their voxels.

    Attributes:
        source: the data set, in words.
        voxels: voxels of each volume, not normalised; all volumes have the same number of channels.
        labels: class indices, or `IGNORED`.
        classes, values: names of the classes, and their values in masks.
        background: index of the class that is not scored; None for none.
        split: indices of the training and held-out volumes, and the rule in words; None to draw held-out volumes.
        notes: notes on what was left out.
        shared: as in :class:`regard.tasks.image_files.Images`.
    """

    source: str
    voxels: Sequence[Float[np.ndarray, "x y z c"]]
    labels: Sequence[Int[np.ndarray, "x y z"]]
    classes: tuple[str, ...]
    values: tuple[int, ...]
    background: int | None
    split: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], str] | None = None
    notes: list[str] = field(default_factory=list)
    shared: int = 0

    def counts(self, chosen: Sequence[int]) -> Int[np.ndarray, "v k"]:
        """Number of voxels of each class in each of the chosen volumes."""
        found = [self.labels[i] for i in chosen]
        return np.stack([np.bincount(each[each != IGNORED], minlength=len(self.values)) for each in found])

    def largest(self, count: int, chosen: Sequence[int], known: VolumeReader | None = None) -> Volumes:
        """Keep the `count` classes with the most voxels, as :meth:`regard.tasks.segmentation.masks.Masked.largest`."""
        number = len(self.values)
        if known is None:
            kept = largest_classes(self.counts(chosen).sum(0), self.background, count)
        else:
            kept = [i for i, value in enumerate(self.values) if value in known.values]
        if len(kept) == number:
            return self
        indices, note = merging(kept, self.background, self.classes)
        indices = indices.astype(np.int16)
        return replace(
            self,
            labels=[indices[np.where(each == IGNORED, -1, each)] for each in self.labels],
            classes=tuple(self.classes[i] for i in kept),
            values=tuple(self.values[i] for i in kept),
            background=int(indices[self.background]),
            notes=[*self.notes, note],
        )


def read_volumes(
    folder: Path,
    validation: Path | None,
    size: tuple[int, ...],
    patch: int,
    spacing: float | None,
    background: int | str | None,
    ignore: int | str | None,
    *,
    skip_unreadable: bool = False,
    known: VolumeReader | None = None,
    merged: bool = False,
) -> Volumes:
    """Read the volumes and masks of a folder.

    Args:
        folder: folder with `images`, `masks` and optionally `classes.txt`, as for
            :func:`regard.tasks.segmentation.masks.read_masked`, but of NIfTI files.
        validation: another such folder, whose volumes are held out.
        size, patch, spacing: as in :class:`VolumeReader`.
        background, ignore, skip_unreadable, known, merged: as for :func:`regard.tasks.segmentation.masks.read_masked`.

    Raises:
        Unsupported: for files that are missing, unreadable or do not belong together, naming the first one.
    """
    pairs, notes = pairs_of(folder, VOLUMES)
    names = class_names(folder / CLASSES)
    training = len(pairs)
    if validation is not None:
        more, more_notes = pairs_of(validation, VOLUMES)
        pairs, notes = pairs + more, notes + more_notes
    voxels: list[np.ndarray] = []
    masks, spacings = [], []
    kept, unread = list[int](), list[str]()
    for i, (image, mask) in enumerate(pairs):
        try:
            scan = read_scan(image)
            drawn = read_mask(mask, scan)
        except Unreadable as error:
            if not skip_unreadable:
                raise
            unread.append(error.asked.replace(f"{image.parent.parent}/", ""))
            continue
        if voxels:
            check_channels(image, scan, voxels[0].shape[3], f"as {pairs[kept[0]][0].name} has")
        kept.append(i)
        voxels.append(resampled(scan.voxels, scan.spacing, spacing))
        masks.append(resampled(drawn, scan.spacing, spacing, smooth=False))
        spacings.append(scan.spacing)
        check_sides(image, voxels[-1].shape[:3], size, patch)
        if BYTES * sum(each.size for each in voxels) > machine_memory() / 2:
            raise Unsupported(
                f"the volumes of {names_of(folder)}, which are held in memory",
                supported=f"up to half of this machine's {machine_memory() / 1e9:.0f} GB",
                nearest="a larger spacing, or fewer volumes",
            )
    notes += left_out([file_name(one) for one in unread])
    training = sum(i < training for i in kept)
    pairs = [pairs[i] for i in kept]
    check_readable(folder, validation, training, len(kept), "volume with its mask")
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
    indices = values.indices.astype(np.int16)
    apart = np.array(spacings)
    if spacing is None and (apart.max(0) > UNEVEN * apart.min(0)).any():
        notes.append(f"voxels of {apart.min():.3g} to {apart.max():.3g} mm: spacing=1 resamples all to 1 mm")
    found = Volumes(
        names_of(folder),
        voxels,
        [indices[mask] for mask in masks],
        tuple(names.get(value, str(value)) for value in values.classes) if known is None else known.classes,
        values.classes,
        values.background,
        notes=notes,
    )
    return _distinct(found, None if validation is None else training, scored=known is not None)


def check_channels(path: Path, scan: Scan, channels: int, why: str) -> None:
    """Raise Unsupported for a volume with another number of channels."""
    found = scan.voxels.shape[3]
    if found != channels:
        raise Unsupported(
            f"{path} of {counted(found, 'channel')}",
            supported=f"volumes of {counted(channels, 'channel')}, {why}",
        )


def check_sides(path: Path, sides: tuple[int, ...], size: tuple[int, ...], patch: int) -> None:
    """Raise Unsupported for a volume smaller than a crop."""
    if any(side < own for side, own in zip(sides, size, strict=True)):
        fitting = [min(own, side // patch * patch) for side, own in zip(sides, size, strict=True)]
        near = f"size={fitting[0]}" if len(set(fitting)) == 1 else f"size=[{','.join(map(str, fitting))}]"
        raise Unsupported(
            f"{path} of {' x '.join(map(str, sides))} voxels, smaller than crops of {' x '.join(map(str, size))}",
            supported="volumes as large as a crop, or larger",
            nearest=near if min(fitting) >= LEAST_SIDE else "",
        )


def resampled(
    voxels: Shaped[np.ndarray, "x y z *c"], have: tuple[float, ...], want: float | None, *, smooth: bool = True
) -> Shaped[np.ndarray, "x y z *c"]:
    """Resample a volume or a mask to another voxel spacing: averaged to coarser and linear to finer spacings; for masks
    (which have no channels), by the nearest voxel."""
    if want is None:
        return voxels
    own_sides = voxels.shape[:3]
    sides = tuple(max(1, round(side * own / want)) for side, own in zip(own_sides, have, strict=True))
    if sides == own_sides:
        return voxels
    given = torch.from_numpy(np.ascontiguousarray(voxels)).float()
    if not smooth:
        return F.interpolate(given[None, None], sides, mode="nearest-exact")[0, 0].numpy().astype(voxels.dtype)
    fewer = tuple(min(pair) for pair in zip(sides, own_sides, strict=True))
    means = F.interpolate(given.movedim(-1, 0)[None], fewer, mode="area")
    return F.interpolate(means, sides, mode="trilinear", align_corners=False)[0].movedim(0, -1).numpy()


def _distinct(volumes: Volumes, training: int | None, *, scored: bool) -> Volumes:
    """Leave out exact duplicates. Volumes after the first `training` are held out.

    `scored` is as for :func:`regard.tasks.sampling.without_repetitions`.
    """
    count = len(volumes.voxels)
    digests = [hashlib.blake2b(voxels.tobytes(), digest_size=16).digest() for voxels in volumes.voxels]
    kept, shared = without_repetitions(digests, () if training is None else range(training, count), scored=scored)
    repeated = count - len(kept)
    notes = [f"{counted(repeated, 'exact repetition')} left out"] if repeated else []
    new = np.array(kept)
    split = None
    if training is not None:
        split = np.flatnonzero(new < training), np.flatnonzero(new >= training), "by volume, as the data set comes"
    return replace(
        volumes,
        voxels=[volumes.voxels[i] for i in kept],
        labels=[volumes.labels[i] for i in kept],
        split=split,
        notes=[*volumes.notes, *notes],
        shared=shared,
    )


def _missing(sides: tuple[int, ...], patch: int) -> list[tuple[int, int]]:
    """Number of voxels missing to the end of the last token, along each axis."""
    return [(0, -side % patch) for side in sides]
