"""Zeros around the tokens of an axis, in compiled programs as in eager code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


def pad_tokens(x: Shaped[Tensor, "..."], before: int, after: int, axis: int = 2) -> Shaped[Tensor, "..."]:
    """Add `before` zeros (False for booleans) in front of an axis (counted from the first) and `after` behind it.

    In a program the counts may be unknown until it runs. Where both turn out to be 0, torch's pad keeps the strides of
    its input, while the compiler has assumed contiguous memory and a later view fails: so the input is made contiguous.
    """
    if torch.compiler.is_compiling():
        x = x.contiguous()
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (before, after))
