"""Heads as slices: Colin27 with the AAL regions (Debian's mricron-data), and MNI152 with its tissues (nilearn).

Both are averages or single heads in a standard space, not patients: they show whether a network learns shapes in real
images, and nothing about clinical use. They are read in place; the terms are those of the packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Unsupported
from regard.tasks.image_files import Images
from regard.tasks.packaged import package_folder
from regard.tasks.protocol import SPLIT, counter_generator
from regard.tasks.segmentation.masks import Masked, colours_of
from regard.tasks.segmentation.nifti import open_nifti

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped, UInt8

Head = tuple[np.ndarray, np.ndarray, tuple[str, ...], str]
HEADS = ("colin27", "mni152")
MRICRON = Path("/usr/share/mricron/templates")
COLIN = ("ch2.nii.gz", "aal.nii.gz", "aal.nii.txt")
MNI = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
NILEARN = "pip install --no-deps nilearn"
SLAB, GAP = 12, 4
"""Slices per slab, which is held out or trained on as a whole, and unused slices on each side of a held-out slab."""
LEAST = 0.01
"""Smallest share of a slice that its classes, without the background, must cover."""


def is_head(data: str) -> bool:
    """Return whether `data` names one of the heads, or is a folder that holds Colin27's files."""
    return data in HEADS or all((Path(data) / name).is_file() for name in COLIN[:2])


def read_slices(data: str, size: tuple[int, int], share: float, seed: int) -> Masked:
    """Axial slices of a head, of this height and width, split by slabs.

    Args:
        data: a name of `HEADS`, or a folder with Colin27's files.
        share: share of the slices to hold out.
        seed: seed of the choice of slabs.

    Raises:
        Unsupported: if the package, or nibabel, is missing.
    """
    head, labels, names, source = read_head(data)
    taken = np.flatnonzero((labels > 0).mean((0, 1)) >= LEAST)
    pixels = np.stack([_fitted(head[:, :, i], size, smooth=True) for i in taken])[..., None]
    classes = np.stack([_fitted(labels[:, :, i], size, smooth=False) for i in taken]).astype(np.int64)
    training, held_out = split_by_slabs(len(taken), share, seed)
    if not len(training):
        raise Unsupported(
            f"{source} with {len(taken)} slices, none of which is left to train on",
            supported=f"more than {SLAB + GAP} slices, or a smaller share held out",
        )
    left = len(taken) - len(training) - len(held_out)
    split = f"by slabs of {SLAB} slices; {left} slices beside the held-out ones are in neither part (seed {seed})"
    notes = [f"axial slices, {taken[0]} to {taken[-1]} of {labels.shape[2]}; one head: other heads are not held out"]
    images = Images(source, (*size, 1), pixels, classes, names, None, notes)
    return Masked(images, tuple(range(len(names))), colours_of(len(names)), 0, (training, held_out, split))


def read_head(data: str) -> Head:
    """A head as bytes, the class index of each voxel, the class names, and the source in words; arguments as in
    :func:`read_slices`."""
    return _mni152() if data == "mni152" else _colin27(MRICRON if data == "colin27" else Path(data))


def split_by_slabs(count: int, share: float, seed: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Training and held-out slices: whole slabs are held out, and slices close to them are not used for training."""
    slab = np.arange(count) // SLAB
    slabs = int(slab.max(initial=0)) + 1
    chosen = counter_generator(seed, 0, SPLIT).permutation(slabs)[: max(1, round(share * slabs))]
    held_out = np.isin(slab, chosen)
    near = np.convolve(held_out, np.ones(2 * GAP + 1), "same") > 0
    return np.flatnonzero(~near), np.flatnonzero(held_out)


def _colin27(folder: Path) -> Head:
    image, labels, listed = (folder / name for name in COLIN)
    if not (image.is_file() and labels.is_file()):
        raise Unsupported(
            f"segmentation data=colin27, whose files are not in {folder}",
            supported=f"a folder with {COLIN[0]} and {COLIN[1]}",
            nearest="apt install mricron-data (Debian), or data=mni152",
        )
    found = _load(labels).astype(np.int64)
    names = ["background", *(str(i) for i in range(1, int(found.max()) + 1))]
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            value, *words = line.split()[:2] or [""]
            if value.isdecimal() and words and 0 < int(value) < len(names):
                names[int(value)] = words[0]
    return _bytes(_load(image)), found, tuple(names), "Colin27 with the regions of AAL"


def _mni152() -> Head:
    folder = package_folder("nilearn", "segmentation data=mni152", NILEARN) / "datasets" / "data"
    head, grey, white = (_load(folder / MNI.format(part)).astype(np.float32) for part in ("t1", "gm", "wm"))
    rest = 255 - grey - white  # the maps are probabilities, with 255 for 1
    labels = np.stack([rest, grey, white]).argmax(0)
    return _bytes(head), labels, ("background", "grey matter", "white matter"), "MNI152 with its tissues"


def _load(path: Path) -> Shaped[np.ndarray, "x y z"]:
    return open_nifti(path).voxels


def _bytes(head: Shaped[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "x y z"]:
    bright = float(np.percentile(head[head > 0], 99.5)) if (head > 0).any() else 1.0
    return np.clip(np.round(head * (255 / bright)), 0, 255).astype(np.uint8)


def _fitted(plane: Shaped[np.ndarray, "x y"], size: tuple[int, int], *, smooth: bool) -> Shaped[np.ndarray, "h w"]:
    """A slice seen from above, with the nose up, padded to the proportions of a height and width and resized to them."""
    from PIL import Image

    turned = np.rot90(plane)
    scale = max(have / want for have, want in zip(turned.shape, size, strict=True))
    room = [round(scale * want) - have for have, want in zip(turned.shape, size, strict=True)]
    filled = np.pad(turned, [(more // 2, more - more // 2) for more in room])
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(filled.astype(np.uint8)).resize(size[::-1], how))
