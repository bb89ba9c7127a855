"""Peak memory of an action, and actions that may run out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from regard.backends import watch_backends
from regard.backends.native import library
from regard.contract import out_of_memory
from regard.measurement.memory import peak_memory

T = TypeVar("T")


def peak_and_backends(action: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[int, list[str]]:
    """Peak bytes of a second call of an action, and the sorted backends that ran its engines in that call."""
    action()
    library.workspace_peak(reset=True)
    with watch_backends() as ran:
        peak = peak_memory(action, device=device)
    return peak.bytes + library.workspace_peak(), sorted(ran.backends)


def if_it_fits(action: Callable[[], T]) -> T | None:
    """Return the result of an action, or None if it runs out of memory."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
