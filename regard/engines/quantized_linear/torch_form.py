"""The products by torch's own operators for processors, which compute in bfloat16."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-30
"""The least largest number of a row, so that a row of zeros has a grid too."""

GROUPS = (32, 64, 128, 256)
"""Sizes of a group that torch's operator takes."""

ROW_BLOCK = 16
"""Rows of a weight that it takes at once."""

COLUMN_BLOCK = 16
"""Columns that torch's operator for 8 bits takes at once; with others it reads beyond the weight's end."""


class Packed(NamedTuple):
    """A 4-bit weight as torch's operator reads it."""

    codes: Tensor
    group: int
    scale_and_offset: Tensor


def pack_for_torch(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Packed | None:
    """None for sizes that the operator does not take, and elsewhere than on a processor.

    Args:
        codes: (N, K) of 0 to 15, uint8.
        scale, offset: (N, K / group) bfloat16.
    """
    (rows, columns), groups = codes.shape, scale.shape[1]
    group = columns // groups
    if not codes.is_cpu or rows % ROW_BLOCK or group not in GROUPS:
        return None
    offset = torch.zeros_like(scale) if offset is None else offset
    both = torch.stack([scale.T, offset.T], -1).contiguous()
    return Packed(torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1), group, both)


def takes_8bit(codes: Tensor) -> bool:
    """Whether :func:`few_rows_8bit` is right for such a weight."""
    return codes.shape[1] % COLUMN_BLOCK == 0


def few_rows_8bit(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y = torch._weight_int8pack_mm(rows, codes, scale)
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def few_rows_4bit(x: Tensor, packed: Packed) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y = torch._weight_int4pack_mm_for_cpu(rows, packed.codes, packed.group, packed.scale_and_offset)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """(M, K) times the transpose of (N, K), both int8, as exact sums in float32."""
    if x.shape[0] and codes.shape[0] and _sums_are_exact(x.device.type):
        return torch._int_mm(x, codes.T).float()
    return (x.double() @ codes.double().T).float()


@functools.cache
def _sums_are_exact(device: str) -> bool:
    """Whether torch's product of int8 is there and does not saturate, as pairs of products do on some processors."""
    if device != "cpu":
        return False
    high = torch.full((3, 512), 127, dtype=torch.int8, device=device)
    low = torch.full((16, 512), -128, dtype=torch.int8, device=device)
    try:
        found = [int(torch._int_mm(high, other.T)[0, 0]) for other in (low, -low - 1)]
    except RuntimeError:
        return False
    return found == [-127 * 128 * 512, 127 * 127 * 512]
