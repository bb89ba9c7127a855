"""The selective scan in C++ (`native/src/selective_scan.cpp`): states stay in registers; backward recomputes them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.selective_scan.problem import Problem

EVERY = 64
"""Number of tokens between the states that are stored for backward: REGARD_SELECTIVE_SCAN_EVERY."""


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
        ("order", ctypes.c_void_p),
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


def run(problem: Problem, chunk_size: int) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.selective_scan.selective_scan`; the kernel chooses its own `chunk_size`."""
    dtype, keep = problem.x.dtype, torch.is_grad_enabled() and problem.records
    if any(t is not None and t.dtype != dtype for t in _by_token(problem)):  # the kernel reads a single dtype
        p = problem
        c, z = (None if t is None else t.float() for t in (p.c, p.z))
        problem = replace(p, x=p.x.float(), dt=p.dt.float(), b=p.b.float(), c=c, z=z)
    y, last, _ = _scan(problem, keep)
    return (None if problem.c is None else y.to(dtype)), last


def _by_token(p: Problem) -> list[Tensor | None]:
    return [p.x, p.dt, p.b, p.c, p.z]


def refuses(problem: Problem, chunk_size: int) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    return _refusal(problem)


def flops(problem: Problem, chunk_size: int) -> float:
    """Operations of the recurrence, as in PyTorch, and of the product with `c`."""
    return (5.0 if problem.c is None else 7.0) * problem.updates


def _refusal(p: Problem) -> str | None:
    by_token = [t for t in _by_token(p) if t is not None]
    parameters = [t for t in (p.a, p.skip, p.dt_bias, p.state) if t is not None]
    for t in by_token:
        if t.dtype not in library.DTYPES:
            return f"inputs in {t.dtype}"
    if any(t.dtype != torch.float32 for t in parameters):
        return "a, skip, dt_bias or a state in another dtype than float32"
    if any(t.device.type != "cpu" for t in (*by_token, *parameters)):
        return "tensors on several devices"
    lengths = p.lengths
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.device.type != "cpu"):
        return "lengths in another dtype than int64 or on another device"
    order = p.order
    if order is not None and (order.dtype != torch.int64 or order.device.type != "cpu"):
        return "an order in another dtype than int64 or on another device"
    if p.x.ndim != 3 or p.a.ndim != 2 or p.b.ndim != 4:
        return "inputs of other than 3 axes, or b of other than 4"
    batch, n, channels = p.x.shape
    groups, states = p.b.shape[2:]
    found = p.dt.shape == p.x.shape and p.a.shape == (channels, states) and p.b.shape[:2] == (batch, n)
    found = found and groups >= 1 and channels % groups == 0 and states <= library.MOST
    found = found and (p.c is None or p.c.shape == p.b.shape)
    found = found and all(t is None or t.shape == (channels,) for t in (p.skip, p.dt_bias))
    found = found and (p.z is None or p.z.shape == p.x.shape)
    found = found and (p.state is None or p.state.shape == (batch, channels, states))
    found = found and (lengths is None or lengths.shape == (batch,))
    found = found and (order is None or (order.shape == (n,) and lengths is None))
    return None if found else "shapes that do not belong together"


def _check(p: Problem) -> None:
    reason = _refusal(p)
    if reason is None and any(t is not None and t.dtype != p.x.dtype for t in _by_token(p)):
        reason = "inputs of several dtypes"
    if reason is not None:
        raise Unsupported(f"the native selective scan with {reason}", nearest="backend='torch'")


class _Call:
    """The struct of a call, and the tensors that it points to."""

    def __init__(self, p: Problem) -> None:
        batch, n, channels = p.x.shape
        x, dt, b = rows_contiguous(p.x), rows_contiguous(p.dt), rows_contiguous(p.b)
        c, z = (None if t is None else rows_contiguous(t) for t in (p.c, p.z))
        a, skip, dt_bias, state = (None if t is None else t.contiguous() for t in (p.a, p.skip, p.dt_bias, p.state))
        lengths = None if p.lengths is None else p.lengths.clamp(0, n)  # clamped: the kernel must not read beyond a row
        order = None if p.order is None else p.order.clamp(0, n - 1).contiguous()  # nor beyond the sequence
        self.tensors = (x, dt, a, b, c, skip, dt_bias, z, state, lengths, order)
        self.struct = Scan(
            threads=torch.get_num_threads(),
            dtype=library.DTYPES[x.dtype],
            batch=batch,
            n=n,
            channels=channels,
            groups=b.shape[2],
            states=b.shape[3],
            inclusive=p.inclusive,
            **library.strided(x=x, dt=dt, b=b, c=c, z=z),
            a=pointer(a),
            skip=pointer(skip),
            dt_bias=pointer(dt_bias),
            state=pointer(state),
            lengths=pointer(lengths),
            order=pointer(order),
        )


def _empty_outputs(p: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, n, _), a = p.x.shape, p.a
    y = p.x.new_empty(0 if p.c is None else p.x.shape)
    return y, a.new_empty(batch, *a.shape), a.new_empty((batch, -(-n // EVERY), *a.shape) if keep else 0)


@operator("selective_scan")
def _scan(problem: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, N, C), empty without c; the last state (B, C, K); with `keep` the states that backward starts from."""
    _check(problem)
    call = _Call(problem)
    y, last, kept = _empty_outputs(problem, keep)
    call.struct.y, call.struct.last = (None if problem.c is None else pointer(y)), pointer(last)
    call.struct.kept = pointer(kept) if keep else None
    library.call(call.struct)
    return y, last, kept


@_scan.register_fake
def _(problem: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(problem, keep)


@operator("selective_scan_backward")
def _scan_backward(
    grad_y: Tensor, grad_last: Tensor, problem: Problem, kept: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of the problem's learned tensors; empty where not needed."""
    _check(problem)
    for found, expected in zip((grad_y, grad_last, kept), _empty_outputs(problem, True), strict=True):
        if found.shape != expected.shape or found.dtype != expected.dtype or found.device != expected.device:
            raise Unsupported("gradients or states that are not the selective scan's", nearest="backend='torch'")
    grads = problem.empty_gradients(needed)
    if problem.x.shape[0] * problem.x.shape[2] == 0:  # nothing for the kernel to iterate over
        return [grad.zero_() for grad in grads]
    call = _Call(problem)
    grad_y, grad_last, kept = rows_contiguous(grad_y), grad_last.contiguous(), kept.contiguous()
    call.struct.kept = pointer(kept)
    outer = library.strided(grad_y=None if problem.c is None else grad_y)
    arguments = ScanBackward(forward=ctypes.pointer(call.struct), grad_last=pointer(grad_last), **outer)
    for name, given, need, grad in zip(Problem.places(), problem.learned, needed, grads, strict=False):
        setattr(arguments, f"grad_{name}", pointer(grad) if need and given is not None else None)
    if problem.c is None and problem.z is not None and needed[7]:
        grads[7].zero_()
    library.call(arguments)
    return grads


@_scan_backward.register_fake
def _(grad_y: Tensor, grad_last: Tensor, problem: Problem, kept: Tensor, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _save(ctx: Any, inputs: tuple[Problem, bool], output: tuple[Tensor, ...]) -> None:
    inputs[0].keep(ctx, output[2])


def _differentiate(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    problem, (kept,) = Problem.kept(ctx)
    needed = problem.needed(ctx)
    return *problem.gradients(_scan_backward(grad_y, grad_last, problem, kept, needed), needed), None


_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward.refuse_gradient("second derivatives of the native selective scan")
