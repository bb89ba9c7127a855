"""x W^T with a weight stored in 8 or 4 bits: reads the codes directly for few rows, a floating-point copy for many.

A weight (N, K) is stored as

    W = code * scale + offset

with a scale (and an offset, if the grid is not symmetric) for each group of a row, or for each row. Codes of 8 bits are
int8, with one scale per row. Codes of 4 bits are 0 to 15, which represent -8 to 7, two in a byte: column 2 i in the low
half, 2 i + 1 in the high half. Scales and offsets are bfloat16, and codes are chosen for the rounded ones, so that a
weight has the same value in every dtype that computes with it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native
from regard.engines.quantized_linear import native_form, torch_form
from regard.engines.quantized_linear.packing import MIDDLE, dequantize, pack, padded, unpack
from regard.engines.quantized_linear.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, UInt8

__all__ = ["MIDDLE", "dequantize", "dynamic_linear", "pack", "padded", "quantized_linear", "unpack"]


def quantized_linear(
    x: Float[Tensor, "*b k"],
    codes: Int8[Tensor, "n k"] | UInt8[Tensor, "n half"],
    scale: Float[Tensor, "n g"],
    offset: Float[Tensor, "n g"] | None = None,
    bias: Float[Tensor, " n"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*b n"]:
    """x W^T + b with a quantized weight.

    For up to 16 rows of x in float32, a native kernel reads the codes. Without the kernel, torch's own operators do,
    which round activations and results to bfloat16, with sums in float32. All other calls make a copy of the weight and
    compute in the dtype of x. Only x gets a gradient.

    Args:
        x: inputs; may have fewer columns than the codes, whose last group may be padded.
        codes, scale, offset: the weight, as described in the module; scale and offset in bfloat16.
        bias: bias in the dtype of x.
        backend: see :func:`regard.which_backend`.
    """
    if backend is None and prefers_native():
        found = native_form.plain(x, codes, scale, offset, bias)
        if found is not None:
            return found
    return execute("quantized_linear", backend, x.device, x.dtype, Problem(x, codes, scale, offset, bias))


def dynamic_linear(
    x: Float[Tensor, "*b k"],
    codes: Int8[Tensor, "n k"],
    scale: Float[Tensor, "n 1"],
    bias: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*b n"]:
    """x W^T + b with both operands in 8 bits: each row of `x` is rounded to its own grid, -127 to 127.

    Products are summed exactly, as integers, and scaled in float32. On processors without dot products of bytes, the
    native kernel for up to 16 rows sums in float32. There are no gradients.
    """
    if prefers_native():
        found = native_form.plain(x, codes, scale, None, bias, rounded=True)
        if found is not None:
            return found
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).detach().float()
    step = rows.abs().amax(1, keepdim=True).clamp(min=torch_form.TINY) / 127
    rounded = (rows / step).round_().to(torch.int8)
    y = torch_form.integer_product(rounded, codes) * (step * scale.float().T)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


add_engine(
    "quantized_linear",
    torch=Engine(torch_form.quantized_linear),
    native=Engine(native_form.quantized_linear, native_form.refuses),
)
