"""Speeds of one core: arithmetic throughput, memory bandwidth and cache sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from regard.measurement.timing import Timing, rounds

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
NUMBERS = 1 << 16
"""Length of a vector that fits in the L2 cache but is long enough for call overhead not to matter."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Speeds:
    """Throughput of one thread, per second, in float32.

    Attributes:
        products: multiply-accumulates, in products of 512 x 512 matrices.
        additions, exponentials, divisions: operations on numbers in the cache.
        bytes: bytes read plus bytes written, in a copy too large for any cache.
        caches: bytes of each level (L1, L2, L3); empty if the system does not provide them.
    """

    products: float
    additions: float
    exponentials: float
    divisions: float
    bytes: float
    caches: Mapping[str, int]


def caches() -> dict[str, int]:
    """Return the bytes of a core's data and unified caches; empty if the system does not provide them."""
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
    """Measure this machine's speeds on one thread, for about `seconds`."""
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
