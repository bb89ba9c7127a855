"""How an engine runs: PyTorch everywhere, faster code where there is some for the tensor's device.

Dispatch looks at the device of the tensors and at what was asked for, never at what happens to be importable. A backend
that was asked for by name never falls back to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import device as Device

from regard.backends.torch import attention, gated_recurrence, softmax_scan
from regard.contract import Unsupported, closest


@dataclass(frozen=True)
class Backend:
    """A way to run engines.

    Attributes:
        name: what users ask for.
        devices: device types it runs on; every device when empty.
        engines: function that runs each engine that it has.
    """

    name: str
    devices: frozenset[str]
    engines: dict[str, Callable[..., Any]]


TORCH = Backend(
    "torch",
    frozenset(),
    {
        "attention": attention.run,
        "gated_recurrence": gated_recurrence.run,
        "softmax_scan": softmax_scan.run,
    },
)

BACKENDS = [TORCH]
"""In order of preference: the first that has the engine for the device runs it."""


@dataclass(frozen=True)
class Choice:
    """The backend that would run, and why."""

    name: str
    reason: str


def engine_names() -> list[str]:
    """Engines that some backend has."""
    return sorted({name for backend in BACKENDS for name in backend.engines})


def _find(engine: str, device: Device, requested: str | None) -> tuple[Backend, str]:
    known = engine_names()
    if engine and engine not in known:
        raise Unsupported(f"engine {engine!r}", supported=", ".join(known), nearest=closest(engine, known))
    if requested is not None:
        names = [b.name for b in BACKENDS]
        for backend in BACKENDS:
            if backend.name == requested:
                if not (engine in backend.engines or (not engine and backend is TORCH)):
                    raise Unsupported(
                        f"backend {requested!r} for " + (f"the engine {engine}" if engine else "a plain function"),
                        supported=", ".join(b.name for b in BACKENDS if engine in b.engines) or TORCH.name,
                    )
                if backend.devices and device.type not in backend.devices:
                    raise Unsupported(
                        f"backend {requested!r} on {device.type}",
                        supported=", ".join(sorted(backend.devices)),
                        nearest=_find(engine, device, None)[0].name,
                    )
                return backend, "requested"
        raise Unsupported(f"backend {requested!r}", supported=", ".join(names), nearest=closest(requested, names))
    if not engine:
        return TORCH, "plain PyTorch, without an engine"
    for backend in BACKENDS:
        if engine in backend.engines and (not backend.devices or device.type in backend.devices):
            return backend, f"the first of {', '.join(b.name for b in BACKENDS)} with {engine} on {device.type}"
    raise Unsupported(f"the engine {engine} on {device.type}", supported="a device that some backend has")


def which_backend(engine: str, *, device: str | Device = "cpu", backend: str | None = None) -> Choice:
    """The backend that would run `engine`, one of :func:`engine_names`, and the reason.

    An empty name stands for what no engine computes; only torch runs it.

    Raises:
        Unsupported: for an unknown engine, device or backend, or a backend that lacks the engine or the device.
    """
    try:
        where = Device(device)
    except RuntimeError as error:
        raise Unsupported(f"device {device!r}", supported="a device of torch", nearest="cpu") from error
    found, reason = _find(engine, where, backend)
    return Choice(found.name, reason)


def resolve(engine: str, device: Device, requested: str | None) -> Callable[..., Any]:
    """The function that runs `engine` for tensors on `device`."""
    backend, _ = _find(engine, device, requested)
    return backend.engines[engine]
