"""Methods that prefill a prompt sparsely: they choose the keys that each query sees. The cache keeps every token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.compression.sparse.method import Method, Place
from regard.compression.sparse.scores import diagonal_sums, last_weights, top
from regard.compression.sparse.selection import Blocks, Lines, Selection, Window
from regard.contract import Unsupported, at_least, one_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GRANULARITIES = ("block", "token")
SLACK = 0.03
"""Share of a budget that may stay unused before the search for a better count stops."""


@dataclass(frozen=True)
class LocalSinks(Method):
    """Attend to the last keys and the first ones.

    Attributes:
        window: number of keys up to and including the query's own that it sees.
        sinks: first keys of the prompt that it sees too.
    """

    phases: ClassVar = ("prefill",)
    summary: ClassVar = "Each query sees a window before it and the first keys."
    window: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)

    def select(self, q: Tensor, k: Tensor, place: Place) -> Selection:
        return Window(q.shape[0] * q.shape[1], q.shape[2], self.window, self.sinks)


@dataclass(frozen=True)
class BlockSparse(Method):
    """Attend to the key blocks whose mean best matches the mean of the query block.

    The first block, the query's own block and the one before it are always included.

    Attributes:
        size: tokens per block.
        blocks: key blocks for each query block.
    """

    phases: ClassVar = ("prefill",)
    summary: ClassVar = "Each block of queries sees the blocks of keys whose mean suits its own best."
    size: int = 16
    blocks: int = 64

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)
        at_least("blocks", self.blocks, 3)

    def select(self, q: Tensor, k: Tensor, place: Place) -> Selection:
        n = q.shape[2]
        count = -(-n // self.size)
        means_q, means_k = (self._means(x, count) for x in (q, k))
        scores = means_q @ means_k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        i, j = torch.arange(count, device=q.device)[:, None], torch.arange(count, device=q.device)
        forced = (j == 0) | (j == i) | (j == i - 1)
        scores = scores.masked_fill(forced, torch.inf).masked_fill(j > i, -torch.inf)
        place.meter.index["prefill"] += 2.0 * scores.numel() / 2 * q.shape[-1]
        return Blocks(top(scores, self.blocks) & (j <= i), self.size, n)

    def _means(self, x: Tensor, count: int) -> Float[Tensor, "b h blocks d"]:
        """The mean of each block; the last block is padded with zeros, which count."""
        wide = torch.promote_types(x.dtype, torch.float32)
        padded = F.pad(x.to(wide), (0, 0, 0, count * self.size - x.shape[2]))
        return padded.unflatten(2, (count, self.size)).mean(3)


@dataclass(frozen=True)
class VerticalSlash(Method):
    """Attend to the keys and distances with most attention from the last queries, the same for all queries of a head.

    Attributes:
        vertical: keys per head.
        slash: distances per head.
        window: number of last queries that decide.
        columns: first keys that are always kept.
        diagonals: shortest distances that are always kept.
        granularity: ``block`` computes whole blocks along the diagonals, which is faster; ``token`` only the exact
            pairs, by a mask, which saves nothing.
        size: tokens per block.
        ratio: if above 0, as many keys as distances, up to `vertical` and `slash`, as make one pair in `ratio` be computed.
    """

    phases: ClassVar = ("prefill",)
    summary: ClassVar = "All queries see the keys and the distances at which the last queries look most."
    vertical: int = 512
    slash: int = 512
    window: int = 256
    columns: int = 4
    diagonals: int = 64
    granularity: str = "block"
    size: int = 64
    ratio: float = 0.0

    def __post_init__(self) -> None:
        check_lines(self)
        at_least("ratio", self.ratio, 0)
        for name, forced in (("vertical", self.columns), ("slash", self.diagonals)):
            if getattr(self, name) < forced:
                raise Unsupported(
                    f"{name}={getattr(self, name)}, of which {forced} are always kept",
                    supported=f"{name} >= {forced}",
                    nearest=f"{name}={forced}",
                )

    def select(self, q: Tensor, k: Tensor, place: Place) -> Selection:
        weights = asked(q, k, self.window, place)
        vertical, slash = forced(weights.sum(-2), self.columns), forced(diagonal_sums(weights), self.diagonals)
        ranks = ranked(vertical), ranked(slash)
        if not self.ratio:
            return self._lines(*ranks, max(self.vertical, self.slash))
        n = q.shape[2]
        wanted = q.shape[0] * q.shape[1] * n * (n + 1) / 2 / self.ratio
        low, high = 0, min(n, max(self.vertical, self.slash))
        found = self._lines(*ranks, low)
        while low < high and found.pairs() < (1 - SLACK) * wanted:
            middle = (low + high + 1) // 2
            more = self._lines(*ranks, middle)
            if more.pairs() <= wanted:
                low, found = middle, more
            else:
                high = middle - 1
        return found

    def _lines(self, vertical: Tensor, slash: Tensor, count: int) -> Lines:
        """The lines with the first `count` ranks, and the always-kept lines."""
        return Lines(
            vertical < max(min(count, self.vertical), self.columns),
            slash < max(min(count, self.slash), self.diagonals),
            self.size if self.granularity == "block" else 0,
        )


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Vertical-slash with counts that depend on the head: as many keys, and distances, as hold a share of the weight.

    This is only the vertical-slash branch of FlexPrefill; the counts follow the benchmark's code.

    Attributes:
        alpha: the share of the weight.
        least: the least number of keys, and of distances.
        window, columns, diagonals, granularity, size: as in :class:`VerticalSlash`; always-kept lines may replace the
            weakest others, but the counts stay the same.
    """

    phases: ClassVar = ("prefill",)
    summary: ClassVar = "As vertical_slash, with as many keys and distances as hold a share of each head's weight."
    alpha: float = 0.65
    least: int = 512
    window: int = 512
    columns: int = 4
    diagonals: int = 64
    granularity: str = "block"
    size: int = 64

    def __post_init__(self) -> None:
        check_lines(self)
        at_least("least", self.least, 1)
        if not self.alpha >= 0:
            raise Unsupported(f"alpha={self.alpha}", supported="alpha >= 0", nearest="alpha=0.65")

    def select(self, q: Tensor, k: Tensor, place: Place) -> Selection:
        weights = asked(q, k, self.window, place)
        a = max(weights.shape[-2], 1)
        vertical, slash = weights.mean(-2), diagonal_sums(weights) / a
        return Lines(
            self._cover(vertical, self.columns),
            self._cover(slash, self.diagonals),
            self.size if self.granularity == "block" else 0,
        )

    def _cover(self, shares: Float[Tensor, "b h n"], always: int) -> Tensor:
        """Mask of the largest shares of each head that together reach `alpha`."""
        n = shares.shape[-1]
        reached = shares.sort(-1, descending=True).values.cumsum(-1)
        counts = ((reached <= self.alpha).sum(-1, keepdim=True) + 1).clamp(min=self.least).clamp(max=n)
        return ranked(forced(shares, always)) < counts


def ranked(shares: Float[Tensor, "b h n"]) -> Int[Tensor, "b h n"]:
    """The rank of each share in descending order, counted from 0; ties in order of position."""
    order = shares.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def check_lines(method: VerticalSlash | FlexPrefill) -> None:
    """Raise Unsupported for invalid values of the options that vertical-slash methods share."""
    for name, least in (("window", 1), ("columns", 0), ("diagonals", 1), ("size", 1)):
        at_least(name, getattr(method, name), least)
    one_of("granularity", method.granularity, GRANULARITIES)


def asked(q: Tensor, k: Tensor, window: int, place: Place) -> Float[Tensor, "b h a n"]:
    """Attention weights of the last queries, counted in the meter."""
    weights = last_weights(q, k, window, place.scale)
    place.meter.index["prefill"] += 2.0 * weights.numel() * q.shape[-1]
    return weights


def forced(shares: Float[Tensor, "b h n"], first: int) -> Float[Tensor, "b h n"]:
    """Rank the first entries before all others."""
    there = torch.arange(shares.shape[-1], device=shares.device) < first
    return shares.masked_fill(there, math.inf)
