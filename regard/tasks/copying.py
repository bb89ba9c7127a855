"""Selective copying: remember the data tokens and ignore the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Pattern, Unsupported
from regard.tasks.generated import MAX_LENGTH, GeneratedTask
from regard.tasks.protocol import IGNORED, check_integer

if TYPE_CHECKING:
    from jaxtyping import Int

NOISE, MARKER, FIRST_DATA = range(3)


class CopyingTask(GeneratedTask):
    """Selective copying (Gu and Dao, "Mamba", arXiv 2312.00752).

    Data tokens are scattered at random positions in noise, followed by as many markers; the target at the i-th marker
    is the i-th data token. The spacing is random, so a mechanism must choose what to keep by content: linear
    time-invariant mechanisms fail. Token 0 is noise, 1 is the marker, and the rest is data.

    Args:
        length: tokens per item (noise, data and markers), from 2 * tokens to 65536.
        tokens: data tokens per item, 1 to 4096.
        alphabet: number of different data tokens, 2 to 65534.
        evaluation_items: number of held-out items, 1 to 65536.
        seed: seed of the held-out items.
    """

    name = "copying"
    pattern = Pattern.CAUSAL_SELF
    objective = "next-token"
    solved = 0.95

    def __init__(
        self, *, length: int = 160, tokens: int = 16, alphabet: int = 16, evaluation_items: int = 512, seed: int = 0
    ) -> None:
        super().__init__(seed=seed, evaluation_items=evaluation_items)
        self.tokens = check_integer("tokens", tokens, 1, 4096)
        self.alphabet = check_integer("alphabet", alphabet, 2, (1 << 16) - 2)
        self.vocab_size: int = alphabet + FIRST_DATA
        self.chance = 1 / alphabet
        self.length = check_integer("length", length, 1, MAX_LENGTH)
        if length < 2 * tokens:
            raise Unsupported(
                f"length={length} for {tokens} data tokens and as many markers",
                supported=f"length from {2 * tokens} to {MAX_LENGTH}, or fewer tokens",
                nearest=f"length={2 * tokens}",
            )

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        context = self.length - self.tokens
        data = rng.integers(FIRST_DATA, self.vocab_size, (count, self.tokens))
        places = np.sort(rng.permuted(np.tile(np.arange(context), (count, 1)), axis=1)[:, : self.tokens], axis=1)
        inputs = np.full((count, self.length), NOISE, dtype=np.int64)
        inputs[:, context:] = MARKER
        np.put_along_axis(inputs, places, data, axis=1)
        targets = np.full((count, self.length), IGNORED, dtype=np.int64)
        targets[:, context:] = data
        return inputs, targets

    def describe(self) -> str:
        inputs, targets = (t[0] for t in self._held_out)
        noise = self.length - 2 * self.tokens
        return "\n".join(
            [
                f"copying: {self.tokens} data tokens among {noise} noise tokens, {self.length} tokens in all",
                f"{self.alphabet} different data tokens; chance {self.chance:.3f}, solved at 0.95",
                self._sizes(),
                "sample: " + " ".join(_spell(token) for token in inputs),
                "answer: " + " ".join(_spell(token) for token in targets[-self.tokens :]),
            ]
        )


def _spell(token: int) -> str:
    return {NOISE: ".", MARKER: "?"}.get(int(token), str(token - FIRST_DATA))
