"""From scans to the inputs of a model, and from a folder of them to voxels and the class of each."""

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
from regard.tasks.documents import file_name, names_of
from regard.tasks.image_files import Unreadable, left_out, machine_memory
from regard.tasks.images import as_tuples
from regard.tasks.protocol import IGNORED
from regard.tasks.segmentation.folders import CLASSES, VOLUMES, class_names, classes_among, largest_classes, pairs_of
from regard.tasks.segmentation.masks import Colour
from regard.tasks.segmentation.nifti import Scan, read_mask, read_scan

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

LEAST_SIDE = 8
"""Of a crop, in voxels."""
BYTES = 11
"""Of a voxel: its number as it comes and normalised, its value and its class."""
UNEVEN = 1.1
"""Times as far apart as in another volume that voxels may be without a note."""


@dataclass(frozen=True, kw_only=True)
class VolumeReader:
    """From volumes to the inputs of a model that segments: all that a trained model must keep of its task to read others.

    Attributes:
        size: sides of the crops that the model is trained on, in voxels: its windows.
        patch: side of a token in voxels.
        spacing: millimetres to which voxels are resampled; None takes them as they come.
        overlap: least share of a window that the next one covers again.
        scale: least and greatest value, mean and deviation of each channel by which all volumes are normalised; None for each
            volume by its own mean and deviation.
        classes: their names.
        values: of each class in a mask.
        colours: of each class, red, green and blue.
        background: number of the class that is not scored; None for none.
        channels: of a voxel.
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
        """Tokens of a window along each axis."""
        return tuple(side // self.patch for side in self.size)

    def normalised(self, voxels: Shaped[np.ndarray, "x y z c"]) -> Float[np.ndarray, "x y z c"]:
        """Numbers around 0, as the model reads them, each channel by itself."""
        if self.scale is None:
            mean, deviation = voxels.mean((0, 1, 2), dtype=np.float64), voxels.std((0, 1, 2), dtype=np.float64)
        else:
            low, high, mean, deviation = np.array(self.scale).T
            voxels = voxels.clip(low, high)
        return ((voxels - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)

    def read(self, path: Path) -> tuple[Float[Tensor, "1 n f"], tuple[int, ...], tuple[int, ...], Scan]:
        """Tokens of a whole file, their grid, the voxels that they stand for, without those that fill it up, and the scan.

        Raises:
            Unsupported: for a file that cannot be read, a volume smaller than a window, and one of other channels.
        """
        scan = read_scan(path)
        check_channels(path, scan, self.channels, "as the model was trained on")
        voxels = resampled(scan.voxels, scan.spacing, self.spacing)
        sides = voxels.shape[:3]
        check_sides(path, sides, self.size, self.patch)
        inputs, grid = self.tokens(self.normalised(voxels))
        return inputs, grid, sides, scan

    def tokens(self, voxels: Float[np.ndarray, "x y z c"]) -> tuple[Float[Tensor, "1 n f"], tuple[int, ...]]:
        """Tokens of a normalised volume, filled up with its border to whole ones, and their grid."""
        filled = np.pad(voxels, [*_missing(voxels.shape[:3], self.patch), (0, 0)], mode="edge")
        grid = tuple(side // self.patch for side in filled.shape[:3])
        return cut(torch.from_numpy(filled).movedim(-1, 0)[None], self.patch), grid

    def targets(self, labels: Int[np.ndarray, "x y z"]) -> Int[Tensor, "1 n p"]:
        """The class of each voxel of the tokens; ignored where they are filled up."""
        filled = np.pad(labels, _missing(labels.shape, self.patch), constant_values=IGNORED)
        return cut(torch.from_numpy(filled.astype(np.int64))[None, None], self.patch)

    def as_record(self) -> dict[str, Any]:
        """Numbers and words for JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """From :meth:`as_record`."""
        given = {key: as_tuples(value) for key, value in record.items()}
        if given.get("scale") and not isinstance(given["scale"][0], tuple):
            given["scale"] = (given["scale"],)  # as models of one channel were kept before there were several
        return cls(**given)


