"""A task that needs both precise and cheap mixing: recall of pairs, and the majority symbol of a long noisy text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Pattern
from regard.tasks.generated import MAX_LENGTH, GeneratedTask
from regard.tasks.protocol import IGNORED, check_integer

if TYPE_CHECKING:
    from jaxtyping import Int

SYMBOLS, KEYS, VALUES = 4, 16, 16
ASK = 0
"""The token that asks for the majority; symbols, keys and values are numbered after it."""
SHARE = 0.4
"""Probability of the favoured symbol at each position of the noise; the other symbols share the rest equally."""


class RecallAndMajority(GeneratedTask):
    """Noise of four symbols, then key-value pairs, then questions: a key asks for its value, `ASK` for the symbol that was
    most frequent in the noise. Half of the questions are of each kind; no other position counts.

    Args:
        length: tokens of an item.
        pairs: number of key-value pairs, from 1 to 16.
        questions: two or more; pairs and questions must leave at least eight tokens of the length for the noise.
        evaluation_items: number of held-out items.
        seed: seed of the held-out items.
    """

    name = "recall and majority"
    pattern = Pattern.CAUSAL_SELF
    objective = "next-token"
    vocab_size = 1 + SYMBOLS + KEYS + VALUES
    chance = 0.5 / SYMBOLS + 0.5 / VALUES

    def __init__(
        self, *, length: int = 256, pairs: int = 8, questions: int = 96, evaluation_items: int = 256, seed: int = 0
    ) -> None:
        super().__init__(seed=seed, evaluation_items=evaluation_items)
        self.pairs = check_integer("pairs", pairs, 1, KEYS)
        self.questions = check_integer("questions", questions, 2, MAX_LENGTH)
        self.length = check_integer("length", length, 2 * pairs + questions + 8, MAX_LENGTH)
        self.noise = length - 2 * pairs - questions

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        rows = np.arange(count)[:, None]
        noise = rng.integers(0, SYMBOLS, (count, self.noise))
        favoured = rng.integers(0, SYMBOLS, (count, 1))
        more = (SHARE - 1 / SYMBOLS) / (1 - 1 / SYMBOLS)
        noise = np.where(rng.random((count, self.noise)) < more, favoured, noise)
        counts = (noise[:, :, None] == np.arange(SYMBOLS)).sum(1)
        majority = counts.argmax(1)  # ties go to the first symbol
        keys = rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, : self.pairs]
        values = rng.integers(0, VALUES, (count, self.pairs))
        asked = rng.integers(0, self.pairs, (count, self.questions))
        of_noise = rng.permuted(np.tile(np.arange(self.questions) % 2 == 0, (count, 1)), axis=1)

        inputs = np.full((count, self.length), ASK, dtype=np.int64)
        targets = np.full((count, self.length), IGNORED, dtype=np.int64)
        inputs[:, : self.noise] = 1 + noise
        end = self.noise + 2 * self.pairs
        inputs[:, self.noise : end : 2] = 1 + SYMBOLS + keys
        inputs[:, self.noise + 1 : end : 2] = 1 + SYMBOLS + KEYS + values
        inputs[:, end:] = np.where(of_noise, ASK, 1 + SYMBOLS + keys[rows, asked])
        told = 1 + SYMBOLS + KEYS + values[rows, asked]
        targets[:, end:] = np.where(of_noise, 1 + majority[:, None], told)
        return inputs, targets

    def describe(self) -> str:
        return (
            f"recall and majority: {self.noise} tokens of noise, {self.pairs} pairs, {self.questions} questions, half of them "
            f"about the noise, in {self.length} tokens\n{self._sizes()}"
        )
