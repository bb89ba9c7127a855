r"""Reducing tokens between two parts of a model by merging, dropping or pooling, with a map of where each went.

| name | how it removes r of n tokens | from |
|---|---|---|
| ``tome`` | each token at an even position finds the most similar one at an odd position, by the cosine of their keys; the r most similar pairs are averaged, weighted by the numbers of tokens that they stand for | Token Merging, Bolya et al., arXiv 2210.09461, section 3 |
| ``tome_stride`` | evenly spaced tokens stay; each other one is merged into the most similar of them | the same authors' code, there with every k-th token |
| ``tome_random`` | r tokens, drawn at random in each call, are merged into the most similar of the others | the same authors' code |
| ``evit`` | the r tokens with the least attention from the class token are dropped; their sum, weighted by that attention, stays as one token | EViT, Liang et al., arXiv 2202.07800, section 3.2 |
| ``attention`` | like ``evit``, without that sum | the same, section 4.3 |
| ``random`` | r tokens, drawn at random in each call, are dropped | a baseline |
| ``stride`` | evenly spaced tokens stay | a baseline |
| ``mean`` | neighbours in the sequence are pooled to n - r means of about equal size | a baseline |

Class tokens come first, and are never merged or dropped. The others keep their order, except in ``tome``, where tokens
at even positions come before those at odd ones, so that the next block pairs other tokens. Every token keeps its
position; a merged one has that of the token that the others are merged into, a mean of neighbours that of the middle
one, and EViT's sum that of its most attended part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

DROPPED = -1
"""The place of a dropped token."""


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way through a model.

    Attributes:
        x: vectors (B, N, C).
        sizes: number of initial tokens that each stands for (B, N).
        places: current index of each initial token (B, N_0), or `DROPPED`.
        origins: number of the initial token whose position each has (B, N).
        protected: number of class tokens, which come first.
    """

    x: Float[Tensor, "b n c"]
    sizes: Float[Tensor, "b n"]
    places: Int[Tensor, "b n0"]
    origins: Int[Tensor, "b n"]
    protected: int

    @classmethod
    def begin(cls, x: Float[Tensor, "b n c"], protected: int) -> Tokens:
        """Start with all tokens, each standing for itself."""
        batch, n, _ = x.shape
        places = torch.arange(n, device=x.device).expand(batch, n)
        return cls(x, x.new_ones(batch, n), places, places, protected)

    def spread(self, values: Float[Tensor, "b n d"]) -> Float[Tensor, "b n0 d"]:
        """Spread values of the current tokens to the initial ones; 0 for dropped tokens."""
        found = values.gather(1, self.places.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
        return torch.where((self.places == DROPPED)[..., None], 0, found)

    def take(
        self,
        chosen: Int[Tensor, "b m"],
        leaving: Int[Tensor, "b r"] | None = None,
        into: Int[Tensor, "b r"] | None = None,
    ) -> Tokens:
        """Keep the `chosen` tokens, in this order; merge `leaving` tokens `into` positions among them; drop the others.

        A merged token is the mean of its parts, weighted by their sizes, at the position of the one that stays.
        """
        (batch, n, width), device = self.x.shape, self.x.device
        row = torch.arange(batch, device=device)[:, None]
        x, sizes = self.x[row, chosen], self.sizes[row, chosen]
        target = torch.full((batch, n), DROPPED, device=device)
        target = target.scatter(1, chosen, torch.arange(chosen.shape[1], device=device).expand_as(chosen))
        if leaving is not None and into is not None:
            target = target.scatter(1, leaving, into)
            more = self.sizes[row, leaving]
            total = (x * sizes[..., None]).scatter_add(
                1, into[..., None].expand(-1, -1, width), self.x[row, leaving] * more[..., None]
            )
            sizes = sizes.scatter_add(1, into, more)
            x = total / sizes[..., None]
        origins = self.origins.gather(1, chosen)
        return replace(self, x=x, sizes=sizes, places=self._moved(target), origins=origins)

    def assign(self, target: Int[Tensor, "b n"], leaders: Int[Tensor, "b m"]) -> Tokens:
        """Merge to as many tokens as there are `leaders`, whose positions they have; each is the mean, weighted by sizes, of
        the tokens with that `target`."""
        weighted = self.x * self.sizes[..., None]
        (batch, count), width = leaders.shape, self.x.shape[2]
        total = weighted.new_zeros(batch, count, width).scatter_add(1, target[..., None].expand_as(weighted), weighted)
        sizes = self.sizes.new_zeros(batch, count).scatter_add(1, target, self.sizes)
        origins = self.origins.gather(1, leaders)
        return replace(self, x=total / sizes[..., None], sizes=sizes, places=self._moved(target), origins=origins)

    def _moved(self, target: Int[Tensor, "b n"]) -> Int[Tensor, "b n0"]:
        """Places of the initial tokens after each token has moved to its `target`."""
        return torch.where(self.places == DROPPED, DROPPED, target.gather(1, self.places.clamp(min=0)))


@dataclass
class Heads:
    """Queries ``q`` and keys ``k`` (B, H, N, D) of a layer's call, as far as it has them.

    Attributes:
        given: without positions.
        placed: with the positions of the layer's scheme in them.
    """

    given: Mapping[str, Float[Tensor, "b h n d"]] = field(default_factory=dict)
    placed: Mapping[str, Float[Tensor, "b h n d"]] = field(default_factory=dict)

    def mean(self, name: str) -> Float[Tensor, "b n d"]:
        """Queries or keys without positions, averaged over the heads."""
        return self.given[name].mean(1)

    def from_first(self) -> Float[Tensor, "b h 1 n"]:
        """Scores of all keys for the first query, that of the class token."""
        query, key = self.placed["q"][:, :, :1], self.placed["k"]
        return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[-1] ** -0.5


@dataclass(frozen=True)
class Evidence:
    """Information from an attention layer about its tokens.

    Attributes:
        metric: vectors by which tokens are compared (B, N, D): by default their keys, averaged over the heads.
        scores: attention of the class token to each token (B, N), averaged over the heads; None for methods
            that do not read it.
        generator: source of random draws.
    """

    metric: Float[Tensor, "b n d"]
    scores: Float[Tensor, "b n"] | None
    generator: torch.Generator | None = None


def _largest(tokens: Tokens, scores: Tensor, remove: int) -> Int[Tensor, "b m"]:
    """Class tokens, and all patches but the `remove` with the smallest scores (B, N), in order."""
    first, n = tokens.protected, tokens.x.shape[1]
    chosen = scores[:, first:].topk(n - first - remove, dim=1).indices.sort(1).values + first
    return torch.cat([torch.arange(first, device=chosen.device).expand(chosen.shape[0], -1), chosen], 1)


def _others(tokens: Tokens, chosen: Int[Tensor, "b m"]) -> Int[Tensor, "b r"]:
    """The tokens that are not `chosen`, in order."""
    batch, n = tokens.x.shape[:2]
    out = torch.ones(batch, n, dtype=torch.uint8, device=chosen.device).scatter(1, chosen, 0)
    return out.argsort(dim=1, descending=True, stable=True)[:, : n - chosen.shape[1]]


def merge_similar(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Token Merging; removes at most half of the patches."""
    n, place = tokens.x.shape[1], torch.arange(tokens.x.shape[1], device=tokens.x.device)
    remove = min(remove, (n - tokens.protected) // 2)
    keys = F.normalize(wide(evidence.metric), dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].mT
    even, odd = (tokens.protected + 1) // 2, tokens.protected // 2
    scores[:, :even] = -torch.inf
    scores[:, :, :odd] = -torch.inf
    best, partner = scores.max(-1)
    leaving = best.topk(remove, dim=1).indices
    # class tokens, then tokens at even positions, then those at odd ones, then the leaving tokens
    group = torch.where(place < tokens.protected, 0, 1 + place % 2).expand(tokens.x.shape[:2])
    order = (n * group.scatter(1, 2 * leaving, 3) + place).argsort(1)
    chosen, leaving = order[:, : n - remove], order[:, n - remove :]
    return tokens.take(chosen, leaving, order.argsort(1).gather(1, 2 * partner.gather(1, leaving // 2) + 1))


def _merge_others(tokens: Tokens, evidence: Evidence, chosen: Int[Tensor, "b m"]) -> Tokens:
    """Merge each token that is not `chosen` into the most similar chosen patch."""
    keys, row = F.normalize(wide(evidence.metric), dim=-1), torch.arange(chosen.shape[0], device=chosen.device)[:, None]
    leaving = _others(tokens, chosen)
    scores = keys[row, leaving] @ keys[row, chosen[:, tokens.protected :]].mT
    return tokens.take(chosen, leaving, scores.argmax(-1) + tokens.protected)


def merge_strided(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Token Merging into evenly spaced tokens."""
    return _merge_others(tokens, evidence, _strided(tokens, remove))


def merge_random(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Token Merging of randomly drawn tokens."""
    return _merge_others(tokens, evidence, _largest(tokens, _draws(tokens, evidence), remove))


def drop_unattended(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """EViT without its fused token."""
    assert evidence.scores is not None
    return tokens.take(_largest(tokens, evidence.scores, remove))


def keep_attended(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """EViT, with the fused token at the end, at the position of its most attended part; later blocks treat it as a patch."""
    assert evidence.scores is not None
    chosen = _largest(tokens, evidence.scores, remove)
    kept, count = tokens.take(chosen), chosen.shape[1]
    weights = evidence.scores.to(tokens.x.dtype).scatter(1, chosen, 0.0)
    fused = weights[:, None] @ tokens.x
    size = tokens.sizes.scatter(1, chosen, 0.0).sum(1, keepdim=True)
    places = torch.where((kept.places == DROPPED) & (tokens.places != DROPPED), count, kept.places)
    most = evidence.scores.scatter(1, chosen, -torch.inf).argmax(1, keepdim=True)
    return replace(
        kept,
        x=torch.cat([kept.x, fused], 1),
        sizes=torch.cat([kept.sizes, size], 1),
        places=places,
        origins=torch.cat([kept.origins, tokens.origins.gather(1, most)], 1),
    )


def drop_random(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Drop random tokens, different ones in each row."""
    return tokens.take(_largest(tokens, _draws(tokens, evidence), remove))


def _draws(tokens: Tokens, evidence: Evidence) -> Float[Tensor, "b n"]:
    return torch.rand(tokens.x.shape[:2], generator=evidence.generator, device=tokens.x.device)


def _strided(tokens: Tokens, remove: int) -> Int[Tensor, "b m"]:
    """Class tokens, and all but `remove` patches, evenly spaced."""
    batch, n = tokens.x.shape[:2]
    first = tokens.protected
    count = n - first - remove
    places = first + torch.arange(count, device=tokens.x.device) * (n - first) // max(count, 1)
    return torch.cat([torch.arange(first, device=tokens.x.device), places]).expand(batch, -1)


def keep_strided(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Keep evenly spaced tokens, the same in all rows."""
    return tokens.take(_strided(tokens, remove))


def pool_neighbours(tokens: Tokens, evidence: Evidence, remove: int) -> Tokens:
    """Pool neighbours in the sequence to means, at the position of the middle one."""
    batch, n = tokens.x.shape[:2]
    first = tokens.protected
    patches = torch.arange(n - first, device=tokens.x.device)
    pooled = first + patches * (n - first - remove) // max(n - first, 1)
    target = torch.cat([torch.arange(first, device=tokens.x.device), pooled])
    each = torch.arange(n - remove, device=tokens.x.device)
    middle = (torch.searchsorted(target, each) + torch.searchsorted(target, each, right=True) - 1) // 2
    return tokens.assign(target.expand(batch, n), middle.expand(batch, n - remove))


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
