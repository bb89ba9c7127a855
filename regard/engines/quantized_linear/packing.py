"""Codes and the weights that they represent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, Shaped, UInt8

MIDDLE = 8
"""The 4-bit code for 0 on a symmetric grid."""


def padded(x: Shaped[Tensor, "*b k"], columns: int) -> Shaped[Tensor, "*b columns"]:
    """Pad with zeros after the last column."""
    return x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1]))


def pack(codes: UInt8[Tensor, "n k"]) -> UInt8[Tensor, "n half"]:
    """Pack 4-bit codes, 0 to 15, two in a byte; the number of columns must be even."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: UInt8[Tensor, "n half"]) -> UInt8[Tensor, "n k"]:
    """The codes that were given to :func:`pack`."""
    if torch.compiler.is_compiling():  # bit operators in ONNX programs change the dtype
        return torch.stack([packed % 16, packed // 16], -1).flatten(1)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def dequantize(
    codes: Int8[Tensor, "n k"] | UInt8[Tensor, "n half"],
    scale: Float[Tensor, "n g"],
    offset: Float[Tensor, "n g"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "n k"]:
    """The weight that codes represent, including the padding of the last group."""
    if codes.dtype == torch.int8:
        return codes.to(dtype) * scale.to(dtype)
    values = unpack(codes).to(dtype).unflatten(1, (scale.shape[1], -1)) - MIDDLE
    values = values * scale.to(dtype)[..., None]
    return (values if offset is None else values + offset.to(dtype)[..., None]).flatten(1)
