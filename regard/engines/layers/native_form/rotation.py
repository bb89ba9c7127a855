"""Rotary positions; the gradient is the rotation in reverse."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import pi
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator, runs_plainly
from regard.engines.layers.native_form.common import refuse, unreadable

Two, Three = ctypes.c_int64 * 2, ctypes.c_int64 * 3


class Rotary(library.Arguments):
    kernel = "rotary"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("reverse", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_strides", Three),
        ("positions", ctypes.c_void_p),
        ("positions_strides", Two),
        ("frequencies", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_strides", Three),
    )


@lru_cache(maxsize=64)
def _frequencies(rotated: int, base: float, stretch: float) -> ctypes.Array[ctypes.c_double]:
    """Turns per position for each plane of rotation."""
    return (ctypes.c_double * (rotated // 2))(
        *(base ** -(i / rotated) / (2 * pi * stretch) for i in range(0, rotated, 2))
    )


def rotary(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float) -> Tensor:
    """See :func:`regard.engines.layers.rotary`."""
    return _rotary(x, positions, rotated, base, stretch, False)


def refuses(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    return _misfit(x, positions, rotated)


def _misfit(x: Tensor, positions: Tensor, rotated: int) -> str | None:
    reason = unreadable(x)
    if reason is not None:
        return reason
    if positions.dtype != torch.int64 or positions.device.type != "cpu":
        return "positions in another dtype than int64 or on another device"
    found = x.ndim == 4 and positions.ndim == 2 and positions.shape[0] in (1, x.shape[0])
    found = found and positions.shape[1] == x.shape[2] and 0 <= rotated <= x.shape[3] and rotated % 2 == 0
    return None if found else "shapes that do not belong together"


def _empty_rotated(x: Tensor, reverse: bool) -> Tensor:
    """An empty result with a head's tokens contiguous, as attention reads them; in reverse, with a token's heads."""
    batch, heads, n, width = x.shape
    return x.new_empty(batch, n, heads, width).transpose(1, 2) if reverse else x.new_empty(x.shape)


@operator("rotary")
def _rotary(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float, reverse: bool) -> Tensor:
    """Its gradient is the same operator with `reverse` negated, so it can be differentiated any number of times."""
    refuse(_misfit(x, positions, rotated), "rotary positions")
    x = rows_contiguous(x)
    y = _empty_rotated(x, reverse)
    frequencies = _frequencies(rotated, base, stretch)
    library.call(_arguments(x, positions, rotated, frequencies, reverse, y))
    return y


def _arguments(
    x: Tensor, positions: Tensor, rotated: int, frequencies: ctypes.Array[ctypes.c_double], reverse: bool, y: Tensor
) -> Rotary:
    return Rotary(
        torch.get_num_threads(),
        library.DTYPES[x.dtype],
        *x.shape,
        rotated,
        reverse,
        pointer(x),
        x.stride()[:3],
        pointer(positions),
        (0 if positions.shape[0] == 1 else positions.stride(0), positions.stride(1)),
        ctypes.addressof(frequencies),
        pointer(y),
        y.stride()[:3],
    )


@lru_cache(maxsize=256)
def _template(
    layouts: tuple[library.Layout | None, ...], rotated: int, base: float, stretch: float, threads: int
) -> tuple[bytes, Any] | None:
    """The struct for x and positions with these layouts, without addresses, and the data that it points to; None if the
    kernel cannot read them as they are."""
    found = library.samples(layouts)
    if found is None:
        return None
    x, positions = found
    assert x is not None and positions is not None
    if _misfit(x, positions, rotated) is not None or rows_contiguous(x) is not x:
        return None
    frequencies = _frequencies(rotated, base, stretch)
    y = _empty_rotated(x, False)
    return bytes(_arguments(x, positions, rotated, frequencies, False, y)), frequencies


def plain(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float) -> Tensor | None:
    """:func:`rotary` by a direct kernel call; None for calls that need the general path, such as those that autograd, a
    profiler or a mode must see."""
    if not runs_plainly(x, positions):
        return None
    layouts = library.layouts(x, positions)
    template = _template(layouts, rotated, base, stretch, torch.get_num_threads())
    if template is None:
        return None
    arguments = Rotary.from_buffer_copy(template[0])
    y = _empty_rotated(x, False)
    arguments.x, arguments.positions, arguments.y = pointer(x), pointer(positions), pointer(y)
    library.call(arguments)
    return y


@_rotary.register_fake
def _(x, positions, rotated, base, stretch, reverse):
    return _empty_rotated(x, reverse)


def _save(ctx, inputs, output):
    _, positions, *ctx.turn, ctx.reverse = inputs
    ctx.save_for_backward(positions)


def _differentiate(ctx, grad_y):
    return _rotary(grad_y, *ctx.saved_tensors, *ctx.turn, not ctx.reverse), None, None, None, None, None


_rotary.register_autograd(_differentiate, setup_context=_save)
