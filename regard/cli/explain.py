"""`regard explain`: which parts of an image a trained model's class, or that class's share of the pixels, depends on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from regard.cli.console import console, emit
from regard.cli.options import DEVICE, JSON, PLUGINS, REDUCE, SKIP_UNREADABLE
from regard.contract import Unsupported, closest
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from torch import Tensor

    from regard.tasks.images import ImageReader


def explain(
    folder: Annotated[Path, typer.Argument(help="Folder of regard train.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the drawings, one PNG per image, named after it and after --reduce, --method and --class where given; or a .png "
            "file for a single image."
        ),
    ] = Path("explained"),
    of: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="The class to explain; when not given, the likeliest, and for a model that segments the one that covers most besides the "
            "background.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rollout (vision transformers whose layers return attention weights), regions (BiFormer), agents (agent attention) or occlusion (any "
            "model); when not given, the first that fits the model."
        ),
    ] = None,
    reduce: REDUCE = None,
    skip_unreadable: SKIP_UNREADABLE = False,
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Draw each image next to a map of what the model's class depends on: bright parts count most.

    Occlusion hides parts of the image and measures how much less likely the class becomes; for a model that segments
    images, how much smaller the class's share of the pixels becomes (the class's mean probability). Rollout follows the
    attention weights from the class token back to the patches. Regions shows how many regions read each region in the
    last routing block, and agents shows what each agent gathers, one map per agent; these two show what the model
    reads, whatever the class. With --reduce, and for a model that runs with fewer tokens itself, the drawing shows the
    remaining tokens: merged patches share a colour, and dropped ones are dark.

    Examples:

    \b
        regard explain my_model holiday.jpg
        regard explain my_model photos/cat/ --class dog --output drawings
        regard explain my_model holiday.jpg --reduce tome:remove=4
        regard explain scans scan.png --class tumour
    """
    import torch

    from regard.compression.tokens.applied import at_work_in
    from regard.contract import Context
    from regard.core.files import write_atomically
    from regard.tasks.segmentation import MaskReader
    from regard.tasks.segmentation.folders import PICTURES, files_of
    from regard.tasks.segmentation_3d import VolumeReader
    from regard.workbench.trained import explain as maps
    from regard.workbench.trained.folder import open_trained
    from regard.workbench.trained.reading import readable
    from regard.workbench.trained.reduced import patches_in, reduced
    from regard.workbench.trained.segment import check_output, places_of

    enter_plugins(plugin)
    trained = open_trained(folder)
    reader, model = trained.reader, trained.model(device)
    if isinstance(reader, VolumeReader):
        raise Unsupported(
            f"explain of {folder}, a model that segments volumes",
            supported="models that classify images or their pixels",
            nearest="regard predict",
        )
    if reduce is not None and method is not None:
        raise Unsupported(f"--method {method} with --reduce", supported="one of the two")
    fewer = None if reduce is None else reduced(model, reduce)
    model, at_work = (model, at_work_in(model)) if fewer is None else (fewer.model, fewer.reduction)
    segments = isinstance(reader, MaskReader)
    if segments:
        model = maps.ClassShares(model, len(reader.classes))
    if of is not None and of not in reader.classes:
        raise Unsupported(
            f"class {of!r}", supported=", ".join(reader.classes[:20]), nearest=closest(of, reader.classes)
        )
    told, skipped = [], list[str]()
    paths = [path for given in images for path in files_of(given, PICTURES)]
    check_output(output, len(paths), PICTURES, "drawing")
    paths = readable(reader, paths, skipped if skip_unreadable else None)
    asked = [word for word in (reduce, method, of) if word is not None]
    for path, place in zip(paths, places_of(output, paths, PICTURES, asked), strict=True):
        inputs = reader.read([path])[0].to(device)
        with torch.inference_mode():
            logits = model(inputs[None], context=Context(grid=reader.grid)).output[0]
        label = _likeliest(logits, reader) if of is None else reader.classes.index(of)
        picture = reader.picture(path)
        if at_work is None or method is not None:
            used, weight = maps.explain(model, inputs, reader.grid, label, method)
            drawn = maps.draw(picture, weight, smooth=used != "regions")
        else:
            tokens, went = at_work.tokens, patches_in(model, at_work.tokens)[0]
            left = int((tokens.sizes[0, tokens.protected :] > 0).sum())
            used = f"{reduce or at_work.method}, {left} of {went.numel()} patch tokens left"
            drawn = maps.draw_tokens(picture, went)
        write_atomically(place, functools.partial(drawn.save, format="PNG"))
        told.append(
            {
                "image": str(path),
                "class": reader.classes[label],
                "share" if segments else "probability": float(logits.float().softmax(-1)[label]),
                "method": used,
                "drawing": str(place),
            }
        )
    if as_json:
        emit({"folder": str(folder), "images": told, "skipped": skipped})
        return
    for row in told:
        found = f"{row['share']:.1%} of the pixels" if segments else f"{row['probability']:.3f}"
        console.print(Text(f"{row['image']}: {row['class']} ({found}), by {row['method']}: {row['drawing']}"))
    for name in skipped:
        console.print(Text(f"not read: {name}", style="dim"))


def _likeliest(logits: Tensor, reader: ImageReader) -> int:
    """The class with the largest logit, without the background of a segmentation."""
    from regard.tasks.segmentation import MaskReader

    background = reader.background if isinstance(reader, MaskReader) else None
    return next(label for label in logits.argsort(descending=True).tolist() if label != background)
