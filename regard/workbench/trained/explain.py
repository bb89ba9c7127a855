"""The parts of a picture that a trained model's class depends on, as a map and drawn over the picture.

``occlusion`` (Zeiler & Fergus, arXiv 1311.2901, section 4.2) works for any model: windows of patches are replaced by
the mean colour of the training images, one after another, and a place counts by how much the class probability falls.
``rollout`` (Abnar & Zuidema, arXiv 2005.00928, section 3) needs a vision transformer with a class token whose layers
return their attention weights: the weights of all blocks, averaged over the heads, plus the identity for the residual
branch, with rows divided by their sums, are multiplied, and a patch counts by how much of it reaches the class token.

``regions`` and ``agents`` show what two mechanisms read, whatever the class: the share of regions that read each
region, in the last block that leaves some out (BiFormer, arXiv 2303.08810); and what each agent gathers, one map per
agent, in the last block with less than half as many agents as places (Agent Attention, arXiv 2312.08874).

A segmenter is explained as a classifier of whole pictures, whose probability of a class is the class's share of the
pixels (:class:`ClassShares`).

For a model with fewer tokens (:mod:`regard.compression.tokens`), :func:`draw_tokens` draws where each patch went: merged
patches share their mean colour, with a line around them, and dropped patches are dark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.apply import apply
from regard.compression.tokens.hosts import attention_of
from regard.compression.tokens.reducers import DROPPED
from regard.contract import Call, Context, Mechanism, Pattern, Result, Role, Unsupported, an_instance, at_least, closest
from regard.core.precision import wide
from regard.layers.attention import AttentionLayer
from regard.mechanisms.agent.forms import gathering_weights
from regard.mechanisms.bilevel_routing import Tiles, read_regions
from regard.models.image_model import ImageModel
from regard.models.vision.patch_tokens import context_of
from regard.models.vision.vit import VisionTransformer
from regard.tasks.images import SHOWN

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL import Image

OWN = {"regions": "bilevel_routing", "agents": "agent"}
"""Methods that show what a mechanism reads, with the mechanism."""
METHODS = ("occlusion", "rollout", *OWN)
PATCHES_AT_ONCE = 1 << 14
"""Patches per batch of images."""
WINDOWS = 32
"""Most windows along a side of a picture: on finer grids, blocks of patches are hidden in place of patches."""
COLD, HOT = (20, 20, 90), (255, 210, 60)
"""Colours for the lowest and the highest value of a map."""
EDGE = 255
"""Grey value of the lines between tokens."""


class ClassShares(nn.Module):
    """A segmenter as a classifier of whole pictures: the logit of a class is the logarithm of its share.

    Args:
        segmenter: a model for the task segmentation.
        classes: number of its classes.
    """

    def __init__(self, segmenter: nn.Module, classes: int) -> None:
        super().__init__()
        self.segmenter, self.classes = segmenter, classes

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Logits (B, K), whose softmax is the probability of each class, averaged over the pixels."""
        output = wide(self.segmenter(inputs, context=context).output)
        return Result(output.unflatten(-1, (-1, self.classes)).softmax(-1).mean((1, 2)).log())


