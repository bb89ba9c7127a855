"""Backends, which run engines: PyTorch everywhere, faster code where it exists for the tensors' device.

Dispatch depends on the tensors' device and dtype, on what the call needs and on the backend requested, never on which
packages can be imported. A backend requested by name never falls back to another.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch as pytorch

from regard.backends.native import library
from regard.backends.operators import TRANSFORMS, transformed
from regard.contract import Unsupported, closest


@dataclass(frozen=True)
class Engine:
    """One backend's implementation of an engine.

    Attributes:
        run: the function that computes the engine.
        refuses: called with the arguments of `run`, gives the reason why this backend cannot run the call; None if it
            can. Must not depend on the tensors' values.
        flops: called with the arguments of `run`, gives the operations of a recurrence, which are not in the matrix
            products and convolutions that torch counts.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *_: None
    flops: Callable[..., float] = lambda *_: 0.0


@dataclass(frozen=True)
class Backend:
    """A way to run engines.

    Attributes:
        name: the name that users request.
        engines: the engines that it implements.
        devices: device types that it runs on; every device when empty.
        dtypes: accepted dtypes of the first tensor; every dtype when empty.
        missing: why it cannot run at all on this machine; None if it can.
        transforms: whether its engines support forward-mode derivatives and transforms of `torch.func`.
    """

    name: str
    engines: dict[str, Engine] = field(default_factory=dict)
    devices: frozenset[str] = field(default=frozenset())
    dtypes: frozenset[pytorch.dtype] = field(default=frozenset())
    missing: str | None = None
    transforms: bool = True

    def lacks(self, engine: str, device: pytorch.device, dtype: pytorch.dtype | None) -> str | None:
        """The reason why it cannot run an engine on such tensors, whatever the call; None if it can."""
        if engine not in self.engines:
            return f"it does not have the engine {engine}" if engine else "plain functions run on torch"
        if self.missing is not None:
            return self.missing
        if self.name != "torch" and pytorch.compiler.is_exporting():
            return "exported programs may only contain PyTorch operators"
        if not self.transforms and transformed():
            return f"it has no {TRANSFORMS}"
        if self.devices and device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {device.type}"
        if dtype is not None and self.dtypes and dtype not in self.dtypes:
            return f"it computes in {', '.join(sorted(str(d)[6:] for d in self.dtypes))}, not in {str(dtype)[6:]}"
        return None


NATIVE = Backend(
    "native",
    devices=frozenset({"cpu"}),
    dtypes=frozenset(library.DTYPES),
    missing=library.why_missing(),
    transforms=False,
)

TORCH = Backend("torch", engines={"": Engine(lambda: None)})

BACKENDS = [NATIVE, TORCH]
"""Backends in order of preference: a call runs on the first that supports it."""


def add_engine(name: str, **forms: Engine) -> None:
    """Register an engine, with one form for each backend that supports it. Engine packages call this."""
    for backend in (NATIVE, TORCH):
        if backend.name in forms:
            backend.engines[name] = forms[backend.name]


@dataclass(frozen=True)
class Choice:
    """The backend that a call would run on, and the reason."""

    name: str
    reason: str


def engine_names() -> list[str]:
    """Names of the engines that some backend has."""
    return sorted({name for backend in BACKENDS for name in backend.engines if name})


def _candidates(engine: str, requested: str | None) -> list[Backend]:
    known = engine_names()
    if engine and engine not in known:
        raise Unsupported(f"engine {engine!r}", supported=", ".join(known), nearest=closest(engine, known))
    if requested is None:
        return BACKENDS
    names = [b.name for b in BACKENDS]
    if requested not in names:
        raise Unsupported(f"backend {requested!r}", supported=", ".join(names), nearest=closest(requested, names))
    return [b for b in BACKENDS if b.name == requested]


def _because(passed: list[str]) -> str:
    """The reason why a backend runs a call: what the preceding ones lack."""
    return "; ".join(passed) or f"the first of {', '.join(b.name for b in BACKENDS)}"


def _refusal(engine: str, requested: str, reason: str) -> Unsupported:
    what = f"the engine {engine}" if engine else "a plain function"
    others = [b.name for b in BACKENDS if b.name != requested and engine in b.engines and b.missing is None]
    return Unsupported(
        f"backend {requested!r} for {what}: {reason}",
        supported=", ".join(others) or "other calls",
        nearest=others[0] if others else "",
    )


