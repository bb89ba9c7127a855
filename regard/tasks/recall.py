"""Multi-query associative recall: look up values by their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Pattern, Unsupported
from regard.tasks.generated import MAX_LENGTH, GeneratedTask
from regard.tasks.protocol import IGNORED, check_integer

if TYPE_CHECKING:
    from jaxtyping import Int

FILLER = 0


class RecallTask(GeneratedTask):
    """Multi-query associative recall (MQAR; Arora et al., "Zoology", arXiv 2312.04927).

    An item writes key-value pairs, then asks for keys at random later positions between filler tokens. The target at a
    query is the value last written under its key; no other position counts, and answers are not shown in the input.
    Token 0 is filler; then come the keys and the values, about half of the vocabulary each. The task separates
    mechanisms by what their state can store and address; plain averaging fails.

    With `overwrite` each key is written twice, in random order, and the last value counts: additive states confuse the
    two values, states that erase (the delta rule, arXiv 2406.06484) do not. The state is the bottleneck for ``pairs=16,
    overwrite=True, queries=32, vocab_size=64, length=128``.

    Args:
        length: tokens per item, from 2 * writes + queries to 65536.
        pairs: distinct keys per item, from 1 to the number of keys, (vocab_size - 1) // 2.
        queries: queries per item, 1 or more; keys repeat when there are more queries than `pairs`.
        vocab_size: 5 to 65536.
        overwrite: write each key twice.
        evaluation_items: number of held-out items, 1 to 65536.
        seed: seed of the held-out items.
    """

    name = "recall"
    pattern = Pattern.CAUSAL_SELF
    objective = "next-token"
    solved = 0.9

    def __init__(
        self,
        *,
        length: int = 48,
        pairs: int = 8,
        queries: int = 24,
        vocab_size: int = 32,
        overwrite: bool = False,
        evaluation_items: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed, evaluation_items=evaluation_items)
        self.vocab_size: int = check_integer("vocab_size", vocab_size, 5, 1 << 16)
        self.keys = (vocab_size - 1) // 2
        self.chance = 1 / (vocab_size - 1 - self.keys)
        self.pairs = check_integer("pairs", pairs, 1, self.keys)
        self.queries = check_integer("queries", queries, 1, MAX_LENGTH)
        if not isinstance(overwrite, bool):
            raise Unsupported(f"overwrite={overwrite!r}", supported="true or false")
        self.overwrite = overwrite
        self.writes = 2 * pairs if overwrite else pairs
        shortest = 2 * self.writes + self.queries
        self.length = check_integer("length", length, 1, MAX_LENGTH)
        if length < shortest:
            raise Unsupported(
                f"length={length} for {self.writes} writes (two tokens each) and {self.queries} queries",
                supported=f"length from {shortest} to {MAX_LENGTH}, or fewer pairs and queries",
                nearest=f"length={shortest}",
            )

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        rows = np.arange(count)[:, None]
        keys = _shuffled(rng, np.arange(1, self.keys + 1), count)[:, : self.pairs]
        order = np.broadcast_to(np.arange(self.pairs), (count, self.pairs))
        if self.overwrite:
            order = _shuffled(rng, np.tile(np.arange(self.pairs), 2), count)
        values = rng.integers(1 + self.keys, self.vocab_size, (count, self.writes))
        stored = np.zeros((count, self.pairs), dtype=np.int64)
        for write in range(self.writes):
            stored[rows[:, 0], order[:, write]] = values[:, write]

        inputs = np.full((count, self.length), FILLER, dtype=np.int64)
        targets = np.full((count, self.length), IGNORED, dtype=np.int64)
        end = 2 * self.writes
        inputs[:, 0:end:2] = keys[rows, order]
        inputs[:, 1:end:2] = values
        cycles = -(-self.queries // self.pairs)
        asked = _shuffled(rng, np.tile(np.arange(self.pairs), cycles), count)[:, : self.queries]
        positions = _shuffled(rng, np.arange(end, self.length), count)[:, : self.queries]
        inputs[rows, positions] = keys[rows, asked]
        targets[rows, positions] = stored[rows, asked]
        return inputs, targets

    def describe(self) -> str:
        inputs, targets = (t[0] for t in self._held_out)
        spelled = [self._spell(token) for token in inputs]
        asked = [f"{self._spell(inputs[i])} -> {self._spell(targets[i])}" for i in np.flatnonzero(targets != IGNORED)]
        twice = ", each written twice, the last value wins" if self.overwrite else ""
        return "\n".join(
            [
                f"recall: {self.pairs} key-value pairs{twice}, then {self.queries} queries, in {self.length} tokens",
                f"{self.keys} keys, {self.vocab_size - 1 - self.keys} values; chance {self.chance:.3f}, solved at 0.9",
                self._sizes(),
                "sample: " + " ".join(spelled[:32]) + (" ..." if len(spelled) > 32 else ""),
                "answers: " + ", ".join(asked[:6]) + (", ..." if len(asked) > 6 else ""),
            ]
        )

    def _spell(self, token: int) -> str:
        if token == FILLER:
            return "."
        return f"k{token - 1}" if token <= self.keys else f"v{token - 1 - self.keys}"


def _shuffled(rng: np.random.Generator, values: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, "b n"]:
    """`count` independent permutations of `values`."""
    return rng.permuted(np.tile(values, (count, 1)), axis=1)
