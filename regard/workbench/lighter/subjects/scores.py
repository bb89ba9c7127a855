"""How good answers are: by right ones, or by the answers of the original where none are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn import functional as F

from regard.core.precision import wide
from regard.integrations.encoders import UNASKED
from regard.retrofit.measures.shared import Closeness

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Sum(Protocol):
    """Answers of some batches, added up."""

    def add(self, found: Tensor, right: Tensor) -> None:
        """Those of a batch beside the right ones, or those of the original."""
        ...

    def value(self) -> float:
        """The score of all."""
        ...


@dataclass(frozen=True)
class Score:
    """How answers are scored.

    Attributes:
        metric, higher_is_better: of it.
        known: whether right answers are; those of the original stand for them otherwise.
        begin: a sum of nothing.
    """

    metric: str
    higher_is_better: bool
    known: bool
    begin: Callable[[], Sum]


class _Perplexity:
    """``exp`` of the mean nats of what is asked."""

    def __init__(self) -> None:
        self.nats, self.count = 0.0, 0

    def add(self, found: Float[Tensor, "b n v"], right: Int[Tensor, "b n"]) -> None:
        asked = right != UNASKED
        self.nats += float(F.cross_entropy(wide(found[asked]), right[asked], reduction="sum"))
        self.count += int(asked.sum())

    def value(self) -> float:
        return math.exp(min(self.nats / self.count, 700.0))


class _Same:
    """The share of items of the same class: of the right one, or of the original's, whose logits are given."""

    def __init__(self) -> None:
        self.same, self.count = 0, 0

    def add(self, found: Float[Tensor, "b k"], right: Tensor) -> None:
        right = right.argmax(-1) if right.is_floating_point() else right
        self.same += int((found.argmax(-1) == right).sum())
        self.count += len(right)

    def value(self) -> float:
        return self.same / self.count


class _Kept:
    """The share of the variance of the original's numbers that is kept."""

    def __init__(self) -> None:
        self.closeness = Closeness()

    def add(self, found: Float[Tensor, "... c"], right: Float[Tensor, "... c"]) -> None:
        self.closeness.add(found.flatten(0, -2), right.flatten(0, -2))

    def value(self) -> float:
        return self.closeness.share()[0]


MASKED = Score("masked perplexity", False, True, _Perplexity)
ACCURACY = Score("accuracy", True, True, _Same)
AGREEMENT = Score("agreement", True, False, _Same)
KEPT = Score("variance kept", True, False, _Kept)
