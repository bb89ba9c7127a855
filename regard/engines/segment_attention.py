"""Softmax attention in segments that reach back into a memory, with scores that depend on the distance of each key.

A sequence is processed in segments of L tokens (ranks 0 to L - 1, L to 2 L - 1, ...). A token sees its own segment (up
to itself in causal patterns), the M tokens before its segment, and, if groups of c tokens have been compressed into one
slot each, the C groups before those. The visible slots are ordered [groups; memory; segment], and distances count
slots:

    score_ij = tau ((q_i + u) . k_j + (q_i + w) . W_r r(distance)),     r = [sin, cos](distance 10000^(-2 c / width))

Given the keys, the segments of a call are independent and are computed in parallel. Nothing of size N x N is stored:
time and memory grow with N (L + M + C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.backends.operators import runs_plainly
from regard.contract import Call, Pattern, Result, state_field
from regard.core.angles import angles
from regard.core.padding import pad_tokens
from regard.core.precision import wide, wide_dtype
from regard.core.visibility import CountedRanks, Ranks
from regard.engines.attention import Visibility, attention
from regard.engines.cache import WindowState, extend_window, take

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

PAIRS_AT_ONCE = 1 << 22
"""Number of scores to compute at once."""

BASE = 10_000.0


@dataclass(frozen=True)
class Reach:
    """What a token can see: `segment` L, `memory` M, and `groups` C compressed groups of `ratio` c tokens before those.

    With groups, L and M must be multiples of c, so that no group crosses a border.
    """

    segment: int
    memory: int
    groups: int = 0
    ratio: int = 1

    @property
    def cached(self) -> int:
        """Number of tokens that the token after a sequence may see."""
        return self.memory + self.segment - 1

    @property
    def queued(self) -> int:
        """Number of groups that the token after a sequence, or a later one, may see."""
        return self.groups + self.cached // self.ratio if self.groups else 0


@dataclass(frozen=True)
class Distances:
    """The part of a score that depends on the distance of its key: (q + w) . W_r r(distance).

    Attributes:
        weights: W_r of each head, from sinusoids to keys.
        w: added to queries; None for zero.
        clamp: largest distance in either direction; farther keys are treated as if at this distance. None for no limit.
    """

    weights: Float[Tensor, "h c d"]
    w: Float[Tensor, "h d"] | None = None
    clamp: int | None = None

    def asking(self, q: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Queries for the distance term, q + w."""
        return q if self.w is None else q + wide(self.w)[:, None]

    def table(self, high: int, low: int) -> Float[Tensor, "h distances+1 d"]:
        """Zeros, then W_r r for the distances high, high - 1, ... low."""
        return F.pad(self._sinusoids(high, low) @ wide(self.weights), (0, 0, 1, 0))

    def scores(self, q: Float[Tensor, "b h n d"], high: int) -> Float[Tensor, "b h n distances+1"]:
        """Zeros, then scores for the distances high, high - 1, ... 0."""
        if q.shape[2] >= min(high, self.weights.shape[2]):
            return self.asking(q) @ self.table(high, 0).mT
        # apply W_r to the queries, since they are fewer than the distances
        return F.pad((self.asking(q) @ wide(self.weights).mT) @ self._sinusoids(high, 0).mT, (1, 0))

    def _sinusoids(self, high: int, low: int) -> Float[Tensor, "distances c"]:
        weights = self.weights
        dtype = wide_dtype(weights)
        known = (high, low, self.clamp, weights.shape[1], dtype, weights.device)
        return _kept_sinusoids(*known) if runs_plainly() else _sinusoids(*known)


def _sinusoids(
    high: int, low: int, clamp: int | None, width: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "distances width"]:
    distances = torch.arange(high, low - 1, -1, device=device)
    distances = distances if clamp is None else distances.clamp(-clamp, clamp)
    turns = angles(distances[None], width, base=BASE, dtype=dtype)[0]
    return torch.cat([turns.sin(), turns.cos()], -1)[:, :width]


