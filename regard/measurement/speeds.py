"""Speeds of one core: what it multiplies, adds and exponentiates in a second, what its memory moves, and how large its caches are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from regard.measurement.timing import Timing, rounds

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
NUMBERS = 1 << 16
"""Of a vector that the second cache holds, and that is long beside what a call costs."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Speeds:
    """What one thread does in a second, in float32.

    Attributes:
        products: multiplications that are accumulated, in products of matrices of 512 x 512.
        additions, exponentials, divisions: of numbers in the cache.
        bytes: read and written together, by a copy that no cache holds.
        caches: bytes of each level (L1, L2, L3); empty where the system does not tell.
    """

    products: float
    additions: float
    exponentials: float
    divisions: float
    bytes: float
    caches: Mapping[str, int]


def caches() -> dict[str, int]:
    """Bytes of the caches that a core sees, of data or of both; empty where the system does not tell."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[:-1].isdigit() and size[-1] in _UNITS:
            found[f"L{level}"] = int(size[:-1]) * _UNITS[size[-1]]
    return dict(sorted(found.items()))


def measured_speeds(seconds: float = 2.0) -> Speeds:
    """Measure this machine, on one thread."""
    sizes = caches()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = rounds(
            _actions(max(sizes.values(), default=0)), seconds=seconds, least=3, most=200, clock=time.thread_time
        )
    finally:
        torch.set_num_threads(threads)
    took = {name: Timing.of(values).low for name, values in found.items()}
    moved = 2 * _copied(max(sizes.values(), default=0))
    return Speeds(
        512**3 / min(took["torch"], took.get("onednn", took["torch"])),
        NUMBERS / took["additions"],
        NUMBERS / took["exponentials"],
        NUMBERS / took["divisions"],
        moved / took["copy"],
        sizes,
    )


def _copied(largest: int) -> int:
    return max(2**26, min(4 * largest, 2**28))


def _actions(largest: int) -> dict[str, Callable[[], object]]:
    a, b = (torch.rand(512, 512, device="cpu", dtype=torch.float32) for _ in range(2))
    x = torch.rand(NUMBERS, device="cpu", dtype=torch.float32)
    y = torch.empty_like(x)
    source = torch.zeros(_copied(largest), device="cpu", dtype=torch.uint8)
    target = torch.zeros_like(source)
    actions: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.mm(a, b),
        "additions": lambda: torch.add(x, 0.5, out=y),
        "exponentials": lambda: torch.exp(x, out=y),
        "divisions": lambda: torch.div(x, 1.7, out=y),
        "copy": lambda: target.copy_(source),
    }
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        actions["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
    return actions
