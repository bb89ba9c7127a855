"""Reuse of memory for large results.

The system's allocator returns blocks above 32 MiB to the kernel as soon as they are freed, and faults in and clears new
pages at the next allocation, which takes several times as long as writing them. A recurrent step that returns a new
state each time would spend most of its time on this.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref

import torch
from torch import Tensor

THRESHOLD = 1 << 25
"""Size in bytes above which memory is reused: the largest threshold from which glibc maps blocks."""

_kept: list[mmap.mmap] = []


def empty(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor.

    Large tensors get a block of their own, which is reused for the next tensor of the same size once no tensor or view
    uses it any more. At most one unused block is kept.
    """
    size = 4 * math.prod(shape)
    if size <= THRESHOLD or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    try:
        block = _kept.pop()  # popped in one step, so that no other thread gets it too
    except IndexError:
        block = None
    if block is None or len(block) != size:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
    view = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(view, _keep, block).atexit = False
    return torch.frombuffer(view, dtype=torch.float32).view(shape)


def _keep(block: mmap.mmap) -> None:
    _kept[:] = [block]