@dataclass(frozen=True)
class Volumes:
    """Volumes, and the class of each of their voxels.

    Attributes:
        source: in words.
        voxels: of each volume, as it comes; all have the same number of channels.
        labels: numbers of classes, `IGNORED` where there is none.
        classes, values: names of the classes, and what they are in masks.
        background: number of the class that is not scored; None for none.
        split: numbers of the volumes to train on and of those to hold out, and in words how they were told apart; None to draw
            volumes to hold out.
        notes: what was left out.
    """

    source: str
    voxels: Sequence[Float[np.ndarray, "x y z c"]]
    labels: Sequence[Int[np.ndarray, "x y z"]]
    classes: tuple[str, ...]
    values: tuple[int, ...]
    background: int | None
    split: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], str] | None = None
    notes: list[str] = field(default_factory=list)

    def counts(self, chosen: Sequence[int]) -> Int[np.ndarray, "v k"]:
        """Voxels of each class in each of some volumes."""
        found = [self.labels[i] for i in chosen]
        return np.stack([np.bincount(each[each != IGNORED], minlength=len(self.values)) for each in found])

    def largest(self, count: int) -> Volumes:
        """The same with the `count` classes of most voxels beside the background, of which the others become part."""
        numbers = self.counts(range(len(self.labels))).sum(0)
        kept, table, told = largest_classes(numbers, self.background, count)
        assert self.background is not None  # without one it is refused
        whole = np.append(table, IGNORED).astype(np.int16)
        return replace(
            self,
            labels=[whole[np.where(each == IGNORED, len(table), each)] for each in self.labels],
            classes=tuple(self.classes[i] for i in kept),
            values=tuple(self.values[i] for i in kept),
            background=kept.index(self.background),
            notes=[*self.notes, f"{told} {self.classes[self.background]}"],
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
) -> Volumes:
    """The volumes and masks of a folder.

    Args:
        folder: with `images` and `masks` and perhaps `classes.txt`, as :func:`regard.tasks.segmentation.masks.read_masked` has
            them, of NIfTI files.
        validation: another, whose volumes are held out.
        size, patch, spacing: as of :class:`VolumeReader`.
        background, ignore, skip_unreadable: as of :func:`regard.tasks.segmentation.masks.read_masked`.

    Raises:
        Unsupported: for what is missing or unreadable, or does not belong together, with the first file of its kind.
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
    if not training:
        raise Unsupported(
            f"{names_of(folder)}, of which no volume and mask can be read", supported="2 or more volumes and masks"
        )
    values, quiet = classes_among(
        [path for _, path in pairs], [np.unique(mask) for mask in masks], training, names, background, ignore
    )
    table = np.full(256, IGNORED, dtype=np.int16)
    table[values] = np.arange(len(values))
    apart = np.array(spacings)
    if spacing is None and (apart.max(0) > UNEVEN * apart.min(0)).any():
        notes.append(f"voxels of {apart.min():.3g} to {apart.max():.3g} mm: spacing=1 resamples all to 1 mm")
    found = Volumes(
        names_of(folder),
        voxels,
        [table[mask] for mask in masks],
        tuple(names.get(value, str(value)) for value in values),
        tuple(values),
        None if quiet is None else values.index(quiet),
        notes=notes,
    )
    return _distinct(found, None if validation is None else training)


def check_channels(path: Path, scan: Scan, channels: int, why: str) -> None:
    """Raise Unsupported for a volume of another number of channels."""
    found = scan.voxels.shape[3]
    if found != channels:
        raise Unsupported(
            f"{path} of {found} channel" + "s" * (found != 1),
            supported=f"volumes of {channels} channel" + "s" * (channels != 1) + f", {why}",
        )


def check_sides(path: Path, sides: tuple[int, ...], size: tuple[int, ...], patch: int) -> None:
    """Raise Unsupported for a volume that is smaller than a crop."""
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
    """A volume, or a mask, with its voxels at other distances: means where they become fewer and linear between where they
    become more; of a mask, which has no channels, the nearest."""
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


def _distinct(volumes: Volumes, training: int | None) -> Volumes:
    """Without exact repetitions; those after the first `training` are held out, and are the ones kept."""
    count = len(volumes.voxels)
    order = range(count) if training is None else [*range(training, count), *range(training)]
    first: dict[bytes, int] = {}
    for i in order:
        first.setdefault(hashlib.blake2b(volumes.voxels[i].tobytes(), digest_size=16).digest(), i)
    kept = sorted(first.values())
    notes = [f"{count - len(kept)} exact repetitions left out"] if len(kept) < count else []
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
    )


def _missing(sides: tuple[int, ...], patch: int) -> list[tuple[int, int]]:
    """Voxels to the end of the last token, along each axis."""
    return [(0, -side % patch) for side in sides]
