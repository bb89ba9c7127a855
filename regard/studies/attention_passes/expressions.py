"""The right-hand side of a statement: tokens, the expression tree, and source lines for error messages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from regard.contract import Unsupported, closest

FUNCTIONS = {
    "exp": 1, "log": 1, "sqrt": 1, "abs": 1, "sigmoid": 1, "tanh": 1, "relu": 1, "erf": 1, "cos": 1, "sin": 1,
    "floor": 1, "max": 2, "min": 2, "where": 3,
}  # fmt: skip
"""Number of arguments of each function."""

CONSTANTS = {"inf": math.inf, "pi": math.pi}

_WORD = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>::|<=|>=|==|[-+*/(),\[\]<>=:]))"
)
_LEVELS = (("<", "<=", ">", ">=", "=="), ("+", "-"), ("*", "/"))
"""Infix operators in ascending order of precedence."""


@dataclass(frozen=True)
class Place:
    """A line of a cascade, numbered from 1."""

    line: int
    text: str

    def refuse(self, what: str, *, supported: str, nearest: str = "") -> NoReturn:
        """Raise Unsupported for something in this line."""
        raise Unsupported(f"{what} in line {self.line} ({self.text.strip()})", supported=supported, nearest=nearest)

    def unknown_rank(self, name: str, known: Iterable[str]) -> NoReturn:
        """Refuse the line for an undeclared rank."""
        ranks = sorted(known)
        self.refuse(f"unknown rank {name!r}", supported=", ".join(ranks), nearest=closest(name, ranks))


@dataclass(frozen=True)
class Index:
    """An index into a tensor: a rank's coordinate (``m``), the next (``m+1``), ``first`` (0) or ``last`` (M)."""

    rank: str
    at: str = "here"


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True)
class Coordinate:
    """A rank's coordinate as a number, from 0."""

    rank: str


@dataclass(frozen=True)
class Size:
    """The number of coordinates of a rank."""

    rank: str


@dataclass(frozen=True)
class Read:
    """A tensor, read at one point."""

    tensor: str
    indices: tuple[Index, ...]


@dataclass(frozen=True)
class Apply:
    """An operator or a function with its arguments; ``neg`` is unary minus."""

    op: str
    arguments: tuple[Expression, ...]


Expression = Number | Coordinate | Size | Read | Apply


def parts(expression: Expression) -> Iterator[Expression]:
    """An expression and everything inside it, from left to right."""
    yield expression
    if isinstance(expression, Apply):
        for argument in expression.arguments:
            yield from parts(argument)


def reads(expression: Expression) -> Iterator[Read]:
    """All reads in an expression, from left to right."""
    return (part for part in parts(expression) if isinstance(part, Read))


def operators(expression: Expression) -> Iterator[str]:
    """The operators and functions, each as often as it occurs, except those on coordinates only, which cost nothing."""
    if isinstance(expression, Apply) and any(True for _ in reads(expression)):
        yield expression.op
        for argument in expression.arguments:
            yield from operators(argument)


def coordinates(expression: Expression) -> Iterator[str]:
    """Ranks whose coordinates are used as numbers."""
    return (part.rank for part in parts(expression) if isinstance(part, Coordinate))


def factors(expression: Expression) -> list[Read] | None:
    """The factors of a plain product of tensors; None for any other expression."""
    if isinstance(expression, Read):
        return [expression]
    if isinstance(expression, Apply) and expression.op == "*":
        left, right = (factors(argument) for argument in expression.arguments)
        return None if left is None or right is None else left + right
    return None


