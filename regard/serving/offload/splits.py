"""Which worker has which keys and values: some heads of all sequences, whole sequences, or some tokens of each.

All are exact. Parts of the heads and whole sequences are put together as they are; parts of a sequence are merged by their
log-sum-exps (:func:`regard.engines.merging.merge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least, one_of
from regard.core.precision import wide
from regard.engines.merging import merge

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 32
"""Neighbouring tokens of a sequence on the same worker, where sequences are split: they stay even while they grow."""
LONG = 4096
"""Tokens from which on ``auto`` splits a sequence."""

ALL = slice(None)


@dataclass(frozen=True)
class Rows:
    """Rows of a model that are read together.

    Attributes:
        keys: names of the rows.
        starts: tokens that were read of each.
        counts: how many more are read now.
    """

    keys: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True)
class Share:
    """What a worker has to do with some rows.

    Attributes:
        rows: places of its rows among all.
        ranks: (len(rows), n) of each query, among the keys that this worker has of the row; -1 sees none of them.
        counts: new keys of each of its rows.
        new: row and token of each of these keys among all, packed.
        parts: places of those among its rows of which other workers have parts.
        heads: of keys and values that it has.
        every: whether it has the one new token of every row.
    """

    rows: list[int]
    ranks: list[list[int]]
    counts: list[int]
    new: tuple[Tensor, Tensor]
    parts: list[int]
    heads: slice
    every: bool

    def queries(self, q: Float[Tensor, "b h n d"], kv_heads: int) -> Float[Tensor, "rows heads n d"]:
        """Queries of the worker's rows, for its key/value heads."""
        if len(self.rows) < q.shape[0]:
            q = q[self.rows]
        return q if self.heads == ALL else q.unflatten(1, (kv_heads, -1))[:, self.heads].flatten(1, 2)

    def fresh(self, x: Float[Tensor, "b g n d"]) -> Float[Tensor, "new heads d"]:
        """New keys or values for this worker."""
        x = x[:, self.heads]
        return x[:, :, 0] if self.every else x.transpose(1, 2)[self.new]


class Split(Protocol):
    """A rule for who has what.

    Attributes:
        workers: how many there are.
    """

    workers: int

    def heads(self, worker: int) -> slice:
        """Heads of keys and values that a worker has."""
        ...

    def place(self, key: int, tokens: int) -> None:
        """A new row, of so many tokens in the end."""
        ...

    def remove(self, key: int) -> None:
        """Forget a row; unknown keys are ignored."""
        ...

    def owners(self, key: int) -> Sequence[int]:
        """Workers that may have something of a row."""
        ...

    def shares(self, rows: Rows) -> dict[int, Share]:
        """What each worker has to do; workers without any of the rows are left out."""
        ...


class HeadSplit:
    """Worker a has heads a, a + workers, ... of keys and values, of all sequences, with the queries that read them."""

    def __init__(self, workers: int, kv_heads: int) -> None:
        if workers > kv_heads:
            raise Unsupported(
                f"{workers} workers for {kv_heads} heads of keys and values",
                supported=f"at most {kv_heads} workers in a split of heads",
                nearest="split='request', 'sequence' or 'auto'",
            )
        self.workers = workers

    def heads(self, worker: int) -> slice:
        return slice(worker, None, self.workers)

    def place(self, key: int, tokens: int) -> None:
        pass

    def remove(self, key: int) -> None:
        pass

    def owners(self, key: int) -> Sequence[int]:
        return range(self.workers)

    def shares(self, rows: Rows) -> dict[int, Share]:
        every, ranks, new = _whole(rows)
        return {
            a: Share(list(range(len(rows.keys))), ranks, list(rows.counts), new, [], self.heads(a), every)
            for a in range(self.workers)
        }


