"""What in a picture a trained model's class rests on, as a map and drawn over the picture.

``occlusion`` (Zeiler & Fergus, arXiv 1311.2901, section 4.2) takes any model: windows of patches are made the mean colour of
the training images, one after another, and a place counts by how much the probability of the class falls. ``rollout`` (Abnar
& Zuidema, arXiv 2005.00928, section 3) takes a vision transformer of softmax attention with a class token: the weights of
all blocks, averaged over the heads and half identity for the residual, are multiplied, and a patch counts by what of it
comes to the class token.

Where a model goes on with fewer tokens (:func:`regard.compression.tokens.reduce_tokens`), :func:`draw_tokens` draws where each
patch went: those that were merged have one colour, their mean, with a line around them, and those that were dropped are dark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.compression.tokens.hosts import blocks_of
from regard.compression.tokens.reducers import DROPPED
from regard.contract import Context, Unsupported, at_least
from regard.models.image_model import ImageModel
from regard.models.vision.vit import VisionTransformer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL import Image

METHODS = ("occlusion", "rollout")
AT_ONCE = 64
"""Images of a batch."""
COLD, HOT = (20, 20, 90), (255, 210, 60)
"""Colours of the least and the most that a place counts."""
EDGE = 255
"""Grey of the lines between tokens."""


@torch.no_grad()
def occlusion(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int], label: int, *, window: int = 3
) -> Float[Tensor, "rows columns"]:
    """How much of the class's probability goes with each place: the mean over the windows that hold it.

    Args:
        model: of the task images.
        inputs: the patches of one image, row by row.
        grid: rows and columns of patches.
        label: the class.
        window: rows and columns of patches that are hidden at once; at the border fewer.
    """
    at_least("window", window, 1)
    rows, columns = grid
    place = torch.arange(rows * columns, device=inputs.device)
    row, column = place // columns, place % columns
    near = [(each[:, None] - each).abs() <= (window - 1) // 2 for each in (row, column)]
    hidden = near[0] & near[1]  # (places, places): what each window hides
    chances = []
    for start in range(0, len(place), AT_ONCE):
        covered = hidden[start : start + AT_ONCE, :, None]
        logits = model(torch.where(covered, 0, inputs), context=Context(grid=grid)).output
        chances.append(logits.float().softmax(-1)[:, label])
    whole = model(inputs[None], context=Context(grid=grid)).output.float().softmax(-1)[0, label]
    lost = whole - torch.cat(chances)
    shares = hidden.float()
    return (shares.mT @ lost / shares.sum(0)).view(rows, columns)


@torch.no_grad()
def rollout(model: VisionTransformer, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rows columns"]:
    """What of each patch comes to the class token; each map adds up to less than 1.

    Raises:
        Unsupported: for other attention than softmax, and without a class token.
    """
    blocks, before = blocks_of(model)
    x = model.embed(model.check_images(images))
    flow = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
    for block in blocks:
        result = block(x, context=Context(want=frozenset({"weights"})))
        flow = (result.extras["weights"].float().mean(1) + torch.eye(x.shape[1], device=x.device)) / 2 @ flow
        x = result.output
    return flow[:, 0, before:].unflatten(1, model.config.grid)


def explain(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int], label: int, method: str | None = None
) -> tuple[str, Float[Tensor, "rows columns"]]:
    """The method, and its map of one image; ``rollout`` where the model has it when None."""
    if method is None:
        method = "occlusion"
        if isinstance(model, ImageModel) and isinstance(model.backbone, VisionTransformer):
            try:
                blocks_of(model.backbone)
                method = "rollout"
            except Unsupported:
                pass
    if method == "occlusion":
        return method, occlusion(model, inputs, grid, label)
    if method != "rollout" or not isinstance(model, ImageModel) or not isinstance(model.backbone, VisionTransformer):
        raise Unsupported(
            f"method={method!r} of a {type(model).__name__}",
            supported="occlusion, of any model; rollout, of vision transformers with softmax attention",
            nearest="occlusion",
        )
    return method, rollout(model.backbone, model.images(inputs[None], grid))[0]


def draw(picture: Image.Image, weight: Float[Tensor, "rows columns"], *, least: int = 256) -> Image.Image:
    """The picture, and beside it the same under the map: dark where a place counts little.

    Args:
        picture: as it was read.
        weight: from which the lowest and highest are the two ends of the colours.
        least: shorter side in pixels, to which a smaller picture is enlarged.
    """
    from PIL import Image, ImageOps

    plain = _enlarged(picture, least)
    span = (weight.max() - weight.min()).clamp(min=1e-12)
    shades = (255 * (weight - weight.min()) / span).round().to(torch.uint8).cpu().numpy()
    field = Image.fromarray(shades).resize(plain.size, Image.Resampling.BICUBIC)
    return _beside(plain, Image.blend(plain, ImageOps.colorize(field, black=COLD, white=HOT), 0.6))


def draw_tokens(picture: Image.Image, places: Int[Tensor, "rows columns"], *, least: int = 256) -> Image.Image:
    """The picture, and beside it the same as the tokens that are left show it; see the module.

    Args:
        picture: as it was read.
        places: the token in which each patch is, or -1 where it was dropped.
        least: as in :func:`draw`.
    """
    import numpy as np
    from PIL import Image

    plain = _enlarged(picture, least)
    pixels = np.asarray(plain).astype(np.float64)
    rows, columns = places.shape
    row, column = (
        np.arange(side) * cells // side for side, cells in zip(pixels.shape[:2], (rows, columns), strict=True)
    )
    token = places.cpu().numpy()[row[:, None], column]
    patch = row[:, None] * columns + column
    for each in np.unique(token):
        own = token == each
        if each == DROPPED:
            pixels[own] *= 0.2
        elif len(np.unique(patch[own])) > 1:
            pixels[own] = pixels[own].mean(0)
    edge = np.zeros(token.shape, dtype=bool)
    edge[1:] |= token[1:] != token[:-1]
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    pixels[edge] = EDGE
    return _beside(plain, Image.fromarray(pixels.round().astype(np.uint8)))


def _enlarged(picture: Image.Image, least: int) -> Image.Image:
    from PIL import Image

    plain = picture.convert("RGB")
    scale = max(1.0, least / min(plain.size))
    return plain.resize((round(scale * plain.width), round(scale * plain.height)), Image.Resampling.BICUBIC)


def _beside(plain: Image.Image, over: Image.Image) -> Image.Image:
    from PIL import Image

    sheet = Image.new("RGB", (2 * plain.width + 8, plain.height), "white")
    sheet.paste(plain, (0, 0))
    sheet.paste(over, (plain.width + 8, 0))
    return sheet
