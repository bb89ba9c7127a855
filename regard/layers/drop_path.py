"""Stochastic depth per example: during training, a residual branch is dropped for some rows of the batch.

``x + DropPath(p)(branch(x))`` (Huang et al., arXiv 1603.09382; drawn for each example as in vision transformers): a row
is set to zero with probability p and divided by 1 - p otherwise, so that its expectation is its value in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from regard.contract import Unsupported
from regard.core.draws import uniform

if TYPE_CHECKING:
    from jaxtyping import Float


class DropPath(nn.Module):
    """Zeroes whole examples of a residual branch during training; the identity in evaluation.

    Args:
        probability: probability of dropping a row, in [0, 1).
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        _check(probability)
        self.probability = probability

    def forward(
        self, x: Float[torch.Tensor, "b ..."], *, generator: torch.Generator | None = None
    ) -> Float[torch.Tensor, "b ..."]:
        """Drop rows of `x` and scale up the rest; `generator`, if given, is used for the draws."""
        if not self.training or self.probability == 0:
            return x
        draw = uniform((x.shape[0], *(1,) * (x.ndim - 1)), generator, device=x.device)
        return torch.where(draw >= self.probability, x / (1 - self.probability), x.new_zeros(()))

    def extra_repr(self) -> str:
        return f"{self.probability:g}"


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop probabilities of all blocks, stage by stage, rising evenly from 0 (first block) to `last` (last block)."""
    _check(last)
    total = sum(depths)
    rates = [last * i / max(total - 1, 1) for i in range(total)]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


def _check(probability: float) -> None:
    if not 0 <= probability < 1:
        raise Unsupported(f"drop_path={probability}", supported="0 <= drop_path < 1", nearest="drop_path=0.0")
