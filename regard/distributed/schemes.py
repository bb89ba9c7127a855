"""Exact softmax attention with queries, keys and values split over ranks: the schedules, forward and backward.

All schemes compute the same:

- ring: keys and values are passed around head by head, and each rank adds what its queries see of them; their gradients
  follow them around;
- heads: each rank gets all tokens of some of the heads, and returns the outputs;
- grid: ranks form a Pq x Pk grid; rank (a, b) attends from the queries of row a to the keys of column b, and the
  partial outputs of a row are merged by their log-sum-exps. Pk = 1 gathers all keys and values everywhere.

Outputs are accumulated in at least float32 and sent in the dtype of the queries; gradients of keys and values are
accumulated and sent in at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regard.core.precision import wide_dtype
from regard.core.visibility import CountedRanks, Visibility
from regard.distributed.communicators import Exchange, Program, Traffic, swap
from regard.distributed.layouts import Layout, Span, blocks
from regard.distributed.plans import rounds_of
from regard.engines.attention import attention, part_gradients
from regard.engines.merging import merge

Saved = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rank:
    """One of the ranks in a call.

    Attributes:
        index: its number.
        layout: layout of the sequence over all ranks.
        traffic: counter for its work.
    """

    index: int
    layout: Layout
    causal: bool
    scale: float
    traffic: Traffic
    backend: str | None = None

    @property
    def others(self) -> list[int]:
        """All other ranks."""
        return [rank for rank in range(self.layout.ranks) if rank != self.index]

    def attend(
        self, q: Tensor, queries: Sequence[Span], k: Tensor, v: Tensor, keys: Sequence[Span], onto: Partial
    ) -> None:
        """Add the attention of the queries to the keys to the partial outputs."""
        for block in blocks(queries, keys, self.causal):
            rows, columns = slice(*block.queries), slice(*block.keys)
            q_, k_, v_ = q[:, :, rows], k[:, :, columns], v[:, :, columns]
            where = CountedRanks(q_.shape[2], k_.shape[2], 0, True, q.device)
            rule = Visibility(causal=block.diagonal)
            out, _, lse = attention(
                q_, k_, v_, where, visibility=rule, scale=self.scale, want_lse=True, backend=self.backend
            )
            assert lse is not None  # it was requested
            onto.add(rows, out, lse)
            self.traffic.scores += q.shape[0] * q.shape[1] * block.pairs

    def gradients(
        self,
        of: Attended,
        k: Tensor,
        v: Tensor,
        keys: Sequence[Span],
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the gradients of the queries' attention to the keys to those of all three tensors."""
        for block in blocks(of.queries, keys, self.causal):
            rows, columns = slice(*block.queries), slice(*block.keys)
            found = part_gradients(
                of.grad[:, :, rows],
                of.q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                of.out[:, :, rows],
                of.lse[:, :, rows],
                causal=block.diagonal,
                scale=self.scale,
                backend=self.backend,
            )
            for total, some, part in zip((dq, dk, dv), (rows, columns, columns), found, strict=True):
                total[:, :, some] += part
            self.traffic.scores += of.q.shape[0] * of.q.shape[1] * block.pairs


@dataclass(frozen=True)
class Attended:
    """Queries, their positions, and the output, log-sum-exp and gradient of their attention to all keys."""

    q: Tensor
    queries: Sequence[Span]
    out: Tensor
    lse: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Partial:
    """Output and log-sum-exp of attention to the keys so far, in at least float32."""

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor, v: Tensor) -> Partial:
        """Start with no keys: zeros, and a log-sum-exp of -inf."""
        dtype = wide_dtype(q)
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
        return cls(out, q.new_full(q.shape[:3], -torch.inf, dtype=dtype))

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge in, in place, the attention of the queries `rows` to more keys, by the log-sum-exps."""
        before, total = self.lse[:, :, rows], self.out[:, :, rows]
        merge([total, out.to(total.dtype)], [before, lse])  # in place, over `total`
        before.copy_(torch.logaddexp(before, lse))


class Scheme(Protocol):
    """A schedule. Tensors are a rank's own (B, H, n, width), with fewer key/value heads if these are shared."""

    def forward(self, rank: Rank, q: Tensor, k: Tensor, v: Tensor) -> Program[tuple[Tensor, Saved]]:
        """Return the output, and the tensors that the gradients need."""

    def backward(self, rank: Rank, saved: Saved, grad: Tensor) -> Program[tuple[Tensor, Tensor, Tensor]]:
        """Gradients of q, k and v."""


def _zeros(*tensors: Tensor) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=wide_dtype(x), memory_format=torch.contiguous_format) for x in tensors]