@lru_cache(maxsize=16)
def _kept_sinusoids(*known: Any) -> Tensor:
    """Constants for every layer and every decoding step. Not used under modes and transforms of torch, whose tensors
    would be invalid afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        return _sinusoids(*known)


@dataclass(frozen=True)
class GroupState(WindowState):
    """The last tokens of each row, and its last compressed groups, right-aligned: the last slot holds the row's last
    complete group."""

    group_k: Float[Tensor, "b g groups d"] = state_field()
    group_v: Float[Tensor, "b g groups v"] = state_field()


@dataclass(frozen=True)
class _Slots:
    """Keys and values."""

    k: Float[Tensor, "b g m d"]
    v: Float[Tensor, "b g m v"]

    def map(self, change: Callable[[Tensor], Tensor]) -> _Slots:
        return _Slots(change(self.k), change(self.v))

    def part(self, first: int, count: int) -> _Slots:
        return self.map(lambda x: x[:, :, first : first + count])

    def followed_by(self, others: _Slots, axis: int = 2) -> _Slots:
        return _Slots(*(torch.cat([a, b.to(a.dtype)], axis) for a, b in ((self.k, others.k), (self.v, others.v))))


def segment_attention(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n v"],
    reach: Reach,
    *,
    u: Float[Tensor, "h d"] | None = None,
    distances: Distances | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Result:
    """Self attention for a call, from its state to the next one; with weights if requested.

    Args:
        u: added to the queries for their products with keys.
        distances: the distance term of the scores; None for no such term.
        past: keys and values that later segments read, and that the state holds, instead of k and v: equal to them, but
            with separate gradients.
        groups: keys and values of the group of c tokens that ends at each token; values at other tokens are ignored.
            Required if `reach` has groups.
    """
    n = q.shape[2]
    window, *read = extend_window(call, *((k, v) if past is None else past), n, reach.cached)[:3]
    queue, state = None, window
    if reach.groups and groups is not None:
        queue, state = _extend_groups(call, reach, _Slots(*groups), window)
    sequence = _Sequence(call, reach, u, distances, _Slots(*read), None if past is None else _Slots(k, v), queue)
    if q.numel() == 0:
        return Result(v.new_zeros(*q.shape[:3], v.shape[-1]), state)
    output, weights = sequence.attend(wide(q))
    return Result(output.to(v.dtype), state, extras={} if weights is None else {"weights": weights.to(v.dtype)})


def _extend_groups(call: Call, reach: Reach, groups: _Slots, window: WindowState) -> tuple[_Slots, GroupState]:
    """Append the new groups to the state's queue; return the queue, and the state after them.

    Slot s of the queue holds group number ``start // c - queued + s``.
    """
    old: GroupState | None = call.state
    c, queued, m = reach.ratio, reach.queued, groups.k.shape[2]
    if old is None:
        before = torch.zeros_like(window.length)
        queue = groups.map(lambda x: F.pad(x[:, :, c - 1 :: c], (0, 0, queued, 0)))
    else:
        before = old.length // c
        ends = (before[:, None] + torch.arange(1, -(-m // c) + 1, device=before.device)) * c - 1 - old.length[:, None]
        new = groups.map(lambda x: take(x, ends.clamp(max=m - 1))) if m else groups
        queue = _Slots(old.group_k, old.group_v).followed_by(new)
    last = (window.length // c - before)[:, None] + torch.arange(queued, device=before.device)
    kept = queue.map(lambda x: take(x, last))
    return queue, GroupState(window.k, window.v, window.length, kept.k, kept.v)


@dataclass(frozen=True)
class _Sequence:
    """The keys and values that the queries of a call read.

    Attributes:
        read: the tokens of the state, followed by those of the call.
        new: the call's tokens as read within their own segment, if different.
        queue: compressed groups, see :func:`_extend_groups`.
    """

    call: Call
    reach: Reach
    u: Tensor | None
    distances: Distances | None
    read: _Slots
    new: _Slots | None
    queue: _Slots | None

    @property
    def start(self) -> Int[Tensor, " b"] | None:
        """Rank of the first query of each row; None for 0."""
        return None if self.call.state is None else self.call.state.length

    def attend(self, q: Float[Tensor, "b h n d"]) -> tuple[Float[Tensor, "b h n v"], Tensor | None]:
        start = self.start
        if start is None:
            return self.in_segments(q)
        if q.shape[2] > 1 and not torch.compiler.is_compiling() and bool((start % self.reach.segment == 0).all()):
            return self.in_segments(q)
        return self.anywhere(q)

    def in_segments(self, q: Float[Tensor, "b h n d"]) -> tuple[Float[Tensor, "b h n v"], Tensor | None]:
        """All segments in parallel, for rows that each begin at the start of a segment."""
        reach, causal, weighed = self.reach, self.call.pattern is Pattern.CAUSAL_SELF, "weights" in self.call.want
        batch, heads, n, _ = q.shape
        size = min(n, reach.segment)
        count = -(-n // size)
        queries = pad_tokens(q, 0, count * size - n).unflatten(2, (count, size))
        slots, hidden = self._segments(count, size), ~self._existing(count, size)
        total = slots.k.shape[3]
        table = None if self.distances is None else self.distances.table(total - 1, 0 if causal else 1 - size)
        step = max(1, PAIRS_AT_ONCE // (batch * heads * size * total))
        # recomputing in backward must not draw other numbers
        again = step < count and torch.is_grad_enabled() and not weighed and self.call.dropout == 0
        mix, pieces = partial(self._mix_segments, causal), []
        for first in range(0, count, step):
            part = slice(first, first + step)
            tensors = (queries[:, :, part], slots.k[:, :, part], slots.v[:, :, part], hidden[:, part], table)
            pieces.append(checkpoint(mix, *tensors, use_reentrant=False) if again else mix(*tensors))
        output = torch.cat([output for output, _ in pieces], 2).flatten(2, 3)[:, :, :n]
        if not weighed:
            return output, None
        weights = torch.cat([part for _, part in pieces if part is not None], 2)[..., reach.groups :]
        columns = self.read.k.shape[2]
        placed = []
        for s in range(count):
            left = columns - n - reach.memory + s * size
            placed.append(F.pad(weights[:, :, s], (left, columns - left - weights.shape[-1])))
        return output, torch.cat(placed, 2)[:, :, :n]

    def _segments(self, count: int, size: int) -> _Slots:
        """The slots of each segment, (b, g, count, slots, d)."""
        reach = self.reach
        n = self.read.k.shape[2] - (0 if self.start is None else reach.cached)
        padded = self.read.map(lambda x: pad_tokens(x, reach.memory + n - x.shape[2], count * size - n))
        parts = []
        if self.queue is not None:
            step = reach.segment // reach.ratio
            parts.append(self.queue.map(lambda x: windows(x[:, :, step - 1 :], reach.groups, step, count)))
        if self.new is None:
            parts.append(padded.map(lambda x: windows(x, reach.memory + size, size, count)))
        else:
            if reach.memory:
                parts.append(padded.map(lambda x: windows(x, reach.memory, size, count)))
            parts.append(self.new.map(lambda x: pad_tokens(x, 0, count * size - n).unflatten(2, (count, size))))
        return reduce(lambda before, part: before.followed_by(part, 3), parts)

    def _existing(self, count: int, size: int) -> Bool[Tensor, "b count slots"]:
        """Which slots of each segment hold a token or a group; in causal-self the last `size` are all assumed to."""
        reach, device = self.reach, self.read.k.device
        start = self.start
        first = torch.arange(0, count * size, size, device=device) + (0 if start is None else start[:, None])
        first = first.view(-1, count, 1)
        group = (first - reach.memory) // reach.ratio + torch.arange(-reach.groups, 0, device=device)
        token = first + torch.arange(-reach.memory, size, device=device)
        exists = token >= 0
        if self.call.pattern is not Pattern.CAUSAL_SELF:
            lengths = self.call.memory_lengths
            exists = exists & (token < (self.read.k.shape[2] if lengths is None else lengths[:, None, None]))
        return torch.cat([(group >= 0).expand(exists.shape[0], -1, -1), exists], -1) if reach.groups else exists

    def _mix_segments(
        self, causal: bool, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with segments as rows: q (b, h, s, size, d); all but the last `size` slots precede the segment."""
        batch, _, count, size, _ = q.shape
        rows, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        m = keys.shape[2]
        bias = None
        if table is not None and self.distances is not None:
            bias = _shifted(self.call.scale * self.distances.asking(rows) @ table.mT)
            bias = bias if causal else bias[..., :m]
        slots = torch.arange(m, device=q.device)
        present = torch.where(hidden.expand(batch, -1, -1).flatten(0, 1), -1, slots)
        where = Ranks(slots[None, m - size :], present, m - size, m - size, plain=False)
        output, weights = self._softmax(rows, keys, values, where, Visibility(causal=causal), bias)
        back = [x if x is None else x.unflatten(0, (batch, count)).transpose(1, 2) for x in (output, weights)]
        return back[0], back[1]  # type: ignore[return-value]

    def anywhere(self, q: Float[Tensor, "b h n d"]) -> tuple[Float[Tensor, "b h n v"], Tensor | None]:
        """At most a segment of queries at a time, for rows at any place in their segments; causal-self with a state."""
        parts = [self._part(q, first) for first in range(0, q.shape[2], self.reach.segment)]
        output = torch.cat([output for output, _ in parts], 2)
        return output, torch.cat([w for _, w in parts if w is not None], 2) if "weights" in self.call.want else None

    def _part(self, q: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """The queries from `first` on, at most as many as a segment has."""
        reach, device, start = self.reach, q.device, self.call.state.length[:, None]
        n = q.shape[2]
        q = q[:, :, first : first + reach.segment]
        size = q.shape[2]
        m = reach.cached + size
        rank = (start + first + torch.arange(size, device=device))[..., None]  # b size 1
        begin = rank // reach.segment * reach.segment
        token = (start + first + torch.arange(-reach.cached, size, device=device))[:, None]  # b 1 m
        seen = (token >= begin - reach.memory) & (token >= 0) & (token <= rank)
        farthest = max(m - 1, reach.groups + reach.cached)
        scores = q.new_zeros(1, 1, 1, farthest + 2).expand(q.shape[0], -1, size, -1)
        if self.distances is not None:
            scores = self.call.scale * self.distances.scores(q, farthest)
        by_token = _shifted(scores[..., farthest + 1 - m :])  # with an unused entry in front
        slots, visible, biases = self.read.part(first, m), [seen], [by_token]
        if self.new is not None:
            own = self.read.part(0, reach.cached).followed_by(self.new).part(first, m)
            slots = slots.followed_by(own)
            visible, biases = [seen & (token < begin), seen & (token >= begin)], [by_token, by_token]
        if self.queue is not None:
            # groups that the first query sees, and further ones that queries of the next segment would see
            border = (start + first) // reach.segment * reach.segment - reach.memory
            number = border // reach.ratio + torch.arange(-reach.groups, reach.segment // reach.ratio, device=device)
            place = (number - start // reach.ratio + reach.queued).clamp(0, self.queue.k.shape[2] - 1)
            slots = slots.followed_by(self.queue.map(partial(take, slots=place)))
            ahead = (begin - reach.memory) // reach.ratio - number[:, None]  # number of groups from there to the memory
            visible.append((ahead > 0) & (ahead <= reach.groups) & (number >= 0)[:, None])
            distance = (rank - begin + reach.memory + ahead).clamp(0, farthest)[:, None]
            biases.append(scores.gather(3, farthest + 1 - distance.expand(*scores.shape[:2], -1, -1)))
        bias = torch.cat(biases, -1).masked_fill(~torch.cat(visible, -1)[:, None], -torch.inf)
        total = slots.k.shape[2]
        where = CountedRanks(size, total, total - size, True, device)
        output, weights = self._softmax(q, slots.k, slots.v, where, Visibility(), bias)
        if weights is None:
            return output, None
        weights = weights[..., :m] if self.new is None else weights[..., :m] + weights[..., m : 2 * m]
        return output, F.pad(weights, (first, n - first - size))

    def _softmax(
        self, q: Tensor, k: Tensor, v: Tensor, where: Ranks, visibility: Visibility, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        call = self.call
        output, weights, _ = attention(
            q if self.u is None else q + wide(self.u)[:, None],
            k,
            v.to(q.dtype),
            where,
            visibility=visibility,
            scale=call.scale,
            bias=bias,
            dropout=call.dropout,
            generator=call.generator,
            want_weights="weights" in call.want,
            backend=call.backend,
        )
        return output, weights


def windows(x: Float[Tensor, "b g m d"], width: int, step: int, count: int) -> Float[Tensor, "b g count width d"]:
    """`count` windows of `width` slots, each `step` after the previous one."""
    return x[:, :, : (count - 1) * step + width].unfold(2, width, step).mT


def _shifted(x: Float[Tensor, "*b n m+1"]) -> Float[Tensor, "*b n m"]:
    """Turn scores by distance (the farthest first, after an unused entry) into scores by slot, for consecutive queries.

    Row i moves left by n - 1 - i. The entries that move in come from row i + 1, which follows in memory, and are
    unused.
    """
    n, m = x.shape[-2], x.shape[-1] - 1
    return x.flatten(-2)[..., n:].unflatten(-1, (n, m))
