"""Products of few rows with a weight that is read only once, in C++ (`native/src/quantized_linear.cpp`)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer

if TYPE_CHECKING:
    from jaxtyping import Float


class QuantizedLinear(library.Arguments):
    """`regard_quantized_linear_args`: a weight in float32 (32 bits) or in codes of 8 or 4 bits."""

    kernel = "quantized_linear"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rounded", ctypes.c_int64),
    )


def few_rows(
    x: Float[Tensor, "*b k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None
) -> Float[Tensor, "*b n"]:
    """x W^T + bias, where all tensors are float32 and contiguous, on the CPU."""
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    sizes = x.numel() // k, n, k, k, k
    tensors = pointer(x), k, pointer(weight), None, None, pointer(bias), pointer(y)
    library.call(QuantizedLinear(torch.get_num_threads(), 32, *sizes, *tensors))
    return y
