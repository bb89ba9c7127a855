"""RMSNorm with and without a gate, forward and backward."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.engines.layers.native_form.common import addresses, differentiate, refuse, save, small, unreadable
from regard.engines.layers.problem import RMSNorm

NO_GATE, GATE_BEFORE, GATE_AFTER = range(3)

Three = ctypes.c_int64 * 3


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


def rms_norm(problem: RMSNorm) -> Tensor:
    """See :func:`regard.engines.layers.rms_norm`."""
    return _norm(problem)


def refuses(problem: RMSNorm) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    return small("rms_norm", problem.x) or _misfit(problem)


def _misfit(p: RMSNorm) -> str | None:
    x, weight, z, groups = p.x, p.weight, p.z, p.groups
    reason = unreadable(x, z)
    if reason is not None:
        return reason
    if weight is not None and (weight.dtype != torch.float32 or weight.device.type != "cpu"):
        return "a weight in another dtype than float32 or on another device"
    found = x.ndim >= 1 and x.shape[-1] >= 1 and groups >= 1 and x.shape[-1] % groups == 0
    found = found and (weight is None or weight.shape == x.shape[-1:]) and (z is None or z.shape == x.shape)
    return None if found else "shapes that do not belong together"


def _three_axes(x: Tensor) -> Tensor:
    """Rows in three leading axes, with contiguous features; copies only what needs more axes."""
    x = rows_contiguous(x)
    if x.ndim > 4:
        return x.reshape(-1, 1, 1, x.shape[-1])
    return x[(None,) * (4 - x.ndim)]


def _arguments(p: RMSNorm) -> tuple[Norm, list[Tensor | None]]:
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
    refuse(_misfit(problem), "RMSNorm")
    arguments, alive = _arguments(problem)
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
    """Gradients of x, weight and z; empty where not needed."""
    reason = _misfit(problem) or unreadable(problem.x, grad_y)
    if reason is None and grad_y.shape != problem.x.shape:
        reason = "a gradient of another shape than its output's"
    refuse(reason, "RMSNorm")
    arguments, alive = _arguments(problem)
    grads = problem.empty_gradients(needed)
    grad_y = _three_axes(grad_y)
    grad_x, grad_weight, grad_z = addresses(grads)
    library.call(
        NormBackward(ctypes.pointer(arguments), pointer(grad_y), grad_y.stride()[:3], grad_x, grad_z, grad_weight)
    )
    del alive
    return grads


@_norm_backward.register_fake
def _(grad_y: Tensor, problem: RMSNorm, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


_norm.register_autograd(partial(differentiate, RMSNorm, _norm_backward), setup_context=save)
_norm_backward.refuse_gradient("second derivatives of the native RMSNorm")
