"""Cascades of extended Einsums: parses text into a checked graph.

A cascade is a text with one statement on each line; ``#`` starts a comment::

    keys: m = m1 * m0                     # the rank whose traversals are counted, and its tiles
    inputs: Q[e, p], K[e, m], V[f, m]
    QK[m, p] = Q[e, p] * K[e, m]          # ranks that are missing on the left are summed over
    LM[m1, p] = QK[m1, m0, p] :: reduce(m0: max)
    RM[0, p] = -inf                       # an iterative rank: from its first coordinate ...
    RM[m1+1, p] = max(RM[m1, p], LM[m1, p])     # ... to the next
    ...
    AV[f, p] = RNV[f, M1, p] / RD[M1, p]  # ... to the last, the size of the rank in capitals

The name of a rank in an expression is its coordinate (``where(m <= p, QK[m, p], -inf)`` is a causal mask), in capitals
its size. Optional headers are ``name:``, ``output:`` (default: the last statement), ``sizes: c = 16, p = m``, and
``keys:`` (default: ``m``). Statements may be in any order. Tensors may have any leading axes before their ranks: batch
and heads are not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from regard.contract import Unsupported, closest
from regard.studies.attention_passes.expressions import (
    Expression,
    Place,
    Read,
    Size,
    Words,
    coordinates,
    parts,
    reads,
)

HEADERS = ("name", "keys", "inputs", "output", "sizes")
REDUCTIONS = ("add", "max", "min", "mul")
EXAMPLE = "AV[f, p] = A[m, p] * V[f, m]"


@dataclass(frozen=True)
class Fiber:
    """The rank that is traversed in tiles.

    Attributes:
        rank: its name.
        outer, inner: the ranks of tiles and of positions in a tile, or None if the cascade names no tiles.
    """

    rank: str
    outer: str | None = None
    inner: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """All names of the rank."""
        return tuple(name for name in (self.rank, self.outer, self.inner) if name is not None)


@dataclass(frozen=True)
class Statement:
    """One Einsum.

    Attributes:
        target: the tensor that the statement defines.
        ranks: ranks of the target; outer and inner rank together are given as the whole rank.
        expression: the value at each point.
        reduced: ranks that are reduced over.
        reduction: the reduction: add, max, min or mul.
        iterates: the rank along which each value is defined by the one before; None for most statements.
        first: whether the statement only defines the first value of an iterated tensor.
        place: the statement's line.
    """

    target: str
    ranks: tuple[str, ...]
    expression: Expression
    reduced: tuple[str, ...]
    reduction: str
    iterates: str | None
    first: bool
    place: Place

    @property
    def reads(self) -> tuple[Read, ...]:
        """Every tensor that the expression reads."""
        return tuple(reads(self.expression))

    @property
    def space(self) -> tuple[str, ...]:
        """The ranks of the iteration space: those of the target and those reduced over."""
        return self.ranks + self.reduced


@dataclass(frozen=True)
class Cascade:
    """A graph of Einsums.

    Attributes:
        name: name of the cascade.
        fiber: the rank of the keys.
        inputs: ranks of each input.
        statements: in topological order: each after those that define what it reads.
        output: name of the output tensor.
        sizes: sizes of ranks given in the text: numbers, or other ranks of the same size; each after the rank it names.
        text: the source text.
    """

    name: str
    fiber: Fiber
    inputs: Mapping[str, tuple[str, ...]]
    statements: tuple[Statement, ...]
    output: str
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    text: str = ""

    @property
    def ranks(self) -> tuple[str, ...]:
        """All ranks, those of the inputs first."""
        named = [rank for ranks in self.inputs.values() for rank in ranks]
        named += [rank for statement in self.statements for rank in statement.space]
        return tuple(dict.fromkeys(named))

    def tensors(self) -> dict[str, tuple[str, ...]]:
        """The ranks of each tensor, inputs first."""
        return {**self.inputs, **{one.target: one.ranks for one in self.statements}}

    def iterates(self) -> dict[str, str]:
        """The iterative rank of each tensor that has one."""
        return {one.target: one.iterates for one in self.statements if one.iterates is not None}


def parse(text: str, name: str = "cascade") -> Cascade:
    """Parse a cascade.

    Args:
        text: a text in the language that the module describes.
        name: name of the cascade if the text has no ``name:``.

    Raises:
        Unsupported: for invalid text, with the line and the word: an unknown rank, a tensor that is never defined or
            defined twice, wrong ranks of a tensor, a cycle of tensors or of sizes, a reduction over a rank that is not
            on the right-hand side.
    """
    headers, lines = _split(text)
    fiber = _fiber(headers.get("keys"))
    inputs = dict(_inputs(headers.get("inputs"), fiber))
    sizes = _sizes(headers.get("sizes"), inputs, fiber)
    ranks = frozenset(rank for own in inputs.values() for rank in own) | set(sizes) | set(fiber.parts)
    statements = [_statement(line, ranks, fiber) for line in lines]
    if not statements:
        raise Unsupported(f"cascade {name!r} without a statement", supported=f"lines like {EXAMPLE}")
    if sizes:
        _check_sizes(headers["sizes"], sizes, inputs, statements)
    ordered = _ordered(statements, inputs, fiber)
    if not any(
        fiber.rank in one.space or fiber.rank in inputs.get(read.tensor, ()) for one in ordered for read in one.reads
    ):
        raise Unsupported(
            f"cascade {name!r}, in which no tensor has the rank {fiber.rank!r} of keys", supported="a line like keys: n"
        )
    output = headers["output"].text.split(":", 1)[1].strip() if "output" in headers else statements[-1].target
    if output not in {one.target for one in statements}:
        defined = [one.target for one in statements]
        headers["output"].refuse(f"output {output!r}", supported=", ".join(defined), nearest=closest(output, defined))
    given = headers["name"].text.split(":", 1)[1].strip() if "name" in headers else name
    return Cascade(given, fiber, inputs, ordered, output, sizes, text)


def _split(text: str) -> tuple[dict[str, Place], list[Place]]:
    """Split a text into headers by name and lines with statements."""
    headers: dict[str, Place] = {}
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        place = Place(number, line.split("#", 1)[0].strip())
        found = re.match(r"(\w+)\s*:(?!:)", place.text)
        if found is None:
            lines += [place] if place.text else []
        elif found[1] not in HEADERS:
            place.refuse(f"{found[1] + ':'!r}", supported=", ".join(HEADERS), nearest=closest(found[1], HEADERS))
        elif found[1] in headers:
            place.refuse(f"a second {found[1] + ':'!r}", supported=f"one, as in line {headers[found[1]].line}")
        else:
            headers[found[1]] = place
    return headers, lines


def _fiber(place: Place | None) -> Fiber:
    if place is None:
        return Fiber("m")
    names = re.fullmatch(r"keys\s*:\s*(\w+)(?:\s*=\s*(\w+)\s*\*\s*(\w+))?", place.text)
    if names is None:
        place.refuse("keys", supported="a rank (keys: m), or a rank and its tiles (keys: m = m1 * m0)")
    return Fiber(names[1], names[2], names[3])


def _sizes(place: Place | None, inputs: Mapping[str, tuple[str, ...]], fiber: Fiber) -> dict[str, int | str]:
    """The sizes by rank, each after the rank it names."""
    sizes: dict[str, int | str] = {}
    if place is None:
        return sizes
    for part in place.text.split(":", 1)[1].split(","):
        found = re.fullmatch(r"\s*([A-Za-z]\w*)\s*=\s*([1-9]\d*|[A-Za-z]\w*)\s*", part)
        if found is None:
            place.refuse(
                f"size {part.strip()!r}", supported="a rank and a number from 1 on (e = 64), or another rank (c = e)"
            )
        rank, said = found.groups()
        if rank in sizes:
            place.refuse(f"a second size of rank {rank!r}", supported="one")
        if rank in (fiber.outer, fiber.inner):
            place.refuse(
                f"a size of rank {rank!r}", supported=f"whole ranks: a run chooses the tiles of {fiber.rank!r}"
            )
        sizes[rank] = int(said) if said.isdigit() else said
    known = {fiber.rank, *sizes, *(rank for own in inputs.values() for rank in own if rank != fiber.outer)}
    for said in sizes.values():
        if isinstance(said, str) and said not in known:
            place.unknown_rank(said, known)
    graph = {rank: {str(said)} & sizes.keys() for rank, said in sizes.items()}
    try:
        return {rank: sizes[rank] for rank in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        told = " = ".join(error.args[1])
        place.refuse(f"a cycle of sizes ({told})", supported="sizes that end in a number or a rank of an input")


def _check_sizes(
    place: Place, sizes: Mapping[str, int | str], inputs: Mapping[str, tuple[str, ...]], statements: list[Statement]
) -> None:
    """Refuse the size of a rank that neither a tensor nor an expression has."""
    used = {rank for own in inputs.values() for rank in own} | {rank for one in statements for rank in one.space}
    used |= {part.rank for one in statements for part in parts(one.expression) if isinstance(part, Size)}
    for rank in sizes:
        if rank not in used and rank not in sizes.values():
            place.refuse(
                f"a size of rank {rank!r}, which no tensor has,",
                supported=", ".join(sorted(used)),
                nearest=closest(rank, used),
            )


def _inputs(place: Place | None, fiber: Fiber) -> Iterator[tuple[str, tuple[str, ...]]]:
    if place is None:
        raise Unsupported("a cascade without inputs", supported="a line like inputs: Q[e, p], K[e, m], V[f, m]")
    body = place.text.split(":", 1)[1]
    words = Words(body, place, frozenset(re.findall(r"\w+", re.sub(r"\w+\s*\[", "[", body))))
    seen: set[str] = set()
    while words.peek() is not None:
        if seen:
            words.expect(",", "an input")
        found = words.tensor()
        if found.tensor in seen:
            place.refuse(f"a second input {found.tensor!r}", supported="different names")
        if any(index.at != "here" for index in found.indices):
            place.refuse(f"input {found.tensor!r} with an index that is no rank", supported="names of ranks: K[e, m]")
        seen.add(found.tensor)
        yield found.tensor, _folded([index.rank for index in found.indices], fiber, place)
    if not seen:
        place.refuse("no input", supported="a line like inputs: Q[e, p], K[e, m], V[f, m]")


def _folded(ranks: list[str], fiber: Fiber, place: Place) -> tuple[str, ...]:
    """The ranks, with outer and inner rank folded into the whole rank."""
    found = list(ranks)
    if fiber.inner in found:
        if fiber.outer not in found:
            place.refuse(f"rank {fiber.inner!r} without {fiber.outer!r}", supported=f"both, or {fiber.rank!r}")
        found.remove(str(fiber.inner))
        found[found.index(str(fiber.outer))] = fiber.rank
    if len(set(found)) < len(found) or {fiber.rank, fiber.outer} <= set(found):
        place.refuse(f"ranks {', '.join(ranks)} of one tensor", supported="each rank once")
    return tuple(found)


def _statement(place: Place, ranks: frozenset[str], fiber: Fiber) -> Statement:
    words = Words(place.text, place, ranks)
    target = words.tensor()
    words.expect("=", f"{target.tensor}[...]")
    expression = words.expression()
    asked: dict[str, str] = {}
    if words.take("::"):
        asked = _reductions(words)
    words.end()
    moved = [index for index in target.indices if index.at in ("next", "first")]
    if len(moved) > 1 or any(index.at == "last" for index in target.indices):
        place.refuse(
            f"{target.tensor} with these indices", supported="one iterative rank: T[m1+1, p], begun by T[0, p]"
        )
    iterates = moved[0].rank or None if moved else None
    first = bool(moved) and moved[0].at == "first"
    own = _folded([index.rank for index in target.indices if index.at != "first"], fiber, place)
    seen = [index.rank for read in reads(expression) for index in read.indices if index.at in ("here", "next")]
    seen += coordinates(expression)
    reduced, reduction = _reduced(place, own, seen, asked, fiber)
    return Statement(target.tensor, own, expression, reduced, reduction, iterates, first, place)


def _reductions(words: Words) -> dict[str, str]:
    if words.name("reduce") != "reduce":
        words.place.refuse("the words after ::", supported="reduce(RANK: OPERATION, ...), as in reduce(m0: max)")
    words.expect("(", "reduce")
    asked: dict[str, str] = {}
    while not words.take(")"):
        if asked:
            words.expect(",", "a reduction")
        rank = words.rank()
        words.expect(":", f"reduce({rank}")
        operation = words.name("an operation")
        if operation not in REDUCTIONS:
            words.place.refuse(
                f"reduction {operation!r}", supported=", ".join(REDUCTIONS), nearest=closest(operation, REDUCTIONS)
            )
        asked[rank] = operation
    if len(set(asked.values())) > 1:
        words.place.refuse("two kinds of reduction", supported="one kind per statement, since their order would matter")
    return asked


def _reduced(
    place: Place, own: tuple[str, ...], seen: list[str], asked: Mapping[str, str], fiber: Fiber
) -> tuple[tuple[str, ...], str]:
    """The ranks that a statement reduces over, and the reduction."""
    whole = {fiber.rank, fiber.inner} & set(seen)
    there = [fiber.rank if whole and rank in fiber.parts else rank for rank in dict.fromkeys(seen)]
    reduced = []
    for rank in dict.fromkeys(there):
        if rank == fiber.rank and rank not in own:
            reduced.append(str(fiber.inner) if fiber.outer in own else rank)
        elif rank not in own:
            reduced.append(rank)
    equal = {fiber.rank, *fiber.parts} if fiber.rank in reduced else set()
    for rank in asked:
        if rank not in reduced and rank not in equal:
            where = (
                "is on the left"
                if rank in own or (rank in fiber.parts and fiber.rank in own)
                else "is not on the right"
            )
            place.refuse(
                f"reduction over {rank!r}, which {where}", supported=", ".join(reduced) or "no reduction there"
            )
    reduction = next(iter(asked.values()), "add")
    missing = [rank for rank in reduced if rank not in asked and not (rank in equal and equal & set(asked))]
    if asked and missing and reduction != "add":
        place.refuse(
            f"reduce over {', '.join(asked)} alone", supported=f"all that is missing on the left: {', '.join(reduced)}"
        )
    return tuple(reduced), reduction


def _ordered(statements: list[Statement], inputs: Mapping[str, tuple[str, ...]], fiber: Fiber) -> tuple[Statement, ...]:
    """The statements in topological order, after checking that every read matches a definition."""
    main: dict[str, Statement] = {}
    begun: dict[str, Statement] = {}
    for one in statements:
        known = begun if one.first else main
        if one.target in known or one.target in inputs:
            where = f"line {known[one.target].place.line}" if one.target in known else "the inputs"
            one.place.refuse(f"{one.target!r} defined again", supported=f"other names: it is in {where}")
        known[one.target] = one
    defined = {**inputs, **{name: one.ranks for name, one in main.items()}}
    for name, one in begun.items():
        if name not in main or main[name].iterates is None:
            one.place.refuse(
                f"{name}[0]", supported=f"the first value of a tensor that is iterated: {name}[m1+1] = ..."
            )
        left = tuple(rank for rank in main[name].ranks if rank != main[name].iterates)
        if one.ranks != left:
            one.place.refuse(f"{name}[0] with ranks {', '.join(one.ranks)}", supported=", ".join(left))
    for one in main.values():
        if one.iterates is not None and one.target not in begun:
            one.place.refuse(f"{one.target!r} without a first value", supported=f"a line {one.target}[0, ...] = ...")
        if one.iterates is not None and one.iterates != (fiber.outer or fiber.rank):
            one.place.refuse(
                f"iteration over {one.iterates!r}", supported=f"iteration over {fiber.outer or fiber.rank}"
            )
    for one in statements:
        _check_reads(one, defined, main, fiber)
    return _sorted(statements, main, begun)


def _check_reads(
    one: Statement, defined: Mapping[str, tuple[str, ...]], main: Mapping[str, Statement], fiber: Fiber
) -> None:
    for read in one.reads:
        if read.tensor not in defined:
            one.place.refuse(
                f"tensor {read.tensor!r}, which is never defined,",
                supported=", ".join(defined),
                nearest=closest(read.tensor, list(defined)),
            )
        ranks = defined[read.tensor]
        iterative = main[read.tensor].iterates if read.tensor in main else None
        named = [index.rank if index.at != "first" else str(iterative) for index in read.indices]
        found = _folded(named, fiber, one.place)
        told = f"{read.tensor}[{', '.join(ranks)}]"
        if found != ranks:
            shape = ", ".join(index.rank or "0" for index in read.indices)
            one.place.refuse(f"{read.tensor}[{shape}], of another shape than it has,", supported=told)
        for index in read.indices:
            if index.at != "here" and (iterative is None or index.rank not in ("", iterative)):
                one.place.refuse(
                    f"{read.tensor} at a {index.at} coordinate", supported=f"{told}: only iterative ranks have others"
                )
    points = {index.rank for read in one.reads for index in read.indices if index.at in ("here", "next")}
    points |= set(coordinates(one.expression))
    for rank in one.ranks:
        parts = fiber.parts if rank == fiber.rank else (rank, fiber.rank) if rank == fiber.outer else (rank,)
        if not one.first and rank != one.iterates and not points & set(parts):
            one.place.refuse(
                f"rank {rank!r} of {one.target}, which nothing on the right has,", supported=", ".join(sorted(points))
            )


def _sorted(
    statements: list[Statement], main: Mapping[str, Statement], begun: Mapping[str, Statement]
) -> tuple[Statement, ...]:
    graph: dict[int, list[int]] = {}
    number = {id(one): at for at, one in enumerate(statements)}
    for one in statements:
        before = []
        for read in one.reads:
            if read.tensor not in main:
                continue
            source = main[read.tensor]
            at = {index.at for index in read.indices if index.rank == source.iterates or index.at == "first"}
            if source.iterates is not None and at <= {"here", "first"}:
                before.append(number[id(begun[read.tensor])])
            else:
                before.append(number[id(source)])
        if one.iterates is not None:
            before.append(number[id(begun[one.target])])
        graph[number[id(one)]] = before
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        around = [statements[at] for at in reversed(error.args[1])]
        told = " <- ".join(one.target for one in around)
        around[0].place.refuse(
            f"a cycle ({told})", supported="tensors that come before, or the coordinate before of an iterative one"
        )
    return tuple(statements[at] for at in order)
