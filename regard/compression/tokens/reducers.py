r"""Fewer tokens between two parts of a model: merged, dropped or pooled, with a map of where each went.

| name | what it does to n tokens of which r shall go | from |
|---|---|---|
| ``tome`` | tokens at even places each find the most similar one at an odd place, by the cosine of their keys; the r most similar pairs are merged to their mean, weighted by what they stand for | Token Merging, Bolya et al., arXiv 2210.09461, section 3 |
| ``evit`` | the r tokens that the class token attends to least go; their sum, weighted by that attention, stays as one token | EViT, Liang et al., arXiv 2202.07800, section 3.2 |
| ``random`` | r tokens go, drawn anew in each call | a baseline |
| ``stride`` | those that stay lie at even distances | a baseline |
| ``mean`` | neighbours in the row of tokens are pooled to n - r means of about equal size | a baseline |

Class tokens come first, are never merged and never dropped. The others keep their order, but for ``tome``: there those at
even places come before those at odd ones, so that the next block pairs other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

DROPPED = -1
"""The place of a token that is no more."""


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way through a model.

    Attributes:
        x: vectors (B, N, C).
        sizes: how many of the first tokens each stands for (B, N).
        places: where each of the first tokens is now (B, N_0), or `DROPPED`.
        protected: class tokens, which come first.
    """

    x: Float[Tensor, "b n c"]
    sizes: Float[Tensor, "b n"]
    places: Int[Tensor, "b n0"]
    protected: int

    @classmethod
    def begin(cls, x: Float[Tensor, "b n c"], protected: int) -> Tokens:
        """All tokens, each for itself."""
        batch, n, _ = x.shape
        places = torch.arange(n, device=x.device).expand(batch, n)
        return cls(x, x.new_ones(batch, n), places, protected)

    def assign(self, target: Int[Tensor, "b n"], count: int) -> Tokens:
        """`count` tokens, each the mean of those whose `target` it is, weighted by their sizes; without `DROPPED` ones."""
        slots = torch.where(target == DROPPED, count, target)  # one slot more, for what is dropped
        weighted = self.x * self.sizes[..., None]
        batch, _, width = self.x.shape
        total = weighted.new_zeros(batch, count + 1, width).scatter_add(
            1, slots[..., None].expand_as(weighted), weighted
        )
        sizes = self.sizes.new_zeros(batch, count + 1).scatter_add(1, slots, self.sizes)
        x = (total / sizes.clamp(min=1)[..., None])[:, :count]
        moved = torch.where(self.places == DROPPED, DROPPED, target.gather(1, self.places.clamp(min=0)))
        return replace(self, x=x, sizes=sizes[:, :count], places=moved)


@dataclass(frozen=True)
class Evidence:
    """What a layer of attention tells of its tokens.

    Attributes:
        keys: (B, N, D), the mean over the heads.
        scores: attention of the class token to each token (B, N), the mean over the heads; None without a class token.
        generator: of draws.
    """

    keys: Float[Tensor, "b n d"]
    scores: Float[Tensor, "b n"] | None
    generator: torch.Generator | None = None


def _target_of_kept(kept: Tensor) -> Int[Tensor, "b n"]:
    """New places of the tokens that a mask (B, N) keeps, in their order; `DROPPED` of the others."""
    return torch.where(kept, kept.long().cumsum(1) - 1, DROPPED)


def _keep_largest(tokens: Tokens, scores: Tensor, remove: int) -> Int[Tensor, "b n"]:
    """Targets where the `remove` patches of the smallest scores (B, N) are dropped."""
    first, n = tokens.protected, tokens.x.shape[1]
    chosen = scores[:, first:].topk(n - first - remove, dim=1).indices + first
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    kept[:, :first] = True
    return _target_of_kept(kept.scatter(1, chosen, True))


def merge_similar(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Token Merging; at most half of the patches go at once."""
    n, place = tokens.x.shape[1], torch.arange(tokens.x.shape[1], device=tokens.x.device)
    remove = min(remove, (n - tokens.protected) // 2)
    keys = F.normalize(wide(evidence.keys), dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].mT
    even, odd = (tokens.protected + 1) // 2, tokens.protected // 2
    scores[:, :even] = -torch.inf
    scores[:, :, :odd] = -torch.inf
    best, partner = scores.max(-1)
    leaving = best.topk(remove, dim=1).indices
    # class tokens, then those at even places, then those at odd ones, last those that leave
    group = torch.where(place < tokens.protected, 0, 1 + place % 2).expand(tokens.x.shape[:2])
    target = (n * group.scatter(1, 2 * leaving, 3) + place).argsort(1).argsort(1)
    joined = target.gather(1, 2 * partner.gather(1, leaving) + 1)
    return tokens.assign(target.scatter(1, 2 * leaving, joined), n - remove)


def keep_attended(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """EViT, with the fused token at the end; it is one of the patches in later blocks."""
    assert evidence.scores is not None
    scores = evidence.scores.to(tokens.x.dtype)
    target = _keep_largest(tokens, scores, remove)
    lost = target == DROPPED
    count = tokens.x.shape[1] - remove
    kept = tokens.assign(target, count)
    weights = torch.where(lost, scores, 0)
    fused = (weights[..., None] * tokens.x).sum(1, keepdim=True)
    size = torch.where(lost, tokens.sizes, 0).sum(1, keepdim=True)
    places = torch.where((kept.places == DROPPED) & (tokens.places != DROPPED), count, kept.places)
    return replace(kept, x=torch.cat([kept.x, fused], 1), sizes=torch.cat([kept.sizes, size], 1), places=places)


def drop_random(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Other tokens in each row."""
    draws = torch.rand(tokens.x.shape[:2], generator=evidence.generator, device=tokens.x.device)
    return tokens.assign(_keep_largest(tokens, draws, remove), tokens.x.shape[1] - remove)


def keep_strided(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """The same places in all rows."""
    batch, n = tokens.x.shape[:2]
    first = tokens.protected
    count = n - first - remove
    places = first + torch.arange(count, device=tokens.x.device) * (n - first) // max(count, 1)
    kept = torch.zeros(batch, n, dtype=torch.bool, device=tokens.x.device)
    kept[:, :first] = True
    kept[:, places] = True
    return tokens.assign(_target_of_kept(kept), n - remove)


def pool_neighbours(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Means of neighbours in the row of tokens."""
    batch, n = tokens.x.shape[:2]
    first = tokens.protected
    patches = torch.arange(n - first, device=tokens.x.device)
    pooled = first + patches * (n - first - remove) // max(n - first, 1)
    target = torch.cat([torch.arange(first, device=tokens.x.device), pooled])
    return tokens.assign(target.expand(batch, n), n - remove)


METHODS: dict[str, Callable[[Tokens, Evidence, int], Tokens]] = {
    "tome": merge_similar,
    "evit": keep_attended,
    "random": drop_random,
    "stride": keep_strided,
    "mean": pool_neighbours,
}