@torch.no_grad()
def occlusion(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int], label: int, *, window: int = 3
) -> Float[Tensor, "rows columns"]:
    """How much of the class probability depends on each place: the mean loss over the windows that cover it.

    Args:
        model: a model for the task images, or a segmenter as :class:`ClassShares`.
        inputs: the patches of one image, in row-major order.
        grid: number of rows and of columns of patches.
        label: the class index.
        window: rows and columns of patches that are hidden at once; fewer at the border. On grids with more than
            `WINDOWS` rows or columns, those of blocks of patches.
    """
    at_least("window", window, 1)
    rows, columns = grid
    side = -(-max(grid) // WINDOWS)  # of a block
    across, down = -(-columns // side), -(-rows // side)
    place, block = (torch.arange(count, device=inputs.device) for count in (rows * columns, down * across))
    centres, places = (block // across, block % across), (place // columns // side, place % columns // side)
    near = [(at[:, None] - of).abs() <= (window - 1) // 2 for at, of in zip(centres, places, strict=True)]
    hidden = near[0] & near[1]  # (blocks, places): what each window hides
    chances, count = [], max(1, PATCHES_AT_ONCE // len(place))
    for start in range(0, len(block), count):
        covered = hidden[start : start + count, :, None]
        logits = model(torch.where(covered, 0, inputs), context=Context(grid=grid)).output
        chances.append(logits.float().softmax(-1)[:, label])
    whole = model(inputs[None], context=Context(grid=grid)).output.float().softmax(-1)[0, label]
    lost = whole - torch.cat(chances)
    shares = hidden.float()
    return (shares.mT @ lost / shares.sum(0)).view(rows, columns)


@torch.no_grad()
def rollout(model: VisionTransformer, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rows columns"]:
    """How much of each patch reaches the class token; the sum of each map is below 1.

    Raises:
        Unsupported: for layers without attention weights, and without a class token.
    """
    reason = _why_not_rolled_out(model)
    if reason:
        raise Unsupported(
            f"rollout of {an_instance(model)} {reason}",
            supported="vision transformers with a class token whose layers return attention weights",
            nearest="occlusion",
        )
    images = model.check_images(images)
    grid, before = model.embedding.grid(*images.shape[2:]), model.config.class_tokens
    x = model.embed(images)
    context = context_of(grid, before, x).replace(want=frozenset({"weights"}))
    same = torch.eye(x.shape[1], device=x.device)
    flow = same.expand(len(x), -1, -1)
    for block in model.blocks:
        result = block(x, context=context)
        mixed = result.extras["weights"].float().mean(1) + same
        flow = mixed / mixed.sum(-1, keepdim=True) @ flow
        x = result.output
    return flow[:, 0, before:].unflatten(1, grid)


def _why_not_rolled_out(model: VisionTransformer) -> str:
    """Why a model has no rollout, in words that follow its name; empty if it has one."""
    if not model.config.class_tokens:
        return "without a class token"
    if model.global_pool == "avg":
        return "whose head does not read its class token"
    if any(hasattr(block, "reduction") for block in model.blocks):
        return "with fewer tokens"
    for number, block in enumerate(model.blocks):
        layer = attention_of(block)  # type: ignore[arg-type]
        if layer is None or "weights" not in layer.card.honours:
            card = getattr(layer or block.mixer, "card", None)
            return f"whose block {number} ({'no mixer' if card is None else card.name}) has no attention weights"
    return ""


@torch.no_grad()
def regions(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int]
) -> Float[Tensor, "rows columns"] | None:
    """The share of regions that read each place, in the last layer that leaves regions out; None if no layer does."""
    found = []

    def look(call: Call, q: Tensor, k: Tensor) -> None:
        chosen, cut = read_regions(call, q, k)
        if isinstance(cut, Tiles) and len(cut.sides) == 2 and chosen.shape[-1] < cut.count:
            read = torch.zeros(cut.count, device=chosen.device)
            ones = torch.ones(chosen.numel(), device=chosen.device)
            read = read.index_add(0, chosen.flatten(), ones) / (chosen.numel() / chosen.shape[-1])
            places = read.view(1, cut.count, 1, 1).expand(1, -1, cut.room, 1)
            found.append(cut.join(places).view(cut.sides))

    _run_watched(model, inputs, grid, OWN["regions"], look)
    return found[-1] if found else None


@torch.no_grad()
def agents(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int]
) -> Float[Tensor, "agents rows columns"] | None:
    """What each agent gathers from each place, averaged over heads; None without agents on a grid.

    Taken from the last layer with less than half as many agents as places, or else from the last one.
    """
    found: list[Tensor] = []

    def look(call: Call, share_bias: Tensor | None = None, **tensors: Tensor) -> None:
        if call.grid is None or call.pattern is not Pattern.NONCAUSAL_SELF:
            return
        weights = gathering_weights(call, **tensors)[0].mean(0)
        places = weights if call.roles is None else weights[:, call.roles[0] == Role.TOKEN]
        few = 2 * len(places) < places.shape[1]
        if few or not found or 2 * len(found[-1]) >= found[-1][0].numel():
            found.append(places.unflatten(1, call.grid))

    _run_watched(model, inputs, grid, OWN["agents"], look)
    return found[-1] if found else None


def _run_watched(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int], name: str, look: Callable[..., None]
) -> None:
    """Run the model on one image; `look` gets the call and tensors, except values, of each layer with the mechanism."""
    layers = [m for m in model.modules() if isinstance(m, AttentionLayer) and m.card.name == name]
    if not layers:
        return

    def mix(card: Mechanism, heads: dict[str, Tensor], **options: Any) -> Result:
        def form(call: Call, **tensors: Tensor) -> Any:
            look(call, **{n: x for n, x in tensors.items() if n != "v"})
            return card.forms["parallel"](call, **tensors)

        return apply(dataclasses.replace(card, forms={**card.forms, "parallel": form}), heads, **options)

    for layer in layers:
        layer.mix = mix
    try:
        model(inputs[None], context=Context(grid=grid))
    finally:
        for layer in layers:
            del layer.mix


def explain(
    model: nn.Module, inputs: Float[Tensor, "n f"], grid: tuple[int, int], label: int, method: str | None = None
) -> tuple[str, Float[Tensor, "... rows columns"]]:
    """The name of the method and its map for one image (one map per agent for ``agents``).

    When `method` is None, the first one that suits the model: ``rollout``, ``regions``, ``agents`` or ``occlusion``.
    """
    if method not in (None, *METHODS):
        raise Unsupported(f"method={method!r}", supported=", ".join(METHODS), nearest=closest(str(method), METHODS))
    if method == "rollout" or (method is None and _rolls_out(model)):
        if not isinstance(model, ImageModel) or not isinstance(model.backbone, VisionTransformer):
            raise _without(method, model)
        return "rollout", rollout(model.backbone, model.images(inputs[None], grid))[0]
    for name, look in (("regions", regions), ("agents", agents)):
        if method in (None, name):
            found = look(model, inputs, grid)
            if found is not None:
                return name, found
            if method == name:
                raise _without(method, model)
    return "occlusion", occlusion(model, inputs, grid, label)


def _rolls_out(model: nn.Module) -> bool:
    return (
        isinstance(model, ImageModel)
        and isinstance(model.backbone, VisionTransformer)
        and not _why_not_rolled_out(model.backbone)
    )


def _without(method: str | None, model: nn.Module) -> Unsupported:
    shown = model.segmenter if isinstance(model, ClassShares) else model
    shown = shown.backbone if isinstance(shown, ImageModel) else shown
    return Unsupported(
        f"method={method!r} of {an_instance(shown)}",
        supported="occlusion, of any model; rollout, of vision transformers whose layers return attention weights; regions, of models that "
        "route (BiFormer); agents, of models with agent attention on a grid",
        nearest="occlusion",
    )


def draw(
    picture: Image.Image, weight: Float[Tensor, "... rows columns"], *, side: int = SHOWN, smooth: bool = True
) -> Image.Image:
    """Draw the picture, and next to it the same picture under the map: dark where a place counts little.

    Args:
        picture: the original picture.
        weight: the map; its lowest and highest value get the two end colours. Several maps are laid out row by row,
            each with its own colour scale.
        side: shorter side in pixels, to which the picture is resized; several maps share it, each with at least about a
            third.
        smooth: interpolate between places; otherwise each place has a single shade.
    """
    from PIL import Image

    plain = _resized(picture, side)
    if weight.ndim == 2:
        return _beside(plain, _under(plain, weight, smooth))
    columns = math.ceil(math.sqrt(len(weight)))
    rows = -(-len(weight) // columns)
    small = _resized(picture, max(side // 3, (side + 4) // rows - 4))
    width, height = small.width + 4, small.height + 4
    sheet = Image.new("RGB", (columns * width - 4, rows * height - 4), "white")
    for at, one in enumerate(weight):
        sheet.paste(_under(small, one, smooth), (at % columns * width, at // columns * height))
    return _beside(plain, sheet)


def _under(plain: Image.Image, weight: Float[Tensor, "rows columns"], smooth: bool) -> Image.Image:
    from PIL import Image, ImageOps

    span = (weight.max() - weight.min()).clamp(min=1e-12)
    shades = (255 * (weight - weight.min()) / span).round().to(torch.uint8).cpu().numpy()
    field = Image.fromarray(shades).resize(plain.size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    return Image.blend(plain, ImageOps.colorize(field, black=COLD, white=HOT), 0.6)


def draw_tokens(picture: Image.Image, places: Int[Tensor, "rows columns"], *, side: int = SHOWN) -> Image.Image:
    """Draw the picture, and next to it the same picture as the remaining tokens represent it; see the module docstring.

    Args:
        picture: the original picture.
        places: the index of each patch's token, or -1 if it was dropped.
        side: as in :func:`draw`.
    """
    import numpy as np
    from PIL import Image

    plain = _resized(picture, side)
    pixels = np.asarray(plain).astype(np.float64)
    rows, columns = places.shape
    row, column = (
        np.arange(count) * cells // count for count, cells in zip(pixels.shape[:2], (rows, columns), strict=True)
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


def _resized(picture: Image.Image, side: int) -> Image.Image:
    from PIL import Image

    plain = picture.convert("RGB")
    scale = side / min(plain.size)
    return plain.resize((round(scale * plain.width), round(scale * plain.height)), Image.Resampling.BICUBIC)


def _beside(plain: Image.Image, over: Image.Image) -> Image.Image:
    from PIL import Image

    sheet = Image.new("RGB", (plain.width + 8 + over.width, max(plain.height, over.height)), "white")
    sheet.paste(plain, (0, 0))
    sheet.paste(over, (plain.width + 8, 0))
    return sheet
