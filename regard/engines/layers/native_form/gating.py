"""The product with a gate, forward and backward."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.engines.layers.native_form.common import addresses, differentiate, refuse, save, small, unreadable
from regard.engines.layers.problem import GATE_FUNCTIONS, GatedProduct


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


def gated_product(problem: GatedProduct) -> Tensor:
    """See :func:`regard.engines.layers.gated_product`."""
    return _product(problem)


def refuses(problem: GatedProduct) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    return small("gated_product", problem.x) or _misfit(problem.x, problem.gate)


def _misfit(x: Tensor, *others: Tensor) -> str | None:
    reason = unreadable(x, *others)
    same = x.ndim >= 1 and all(t.shape == x.shape for t in others)
    return reason or (None if same else "inputs of several shapes")


def _matrix(x: Tensor) -> Tensor:
    """A matrix whose rows have one stride; copies only if the leading axes do not."""
    return rows_contiguous(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def _run(p: GatedProduct, **more: Any) -> None:
    if not 0 <= p.function < len(GATE_FUNCTIONS):
        refuse(f"function {p.function}", "product with a gate")
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
    refuse(_misfit(problem.x, problem.gate), "product with a gate")
    y = problem.x.new_empty(problem.x.shape)
    _run(problem, y=pointer(y))
    return y


@_product.register_fake
def _(problem: GatedProduct) -> Tensor:
    return problem.x.new_empty(problem.x.shape)


@operator("gated_product_backward")
def _product_backward(grad_y: Tensor, problem: GatedProduct, needed: list[bool]) -> list[Tensor]:
    """Gradients of x and the gate; empty where not needed."""
    refuse(_misfit(problem.x, problem.gate, grad_y), "product with a gate")
    grads = problem.empty_gradients(needed)
    grad_x, grad_gate = addresses(grads)
    grad_y = _matrix(grad_y)
    given = {"grad_y": pointer(grad_y), "grad_y_stride": grad_y.stride(0)}
    _run(problem, **given, grad_x=grad_x, grad_gate=grad_gate)
    return grads


@_product_backward.register_fake
def _(grad_y: Tensor, problem: GatedProduct, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


_product.register_autograd(partial(differentiate, GatedProduct, _product_backward), setup_context=save)
_product_backward.refuse_gradient("second derivatives of the native product with a gate")
