"""Scores of answers, against the right ones or, if those are not known, against the original model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.precision import wide
from regard.integrations.encoders import UNASKED
from regard.measurement.statistics import score_of_items
from regard.retrofit.measures.shared import Closeness

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Sum(Protocol):
    """A running sum of scores over batches."""

    def add(self, found: Tensor, right: Tensor) -> None:
        """Add a batch of answers, given the right ones or the original's."""
        ...

    def value(self) -> tuple[float, float]:
        """The score over all batches, and its standard error over the items; nan if that is not known."""
        ...


@dataclass(frozen=True)
class Score:
    """A kind of score.

    Attributes:
        metric, higher_is_better: name of the metric, and whether higher is better.
        known: whether right answers are known; otherwise the original's take their place.
        begin: starts an empty sum.
    """

    metric: str
    higher_is_better: bool
    known: bool
    begin: Callable[[], Sum]


class CrossEntropy:
    """Mean nats of the right answers, over all positions that are asked for."""

    def __init__(self) -> None:
        self.items: list[tuple[float, float]] = []

    def add(self, found: Float[Tensor, "b *n k"], right: Int[Tensor, "b *n"]) -> None:
        asked = right != UNASKED
        item = asked.nonzero()[:, 0]
        nats = F.cross_entropy(wide(found[asked]), right[asked], reduction="none").double()
        each = torch.stack([nats, torch.ones_like(nats)], 1)
        self.items += each.new_zeros(len(right), 2).index_add(0, item, each).tolist()

    def value(self) -> tuple[float, float]:
        return score_of_items(self.items)


class _Perplexity(CrossEntropy):
    """``exp`` of the mean nats."""

    def value(self) -> tuple[float, float]:
        nats, error = super().value()
        found = math.exp(min(nats, 700.0))
        return found, found * error


class _Same:
    """The share of items with the right class, or with the same class as the original, whose logits are given."""

    def __init__(self) -> None:
        self.items: list[tuple[float, float]] = []

    def add(self, found: Float[Tensor, "b k"], right: Tensor) -> None:
        right = right.argmax(-1) if right.is_floating_point() else right
        self.items += [(float(same), 1.0) for same in found.argmax(-1) == right]

    def value(self) -> tuple[float, float]:
        return score_of_items(self.items)


class _Kept:
    """The share of the variance in the original's outputs that is kept."""

    def __init__(self) -> None:
        self.closeness = Closeness()

    def add(self, found: Float[Tensor, "... c"], right: Float[Tensor, "... c"]) -> None:
        self.closeness.add(found.flatten(0, -2), right.flatten(0, -2))

    def value(self) -> tuple[float, float]:
        share, error = self.closeness.share()
        return share, math.nan if error is None else error


MASKED = Score("masked perplexity", False, True, _Perplexity)
ACCURACY = Score("accuracy", True, True, _Same)
AGREEMENT = Score("agreement", True, False, _Same)
KEPT = Score("variance kept", True, False, _Kept)