class TokenSplit:
    """Whole sequences, each on the worker with the least to do; those from `long` tokens on in blocks over all workers.

    Args:
        long: 0 splits every sequence, None none.
    """

    def __init__(self, workers: int, long: int | None) -> None:
        self.workers, self._long = workers, long
        self._owners: dict[int, tuple[int, ...]] = {}
        self._tokens: dict[int, int] = {}
        self._load = [0.0] * workers

    def heads(self, worker: int) -> slice:
        return ALL

    def place(self, key: int, tokens: int) -> None:
        self.remove(key)
        owners = tuple(range(self.workers))
        if self._long is None or tokens < self._long:
            owners = (min(owners, key=self._load.__getitem__),)
        self._owners[key], self._tokens[key] = owners, tokens
        for a in owners:
            self._load[a] += tokens / len(owners)

    def remove(self, key: int) -> None:
        owners = self._owners.pop(key, ())
        for a in owners:
            self._load[a] -= self._tokens[key] / len(owners)
        self._tokens.pop(key, None)

    def owners(self, key: int) -> Sequence[int]:
        return self._owners[key]

    def shares(self, rows: Rows) -> dict[int, Share]:
        found = {}
        for a in range(self.workers):
            mine = [i for i, key in enumerate(rows.keys) if a in self._owners[key]]
            if mine:
                found[a] = self._share(a, mine, rows)
        return found

    def _share(self, a: int, mine: list[int], rows: Rows) -> Share:
        n = max(rows.counts)
        ranks, counts, row_of, token_of = [], [], [], []
        parts = []
        for place, i in enumerate(mine):
            owners, start, count = self._owners[rows.keys[i]], rows.starts[i], rows.counts[i]
            if len(owners) > 1:
                parts.append(place)
            seen = [visible(start + t + 1, owners.index(a), len(owners)) for t in range(-1, count)]
            new = [t for t in range(count) if seen[t + 1] > seen[t]]
            ranks.append([after - 1 for after in seen[1:]] + [-1] * (n - count))
            counts.append(len(new))
            row_of += [i] * len(new)
            token_of += new
        every = n == 1 and row_of == list(range(len(rows.keys)))
        new_of_all = _indices(row_of), _indices(token_of)
        return Share(mine, ranks, counts, new_of_all, parts, ALL, every)


def visible(tokens: int, place: int, owners: int) -> int:
    """How many of the first tokens of a sequence are with one of its owners."""
    if owners == 1:
        return tokens
    rounds, rest = divmod(tokens, BLOCK * owners)
    return rounds * BLOCK + min(max(rest - place * BLOCK, 0), BLOCK)


def _whole(rows: Rows) -> tuple[bool, list[list[int]], tuple[Tensor, Tensor]]:
    """For a worker that has all tokens of all rows: whether that is one new token each, ranks of queries, new tokens."""
    n = max(rows.counts)
    every = all(count == 1 for count in rows.counts)
    ranks = [
        [start + t if t < count else -1 for t in range(n)]
        for start, count in zip(rows.starts, rows.counts, strict=True)
    ]
    new = (
        _indices([i for i, count in enumerate(rows.counts) for _ in range(count)]),
        _indices([t for count in rows.counts for t in range(count)]),
    )
    return every, ranks, new


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


SPLITS = ("auto", "head", "request", "sequence")


def create_split(name: str, workers: int, kv_heads: Sequence[int], long: int = LONG) -> Split:
    """A split by name.

    Args:
        name: ``head``; ``request`` for whole sequences; ``sequence`` for all in parts; ``auto`` for heads where they go
            into the workers evenly, else whole sequences, and parts of those that have `long` tokens.
        kv_heads: of each layer.

    Raises:
        Unsupported: for another name, and more workers than heads in ``head``.
    """
    one_of("split", name, SPLITS)
    at_least("workers", workers, 1)
    if name == "head" or (name == "auto" and all(heads % workers == 0 for heads in kv_heads)):
        return HeadSplit(workers, min(kv_heads))
    return TokenSplit(workers, {"auto": long, "request": None, "sequence": 0}[name])


def put_together(
    shares: dict[int, Share], answers: dict[int, tuple[Tensor, ...]], batch: int, kv_heads: int
) -> Float[Tensor, "b h n v"]:
    """The output of all rows from the answers of the workers."""
    (first_share, *_), (first, *_) = shares.values(), answers.values()
    if len(shares) == 1 and len(first_share.rows) == batch and first_share.heads == ALL:
        return first[0]
    if first_share.heads != ALL:
        groups = sum(answer[0].shape[1] for answer in answers.values()) // kv_heads
        output = first[0].new_empty((batch, kv_heads, groups, *first[0].shape[2:]))
        for a, share in shares.items():
            output[:, share.heads] = answers[a][0].unflatten(1, (-1, groups))
        return output.flatten(1, 2)
    output = first[0].new_empty((batch, *first[0].shape[1:]))
    split: list[int] = []
    outputs, lses = [], []
    for a, share in shares.items():
        whole = [place for place in range(len(share.rows)) if place not in set(share.parts)]
        if whole:
            output[[share.rows[place] for place in whole]] = answers[a][0][whole]
        if share.parts:
            split = [share.rows[place] for place in share.parts]  # the same of every worker
            outputs.append(wide(answers[a][0][share.parts]))
            lses.append(answers[a][1])
    if split:
        output[split] = merge(outputs, lses).to(output.dtype)
    return output