def _empty(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty((*like.shape[:2], tokens, *like.shape[3:]))


class Ring:
    """The ring schedule; see the module. Each rank sends to the one before it: at step s, rank p has the keys of rank p
    + s. Key/value heads go round one after the other, small ones together, each with the queries that read it, so that
    only part of a rank's keys and values is under way at a time."""

    def forward(self, rank: Rank, q: Tensor, k: Tensor, v: Tensor) -> Program[tuple[Tensor, Saved]]:
        found = Partial.empty(q, v)
        for queries, keys in self._rounds(rank, q, k, v):
            held = [k[:, keys].contiguous(), v[:, keys].contiguous()]
            yield from self._round(rank, q[:, queries], held, Partial(found.out[:, queries], found.lse[:, queries]))
        out = found.out.to(q.dtype)
        return out, (q, k, v, out, found.lse)

    def backward(self, rank: Rank, saved: Saved, grad: Tensor) -> Program[tuple[Tensor, Tensor, Tensor]]:
        q, k, v, out, lse = saved
        own = rank.layout.spans(rank.index)
        dq, dk, dv = _zeros(q, k, v)
        for queries, keys in self._rounds(rank, q, k, v):
            of = Attended(q[:, queries], own, out[:, queries], lse[:, queries], grad[:, queries])
            held = [k[:, keys].contiguous(), v[:, keys].contiguous()]
            yield from self._round_back(rank, of, held, dq[:, queries], dk[:, keys], dv[:, keys])
        return dq, dk, dv

    def _rounds(self, rank: Rank, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[slice, slice]]:
        """Query heads and key/value heads of each round, the same on all ranks."""
        batch, groups, _, width = k.shape
        readers = q.shape[1] // groups
        ends = rounds_of(rank.layout, groups, batch * (width + v.shape[3]) * k.element_size())
        return [(slice(a * readers, b * readers), slice(a, b)) for a, b in ends]

    def _round(self, rank: Rank, q: Tensor, held: list[Tensor], onto: Partial) -> Program[None]:
        own = rank.layout.spans(rank.index)
        for step in range(rank.layout.ranks):
            last = step == rank.layout.ranks - 1
            pending = None if last else (yield _hop(rank, held, step + 1))
            rank.attend(q, own, held[0], held[1], rank.layout.spans(_owner(rank, step)), onto)
            held = held if pending is None else list(pending.wait()[_owner(rank, 1)])

    def _round_back(
        self, rank: Rank, of: Attended, held: list[Tensor], dq: Tensor, dk: Tensor, dv: Tensor
    ) -> Program[None]:
        behind, carried = _owner(rank, 1), None
        for step in range(rank.layout.ranks):
            last = step == rank.layout.ranks - 1
            pending = None if last else (yield _hop(rank, held, step + 1))
            slopes = [dk, dv] if step == 0 else _zeros(*held)
            rank.gradients(of, held[0], held[1], rank.layout.spans(_owner(rank, step)), dq, *slopes)
            if carried is not None:
                _add(slopes, carried.wait()[behind])
            if last:
                held = []  # not needed any more
            if step > 0:  # on to the next rank that has these keys, and finally back home
                carried = yield _hop(rank, slopes, step + 1)
            held = held if pending is None else list(pending.wait()[behind])
        if carried is not None:
            _add([dk, dv], carried.wait()[behind])


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def _owner(rank: Rank, step: int) -> int:
    return (rank.index + step) % rank.layout.ranks


def _hop(rank: Rank, tensors: Sequence[Tensor], step: int) -> Exchange:
    """One hop of tensors about the keys of one rank; the arriving ones belong to the rank `step` further."""
    tokens = rank.layout.size(_owner(rank, step))
    return Exchange({_owner(rank, -1): tensors}, {_owner(rank, 1): [_empty(x, tokens) for x in tensors]})


class Heads:
    """The head schedule; see the module."""

    def forward(self, rank: Rank, q: Tensor, k: Tensor, v: Tensor) -> Program[tuple[Tensor, Saved]]:
        q, k, v = yield from self._all_tokens(rank, [q, k, v])
        everything = [(0, rank.layout.length)]
        found = Partial.empty(q, v)
        rank.attend(q, everything, k, v, everything, found)
        out = found.out.to(q.dtype)
        (own,) = yield from self._all_heads(rank, [out])
        return own, (q, k, v, out, found.lse)

    def backward(self, rank: Rank, saved: Saved, grad: Tensor) -> Program[tuple[Tensor, Tensor, Tensor]]:
        q, k, v, out, lse = saved
        (grad,) = yield from self._all_tokens(rank, [grad])
        everything = [(0, rank.layout.length)]
        slopes = _zeros(q, k, v)
        rank.gradients(Attended(q, everything, out, lse, grad), k, v, everything, *slopes)
        dq, dk, dv = yield from self._all_heads(rank, [slopes[0].to(q.dtype), *slopes[1:]])
        return dq, dk, dv

    def _all_tokens(self, rank: Rank, own: Sequence[Tensor]) -> Program[list[Tensor]]:
        """Exchange a rank's own tokens of all heads for all tokens, in order, of its own heads."""
        layout = rank.layout
        parts = [x.chunk(layout.ranks, 1) for x in own]
        received = yield from swap(
            {other: [heads[other].contiguous() for heads in parts] for other in rank.others},
            {o: [_empty(heads[0], layout.size(o)) for heads in parts] for o in rank.others},
        )
        mine = [heads[rank.index] for heads in parts]
        everyone = [mine if r == rank.index else received[r] for r in range(layout.ranks)]
        return [layout.join(pieces) for pieces in zip(*everyone, strict=True)]

    def _all_heads(self, rank: Rank, whole: Sequence[Tensor]) -> Program[list[Tensor]]:
        """The inverse of `_all_tokens`."""
        layout, tokens = rank.layout, rank.layout.size(rank.index)
        received = yield from swap(
            {other: [layout.take(x, other).contiguous() for x in whole] for other in rank.others},
            {other: [_empty(x, tokens) for x in whole] for other in rank.others},
        )
        mine = [layout.take(x, rank.index) for x in whole]
        everyone = [mine if r == rank.index else received[r] for r in range(layout.ranks)]
        return [torch.cat(pieces, 1) for pieces in zip(*everyone, strict=True)]


@dataclass(frozen=True)
class Grid:
    """The grid schedule; see the module.

    Attributes:
        columns: Pk; ranks are numbered along the rows.
    """

    columns: int

    def forward(self, rank: Rank, q: Tensor, k: Tensor, v: Tensor) -> Program[tuple[Tensor, Saved]]:
        row, column = self._line(rank)
        (q,), (k, v) = yield from self._gathered(rank, [q], [k, v])
        found = Partial.empty(q, v)
        rank.attend(q, _spans(rank, row), k, v, _spans(rank, column), found)
        parts = yield from self._scattered(rank, row, [found.out.to(q.dtype), found.lse])
        whole = Partial.empty(q.narrow(2, 0, rank.layout.size(rank.index)), v)
        for out, lse in parts:
            whole.add(slice(None), out, lse)
        out = whole.out.to(q.dtype)
        return out, (q, k, v, out, whole.lse)

    def backward(self, rank: Rank, saved: Saved, grad: Tensor) -> Program[tuple[Tensor, Tensor, Tensor]]:
        q, k, v, out, lse = saved
        row, column = self._line(rank)
        (grad, out, lse), _ = yield from self._gathered(rank, [grad, out, lse], [])
        dq, dk, dv = _zeros(q, k, v)
        of = Attended(q, _spans(rank, row), out, lse, grad)
        rank.gradients(of, k, v, _spans(rank, column), dq, dk, dv)
        queries = yield from self._scattered(rank, row, [dq])
        keys = yield from self._scattered(rank, column, [dk, dv])
        return _summed(queries, 0), _summed(keys, 0), _summed(keys, 1)

    def _line(self, rank: Rank) -> tuple[list[int], list[int]]:
        """The ranks in this rank's row, and those in its column."""
        a, b = divmod(rank.index, self.columns)
        row = [a * self.columns + i for i in range(self.columns)]
        return row, list(range(b, rank.layout.ranks, self.columns))

    def _gathered(
        self, rank: Rank, along_row: Sequence[Tensor], along_column: Sequence[Tensor]
    ) -> Program[list[list[Tensor]]]:
        """Tensors of all ranks in the row, and in the column, concatenated by rank."""
        lines = list(zip(self._line(rank), (along_row, along_column), strict=True))
        sends = {r: own for line, own in lines if own for r in line if r != rank.index}
        sizes = {r: [_empty(x, rank.layout.size(r)) for x in own] for r, own in sends.items()}
        received = yield from swap(sends, sizes)
        return [
            [torch.cat([x if r == rank.index else received[r][i] for r in line], 2) for i, x in enumerate(own)]
            for line, own in lines
        ]

    def _scattered(self, rank: Rank, line: Sequence[int], whole: Sequence[Tensor]) -> Program[list[Sequence[Tensor]]]:
        """What each rank of a row or column has computed for this rank's tokens, this rank first."""
        split = [x.split([rank.layout.size(r) for r in line], 2) for x in whole]
        pieces = dict(zip(line, zip(*split, strict=True), strict=True))
        tokens = rank.layout.size(rank.index)
        received = yield from swap(
            {r: [x.contiguous() for x in pieces[r]] for r in line if r != rank.index},
            {r: [_empty(x, tokens) for x in whole] for r in line if r != rank.index},
        )
        return [pieces[rank.index], *received.values()]


def _summed(parts: Sequence[Sequence[Tensor]], i: int) -> Tensor:
    total = parts[0][i]
    for part in parts[1:]:
        total = total + part[i]
    return total


def _spans(rank: Rank, ranks: Sequence[int]) -> list[Span]:
    return [span for r in ranks for span in rank.layout.spans(r)]
