"""The selective scan in C++ (`native/src/selective_scan.cpp`): states stay in registers, and backward computes them again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.contract import Unsupported

EVERY = 64
"""Tokens between the states that are kept for backward: REGARD_SELECTIVE_SCAN_EVERY."""


class Scan(library.Arguments):
    kernel = "selective_scan"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("states", ctypes.c_int64),
        ("inclusive", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_strides", ctypes.c_int64 * 2),
        ("dt", ctypes.c_void_p),
        ("dt_strides", ctypes.c_int64 * 2),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("b_strides", ctypes.c_int64 * 3),
        ("c", ctypes.c_void_p),
        ("c_strides", ctypes.c_int64 * 3),
        ("skip", ctypes.c_void_p),
        ("dt_bias", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("z_strides", ctypes.c_int64 * 2),
        ("state", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
    )


class ScanBackward(library.Arguments):
    kernel = "selective_scan_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Scan)),
        ("grad_y", ctypes.c_void_p),
        ("grad_y_strides", ctypes.c_int64 * 2),
        ("grad_last", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_dt", ctypes.c_void_p),
        ("grad_a", ctypes.c_void_p),
        ("grad_b", ctypes.c_void_p),
        ("grad_c", ctypes.c_void_p),
        ("grad_skip", ctypes.c_void_p),
        ("grad_dt_bias", ctypes.c_void_p),
        ("grad_z", ctypes.c_void_p),
        ("grad_state", ctypes.c_void_p),
    )


def run(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
    inclusive: bool,
) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.selective_scan.selective_scan`; `chunk_size` is the kernel's own."""
    given = [t for t in (dt, b, c, z) if t is not None]
    dtype = x.dtype
    wide = x
    if any(t.dtype != dtype for t in given):  # the kernel reads one dtype
        wide, dt, b = x.float(), dt.float(), b.float()
        c, z = (None if t is None else t.float() for t in (c, z))
    tensors = (x, *given, a, skip, dt_bias, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, last, _ = _scan(wide, dt, a, b, c, skip, dt_bias, z, state, lengths, inclusive, keep)
    return (None if c is None else y.to(dtype)), last


def refuses(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
    inclusive: bool,
) -> str | None:
    """Why a call is left to another backend."""
    by_token = [t for t in (x, dt, b, c, z) if t is not None]
    parameters = [t for t in (a, skip, dt_bias, state) if t is not None]
    for t in by_token:
        if t.dtype not in library.DTYPES:
            return f"inputs in {t.dtype}"
    if any(t.dtype != torch.float32 for t in parameters):
        return "a, skip, dt_bias or a state in another dtype than float32"
    if any(t.device.type != "cpu" for t in (*by_token, *parameters)):
        return "tensors on several devices"
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.device.type != "cpu"):
        return "lengths in another dtype than int64 or on another device"
    return _shapes_differ(x, dt, a, b, c, skip, dt_bias, z, state, lengths)


def _shapes_differ(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
) -> str | None:
    if x.ndim != 3 or a.ndim != 2 or b.ndim != 4:
        return "inputs of other than 3 axes, or b of other than 4"
    batch, n, channels = x.shape
    groups, states = b.shape[2:]
    found = dt.shape == x.shape and a.shape == (channels, states) and b.shape[:2] == (batch, n)
    found = found and groups >= 1 and channels % groups == 0 and states <= library.MOST
    found = found and (c is None or c.shape == b.shape)
    found = found and all(t is None or t.shape == (channels,) for t in (skip, dt_bias))
    found = found and (z is None or z.shape == x.shape)
    found = found and (state is None or state.shape == (batch, channels, states))
    found = found and (lengths is None or lengths.shape == (batch,))
    return None if found else "shapes that do not belong together"


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
) -> None:
    reason = refuses(x, dt, a, b, c, skip, dt_bias, z, state, lengths, EVERY, True)
    if reason is None and any(t is not None and t.dtype != x.dtype for t in (dt, b, c, z)):
        reason = "inputs of several dtypes"
    if reason is not None:
        raise Unsupported(f"the native selective scan with {reason}", nearest="backend='torch'")


