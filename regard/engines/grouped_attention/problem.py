"""The arguments of softmax in two levels as one object, which the engine's forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import BlockMask
from regard.core.draws import uniform
from regard.core.precision import wide
from regard.core.visibility import PositionBias, Ranks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Dropout:
    """Dropout of weights and of groups.

    Attributes:
        weights: probability of dropping a weight.
        gates: probability of dropping the gate of a group other than the query's own.
        generator: random generator.
    """

    weights: float = 0.0
    gates: float = 0.0
    generator: torch.Generator | None = None

    @property
    def random(self) -> bool:
        """True if anything is drawn."""
        return self.weights > 0 or self.gates > 0

    def of_weights(self, weights: Tensor) -> Tensor:
        """Drop some of the weights and scale up the rest."""
        if self.weights == 0:
            return weights
        kept = uniform(weights.shape, self.generator, device=weights.device, dtype=weights.dtype)
        return weights * (kept >= self.weights) / (1 - self.weights)

    def of_gates(self, shape: torch.Size, like: Tensor) -> Tensor | None:
        """Factors of 0 or 1 / (1 - gates) for each gate; None if no gate is dropped."""
        if self.gates == 0:
            return None
        kept = uniform(shape, self.generator, device=like.device, dtype=wide(like).dtype) >= self.gates
        return kept / (1 - self.gates)


@dataclass(frozen=True)
class Problem:
    """The arguments of the engine besides queries, keys and values.

    Attributes:
        ranks: ranks of the queries and the keys.
        landmark: mask of the key slots that close a group.
        own: number of each query's own group, counted from 0 along the slots; None if queries have none, so that all
            groups are gated.
        causal: whether only keys at or before the query are visible.
        scale: factor on the scores.
        dropout: dropout of weights and gates.
        bias: added to the scores, by slot; axes of size 1 broadcast; -inf hides.
        position_bias: the same as a function of ranks.
        blocks: block-sparse visibility, by rank.
        want_weights, want_lse: whether to return the weights, and the log-sum-exp of the upper level.
    """

    ranks: Ranks
    landmark: Bool[Tensor, "b m"]
    own: Int[Tensor, "#b n"] | None
    causal: bool
    scale: float
    dropout: Dropout
    bias: Float[Tensor, "#b #h #n #m"] | None = None
    position_bias: PositionBias | None = None
    blocks: BlockMask | None = None
    want_weights: bool = False
    want_lse: bool = False
