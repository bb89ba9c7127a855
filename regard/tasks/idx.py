"""Data sets in the form of MNIST's four IDX files, such as Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Unsupported
from regard.tasks.documents import names_of
from regard.tasks.image_files import Images

if TYPE_CHECKING:
    from jaxtyping import UInt8

DEBIAN_DATASETS = Path("/usr/share/datasets")
FASHION_MNIST = "fashion-mnist"
FASHION_CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
LARGEST_IDX = 1 << 30
"""Largest size in bytes of the images in an IDX file."""
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def has_idx(folder: Path) -> bool:
    """Return whether a folder has MNIST's four IDX files."""
    return all(_idx_path(folder, name) is not None for name in _IDX_FILES)


def load_fashion_mnist() -> Images:
    """Load Fashion-MNIST from where Debian's package puts it; raises Unsupported, with how to get it, if missing."""
    folder = DEBIAN_DATASETS / FASHION_MNIST
    if not has_idx(folder):
        raise Unsupported(
            f"images data={FASHION_MNIST}, which is not in {folder}",
            supported="digits, or a folder that holds its four IDX files",
            nearest="apt install dataset-fashion-mnist (Debian, Ubuntu), or without its rights "
            "`apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .` and "
            f"data=usr/share/datasets/{FASHION_MNIST}",
        )
    return load_idx(folder)


def load_idx(folder: Path) -> Images:
    """Load a folder of four IDX files, gzipped or not; the second pair is held out.

    Raises:
        Unsupported: for files that cannot be read or do not belong together.
    """
    fashion = folder.name.lower().replace("_", "-") == FASHION_MNIST
    source, classes = ("Fashion-MNIST", FASHION_CLASSES) if fashion else (names_of(folder), tuple("0123456789"))
    images, labels, test_images, test_labels = (_read_idx(folder, name) for name in _IDX_FILES)
    if len(images) != len(labels) or len(test_images) != len(test_labels) or images.shape[1:] != test_images.shape[1:]:
        raise Unsupported(
            f"{folder}, whose IDX files do not belong together", supported="the four files of one data set"
        )
    pixels = np.concatenate([images, test_images])[..., None]
    all_labels = np.concatenate([labels, test_labels]).astype(np.int64)
    if all_labels.max() >= len(classes):
        classes = tuple(map(str, range(int(all_labels.max()) + 1)))
    height, width = pixels.shape[1:3]
    return Images(source, (height, width, 1), pixels, all_labels, classes, held_out=np.arange(len(images), len(pixels)))


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str) -> UInt8[np.ndarray, "n ..."]:
    """Read an IDX file of bytes: two zeros, type 8, number of axes, big-endian sizes, data."""
    path = _idx_path(folder, name)
    assert path is not None
    axes = int(name[-7])
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            sizes = [int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4)]
            if head[:4] != bytes([0, 0, 8, axes]) or len(sizes) != axes:
                raise ValueError("its first bytes are not those of such a file")
            if not 0 < math.prod(sizes) <= LARGEST_IDX:
                raise ValueError(f"sizes {' x '.join(map(str, sizes))}")
            raw = file.read(math.prod(sizes) + 1)  # read no more, however much a compressed file would give
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Unsupported(
            f"{path}, which cannot be read ({error})",
            supported=f"an IDX file of 1 to {LARGEST_IDX:,} bytes, gzipped or not",
        ) from None
    if len(raw) != math.prod(sizes):
        raise Unsupported(f"{path}, which is not a whole IDX file of bytes", supported="an IDX file, gzipped or not")
    return np.frombuffer(raw, dtype=np.uint8).reshape(sizes)
