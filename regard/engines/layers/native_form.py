"""Operations around the products of a layer, in C++ (`native/src/layers.cpp`): each a single pass over memory.

Backward computes what it needs again from the inputs. Where torch has a single operator, small inputs are left to it:
there a call of one of these, about 20 us and 100 us more with gradients, costs more than it saves.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache
from math import pi
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.layers.problem import GATE_FUNCTIONS, GatedProduct, RMSNorm, ShortConvolution

WIDEST = 16
"""Taps of the widest filter: REGARD_SHORT_CONVOLUTION_WIDEST."""

SMALLEST = {"rms_norm": 1 << 15, "gated_product": 1 << 18}
"""Numbers of the smallest input that is faster here."""

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


def _pointers(grads: list[Tensor]) -> list[int | None]:
    """Addresses of gradients, None for those that are not needed."""
    return [pointer(x) if x.numel() else None for x in grads]


# Short convolution.


def short_convolution(problem: ShortConvolution) -> tuple[Tensor, Tensor | None]:
    """See :func:`regard.engines.layers.short_convolution`."""
    p = problem
    y, last = _convolution(replace(p, weight=p.weight.float(), bias=None if p.bias is None else p.bias.float()))
    return y, last if p.after == 0 else None


def refuses_short_convolution(problem: ShortConvolution) -> str | None:
    """Why a call is left to another backend."""
    return _elsewhere(problem.x, problem.weight, problem.bias, problem.cache) or _misfit_convolution(problem)


def _misfit_convolution(p: ShortConvolution) -> str | None:
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


def _check_convolution(p: ShortConvolution) -> None:
    reason = _elsewhere(p.x, p.cache) or _misfit_convolution(p)
    if reason is None and any(t is not None and t.dtype != torch.float32 for t in (p.weight, p.bias)):
        reason = "weights in another dtype than float32"
    if (reason is None and not 0 <= p.after < p.weight.shape[1]) or (p.after and p.cache is not None):
        reason = f"{p.after} of {p.weight.shape[1]} taps after the token"
    _refuse(reason, "short convolution")


def _convolution_arguments(p: ShortConvolution) -> tuple[Convolution, list[Tensor | None]]:
    """The struct, and the tensors that it points to."""
    batch, n, channels = p.x.shape
    x = rows_contiguous(p.x)
    lengths = None if p.lengths is None else p.lengths.clamp(0, n)  # nobody reads beyond a row, whatever they say
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


def _empty_convolution(p: ShortConvolution) -> tuple[Tensor, Tensor]:
    batch, _, channels = p.x.shape
    return p.x.new_empty(p.x.shape), p.x.new_empty((batch, p.weight.shape[1] - 1, channels) if p.after == 0 else 0)


@operator("short_convolution")
def _convolution(problem: ShortConvolution) -> tuple[Tensor, Tensor]:
    """y (B, N, C) and the last inputs (B, width - 1, C), empty when there are taps after the token."""
    _check_convolution(problem)
    arguments, alive = _convolution_arguments(problem)
    y, last = _empty_convolution(problem)
    arguments.y, arguments.last = pointer(y), None if problem.after else pointer(last)
    library.call(arguments)
    del alive
    return y, last


@_convolution.register_fake
def _(problem: ShortConvolution) -> tuple[Tensor, Tensor]:
    return _empty_convolution(problem)


@operator("short_convolution_backward")
def _convolution_backward(
    grad_y: Tensor, grad_last: Tensor, problem: ShortConvolution, needed: list[bool]
) -> list[Tensor]:
    """Gradients of x, weight, bias and cache, empty where not needed."""
    _check_convolution(problem)
    for found, expected in zip((grad_y, grad_last), _empty_convolution(problem), strict=True):
        if found.shape != expected.shape or found.dtype != expected.dtype or found.device != expected.device:
            _refuse("gradients of other shapes or dtypes than its outputs", "short convolution")
    arguments, alive = _convolution_arguments(problem)
    grads = problem.empty_gradients(needed)
    grad_y, grad_last = rows_contiguous(grad_y), grad_last.contiguous()
    last = None if problem.after else pointer(grad_last)
    library.call(
        ConvolutionBackward(ctypes.pointer(arguments), pointer(grad_y), grad_y.stride()[:2], last, *_pointers(grads))
    )
    del alive
    return grads


@_convolution_backward.register_fake
def _(grad_y: Tensor, grad_last: Tensor, problem: ShortConvolution, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _save(ctx: Any, inputs: tuple[ShortConvolution | RMSNorm | GatedProduct], output: Any) -> None:
    inputs[0].keep(ctx)


def _differentiate_convolution(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    problem, _ = ShortConvolution.kept(ctx)
    needed = problem.needed(ctx)
    return problem.gradients(_convolution_backward(grad_y, grad_last, problem, needed), needed)


_convolution.register_autograd(_differentiate_convolution, setup_context=_save)
_convolution_backward.refuse_gradient("second derivatives of the native short convolution")


# RMSNorm.


def rms_norm(problem: RMSNorm) -> Tensor:
    """See :func:`regard.engines.layers.rms_norm`."""
    return _norm(problem)


def refuses_rms_norm(problem: RMSNorm) -> str | None:
    """Why a call is left to another backend."""
    return small("rms_norm", problem.x) or _misfit_norm(problem)


def _misfit_norm(p: RMSNorm) -> str | None:
    x, weight, z, groups = p.x, p.weight, p.z, p.groups
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


def _norm_arguments(p: RMSNorm) -> tuple[Norm, list[Tensor | None]]:
    x, z = _three_axes(p.x), None if p.z is None else _three_axes(p.z)
    weight = None if p.weight is None else p.weight.contiguous()
    arguments = Norm(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[x.dtype],
        rows=tuple(x.shape[:3]),
        groups=p.groups,
        width=x.shape[-1] // p.groups,
        gate=NO_GATE if z is None else GATE_AFTER if p.norm_before_gate else GATE_BEFORE,
        eps=p.eps,
        **library.strided(x=x, z=z),
        weight=pointer(weight),
    )
    return arguments, [x, weight, z]


@operator("rms_norm")
def _norm(problem: RMSNorm) -> Tensor:
    _refuse(_misfit_norm(problem), "RMSNorm")
    arguments, alive = _norm_arguments(problem)
    y = problem.x.new_empty(problem.x.shape)
    arguments.y = pointer(y)
    library.call(arguments)
    del alive
    return y


@_norm.register_fake
def _(problem: RMSNorm) -> Tensor:
    return problem.x.new_empty(problem.x.shape)


@operator("rms_norm_backward")
def _norm_backward(grad_y: Tensor, problem: RMSNorm, needed: list[bool]) -> list[Tensor]:
    """Gradients of x, weight and z, empty where not needed."""
    reason = _misfit_norm(problem) or _elsewhere(problem.x, grad_y)
    if reason is None and grad_y.shape != problem.x.shape:
        reason = "a gradient of another shape than its output's"
    _refuse(reason, "RMSNorm")
    arguments, alive = _norm_arguments(problem)
    grads = problem.empty_gradients(needed)
    grad_y = _three_axes(grad_y)
    grad_x, grad_weight, grad_z = _pointers(grads)
    library.call(
        NormBackward(ctypes.pointer(arguments), pointer(grad_y), grad_y.stride()[:3], grad_x, grad_z, grad_weight)
    )
    del alive
    return grads


@_norm_backward.register_fake
def _(grad_y: Tensor, problem: RMSNorm, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _differentiate_norm(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    problem, _ = RMSNorm.kept(ctx)
    needed = problem.needed(ctx)
    return problem.gradients(_norm_backward(grad_y, problem, needed), needed)


_norm.register_autograd(_differentiate_norm, setup_context=_save)
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


def gated_product(problem: GatedProduct) -> Tensor:
    """See :func:`regard.engines.layers.gated_product`."""
    return _product(problem)


def refuses_gated_product(problem: GatedProduct) -> str | None:
    """Why a call is left to another backend."""
    return small("gated_product", problem.x) or _misfit_product(problem.x, problem.gate)


def _misfit_product(x: Tensor, *others: Tensor) -> str | None:
    reason = _elsewhere(x, *others)
    same = x.ndim >= 1 and all(t.shape == x.shape for t in others)
    return reason or (None if same else "inputs of several shapes")


def _matrix(x: Tensor) -> Tensor:
    """Rows at one stride: a copy only where the leading axes are not."""
    return rows_contiguous(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def _run_product(p: GatedProduct, **more: Any) -> None:
    if not 0 <= p.function < len(GATE_FUNCTIONS):
        _refuse(f"function {p.function}", "product with a gate")
    x, gate = _matrix(p.x), _matrix(p.gate)
    library.call(
        Product(
            torch.get_num_threads(),
            library.DTYPES[x.dtype],
            *x.shape,
            p.function,
            pointer(x),
            pointer(gate),
            x.stride(0),
            gate.stride(0),
            **more,
        )
    )


@operator("gated_product")
def _product(problem: GatedProduct) -> Tensor:
    _refuse(_misfit_product(problem.x, problem.gate), "product with a gate")
    y = problem.x.new_empty(problem.x.shape)
    _run_product(problem, y=pointer(y))
    return y


@_product.register_fake
def _(problem: GatedProduct) -> Tensor:
    return problem.x.new_empty(problem.x.shape)


@operator("gated_product_backward")
def _product_backward(grad_y: Tensor, problem: GatedProduct, needed: list[bool]) -> list[Tensor]:
    """Gradients of x and the gate, empty where not needed."""
    _refuse(_misfit_product(problem.x, problem.gate, grad_y), "product with a gate")
    grads = problem.empty_gradients(needed)
    grad_x, grad_gate = _pointers(grads)
    grad_y = _matrix(grad_y)
    given = {"grad_y": pointer(grad_y), "grad_y_stride": grad_y.stride(0)}
    _run_product(problem, **given, grad_x=grad_x, grad_gate=grad_gate)
    return grads


@_product_backward.register_fake
def _(grad_y: Tensor, problem: GatedProduct, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _differentiate_product(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    problem, _ = GatedProduct.kept(ctx)
    needed = problem.needed(ctx)
    return problem.gradients(_product_backward(grad_y, problem, needed), needed)


_product.register_autograd(_differentiate_product, setup_context=_save)
_product_backward.refuse_gradient("second derivatives of the native product with a gate")
