"""NIfTI files, read and written by nibabel: volumes with the position of their voxels in the scanner."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.contract import Unsupported
from regard.tasks.image_files import WITHOUT, Unreadable
from regard.tasks.segmentation.folders import suffix_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

MOST_CHANNELS = 16
"""Largest number of values per voxel; more suggest a time series of volumes."""
INSTALL = "pip install 'regard[medical]'"


@dataclass(frozen=True)
class Nifti:
    """A NIfTI file.

    Attributes:
        path: location of the file.
        voxels: voxels as stored, scaled as the file says.
        affine: matrix from voxel indices to millimetres.
    """

    path: Path
    voxels: Shaped[np.ndarray, "..."]
    affine: Float[np.ndarray, "4 4"]

    @property
    def sides(self) -> str:
        """The shape, in words."""
        return " x ".join(map(str, self.voxels.shape))


@dataclass(frozen=True)
class Scan:
    """A volume whose axes run from left to right, from back to front and from bottom to top.

    Attributes:
        voxels: finite values; the last axis holds the channels.
        spacing: distance between voxels in millimetres, along each axis.
        stored: the file, whose axes may differ.
    """

    voxels: Float[np.ndarray, "x y z c"]
    spacing: tuple[float, ...]
    stored: Nifti

    @property
    def sides(self) -> tuple[int, ...]:
        """Number of voxels along each axis."""
        return self.voxels.shape[:3]


def open_nifti(path: Path) -> Nifti:
    """Open a file without changing its axes.

    Raises:
        Unsupported: for a file that cannot be read (`Unreadable`), and without nibabel.
    """
    nibabel = _nibabel(path)
    try:
        image = nibabel.load(path)
        return Nifti(path, np.asarray(image.dataobj), np.asarray(image.affine, dtype=np.float64))
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise Unreadable(
            f"{path}, which cannot be read ({error})",
            supported="a whole NIfTI file",
            nearest="repair it, take it out of the folder, or --skip-unreadable",
        ) from None


def read_scan(path: Path) -> Scan:
    """Read a volume; a fourth axis of its file holds channels, such as several sequences of one head.

    Raises:
        Unsupported: for a single slice, colours, a time series of volumes, and voxels that are not finite.
    """
    stored = _volume(path, MOST_CHANNELS)
    voxels = stored.voxels.reshape(*stored.voxels.shape[:3], -1).astype(np.float32)
    odd = int((~np.isfinite(voxels)).sum())
    if odd:
        raise Unreadable(
            f"{path} with {odd:,} voxels that are no finite numbers (NaN or infinite)",
            supported="finite numbers",
            nearest="a number in their place, such as 0 for what is outside the body, or --skip-unreadable",
        )
    turned, spacing = _turned(stored, voxels)
    return Scan(turned, spacing, stored)


def read_mask(path: Path, scan: Scan) -> Int[np.ndarray, "x y z"]:
    """Read the values of a volume's mask, 0 to 255, reoriented like the volume.

    Raises:
        Unsupported: if the shape or position differs from the volume's, and for other values.
    """
    stored, image = _volume(path, 1), scan.stored
    if stored.voxels.shape != image.voxels.shape[:3]:
        raise Unreadable(
            f"{path} of {stored.sides} voxels, the mask of a volume of {image.sides}",
            supported="masks of the shape of their volumes",
            nearest=WITHOUT,
        )
    off = _displacement(stored.affine, image.affine, stored.voxels.shape)
    if not off < min(scan.spacing) / 2:
        raise Unreadable(
            f"{path}, which lies {off:.3g} mm away from its volume {image.path.name} (another affine)",
            supported="masks with the affine of their volumes, to half a voxel",
            nearest=WITHOUT,
        )
    values = stored.voxels
    whole = np.rint(values.astype(np.float64))
    if not (np.isfinite(values).all() and (whole == values).all() and whole.min() >= 0 and whole.max() <= 255):
        raise Unreadable(
            f"{path}, a mask with values that are no classes, such as {_first_odd(values, whole):g}",
            supported="whole numbers from 0 to 255 (a mask that is resampled keeps them with nearest neighbours)",
            nearest=WITHOUT,
        )
    return _turned(stored, whole.astype(np.uint8))[0]


def written(mask: Int[np.ndarray, "x y z"], scan: Scan) -> Int[np.ndarray, "x y z"]:
    """Reorient a mask with the axes of a scan to the axes of its file."""
    from nibabel import orientations

    ours = orientations.axcodes2ornt("RAS")
    theirs = orientations.io_orientation(scan.stored.affine)
    return orientations.apply_orientation(mask, orientations.ornt_transform(ours, theirs))


def packed(place: Path, mask: Int[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"]) -> bytes:
    """The bytes of a file with a mask's values; compressed unless its name ends in ``.nii``."""
    from nibabel import Nifti1Image

    data = Nifti1Image(mask.astype(np.uint8), affine).to_bytes()
    return data if suffix_of(place) == ".nii" else gzip.compress(data, mtime=0)


