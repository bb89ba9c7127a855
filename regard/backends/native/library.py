"""The shared library of native kernels: finds and loads it, sets its thread pool, and calls its kernels.

Each kernel takes one C struct, for which there is a subclass of :class:`Arguments`; :func:`call` runs the kernel on it.
Callers check shapes, dtypes and strides of tensors before passing pointers: a bad call must never crash.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.contract import Unsupported, one_of

ABI_VERSION = 1
NAMES = ("libregard_native.so", "libregard_native.dylib", "regard_native.dll")
STATUS = {1: "library and package do not belong together: install regard again", 2: "bad argument", 3: "out of memory"}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that kernels read and write, with their numbers in the C interface."""
MOST = 1 << 30
"""The largest size or rank that kernels take, so that it and the sum of two such numbers fit in 32 bits."""


class Arguments(ctypes.Structure):
    """Arguments of a kernel, in the order of its C struct after `size`; those not given are 0.

    ``native/include`` documents them: the fields of a class are those of the struct `regard_KERNEL_args`.
    """

    kernel: ClassVar[str]
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (("size", ctypes.c_int64),)

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(ctypes.sizeof(self), *values, **named)


class Missing(RuntimeError):
    """The library cannot be used; the message says why."""


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Load the library.

    The environment variable REGARD_NATIVE_LIBRARY names another file, or disables the library with ``off``;
    REGARD_INSTRUCTION_SET selects another instruction set than the processor's best.

    Raises:
        Missing: if there is no library, or it belongs to another version.
    """
    given = os.environ.get("REGARD_NATIVE_LIBRARY", "")
    if given.lower() in ("off", "0", "none"):
        raise Missing("switched off by REGARD_NATIVE_LIBRARY")
    paths = [Path(given)] if given else _candidates()
    if not paths:
        raise Missing("not built: there was no C++ compiler when regard was installed")
    try:
        library = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        raise Missing(f"{paths[0].name} does not load: {error}") from error
    try:
        right = library.regard_abi_version() == ABI_VERSION
        library.regard_instruction_set.restype = ctypes.c_char_p
        library.regard_instruction_sets.restype = ctypes.c_char_p
        library.regard_workspace_peak.restype = ctypes.c_int64
    except AttributeError:
        right = False
    if not right:
        raise Missing(f"{paths[0].name} is another version's: install regard again")
    runtime = ctypes.CDLL(None)
    # PyTorch loads its OpenMP runtime with global visibility. GOMP_parallel is GNU's entry point, which LLVM's and
    # Intel's runtimes have too.
    if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_thread_num"):
        library.regard_set_thread_pool(runtime.GOMP_parallel, runtime.omp_get_thread_num)
    forced = os.environ.get("REGARD_INSTRUCTION_SET")
    if forced:
        _set(library, forced)
    return library


def _candidates() -> list[Path]:
    # in an editable installation the library and the Python files are in different folders of the package's path
    spec = importlib.util.find_spec("regard.backends.native")
    folders = [Path(root) for root in (spec.submodule_search_locations if spec else None) or ()]
    return [folder / name for folder in folders for name in NAMES if (folder / name).exists()]


def why_missing() -> str | None:
    """The reason why the library is missing; None if it is loaded."""
    try:
        load()
    except Missing as error:
        return str(error)
    return None


def instruction_set() -> str:
    """The instruction set in use."""
    return load().regard_instruction_set().decode()


def instruction_sets() -> list[str]:
    """Instruction sets that this machine supports, the best one last."""
    return load().regard_instruction_sets().decode().split(",")


@contextmanager
def using_instruction_set(name: str) -> Iterator[None]:
    """Use another instruction set inside the block, in the whole process.

    Raises:
        Unsupported: for one that the library or the processor lacks.
    """
    before = instruction_set()
    _set(load(), name)
    try:
        yield
    finally:
        _set(load(), before)


def _set(library: ctypes.CDLL, name: str) -> None:
    one_of("instruction set", name, library.regard_instruction_sets().decode().split(","))
    library.regard_set_instruction_set(name.encode())


@contextmanager
def poisoned_workspaces() -> Iterator[None]:
    """Fill the kernels' workspaces with NaN before use inside the block, for tests."""
    load().regard_set_poison(1)
    try:
        yield
    finally:
        load().regard_set_poison(0)