class Words:
    """The tokens of a line, read from left to right.

    Args:
        ranks: names of ranks; the same names in capitals are their sizes.
    """

    def __init__(self, text: str, place: Place, ranks: frozenset[str]) -> None:
        self.place, self.ranks = place, ranks
        self.words: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip():
            found = _WORD.match(text, at)
            if found is None:
                place.refuse(f"{text[at:].strip()[0]!r}", supported="names, numbers, + - * / < <= > >= == ( ) [ ] , ::")
            self.words.append((str(found.lastgroup), found[str(found.lastgroup)]))
            at = found.end()
        self.at = 0

    def peek(self) -> str | None:
        """The next token without consuming it; None at the end of the line."""
        return self.words[self.at][1] if self.at < len(self.words) else None

    def take(self, *signs: str) -> str | None:
        """Consume the next token if it is one of these signs; otherwise return None."""
        word = self.peek()
        if word not in signs:
            return None
        self.at += 1
        return word

    def expect(self, sign: str, after: str) -> None:
        """Consume `sign`, or refuse the line."""
        if not self.take(sign):
            self.place.refuse(f"{self._next()} after {after}", supported=f"{sign!r} there")

    def name(self, what: str) -> str:
        """Consume a name, or refuse the line."""
        if self.at == len(self.words) or self.words[self.at][0] != "name":
            self.place.refuse(self._next(), supported=f"the name of {what} there")
        self.at += 1
        return self.words[self.at - 1][1]

    def end(self) -> None:
        """Refuse the line if tokens are left."""
        if self.peek() is not None:
            self.place.refuse(self._next(), supported="an operator, or the end of the line there")

    def rank(self) -> str:
        """Consume the name of a known rank."""
        name = self.name("a rank")
        if name not in self.ranks:
            self.place.unknown_rank(name, self.ranks)
        return name

    def tensor(self) -> Read:
        """Parse a tensor with its indices."""
        name = self.name("a tensor")
        self.expect("[", name)
        return Read(name, self._indices(name))

    def expression(self, level: int = 0) -> Expression:
        """Parse operators of this or higher precedence, from left to right."""
        if level == len(_LEVELS):
            return self._atom()
        found = self.expression(level + 1)
        while op := self.take(*_LEVELS[level]):
            found = Apply(op, (found, self.expression(level + 1)))
        return found

    def _next(self) -> str:
        word = self.peek()
        return "the end of the line" if word is None else repr(word)

    def _indices(self, tensor: str) -> tuple[Index, ...]:
        found: list[Index] = []
        while not self.take("]"):
            if found:
                self.expect(",", f"an index of {tensor}")
            if self.peek() == "0":
                self.at += 1
                found.append(Index("", "first"))
                continue
            name = self.name("a rank")
            if name not in self.ranks and name.lower() in self.ranks:
                found.append(Index(name.lower(), "last"))
            elif name not in self.ranks:
                self.place.unknown_rank(name, self.ranks)
            elif self.take("+"):
                self.expect("1", f"{name}+")
                found.append(Index(name, "next"))
            else:
                found.append(Index(name))
        return tuple(found)

    def _atom(self) -> Expression:
        if self.take("-"):
            inner = self._atom()
            return Number(-inner.value) if isinstance(inner, Number) else Apply("neg", (inner,))
        if self.take("("):
            inner = self.expression()
            self.expect(")", "an expression in brackets")
            return inner
        if self.at < len(self.words) and self.words[self.at][0] == "number":
            self.at += 1
            return Number(float(self.words[self.at - 1][1]))
        name = self.name("a tensor, a rank or a function")
        if self.take("["):
            return Read(name, self._indices(name))
        if self.take("("):
            return self._call(name)
        if name in self.ranks:
            return Coordinate(name)
        if name in CONSTANTS:
            return Number(CONSTANTS[name])
        if name.lower() in self.ranks:
            return Size(name.lower())
        self.place.refuse(
            f"{name!r}",
            supported=f"a tensor with its ranks ({name}[...]), a rank, the size of one in capitals, inf, pi",
        )

    def _call(self, name: str) -> Expression:
        if name not in FUNCTIONS:
            self.place.refuse(f"function {name!r}", supported=", ".join(FUNCTIONS), nearest=closest(name, FUNCTIONS))
        arguments = [self.expression()]
        while self.take(","):
            arguments.append(self.expression())
        self.expect(")", f"the arguments of {name}")
        if len(arguments) != FUNCTIONS[name]:
            self.place.refuse(f"{name} of {len(arguments)}", supported=f"{name} of {FUNCTIONS[name]}")
        return Apply(name, tuple(arguments))