def _volume(path: Path, channels: int) -> Nifti:
    """Open a file with three axes longer than 1 and up to `channels` values per voxel."""
    stored = open_nifti(path)
    voxels = stored.voxels
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    while voxels.ndim > 4 and voxels.shape[3] == 1:  # vectors in NIfTI are along the fifth axis
        voxels = voxels[:, :, :, 0]
    if voxels.dtype.kind not in "biuf":
        raise Unsupported(f"{path} with voxels of {voxels.dtype}, as colours have", supported="one number a voxel")
    if voxels.ndim < 3 or (voxels.ndim == 3 and min(voxels.shape) == 1):
        raise Unsupported(
            f"{path}, a single slice of {' x '.join(map(str, voxels.shape))} voxels",
            supported="volumes of three axes",
            nearest="--task segmentation for slices as images",
        )
    if not voxels.size or voxels.ndim > 4 or (voxels.ndim == 4 and voxels.shape[3] > channels):
        raise Unsupported(
            f"{path} of {stored.sides} voxels",
            supported="one volume per file: three axes, and "
            + (f"up to {channels} channels along a fourth" if channels > 1 else "one number a voxel"),
        )
    return Nifti(path, voxels, stored.affine)


def _turned(stored: Nifti, voxels: Shaped[np.ndarray, "..."]) -> tuple[Any, tuple[float, ...]]:
    """Voxels with the axes of a :class:`Scan`, and the distances between them in millimetres."""
    from nibabel import affines, orientations

    order = orientations.io_orientation(stored.affine)
    if np.isnan(order).any() or not np.isfinite(stored.affine).all():
        raise Unsupported(f"{stored.path}, whose affine gives its voxels no place", supported="an affine of rank 3")
    sizes = affines.voxel_sizes(stored.affine)
    spacing = tuple(float(sizes[axis]) for axis in np.argsort(order[:, 0]))
    return np.ascontiguousarray(orientations.apply_orientation(voxels, order)), spacing


def _displacement(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance, in millimetres, between the places to which two affines map a corner of a volume."""
    corners = np.array(np.meshgrid(*((0, side - 1) for side in shape))).reshape(3, -1)
    corners = np.concatenate([corners, np.ones((1, corners.shape[1]))])
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())


def _first_odd(values: np.ndarray, whole: np.ndarray) -> float:
    odd = ~np.isfinite(values) | (whole != values) | (whole < 0) | (whole > 255)
    return float(values[odd][0])


def _nibabel(path: Path) -> Any:
    try:
        import nibabel
        import nibabel.filebasedimages
    except ImportError:
        raise Unsupported(
            f"{path} without the package nibabel, which reads it", supported="the extra", nearest=INSTALL
        ) from None
    return nibabel
