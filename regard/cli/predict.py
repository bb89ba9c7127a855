"""`regard predict`: the classes of images, or of their pixels, by a trained model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.console import console, emit
from regard.cli.options import DEVICE, JSON, SKIP_UNREADABLE
from regard.contract import Unsupported, at_least

if TYPE_CHECKING:
    from torch import nn

    from regard.tasks.images import ImageReader
    from regard.tasks.segmentation import MaskReader

AT_ONCE = 32
"""Images of a batch."""


def predict(
    folder: Annotated[Path, typer.Argument(help="Folder of regard train.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(help="Classes to name for each image, the likeliest first.")] = 3,
    skip_unreadable: SKIP_UNREADABLE = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Of a model that segments: a PNG for the mask of one image, or a folder for those of several."
        ),
    ] = None,
    device: DEVICE = "cpu",
    as_json: JSON = False,
) -> None:
    """Classify images, or their pixels, with a trained model.

    The images are turned, resized and normalised as those it was trained on. A model of the task segmentation tells the share
    of each class, and writes the mask in the image's size with --output: its values and colours are those of the masks that
    the model was trained on.

    Examples:

    \b
        regard predict my_model holiday.jpg
        regard predict my_model photos/ --skip-unreadable --json
        regard predict scans scan.png --output mask.png
    """
    from regard.tasks.segmentation import MaskReader
    from regard.workbench.trained import open_trained

    at_least("top", top, 1)
    trained = open_trained(folder)
    reader, model = trained.reader, trained.model(device)
    paths = [path for given in images for path in image_files(given)]
    found, skipped = [], list[str]()
    if isinstance(reader, MaskReader):
        _segment(folder, model, reader, paths, output, device, skipped if skip_unreadable else None, as_json)
        return
    if output is not None:
        raise Unsupported(
            f"--output {output} of a model that classifies images", supported="models of the task segmentation"
        )
    for start in range(0, len(paths), AT_ONCE):
        found += _classify(
            model, reader, paths[start : start + AT_ONCE], top, device, skipped if skip_unreadable else None
        )
    if not found:
        raise Unsupported("images of which none can be read", supported="one image or more")
    if as_json:
        emit({"folder": str(folder), "images": found, "skipped": skipped})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("image", "class", "probability", "others"):
        table.add_column(heading, justify="right" if heading == "probability" else "left")
    for row in found:
        (first, chance), *others = row["classes"]
        said = ", ".join(f"{name} {p:.3f}" for name, p in others)
        table.add_row(Text(row["image"]), Text(first, style="bold"), f"{chance:.3f}", Text(said))
    console.print(table)
    for name in skipped:
        console.print(Text(f"not read: {name}", style="dim"))


def _segment(
    folder: Path,
    model: nn.Module,
    reader: MaskReader,
    paths: list[Path],
    output: Path | None,
    device: str,
    skipped: list[str] | None,
    as_json: bool,
) -> None:
    """Tell the shares of the classes of each file, and write its mask; files that cannot be read are added to `skipped`."""
    from regard.models.weights import write_atomically
    from regard.workbench import segment as masks

    if output is not None:
        masks.check_output(output, len(paths))
    found, taken = list[dict[str, Any]](), set[str]()
    for path in paths:
        try:
            classes, shares = masks.segment(model, reader, path, device)
        except Unsupported as error:
            if skipped is None:
                raise
            skipped.append(error.asked)
            continue
        row: dict[str, Any] = {"image": str(path), "shares": shares}
        if output is not None:
            place = masks.place_of(output, path, taken)
            drawn = masks.mask_image(classes, reader)
            write_atomically(place, functools.partial(drawn.save, format="PNG"))
            row["mask"] = str(place)
        found.append(row)
    if not found:
        raise Unsupported("images of which none can be read", supported="one image or more")
    if as_json:
        emit({"folder": str(folder), "images": found, "skipped": skipped or []})
        return
    for row in found:
        written = f": {row['mask']}" if "mask" in row else ""
        console.print(Text(f"{row['image']}: {masks.described(row['shares'])}{written}"))
    for name in skipped or ():
        console.print(Text(f"not read: {name}", style="dim"))


def image_files(given: Path) -> Iterator[Path]:
    """A file itself, or the images of a folder in sorted order."""
    from regard.tasks.documents import nearest_path, walk
    from regard.tasks.image_files import images_among

    if given.is_dir():
        yield from images_among(walk(given)[0], given)
    elif given.is_file():
        yield given
    else:
        raise Unsupported(
            f"{given}, which does not exist", supported="image files, or folders of them", nearest=nearest_path(given)
        )


def _classify(
    model: nn.Module, reader: ImageReader, paths: list[Path], top: int, device: str, skipped: list[str] | None
) -> list[dict[str, Any]]:
    """The likeliest classes of each file; those that cannot be read are added to `skipped` where that is a list."""
    import torch

    from regard.contract import Context

    kept, inputs = [], []
    for path in paths:
        try:
            inputs.append(reader.read([path]))
        except Unsupported as error:
            if skipped is None:
                raise
            skipped.append(error.asked)
        else:
            kept.append(path)
    if not kept:
        return []
    with torch.inference_mode():
        logits = model(torch.cat(inputs).to(device), context=Context(grid=reader.grid)).output
    chances, order = logits.float().softmax(-1).sort(-1, descending=True)
    named = [
        [(reader.classes[i], p) for i, p in zip(o[:top], c[:top], strict=True)]
        for o, c in zip(order.tolist(), chances.tolist(), strict=True)
    ]
    return [{"image": str(path), "classes": classes} for path, classes in zip(kept, named, strict=True)]
