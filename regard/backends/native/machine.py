"""The roofline of this machine, measured by the library, against which kernels are judged."""

from __future__ import annotations

import ctypes
import time

import torch

from regard.backends.native import library


class FmaPeak(library.Arguments):
    kernel = "fma_peak"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("seconds", ctypes.c_double),
        ("gflops", ctypes.POINTER(ctypes.c_double)),
    )


class Bandwidth(library.Arguments):
    kernel = "bandwidth"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("passes", ctypes.c_int64),
        ("sink", ctypes.POINTER(ctypes.c_float)),
    )


def fma_peak(seconds: float = 0.2) -> float:
    """Peak GFLOP/s of float32 fused multiply-adds on registers, on as many threads as torch uses."""
    gflops = ctypes.c_double()
    library.call(FmaPeak(threads=torch.get_num_threads(), seconds=seconds, gflops=ctypes.pointer(gflops)))
    return gflops.value


def bandwidth(bytes_touched: int, *, write: bool = False, seconds: float = 0.2) -> float:
    """Bytes per second for a working set of this size: read, or with `write` copied from one half to the other."""
    count = max(1, bytes_touched // (8 if write else 4))
    source = torch.ones(count, dtype=torch.float32, device="cpu")
    target = torch.empty(count, dtype=torch.float32, device="cpu") if write else None
    sink = ctypes.c_float()
    arguments = Bandwidth(
        threads=torch.get_num_threads(),
        source=library.pointer(source),
        target=library.pointer(target),
        count=count,
        passes=max(1, int(1e8 // (4 * count))),
        sink=ctypes.pointer(sink),
    )
    library.call(arguments)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        library.call(arguments)
        best = min(best, time.perf_counter() - start)
    return arguments.passes * count * (8 if write else 4) / best