def workspace_peak(*, reset: bool = False) -> int:
    """Peak size of the kernels' workspaces in bytes since the last call with `reset`; 0 without a library."""
    return 0 if why_missing() else load().regard_workspace_peak(int(reset))


@cache
def _function(kernel: str) -> Any:
    try:
        return getattr(load(), f"regard_{kernel}")
    except AttributeError:
        raise RuntimeError(f"native kernel {kernel}: {STATUS[1]}") from None


def call(arguments: Arguments) -> None:
    """Run the kernel that these arguments are for. Releases the GIL while it runs.

    Raises:
        RuntimeError: if the kernel rejects its arguments, which the callers' checks should prevent, or is out of
            memory.
    """
    status = _function(arguments.kernel)(ctypes.byref(arguments))
    if status:
        reason = STATUS.get(status, f"status {status}")
        raise RuntimeError(f"native kernel {arguments.kernel}: {reason}")


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data for a field of type `c_void_p`; None for no tensor.

    This is the only code that reads addresses, so that no kernel is given one outside the CPU's memory.
    """
    if x is None:
        return None
    try:
        address = x.data_ptr()
    except RuntimeError as error:  # as for batched gradients
        raise Unsupported(
            "a native kernel on a tensor without memory", supported="plain tensors", nearest="backend='torch'"
        ) from error
    if not x.is_cpu or (address == 0 and x.numel()):
        raise Unsupported(f"a native kernel on a tensor on {x.device} or without memory", supported="tensors on cpu")
    return address


def strided(**tensors: Tensor | None) -> dict[str, Any]:
    """Struct fields for tensors: their addresses and, as ``<name>_strides``, the strides of all axes but the last. The
    caller must keep the tensors alive."""
    fields: dict[str, Any] = {}
    for name, x in tensors.items():
        if x is not None:
            fields[name], fields[f"{name}_strides"] = pointer(x), x.stride()[:-1]
    return fields


Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]

SAMPLED = 1 << 20
"""Largest number of elements in a tensor from :func:`samples`: larger calls take longer than their dispatch anyway."""


def layouts(*tensors: Tensor | None) -> tuple[Layout | None, ...]:
    """Shapes, strides and dtypes of CPU tensors, which determine all checks and struct fields except addresses."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])


def _span(layout: Layout) -> int:
    """Number of elements from the first to the last of a tensor, including gaps."""
    shape, strides, _ = layout
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def samples(layouts: tuple[Layout | None, ...]) -> list[Tensor | None] | None:
    """Tensors with these layouts, to make a struct template from; None if some would be large."""
    if any(x is not None and _span(x) > SAMPLED for x in layouts):
        return None
    return [None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device="cpu") for x in layouts]


def within_range(*numbers: Tensor | int | None, least: int = -MOST) -> bool:
    """Return whether integers, and all elements of integer tensors, are between `least` and :data:`MOST`."""
    for x in numbers:
        if isinstance(x, Tensor):
            low, high = torch.aminmax(x) if x.numel() else (0, 0)
            x_in = least <= int(low) and int(high) <= MOST
        else:
            x_in = x is None or least <= x <= MOST
        if not x_in:
            return False
    return True


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last axis is contiguous, otherwise a copy: kernels take any strides of the other axes."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def same(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise Unsupported unless a tensor has this shape and dtype and is on the CPU."""
    if x.shape != shape or x.dtype != dtype or not x.is_cpu:
        raise Unsupported(
            f"{name} of shape {tuple(x.shape)} in {str(x.dtype)[6:]} on {x.device.type}",
            supported=f"shape {shape} in {str(dtype)[6:]} on cpu",
        )
