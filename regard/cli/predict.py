"""`regard predict`: classify images, or their pixels or voxels, with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.console import console, emit
from regard.cli.options import DEVICE, JSON, PLUGINS, REDUCE, SKIP_UNREADABLE
from regard.contract import Unsupported, at_least
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regard.tasks.images import ImageReader
    from regard.tasks.segmentation import MaskReader
    from regard.tasks.segmentation.folders import Kind
    from regard.tasks.segmentation_3d import VolumeReader

AT_ONCE = 32
"""Images per batch."""


def predict(
    folder: Annotated[Path, typer.Argument(help="Folder of regard train.")],
    images: Annotated[list[Path], typer.Argument(help="Image files or NIfTI volumes, or folders of them.")],
    top: Annotated[int, typer.Option(help="Classes to name for each image, the likeliest first.")] = 3,
    skip_unreadable: SKIP_UNREADABLE = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the masks of a segmentation model: a PNG (.nii.gz for a volume), or a folder for several."
        ),
    ] = None,
    reduce: REDUCE = None,
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Classify images, or their pixels or voxels, with a trained model.

    Images are rotated, resized and normalised as in training. A model of the task segmentation reports the share of each
    class and, with --output, writes masks in the image's size, with the values and colours of its training masks. A
    model of segmentation_3d reads NIfTI volumes, in windows of its crop size, and writes masks with the volume's shape
    and affine. With --reduce, classes are predicted from fewer tokens; the command reports how many differ from those
    with all tokens, and how fast both are.

    Examples:

    \b
        regard predict my_model holiday.jpg
        regard predict my_model photos/ --skip-unreadable --json
        regard predict scans scan.png --output mask.png
        regard predict heads scan.nii.gz --output mask.nii.gz
        regard predict my_model photos/ --reduce evit:keep=0.7
    """
    from regard.tasks.image_files import several_pictures
    from regard.tasks.segmentation import MaskReader
    from regard.tasks.segmentation.folders import PICTURES, VOLUMES, files_of
    from regard.tasks.segmentation_3d import VolumeReader
    from regard.workbench.trained.folder import open_trained
    from regard.workbench.trained.reduced import reduced, told

    enter_plugins(plugin)
    at_least("top", top, 1)
    trained = open_trained(folder)
    reader, model = trained.reader, trained.model(device)
    kind = VOLUMES if isinstance(reader, VolumeReader) else PICTURES
    paths = [path for given in images for path in files_of(given, kind)]
    fewer = None if reduce is None else reduced(model, reduce)
    found, skipped, differ, speeds = [], list[str](), 0, None
    if isinstance(reader, MaskReader | VolumeReader):
        _segment(folder, model, reader, kind, paths, output, device, skipped if skip_unreadable else None, as_json)
        return
    if output is not None:
        raise Unsupported(
            f"--output {output} of a model that classifies images", supported="models of the task segmentation"
        )
    for start in range(0, len(paths), AT_ONCE):
        chosen = paths[start : start + AT_ONCE]
        kept, inputs = _read(reader, chosen, device, skipped if skip_unreadable else None)
        if inputs is None:
            continue
        chances = _chances(model, inputs, reader)
        if fewer is not None:
            plain, chances = chances, _chances(fewer.model, inputs, reader)
            differ += int((plain.argmax(-1) != chances.argmax(-1)).sum())
            speeds = fewer.speeds(inputs, reader.grid) if speeds is None else speeds
        found += _named(kept, chances, reader, top)
    if not found:
        raise Unsupported("images, none of which can be read", supported="one image or more")
    notes = several_pictures([Path(row["image"]) for row in found])
    if as_json:
        beside = {} if speeds is None else {"reduced": {"by": reduce, "differ": differ, **speeds}}
        emit({"folder": str(folder), "images": found, "skipped": skipped, "notes": notes, **beside})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("image", "class", "probability", "others"):
        table.add_column(heading, justify="right" if heading == "probability" else "left")
    for row in found:
        (first, chance), *others = row["classes"]
        said = ", ".join(f"{name} {p:.3f}" for name, p in others)
        table.add_row(Text(row["image"]), Text(first, style="bold"), f"{chance:.3f}", Text(said))
    console.print(table)
    if speeds is not None:
        console.print(Text(f"{reduce}: {differ} of {len(found)} classes differ; {told(speeds)}."))
    _tell(skipped, notes)


def _segment(
    folder: Path,
    model: nn.Module,
    reader: MaskReader | VolumeReader,
    kind: Kind,
    paths: list[Path],
    output: Path | None,
    device: str,
    skipped: list[str] | None,
    as_json: bool,
) -> None:
    """Report the class shares of each file and write its mask; files that cannot be read are added to `skipped`."""
    from regard.tasks.image_files import several_pictures
    from regard.tasks.segmentation import MaskReader
    from regard.workbench.trained import segment, segment_3d
    from regard.workbench.trained.reading import readable

    masks: Any = segment if isinstance(reader, MaskReader) else segment_3d
    if output is not None:
        segment.check_output(output, len(paths), kind)
    found = list[dict[str, Any]]()
    paths = readable(reader, paths, skipped)
    places = None if output is None else segment.places_of(output, paths, kind)
    for number, path in enumerate(paths):
        classes, shares = masks.segment(model, reader, path, device)
        row: dict[str, Any] = {"image": str(path), "shares": shares}
        if places is not None:
            masks.write(places[number], classes, reader)
            row["mask"] = str(places[number])
        found.append(row)
    notes = several_pictures([Path(row["image"]) for row in found]) if isinstance(reader, MaskReader) else []
    if as_json:
        emit({"folder": str(folder), "images": found, "skipped": skipped or [], "notes": notes})
        return
    for row in found:
        written = f": {row['mask']}" if "mask" in row else ""
        console.print(Text(f"{row['image']}: {segment.described(row['shares'])}{written}"))
    _tell(skipped or [], notes)


def _tell(skipped: list[str], notes: list[str]) -> None:
    for line in [f"not read: {name}" for name in skipped] + [f"note: {note}" for note in notes]:
        console.print(Text(line, style="dim"))


def _read(
    reader: ImageReader, paths: list[Path], device: str, skipped: list[str] | None
) -> tuple[list[Path], Tensor | None]:
    """Read files; returns the readable ones and their inputs. The rest are added to `skipped` if it is a list."""
    import torch

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
    return kept, torch.cat(inputs).to(device) if inputs else None


def _chances(model: nn.Module, inputs: Tensor, reader: ImageReader) -> Tensor:
    """Class probabilities (B, K)."""
    import torch

    from regard.contract import Context

    with torch.inference_mode():
        return model(inputs, context=Context(grid=reader.grid)).output.float().softmax(-1)


def _named(paths: list[Path], chances: Tensor, reader: ImageReader, top: int) -> list[dict[str, Any]]:
    """The likeliest classes of each file."""
    ordered, order = chances.sort(-1, descending=True)
    named = [
        [(reader.classes[i], p) for i, p in zip(o[:top], c[:top], strict=True)]
        for o, c in zip(order.tolist(), ordered.tolist(), strict=True)
    ]
    return [{"image": str(path), "classes": classes} for path, classes in zip(paths, named, strict=True)]
