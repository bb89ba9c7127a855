"""Short convolutions, forward and backward."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.engines.layers.native_form.common import addresses, differentiate, refuse, save, unreadable
from regard.engines.layers.problem import ShortConvolution

WIDEST = 16
"""Number of taps of the widest filter: REGARD_SHORT_CONVOLUTION_WIDEST."""

Two = ctypes.c_int64 * 2


class Convolution(library.Arguments):
    kernel = "short_convolution"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("after", ctypes.c_int64),
        ("silu", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_strides", Two),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
    )


class ConvolutionBackward(library.Arguments):
    kernel = "short_convolution_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Convolution)),
        ("grad_y", ctypes.c_void_p),
        ("grad_y_strides", Two),
        ("grad_last", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
        ("grad_cache", ctypes.c_void_p),
    )


def short_convolution(problem: ShortConvolution) -> tuple[Tensor, Tensor | None]:
    """See :func:`regard.engines.layers.short_convolution`."""
    p = problem
    y, last = _convolution(replace(p, weight=p.weight.float(), bias=None if p.bias is None else p.bias.float()))
    return y, last if p.after == 0 else None


def refuses(problem: ShortConvolution) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    return unreadable(problem.x, problem.weight, problem.bias, problem.cache) or _misfit(problem)


def _misfit(p: ShortConvolution) -> str | None:
    if p.x.ndim != 3 or p.weight.ndim != 2:
        return "inputs of other than 3 axes"
    batch, _, channels = p.x.shape
    width, lengths = p.weight.shape[1], p.lengths
    if not 1 <= width <= WIDEST:
        return f"a filter of {width} taps, not of 1 to {WIDEST}"
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.device.type != "cpu"):
        return "lengths in another dtype than int64 or on another device"
    found = p.weight.shape[0] == channels and (p.bias is None or p.bias.shape == (channels,))
    found = found and (p.cache is None or p.cache.shape == (batch, width - 1, channels))
    found = found and (lengths is None or lengths.shape == (batch,))
    return None if found else "shapes that do not belong together"


def _check(p: ShortConvolution) -> None:
    reason = unreadable(p.x, p.cache) or _misfit(p)
    if reason is None and any(t is not None and t.dtype != torch.float32 for t in (p.weight, p.bias)):
        reason = "weights in another dtype than float32"
    if (reason is None and not 0 <= p.after < p.weight.shape[1]) or (p.after and p.cache is not None):
        reason = f"{p.after} of {p.weight.shape[1]} taps after the token"
    refuse(reason, "short convolution")


def _arguments(p: ShortConvolution) -> tuple[Convolution, list[Tensor | None]]:
    """The struct, and the tensors that it points to."""
    batch, n, channels = p.x.shape
    x = rows_contiguous(p.x)
    lengths = None if p.lengths is None else p.lengths.clamp(0, n)  # the kernel must not read beyond a row
    rest = [None if t is None else t.contiguous() for t in (p.weight, p.bias, p.cache, lengths)]
    weight, bias, cache, valid = map(pointer, rest)
    arguments = Convolution(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[x.dtype],
        batch=batch,
        n=n,
        channels=channels,
        width=p.weight.shape[1],
        after=p.after,
        silu=p.silu,
        **library.strided(x=x),
        weight=weight,
        bias=bias,
        cache=cache,
        lengths=valid,
    )
    return arguments, [x, *rest]


def _empty_results(p: ShortConvolution) -> tuple[Tensor, Tensor]:
    batch, _, channels = p.x.shape
    return p.x.new_empty(p.x.shape), p.x.new_empty((batch, p.weight.shape[1] - 1, channels) if p.after == 0 else 0)


@operator("short_convolution")
def _convolution(problem: ShortConvolution) -> tuple[Tensor, Tensor]:
    """y (B, N, C) and the last inputs (B, width - 1, C), empty if there are taps after the token."""
    _check(problem)
    arguments, alive = _arguments(problem)
    y, last = _empty_results(problem)
    arguments.y, arguments.last = pointer(y), None if problem.after else pointer(last)
    library.call(arguments)
    del alive
    return y, last


@_convolution.register_fake
def _(problem: ShortConvolution) -> tuple[Tensor, Tensor]:
    return _empty_results(problem)


@operator("short_convolution_backward")
def _convolution_backward(
    grad_y: Tensor, grad_last: Tensor, problem: ShortConvolution, needed: list[bool]
) -> list[Tensor]:
    """Gradients of x, weight, bias and cache; empty where not needed."""
    _check(problem)
    for found, expected in zip((grad_y, grad_last), _empty_results(problem), strict=True):
        if found.shape != expected.shape or found.dtype != expected.dtype or found.device != expected.device:
            refuse("gradients of other shapes or dtypes than its outputs", "short convolution")
    arguments, alive = _arguments(problem)
    grads = problem.empty_gradients(needed)
    grad_y, grad_last = rows_contiguous(grad_y), grad_last.contiguous()
    last = None if problem.after else pointer(grad_last)
    library.call(
        ConvolutionBackward(ctypes.pointer(arguments), pointer(grad_y), grad_y.stride()[:2], last, *addresses(grads))
    )
    del alive
    return grads


@_convolution_backward.register_fake
def _(grad_y: Tensor, grad_last: Tensor, problem: ShortConvolution, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


_convolution.register_autograd(partial(differentiate, ShortConvolution, _convolution_backward), setup_context=save)
_convolution_backward.refuse_gradient("second derivatives of the native short convolution")
