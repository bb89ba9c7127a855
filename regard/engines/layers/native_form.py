"""Operations around the products of a layer, in C++ (`native/src/layers.cpp`): each a single pass over memory.

Backward computes what it needs again from the inputs. Where torch has a single operator, small inputs are left to it:
there a call of one of these, about 20 us and 100 us more with gradients, costs more than it saves.
"""

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
from regard.contract import Unsupported

WIDEST = 16
"""Taps of the widest filter: REGARD_SHORT_CONVOLUTION_WIDEST."""

SMALLEST = {"rms_norm": 1 << 15, "gated_product": 1 << 18}
"""Numbers of the smallest input that is faster here."""

FUNCTIONS = {"silu": 0, "sigmoid": 1}
NO_GATE, GATE_BEFORE, GATE_AFTER = range(3)

Two, Three = ctypes.c_int64 * 2, ctypes.c_int64 * 3


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


class Norm(library.Arguments):
    kernel = "rms_norm"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("rows", Three),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("gate", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("x_strides", Three),
        ("z", ctypes.c_void_p),
        ("z_strides", Three),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


class NormBackward(library.Arguments):
    kernel = "rms_norm_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Norm)),
        ("grad_y", ctypes.c_void_p),
        ("grad_y_strides", Three),
        ("grad_x", ctypes.c_void_p),
        ("grad_z", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
    )


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


class Product(library.Arguments):
    kernel = "gated_product"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("function", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("gate_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p),
        ("grad_y_stride", ctypes.c_int64),
        ("grad_x", ctypes.c_void_p),
        ("grad_gate", ctypes.c_void_p),
    )


def _elsewhere(x: Tensor, *others: Tensor | None) -> str | None:
    """Why tensors cannot be read together."""
    if x.dtype not in library.DTYPES or any(t is not None and t.dtype != x.dtype for t in others):
        return "inputs in several dtypes, or in another than float32 and bfloat16"
    if any(t is not None and t.device.type != "cpu" for t in (x, *others)):
        return "tensors on several devices"
    return None


def small(engine: str, x: Tensor) -> str | None:
    """Why an input is left to torch, which is faster there; None for one that is not."""
    # a traced graph may be run on any number of tokens
    if not torch.compiler.is_compiling() and x.numel() < SMALLEST[engine]:
        return f"fewer than {SMALLEST[engine]} numbers, which are faster elsewhere"
    return None


def _refuse(reason: str | None, what: str) -> None:
    if reason is not None:
        raise Unsupported(f"the native {what} with {reason}", nearest="backend='torch'")


def _like(x: Tensor | None, needed: bool) -> Tensor | None:
    """Contiguous memory for a gradient."""
    return x.new_empty(x.shape) if needed and x is not None else None


def _gradients(found: list[Tensor | None], x: Tensor) -> list[Tensor]:
    """An operator returns tensors: empty ones stand for None."""
    return [x.new_empty(0) if t is None else t for t in found]


def _wanted(grads: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


# Short convolution.


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`regard.engines.layers.short_convolution`."""
    after = 0 if causal else (weight.shape[1] - 1) // 2
    y, last = _convolution(x, weight.float(), None if bias is None else bias.float(), cache, lengths, after, silu)
    return y, last if causal else None


def refuses_short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
    causal: bool,
) -> str | None:
    """Why a call is left to another backend."""
    return _elsewhere(x, weight, bias, cache) or _misfit_convolution(x, weight, bias, cache, lengths)


def _misfit_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, lengths: Tensor | None
) -> str | None:
    if x.ndim != 3 or weight.ndim != 2:
        return "inputs of other than 3 axes"
    batch, _, channels = x.shape
    width = weight.shape[1]
    if not 1 <= width <= WIDEST:
        return f"a filter of {width} taps, not of 1 to {WIDEST}"
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.device.type != "cpu"):
        return "lengths in another dtype than int64 or on another device"
    found = weight.shape[0] == channels and (bias is None or bias.shape == (channels,))
    found = found and (cache is None or cache.shape == (batch, width - 1, channels))
    found = found and (lengths is None or lengths.shape == (batch,))
    return None if found else "shapes that do not belong together"


def _check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, lengths: Tensor | None, after: int
) -> None:
    reason = _elsewhere(x, cache) or _misfit_convolution(x, weight, bias, cache, lengths)
    if reason is None and any(t is not None and t.dtype != torch.float32 for t in (weight, bias)):
        reason = "weights in another dtype than float32"
    if (reason is None and not 0 <= after < weight.shape[1]) or (after and cache is not None):
        reason = f"{after} of {weight.shape[1]} taps after the token"
    _refuse(reason, "short convolution")


def _convolution_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    lengths: Tensor | None,
    after: int,
    silu: bool,
) -> tuple[Convolution, tuple[Tensor | None, ...]]:
    """The struct, and the tensors that it points to."""
    batch, n, channels = x.shape
    x, weight = rows_contiguous(x), weight.contiguous()
    bias, cache = (None if t is None else t.contiguous() for t in (bias, cache))
    lengths = None if lengths is None else lengths.clamp(0, n)  # nobody reads beyond a row, whatever they say
    arguments = Convolution(
        torch.get_num_threads(),
        library.DTYPES[x.dtype],
        batch,
        n,
        channels,
        weight.shape[1],
        after,
        silu,
        pointer(x),
        x.stride()[:2],
        pointer(weight),
        pointer(bias),
        pointer(cache),
        pointer(lengths),
    )
    return arguments, (x, weight, bias, cache, lengths)


def _empty_convolution(x: Tensor, weight: Tensor, after: int) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, weight.shape[1] - 1, channels) if after == 0 else 0)


@operator("short_convolution")
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    lengths: Tensor | None,
    after: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, N, C) and the last inputs (B, width - 1, C), empty when there are taps after the token."""
    _check_convolution(x, weight, bias, cache, lengths, after)
    arguments, alive = _convolution_arguments(x, weight, bias, cache, lengths, after, silu)
    y, last = _empty_convolution(x, weight, after)
    arguments.y, arguments.last = pointer(y), None if after else pointer(last)
    library.call(arguments)
    del alive
    return y, last


@_convolution.register_fake
def _(x, weight, bias, cache, lengths, after, silu):
    return _empty_convolution(x, weight, after)


@operator("short_convolution_backward")
def _convolution_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    lengths: Tensor | None,
    after: int,
    silu: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias and cache, empty where not needed."""
    _check_convolution(x, weight, bias, cache, lengths, after)
    for found, expected in zip((grad_y, grad_last), _empty_convolution(x, weight, after), strict=True):
        if found.shape != expected.shape or found.dtype != x.dtype or found.device != x.device:
            _refuse("gradients of other shapes or dtypes than its outputs", "short convolution")
    arguments, alive = _convolution_arguments(x, weight, bias, cache, lengths, after, silu)
    grads = [_like(t, need) for t, need in zip((x, weight, bias, cache), needed, strict=True)]
    grad_y, grad_last = rows_contiguous(grad_y), grad_last.contiguous()
    library.call(
        ConvolutionBackward(
            ctypes.pointer(arguments),
            pointer(grad_y),
            grad_y.stride()[:2],
            None if after else pointer(grad_last),
            *map(pointer, grads),
        )
    )
    del alive
    return _gradients(grads, x)


@_convolution_backward.register_fake
def _(grad_y, grad_last, x, weight, bias, cache, lengths, after, silu, needed):
    return _gradients([_like(t, need) for t, need in zip((x, weight, bias, cache), needed, strict=True)], x)


def _save_convolution(ctx, inputs, output):
    *tensors, ctx.after, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_convolution(ctx, grad_y, grad_last):
    needed = list(ctx.needs_input_grad[:4])
    grads = _convolution_backward(grad_y, grad_last, *ctx.saved_tensors, ctx.after, ctx.silu, needed)
    return *_wanted(grads, needed), None, None, None


_convolution.register_autograd(_differentiate_convolution, setup_context=_save_convolution)
_convolution_backward.refuse_gradient("second derivatives of the native short convolution")


# RMSNorm.


def rms_norm(
    x: Tensor, weight: Tensor | None, z: Tensor | None, groups: int, eps: float, norm_before_gate: bool
) -> Tensor:
    """See :func:`regard.engines.layers.rms_norm`."""
    return _norm(x, weight, z, groups, eps, norm_before_gate)


def refuses_rms_norm(
    x: Tensor, weight: Tensor | None, z: Tensor | None, groups: int, eps: float, norm_before_gate: bool
) -> str | None:
    """Why a call is left to another backend."""
    return small("rms_norm", x) or _misfit_norm(x, weight, z, groups)


def _misfit_norm(x: Tensor, weight: Tensor | None, z: Tensor | None, groups: int) -> str | None:
    reason = _elsewhere(x, z)
    if reason is not None:
        return reason
    if weight is not None and (weight.dtype != torch.float32 or weight.device.type != "cpu"):
        return "a weight in another dtype than float32 or on another device"
    found = x.ndim >= 1 and x.shape[-1] >= 1 and groups >= 1 and x.shape[-1] % groups == 0
    found = found and (weight is None or weight.shape == x.shape[-1:]) and (z is None or z.shape == x.shape)
    return None if found else "shapes that do not belong together"


def _three_axes(x: Tensor) -> Tensor:
    """Rows numbered by three axes, their features contiguous; a copy only of what has more."""
    x = rows_contiguous(x)
    if x.ndim > 4:
        return x.reshape(-1, 1, 1, x.shape[-1])
    return x[(None,) * (4 - x.ndim)]


def _norm_arguments(
    x: Tensor, weight: Tensor | None, z: Tensor | None, groups: int, eps: float, norm_before_gate: bool
) -> tuple[Norm, tuple[Tensor | None, ...]]:
    x, z = _three_axes(x), None if z is None else _three_axes(z)
    weight = None if weight is None else weight.contiguous()
    arguments = Norm(
        torch.get_num_threads(),
        library.DTYPES[x.dtype],
        tuple(x.shape[:3]),
        groups,
        x.shape[-1] // groups,
        NO_GATE if z is None else GATE_AFTER if norm_before_gate else GATE_BEFORE,
        eps,
        pointer(x),
        x.stride()[:3],
        pointer(z),
        (0, 0, 0) if z is None else z.stride()[:3],
        pointer(weight),
    )
    return arguments, (x, weight, z)


@operator("rms_norm")
def _norm(
    x: Tensor, weight: Tensor | None, z: Tensor | None, groups: int, eps: float, norm_before_gate: bool
) -> Tensor:
    _refuse(_misfit_norm(x, weight, z, groups), "RMSNorm")
    arguments, alive = _norm_arguments(x, weight, z, groups, eps, norm_before_gate)
    y = x.new_empty(x.shape)
    arguments.y = pointer(y)
    library.call(arguments)
    del alive
    return y


@_norm.register_fake
def _(x, weight, z, groups, eps, norm_before_gate):
    return x.new_empty(x.shape)


@operator("rms_norm_backward")
def _norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    groups: int,
    eps: float,
    norm_before_gate: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight and z, empty where not needed."""
    reason = _misfit_norm(x, weight, z, groups) or _elsewhere(x, grad_y)
    if reason is None and grad_y.shape != x.shape:
        reason = "a gradient of another shape than its output's"
    _refuse(reason, "RMSNorm")
    arguments, alive = _norm_arguments(x, weight, z, groups, eps, norm_before_gate)
    grads = [_like(t, need) for t, need in zip((x, weight, z), needed, strict=True)]
    grad_y = _three_axes(grad_y)
    grad_x, grad_weight, grad_z = map(pointer, grads)
    library.call(
        NormBackward(ctypes.pointer(arguments), pointer(grad_y), grad_y.stride()[:3], grad_x, grad_z, grad_weight)
    )
    del alive
    return _gradients(grads, x)


@_norm_backward.register_fake
def _(grad_y, x, weight, z, groups, eps, norm_before_gate, needed):
    return _gradients([_like(t, need) for t, need in zip((x, weight, z), needed, strict=True)], x)


def _save_norm(ctx, inputs, output):
    *tensors, ctx.groups, ctx.eps, ctx.norm_before_gate = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_norm(ctx, grad_y):
    needed = list(ctx.needs_input_grad[:3])
    grads = _norm_backward(grad_y, *ctx.saved_tensors, ctx.groups, ctx.eps, ctx.norm_before_gate, needed)
    return *_wanted(grads, needed), None, None, None


_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
_norm_backward.refuse_gradient("second derivatives of the native RMSNorm")


# Rotary positions.


@lru_cache(maxsize=64)
def _frequencies(rotated: int, base: float, stretch: float) -> ctypes.Array[ctypes.c_double]:
    """Turns per position of each plane."""
    return (ctypes.c_double * (rotated // 2))(
        *(base ** -(i / rotated) / (2 * pi * stretch) for i in range(0, rotated, 2))
    )


def rotary(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float) -> Tensor:
    """See :func:`regard.engines.layers.rotary`."""
    return _rotary(x, positions, rotated, base, stretch, False)


def refuses_rotary(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float) -> str | None:
    """Why a call is left to another backend."""
    return _misfit_rotary(x, positions, rotated)


def _misfit_rotary(x: Tensor, positions: Tensor, rotated: int) -> str | None:
    reason = _elsewhere(x)
    if reason is not None:
        return reason
    if positions.dtype != torch.int64 or positions.device.type != "cpu":
        return "positions in another dtype than int64 or on another device"
    found = x.ndim == 4 and positions.ndim == 2 and positions.shape[0] in (1, x.shape[0])
    found = found and positions.shape[1] == x.shape[2] and 0 <= rotated <= x.shape[3] and rotated % 2 == 0
    return None if found else "shapes that do not belong together"


def _empty_rotated(x: Tensor, reverse: bool) -> Tensor:
    """Rows of a head together, as attention reads them; a gradient as it will be flattened for the projection before."""
    batch, heads, n, width = x.shape
    return x.new_empty(batch, n, heads, width).transpose(1, 2) if reverse else x.new_empty(x.shape)


@operator("rotary")
def _rotary(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float, reverse: bool) -> Tensor:
    """Its gradient is the same with `reverse` negated, so it may be differentiated again and again."""
    _refuse(_misfit_rotary(x, positions, rotated), "rotary positions")
    x = rows_contiguous(x)
    y = _empty_rotated(x, reverse)
    frequencies = _frequencies(rotated, base, stretch)
    library.call(_rotary_arguments(x, positions, rotated, frequencies, reverse, y))
    return y


def _rotary_arguments(
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
def _rotary_template(
    layouts: tuple[library.Layout | None, ...], rotated: int, base: float, stretch: float, threads: int
) -> tuple[bytes, Any] | None:
    """The struct of a call of tensors that lie so (x and positions), but for where, and what it points at; None where the
    kernel does not take them as they are."""
    found = library.samples(layouts)
    if found is None:
        return None
    x, positions = found
    assert x is not None and positions is not None
    if _misfit_rotary(x, positions, rotated) is not None or rows_contiguous(x) is not x:
        return None
    frequencies = _frequencies(rotated, base, stretch)
    y = _empty_rotated(x, False)
    return bytes(_rotary_arguments(x, positions, rotated, frequencies, False, y)), frequencies


def plain_rotary(x: Tensor, positions: Tensor, rotated: int, base: float, stretch: float) -> Tensor | None:
    """:func:`rotary` by the shortest way to the kernel; None for calls that have none, and where a gradient is recorded or
    somebody watches."""
    if not runs_plainly(x, positions):
        return None
    layouts = library.layouts(x, positions)
    template = _rotary_template(layouts, rotated, base, stretch, torch.get_num_threads())
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


def _save_rotary(ctx, inputs, output):
    _, positions, *ctx.turn, ctx.reverse = inputs
    ctx.save_for_backward(positions)


def _differentiate_rotary(ctx, grad_y):
    return _rotary(grad_y, *ctx.saved_tensors, *ctx.turn, not ctx.reverse), None, None, None, None, None


_rotary.register_autograd(_differentiate_rotary, setup_context=_save_rotary)


# Product with a gate.


def gated_product(x: Tensor, gate: Tensor, function: str) -> Tensor:
    """See :func:`regard.engines.layers.gated_product`."""
    return _product(x, gate, FUNCTIONS[function])


def refuses_gated_product(x: Tensor, gate: Tensor, function: str) -> str | None:
    """Why a call is left to another backend."""
    return small("gated_product", x) or _misfit_product(x, gate)


def _misfit_product(x: Tensor, gate: Tensor) -> str | None:
    return _elsewhere(x, gate) or (None if x.ndim >= 1 and x.shape == gate.shape else "inputs of several shapes")


def _matrix(x: Tensor) -> Tensor:
    """Rows at one stride: a copy only where the leading axes are not."""
    return rows_contiguous(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def _run_product(x: Tensor, gate: Tensor, function: int, **more: Any) -> None:
    if function not in FUNCTIONS.values():
        _refuse(f"function {function}", "product with a gate")
    x, gate = _matrix(x), _matrix(gate)
    library.call(
        Product(
            torch.get_num_threads(),
            library.DTYPES[x.dtype],
            *x.shape,
            function,
            pointer(x),
            pointer(gate),
            x.stride(0),
            gate.stride(0),
            **more,
        )
    )


@operator("gated_product")
def _product(x: Tensor, gate: Tensor, function: int) -> Tensor:
    _refuse(_misfit_product(x, gate), "product with a gate")
    y = x.new_empty(x.shape)
    _run_product(x, gate, function, y=pointer(y))
    return y


@_product.register_fake
def _(x, gate, function):
    return x.new_empty(x.shape)


@operator("gated_product_backward")
def _product_backward(grad_y: Tensor, x: Tensor, gate: Tensor, function: int, needed: list[bool]) -> list[Tensor]:
    """Gradients of x and the gate, empty where not needed."""
    _refuse(_misfit_product(x, gate) or _misfit_product(x, grad_y), "product with a gate")
    grads = [_like(t, need) for t, need in zip((x, gate), needed, strict=True)]
    grad_y = _matrix(grad_y)
    grad_x, grad_gate = map(pointer, grads)
    _run_product(
        x,
        gate,
        function,
        grad_y=pointer(grad_y),
        grad_y_stride=grad_y.stride(0),
        grad_x=grad_x,
        grad_gate=grad_gate,
    )
    return _gradients(grads, x)


@_product_backward.register_fake
def _(grad_y, x, gate, function, needed):
    return _gradients([_like(t, need) for t, need in zip((x, gate), needed, strict=True)], x)


def _save_product(ctx, inputs, output):
    *tensors, ctx.function = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_product(ctx, grad_y):
    needed = list(ctx.needs_input_grad[:2])
    return *_wanted(_product_backward(grad_y, *ctx.saved_tensors, ctx.function, needed), needed), None


_product.register_autograd(_differentiate_product, setup_context=_save_product)
_product_backward.refuse_gradient("second derivatives of the native product with a gate")
