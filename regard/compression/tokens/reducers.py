r"""Fewer tokens between two parts of a model: merged, dropped or pooled, with a map of where each went.

| name | what it does to n tokens of which r shall go | from |
|---|---|---|
| ``tome`` | tokens at even places each find the most similar one at an odd place, by the cosine of their keys; the r most similar pairs are merged to their mean, weighted by what they stand for | Token Merging, Bolya et al., arXiv 2210.09461, section 3 |
| ``tome_stride`` | tokens at even distances stay; every other one is merged into the most similar of them | the same authors' code, there with every k-th token |
| ``tome_random`` | r tokens, drawn anew in each call, are merged into the most similar of the others | the same authors' code |
| ``evit`` | the r tokens that the class token attends to least go; their sum, weighted by that attention, stays as one token | EViT, Liang et al., arXiv 2202.07800, section 3.2 |
| ``attention`` | as ``evit``, without that sum | the same, section 4.3 |
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

    def spread(self, values: Float[Tensor, "b n d"]) -> Float[Tensor, "b n0 d"]:
        """Numbers of the tokens that are left, at each of the first tokens; 0 where one was dropped."""
        found = values.gather(1, self.places.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
        return torch.where((self.places == DROPPED)[..., None], 0, found)

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
        metric: what tokens are compared by (B, N, D): their keys, the mean over the heads, unless asked otherwise.
        scores: attention of the class token to each token (B, N), the mean over the heads; None without a class token.
        generator: of draws.
    """

    metric: Float[Tensor, "b n d"]
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
    keys = F.normalize(wide(evidence.metric), dim=-1)
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


def _merge_into_rest(tokens: Tokens, evidence: Evidence, leaving: Tensor, remove: int) -> Tokens:
    """The tokens that a mask (B, N) names, each merged into the most similar patch of the others."""
    keys = F.normalize(wide(evidence.metric), dim=-1)
    stays = ~leaving
    stays[:, : tokens.protected] = False
    scores = (keys @ keys.mT).masked_fill(~stays[:, None], -torch.inf)
    target = _target_of_kept(~leaving)
    joined = target.gather(1, scores.argmax(-1))
    return tokens.assign(torch.where(leaving, joined, target), tokens.x.shape[1] - remove)


def merge_strided(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Token Merging into tokens at even distances."""
    return _merge_into_rest(tokens, evidence, ~_strided(tokens, remove), remove)


def merge_random(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Token Merging of drawn tokens."""
    draws = torch.rand(tokens.x.shape[:2], generator=evidence.generator, device=tokens.x.device)
    return _merge_into_rest(tokens, evidence, _keep_largest(tokens, draws, remove) == DROPPED, remove)


def drop_unattended(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """EViT without its fused token."""
    assert evidence.scores is not None
    return tokens.assign(_keep_largest(tokens, evidence.scores, remove), tokens.x.shape[1] - remove)


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


def _strided(tokens: Tokens, remove: int) -> Tensor:
    """A mask (B, N) of class tokens and of all but `remove` patches, at even distances."""
    batch, n = tokens.x.shape[:2]
    first = tokens.protected
    count = n - first - remove
    places = first + torch.arange(count, device=tokens.x.device) * (n - first) // max(count, 1)
    kept = torch.zeros(batch, n, dtype=torch.bool, device=tokens.x.device)
    kept[:, :first] = True
    kept[:, places] = True
    return kept


def keep_strided(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """The same places in all rows."""
    return tokens.assign(_target_of_kept(_strided(tokens, remove)), tokens.x.shape[1] - remove)


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
    "tome_stride": merge_strided,
    "tome_random": merge_random,
    "evit": keep_attended,
    "attention": drop_unattended,
    "random": drop_random,
    "stride": keep_strided,
    "mean": pool_neighbours,
}
