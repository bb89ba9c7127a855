"""The protocol of position schemes: modules that act at one of three places in a model.

========== ======================================================= =====================================================
place      call                                                    result
========== ======================================================= =====================================================
``embed``  ``embed(x (B, N, C), positions (B, N))``                the input embedding with positions in it, (B, N, C)
``rotate`` ``rotate(q_or_k (B, H, N, D), positions (B, N))``       queries or keys with positions in them, (B, H, N, D)
``bias``   ``bias(query_positions (B, N), key_positions (B, M),    numbers added to the scores, (B, H, N, M)
           causal)``
========== ======================================================= =====================================================

The method of a place where a scheme does nothing is None:
``if positions.rotate is not None: q = positions.rotate(q, where)``.

Positions are integers given by the caller: the rank of a token among the valid tokens of its sequence, counted from the
start of the sequence, also during decoding. Nothing is inferred from N. The batch axis of positions may be 1 if all
rows share them; a bias then also has batch size 1. Padding tokens need a position too; any position that the scheme has
will do (0 always works).

Schemes of several axes act by the row and column of a token on a grid (or by three such coordinates). They locate ranks
on the grid of the call, row by row, or take coordinates (B, N, axes) given instead of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Int


class Positions(nn.Module):
    """Base class of position schemes; see the module's table for the three places.

    Attributes:
        name: the name for :func:`regard.positions.create_positions`.
        by_distance: for schemes whose bias depends only on key position minus query position:
            ``by_distance(distances (...), causal)`` returns biases (H, ...).
        rotate_keys: for schemes that treat keys differently from queries; called like ``rotate``.
        turns: for schemes that rotate planes of features i and i + R / 2 of a head: ``turns(count)`` returns the
            cosines, then the sines, of the planes at the first positions, (count, R) in float32 on the CPU.
        prepare: for schemes that first compute position vectors, once for all layers:
            ``prepare(positions (B, N), grid, generator, movable=, before=)`` returns the vectors (B or 1, N, width),
            or the coordinates (B or 1, N, axes), that ``embed`` and ``rotate`` receive instead of positions, and auxiliary
            losses. Vectors given as `before` (T, width) stand in for those of T more tokens, at the front.
        shared: whether the model computes these vectors for its layers.
        axes: number of axes of a position; with more than one, positions are places on the grid of the call.
    """

    name: ClassVar[str]
    embed: ClassVar[Callable[..., Tensor] | None] = None
    rotate: ClassVar[Callable[..., Tensor] | None] = None
    bias: ClassVar[Callable[..., Tensor] | None] = None
    by_distance: ClassVar[Callable[..., Tensor] | None] = None
    rotate_keys: ClassVar[Callable[..., Tensor] | None] = None
    turns: ClassVar[Callable[..., Tensor] | None] = None
    shared: bool = False
    axes: int = 1
    prepare: ClassVar[Callable[..., tuple[Tensor, dict[str, Any]]] | None] = None


def check_positions(positions: Int[Tensor, "#b n"], batch: int, n: int) -> None:
    """Raise Unsupported unless `positions` is an integer tensor (batch, n) or (1, n)."""
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise Unsupported(f"positions of dtype {positions.dtype}", supported="integers", nearest="positions.long()")
    if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != n:
        raise Unsupported(
            f"positions of shape {tuple(positions.shape)} for {batch} rows of {n} tokens",
            supported=f"({batch}, {n}) or (1, {n})",
        )


def check_pair(query_positions: Int[Tensor, "#b n"], key_positions: Int[Tensor, "#b m"]) -> None:
    """Raise Unsupported unless both are integer tensors (B, tokens) whose B agree or are 1."""
    batch = max(query_positions.shape[0], key_positions.shape[0])
    check_positions(query_positions, batch, query_positions.shape[-1])
    check_positions(key_positions, batch, key_positions.shape[-1])


def locate(name: str, positions: Int[Tensor, "#b n"], grid: tuple[int, ...] | None, axes: int) -> Tensor:
    """Return the coordinates (B or 1, N, axes) of positions on a grid numbered row by row.

    Args:
        name: the scheme that asks, for the refusal.

    Raises:
        Unsupported: without a grid of so many axes.
    """
    if grid is None or len(grid) != axes:
        raise Unsupported(
            f"{name} positions of {axes} axes on " + ("a sequence" if grid is None else f"a grid {grid}"),
            supported=f"a grid of {axes} axes",
            nearest=f"axes={1 if grid is None else len(grid)}",
        )
    found = []
    for side in reversed(grid[1:]):
        found.append(positions % side)
        positions = positions // side
    return torch.stack([positions, *reversed(found)], -1)
