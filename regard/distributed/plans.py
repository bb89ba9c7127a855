"""Closed-form costs of each scheme: what it sends, computes and keeps. Nothing is measured.

With L tokens on P ranks, B rows, H query heads and G key/value heads, widths d of keys and e of values, elements of w
bytes and sums of s (at least 4), and x = B L / P, each rank sends on average

| scheme | forward | backward |
|---|---|---|
| ring | (P-1) x G (d+e) w | (P-1) x G (d+e) (w+s) |
| head | (P-1)/P x (H d + G (d+e) + H e) w | (P-1)/P x (H (d+e) w + G (d+e) s) |
| grid | (Pk-1) x H ((d+e) w + s) + (Pq-1) x G (d+e) w | (Pk-1) x H (2 e w + s + d s) + (Pq-1) x G (d+e) s |
| gather | (P-1) x G (d+e) w | (P-1) x G (d+e) s |

This is exact where P (2 P with zig-zag) divides L. With G d = G e = H d = D the forward columns are the 2 (P-1)/P L D
of the ring and the 4 (P-1)/P^2 L D of the heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from regard.contract import Unsupported, one_of
from regard.core.precision import wide_dtype
from regard.distributed.layouts import Layout, blocks, count

if TYPE_CHECKING:
    from regard.distributed.layouts import Span

    Spans = list[Span]

SCHEMES = ("ring", "head", "grid", "gather")

LEAST_ROUND = 1 << 22
"""The least bytes of a rank's keys and values that are worth a round of a ring."""


@dataclass(frozen=True)
class Plan:
    """One scheme's costs, forward and backward.

    Attributes:
        scheme: its name; a grid's sizes are in `grid`.
        grid: Pq and Pk.
        forward_bytes, backward_bytes: bytes sent by all ranks together.
        forward_steps, backward_steps: number of exchanges, one after the other.
        scores: query-key pairs of the busiest rank, in all rows and heads, forward.
        balance: `scores` divided by the mean over ranks; 1 if all ranks have the same work.
        saved_bytes: bytes kept for the backward pass by the rank that keeps most: queries, keys, values, outputs and
            sums.
    """

    scheme: str
    grid: tuple[int, int] | None
    forward_bytes: int
    backward_bytes: int
    forward_steps: int
    backward_steps: int
    scores: int
    balance: float
    saved_bytes: int


def plan(
    length: int,
    ranks: int,
    heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    causal: bool = True,
    zigzag: bool | None = None,
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] | None = None,
    schemes: Iterable[str] = SCHEMES,
) -> list[Plan]:
    """Costs of the schemes, those that send least first; the head scheme is left out where the heads do not divide.

    Args:
        length: tokens of the sequence.
        grid: Pq and Pk; the sizes that send least if None.
        zigzag: as in :class:`regard.distributed.DistributedAttention`.

    Raises:
        Unsupported: for invalid sizes and unknown schemes.
    """
    layout = Layout(length, ranks, causal if zigzag is None else zigzag)
    sizes = _Sizes(batch, heads, kv_heads or heads, head_dim, value_dim or head_dim, dtype)
    found = []
    for scheme in schemes:
        one_of("scheme", scheme, SCHEMES)
        if scheme == "head" and sizes.kv_heads % ranks:
            continue
        shape = grid_shape(scheme, ranks, sizes, grid)
        found.append(_plan(scheme, layout, sizes, causal, shape))
    return sorted(found, key=lambda p: p.forward_bytes + p.backward_bytes)


@dataclass(frozen=True)
class _Sizes:
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "dim", "value_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise Unsupported(f"{name}={getattr(self, name)!r}", supported="positive integers")
        if self.heads % self.kv_heads:
            raise Unsupported(f"{self.heads} heads that share {self.kv_heads}", supported="a divisor of the heads")

    @property
    def q(self) -> int:
        return self.batch * self.heads * self.dim

    @property
    def o(self) -> int:
        return self.batch * self.heads * self.value_dim

    @property
    def kv(self) -> int:
        return self.batch * self.kv_heads * (self.dim + self.value_dim)

    @property
    def lse(self) -> int:
        return self.batch * self.heads


