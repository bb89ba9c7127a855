"""Sequences whose next token depends on the last one and the context before it, as generated in arXiv 2305.16380.

A fact is a last token m, a next token n, and the probability P(l | m, n) of each token of the context, whose tokens are
drawn independently. Without positions only the count of each token in a context matters, so contexts are drawn as
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported, at_least

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Contexts:
    """A batch of contexts.

    Attributes:
        counts: (B, M), how often each token is in the context.
        last, following: last and next tokens, (B,).
    """

    counts: Float[Tensor, "b m"]
    last: Int[Tensor, " b"]
    following: Int[Tensor, " b"]


@dataclass(frozen=True)
class Facts:
    """The facts to be learned.

    Attributes:
        probabilities: P(l | m, n), (F, M), a row for each fact, in float64.
        last, following: last and next token of each fact, (F,).
    """

    probabilities: Float[Tensor, "f m"]
    last: Int[Tensor, " f"]
    following: Int[Tensor, " f"]

    @classmethod
    def make(
        cls,
        num_last: int = 2,
        num_next: int = 1,
        *,
        common: int = 10,
        common_of_last: int = 0,
        distinct: int = 10,
        least: float = 0.1,
        most: float = 1.0,
    ) -> Facts:
        """Facts as in the paper's code. Order of tokens: common, common of a last token, distinct, last, next.

        Args:
            num_last: number of last tokens.
            num_next: number of next tokens for each last token.
            common: number of tokens that occur in every fact, each with weight 1.
            common_of_last: number of further common tokens for each last token, which occur in its facts only.
            distinct: number of tokens in each fact that occur in no other; their weights rise evenly from `least` to
                `most`.
        """
        for name, value, low in (("num_last", num_last, 1), ("num_next", num_next, 1), ("distinct", distinct, 0)):
            at_least(name, value, low)
        for name, value in (("common", common), ("common_of_last", common_of_last)):
            at_least(name, value, 0)
        if not common + common_of_last + distinct:
            raise Unsupported("facts without tokens in their contexts", supported="common or distinct tokens")
        count = num_last * num_next
        first_distinct = common + common_of_last * num_last
        first_last = first_distinct + distinct * count
        weights = torch.zeros(count, first_last + num_last + count, dtype=torch.float64)
        weights[:, :common] = 1
        fact = torch.arange(count)
        last = fact // num_next
        for i in range(common_of_last):
            weights[fact, common + common_of_last * last + i] = 1
        for i, weight in enumerate(torch.linspace(least, most, distinct, dtype=torch.float64)):
            weights[fact, first_distinct + distinct * fact + i] = weight
        probabilities = weights / weights.sum(1, keepdim=True)
        return cls(probabilities, first_last + last, first_last + num_last + fact)

    @property
    def size(self) -> int:
        """M, the number of tokens."""
        return self.probabilities.shape[1]

    @property
    def common(self) -> Bool[Tensor, " m"]:
        """Tokens that occur with several next tokens."""
        return (self.probabilities > 0).sum(0) > 1

    @property
    def distinct(self) -> Bool[Tensor, " m"]:
        """Tokens that occur with exactly one next token."""
        return (self.probabilities > 0).sum(0) == 1

    def limit(self) -> Contexts:
        """Every fact once, with an infinitely long context: its counts are the probabilities."""
        return Contexts(self.probabilities, self.last, self.following)

    def draw(self, batch: int, length: int, generator: np.random.Generator) -> Contexts:
        """Draw contexts of `length` tokens, from facts drawn uniformly."""
        at_least("batch", batch, 1)
        at_least("length", length, 1)
        fact = torch.from_numpy(generator.integers(0, len(self.last), batch))
        used = (self.probabilities > 0).any(0)
        chances = self.probabilities[fact][:, used].numpy()
        counts = torch.zeros(batch, self.size, dtype=torch.float64)
        counts[:, used] = torch.from_numpy(generator.multinomial(length, chances).astype(np.float64))
        return Contexts(counts, self.last[fact], self.following[fact])

    def relabelled(self, order: Int[Tensor, " m"]) -> Facts:
        """The same facts with token l renamed to order[l]."""
        probabilities = torch.empty_like(self.probabilities)
        probabilities[:, order] = self.probabilities
        return Facts(probabilities, order[self.last], order[self.following])


def counted(tokens: Int[Tensor, "b t"], size: int) -> Float[Tensor, "b m"]:
    """Count how often each of `size` tokens occurs in each row."""
    counts = torch.zeros(len(tokens), size, dtype=torch.float64)
    return counts.scatter_add_(1, tokens, torch.ones(tokens.shape, dtype=torch.float64))