class _Call:
    """The struct of a call, the tensors it points to, and its results."""

    def __init__(self, tensors: Sequence[Tensor | None], inclusive: bool) -> None:
        x, dt, a, b, c, skip, dt_bias, z, state, lengths = tensors
        assert x is not None and dt is not None and a is not None and b is not None  # checked
        batch, n, channels = x.shape
        x, dt, b = rows_contiguous(x), rows_contiguous(dt), rows_contiguous(b)
        c, z = (None if t is None else rows_contiguous(t) for t in (c, z))
        a, skip, dt_bias, state = (None if t is None else t.contiguous() for t in (a, skip, dt_bias, state))
        lengths = None if lengths is None else lengths.clamp(0, n)  # nobody reads beyond a row, whatever they say
        self.tensors = (x, dt, a, b, c, skip, dt_bias, z, state, lengths)
        self.struct = Scan(
            threads=torch.get_num_threads(),
            dtype=library.DTYPES[x.dtype],
            batch=batch,
            n=n,
            channels=channels,
            groups=b.shape[2],
            states=b.shape[3],
            inclusive=inclusive,
            x=pointer(x),
            x_strides=x.stride()[:2],
            dt=pointer(dt),
            dt_strides=dt.stride()[:2],
            a=pointer(a),
            b=pointer(b),
            b_strides=b.stride()[:3],
            c=pointer(c),
            c_strides=(0, 0, 0) if c is None else c.stride()[:3],
            skip=pointer(skip),
            dt_bias=pointer(dt_bias),
            z=pointer(z),
            z_strides=(0, 0) if z is None else z.stride()[:2],
            state=pointer(state),
            lengths=pointer(lengths),
        )


def _empty_outputs(x: Tensor, a: Tensor, c: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, _ = x.shape
    y = x.new_empty(0 if c is None else x.shape)
    return y, a.new_empty(batch, *a.shape), a.new_empty((batch, -(-n // EVERY), *a.shape) if keep else 0)


@operator("selective_scan")
def _scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    inclusive: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, N, C), empty without c; the last state (B, C, K); with `keep` the states that backward starts from."""
    _check(x, dt, a, b, c, skip, dt_bias, z, state, lengths)
    call = _Call((x, dt, a, b, c, skip, dt_bias, z, state, lengths), inclusive)
    y, last, kept = _empty_outputs(x, a, c, keep)
    call.struct.y, call.struct.last = (None if c is None else pointer(y)), pointer(last)
    call.struct.kept = pointer(kept) if keep else None
    library.call(call.struct)
    return y, last, kept


@_scan.register_fake
def _(x, dt, a, b, c, skip, dt_bias, z, state, lengths, inclusive, keep):
    return _empty_outputs(x, a, c, keep)


def _empty_gradients(inputs: list[Tensor | None], needed: list[bool]) -> list[Tensor]:
    """Contiguous, whatever the inputs' strides; empty where not needed."""
    like = next(t for t in inputs if t is not None)
    return [
        like.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(inputs, needed, strict=True)
    ]


@operator("selective_scan_backward")
def _scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    kept: Tensor,
    inclusive: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, dt, a, b, c, skip, dt_bias, z and state, empty where not needed."""
    _check(x, dt, a, b, c, skip, dt_bias, z, state, lengths)
    inputs = [x, dt, a, b, c, skip, dt_bias, z, state]
    for found, expected in zip((grad_y, grad_last, kept), _empty_outputs(x, a, c, True), strict=True):
        if found.shape != expected.shape or found.dtype != expected.dtype or found.device != expected.device:
            raise Unsupported("gradients or states that are not the selective scan's", nearest="backend='torch'")
    grads = _empty_gradients(inputs, needed)
    if x.shape[0] * x.shape[2] == 0:  # the kernel has nothing to run over
        return [grad.zero_() for grad in grads]
    call = _Call((*inputs, lengths), inclusive)
    grad_y, grad_last, kept = rows_contiguous(grad_y), grad_last.contiguous(), kept.contiguous()
    call.struct.kept = pointer(kept)
    arguments = ScanBackward(ctypes.pointer(call.struct))
    if c is not None:
        arguments.grad_y, arguments.grad_y_strides = pointer(grad_y), grad_y.stride()[:2]
    arguments.grad_last = pointer(grad_last)
    names = ("x", "dt", "a", "b", "c", "skip", "dt_bias", "z", "state")
    for name, given, need, grad in zip(names, inputs, needed, grads, strict=True):
        setattr(arguments, f"grad_{name}", pointer(grad) if need and given is not None else None)
    if c is None and z is not None and needed[7]:
        grads[7].zero_()
    library.call(arguments)
    return grads


@_scan_backward.register_fake
def _(grad_y, grad_last, x, dt, a, b, c, skip, dt_bias, z, state, lengths, kept, inclusive, needed):
    return _empty_gradients([x, dt, a, b, c, skip, dt_bias, z, state], needed)


def _save(ctx, inputs, output):
    *tensors, ctx.inclusive, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, grad_y, grad_last, grad_kept):
    *inputs, kept = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:9])
    grads = _scan_backward(grad_y, grad_last, *inputs, kept, ctx.inclusive, needed)
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return *wanted, None, None, None


_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward.refuse_gradient("second derivatives of the native selective scan")
