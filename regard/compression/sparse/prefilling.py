"""Methods that read a prompt sparsely: which keys each query of it sees. The cache keeps every token."""

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
"""Share of a budget that may be left over, for which no better count is looked for."""


@dataclass(frozen=True)
class LocalSinks(Method):
    """The last keys and the first ones.

    Attributes:
        window: keys up to the query's own that it sees.
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
    """The blocks of keys whose mean suits the mean of a block of queries best.

    Always among them: the first block, the own one and the one before it.

    Attributes:
        size: tokens a block.
        blocks: blocks of keys for each block of queries.
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
        """The mean of each block; the last is filled up with zeros, which are counted."""
        wide = torch.promote_types(x.dtype, torch.float32)
        padded = F.pad(x.to(wide), (0, 0, 0, count * self.size - x.shape[2]))
        return padded.unflatten(2, (count, self.size)).mean(3)


@dataclass(frozen=True)
class VerticalSlash(Method):
    """The keys and the distances at which the last queries of the prompt look most, the same for all queries of a head.

    Attributes:
        vertical: keys a head.
        slash: distances a head.
        window: last queries that are asked.
        columns: first keys that are always kept.
        diagonals: shortest distances that are always kept.
        granularity: ``block`` computes whole blocks along the diagonals, which takes less time; ``token`` the pairs alone, by
            a mask, which saves nothing.
        size: tokens a block.
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
        """The first so many by rank, and what is always kept."""
        return Lines(
            vertical < max(min(count, self.vertical), self.columns),
            slash < max(min(count, self.slash), self.diagonals),
            self.size if self.granularity == "block" else 0,
        )


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Vertical-slash whose counts follow each head: as many keys, and distances, as hold a share of the weight.

    Only the vertical-slash branch of FlexPrefill; the counts are those of the benchmark's code.

    Attributes:
        alpha: the share.
        least: keys, and distances, at the least.
        window, columns, diagonals, granularity, size: as in :class:`VerticalSlash`; what is always kept may push out the
            weakest of the others, but the counts hold.
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
        """The largest shares of each head that reach `alpha` together."""
        n = shares.shape[-1]
        reached = shares.sort(-1, descending=True).values.cumsum(-1)
        counts = ((reached <= self.alpha).sum(-1, keepdim=True) + 1).clamp(min=self.least).clamp(max=n)
        return ranked(forced(shares, always)) < counts


def ranked(shares: Float[Tensor, "b h n"]) -> Int[Tensor, "b h n"]:
    """How many are larger than each, the first of equals first."""
    order = shares.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def check_lines(method: VerticalSlash | FlexPrefill) -> None:
    """Raise Unsupported for options that vertical-slash methods share and that do not fit."""
    for name, least in (("window", 1), ("columns", 0), ("diagonals", 1), ("size", 1)):
        at_least(name, getattr(method, name), least)
    one_of("granularity", method.granularity, GRANULARITIES)


def asked(q: Tensor, k: Tensor, window: int, place: Place) -> Float[Tensor, "b h a n"]:
    """Weights of the last queries, counted."""
    weights = last_weights(q, k, window, place.scale)
    place.meter.index["prefill"] += 2.0 * weights.numel() * q.shape[-1]
    return weights


def forced(shares: Float[Tensor, "b h n"], first: int) -> Float[Tensor, "b h n"]:
    """With the first entries before all others."""
    there = torch.arange(shares.shape[-1], device=shares.device) < first
    return shares.masked_fill(there, math.inf)
