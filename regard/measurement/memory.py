"""Measuring the peak memory of a function."""

from __future__ import annotations

import ctypes
import platform
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Peak:
    """The peak memory in use, above what was in use before.

    Attributes:
        bytes: the peak.
        counted: what was counted: ``"tensors"`` (storages seen by :class:`TensorMemory`) or ``"cuda"`` (the caching
            allocator's own figure, which includes workspaces inside operators).
        value: what the function returned.
    """

    bytes: int
    counted: str
    value: Any = None


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of live tensors that were allocated inside the ``with`` block.

    Each storage counts once, however many views it has, from the operator that returns it until it is freed; tensors
    kept for the backward pass count as long as the graph keeps them. A storage that was alive before the block and is
    only written to inside does not count. Scratch memory that an operator (or a native kernel) allocates and frees
    internally is not visible. Single-threaded: operators run by other Python threads are not seen.

    Attributes:
        alive: bytes alive now.
        peak: the largest `alive` so far.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.device_type = torch.device(device).type
        self.alive = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id(storage) for storage in self._storages((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for storage in self._storages(output):
            self._count(storage, known)
        self.peak = max(self.peak, self.alive)
        return output

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        """Return the storages of dense tensors in `tree` on the device; sparse and packed layouts expose none."""
        return [
            leaf.untyped_storage()
            for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor) and leaf.device.type == self.device_type and leaf.layout is torch.strided
        ]

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._sizes:  # a resize in place
            self.alive += size - self._sizes[key]
        elif key in known:  # an input from before the block
            return
        else:
            self._references[key] = weakref.ref(storage, partial(self._free, key))
            self.alive += size
        self._sizes[key] = size

    def _free(self, key: int, _: Any) -> None:
        self._references.pop(key)
        self.alive -= self._sizes.pop(key)


def peak_memory(function: Callable[[], Any], *, device: torch.device | str = "cpu") -> Peak:
    """Run `function` once and measure its peak memory on `device`, above what was in use before.

    On CUDA this is the caching allocator's figure. Elsewhere tensors are counted (see :class:`TensorMemory` for what
    that leaves out); counting slows the run down, so it is never done in a timed run.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        value = function()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, "cuda", value)
    with TensorMemory(device) as memory:
        value = function()
    return Peak(memory.peak, "tensors", value)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors instead of returning it to the system at once.

    Otherwise large tensors cause a page fault for every 4 KiB each time they are allocated, which on a CPU can take
    longer than computing their contents. The process keeps up to 2 GiB more than it uses. regard's own commands call
    this function; other programs can call it once at their start.

    Returns:
        Whether the C library accepted the settings; False if it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, most = -1, -3, (1 << 31) - 1
    return bool(library.mallopt(mmap_threshold, 1 << 30)) and bool(library.mallopt(trim_threshold, most))
