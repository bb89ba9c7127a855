"""How an engine runs: PyTorch everywhere, faster code where there is some for the tensor's device.

Dispatch looks at the tensors' device and dtype, at what the call needs and at what was asked for, never at what happens
to be importable. A backend that was asked for by name never falls back to another.
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
    """One backend's way to run an engine.

    Attributes:
        run: the engine.
        refuses: called with the arguments of `run`, why this backend cannot run such a call; None when it can. What it
            looks at must not depend on the tensors' values.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *_: None


@dataclass(frozen=True)
class Backend:
    """A way to run engines.

    Attributes:
        name: what users ask for.
        engines: those that it has.
        devices: device types it runs on; every device when empty.
        dtypes: dtypes of the first tensor that it takes; every dtype when empty.
        missing: why it cannot run at all here; None when it can.
        transforms: whether its engines have forward-mode derivatives and let themselves be transformed by `torch.func`.
    """

    name: str
    engines: dict[str, Engine] = field(default_factory=dict)
    devices: frozenset[str] = field(default=frozenset())
    dtypes: frozenset[pytorch.dtype] = field(default=frozenset())
    missing: str | None = None
    transforms: bool = True

    def lacks(self, engine: str, device: pytorch.device, dtype: pytorch.dtype | None) -> str | None:
        """Why it cannot run an engine on such tensors, whatever the call; None when it can."""
        if engine not in self.engines:
            return f"it does not have the engine {engine}" if engine else "plain functions run on torch"
        if self.missing is not None:
            return self.missing
        if self.name != "torch" and pytorch.compiler.is_exporting():
            return "an exported program has the operators of PyTorch alone"
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
"""In order of preference: the first that can run a call runs it."""


def add_engine(name: str, **forms: Engine) -> None:
    """Let backends run an engine: called by the engine's package, with its form for each backend that has one."""
    for backend in (NATIVE, TORCH):
        if backend.name in forms:
            backend.engines[name] = forms[backend.name]


@dataclass(frozen=True)
class Choice:
    """The backend that would run, and why."""

    name: str
    reason: str


def engine_names() -> list[str]:
    """Engines that some backend has."""
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
    """Why a backend runs a call: what the ones before it lack."""
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

    A call may still need something that this backend lacks; then the next one runs it, unless it was asked for by name.
    An empty name stands for what no engine computes; only torch runs it.

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
    """No other backends than these for a while, in the whole process: to measure one beside another."""
    kept = list(BACKENDS)
    BACKENDS[:] = [b for b in kept if b.name in names]
    try:
        yield
    finally:
        BACKENDS[:] = kept


@dataclass(frozen=True)
class Ran:
    """An engine that ran: on which backend, and why on this one."""

    engine: str
    backend: str
    reason: str


class Record(Counter[Ran]):
    """How often engines ran, and on what; printed as a line for each.

    Attributes:
        asked: engines that a backend was chosen for: those that ran, and those that a mechanism goes without on torch.
    """

    def __init__(self, *counts: Any) -> None:
        super().__init__(*counts)
        self.asked: set[str] = set()

    @property
    def backends(self) -> set[str]:
        """Backends that ran."""
        return {ran.backend for ran in self}

    def __str__(self) -> str:
        found = sorted((ran.engine, ran.backend, ran.reason, count) for ran, count in self.items())
        lines = [f"{engine}: {backend}, {count} times ({reason})" for engine, backend, reason, count in found]
        return "\n".join(lines) or "no engine ran: what was computed is plain PyTorch"


class _Watchers(threading.local):
    """The records that fill in this thread, outermost first."""

    def __init__(self) -> None:
        self.records: list[Record] = []


_WATCHERS = _Watchers()


@contextmanager
def watch_backends() -> Iterator[Record]:
    """What this thread runs inside the block, engine by engine, with the reason: a :class:`Record` that fills as they run.

    Not in compiled programs, which choose once, while they are traced::

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
    """Whether native forms come first here, torch's follow and nobody asks which runs: then a form may be called directly."""
    return BACKENDS[0] is NATIVE and NATIVE.missing is None and BACKENDS[-1] is TORCH and not _WATCHERS.records


def execute(engine: str, requested: str | None, device: pytorch.device, dtype: pytorch.dtype, *arguments: Any) -> Any:
    """Run `engine` on the backend asked for, or on the first that can run this very call.

    Raises:
        Unsupported: when the backend asked for cannot run it.
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
                for record in _WATCHERS.records:
                    record[ran] += 1
            return candidate.engines[engine].run(*arguments)
        if requested is not None:
            raise _refusal(engine, requested, reason)
        passed.append(f"{candidate.name}: {reason}")
    _candidates(engine, requested)  # refuses an engine that nobody has
    raise Unsupported(f"the engine {engine} on {device.type}", supported="a device that some backend has")
