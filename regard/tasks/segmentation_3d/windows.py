"""Compute the output for a whole volume from the outputs for windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.patches import cut
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Float

AT_ONCE = 4
"""Number of windows per call of the model."""
NARROW = 8
"""Side of a window, in standard deviations of the Gaussian by which voxels near the border have less weight."""


def starts(side: int, window: int, overlap: float) -> list[int]:
    """Evenly spread starts of windows that cover an axis from end to end and overlap by at least the given share."""
    step = max(1, math.floor(window * (1 - overlap)))
    count = 1 + math.ceil((side - window) / step)
    return [round(i * (side - window) / max(1, count - 1)) for i in range(count)]


def in_windows(
    run: Callable[[Float[Tensor, "w n f"]], Float[Tensor, "w n pk"]],
    inputs: Float[Tensor, "b m f"],
    grid: Sequence[int],
    window: Sequence[int],
    patch: int,
    overlap: float,
) -> Float[Tensor, "b m pk"]:
    """The output for a whole grid of tokens; where windows overlap, an average with Gaussian weights for each window.

    As in nnU-Net (Isensee et al., arXiv 1904.08128), the standard deviation is an eighth of the window's side.

    Args:
        run: returns the output for windows, which are tokens of a grid of size `window`.
        inputs: tokens of the whole grid.
        patch: side of a token in voxels.
        overlap: smallest share of a window that the next one overlaps.
    """
    if tuple(grid) == tuple(window):
        return run(inputs)
    places = inputs.unflatten(1, tuple(grid))
    corners = list(itertools.product(*(starts(*sides, overlap) for sides in zip(grid, window, strict=True))))
    where = [tuple(slice(a, a + side) for a, side in zip(corner, window, strict=True)) for corner in corners]
    total = weights = sum_of_weights = torch.empty(0)
    for begin in range(0, len(where), AT_ONCE):
        chosen = where[begin : begin + AT_ONCE]
        outputs = wide(run(torch.cat([places[:, x, y, z].flatten(1, 3) for x, y, z in chosen])))
        if begin == 0:
            total = outputs.new_zeros(len(inputs), *grid, outputs.shape[-1])
            weights = _weights(window, patch, outputs)
            sum_of_weights = torch.zeros_like(total[0])
        for (x, y, z), output in zip(chosen, outputs.split(len(inputs)), strict=True):
            total[:, x, y, z] += weights * output.unflatten(1, tuple(window))
            sum_of_weights[x, y, z] += weights
    return (total / sum_of_weights).flatten(1, 3)


def _weights(window: Sequence[int], patch: int, outputs: Float[Tensor, "w n pk"]) -> Float[Tensor, "x y z pk"]:
    """Gaussian weights of a window's voxels, arranged like its output: token by token, equal for all classes."""
    whole = outputs.new_ones(())
    for side in window:
        voxels = side * patch
        place = (torch.arange(voxels, dtype=outputs.dtype, device=outputs.device) + 0.5) / voxels - 0.5
        whole = whole[..., None] * torch.exp(-0.5 * (NARROW * place).square())
    tokens = cut(whole[None, None], patch)[0].unflatten(0, tuple(window))
    return tokens.repeat_interleave(outputs.shape[-1] // patch**3, -1)
