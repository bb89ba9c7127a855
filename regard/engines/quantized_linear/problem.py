"""A product with a quantized weight as an object, which its forms and its operator share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.operators import Packed


@dataclass(frozen=True)
class Problem(Packed):
    """What :func:`regard.engines.quantized_linear.quantized_linear` is given, with as many columns of x as it has."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def columns(self) -> int:
        """Columns of the codes, those that pad the last group among them."""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def group(self) -> int:
        """Columns with one scale."""
        return self.columns // self.scale.shape[1] if self.scale.shape[1] else 0

    @property
    def rows(self) -> int:
        """Rows of x."""
        return self.x.shape[:-1].numel()

    def empty(self) -> Tensor:
        """A result that nothing is written to."""
        return self.x.new_empty((*self.x.shape[:-1], self.codes.shape[0]))
