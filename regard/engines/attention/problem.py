"""The arguments of attention as one object, which the engine's forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import BlockMask, Unsupported, one_of
from regard.core.visibility import PositionBias, Ranks, Visibility

if TYPE_CHECKING:
    from jaxtyping import Float

RULES = ("softmax", "sigmoid", "relu", "relu_squared")
"""Rules that turn scores into weights, in the order of the kernels' numbers."""


@dataclass(frozen=True)
class Problem:
    """The arguments of attention besides queries, keys and values.

    Attributes:
        ranks: ranks of the queries and the keys.
        visibility: which key ranks each query rank may see.
        scale: factor on the scores.
        rule: turns scores into weights: ``softmax``, or elementwise ``sigmoid``, ``relu`` or ``relu_squared`` of score
            + shift.
        shift: see `rule`; 0 for softmax, which does not depend on it.
        softcap: c > 0 replaces each score s = scale q . k by c tanh(s / c), before biases.
        sink: for softmax: one more logit per head in the denominator, as of a key with the value 0.
        stretch: for softmax: (low, high), low <= 0 and high >= 1, to which the range of the weights is stretched before
            they are clipped to [0, 1]. A weight of 0 stays 0.
        largest: for softmax: how many of the largest weights of each query to keep, after dropout in training; the rest
            become 0 without renormalisation. None for all.
        bias: added to the scores, by slot (including cached keys); axes of size 1 broadcast.
        position_bias: the same as a function of ranks.
        blocks: block-sparse visibility, by rank.
        dropout: probability of dropping a weight (after normalisation).
        generator: random generator for dropout.
        want_weights: whether to return the weights, before dropout.
        want_lse: whether to return the log-sum-exp of the scores, for softmax: of the keys without the sink, in at
            least float32; -inf for a query that sees no key.

    Raises:
        Unsupported: for an unknown rule, a softcap that is not positive, an invalid stretch, and the log-sum-exp, a
            sink or a stretch with another rule than softmax.
    """

    ranks: Ranks
    visibility: Visibility
    scale: float
    rule: str = "softmax"
    shift: float = 0.0
    softcap: float | None = None
    sink: Float[Tensor, " h"] | None = None
    stretch: tuple[float, float] | None = None
    largest: int | None = None
    bias: Float[Tensor, "#b #h #n #m"] | None = None
    position_bias: PositionBias | None = None
    blocks: BlockMask | None = None
    dropout: float = 0.0
    generator: torch.Generator | None = None
    want_weights: bool = False
    want_lse: bool = False

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)
        softmax = self.rule == "softmax"
        if softmax and self.shift:
            raise Unsupported(
                f"softmax attention with shift={self.shift}", supported="shift=0", nearest="rule='sigmoid'"
            )
        if self.want_lse and not softmax:
            raise Unsupported(f"the log-sum-exp of {self.rule} attention", supported="rule='softmax'")
        if self.sink is not None and not softmax:
            raise Unsupported(f"{self.rule} attention with a sink", supported="rule='softmax'", nearest="shift")
        if self.stretch is not None and (not softmax or not self.stretch[0] <= 0 < 1 <= self.stretch[1]):
            raise Unsupported(
                f"{self.rule} attention with stretch={self.stretch}",
                supported="rule='softmax', low <= 0 and high >= 1",
                nearest="None",
            )
        if self.largest is not None and (not softmax or self.largest < 1):
            raise Unsupported(
                f"the {self.largest} largest weights of {self.rule} attention", supported="1 or more, rule='softmax'"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise Unsupported(f"softcap={self.softcap}", supported="softcap > 0", nearest="softcap=None")
