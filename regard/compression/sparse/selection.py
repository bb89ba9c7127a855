"""Selected pairs of query and key in a prompt: as a mask, their count, and attention that skips all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import BlockMask
from regard.core.visibility import CountedRanks, Ranks, Visibility
from regard.engines.attention import attention
from regard.engines.attention.native_form import DECODED_LONG
from regard.engines.merging import merge
from regard.engines.paged_cache import attend

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CAUSAL = Visibility(causal=True)
GATHERED = 1 << 22
"""Number of key entries that are gathered at once."""


class Selection(Protocol):
    """Pairs (query, key at or before it) of a prompt of N tokens."""

    def mask(self) -> Bool[Tensor, "b h n n"]:
        """The pairs as a mask, True where the query sees the key."""
        ...

    def pairs(self) -> float:
        """Number of computed pairs, over all rows and heads; more than in the mask if whole blocks are computed."""
        ...

    def attend(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], scale: float
    ) -> Float[Tensor, "b h n e"]:
        """Softmax attention over the selected pairs only."""
        ...


@dataclass(frozen=True)
class Everything:
    """All causal pairs; `heads` counts rows times heads."""

    heads: int
    n: int

    def mask(self) -> Tensor:
        return torch.ones(1, 1, self.n, self.n, dtype=torch.bool).tril()

    def pairs(self) -> float:
        return self.heads * self.n * (self.n + 1) / 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _attention(q, k, v, scale)[0]


@dataclass(frozen=True)
class Window:
    """The last `window` keys of each query and the first `sinks` of the prompt."""

    heads: int
    n: int
    window: int
    sinks: int

    def mask(self) -> Tensor:
        i, j = torch.arange(self.n)[:, None], torch.arange(self.n)
        return ((j <= i) & ((i - j < self.window) | (j < self.sinks)))[None, None]

    def pairs(self) -> float:
        i = torch.arange(self.n, dtype=torch.float64)
        beyond = (i + 1 - self.window).clamp(min=0)
        return self.heads * float((torch.minimum(i + 1, i * 0 + self.window) + beyond.clamp(max=self.sinks)).sum())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        near = Visibility(causal=True, left=self.window - 1)
        far = max(self.n - self.window, 0)
        if not self.sinks or not far:
            return _attention(q, k, v, scale, near)[0]
        output, lse = _attention(q, k, v, scale, near, lse=True)
        # queries beyond the window also see the first keys: key j from query j + window on
        first = k[:, :, : self.sinks], v[:, :, : self.sinks]
        m = first[0].shape[2]
        sunk, sunk_lse = _attention(
            q[:, :, self.window :], *first, scale, lse=True, ranks=CountedRanks(far, m, 0, False, q.device)
        )
        merged = merge([output[:, :, self.window :], sunk], [lse[:, :, self.window :], sunk_lse])
        return torch.cat([output[:, :, : self.window], merged], 2)


@dataclass(frozen=True)
class Blocks:
    """Key blocks for each query block, causal inside.

    Attributes:
        visible: (B, H, blocks, blocks); includes each block's own.
        size: tokens per block.
        n: number of tokens.
    """

    visible: Bool[Tensor, "b h blocks blocks"]
    size: int
    n: int

    def mask(self) -> Tensor:
        pairs = self.visible.repeat_interleave(self.size, -1).repeat_interleave(self.size, -2)
        return pairs[..., : self.n, : self.n].tril()

    def pairs(self) -> float:
        sizes = torch.full((self.visible.shape[-1],), float(self.size), dtype=torch.float64)
        sizes[-1:] = self.n - self.size * (len(sizes) - 1)
        visible = self.visible.sum((0, 1)).to("cpu", torch.float64).tril(-1)
        own = self.visible.shape[0] * self.visible.shape[1] * sizes * (sizes + 1) / 2
        return float((visible * sizes[:, None] * sizes).sum() + own.sum())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows = min(self.size, DECODED_LONG)
        if self.size % rows:
            blocks = BlockMask(self.visible, self.size)
            where = CountedRanks(self.n, self.n, 0, True, q.device)
            return attention(q, k, v, where, visibility=CAUSAL, scale=scale, blocks=blocks)[0]
        return self._by_pages(q, k, v, scale, rows)

    def _by_pages(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int) -> Tensor:
        """Treat key blocks as pages, which a few queries at a time read in place; the query's own block comes last."""
        batch, heads, n, width = q.shape
        groups, size, blocks = k.shape[1], self.size, self.visible.shape[-1]
        whole = blocks * size
        q, k, v = (F.pad(x, (0, 0, 0, whole - n)) for x in (q, k, v))
        pool_k, pool_v = (x.reshape(batch * groups * blocks, 1, size, x.shape[-1]) for x in (k, v))
        seen = self.visible.tril().cpu()
        counts = seen.sum(-1)  # (B, H, blocks)
        order = (
            (~seen).to(torch.uint8).sort(dim=-1, stable=True).indices
        )  # visible blocks first, the own block last of them
        head = torch.arange(batch * heads, device="cpu").view(batch, heads, 1, 1)
        table = order + head // (heads // groups) * blocks
        table = table[..., : int(counts.max()) if counts.numel() else 0]
        each = size // rows
        table = table.repeat_interleave(each, 2).flatten(0, 2)
        lengths = (counts * size).repeat_interleave(each, 2).flatten()
        part = torch.arange(each, device="cpu").repeat(batch * heads * blocks) * rows
        queries = (lengths - size + part)[:, None] + torch.arange(rows, device="cpu")
        output, _ = attend(
            q.reshape(batch * heads * blocks * each, 1, rows, width),
            (pool_k, pool_v, table, lengths),
            queries,
            visibility=CAUSAL,
            scale=scale,
        )
        return output.view(batch, heads, whole, -1)[:, :, :n]


