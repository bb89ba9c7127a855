"""ListOps: evaluate a nested list expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Pattern, Unsupported
from regard.tasks.generated import MAX_LENGTH, GeneratedTask
from regard.tasks.protocol import TRAINING, Baseline, Batch, check_integer, counter_generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

OPERATORS = ("[MAX", "[MIN", "[MED", "[SM")
VOCABULARY = ("", *"0123456789", *OPERATORS, "]")
PADDING = 0
FIRST_DIGIT = 1
FIRST_OPERATOR = 11
CLOSE = 15
NEST = 0.4
"""Probability that an argument is itself an expression, if the depth allows."""
AT_ONCE, RAREST = 1 << 21, 100_000
"""Approximate number of tokens drawn at once; number of expressions drawn of which at least one must fit."""
FITTED = 512
"""Training items on which the baseline is fitted."""


class ListOpsTask(GeneratedTask):
    """ListOps (Nangia and Bowman, arXiv 1804.06028; long form in Long Range Arena, arXiv 2011.04006).

    Classify an expression such as ``[MAX 4 3 [MIN 2 3 ] 1 0 ]`` by its value, a digit. The operators are MAX, MIN, MED
    (median) and SM (sum modulo 10), drawn uniformly; an argument is itself an expression with probability 0.4 if
    `depth` allows. Expressions have exact labels, between a quarter of `length` and `length` tokens, and padding on the
    right. `chance` is the share of the commonest value among the held-out items. The baseline knows more: values are
    uneven given the outermost operator, the first token (mostly 9 after MAX and 0 after MIN).

    Args:
        length: tokens of the longest expression, 8 to 65536.
        depth: levels of nesting, 1 to 20.
        arguments: largest number of arguments of an operator, 2 to 32.
        evaluation_items: number of held-out items, 1 to 65536.
        seed: seed of the held-out items.
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
        self.chance = float(np.bincount(labels).max() / len(labels))
        self.baseline: Baseline | None = self._rule()

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, " b"]]:
        inputs, targets = [np.zeros((0, self.length), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        found = tried = 0
        while found < count:
            rows = min(64 + 4 * (count - found), max(16, AT_ONCE // self.length))
            trees = _Trees.grow(rng, rows, self.depth, self.arguments, self.length)
            fitting = ~trees.over & (trees.size >= self.shortest) & (trees.size <= self.length)
            kept = np.flatnonzero(fitting)[: count - found]
            inputs.append(trees.written(kept, self.length))
            targets.append(trees.value[kept])
            found, tried = found + len(kept), tried + len(fitting)
            if not found and tried >= RAREST:
                raise Unsupported(
                    f"length={self.length} with depth={self.depth} and arguments={self.arguments}: expressions of "
                    f"{self.shortest} to {self.length} tokens are too rare",
                    supported="a length nearer to the size of the expressions",
                    nearest="the defaults of listops",
                )
        return np.concatenate(inputs), np.concatenate(targets)

    def batch(self, inputs: Int[np.ndarray, "b n"], targets: Int[np.ndarray, " b"]) -> Batch:
        tokens = torch.from_numpy(inputs)
        return Batch(tokens, torch.from_numpy(targets), valid=tokens != PADDING)

    def _rule(self) -> Baseline:
        """The rule that answers with the commonest value of training items with the same outermost operator."""
        inputs, labels = self._collect(counter_generator(self.seed, 0, TRAINING), FITTED, held_out=False)
        counts = np.zeros((len(VOCABULARY), self.num_classes), dtype=np.int64)
        np.add.at(counts, (inputs[:, 0], labels), 1)
        inputs, labels = self._held_out
        right = counts.argmax(1)[inputs[:, 0]] == labels
        return Baseline.of_answers("the commonest value by outermost operator", right)

    def describe(self) -> str:
        assert self.baseline is not None
        inputs, labels = self._held_out
        sizes = (inputs != PADDING).sum(1)
        shares = np.bincount(labels, minlength=10) / len(labels)
        return "\n".join(
            [
                f"listops: expressions of up to {self.length} tokens, depth {self.depth}, {self.arguments} arguments",
                self._sizes(),
                f"held-out lengths {sizes.min()} to {sizes.max()}, mean {sizes.mean():.0f}; "
                f"values 0 to 9 in shares {' '.join(f'{share:.2f}' for share in shares)}",
                f"chance {self.chance:.3f}; {self.baseline.name}: {self.baseline.score:.3f}",
                f"sample: {spell(inputs[sizes.argmin()])} = {labels[sizes.argmin()]}",
            ]
        )


def spell(tokens: Sequence[int] | Int[np.ndarray, " n"]) -> str:
    """An expression as text, without its padding."""
    return " ".join(VOCABULARY[token] for token in tokens if token != PADDING)


@dataclass(frozen=True)
class _Level:
    """The operators of some expressions at one depth, and their arguments; those of one operator are adjacent.

    Attributes:
        row: (m) index of each operator's expression.
        operator: (m) token of each operator.
        arity: (m) number of its arguments.
        parent: (c) index of each argument's operator.
        nested: (c) whether an argument is an operator of the next level.
        digit: (c) value of the argument otherwise.
    """

    row: Int[np.ndarray, " m"]
    operator: Int[np.ndarray, " m"]
    arity: Int[np.ndarray, " m"]
    parent: Int[np.ndarray, " c"]
    nested: Bool[np.ndarray, " c"]
    digit: Int[np.ndarray, " c"]

    @property
    def first(self) -> Int[np.ndarray, " m"]:
        """Index of each operator's first argument."""
        return self.arity.cumsum() - self.arity

    def filled(self, leaves: Int[np.ndarray, " c"] | int, nested: Int[np.ndarray, " k"]) -> Int[np.ndarray, " c"]:
        """A number for each argument: from `leaves`, or for nested operators, in order, from `nested`."""
        found = np.broadcast_to(leaves, self.digit.shape).copy()
        found[self.nested] = nested
        return found

    def apply(self, arguments: Int[np.ndarray, " c"]) -> Int[np.ndarray, " m"]:
        """Value of each operator. The median of an even count is the mean of the middle two, rounded down."""
        first = self.first
        ranked = arguments[np.lexsort((arguments, self.parent))]
        values = {
            "[MAX": np.maximum.reduceat(arguments, first),
            "[MIN": np.minimum.reduceat(arguments, first),
            "[MED": (ranked[first + (self.arity - 1) // 2] + ranked[first + self.arity // 2]) // 2,
            "[SM": np.add.reduceat(arguments, first) % 10,
        }
        found: np.ndarray = np.choose(self.operator - FIRST_OPERATOR, [values[name] for name in OPERATORS])
        return found


@dataclass(frozen=True)
class _Trees:
    """Expressions, built level by level.

    Attributes:
        levels: levels from the outermost operators inwards.
        sizes: number of tokens of each argument, for each level.
        size: (n) number of tokens of each expression.
        value: (n) value of each expression.
        over: (n) whether an expression was left unfinished because it is too long.
    """

    levels: list[_Level]
    sizes: list[np.ndarray]
    size: Int[np.ndarray, " n"]
    value: Int[np.ndarray, " n"]
    over: Bool[np.ndarray, " n"]

    @classmethod
    def grow(cls, rng: np.random.Generator, count: int, depth: int, arguments: int, longest: int) -> _Trees:
        """Draw `count` expressions; those with more than `longest` tokens are not finished."""
        levels: list[_Level] = []
        row, least, over = np.arange(count), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        for level in range(depth):
            if not len(row):
                break
            operator = rng.integers(FIRST_OPERATOR, CLOSE, len(row))
            arity = rng.integers(2, arguments + 1, len(row))
            parent = np.repeat(np.arange(len(row)), arity)
            nested = (rng.random(len(parent)) < NEST) & (level + 1 < depth)
            least += np.bincount(row, 2 + arity - (4 if level else 0), minlength=count).astype(np.int64)
            least += 3 * np.bincount(row[parent[nested]], minlength=count)  # an operator has at least four tokens
            over |= least > longest
            nested &= ~over[row[parent]]
            levels.append(_Level(row, operator, arity, parent, nested, rng.integers(0, 10, len(parent))))
            row = row[parent[nested]]
        sizes: list[np.ndarray] = []
        value = size = np.zeros(0, dtype=np.int64)
        for one in reversed(levels):
            sizes.append(one.filled(1, size))
            value = one.apply(one.filled(one.digit, value))
            size = 2 + np.add.reduceat(sizes[-1], one.first)
        return cls(levels, sizes[::-1], size, value, over)

    def written(self, kept: Int[np.ndarray, " k"], length: int) -> Int[np.ndarray, "k n"]:
        """Tokens of the expressions `kept`, padded on the right."""
        tokens = np.full((len(kept), length), PADDING, dtype=np.int64)
        line = np.full(len(self.size), -1)
        line[kept] = np.arange(len(kept))
        place = np.zeros(len(self.size), dtype=np.int64)
        for level, sizes in zip(self.levels, self.sizes, strict=True):
            own = line[level.row]
            size = 2 + np.add.reduceat(sizes, level.first)
            tokens[own[own >= 0], place[own >= 0]] = level.operator[own >= 0]
            tokens[own[own >= 0], (place + size - 1)[own >= 0]] = CLOSE
            before = sizes.cumsum() - sizes
            each = place[level.parent] + 1 + before - before[level.first][level.parent]
            leaves = ~level.nested & (own[level.parent] >= 0)
            tokens[own[level.parent[leaves]], each[leaves]] = FIRST_DIGIT + level.digit[leaves]
            place = each[level.nested]
        return tokens


def _longest(depth: int, arguments: int, limit: int) -> int:
    """Number of tokens of the longest expression, at most `limit`."""
    size = 1
    for _ in range(depth):
        size = min(limit, 2 + arguments * size)
    return size
