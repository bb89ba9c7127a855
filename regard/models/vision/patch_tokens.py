"""Helpers for vision transformers: token positions, windows, weight initialisation, and tables of released weights.

Patches fill a grid row by row; class tokens come before them and have no position on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import Context, Role
from regard.core.precision import wide
from regard.models.layer_plan import layer_accepts

if TYPE_CHECKING:
    from jaxtyping import Float

TABLES = {
    "an": "gather_bias.block",
    "ah": "gather_bias.rows",
    "aw": "gather_bias.columns",
    "ac": "gather_bias.other",
    "na": "share_bias.block",
    "ha": "share_bias.rows",
    "wa": "share_bias.columns",
    "ca": "share_bias.other",
}
"""Bias names of LeapLabTHU/Agent-Attention -> names in the layer of agent attention."""


def context_of(grid: tuple[int, ...], before: int, x: Float[Tensor, "b n c"]) -> Context:
    """Return the context for a layer that honours roles: the grid, and the roles of `before` leading class tokens."""
    if not before:
        return Context(grid=grid)
    roles = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    roles[:, :before] = int(Role.CLS)
    return Context(grid=grid, roles=roles)


def options_on(entry: tuple[str, Mapping[str, Any]], grid: tuple[int, int], *, bias: bool) -> dict[str, Any]:
    """Return a plan entry's options with defaults for projection biases and the grid of agent attention's biases."""
    name, options = entry
    lines = {"bias_grid": grid} if options.get("agent_bias") in ("lines", "all") else {}
    biased = {"bias": bias} if layer_accepts(get_mechanism(name), "bias") else {}
    return {**lines, **biased, **options}


def resize_positions(
    table: Float[Tensor, "*b p c"], before: int, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic"
) -> Float[Tensor, "*b p2 c"]:
    """Interpolate position tables to another grid, in at least float32; the rows of class tokens are kept. Bicubic
    interpolation averages (`antialias`), as timm's does."""
    if old == new:
        return table
    classes, places = table[..., :before, :], wide(table[..., before:, :])
    images = places.mT.unflatten(-1, old).reshape(-1, places.shape[-1], *old)
    resized = F.interpolate(images, new, mode=mode, align_corners=False, antialias=mode == "bicubic")
    fitted = resized.flatten(2).mT.reshape(*places.shape[:-2], -1, places.shape[-1])
    return torch.cat([classes, fitted.to(table.dtype)], -2)


def agent_table(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Convert the official code's biases ``an_bias`` to ``ca_bias`` to the names and layout used here."""
    prefix, _, table = name.rpartition(".")
    kind = table.removesuffix("_bias")
    if kind not in TABLES or not table.endswith("_bias"):
        return name, value
    if value.ndim > 3 and kind in ("an", "na"):
        found = value
    elif kind[0] == "a":
        found = value[0].flatten(2)
    else:
        found = value[0].flatten(1, -2).mT
    target = TABLES[kind]
    return f"{prefix}.projection.{target}", found.squeeze(-1) if target.endswith("other") else found


def fit_tables(
    found: dict[str, Tensor], own: Mapping[str, Tensor], grids: Mapping[str, tuple[int, tuple[int, int]]], mode: str
) -> dict[str, Tensor]:
    """Resize the tables of released weights to a model of another image size.

    Args:
        found: the released weights, under the names used here.
        own: the model's state dict.
        grids: for each position table, by name: the number of class tokens before the grid, and the grid's sides. A
            table of another size is taken to be that of a square grid, and one of the same size to be that of the same
            grid, since tables do not say their sides.
        mode: interpolation mode of positions. Biases of rows and columns are interpolated linearly, as in the official
            code of agent attention.
    """
    for name, value in found.items():
        if name not in own or value.shape == own[name].shape:
            continue
        if name in grids and value.ndim == 2:
            before, grid = grids[name]
            side = math.isqrt(max(len(value) - before, 0))
            if side and side**2 == len(value) - before:
                found[name] = resize_positions(value, before, (side, side), grid, mode)
        elif name.endswith((".rows", ".columns")) and value.ndim == 3:
            found[name] = F.interpolate(value, own[name].shape[-1], mode="linear")
    for name, value in own.items():
        if name.endswith("_bias.other") and name not in found:
            found[name] = torch.zeros(value.shape)  # for tokens off the grid, which the official model does not have
    return found


def initialise_linear(module: nn.Module) -> None:
    """Initialise a linear layer's weights from a truncated normal distribution, and its biases to 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise_convolution(module: nn.Module) -> None:
    """Initialise a convolution's weights from a normal distribution of variance 2 / fan_out, and its biases to 0."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_windows(x: Float[Tensor, "b h w c"], sides: tuple[int, int]) -> Float[Tensor, "windows n c"]:
    """Split maps into windows of `sides`, which must fill the map; a window's tokens are ordered row by row."""
    (height, width), (rows, columns) = x.shape[1:3], sides
    x = x.unflatten(2, (width // columns, columns)).unflatten(1, (height // rows, rows))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B, windows down, windows across, rows * columns, C) before


def from_windows(
    x: Float[Tensor, "windows n c"], sides: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "b h w c"]:
    """Join windows into maps with rows and columns `grid`; the inverse of :func:`to_windows`."""
    down, across = grid[0] // sides[0], grid[1] // sides[1]
    x = x.unflatten(0, (x.shape[0] // (down * across), down, across)).unflatten(3, sides)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
