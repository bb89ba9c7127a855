"""The arguments of attention to retrieved blocks as one object, which the engine's forms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.precision import wide_dtype
from regard.engines.grouped_attention import Dropout

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def tolerance(dtype: torch.dtype) -> float:
    """The difference up to which scores with keys of this dtype are ties, relative to the lengths of the query and of the
    longest key, and to the scale.

    Keys of equal landmarks differ by rounding, which depends on what else is computed with them: by the errors of a sum in
    their wide dtype, after which a few numbers may be rounded to another neighbour in their own.
    """
    return 16 * torch.finfo(wide_dtype(dtype)).eps + torch.finfo(dtype).eps / 8


@dataclass(frozen=True)
class Problem:
    """The arguments of the engine besides queries and the cache's keys and values.

    Attributes:
        marks: keys of the landmarks that close a block with a token, the newest last; the cache contains them too.
        closed: ranks of these landmarks, ascending; below the first cached rank if a row has fewer blocks.
        landmark: mask of the slots that hold a landmark.
        cached: number of tokens in each row, which are in its last slots.
        length: number of tokens in each row so far: the last slot holds the one of rank length - 1.
        block: largest number of tokens before a landmark.
        top_k: largest number of blocks per query and head.
        scale: factor on the scores.
        rotate: rotates keys to the positions of their blocks, see :mod:`regard.engines.retrieved_attention`; None to
            read keys unchanged.
        chosen: numbers of the blocks that each query reads, in order of time, -1 for none; None for those with the
            highest scores.
        softmax: ``grouped``, ``ignore`` (softmax over normal tokens) or ``plain`` (landmarks are treated like other
            tokens).
        dropout: dropout of weights and gates.
    """

    marks: Float[Tensor, "b g blocks d"]
    closed: Int[Tensor, "b blocks"]
    landmark: Bool[Tensor, "b m"]
    cached: Int[Tensor, " b"]
    length: Int[Tensor, " b"]
    block: int
    top_k: int
    scale: float
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    chosen: Int[Tensor, "b h #n picks"] | None = None
    softmax: str = "grouped"
    dropout: Dropout = Dropout()
