"""The user's images as a vision transformer reads them: for training, held out, and from another source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported, an_instance
from regard.integrations.encoders import UNASKED
from regard.retrofit.corpus import HELD_OUT
from regard.tasks.documents import Paths, class_folders, file_name, names_of, nearest_path, walk
from regard.tasks.image_files import centre, check_memory, images_among, read_image, stacked
from regard.training.loop import step_seed

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

CENTER, SQUASH = "center", "squash"
"""timm's names for cropping images to a model's proportions and for stretching them."""


@dataclass(frozen=True)
class View:
    """A model's preprocessing of images.

    Attributes:
        channels, height, width: size of the model's input.
        crop: side of the center crop, as a share of the resized image's side.
        stretch: whether images are resized to the model's proportions, rather than cropped to them.
        mean, deviation: per-channel values to normalise pixels from 0 to 1 with.
        classes: names of the model's classes, in its order; empty if it does not name them.
        count: number of its classes.
    """

    channels: int
    height: int
    width: int
    crop: float
    stretch: bool
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[str, ...]
    count: int

    @classmethod
    def of(cls, model: Any) -> View:
        """The preprocessing of a timm model; raises Unsupported where it pads images to a square."""
        from timm.data import resolve_input_data_config

        told = resolve_input_data_config(model)
        if told["crop_mode"] not in (CENTER, SQUASH):
            raise Unsupported(
                f"{an_instance(model)} whose images are read by crop_mode={told['crop_mode']!r}",
                supported=f"{CENTER} and {SQUASH}",
            )
        channels, height, width = told["input_size"]
        names = model.pretrained_cfg.get("label_names") or ()
        crop, mean, std = told["crop_pct"], told["mean"], told["std"]
        stretch, classes = told["crop_mode"] == SQUASH, tuple(map(str, names))
        return cls(channels, height, width, crop, stretch, tuple(mean), tuple(std), classes, model.num_classes)

    def read(self, path: Path) -> Shaped[np.ndarray, "h w c"]:
        """Read the center crop of an image."""
        height, width = (max(math.floor(side / self.crop), side) for side in (self.height, self.width))
        image, _ = read_image(path, (height, width), self.channels, stretch=self.stretch)
        return centre(image, (self.height, self.width))

    def normal(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise images in bytes for the model; floating-point images are taken as normalised."""
        if images.dtype != torch.uint8:
            return images.float()
        mean, deviation = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.mean, self.deviation))
        return (images.float() / 255 - mean) / deviation


