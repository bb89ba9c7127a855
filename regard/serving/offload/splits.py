"""Splits of keys and values over workers: by heads, by whole sequences, or by the tokens of a sequence.

All splits are exact. Outputs of different heads or sequences are concatenated; those of parts of a sequence are merged
by their log-sum-exps (:func:`regard.engines.merging.merge`).
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
"""Consecutive tokens on one worker when a sequence is split: the workers' parts stay balanced while it grows."""
LONG = 4096
"""Length from which on ``auto`` splits a sequence."""

ALL = slice(None)


@dataclass(frozen=True)
class Rows:
    """Rows of a model that are read together.

    Attributes:
        keys: keys that identify the rows.
        starts: number of tokens of each row that were read before.
        counts: number of new tokens of each row.
    """

    keys: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True)
class Share:
    """A worker's share of the attention of some rows.

    Attributes:
        rows: indices of the worker's rows in the batch.
        ranks: (len(rows), n), for each query, the index of the last key it sees among the worker's keys of the row; -1
            if it sees none.
        counts: number of new keys of each of its rows.
        new: row and token indices in the batch of these keys, packed.
        parts: indices, among its rows, of the rows that are split over several workers.
        heads: key/value heads that the worker has.
        every: whether each row of the batch has exactly one new token and the worker gets all of them.
    """

    rows: list[int]
    ranks: list[list[int]]
    counts: list[int]
    new: tuple[Tensor, Tensor]
    parts: list[int]
    heads: slice
    every: bool

    def queries(self, q: Float[Tensor, "b h n d"], kv_heads: int) -> Float[Tensor, "rows heads n d"]:
        """Select the queries of the worker's rows, for its key/value heads."""
        if len(self.rows) < q.shape[0]:
            q = q[self.rows]
        return q if self.heads == ALL else q.unflatten(1, (kv_heads, -1))[:, self.heads].flatten(1, 2)

    def fresh(self, x: Float[Tensor, "b g n d"]) -> Float[Tensor, "new heads d"]:
        """Select the new keys or values for this worker."""
        x = x[:, self.heads]
        return x[:, :, 0] if self.every else x.transpose(1, 2)[self.new]


class Split(Protocol):
    """A rule that assigns keys and values to workers.

    Attributes:
        workers: number of workers.
    """

    workers: int

    def heads(self, worker: int) -> slice:
        """Return the key/value heads that a worker has."""
        ...

    def place(self, key: int, tokens: int) -> None:
        """Assign a new row that will have up to `tokens` tokens."""
        ...

    def remove(self, key: int) -> None:
        """Remove a row; unknown keys are ignored."""
        ...

    def owners(self, key: int) -> Sequence[int]:
        """Return the workers that may have keys and values of a row."""
        ...

    def shares(self, rows: Rows) -> dict[int, Share]:
        """Return each worker's share of the rows; workers without any of them are left out."""
        ...


class HeadSplit:
    """Split by heads: worker a has the key/value heads a, a + workers, ... of all sequences, and gets their queries."""

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
    """Puts each sequence on the least loaded worker, but splits those of at least `long` tokens in blocks over all
    workers.

    Args:
        workers: number of workers.
        long: 0 splits every sequence, None splits none.
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
    """Return how many of the first `tokens` tokens of a sequence are on the owner number `place`."""
    if owners == 1:
        return tokens
    rounds, rest = divmod(tokens, BLOCK * owners)
    return rounds * BLOCK + min(max(rest - place * BLOCK, 0), BLOCK)


def _whole(rows: Rows) -> tuple[bool, list[list[int]], tuple[Tensor, Tensor]]:
    """Return `every`, `ranks` and `new` of the :class:`Share` of a worker that has all tokens of all rows."""
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
    """Create a split by name.

    Args:
        name: ``head`` to split by heads; ``request`` for whole sequences; ``sequence`` to split every sequence;
            ``auto`` for heads if the workers divide them evenly, else whole sequences, of which those of `long` tokens
            are split.
        workers: number of workers.
        kv_heads: number of key/value heads in each layer.
        long: length from which on ``auto`` splits a sequence.

    Raises:
        Unsupported: for another name, and for ``head`` with more workers than heads.
    """
    one_of("split", name, SPLITS)
    at_least("workers", workers, 1)
    if name == "head" or (name == "auto" and all(heads % workers == 0 for heads in kv_heads)):
        return HeadSplit(workers, min(kv_heads))
    return TokenSplit(workers, {"auto": long, "request": None, "sequence": 0}[name])


def put_together(
    shares: dict[int, Share], answers: dict[int, tuple[Tensor, ...]], batch: int, kv_heads: int
) -> Float[Tensor, "b h n v"]:
    """Combine the answers of the workers into the output of all rows."""
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
            split = [share.rows[place] for place in share.parts]  # the same for every worker
            outputs.append(wide(answers[a][0][share.parts]))
            lses.append(answers[a][1])
    if split:
        output[split] = merge(outputs, lses).to(output.dtype)
    return output
