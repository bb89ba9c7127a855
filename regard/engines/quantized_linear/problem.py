"""The arguments of a product with a quantized weight as one object, which forms and operator share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.operators import Packed


@dataclass(frozen=True)
class Problem(Packed):
    """The arguments of :func:`regard.engines.quantized_linear.quantized_linear`, with x not yet padded."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None

    @property
    def bits(self) -> int:
        """Number of bits per code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def columns(self) -> int:
        """Number of code columns, including those that pad the last group."""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def group(self) -> int:
        """Number of columns that share one scale."""
        return self.columns // self.scale.shape[1] if self.scale.shape[1] else 0

    @property
    def rows(self) -> int:
        """Number of rows of x."""
        return self.x.shape[:-1].numel()

    def empty(self) -> Tensor:
        """An uninitialised result."""
        return self.x.new_empty((*self.x.shape[:-1], self.codes.shape[0]))