@dataclass(frozen=True)
class Some:
    """Images, (n, c, h, w) in bytes or normalised, and the class of each; :data:`UNASKED` if it is not known."""

    pixels: Shaped[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, chosen: Int[Tensor, " b"]) -> Some:
        return Some(self.pixels[chosen], self.labels[chosen])

    def spread(self, most: int) -> Some:
        """At most `most` of the images, evenly spread, since folders list one class after the other."""
        count = min(most, len(self))
        return self.at(torch.arange(count) * len(self) // max(count, 1))


@dataclass(frozen=True)
class Pictures:
    """The user's images.

    Attributes:
        training, held_out: parts of the data.
        other: images from another source; None without one.
        name, other_name: names for the report.
        labelled: whether their classes are known and match the model's.
    """

    training: Some
    held_out: Some
    other: Some | None
    name: str
    other_name: str | None
    labelled: bool

    @property
    def size(self) -> int:
        """Number of training images."""
        return len(self.training)

    @property
    def sources(self) -> dict[str, Some]:
        """The images to evaluate on, by name."""
        found = {f"{self.name}, held out": self.held_out}
        if self.other is not None:
            found[f"{self.other_name}, another source"] = self.other
        return found

    def drawn(self, step: int, seed: int, count: int) -> Some:
        """The images of a training step, without repetition, determined by the arguments alone."""
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        return self.training.at(torch.randperm(len(self.training), generator=generator)[:count])

    def digest(self) -> str:
        """Hash the images and their classes to twelve hexadecimal digits."""
        found = hashlib.sha256()
        for part in (self.training, self.held_out, self.other):
            found.update(b"none" if part is None else part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
        return found.hexdigest()[:12]


def read_pictures(
    data: Paths | Tensor,
    validation: Paths | Tensor | None,
    view: View,
    *,
    batch: int,
    seed: int,
    held_out: float = HELD_OUT,
) -> Pictures:
    """Read the images of folders, or take given images.

    Args:
        data: a folder of images, with or without a sub-folder for each class; or normalised images (n, c, h, w).
        validation: likewise, from another source; evaluated separately.
        batch: images of a training step.
        held_out: share of the data to hold out.

    Raises:
        Unsupported: for folders without images, damaged images, and too few of them.
    """
    whole, classes = _read(data, view)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    border = len(whole) - max(round(held_out * len(whole)), 2)
    if border < batch:
        raise Unsupported(
            f"{len(whole)} different images, of which {max(border, 0)} are not held out, for batches of {batch}",
            supported="a batch or more to train on",
            nearest=f"batch_size={border}" if border > 0 else "more images",
        )
    other = other_name = None
    if validation is not None:
        other, theirs = _read(validation, view)
        classes = classes and theirs
        other_name = "the validation data" if isinstance(validation, Tensor) else names_of(validation)
    name = "the data" if isinstance(data, Tensor) else names_of(data)
    return Pictures(whole.at(order[:border]), whole.at(order[border:]), other, name, other_name, classes)


def _read(data: Paths | Tensor, view: View) -> tuple[Some, bool]:
    """Read images without exact duplicates, and whether their classes are the model's."""
    shape = (view.channels, view.height, view.width)
    if isinstance(data, Tensor):
        if data.ndim != 4 or tuple(data.shape[1:]) != shape or not data.is_floating_point():
            raise Unsupported(
                f"data of {data.dtype} and shape {tuple(data.shape)}",
                supported=f"images (n, {', '.join(map(str, shape))}) in floating point, as the model reads them",
            )
        found = Some(data.cpu(), torch.full((len(data),), UNASKED))
        return found.at(_distinct(found.pixels.numpy())), False
    if not isinstance(data, (str, Path)):
        folders = list(data)
        if len(folders) != 1:
            raise Unsupported(f"{len(folders)} places of images", supported="one folder of images")
        data = folders[0]
    folder = Path(data)
    if not folder.is_dir():
        raise Unsupported(
            f"{folder} as images, which is not a folder",
            supported="a folder of images, for a vision transformer",
            nearest="" if folder.exists() else nearest_path(folder),
        )
    names, paths, labels = _listed(folder)
    check_memory(folder, len(paths), (view.height, view.width), view.channels)
    images, _, _ = stacked([view.read(path) for path in paths])
    pixels = np.stack([image.round().astype(np.uint8) for image in images]).transpose(0, 3, 1, 2)
    theirs = _numbers(names, view)
    known = [UNASKED if theirs is None else theirs[label] for label in labels]
    found = Some(torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(known))
    return found.at(_distinct(pixels)), theirs is not None


def _listed(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names, files, and the class of each file; a single unnamed class if there are no sub-folders."""
    folders = class_folders(folder)
    if len(folders) < 2:
        paths = images_among(walk(folder)[0], folder)
        return [], paths, [0] * len(paths)
    listed = [images_among(walk(one)[0], one) for one in folders]
    labels = [number for number, paths in enumerate(listed) for _ in paths]
    return [file_name(one.name) for one in folders], [path for paths in listed for path in paths], labels


def _numbers(names: Sequence[str], view: View) -> list[int] | None:
    """The model's number for each class: by name, or in order if the counts match; otherwise None."""
    if names and set(names) <= set(view.classes):
        return [view.classes.index(name) for name in names]
    return list(range(len(names))) if names and len(names) == view.count else None


def _distinct(pixels: Shaped[np.ndarray, "n c h w"]) -> Int[Tensor, " m"]:
    """Indices of the images, keeping the first of exact duplicates."""
    first: dict[bytes, int] = {}
    for number, image in enumerate(pixels):
        first.setdefault(hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest(), number)
    return torch.tensor(list(first.values()))
