"""Masks of other libraries in the words of the contract: causality, keys that exist, and scores to add for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Visible:
    """The meaning of a mask, in the words of the contract.

    Attributes:
        causal: whether a query sees nothing after itself (bottom-right).
        keys: keys that exist; None for all.
        bias: scores to add that say the rest, -inf hides a pair; None when there is no rest.
    """

    causal: bool
    keys: Bool[Tensor, "b m"] | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None


def read_mask(
    mask: Tensor | None,
    causal: bool,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    own_queries: bool,
    prefer_causal: bool = False,
    as_bias: bool = True,
) -> Visible:
    """Understand a mask of pairs: causality and missing keys where that is all it says, a bias otherwise.

    While a model is compiled nothing can look into the mask: it is a bias, or, for mechanisms that take none, compilation is
    interrupted to look.

    Args:
        mask: True = may attend, or scores to add; broadcasts to (B, H, N, M).
        causal: whether causality comes on top of it.
        own_queries: whether queries and keys are the same tokens, so that a query whose key is missing is padding and
            may see anything.
        prefer_causal: whether a mask that is both (a single query that sees all) counts as causal.
        as_bias: whether a bias is of use.
    """
    if mask is None:
        return Visible(causal)
    if not as_bias and torch.compiler.is_dynamo_compiling():
        return _look_into(
            mask, causal, batch=batch, n=n, m=m, dtype=dtype, own_queries=own_queries, prefer_causal=prefer_causal
        )
    visible = mask if mask.dtype == torch.bool else _hides_only(mask)
    if visible is not None and not torch.compiler.is_compiling():
        found = _of_keys(visible, causal, batch, n, m, own_queries, prefer_causal)
        if found is not None:
            return found
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    else:
        bias = mask.to(dtype)
    return Visible(causal, None, bias)


def _of_keys(
    visible: Tensor, causal: bool, batch: int, n: int, m: int, own_queries: bool, prefer_causal: bool
) -> Visible | None:
    """A boolean mask as causality and missing keys; None where that is not all it says."""
    shared = visible[:, :1]
    if not bool((visible == shared).all()):
        return None
    pairs = shared[:, 0].expand(-1, n, m)  # (B or 1, n, m)
    below = torch.ones(n, m, dtype=torch.bool, device=visible.device).tril(m - n)
    keys = pairs.any(1)  # (B or 1, m)
    padding = ~keys[:, m - n :, None] if own_queries and m >= n else torch.zeros_like(pairs[:, :, :1])
    for order in sorted((True, False), reverse=prefer_causal):
        expected = keys[:, None, :] & below if order or causal else keys[:, None, :].expand_as(pairs)
        found = pairs & below if causal else pairs
        if bool(((found == expected) | padding).all()):
            return Visible(order or causal, None if bool(keys.all()) else keys.expand(batch, m))
    return None


def _look_into(mask: Tensor, causal: bool, **options: Any) -> Visible:
    # made here, since importing the compiler takes a second
    reason = "a mechanism that takes no bias has to know what a mask says: without a mask nothing is in the way"
    return torch.compiler.disable(read_mask, reason=reason)(mask, causal, **options)


def _hides_only(scores: Tensor) -> Tensor | None:
    """Visibility behind scores that are 0 or hide a pair (-inf, or the lowest number); None for other scores."""
    if torch.compiler.is_compiling():
        return None
    hidden = scores <= torch.finfo(scores.dtype).min
    return ~hidden if bool((hidden | (scores == 0)).all()) else None
