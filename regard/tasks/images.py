"""Image classification on pixels or patches."""

from __future__ import annotations

import gzip
import hashlib
import math
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern, Unsupported, closest
from regard.tasks.documents import class_folders, file_name, names_of, nearest_path, walk
from regard.tasks.protocol import (
    SPLIT,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import in_epochs, one_of_each_in_turn

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8

NAMED = ("digits", "fashion-mnist")
DEBIAN_DATASETS = Path("/usr/share/datasets")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
LARGEST_IDX = 1 << 30
"""Bytes of the images of an IDX file."""
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_SUPPORTED = "digits, fashion-mnist, a folder with one sub-folder a class, or a folder of MNIST's four IDX files"


@dataclass(frozen=True)
class Images:
    """Images of one size with their classes.

    Attributes:
        source: in words.
        pixels: uint8; float32 from 0 to 255 where some images have more than 8 bits.
        labels: class of each image, or of each of its pixels.
        classes: their names.
        held_out: images that must not be trained on; None when the data set has no split of its own.
        notes: what was left out.
        span: least and greatest value of images of more than 8 bits, which are taken as dark and light; None without such.
    """

    source: str
    pixels: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n ..."]
    classes: tuple[str, ...]
    held_out: Int[np.ndarray, " m"] | None = None
    notes: list[str] = field(default_factory=list)
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class ImageReader:
    """From images to the inputs of a model: all that a trained model must keep of its task to read others.

    Attributes:
        height, width, channels: of the images.
        patch: side of a patch in pixels.
        mean, deviation: of each channel of the training images.
        classes: their names.
        span: as in :class:`Images`.
    """

    height: int
    width: int
    channels: int
    patch: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[str, ...]
    span: tuple[float, float] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch

    def patches(self, pixels: Shaped[np.ndarray, "b h w c"]) -> Float[Tensor, "b n f"]:
        """Normalised patches, row by row: the pixels of one row by row, the channels of a pixel together."""
        (rows, columns), p = self.grid, self.patch
        normal = (pixels - np.array(self.mean)) / np.array(self.deviation)
        cut = normal.reshape(len(pixels), rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5)
        return torch.from_numpy(cut.reshape(len(pixels), rows * columns, -1).astype(np.float32))

    def read(self, paths: Sequence[Path]) -> Float[Tensor, "b n f"]:
        """The patches of image files, turned as their cameras say and resized.

        Raises:
            Unsupported: for files that cannot be read, and images of more than 8 bits where the model has seen none.
        """
        images = [read_image(path, (self.height, self.width), self.channels) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.dtype == np.float32 and self.span is None:
                raise Unsupported(
                    f"{path}, an image of more than 8 bits", supported="images of 8 bits, as the model was trained on"
                )
        return self.patches(stacked(images, self.span)[0])

    def as_record(self) -> dict[str, Any]:
        """Numbers and words for JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ImageReader:
        """From :meth:`as_record`."""
        read: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**read)


class ImagesTask(Task):
    """Classify images, cut into square patches that are the tokens, row by row.

    Features are the pixels of a patch, normalised for each channel by the training images' mean and deviation. The
    split is by image, the same share of each class; exact repetitions count once. An epoch shows each image once.

    Args:
        data: ``digits`` (8x8, from scikit-learn; the default), ``fashion-mnist`` (28x28, where Debian's
            dataset-fashion-mnist is installed), a folder with one sub-folder a class, or one with MNIST's IDX files.
        validation: a folder with the same sub-folders, for data that is a folder; its images are what is held out.
        length: number of patches, as another way to say `patch`.
        patch: side of a patch in pixels, a divisor of height and width; pixels for images up to 8x8, else close to 4.
        size: side that a folder's images are resized to, 4 to 1024.
        channels: 3 (colour) or 1 (grey), for a folder's images.
        held_out: share of each class held out where the data has no split of its own, 0.01 to 0.5.
        evaluation_items: most held-out images, balanced over the classes, 1 to 65536.
        seed: of the split.
    """

    name = "images"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"
    named = NAMED

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        validation: str | Path | None = None,
        length: int | None = None,
        patch: int | None = None,
        size: int | None = None,
        channels: int | None = None,
        held_out: float = 0.2,
        evaluation_items: int = 1000,
        seed: int = 0,
    ) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_fraction("held_out", held_out, 0.01, 0.5)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        images = distinct(_load("digits" if data is None else data, validation, size, channels))
        self._images = images
        self.num_classes: int = len(images.classes)
        height, width, depth = images.pixels.shape[1:]
        self.patch = choose_patch(height, width, length, patch)
        self.grid: tuple[int, ...] = (height // self.patch, width // self.patch)
        self.length = self.grid[0] * self.grid[1]
        self.features: int = self.patch**2 * depth

        self._training, self._held_out = _split(images, held_out, seed)
        self._scored = one_of_each_in_turn(self._held_out, images.labels)[:evaluation_items]
        training = images.pixels[self._training].reshape(-1, depth)
        deviation = training.std(0, dtype=np.float64)
        self.reader = ImageReader(
            height,
            width,
            depth,
            self.patch,
            tuple(training.mean(0, dtype=np.float64).tolist()),
            tuple(np.where(deviation > 0, deviation, 1.0).tolist()),
            images.classes,
            images.span,
        )
        scored_labels = images.labels[self._scored]
        self.chance = float(np.bincount(scored_labels).max() / len(scored_labels))
        self.baseline: Baseline | None = Baseline.majority_class(images.labels[self._training], scored_labels)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self._batch(in_epochs(self._training, step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._batch(self._scored[rows])

    def describe(self) -> str:
        images = self._images
        height, width, depth = images.pixels.shape[1:]
        counts = Counter(images.labels[self._training].tolist())
        named = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(images.classes[:20]))
        lines = [
            f"images: {images.source}, {height}x{width} pixels, {'grey' if depth == 1 else 'colour'}",
            f"{self.length} tokens ({self.grid[0]}x{self.grid[1]}), patches of {self.patch}x{self.patch} pixels",
            f"training: {len(self._training):,} images of {self.num_classes} classes ({named}"
            + (", ...)" if self.num_classes > 20 else ")"),
            f"held out: {len(self._held_out):,} images, {len(self._scored):,} of them scored; chance {self.chance:.3f}",
            "split: by image, "
            + (
                "as the data set comes"
                if images.held_out is not None
                else f"the same share of each class (seed {self.seed})"
            ),
        ]
        lines += [f"note: {note}" for note in images.notes]
        first = self._training[0]
        return "\n".join([*lines, f"sample: {images.classes[images.labels[first]]}", *_drawn(images.pixels[first])])

    def _batch(self, chosen: Int[np.ndarray, " b"]) -> Batch:
        labels = torch.from_numpy(self._images.labels[chosen].astype(np.int64))
        return Batch(self.reader.patches(self._images.pixels[chosen]), labels, grid=self.grid)


def _load(data: Any, validation: Any, size: int | None, channels: int | None) -> Images:
    if not isinstance(data, str | Path):
        raise Unsupported(f"data={data!r} for images", supported=_SUPPORTED, nearest="a folder of folders")
    folder = Path(data)
    is_classes = str(data) not in NAMED and not has_idx(folder)
    for name, value in (("size", size), ("channels", channels), ("validation", validation)):
        if value is not None and not is_classes:
            raise Unsupported(
                f"{name}={value} for {data}, which comes as it is",
                supported=f"{name} with a folder of images",
                nearest=f"no {name}",
            )
    if str(data) == "digits":
        return _load_digits()
    if str(data) == "fashion-mnist":
        return _load_fashion_mnist()
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        near = closest(str(data), NAMED) or ("" if folder.exists() else nearest_path(folder))
        raise Unsupported(f"data={data} for images, which {wrong}", supported=_SUPPORTED, nearest=near)
    if not is_classes:
        return _load_idx(folder, names_of(folder), tuple("0123456789"))
    side = check_integer("size", 32 if size is None else size, 4, 1024)
    depth = 3 if channels is None else channels
    if depth not in (1, 3):
        raise Unsupported(f"channels={channels}", supported="3 (colour) or 1 (grey)", nearest="channels=3")
    return _load_folders(folder, None if validation is None else Path(validation), side, depth)


def _load_digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unsupported(
            "images data=digits without scikit-learn, which holds them",
            supported="a folder with one sub-folder a class, or the extra",
            nearest="pip install 'regard[data]'",
        ) from None
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return Images("scikit-learn's digits", pixels, digits.target.astype(np.int64), tuple("0123456789"))


def _load_fashion_mnist() -> Images:
    folder = DEBIAN_DATASETS / "fashion-mnist"
    if not has_idx(folder):
        raise Unsupported(
            "images data=fashion-mnist, which is not on this machine",
            supported="digits, or a folder that holds its four IDX files",
            nearest="apt install dataset-fashion-mnist (Debian), or data=digits",
        )
    names = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    return _load_idx(folder, "Fashion-MNIST", names)


def has_idx(folder: Path) -> bool:
    """Whether a folder has MNIST's four IDX files."""
    return all(_idx_path(folder, name) is not None for name in _IDX_FILES)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _load_idx(folder: Path, source: str, classes: tuple[str, ...]) -> Images:
    images, labels, test_images, test_labels = (_read_idx(folder, name) for name in _IDX_FILES)
    if len(images) != len(labels) or len(test_images) != len(test_labels) or images.shape[1:] != test_images.shape[1:]:
        raise Unsupported(
            f"{folder}, whose IDX files do not belong together", supported="the four files of one data set"
        )
    pixels = np.concatenate([images, test_images])[..., None]
    all_labels = np.concatenate([labels, test_labels]).astype(np.int64)
    if all_labels.max() >= len(classes):
        classes = tuple(map(str, range(int(all_labels.max()) + 1)))
    return Images(source, pixels, all_labels, classes, held_out=np.arange(len(images), len(pixels)))


def _read_idx(folder: Path, name: str) -> UInt8[np.ndarray, "n ..."]:
    """An IDX file of bytes: two zeros, type 8, number of axes, big-endian sizes, data."""
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
            raw = file.read(math.prod(sizes) + 1)  # no more, however much a compressed file would give
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Unsupported(
            f"{path}, which cannot be read ({error})",
            supported=f"an IDX file of 1 to {LARGEST_IDX:,} bytes, gzipped or not",
        ) from None
    if len(raw) != math.prod(sizes):
        raise Unsupported(f"{path}, which is not a whole IDX file of bytes", supported="an IDX file, gzipped or not")
    return np.frombuffer(raw, dtype=np.uint8).reshape(sizes)


def _load_folders(folder: Path, validation: Path | None, size: int, channels: int) -> Images:
    classes, paths, labels, notes = _list_folders(folder)
    for i, name in enumerate(classes):
        if labels.count(i) < 2 and validation is None:
            raise Unsupported(
                f"{folder / name} with {labels.count(i)} image", supported="2 or more images in each class's folder"
            )
    held_out = None
    if validation is not None:
        if not validation.is_dir():
            raise Unsupported(
                f"validation={validation}, which is not a folder",
                supported="a folder like data",
                nearest="" if validation.exists() else nearest_path(validation),
            )
        others, more, their_labels, more_notes = _list_folders(validation)
        if others != classes:
            odd = sorted(set(others) ^ set(classes))
            raise Unsupported(
                f"validation={validation}, whose classes differ from those of data ({', '.join(odd[:5])})",
                supported="the same sub-folders: " + ", ".join(classes),
            )
        held_out = np.arange(len(paths), len(paths) + len(more))
        paths, labels, notes = paths + more, labels + their_labels, notes + more_notes
    pixels, span, count = stacked([read_image(path, (size, size), channels) for path in paths])
    if span is not None:
        low, high = span
        notes.append(
            f"{count} images of more than 8 bits a pixel: values from {low:g} to {high:g} are taken as dark to light"
        )
    return Images(names_of(folder), pixels, np.array(labels, dtype=np.int64), tuple(classes), held_out, notes, span)


def images_among(files: Sequence[Path], folder: Path) -> list[Path]:
    """The images among the files of a folder; raises Unsupported where there is none."""
    kept = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not kept:
        raise Unsupported(
            f"{folder}, which holds no image", supported="files ending in " + " ".join(sorted(IMAGE_SUFFIXES))
        )
    return kept


def _list_folders(folder: Path) -> tuple[list[str], list[Path], list[int], list[str]]:
    folders = class_folders(folder)
    classes, listed, notes = [file_name(one.name) for one in folders], [], []
    for one in folders:
        files, note = walk(one)
        listed.append(files)
        notes += note
    if len(classes) < 2:
        raise Unsupported(
            f"{folder} with {len(classes)} sub-folders",
            supported="a folder with one sub-folder a class, 2 or more of them",
        )
    paths: list[Path] = []
    labels: list[int] = []
    others = 0
    for i, files in enumerate(listed):
        kept = images_among(files, folders[i])
        others += len(files) - len(kept)
        paths += kept
        labels += [i] * len(kept)
    if others:
        notes.append(f"{names_of(folder)}: {others} files that are not images not read")
    return classes, paths, labels, notes


def read_image(
    path: Path, size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]:
    """An image of this height and width as bytes, or as float32 numbers of its own scale where its grey has more than 8 bits."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise Unsupported(
            "a folder of images without pillow, which reads them",
            supported="the extra",
            nearest="pip install 'regard[data]'",
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                turned = ImageOps.exif_transpose(opened)
                deep = turned.mode[0] in "IF"
                image = Image.fromarray(np.asarray(turned, dtype=np.float32)) if deep else turned.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise unreadable(path, error) from None
    if deep:
        values = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
        if not np.isfinite(values).all():
            raise unreadable(path, "it holds values that are no finite numbers")
        return np.repeat(values[..., None], channels, axis=2)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    flat = flat.convert("RGB" if channels == 3 else "L").resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(flat, dtype=np.uint8).reshape(*size, channels)


def unreadable(path: Path, why: Any) -> Unsupported:
    """What to raise for a file that cannot be read as an image."""
    return Unsupported(
        f"{path}, which cannot be read as an image ({why})",
        supported="whole images: " + " ".join(sorted(IMAGE_SUFFIXES)),
        nearest="repair it or take it out of the folder",
    )


def stacked(
    images: list[np.ndarray], span: tuple[float, float] | None = None
) -> tuple[Shaped[np.ndarray, "n h w c"], tuple[float, float] | None, int]:
    """The images as one array; the span of those with more than 8 bits, all scaled by the same; how many these are."""
    deep = [i for i, image in enumerate(images) if image.dtype == np.float32]
    if not deep:
        return np.stack(images), span, 0
    if span is None:
        span = float(min(images[i].min() for i in deep)), float(max(images[i].max() for i in deep))
    low, width = span[0], span[1] - span[0]
    for i in deep:
        images[i] = ((images[i] - low) * (255 / width if width else 0)).astype(np.float32)
    return np.stack(images).astype(np.float32), span, len(deep)


def distinct(images: Images) -> Images:
    """Without exact repetitions. Where a data set has held-out images, those are the ones kept."""
    order = np.arange(len(images.pixels))
    if images.held_out is not None:
        order = np.concatenate([images.held_out, np.setdiff1d(order, images.held_out)])
    digests = [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in images.pixels]
    first: dict[bytes, int] = {}
    for i in order:
        first.setdefault(digests[i], int(i))
    kept = np.array(sorted(first.values()))
    repeated = len(images.pixels) - len(kept)
    if not repeated:
        return images
    held_out = None if images.held_out is None else np.flatnonzero(np.isin(kept, images.held_out))
    notes = [*images.notes, f"{repeated} exact repetitions left out"]
    if images.held_out is not None:
        taken = {digests[i] for i in images.held_out}
        shared = sum(digests[i] in taken for i in np.setdiff1d(order, images.held_out))
        if shared:
            notes.append(f"{shared} images of the held-out data are also in the training data: not trained on")
    return replace(images, pixels=images.pixels[kept], labels=images.labels[kept], held_out=held_out, notes=notes)


def _split(images: Images, share: float, seed: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    everything = np.arange(len(images.labels))
    if images.held_out is not None:
        training = np.setdiff1d(everything, images.held_out)
        missing = [name for i, name in enumerate(images.classes) if not (images.labels[training] == i).any()]
        if missing:
            raise Unsupported(
                f"no training images of {missing[0]} that are not also held out",
                supported="images of its own for each class",
            )
        return training, images.held_out
    held_out: list[np.ndarray] = []
    for label, name in enumerate(images.classes):
        members = np.flatnonzero(images.labels == label)
        if len(members) < 2:
            raise Unsupported(
                f"the class {name} with {len(members)} different images",
                supported="2 or more different images in each class",
            )
        order = counter_generator(seed, label, SPLIT).permutation(members)
        held_out.append(order[: max(1, round(share * len(members)))])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(everything, chosen), chosen


def choose_patch(height: int, width: int, length: int | None, patch: int | None) -> int:
    sides = [side for side in range(1, min(height, width) + 1) if height % side == 0 and width % side == 0]
    lengths = {side: height * width // side**2 for side in sides}
    if patch is not None and patch not in sides:
        near = min(sides, key=lambda side: abs(side - patch)) if isinstance(patch, int) else sides[0]
        raise Unsupported(
            f"patch={patch} for images of {height}x{width}",
            supported=", ".join(map(str, sides)),
            nearest=f"patch={near}",
        )
    if length is None:
        return patch or (1 if height * width <= 64 else min(sides, key=lambda side: abs(side - 4)))
    fitting = sides if patch is None else [patch]
    for side in fitting:
        if lengths[side] == length:
            return side
    accepted = [lengths[side] for side in fitting]
    near = min(accepted, key=lambda n: abs(n - length)) if isinstance(length, int) else accepted[0]
    told = f" with patch={patch}" if patch is not None else ""
    raise Unsupported(
        f"length={length} for images of {height}x{width}{told}",
        supported="lengths " + ", ".join(map(str, accepted)),
        nearest=f"length={near}",
    )


def _drawn(pixels: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]) -> list[str]:
    """The image as a few lines of characters, dark to light."""
    shades = " .:-=+*#%@"
    stride = max(1, -(-max(pixels.shape[:2]) // 28))
    grey = pixels[::stride, ::stride].mean(-1)
    return ["  " + "".join(shades[int(value) * len(shades) // 256] * 2 for value in row) for row in grey]
