"""x W^T of a weight that is held in 8 or 4 bits: few rows read the codes as they are, many rows a copy in floating point.

A weight (N, K) is held as

    W = (codes - middle) * scale + offset

with a scale (and an offset, where the grid is not symmetric) for each row, or for each group of a row. Codes of 8 bits are
int8 with the middle 0; those of 4 bits are 0 to 15 with the middle 8, two in a byte: column 2 i in the low half, 2 i + 1 in
the high half. Scales and offsets are bfloat16, and codes are chosen for the rounded ones, so that a weight is exactly what it
says in every dtype that computes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.engines.linear import linear
from regard.engines.quantized_linear import torch_form
from regard.engines.quantized_linear.packing import MIDDLE, pack, padded, unpack

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int8, UInt8

__all__ = [
    "MIDDLE",
    "dequantize_4bit",
    "dequantize_8bit",
    "dynamic_linear",
    "linear_4bit",
    "linear_8bit",
    "pack",
    "padded",
    "unpack",
]

FEW_ROWS = 16
"""Rows up to which a product reads codes: of more, arithmetic takes longer than reading, and a copy in floats is quicker."""


def dequantize_8bit(
    codes: Int8[Tensor, "n k"], scale: BFloat16[Tensor, " n"], dtype: torch.dtype
) -> Float[Tensor, "n k"]:
    """The weight of 8-bit codes."""
    return codes.to(dtype) * scale.to(dtype)[:, None]


def dequantize_4bit(
    codes: UInt8[Tensor, "n half"],
    scale: BFloat16[Tensor, "n g"],
    offset: BFloat16[Tensor, "n g"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "n k"]:
    """The weight of 4-bit codes; k is a multiple of the group, with what pads the last one."""
    values = unpack(codes).to(dtype).unflatten(1, (scale.shape[1], -1)) - MIDDLE
    values = values * scale.to(dtype)[..., None]
    if offset is not None:
        values = values + offset.to(dtype)[..., None]
    return values.flatten(1)


def linear_8bit(
    x: Float[Tensor, "*b k"],
    codes: Int8[Tensor, "n k"],
    scale: BFloat16[Tensor, " n"],
    bias: Float[Tensor, " n"] | None,
) -> Float[Tensor, "*b n"]:
    """x W^T + b with a weight of 8-bit codes, one scale a row.

    Of few rows in float32 or bfloat16 the activations and the result are rounded to bfloat16, with sums in float32, where
    there is no native kernel; that kernel, and all other calls, compute in the dtype of `x`. Gradients reach `x` alone.
    """
    if torch_form.takes_8bit(codes) and _reads_codes(x):
        y = torch_form.few_rows_8bit(x, codes, scale)
        return y if bias is None else y + bias
    return linear(x, dequantize_8bit(codes, scale, x.dtype), bias)


def linear_4bit(
    x: Float[Tensor, "*b k"],
    codes: UInt8[Tensor, "n half"],
    scale: BFloat16[Tensor, "n g"],
    offset: BFloat16[Tensor, "n g"] | None,
    bias: Float[Tensor, " n"] | None,
    packed: torch_form.Packed | None = None,
) -> Float[Tensor, "*b n"]:
    """x W^T + b with a weight of 4-bit codes in groups; precision as of :func:`linear_8bit`.

    Args:
        x: with fewer columns than the codes have where the last group is padded.
        packed: the weight as torch's operator reads it (:func:`torch_form.pack_for_torch`).
    """
    x = padded(x, 2 * codes.shape[1])
    if packed is not None and _reads_codes(x):
        y = torch_form.few_rows_4bit(x, packed)
        return y if bias is None else y + bias
    return linear(x, dequantize_4bit(codes, scale, offset, x.dtype), bias)


def dynamic_linear(
    x: Float[Tensor, "*b k"],
    codes: Int8[Tensor, "n k"],
    scale: BFloat16[Tensor, " n"],
    bias: Float[Tensor, " n"] | None,
) -> Float[Tensor, "*b n"]:
    """x W^T + b with both operands in 8 bits: each row of `x` is rounded to a grid of its own, -127 to 127.

    Products are summed as integers, exactly, and scaled in float32. Gradients do not pass.
    """
    rows = x.reshape(-1, x.shape[-1])
    step = rows.detach().float().abs().amax(1, keepdim=True).clamp(min=torch_form.TINY) / 127
    rounded = (rows.float() / step).round_().to(torch.int8)
    y = torch_form.integer_product(rounded, codes) * (step * scale.float())
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def _reads_codes(x: Tensor) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1]
