"""Other libraries' masks in the terms of the contract: causality, valid keys, and a bias for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Visible:
    """The meaning of a mask in the terms of the contract.

    Attributes:
        causal: whether a query sees nothing after itself (bottom-right).
        keys: which keys exist; None for all.
        bias: scores to add for everything else (-inf hides a pair); None when there is nothing else.
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
    """Interpret a pairwise mask: as causality and missing keys if that is all it says, otherwise as a bias.

    A mask cannot be inspected during compilation: it becomes a bias, or, for mechanisms that take none, a graph break
    to inspect it.

    Args:
        mask: True = may attend, or scores to add; broadcasts to (B, H, N, M).
        causal: whether causality applies in addition.
        own_queries: whether queries and keys are the same tokens, so that a query whose key is missing is padding and
            may see anything.
        prefer_causal: whether a mask that could be either (a single query that sees all keys) counts as causal.
        as_bias: whether the mechanism can use a bias.
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


def find_causal(visible: Visible, *, otherwise: bool) -> Visible:
    """Treat a call as causal if its bias hides everything that comes later (bottom-right); `otherwise` answers during
    compilation, when a bias cannot be inspected."""
    if visible.causal or visible.bias is None:
        return visible
    if torch.compiler.is_compiling():
        causal = otherwise
    else:
        bias = visible.bias
        later = bias.new_ones(bias.shape[-2:], dtype=torch.bool).triu(1 + bias.shape[-1] - bias.shape[-2])
        causal = bool((bias <= torch.finfo(bias.dtype).min)[..., later].all())
    return Visible(True, None, visible.bias) if causal else visible


def _of_keys(
    visible: Tensor, causal: bool, batch: int, n: int, m: int, own_queries: bool, prefer_causal: bool
) -> Visible | None:
    """Interpret a boolean mask as causality and missing keys; None where it says anything else."""
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
    # defined here because importing the compiler takes a second
    reason = "a mechanism that takes no bias has to know what a mask says: without a mask nothing is in the way"
    return torch.compiler.disable(read_mask, reason=reason)(mask, causal, **options)


def _hides_only(scores: Tensor) -> Tensor | None:
    """The boolean mask behind scores that are 0 or hide a pair (-inf or the lowest number); None for other scores."""
    if torch.compiler.is_compiling():
        return None
    hidden = scores <= torch.finfo(scores.dtype).min
    return ~hidden if bool((hidden | (scores == 0)).all()) else None
