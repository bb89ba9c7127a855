"""Two codes of 4 bits in a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Shaped, UInt8

MIDDLE = 8
"""The 4-bit code of 0 on a symmetric grid."""


def padded(x: Shaped[Tensor, "*b k"], columns: int) -> Shaped[Tensor, "*b columns"]:
    """With zeros behind its last column."""
    return x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1]))


def pack(codes: UInt8[Tensor, "n k"]) -> UInt8[Tensor, "n half"]:
    """Of an even number of columns, each 0 to 15."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: UInt8[Tensor, "n half"]) -> UInt8[Tensor, "n k"]:
    """What :func:`pack` was given."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