def grid_shape(scheme: str, ranks: int, sizes: _Sizes | None, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """Pq and Pk of a scheme: the given ones, or those that send least (for equal widths if `sizes` is None).

    Raises:
        Unsupported: for a grid that does not fit the number of ranks.
    """
    if scheme == "gather":
        return ranks, 1
    if scheme != "grid":
        return None
    if grid is not None:
        if len(grid) != 2 or grid[0] * grid[1] != ranks or min(grid) < 1:
            raise Unsupported(f"grid={grid} for {ranks} ranks", supported="(Pq, Pk) with Pq Pk ranks")
        return grid
    q, o, kv, lse = (1, 1, 2, 0) if sizes is None else (sizes.q, sizes.o, sizes.kv, sizes.lse)
    shapes = [(ranks // columns, columns) for columns in range(1, ranks + 1) if ranks % columns == 0]
    return min(shapes, key=lambda s: (s[1] - 1) * (q + o + lse) + (s[0] - 1) * kv)


def _plan(scheme: str, layout: Layout, sizes: _Sizes, causal: bool, grid: tuple[int, int] | None) -> Plan:
    ranks, length = layout.ranks, layout.length
    w, s = sizes.dtype.itemsize, wide_dtype(sizes.dtype).itemsize
    q, o, kv, lse = sizes.q, sizes.o, sizes.kv, sizes.lse
    hops = ranks - 1
    most = max(layout.size(r) for r in range(ranks))
    if scheme == "ring":
        forward, backward = hops * kv * w, hops * kv * (w + s)
        rounds = len(rounds_of(layout, sizes.kv_heads, kv * w // sizes.kv_heads))
        steps = rounds * hops, 2 * rounds * hops
        saved = most * ((q + o + kv) * w + lse * s)
    elif scheme == "head":  # each rank sends all but one of P parts of its tensors
        forward, backward = hops * (q + kv + o) * w // ranks, hops * (q * w + o * w + kv * s) // ranks
        steps = (2, 2) if hops else (0, 0)
        saved = length * ((q + o + kv) * w + lse * s) // ranks
    else:
        assert grid is not None
        along_row, along_column = grid[1] - 1, grid[0] - 1
        forward = along_row * ((q + o) * w + lse * s) + along_column * kv * w
        backward = along_row * (2 * o * w + lse * s + q * s) + along_column * kv * s
        steps = bool(hops) + bool(along_row), 2 * bool(along_row) + bool(along_column)
        rows, columns = _lines(layout, grid)
        saved = max(map(count, rows)) * q * w + max(map(count, columns)) * kv * w + most * (o * w + lse * s)
    work = _scores(scheme, layout, causal, grid, sizes.batch * sizes.heads)
    mean = sum(work) / ranks
    return Plan(
        scheme,
        grid if scheme == "grid" else None,
        length * forward,
        length * backward,
        *steps,
        scores=max(work),
        balance=max(work) / mean if mean else 1.0,
        saved_bytes=saved,
    )


def rounds_of(layout: Layout, kv_heads: int, token_bytes: int) -> list[tuple[int, int]]:
    """The first and the past-the-last key/value head of each round of a ring, given the bytes of a head's token."""
    each = token_bytes * max(map(layout.size, range(layout.ranks)))
    together = -(-LEAST_ROUND // max(each, 1))
    return [(i, min(i + together, kv_heads)) for i in range(0, kv_heads, together)]


def _lines(layout: Layout, grid: tuple[int, int]) -> tuple[list[Spans], list[Spans]]:
    """The spans of tokens of each row and of each column."""
    of = [layout.spans(r) for r in range(layout.ranks)]
    rows = [[span for spans in of[a * grid[1] : (a + 1) * grid[1]] for span in spans] for a in range(grid[0])]
    return rows, [[span for spans in of[b :: grid[1]] for span in spans] for b in range(grid[1])]


def _scores(scheme: str, layout: Layout, causal: bool, grid: tuple[int, int] | None, heads: int) -> list[int]:
    """Query-key pairs of each rank, over `heads` heads."""
    everything = [(0, layout.length)]
    if scheme == "head":
        pairs = sum(block.pairs for block in blocks(everything, everything, causal))
        return [heads * pairs // layout.ranks] * layout.ranks
    rows, columns = _lines(layout, (layout.ranks, 1) if grid is None else grid)
    return [heads * sum(block.pairs for block in blocks(row, column, causal)) for row in rows for column in columns]