def which_backend(
    engine: str,
    *,
    device: str | pytorch.device = "cpu",
    dtype: pytorch.dtype | None = None,
    backend: str | None = None,
) -> Choice:
    """The backend that would run `engine`, one of :func:`engine_names`, and the reason.

    A particular call may need something that this backend lacks; the next one then runs it, unless a backend was
    requested by name. An empty name means plain functions without an engine, which only run on torch.

    Raises:
        Unsupported: for an unknown engine, device or backend, or a backend that lacks the engine, device or dtype.
    """
    try:
        where = pytorch.device(device)
    except RuntimeError as error:
        raise Unsupported(f"device {device!r}", supported="a device of torch", nearest="cpu") from error
    _note(engine)
    passed: list[str] = []
    for candidate in _candidates(engine, backend):
        reason = candidate.lacks(engine, where, dtype)
        if reason is None:
            return Choice(candidate.name, "requested" if backend else _because(passed))
        if backend is not None:
            raise _refusal(engine, backend, reason)
        passed.append(f"{candidate.name}: {reason}")
    raise Unsupported(f"the engine {engine} on {where.type}", supported="a device that some backend has")


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Use only these backends inside the block, in the whole process, to compare one with another."""
    kept = list(BACKENDS)
    BACKENDS[:] = [b for b in kept if b.name in names]
    try:
        yield
    finally:
        BACKENDS[:] = kept


@dataclass(frozen=True)
class Ran:
    """An engine that ran, with its backend and the reason for it."""

    engine: str
    backend: str
    reason: str


class Record(Counter[Ran]):
    """Counts how often each engine ran, on which backend and why; prints one line for each.

    Attributes:
        asked: engines for which a backend was chosen: those that ran, and those that a mechanism skipped in favour of
            plain torch.
        flops: operations of recurrences in the engines that ran (:class:`Engine`).
    """

    def __init__(self, *counts: Any) -> None:
        super().__init__(*counts)
        self.asked: set[str] = set()
        self.flops = 0.0

    @property
    def backends(self) -> set[str]:
        """Backends that some engine ran on."""
        return {ran.backend for ran in self}

    def __str__(self) -> str:
        found = sorted((ran.engine, ran.backend, ran.reason, count) for ran, count in self.items())
        lines = [f"{engine}: {backend}, {count} times ({reason})" for engine, backend, reason, count in found]
        return "\n".join(lines) or "no engine ran: what was computed is plain PyTorch"


class _Watchers(threading.local):
    """The active records of this thread, outermost first."""

    def __init__(self) -> None:
        self.records: list[Record] = []


_WATCHERS = _Watchers()


@contextmanager
def watch_backends() -> Iterator[Record]:
    """Record which engines this thread runs inside the block, and why on this backend, in a :class:`Record`.

    Compiled programs are not recorded, since they choose once, while being traced::

        with regard.watch_backends() as ran:
            layer(x)
        print(ran)  # gated_recurrence: torch, 1 times (native: it computes in bfloat16, float32, not in float64)
    """
    record = Record()
    _WATCHERS.records.append(record)
    try:
        yield record
    finally:
        _WATCHERS.records.pop()


def _note(engine: str) -> None:
    if not pytorch.compiler.is_compiling():
        for record in _WATCHERS.records:
            record.asked.add(engine)


def prefers_native() -> bool:
    """Return whether native comes first, torch last, and nothing is recorded, so that forms may be called directly."""
    return BACKENDS[0] is NATIVE and NATIVE.missing is None and BACKENDS[-1] is TORCH and not _WATCHERS.records


def execute(engine: str, requested: str | None, device: pytorch.device, dtype: pytorch.dtype, *arguments: Any) -> Any:
    """Run `engine` on the requested backend, or on the first that supports this call.

    Raises:
        Unsupported: if the requested backend cannot run the call.
    """
    _note(engine)
    passed: list[str] = []
    for candidate in BACKENDS if requested is None else _candidates(engine, requested):
        reason = candidate.lacks(engine, device, dtype)
        if reason is None:
            reason = candidate.engines[engine].refuses(*arguments)
        if reason is None:
            if not pytorch.compiler.is_compiling() and _WATCHERS.records:
                ran = Ran(engine, candidate.name, "requested" if requested else _because(passed))
                operations = candidate.engines[engine].flops(*arguments)
                for record in _WATCHERS.records:
                    record[ran] += 1
                    record.flops += operations
            return candidate.engines[engine].run(*arguments)
        if requested is not None:
            raise _refusal(engine, requested, reason)
        passed.append(f"{candidate.name}: {reason}")
    _candidates(engine, requested)  # raises for an engine that no backend has
    raise Unsupported(f"the engine {engine} on {device.type}", supported="a device that some backend has")
