"""`regard verify`: measures the equality matrix: every mechanism, with its default options and those of each variant,
in every pattern, property, dtype and backend."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from regard.backends import BACKENDS, Record, only, watch_backends
from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Mechanism, Pattern, Unsupported, closest, one_of
from regard.models.variants import known_name
from regard.workbench.verification.properties import FUNCTION_PROPERTIES, Broken, NotApplicable, Property
from regard.workbench.verification.properties.layers import LAYER_PROPERTIES
from regard.workbench.verification.subjects import Subject

PROPERTIES = [*FUNCTION_PROPERTIES, *LAYER_PROPERTIES]
PROGRAMS = frozenset({"compile", "layer_compile", "layer_recompile", "layer_export", "layer_lengths", "layer_onnx"})
"""Properties of compiled and exported programs, which take seconds each; other random numbers show nothing new."""

DTYPE_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


KEY = ("mechanism", "variant", "pattern", "property", "dtype", "backend")
"""The names that identify a cell of the matrix: the first attributes of a :class:`Cell`."""


@dataclass(frozen=True)
class Cell:
    """One measured cell of the matrix.

    Attributes:
        variant: name of the options on the card; ``""`` for the default options.
        status: ``pass``, ``fail``, or ``waived`` (with the reason in `detail`; if the card names settings under which
            the property holds, the cell was measured with them).
        error: largest error, as a fraction of the largest output; None if the check did not finish.
        tolerance: largest error allowed.
    """

    mechanism: str
    variant: str
    pattern: str
    property: str
    dtype: str
    backend: str
    status: str
    error: float | None
    tolerance: float
    detail: str
    seconds: float


@dataclass(frozen=True)
class Place:
    """The position of a cell in the matrix."""

    card: Mechanism
    pattern: Pattern
    prop: Property
    dtype: torch.dtype
    backend: str = "torch"
    variant: str = ""

    @property
    def key(self) -> dict[str, str]:
        """The values that identify a cell, by name."""
        names = self.card.name, self.variant, self.pattern.value, self.prop.name, DTYPE_NAMES[self.dtype]
        return dict(zip(KEY, (*names, self.backend), strict=True))


def check(place: Place, *, seed: int = 0, asked: dict[tuple[Any, ...], set[str]] | None = None) -> Cell | None:
    """Measure one cell; None if the property does not apply, or nothing in it runs on the backend.

    On ``torch`` everything runs in torch; on another backend, torch runs what that backend cannot.

    Args:
        asked: the engines used by cells on torch, to which this cell's are added. If a cell on torch used none, the
            other backends have nothing to run.
    """
    if place.prop.level == "function" and place.variant in place.card.layer_variants:
        return None
    started = time.perf_counter()
    card, pattern, prop, dtype, backend = place.card, place.pattern, place.prop, place.dtype, place.backend
    tolerance = card.tolerances[dtype]
    subject = Subject.of(card, pattern, place.variant, seed=seed)
    waiver = next((w for w in card.waivers if w.concerns(prop.name, pattern, place.variant, dtype, backend)), None)
    status, detail, error = "pass", "", None
    if waiver is not None:
        status, detail = "waived", waiver.reason
        if waiver.holds_with is None:
            if backend != "torch":
                return None
            return Cell(**place.key, status=status, error=None, tolerance=tolerance, detail=detail, seconds=0.0)
        subject = subject.with_options(dict(waiver.holds_with))
        detail += f" (measured with {', '.join(f'{k}={v}' for k, v in waiver.holds_with.items())})"
    asked = {} if asked is None else asked
    everywhere = card.name, place.variant, pattern, prop.name, repr(subject.options), seed
    if backend != "torch" and asked.get(everywhere) == set():
        return None
    ran = Record()
    try:
        if prop.name in PROGRAMS and not _runs_on(place, subject):
            return None
        torch.manual_seed(seed)
        with only(backend, "torch"), watch_backends() as ran:
            error = prop.check(subject, dtype)
        if not error <= tolerance:
            status = "fail"
            detail = f"error {error:.2e} above {tolerance:.0e}" + (f"; {detail}" if detail else "")
    except NotApplicable:
        return None
    except Broken as broken:
        status, detail = "fail", str(broken)
    except Exception as failure:
        status = "fail"
        detail = _told(failure)
    if backend == "torch" and prop.name not in PROGRAMS:
        asked.setdefault(everywhere, set()).update(ran.asked)
    if (
        backend not in ran.backends and backend != "torch" and prop.name not in PROGRAMS
    ):  # compiled programs do not record their backends
        return None
    seconds = time.perf_counter() - started
    if error is not None and not math.isfinite(error):
        error = None
    return Cell(**place.key, status=status, error=error, tolerance=tolerance, detail=detail, seconds=seconds)


def _runs_on(place: Place, subject: Subject) -> bool:
    """Whether a function call runs anything on a place's backend; variants of layers alone count as running on torch.

    The call is not compiled: one that fails raises its own error, not wrapped in a compiler's.
    """
    if place.variant in place.card.layer_variants:
        return place.backend == "torch"
    with only(place.backend, "torch"), watch_backends() as ran:
        subject.run(subject.inputs(12, dtype=place.dtype))
    return place.backend == "torch" or place.backend in ran.backends


def _told(failure: Exception) -> str:
    """An exception in one line: its type, the first line of its message, and where it was raised.

    For compiler errors, which fill a page: the unsupported operation, and its place in the user's code.
    """
    message, *more = str(failure).strip().splitlines() or [""]
    last = traceback.extract_tb(failure.__traceback__)[-1]
    where = f"{last.name}, line {last.lineno}"
    if any(line.startswith("from user code") for line in more):
        met = next((line.partition(":")[2].strip() for line in more if "debug context:" in line), "")
        frames = [line.strip() for line in more if line.lstrip().startswith('File "')]
        message += f": {met}" if met else ""
        where = frames[-1] if frames else where
    return f"{type(failure).__name__}: {message} ({where})"


def definition_alone(card: Mechanism) -> bool:
    """Whether a card has no form except its definition, which loops over padded rows and so cannot be one program."""
    return set(card.forms) == {"reference"}


def verified_backends() -> list[str]:
    """Backends that are measured here: torch, and the others that are available."""
    return ["torch", *(b.name for b in BACKENDS if b.name != "torch" and b.missing is None)]


def plan(
    names: Iterable[str] | None = None,
    *,
    patterns: Iterable[str | Pattern] | None = None,
    properties: Iterable[str] | None = None,
    variants: Iterable[str] = (),
) -> Iterator[Place]:
    """The cells that :func:`verify` would measure with the same arguments.

    Raises:
        Unsupported: for an unknown property, a variant or patterns that none of the mechanisms has, and a module of a
            user's file, which has no definition.
    """
    chosen = None if patterns is None else [Pattern.parse(p) for p in _several(patterns)]
    cards = [
        get_mechanism(known_name(name))
        for name in (list_mechanisms(where=lambda card: bool(card.forms)) if names is None else _several(names))
    ]
    for card in cards:
        if not card.forms:
            raise Unsupported(
                f"{card.name}, a module without a definition to verify it against",
                supported="mechanisms with a card",
                nearest=f"regard detect-patterns FILE.py:{card.name}",
            )
    if chosen and cards and not any(pattern in card.patterns for card in cards for pattern in chosen):
        cards[0].require_pattern(chosen[0])
    wanted = None if properties is None else list(_several(properties))
    for name in wanted or ():
        one_of("property", name, [prop.name for prop in PROPERTIES])
    asked = list(_several(variants))
    known = {variant for card in cards for variant in card.variants}
    for variant in asked:
        if variant not in ("", "all") and variant not in known:
            raise Unsupported(
                f"variant {variant!r}",
                supported=", ".join(["all", *sorted(known)]),
                nearest=closest(variant, known),
            )
    for card in cards:
        for variant in (
            ["", *card.variants] if "all" in asked else [v for v in asked or [""] if v in ("", *card.variants)]
        ):
            for pattern in card.patterns_of(variant):
                if chosen is not None and pattern not in chosen:
                    continue
                for prop in PROPERTIES:
                    if (wanted is not None and prop.name not in wanted) or (
                        prop.name in PROGRAMS and definition_alone(card)
                    ):
                        continue
                    for backend in verified_backends():
                        for dtype in prop.dtypes_on(backend):
                            yield Place(card, pattern, prop, dtype, backend, variant)


def unmeasured(
    names: Iterable[str], cells: Iterable[Cell], *, patterns: Iterable[str | Pattern] | None = None
) -> list[str]:
    """Sentences about mechanisms that have no cells in a requested pattern, or no cells at all.

    Args:
        names, patterns: as passed to :func:`verify`.
        cells: the measured cells.
    """
    measured = {name for cell in cells for name in (cell.mechanism, (cell.mechanism, cell.pattern))}
    said = []
    for card in [get_mechanism(known_name(name)) for name in dict.fromkeys(names)]:
        asked = [] if patterns is None else [Pattern.parse(p) for p in _several(patterns)]
        missing = [p for p in dict.fromkeys(asked) if (card.name, p.value) not in measured]
        for pattern in missing:
            reason = "" if pattern in card.patterns else card.refused.get(pattern, "it lacks the pattern")
            said.append(f"{card.name} has no cells in {pattern.value}" + (f": {reason}" if reason else ""))
        if not asked and card.name not in measured:
            said.append(f"{card.name} has no cells of these properties and variants")
        if definition_alone(card):
            said.append(
                f"{card.name} has its definition alone, which computes padded rows one by one: compiled and exported programs "
                "have no cells before its card has a parallel or chunked form"
            )
    return said


def _several(words: Iterable[Any]) -> Iterable[Any]:
    """Treat a single word as a list of one, not as its letters."""
    return [words] if isinstance(words, str) else words


def verify(
    names: Iterable[str] | None = None,
    *,
    patterns: Iterable[str | Pattern] | None = None,
    properties: Iterable[str] | None = None,
    variants: Iterable[str] = (),
    full: bool = False,
    on_cell: Callable[[Cell], None] | None = None,
    on_place: Callable[[Place], None] | None = None,
    done: Callable[[dict[str, str]], bool] | None = None,
) -> list[Cell]:
    """Measure the equality matrix.

    Args:
        names: one or several mechanisms, optionally with options, as in ``local:window=32``; all when None.
        patterns: measure only these patterns.
        properties: measure only these properties.
        variants: measure with the options of these variants (:attr:`regard.Mechanism.variants`); ``""`` stands for the
            default options, ``"all"`` for the default options and all variants. Only the default options when empty.
        full: compile with inductor, and repeat each cell with two more seeds.
        on_cell: called with each cell as it is measured.
        on_place: called before each place of :func:`plan`, even if nothing is measured there.
        done: returns True for the key of a cell that need not be measured again (to resume).

    Returns:
        The measured cells; everything holds if none has status ``fail``.

    Raises:
        Unsupported: for unknown names, patterns, properties and variants, and for those that none of the mechanisms
            has.
    """
    cells = []
    asked: dict[tuple[Any, ...], set[str]] = {}
    for place in plan(names, patterns=patterns, properties=properties, variants=variants):
        if on_place is not None:
            on_place(place)
        if done is not None and done(place.key):
            continue
        seeds = (0, 1, 2) if full and place.prop.name not in PROGRAMS else (0,)
        chosen = dataclasses.replace(place, prop=_inductor(place.prop)) if full else place
        measured = [cell for seed in seeds if (cell := check(chosen, seed=seed, asked=asked)) is not None]
        if not measured:
            continue
        cell = max(measured, key=lambda c: (c.status == "fail", c.error or 0.0))
        cells.append(cell)
        if on_cell is not None:
            on_cell(cell)
    return cells


def _inductor(prop: Property) -> Property:
    if prop.name not in ("compile", "layer_compile", "layer_recompile"):
        return prop
    return dataclasses.replace(prop, check=lambda s, d: prop.check(s, d, backend="inductor"))
