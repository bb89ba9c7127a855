r"""The one-layer model of arXiv 2305.16380 with exact gradients, for finite and for infinitely long contexts.

For a last token m and a context in which token l is k_l times:

    b_l = k_l e^{z_ml} / sum_l' k_l' e^{z_ml'},   u = b (+ e_m with a residual),   f = u / |u|  (or u),
    logits = Y^T f,   alpha = softmax(logits),   J = log alpha_n

    dJ/dY   = f (e_n - alpha)^T
    g       = (I - f f^T) Y (e_n - alpha) / |u|   (or Y (e_n - alpha))
    dJ/dz_m = b o (g - <b, g>)

The paper's sums over the tokens t of a sequence are sums over l of its counts here; with probabilities in place of
counts they give the limit of long contexts. The last line is the gradient of every softmax: it sums to 0 over l, so
gradient descent never changes sum_l z_ml, with or without momentum, from any start, for any length, normalised or not.
With z_ml = q_m . k_l of rank r it conserves sum_l k_l instead. Weight decay and Adam change both sums.
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
    """Options of the model. Its weights are a mapping by name: ``y`` and ``z``, or ``y``, ``q`` and ``k``. The weights
    of several runs may be stacked along a leading axis; all runs then read the same contexts.

    Attributes:
        normalise: whether f is u over its norm.
        residual: whether the last token is added to u.
        last_as_key: whether the last token attends to itself, too.
        rank: rank of z = q k^T; None where z is a full matrix.
    """

    normalise: bool = True
    residual: bool = False
    last_as_key: bool = False
    rank: int | None = None

    def start(self, size: int, how: str = "zero", generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Initial weights for `size` tokens: ``zero``, or ``uniform`` within size^-1/2 as in linear layers.

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
        """The sums that gradient descent conserves: those of z over keys (M,), or the sum of the keys (r,)."""
        return weights["z"].sum(-1) if self.rank is None else weights["k"].sum(-2)

    def scores(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "m m"]:
        """The scores z, a row for each last token."""
        return weights["z"] if self.rank is None else weights["q"] @ weights["k"].mT

    def gradients(self, weights: Mapping[str, Tensor], contexts: Contexts) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of J over the contexts and its gradients by weight, for gradient ascent."""
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
        """The mean of J over the contexts, differentiable by autograd."""
        _, u = self._attend(weights, contexts)
        f = u / u.norm(dim=1, keepdim=True) if self.normalise else u
        return (f @ weights["y"]).log_softmax(1).gather(1, contexts.following[:, None]).mean()

    def _attend(self, weights: Mapping[str, Tensor], contexts: Contexts) -> tuple[Tensor, Tensor]:
        """The attention b, and u."""
        own = torch.zeros_like(contexts.counts).scatter_(1, contexts.last[:, None], 1)
        counts = contexts.counts + own if self.last_as_key else contexts.counts
        scores = self.scores(weights)[..., contexts.last, :]
        attended = (scores + counts.log()).softmax(-1)  # a count of 0 gives -inf and leaves the token out
        return attended, attended + own if self.residual else attended

    def attention(self, weights: Mapping[str, Tensor], contexts: Contexts) -> Float[Tensor, "b m"]:
        """The attention b; for the contexts of :meth:`Facts.limit` the paper's noise-free table c_{l|m,n}."""
        return self._attend(weights, contexts)[0]


def entropy(rows: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
    """Entropy of each row in nats."""
    return torch.special.entr(rows).sum(-1)
