"""The definition of universal_rpe: its options and its reference, written to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Call, Unsupported, at_least, one_of
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines.attention import attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import by_pattern
from regard.positions.relative import check_buckets
from regard.positions.toeplitz import at_offsets

if TYPE_CHECKING:
    from jaxtyping import Float, Int


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "none": (lambda x: x, 1.0),
    "relu": (F.relu, 1.0),
    "softplus": (F.softplus, math.log(math.e - 1)),
}
"""Activations for C, each with the input at which it is 1."""


@dataclass(frozen=True)
class Config:
    """Options, all for the layer.

    Attributes:
        factors: C of a layer: ``unique`` (one number per offset), ``bucketed`` (one per bucket of offsets) or ``none``
            (ones).
        start: initial C: ``ones``, or ``normal``: N(0, 0.02), with which a layer's output starts near 0.
        activation: activation of C: ``none``, ``relu`` or ``softplus``.
        share_heads: whether all heads of a layer share the ``unique`` C.
        max_distance: R, >= 1 (``bucketed``: >= num_buckets / 2 + 1, beyond which all offsets share a bucket); or (R_y,
            R_x) on a grid.
        num_buckets: number of buckets for both signs together, even and >= 4.
    """

    factors: str = "unique"
    start: str = "ones"
    activation: str = "none"
    share_heads: bool = False
    max_distance: int | tuple[int, int] = 128
    num_buckets: int = 64

    def __post_init__(self) -> None:
        one_of("factors", self.factors, ("unique", "bucketed", "none"))
        one_of("start", self.start, ("ones", "normal"))
        one_of("activation", self.activation, ACTIVATIONS)
        sides = self.max_distance if isinstance(self.max_distance, tuple) else (self.max_distance,)
        for side in sides:
            at_least("max_distance", side, 1)
        if len(sides) > 1 and (len(sides) != 2 or self.factors == "bucketed"):
            raise Unsupported(
                f"max_distance={self.max_distance} with factors={self.factors!r}",
                supported="a number, or (rows, columns) with factors='unique'",
                nearest=f"max_distance={max(sides)}",
            )
        if self.factors == "bucketed":
            check_buckets(self.num_buckets, sides[0])


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)
    table = only_one(call, factors, grid_factors, pair_factors)
    c = torch.ones_like(q[..., :1])
    if pair_factors is not None:
        c = pair_factors
    elif table is not None:
        c = by_rank(call, table)(where.queries, where.keys)
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1) * c, call.scale, bias)


def only_one(
    call: Call,
    factors: Tensor | None,
    grid_factors: Tensor | None,
    pair_factors: Tensor | None,
    *,
    stateful: bool = False,
) -> Tensor | None:
    """The one input that specifies C: a table by offset, grid place or pair (2, 3 or 4 axes); None for ones."""
    given = [x for x in (factors, grid_factors, pair_factors) if x is not None]
    if len(given) > 1:
        raise Unsupported("universal_rpe with more than one kind of factors", supported="one of them")
    if pair_factors is not None and stateful:
        raise Unsupported("universal_rpe with pair_factors and a state", supported="whole calls", nearest="factors")
    if grid_factors is not None and stateful:
        raise Unsupported(
            "universal_rpe with grid_factors and a state, which does not keep the width of a grid",
            supported="whole calls",
            nearest="factors",
        )
    placed = not call.pattern.cross and call.grid is not None and len(call.grid) == 2
    if grid_factors is not None and not placed:
        raise Unsupported(
            f"universal_rpe with grid_factors in {call.pattern.value} on a grid {call.grid}",
            supported="self patterns with grid=(rows, columns)",
            nearest="factors",
        )
    for x in (factors, grid_factors):
        if x is not None and any(size < 3 or size % 2 == 0 for size in x.shape[1:]):
            raise Unsupported(
                f"universal_rpe with factors of {tuple(x.shape[1:])} offsets", supported="2 R + 1 of them, with R >= 1"
            )
    return given[0] if given else None


def by_rank(call: Call, table: Float[Tensor, "h *offsets"]) -> PositionBias:
    """A table of offsets as a function of ranks; on a grid, of the places that tokens fill in row-major order."""
    if table.ndim == 2:
        return DistanceBias(lambda offsets: at_offsets(table, offsets))
    assert call.grid is not None
    width = call.grid[1]

    def by_place(i: Int[Tensor, "b n"], j: Int[Tensor, "b m"]) -> Float[Tensor, "b h n m"]:
        down = j[:, None] // width - i[:, :, None] // width
        along = j[:, None] % width - i[:, :, None] % width
        rows, columns = ((size - 1) // 2 for size in table.shape[1:])
        return table[:, (down + rows).clamp(0, 2 * rows), (along + columns).clamp(0, 2 * columns)].transpose(0, 1)

    return by_place
