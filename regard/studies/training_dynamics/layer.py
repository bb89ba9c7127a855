r"""The one-layer model of arXiv 2305.16380 with its exact gradients, on finite contexts and on infinitely long ones alike.

For a last token m and a context in which token l is k_l times:

    b_l = k_l e^{z_ml} / sum_l' k_l' e^{z_ml'},   u = b (+ e_m with a residual),   f = u / |u|  (or u),
    logits = Y^T f,   alpha = softmax(logits),   J = log alpha_n

    dJ/dY   = f (e_n - alpha)^T
    g       = (I - f f^T) Y (e_n - alpha) / |u|   (or Y (e_n - alpha))
    dJ/dz_m = b o (g - <b, g>)

What the paper writes as a sum over the tokens t of a sequence is a sum over l of its counts; with chances in the place of counts
it is the limit of long contexts. The last line is that of every softmax: it adds up to 0 over l, so that gradient descent
never changes sum_l z_ml, with momentum or without, from any start, for any length, normalised or not. With z_ml = q_m . k_l of
rank r it is sum_l k_l that stays. Weight decay and Adam change both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least, one_of
from regard.studies.training_dynamics.facts import Contexts

if TYPE_CHECKING:
    from jaxtyping import Float

STARTS = ("zero", "uniform")


@dataclass(frozen=True)
class Model:
    """What of the model is chosen; its weights are a mapping by name: ``y`` and ``z``, or ``y``, ``q`` and ``k``. Those of several
    runs may be stacked, with an axis of runs before the others: all runs then read the same contexts.

    Attributes:
        normalise: whether f is u over its norm.
        residual: whether the last token is added to u.
        last_as_key: whether the last token is one of those that it attends to.
        rank: of z = q k^T; None for a matrix of its own.
    """

    normalise: bool = True
    residual: bool = False
    last_as_key: bool = False
    rank: int | None = None

    def start(self, size: int, how: str = "zero", generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weights of `size` tokens: ``zero``, or ``uniform`` within size^-1/2 as linear layers begin.

        Raises:
            Unsupported: for zeros of a factored z, whose gradients are 0 forever.
        """
        one_of("start", how, STARTS)
        if self.rank is not None:
            at_least("rank", self.rank, 1)
            if how == "zero":
                raise Unsupported("q = k = 0, which no gradient moves", supported="start='uniform' with a rank")
        shapes = {"y": size, **({"z": size} if self.rank is None else {"q": self.rank, "k": self.rank})}
        found = {name: torch.zeros(size, width, dtype=torch.float64) for name, width in shapes.items()}
        if how == "uniform":
            for weight in found.values():
                weight.uniform_(-1, 1, generator=generator).mul_(size**-0.5)
        return found

    def conserved(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What gradient descent does not change: the sums of z over keys (M,), or the sum of the keys (r,)."""
        return weights["z"].sum(-1) if self.rank is None else weights["k"].sum(-2)

    def scores(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "m m"]:
        """z, a row for each last token."""
        return weights["z"] if self.rank is None else weights["q"] @ weights["k"].mT

    def gradients(self, weights: Mapping[str, Tensor], contexts: Contexts) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of J over the contexts, and its gradient by weight: what is climbed."""
        y, last, rows = weights["y"], contexts.last, torch.arange(len(contexts.last))
        attended, u = self._attend(weights, contexts)
        length = u.norm(dim=-1, keepdim=True) if self.normalise else torch.ones_like(u[..., :1])
        f = u / length
        chances = (f @ y).log_softmax(-1)
        value = chances[..., rows, contexts.following].mean(-1)
        error = -chances.exp()
        error[..., rows, contexts.following] += 1
        error /= len(last)
        g = error @ y.mT
        if self.normalise:
            g = (g - f * (f * g).sum(-1, keepdim=True)) / length
        of_scores = attended * (g - (attended * g).sum(-1, keepdim=True))
        found = {"y": f.mT @ error}
        if self.rank is None:
            found["z"] = torch.zeros_like(weights["z"]).index_add_(-2, last, of_scores)
        else:
            found["q"] = torch.zeros_like(weights["q"]).index_add_(-2, last, of_scores @ weights["k"])
            found["k"] = of_scores.mT @ weights["q"][..., last, :]
        return value, found

    def value(self, weights: Mapping[str, Tensor], contexts: Contexts) -> Tensor:
        """The mean of J alone, which can be differentiated."""
        _, u = self._attend(weights, contexts)
        f = u / u.norm(dim=1, keepdim=True) if self.normalise else u
        return (f @ weights["y"]).log_softmax(1).gather(1, contexts.following[:, None]).mean()

    def _attend(self, weights: Mapping[str, Tensor], contexts: Contexts) -> tuple[Tensor, Tensor]:
        """b and u."""
        own = torch.zeros_like(contexts.counts).scatter_(1, contexts.last[:, None], 1)
        counts = contexts.counts + own if self.last_as_key else contexts.counts
        scores = self.scores(weights)[..., contexts.last, :]
        attended = (scores + counts.log()).softmax(-1)  # log 0 leaves a token out
        return attended, attended + own if self.residual else attended

    def attention(self, weights: Mapping[str, Tensor], contexts: Contexts) -> Float[Tensor, "b m"]:
        """b: with the limit's contexts the table c_{l|m,n}, without the noise of sequences."""
        return self._attend(weights, contexts)[0]


def entropy(rows: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
    """In nats."""
    return torch.special.entr(rows).sum(-1)