@dataclass(frozen=True)
class Lines:
    """Keys that every query sees (vertical lines), and distances at which every query sees (diagonals, slashes).

    Attributes:
        vertical: (B, H, N) by key.
        slash: (B, H, N) by distance.
        block: 0 for exactly these pairs; else queries are processed in blocks of this size: for each query block, each
            distance becomes a range of that many consecutive keys, ranges are joined as in MInference (a range that
            begins within another or right after it extends that one by a block), and keys between ranges are single
            columns.
    """

    vertical: Bool[Tensor, "b h n"]
    slash: Bool[Tensor, "b h n"]
    block: int = 64

    def mask(self) -> Tensor:
        n = self.vertical.shape[-1]
        if self.block:
            listed = self._listed()
            return listed.repeat_interleave(self.block, -2)[..., :n, :].tril()
        i, j = torch.arange(n)[:, None], torch.arange(n)
        by_distance = self.slash[..., (i - j).clamp(min=0)]
        return (self.vertical[..., None, :] | by_distance).tril()

    def pairs(self) -> float:
        if not self.block:
            return float(self.mask().sum())
        starts, n, size = self._starts(), self.vertical.shape[-1], self.block
        before = F.pad(self.vertical.cumsum(-1), (1, 0))  # keys that every query sees, before each position
        ends = ((torch.arange(starts.shape[2], device=starts.device) + 1) * size).clamp(max=n)
        there = starts >= 0
        first, last = (
            before[:, :, None].expand(*starts.shape[:3], n + 1).gather(-1, torch.minimum(at, ends[:, None]))
            for at in (starts.clamp(min=0), starts.clamp(min=0) + size)
        )
        columns = before[..., ends].sum() - (last - first).masked_fill(~there, 0).sum()
        return float(there.sum()) * size**2 + float(columns) * size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.block:
            return attend_listed(q, k, v, self._listed(), self.block, scale)
        n = q.shape[2]
        where = CountedRanks(n, n, 0, True, q.device)
        return attention(
            q,
            k,
            v,
            where,
            visibility=CAUSAL,
            scale=scale,
            bias=torch.zeros_like(self.mask(), dtype=q.dtype).masked_fill_(~self.mask(), -torch.inf),
        )[0]

    def _starts(self) -> Int[Tensor, "b h rows blocks"]:
        """First keys of the key blocks that each query block reads, -1 where it has fewer: one for each distance,
        from far to near, unless earlier blocks cover its keys. The blocks are disjoint."""
        batch, heads, n = self.slash.shape
        size, device = self.block, self.slash.device
        rows = -(-n // size)
        distances = torch.where(self.slash, torch.arange(n, device=device), -1)
        # largest selected distance below x, for x = 0 ... n
        below = F.pad(distances.cummax(-1).values, (1, 0), value=-1)
        end = ((torch.arange(rows, device=device) + 1) * size).expand(batch, heads, rows)
        reached = torch.zeros_like(end)
        found: list[Tensor] = []
        while True:
            far = below.gather(-1, (end - reached).clamp(0, n))
            there = (far >= 0) & (reached < end)
            if not bool(there.any()):
                break
            wanted = (end - far).clamp(min=size)
            begun = torch.where(wanted > reached + size, wanted - size, reached) if found else wanted - size
            found.append(torch.where(there, begun, -1))
            reached = torch.where(there, begun + size, end)
        return torch.stack(found, -1) if found else end.new_full((*end.shape, 0), -1)

    def _covered(self, starts: Tensor) -> Bool[Tensor, "b h rows n"]:
        n, size = self.slash.shape[-1], self.block
        steps = torch.zeros(*starts.shape[:3], n + size + 1, dtype=torch.int16, device=starts.device)
        there = (starts >= 0).to(torch.int16)
        at = starts.clamp(min=0)
        steps.scatter_add_(-1, at.clamp(max=n), there)
        steps.scatter_add_(-1, (at + size).clamp(max=n + size), -there)
        return steps.cumsum(-1, dtype=torch.int16)[..., :n] > 0

    def _listed(self) -> Bool[Tensor, "b h rows n"]:
        """The keys that each query block reads, including later ones than the queries."""
        return self._covered(self._starts()) | self.vertical[:, :, None]


def attend_listed(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n e"],
    listed: Bool[Tensor, "b h rows n"],
    size: int,
    scale: float,
) -> Float[Tensor, "b h n e"]:
    """Causal attention from blocks of `size` queries to lists of keys, which are gathered: as many query blocks at a
    time as fit into :data:`GATHERED`, grouped by similar list length."""
    batch, heads, n, width = q.shape
    rows = listed.shape[2]
    q = F.pad(q, (0, 0, 0, rows * size - n)).reshape(batch * heads * rows, 1, size, width)
    device = q.device
    first = torch.arange(rows, device=device) * size
    keys = torch.arange(n, device=device)
    lists = (listed & (keys < (first + size)[:, None])).flatten(0, 2)
    counts = lists.sum(-1)
    line, key = lists.nonzero().unbind(1)
    rank = torch.arange(len(line), device=device) - (counts.cumsum(0) - counts)[line]
    most = int(counts.max()) if len(counts) else 0
    table = torch.full((len(counts), most), -1, dtype=torch.int64, device=device)
    table[line, rank] = key
    output = v.new_zeros(len(counts), 1, size, v.shape[-1])
    order = counts.argsort(descending=True)
    group = heads // k.shape[1]
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    start = 0
    while start < len(order):
        longest = max(int(counts[order[start]]), 1)
        chosen = order[start : start + max(1, GATHERED // (longest * width))]
        here = table[chosen, :longest]
        owner = (chosen // rows // group)[:, None]
        ranks = Ranks((first[chosen % rows][:, None] + torch.arange(size, device=device)), here, None, None, False)
        at = owner, here.clamp(min=0)
        found, _, _ = attention(
            q[chosen], flat_k[at][:, None], flat_v[at][:, None], ranks, visibility=CAUSAL, scale=scale
        )
        output[chosen] = found
        start += len(chosen)
    return output.view(batch, heads, rows * size, -1)[:, :, :n]


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visibility: Visibility = CAUSAL,
    *,
    lse: bool = False,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    where = CountedRanks(q.shape[2], k.shape[2], 0, True, q.device) if ranks is None else ranks
    output, _, found = attention(q, k, v, where, visibility=visibility, scale=scale, want_lse=lse)
    return output, output[..., 0] if found is None else found
