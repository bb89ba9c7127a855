"""Heads as slices: Colin27 with the regions of AAL (Debian's mricron-data), and MNI152 with its tissues (nilearn).

Both are averages or single heads in a standard space, not patients: they say whether a network learns shapes in real images,
and nothing about a clinic. Read where they lie; terms are those of the packages.
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

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped, UInt8

VOLUMES = ("colin27", "mni152")
MRICRON = Path("/usr/share/mricron/templates")
COLIN = ("ch2.nii.gz", "aal.nii.gz", "aal.nii.txt")
MNI = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
NILEARN = "pip install --no-deps nilearn"
SLAB, GAP = 12, 4
"""Slices of a slab, which is held out or trained on as a whole, and slices beside a held-out slab that are neither."""
LEAST = 0.01
"""Share of a slice that its classes beside the background must have for it to be taken."""


def is_volume(data: str) -> bool:
    """Whether `data` names one of the heads, or is a folder that holds Colin27's files."""
    return data in VOLUMES or all((Path(data) / name).is_file() for name in COLIN[:2])


def read_volume(data: str, size: int, share: float, seed: int) -> Masked:
    """Axial slices of a head as squares of `size` pixels, split by slabs.

    Args:
        data: a name of `VOLUMES`, or a folder with Colin27's files.
        share: of the slices to hold out.
        seed: of the choice of slabs.

    Raises:
        Unsupported: where the package, or nibabel, is not there.
    """
    if data == "mni152":
        head, labels, names, source = _mni152()
    else:
        head, labels, names, source = _colin27(MRICRON if data == "colin27" else Path(data))
    taken = np.flatnonzero((labels > 0).mean((0, 1)) >= LEAST)
    pixels = np.stack([_square(head[:, :, i], size, smooth=True) for i in taken])[..., None]
    classes = np.stack([_square(labels[:, :, i], size, smooth=False) for i in taken]).astype(np.int64)
    training, held_out = split_by_slabs(len(taken), share, seed)
    if not len(training):
        raise Unsupported(
            f"{source} with {len(taken)} slices of which none is left to train on",
            supported=f"more than {SLAB + GAP} slices, or a smaller share held out",
        )
    left = len(taken) - len(training) - len(held_out)
    split = f"by slabs of {SLAB} slices; {left} slices beside the held-out ones are in neither part (seed {seed})"
    notes = [f"axial slices, {taken[0]} to {taken[-1]} of {labels.shape[2]}; one head: other heads are not held out"]
    images = Images(source, (size, size, 1), pixels, classes, names, None, notes)
    return Masked(images, tuple(range(len(names))), colours_of(len(names)), 0, (training, held_out, split))


def split_by_slabs(count: int, share: float, seed: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Slices to train on and to hold out: whole slabs are held out, and of the others no slice near to one is trained on."""
    slab = np.arange(count) // SLAB
    slabs = int(slab.max(initial=0)) + 1
    chosen = counter_generator(seed, 0, SPLIT).permutation(slabs)[: max(1, round(share * slabs))]
    held_out = np.isin(slab, chosen)
    near = np.convolve(held_out, np.ones(2 * GAP + 1), "same") > 0
    return np.flatnonzero(~near), np.flatnonzero(held_out)


def _colin27(
    folder: Path,
) -> tuple[UInt8[np.ndarray, "x y z"], Int[np.ndarray, "x y z"], tuple[str, ...], str]:
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


def _mni152() -> tuple[UInt8[np.ndarray, "x y z"], Int[np.ndarray, "x y z"], tuple[str, ...], str]:
    folder = package_folder("nilearn", "segmentation data=mni152", NILEARN) / "datasets" / "data"
    head, grey, white = (_load(folder / MNI.format(part)).astype(np.float32) for part in ("t1", "gm", "wm"))
    rest = 255 - grey - white  # the maps are probabilities, 255 for 1
    labels = np.stack([rest, grey, white]).argmax(0)
    return _bytes(head), labels, ("background", "grey matter", "white matter"), "MNI152 with its tissues"


def _load(path: Path) -> Shaped[np.ndarray, "x y z"]:
    try:
        from nibabel import load
        from nibabel.filebasedimages import ImageFileError
    except ImportError:
        raise Unsupported(
            f"{path} without the package nibabel, which reads it",
            supported="the extra",
            nearest="pip install 'regard[medical]'",
        ) from None
    try:
        return np.asarray(load(path).dataobj)
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        raise Unsupported(f"{path}, which cannot be read ({error})", supported="a whole NIfTI file") from None


def _bytes(head: Shaped[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "x y z"]:
    bright = float(np.percentile(head[head > 0], 99.5)) if (head > 0).any() else 1.0
    return np.clip(np.round(head * (255 / bright)), 0, 255).astype(np.uint8)


def _square(plane: Shaped[np.ndarray, "x y"], size: int, *, smooth: bool) -> Shaped[np.ndarray, "s s"]:
    """A slice seen from above, the nose up, filled up to a square and resized."""
    from PIL import Image

    turned = np.rot90(plane)
    side = max(turned.shape)
    before = [(side - each) // 2 for each in turned.shape]
    filled = np.pad(turned, [(b, side - each - b) for b, each in zip(before, turned.shape, strict=True)])
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(filled.astype(np.uint8)).resize((size, size), how))
