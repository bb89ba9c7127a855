"""Segmentation of pictures by a trained model: the class of each pixel, as a picture and as shares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Unsupported
from regard.core.files import write_atomically
from regard.core.patches import joined
from regard.tasks.image_files import unused_name
from regard.tasks.protocol import IGNORED
from regard.tasks.segmentation import MaskReader
from regard.tasks.segmentation.folders import Kind, suffix_of
from regard.workbench.reports.png import png

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

    from regard.tasks.segmentation_3d import VolumeReader

VOID = (224, 224, 224)
"""Colour for ignored pixels."""


@torch.inference_mode()
def segment(
    model: nn.Module, reader: MaskReader, path: Path, device: torch.device | str = "cpu"
) -> tuple[Int[np.ndarray, "h w"], dict[str, float]]:
    """The class index of each pixel, in the picture's own size, and the share of each class, largest first.

    The picture is resized to the model's size; logits are interpolated (bilinearly) back to the picture's size.

    Raises:
        Unsupported: for a file that cannot be read.
    """
    from PIL import Image, ImageOps

    inputs = reader.read([path]).to(device)
    output = model(inputs, context=Context(grid=reader.grid)).output
    with Image.open(path) as opened:
        width, height = ImageOps.exif_transpose(opened).size
    classes = likeliest(joined(output, reader.grid, reader.patch)[0], (height, width)).cpu().numpy()
    return classes, shares_of(classes, reader.classes)


def shares_of(classes: Int[np.ndarray, "..."], names: Sequence[str]) -> dict[str, float]:
    """The share of each class by name, largest first."""
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    return {names[i]: float(shares[i]) for i in np.argsort(-shares, kind="stable") if shares[i]}


def likeliest(logits: Float[Tensor, "k *sides"], size: tuple[int, ...]) -> Int[Tensor, "*sides2"]:
    """The class with the largest logit at each place of another size; done class by class to save memory."""
    if tuple(logits.shape[1:]) == tuple(size):
        return logits.argmax(0)
    how = "bilinear" if len(size) == 2 else "trilinear"
    best = torch.full(size, -torch.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.long, device=logits.device)
    for number, each in enumerate(logits.float()):
        larger = F.interpolate(each[None, None], size, mode=how, align_corners=False)[0, 0]
        found = torch.where(larger > best, number, found)
        best = torch.maximum(best, larger)
    return found


def write(place: Path, classes: Int[np.ndarray, "h w"], reader: MaskReader) -> None:
    """Write the mask as a PNG file, see :func:`mask_image`."""
    data = png(*mask_image(classes, reader))
    write_atomically(place, lambda path: path.write_bytes(data))


def mask_image(
    classes: Int[np.ndarray, "h w"], reader: MaskReader | VolumeReader
) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "256 3"]]:
    """The mask as palette indices, and the palette; values and colours are those of the masks trained on."""
    table = np.zeros(256, dtype=np.uint8)
    table[: len(reader.values)] = reader.values
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[list(reader.values)] = reader.colours
    unused = next((value for value in range(255, -1, -1) if value not in reader.values), 0)
    palette[unused] = VOID
    return np.where(classes == IGNORED, unused, table[classes]).astype(np.uint8), palette


def check_output(output: Path, count: int, kind: Kind, what: str = "mask") -> None:
    """Raise Unsupported if the results for `count` files cannot be written to `output`."""
    suffix = suffix_of(output)
    if suffix and (suffix not in kind.written or count > 1) and not output.is_dir():
        raise Unsupported(
            f"--output {output} for " + (f"one {what}" if count == 1 else f"{count} {what}s"),
            supported=f"a file ending in {' or '.join(kind.written)}, of one {kind.word}, or a folder",
            nearest=str(output.with_name(output.name[: -len(suffix)] + kind.usual * (count == 1))),
        )


def places_of(output: Path, paths: Sequence[Path], kind: Kind, asked: Sequence[str] = ()) -> list[Path]:
    """The path for the result of each file: `output` itself, or a file with a similar name in that folder.

    Args:
        output: a file or a folder.
        paths: the files read.
        kind: the kind of file written.
        asked: further words for the name, so that a result for other ones is kept beside: ``photo-occlusion-dog.png``.

    Raises:
        Unsupported: if a result would replace one of the files read.
    """
    places, taken = list[Path](), set[str]()
    for path in paths:
        stem = path.name[: len(path.name) - len(suffix_of(path))]
        name = "-".join([stem, *(re.sub(r"[^\w.-]+", "_", word) for word in asked)])
        alone = suffix_of(output) in kind.written and not output.is_dir()
        places.append(output if alone else output / f"{unused_name(name, taken)}{kind.usual}")
    read = {path.resolve() for path in paths}
    for place in places:
        if place.resolve() in read:
            raise Unsupported(f"--output {output}, where {place} is a file to read", supported="another folder or file")
    return places


def described(shares: dict[str, float], count: int = 8) -> str:
    """The largest shares, in words."""
    told = [f"{name} {share:.1%}" for name, share in list(shares.items())[:count]]
    return ", ".join([*told, "..."] if len(shares) > count else told)
