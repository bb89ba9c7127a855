"""`regard verify`: the equality matrix for every mechanism x pattern x property x dtype x backend, with the observed errors."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from regard.backends import BACKENDS, only, recording
from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Mechanism, Pattern, Waiver
from regard.models.variants import known_name
from regard.workbench.layer_properties import LAYER_PROPERTIES
from regard.workbench.properties import FUNCTION_PROPERTIES, Broken, NotApplicable, Property
from regard.workbench.subjects import Subject

PROPERTIES = [*FUNCTION_PROPERTIES, *LAYER_PROPERTIES]
PROGRAMS = frozenset({"compile", "layer_compile", "layer_export", "layer_lengths", "layer_onnx"})
"""Properties of compiled and exported programs, which take seconds each and tell no more with other numbers."""

DTYPE_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Cell:
    """One measured cell of the matrix.

    Attributes:
        status: ``pass``, ``fail``, or ``waived`` (with the reason in `detail`; where the card names settings under which
            the property holds, the cell was measured with them).
        error: largest error, as a fraction of the largest output; None when the check did not finish.
        tolerance: largest error allowed.
    """

    mechanism: str
    pattern: str
    property: str
    dtype: str
    backend: str
    status: str
    error: float | None
    tolerance: float
    detail: str
    seconds: float


def cell_key(card: Mechanism, pattern: Pattern, prop: Property, dtype: torch.dtype, backend: str) -> dict[str, str]:
    """What identifies a cell."""
    return {
        "mechanism": card.name,
        "pattern": pattern.value,
        "property": prop.name,
        "dtype": DTYPE_NAMES[dtype],
        "backend": backend,
    }


def _waiver(card: Mechanism, property_name: str, pattern: Pattern) -> Waiver | None:
    for waiver in card.waivers:
        if waiver.property == property_name and (not waiver.patterns or pattern in waiver.patterns):
            return waiver
    return None


def check(
    card: Mechanism, pattern: Pattern, prop: Property, dtype: torch.dtype, *, backend: str = "torch", seed: int = 0
) -> Cell | None:
    """Measure one cell; None where the property does not apply, or nothing in it runs on the backend.

    On ``torch`` nothing else runs; on another backend, what it cannot run is left to torch.
    """
    started = time.perf_counter()
    tolerance = card.tolerances[dtype]
    subject = Subject(card, pattern, seed=seed)
    waiver = _waiver(card, prop.name, pattern)
    status, detail, error = "pass", "", None
    if waiver is not None:
        status, detail = "waived", waiver.reason
        if waiver.holds_with is None:
            if backend != "torch":
                return None
            return Cell(
                card.name, pattern.value, prop.name, DTYPE_NAMES[dtype], backend, status, None, tolerance, detail, 0.0
            )
        subject = subject.with_options(dict(waiver.holds_with))
        detail += f" (measured with {', '.join(f'{k}={v}' for k, v in waiver.holds_with.items())})"
    if prop.name in PROGRAMS and backend != "torch" and not _runs_on(backend, subject, dtype):
        return None
    used: set[str] = set()
    try:
        torch.manual_seed(seed)
        with only(backend, "torch"), recording() as used:
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
        last = traceback.extract_tb(failure.__traceback__)[-1]
        detail = f"{type(failure).__name__}: {failure} ({last.name}, line {last.lineno})"
    if backend not in used and backend != "torch":
        return None
    seconds = time.perf_counter() - started
    if error is not None and not math.isfinite(error):
        error = None
    return Cell(
        card.name, pattern.value, prop.name, DTYPE_NAMES[dtype], backend, status, error, tolerance, detail, seconds
    )


def _runs_on(backend: str, subject: Subject, dtype: torch.dtype) -> bool:
    """Whether a call has anything that runs on a backend: to know it, nothing need be compiled."""
    with only(backend, "torch"), recording() as used:
        subject.run(subject.inputs(12, dtype=dtype))
    return backend in used


def verified_backends() -> list[str]:
    """Backends that have cells here: torch, and others that are not missing."""
    return ["torch", *(b.name for b in BACKENDS if b.name != "torch" and b.missing is None)]


def plan(
    names: Iterable[str] | None = None,
    *,
    patterns: Iterable[str | Pattern] | None = None,
    properties: Iterable[str] | None = None,
) -> Iterator[tuple[Mechanism, Pattern, Property, torch.dtype, str]]:
    """The cells that would be measured: mechanism, pattern, property, dtype, backend."""
    chosen = None if patterns is None else [Pattern.parse(p) for p in patterns]
    for name in list_mechanisms() if names is None else names:
        card = get_mechanism(known_name(name))
        for pattern in card.patterns:
            if chosen is not None and pattern not in chosen:
                continue
            for prop in PROPERTIES:
                if properties is not None and prop.name not in properties:
                    continue
                for backend in verified_backends():
                    for dtype in prop.dtypes_on(backend):
                        yield card, pattern, prop, dtype, backend


def verify(
    names: Iterable[str] | None = None,
    *,
    patterns: Iterable[str | Pattern] | None = None,
    properties: Iterable[str] | None = None,
    full: bool = False,
    on_cell: Callable[[Cell], None] | None = None,
    done: Callable[[dict[str, str]], bool] | None = None,
) -> list[Cell]:
    """Measure the equality matrix.

    Args:
        names: mechanisms, with options or without, as ``local:window=32``; all when None.
        patterns: only these patterns.
        properties: only these properties.
        full: compile with inductor, and repeat each cell with two more seeds.
        on_cell: called with each cell as it is measured.
        done: says of a cell's key that it need not be measured again (to resume).

    Returns:
        The cells measured; all is well when none has status ``fail``.
    """
    cells = []
    for card, pattern, prop, dtype, backend in plan(names, patterns=patterns, properties=properties):
        if done is not None and done(cell_key(card, pattern, prop, dtype, backend)):
            continue
        seeds = (0, 1, 2) if full and prop.name not in PROGRAMS else (0,)
        chosen = _inductor(prop) if full else prop
        found = [check(card, pattern, chosen, dtype, backend=backend, seed=seed) for seed in seeds]
        measured = [cell for cell in found if cell is not None]
        if not measured:
            continue
        cell = max(measured, key=lambda c: (c.status == "fail", c.error or 0.0))
        cells.append(cell)
        if on_cell is not None:
            on_cell(cell)
    return cells


def _inductor(prop: Property) -> Property:
    if prop.name not in ("compile", "layer_compile"):
        return prop
    return dataclasses.replace(prop, check=lambda s, d: prop.check(s, d, backend="inductor"))
