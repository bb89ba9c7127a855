"""ListOps: the value of a nested list expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Pattern, Unsupported
from regard.tasks.generated import MAX_LENGTH, GeneratedTask
from regard.tasks.protocol import Baseline, Batch, check_integer

if TYPE_CHECKING:
    from jaxtyping import Int

VOCABULARY = ("", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]")
PADDING = 0
FIRST_DIGIT = 1
FIRST_OPERATOR = 11
CLOSE = 15
NEST = 0.4
"""Probability that an argument is an expression of its own, while the depth allows."""


def apply_operator(operator: int, arguments: Sequence[int]) -> int:
    """Value of one operator (a token) on digits. The median of an even number rounds the middle two's mean down."""
    name = VOCABULARY[operator]
    if name == "[MAX":
        return max(arguments)
    if name == "[MIN":
        return min(arguments)
    if name == "[SM":
        return sum(arguments) % 10
    ranked = sorted(arguments)
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) // 2


class ListOpsTask(GeneratedTask):
    """ListOps (Nangia and Bowman, arXiv 1804.06028; long form in Long Range Arena, arXiv 2011.04006).

    Classify an expression such as ``[MAX 4 3 [MIN 2 3 ] 1 0 ]`` by its value, a digit. Operators are MAX, MIN, MED
    (median) and SM (sum modulo 10), drawn evenly; an argument is an expression with probability 0.4 while `depth`
    allows. Expressions are exactly labelled, of a quarter to the whole of `length`, and padded on the right. `chance`
    is the share of the commonest value among the held-out items.

    Args:
        length: tokens of the longest expression, 8 to 65536.
        depth: levels of nesting, 1 to 20.
        arguments: most arguments of an operator, 2 to 32.
        evaluation_items: held-out items, 1 to 65536.
        seed: of the held-out items.
    """

    name = "listops"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"
    vocab_size = len(VOCABULARY)
    num_classes = 10

    def __init__(
        self, *, length: int = 128, depth: int = 4, arguments: int = 5, evaluation_items: int = 512, seed: int = 0
    ) -> None:
        super().__init__(seed=seed, evaluation_items=evaluation_items)
        self.length = check_integer("length", length, 8, MAX_LENGTH)
        self.depth = check_integer("depth", depth, 1, 20)
        self.arguments = check_integer("arguments", arguments, 2, 32)
        self.shortest = max(4, length // 4)
        reach = _longest(depth, arguments, limit=self.length)
        if reach < self.shortest:
            raise Unsupported(
                f"length={length} with depth={depth} and arguments={arguments}, which reach only {reach} tokens",
                supported="a shorter length, or more depth or arguments",
                nearest=f"length={max(8, reach)}",
            )
        _, labels = self._held_out
        self.baseline: Baseline | None = Baseline.majority_class(labels, labels)
        self.chance = self.baseline.score

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, " b"]]:
        inputs = np.full((count, self.length), PADDING, dtype=np.int64)
        targets = np.zeros(count, dtype=np.int64)
        uniform = _Uniform(rng)
        for row in range(count):
            tokens, value = self._expression(uniform)
            inputs[row, : len(tokens)] = tokens
            targets[row] = value
        return inputs, targets

    def _expression(self, uniform: _Uniform) -> tuple[list[int], int]:
        for _ in range(100_000):
            tokens: list[int] = []
            value = self._grow(uniform, tokens, self.depth)
            if self.shortest <= len(tokens) <= self.length:
                return tokens, value
        raise Unsupported(
            f"length={self.length} with depth={self.depth} and arguments={self.arguments}: expressions of "
            f"{self.shortest} to {self.length} tokens are too rare",
            supported="a length nearer to the size of the expressions",
            nearest="the defaults of listops",
        )

    def _grow(self, uniform: _Uniform, tokens: list[int], depth: int) -> int:
        """Append an expression to `tokens` and return its value; stops early once it is too long to be kept."""
        operator = FIRST_OPERATOR + uniform.below(CLOSE - FIRST_OPERATOR)
        tokens.append(operator)
        values: list[int] = []
        for _ in range(2 + uniform.below(self.arguments - 1)):
            if len(tokens) > self.length:
                break
            if depth > 1 and uniform.next() < NEST:
                values.append(self._grow(uniform, tokens, depth - 1))
            else:
                values.append(uniform.below(10))
                tokens.append(FIRST_DIGIT + values[-1])
        tokens.append(CLOSE)
        return apply_operator(operator, values) if values else 0

    def batch(self, inputs: Int[np.ndarray, "b n"], targets: Int[np.ndarray, " b"]) -> Batch:
        tokens = torch.from_numpy(inputs)
        return Batch(tokens, torch.from_numpy(targets), valid=tokens != PADDING)

    def describe(self) -> str:
        inputs, labels = self._held_out
        sizes = (inputs != PADDING).sum(1)
        shares = np.bincount(labels, minlength=10) / len(labels)
        return "\n".join(
            [
                f"listops: expressions of up to {self.length} tokens, depth {self.depth}, {self.arguments} arguments",
                self._sizes(),
                f"held-out lengths {sizes.min()} to {sizes.max()}, mean {sizes.mean():.0f}; "
                f"values 0 to 9 in shares {' '.join(f'{share:.2f}' for share in shares)}; chance {self.chance:.3f}",
                f"sample: {spell(inputs[sizes.argmin()])} = {labels[sizes.argmin()]}",
            ]
        )


def spell(tokens: Sequence[int] | Int[np.ndarray, " n"]) -> str:
    """An expression as text, without its padding."""
    return " ".join(VOCABULARY[token] for token in tokens if token != PADDING)


class _Uniform:
    """Uniform numbers drawn a block at a time: one call to numpy for each would dominate the generator's time."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._rng.random(4096).tolist()
        return self._block.pop()

    def below(self, high: int) -> int:
        return int(self.next() * high)


def _longest(depth: int, arguments: int, limit: int) -> int:
    """Tokens of the longest expression, or `limit` when it is longer."""
    size = 1
    for _ in range(depth):
        size = min(limit, 2 + arguments * size)
    return size
