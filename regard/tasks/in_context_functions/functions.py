"""Classes of Boolean functions, and contexts of examples: inputs in {-1, +1}^n with their labels, -1 or +1.

Every class except the nearest neighbours is defined by clauses w, rows of weights: a conjunction is true where w.x is
above |w|_1 - 1, a disjunction where it is above 1 - |w|_1, a threshold where it is above a given number, and a parity
where an odd number of its bits are +1. A conjunction without literals is always true, a disjunction without literals
never.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from regard.contract import Unsupported, closest
from regard.tasks.in_context_functions.teaching import teaching_sequences

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Rule = Literal["all", "any", "threshold", "odd", "nearest"]


@dataclass(frozen=True)
class FunctionClass:
    """A class of functions: how it draws its functions and inputs.

    Attributes:
        name: name of the class.
        rule: how a clause combines its literals: ``all`` or ``any`` of them, ``threshold``, ``odd`` for parity; or
            ``nearest`` for labels of the most similar earlier example.
        clauses: number of clauses; with ``all``, any clause must hold, with ``any``, all clauses.
        literals: share of the coordinates that have a weight.
        signed: whether half of the weights are -1.
        subset: number of coordinates that have a weight, instead of a share.
        largest: weights are integers up to this size, instead of literals.
        thresholds: range from which thresholds are drawn, plus one half.
        planted: share of the examples in which the literals of one clause, fixed within a context, are set so that the
            label is `planted_label` (if there is one clause).
        planted_label: +1 or -1.
        teaches: whether contexts begin with a teaching sequence; no clause of a function then lies inside another.
    """

    name: str
    rule: Rule
    clauses: int = 1
    literals: float = 0.3
    signed: bool = False
    subset: int | None = None
    largest: int | None = None
    thresholds: tuple[int, int] = (0, 0)
    planted: float = 0.0
    planted_label: int = 1
    teaches: bool = False

    @property
    def of_literals(self) -> bool:
        """Whether the number of weights is given by `literals`."""
        return self.subset is None and self.largest is None and self.rule != "nearest"

    @property
    def teachable(self) -> bool:
        """Whether there are teaching sequences: for conjunctions, and for monotone formulas of several conjunctions."""
        return self.rule == "all" and not (self.signed and self.clauses > 1)


TABLED = 10
"""Bits up to which functions are told apart by their truth tables; above, by their clauses."""
RAREST = 100_000
"""Number of functions drawn of which at least one must have no clause inside another."""

_CLASSES = (
    FunctionClass("conjunction", "all", signed=True, planted=0.3),
    FunctionClass("disjunction", "any", signed=True, planted=0.3, planted_label=-1),
    FunctionClass("monotone_conjunction", "all", planted=0.4),
    FunctionClass("teach_conjunction", "all", planted=0.4, teaches=True),
    FunctionClass("teach_biconjunction", "all", signed=True, planted=0.4, teaches=True),
    FunctionClass("sparse_disjunction", "any", subset=4, planted=0.3, planted_label=-1),
    FunctionClass("majority", "threshold"),
    FunctionClass("int_halfspace", "threshold", largest=3),
    FunctionClass("sparse_threshold", "threshold", signed=True, thresholds=(-3, 2)),
    FunctionClass("dnf", "all", clauses=3, literals=0.2, signed=True, planted=0.35),
    FunctionClass("teach_dnf", "all", clauses=3, literals=0.2, planted=0.35, teaches=True),
    FunctionClass("cnf", "any", clauses=3, literals=0.2, signed=True, planted=0.3, planted_label=-1),
    FunctionClass("parity", "odd", literals=0.5),
    FunctionClass("sparse_parity", "odd", subset=2),
    FunctionClass("nearest_neighbours", "nearest"),
)
CLASSES: dict[str, FunctionClass] = {one.name: one for one in _CLASSES}
"""The classes by name, drawn as in the public code of arXiv 2310.03016 for 28 coordinates."""


def function_class(name: str) -> FunctionClass:
    """Return a class by name.

    Raises:
        Unsupported: for an unknown name.
    """
    wanted = str(name).replace("-", "_")
    if wanted not in CLASSES:
        raise Unsupported(f"function {name!r}", supported=", ".join(CLASSES), nearest=closest(wanted, CLASSES))
    return CLASSES[wanted]


@dataclass(frozen=True)
class Functions:
    """Functions of one class, one per context.

    Attributes:
        kind: class of the functions.
        weights: weights of each clause.
        thresholds: values that w.x must exceed.
    """

    kind: FunctionClass
    weights: Int[np.ndarray, "b clauses n"]
    thresholds: Float[np.ndarray, "b clauses"]

    def take(self, chosen: Int[np.ndarray, " c"]) -> Functions:
        """Select functions by index."""
        return Functions(self.kind, self.weights[chosen], self.thresholds[chosen])

    def joined(self, other: Functions) -> Functions:
        """These functions and, after them, others of the same class."""
        pairs = ((self.weights, other.weights), (self.thresholds, other.thresholds))
        return Functions(self.kind, *map(np.concatenate, pairs))

    def identities(self) -> list[bytes]:
        """What is the same for the same functions: truth tables up to `TABLED` bits, else thresholds and clauses, in an
        order and without those that say nothing."""
        count, _, n = self.weights.shape
        if n > TABLED:
            told = np.concatenate([self.weights, self.thresholds[..., None] * 2], -1).astype(np.int16)
            needed = ~redundant(self.weights)
            return [b"".join(sorted(map(bytes, own[kept]))) for own, kept in zip(told, needed, strict=True)]
        inputs = np.array(list(itertools.product((-1, 1), repeat=n)))
        found: list[bytes] = []
        for start in range(0, count, 256):
            some = self.take(np.arange(start, min(start + 256, count)))
            labels = some(np.broadcast_to(inputs, (len(some.weights), *inputs.shape)))
            found += map(bytes, np.packbits(labels > 0, axis=1))
        return found

    def __call__(self, x: Int[np.ndarray, "b m n"]) -> Int[np.ndarray, "b m"]:
        """Label inputs, each context by its own function."""
        if self.kind.rule == "odd":
            ones = ((x > 0).astype(np.int64) @ self.weights[:, 0, :, None])[..., 0]
            return np.where(ones % 2 == 1, 1, -1)
        sums = x.astype(np.int64) @ self.weights.swapaxes(1, 2)  # (b, m, clauses)
        holds = sums > self.thresholds[:, None]
        return np.where(holds.all(2) if self.kind.rule == "any" else holds.any(2), 1, -1)


def with_thresholds(kind: FunctionClass, weights: Int[np.ndarray, "b clauses n"]) -> Functions:
    """Functions with these clauses; not for drawn thresholds."""
    size = np.abs(weights).sum(2)
    own = {"all": size - 1.0, "any": 1.0 - size}
    return Functions(kind, weights, own.get(kind.rule, np.full(size.shape, 0.5)))


def draw_functions(
    kind: FunctionClass, count: int, dimensions: int, rng: np.random.Generator, literals: float | None = None
) -> Functions:
    """Draw `count` functions of a class on `dimensions` coordinates.

    Args:
        literals: share of the coordinates that have a weight; None for the class's own.

    Raises:
        Unsupported: for fewer coordinates than the class needs, and for teaching sequences where nearly all functions
            have a clause inside another.
    """
    shape = (count, kind.clauses, dimensions)
    if kind.teaches and kind.clauses > 1:
        share = kind.literals if literals is None else literals
        return with_thresholds(kind, _irredundant(kind, count, dimensions, rng, share))
    if kind.subset is not None:
        if dimensions < kind.subset:
            raise Unsupported(f"{kind.name} on {dimensions} coordinates", supported=f"{kind.subset} or more")
        ranks = rng.random(shape).argsort(-1).argsort(-1)
        weights = (ranks < kind.subset).astype(np.int64)
    elif kind.largest is not None:
        weights = rng.integers(-kind.largest, kind.largest + 1, shape)
    else:
        drawn, share = rng.random(shape), kind.literals if literals is None else literals
        weights = (drawn < share).astype(np.int64)
        if kind.signed:
            weights[drawn < share / 2] = -1
    functions = with_thresholds(kind, weights)
    low, high = kind.thresholds
    if high > low:
        drawn_thresholds = rng.integers(low, high + 1, shape[:2]) + 0.5
        return Functions(kind, weights, drawn_thresholds)
    return functions


def redundant(weights: Int[np.ndarray, "b clauses n"]) -> Bool[np.ndarray, "b clauses"]:
    """Which clauses hold all literals of another one, so that without them the function is the same; of equal clauses
    all but the first."""
    inside = ((weights[:, :, None] == weights[:, None]) | (weights[:, :, None] == 0)).all(3)  # whether i is in j
    equal = inside & inside.swapaxes(1, 2)
    found: Bool[np.ndarray, "b clauses"] = (inside & ~np.tril(equal)).any(1)
    return found


def _irredundant(
    kind: FunctionClass, count: int, dimensions: int, rng: np.random.Generator, share: float
) -> Int[np.ndarray, "b clauses n"]:
    """Draw monotone clauses until in no function one lies inside another: a teaching sequence would not tell of it."""
    if dimensions < kind.clauses:
        raise Unsupported(f"{kind.name} on {dimensions} coordinates", supported=f"{kind.clauses} or more")
    found = np.zeros((0, kind.clauses, dimensions), dtype=np.int64)
    tried = 0
    while len(found) < count:
        weights = (rng.random((max(count - len(found), 64), kind.clauses, dimensions)) < share).astype(np.int64)
        found = np.concatenate([found, weights[~redundant(weights).any(1)]])
        tried += len(weights)
        if not len(found) and tried >= RAREST:
            raise Unsupported(
                f"{kind.name} on {dimensions} coordinates with literals={share:.3g}, of whose clauses nearly always one "
                f"lies inside another",
                supported="a share nearer to a half, or more dimensions",
                nearest="literals=0.5",
            )
    return found[:count]


@dataclass(frozen=True)
class Contexts:
    """Examples of functions, in the order in which they are shown.

    Attributes:
        x: inputs, -1 and +1.
        y: labels, -1 and +1.
        taught: number of examples in each context that belong to a teaching sequence.
        first: index of the first example whose label follows from earlier examples.
        functions: functions that give the labels; None for nearest neighbours.
    """

    x: Int[np.ndarray, "b m n"]
    y: Int[np.ndarray, "b m"]
    taught: Int[np.ndarray, " b"]
    first: int = 0
    functions: Functions | None = None


def draw_contexts(
    functions: Functions, points: int, rng: np.random.Generator, *, taught: float, ones: float
) -> Contexts:
    """Draw a context for each function.

    Args:
        points: examples per context.
        taught: share of the contexts that begin with a teaching sequence, which is cut if longer than the context.
        ones: probability of +1 for a bit that is not set otherwise.
    """
    kind, weights = functions.kind, functions.weights
    count, _, dimensions = weights.shape
    x = np.where(rng.random((count, points, dimensions)) < ones, 1, -1)
    if kind.planted:
        clause = weights[np.arange(count), rng.integers(kind.clauses, size=count)][:, None]  # (count, 1, n)
        planted = (rng.random((count, points)) < kind.planted)[..., None] & (clause != 0)
        x = np.where(planted, kind.planted_label * clause, x)
    lengths = np.zeros(count, dtype=np.int64)
    if taught:
        chosen = rng.random(count) < taught
        sequences, lengths = teaching_sequences(weights, signed=kind.signed)
        lengths = np.where(chosen, np.minimum(lengths, points), 0)
        shown = min(points, sequences.shape[1])
        within = np.arange(shown) < lengths[:, None]
        x[:, :shown] = np.where(within[..., None], sequences[:, :shown], x[:, :shown])
    return Contexts(x, functions(x), lengths, functions=functions)


def draw_neighbours(
    count: int, points: int, dimensions: int, first: int, rng: np.random.Generator, *, ones: float
) -> Contexts:
    """Draw contexts in which, from example `first` on, each label is that of the most similar earlier input."""
    x = np.where(rng.random((count, points, dimensions)) < ones, 1, -1)
    return Contexts(
        x, neighbour_labels(x, rng.choice([-1, 1], (count, points)), first), np.zeros(count, np.int64), first
    )


def neighbour_labels(x: Int[np.ndarray, "b m n"], drawn: Int[np.ndarray, "b m"], first: int) -> Int[np.ndarray, "b m"]:
    """Labels by the nearest earlier neighbour (cosine; the earliest in case of a tie). Labels before `first` are the
    drawn ones, except that equal inputs get the label of the earliest."""
    similar = x @ x.swapaxes(1, 2)  # n times the cosine, exactly
    similar = np.where(np.tri(x.shape[1], k=-1, dtype=bool), similar, -x.shape[2] - 1)
    nearest, rows, labels = similar.argmax(2), np.arange(len(x)), drawn.copy()
    copied: Bool[np.ndarray, "b m"] = similar.max(2) == x.shape[2]
    copied[:, max(first, 1) :] = True
    for point in range(1, x.shape[1]):
        labels[:, point] = np.where(copied[:, point], labels[rows, nearest[:, point]], labels[:, point])
    return labels
