"""Tasks whose items are generated rather than read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Unsupported
from regard.tasks.protocol import EVALUATION, TRAINING, Batch, Task, check_integer, counter_generator, in_batches

if TYPE_CHECKING:
    from jaxtyping import Int

MAX_LENGTH = 1 << 16
_ROWS = 256
_ROUNDS = 200


def _digest(row: Int[np.ndarray, " n"]) -> bytes:
    return hashlib.blake2b(row.astype("<i4").tobytes(), digest_size=16).digest()


class GeneratedTask(Task):
    """Items of fixed length from a generator, divided into training and held-out items by a hash of their tokens.

    One item in eight is held out, whatever the seeds, so that a model is never scored on an item that it could have
    been trained on. If there are so many possible items that none is likely to be drawn twice, any items are held out,
    and training leaves out just these. Held-out items are distinct. Subclasses define :meth:`draw`.

    Attributes:
        block: number of items drawn at once and then used in order, for generators that draw a few items almost as
            slowly as many; None to draw each batch separately.
        vast: whether there are so many possible items that none is likely to be drawn twice.
    """

    block: int | None = None
    vast: bool = False
    _kept: tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None

    def __init__(self, *, seed: int, evaluation_items: int) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        self.evaluation_items = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b ..."]]:
        """Draw inputs and targets of `count` items, or of fewer."""
        raise NotImplementedError

    def batch(self, inputs: Int[np.ndarray, "b n"], targets: Int[np.ndarray, "b ..."]) -> Batch:
        """Make a batch of these items."""
        return Batch(torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        if self.block is None:
            return self.batch(*self._collect(counter_generator(seed, step, TRAINING), batch_size, held_out=False))
        places = step * batch_size + np.arange(batch_size)
        blocks = places // self.block
        parts = []
        for number in range(int(blocks[0]), int(blocks[-1]) + 1):
            here = places[blocks == number] % self.block
            parts.append([x[here] for x in self._of_block(seed, number, self.block)])
        inputs, targets = (np.concatenate(each) for each in zip(*parts, strict=True))
        return self.batch(inputs, targets)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        inputs, targets = self._held_out
        for rows in in_batches(len(inputs), batch_size):
            yield self.batch(inputs[rows], targets[rows])

    def _of_block(self, seed: int, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The training items of a block; the last block is cached for the next batch."""
        if self._kept is None or self._kept[0] != (seed, number):
            drawn = self._collect(counter_generator(seed, number, TRAINING), size, held_out=False)
            self._kept = (seed, number), drawn
        return self._kept[1]

    @cached_property
    def _held_out(self) -> tuple[np.ndarray, np.ndarray]:
        return self._collect(counter_generator(self.seed, 0, EVALUATION), self.evaluation_items, held_out=True)

    @cached_property
    def _held_out_digests(self) -> frozenset[bytes]:
        return frozenset(map(_digest, self._held_out[0]))

    def _collect(self, rng: np.random.Generator, count: int, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        inputs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        seen: set[bytes] = set()
        taken = self._held_out_digests if self.vast and not held_out else frozenset()
        limit = _ROUNDS * max(count, _ROWS)
        drawn = 0
        while len(inputs) < count and drawn < limit:
            rows = min(_ROWS, count - len(inputs) + (4 if self.vast else count // 4 + 4))
            drawn += rows
            for row, target in zip(*self.draw(rng, rows), strict=True):
                digest = _digest(row)
                wrong = digest in taken if self.vast else (digest[0] % 8 == 0) != held_out
                if wrong or (held_out and digest in seen):
                    continue
                seen.add(digest)
                inputs.append(row)
                targets.append(target)
        if len(inputs) < count:
            kind = "held-out" if held_out else "training"
            raise Unsupported(
                f"{self.name} with options that give only {len(inputs)} {kind} items of {count} needed",
                supported="a longer length or a larger vocabulary, so that more items exist",
                nearest=f"evaluation_items={len(inputs)}" if held_out and inputs else f"the defaults of {self.name}",
            )
        return np.stack(inputs[:count]), np.stack(targets[:count])

    def _sizes(self) -> str:
        how = "training leaves them out" if self.vast else "split by a hash of the item"
        return (
            f"training: drawn afresh at each step; held out: {self.evaluation_items} distinct items "
            f"(seed {self.seed}), never in training ({how})"
        )
