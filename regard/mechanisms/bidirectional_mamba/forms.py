"""The fast form of bidirectional_mamba: one selective scan per path, over whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import (
    Call,
)
from regard.core.precision import wide
from regard.core.reordering import opposite, reorder
from regard.engines.selective_scan import selective_scan
from regard.mechanisms.bidirectional_mamba.definition import Config, _combine, check_paths, scan_orders

if TYPE_CHECKING:
    from jaxtyping import Float, Int


ROWS_FIRST = ("forward", "bidirectional", "cross", "slices")
"""Scans whose first path visits the tokens in their original order."""


@dataclass(frozen=True)
class Path:
    """The places that a path visits: valid ones first, in order.

    Attributes:
        places: (L,), or (B, L) where the rows of a batch differ; None for all tokens as they are.
        lengths: number of valid places of each row; None when all are valid.
        opposite: the inverse order, (N,), if the path visits every token once; else None.
    """

    places: Int[Tensor, "..."] | None
    lengths: Int[Tensor, " b"] | None
    opposite: Int[Tensor, " n"] | None = None

    def take(self, x: Float[Tensor, "b n ..."]) -> Float[Tensor, "b visited ..."]:
        """Tokens in the order of the path."""
        if self.places is None:
            return x
        if self.opposite is not None:
            return reorder(x, self.places, self.opposite)
        if self.places.ndim == 1:
            return x.index_select(1, self.places)
        return x.gather(1, self._index(x)) if x.shape[1] else x

    def put(self, y: Float[Tensor, "b visited ..."], n: int) -> Float[Tensor, "b n ..."]:
        """Return to the order of the tokens; 0 for tokens that the path does not visit."""
        if self.places is None:
            return y
        if self.opposite is not None:
            return reorder(y, self.opposite, self.places)
        empty = y.new_zeros(y.shape[0], n, *y.shape[2:])
        if self.places.ndim == 1:
            return empty.index_copy(1, self.places, y)
        return empty.scatter(1, self._index(y), y)

    def _index(self, x: Tensor) -> Tensor:
        assert self.places is not None
        shape = *self.places.shape, *[1] * (x.ndim - 2)
        return self.places.view(shape).expand(-1, -1, *x.shape[2:])


def find_paths(
    config: Config,
    n: int,
    grid: tuple[int, ...] | None,
    lengths: Tensor | None,
    valid: Tensor | None,
    device: torch.device,
) -> list[Path]:
    """The paths through a sequence with `lengths`, or a grid with `valid` places."""
    sides = (n,) if grid is None else grid
    orders = scan_orders(config, sides, device)
    if lengths is not None:
        valid = torch.arange(n, device=device) < lengths[:, None]
    found = []
    for i, order in enumerate(orders):
        forward = i < config.copies and config.scan in ROWS_FIRST
        if valid is None and forward:
            found.append(Path(None, None))
        elif valid is None:
            whole = config.scan != "strided"
            found.append(Path(order, None, opposite(order) if whole else None))
        elif forward and lengths is not None:
            found.append(Path(None, lengths))
        else:
            ordered = valid[:, order]
            first = torch.argsort(~ordered, dim=1, stable=True)
            found.append(Path(order[first], ordered.sum(1)))
    return found


def _of_each(tensor: Tensor | None, axis: int, paths: int) -> tuple[Any, ...]:
    """Each path's part of a tensor. Unbinding, unlike selecting, makes the gradient one stack, not a sum over paths."""
    parts: tuple[Any, ...] = (None,) if tensor is None else tensor.unbind(axis)
    return parts if len(parts) == paths else parts * paths


def parallel(
    call: Call,
    x: Float[Tensor, "b u n e"],
    dt: Float[Tensor, "b w n e"],
    a: Float[Tensor, "s e k"],
    b: Float[Tensor, "b q n g k"],
    c: Float[Tensor, "b q n g k"],
    skip: Float[Tensor, "t e"] | None = None,
    dt_bias: Float[Tensor, "r e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
    mix: Float[Tensor, "b p n"] | None = None,
) -> Float[Tensor, "b n f"]:
    """One scan per path, over the tokens in its order."""
    n = x.shape[2]
    paths = find_paths(call.config, n, call.grid, call.lengths, call.valid, x.device)
    check_paths(call, len(paths), x, dt, a, b, c, skip, dt_bias, mix)
    # wide, or the output of each path would be rounded
    by_token = [_of_each(t, 1, len(paths)) for t in (wide(x), dt, b, call.scale * c)]
    own = [_of_each(t, 0, len(paths)) for t in (a, skip, dt_bias)]
    outputs = []
    for p, path in enumerate(paths):
        order = None if path.opposite is None else path.places  # full orders are scanned in place
        taken = [parts[p] if order is not None else path.take(parts[p]) for parts in by_token]
        rates, skipped, bias = (parts[p] for parts in own)
        y, _ = selective_scan(
            taken[0],
            taken[1],
            rates,
            taken[2],
            taken[3],
            skip=skipped,
            dt_bias=bias,
            lengths=path.lengths,
            order=order,
            chunk_size=call.chunk_size or call.config.chunk_size,
            backend=call.backend,
        )
        assert y is not None  # there is a c
        outputs.append(y if order is not None else path.put(y, n))
    return _combine(call, outputs, z, mix).to(x.dtype)
