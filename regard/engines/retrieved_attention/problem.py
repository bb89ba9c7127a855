"""A call of attention to retrieved blocks as one object, which the engine's forms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.engines.grouped_attention import Dropout

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Problem:
    """What is computed, beside its queries, and the keys and values of the cache.

    Attributes:
        marks: keys of the landmarks that close a block with a token, the newest last; as the cache has them too.
        closed: their ranks, ascending; below the first cached rank where a row has fewer blocks.
        landmark: slots that hold a landmark.
        cached: tokens of each row, which lie in its last slots.
        length: tokens of each row so far: the last slot holds the one of rank length - 1.
        block: most tokens before a landmark.
        top_k: most blocks of a query and head.
        scale: multiplies the scores.
        rotate: turns keys to the places that their blocks take, see :mod:`regard.engines.retrieved_attention`; None where
            they are read as they are.
        chosen: numbers of the blocks that each query reads, in order of time, -1 for none; None for those of the highest
            scores.
        softmax: ``grouped``, ``ignore`` (softmax over normal tokens) or ``plain`` (landmarks are tokens like others).
        dropout: what is dropped at random.
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
