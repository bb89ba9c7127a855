"""Attention with explicit weights: a visibility rule on ranks times a rule from scores to weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import resolve
from regard.contract import BlockMask, Unsupported
from regard.visibility import PositionBias, Ranks, Visibility, masked_scores_bias, ranks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    ranks: Ranks,
    *,
    visibility: Visibility,
    scale: float,
    rule: str = "softmax",
    shift: float = 0.0,
    bias: Float[Tensor, "#b #h n m"] | None = None,
    position_bias: PositionBias | None = None,
    blocks: BlockMask | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    want_weights: bool = False,
    want_lse: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n m"] | None, Float[Tensor, "b h n"] | None]:
    """Output, and the weights or the log-sum-exp of the scores when wanted.

    Args:
        rule: ``softmax``, or ``sigmoid`` for weights sigmoid(score + shift).
        bias: added to the scores, by slot. `position_bias` is the same as a function of ranks.
        blocks: block-sparse visibility, on ranks.
        dropout: probability of dropping a weight (after normalisation).

    A query that sees no key gives 0 (log-sum-exp -inf).
    """
    if rule not in ("softmax", "sigmoid"):
        raise Unsupported(f"score rule {rule!r}", supported="softmax, sigmoid")
    if want_lse and rule != "softmax":
        raise Unsupported("the log-sum-exp of sigmoid attention", supported="rule='softmax'")
    run = resolve("attention", q.device, backend)
    return run(
        q,
        k,
        v,
        ranks,
        visibility,
        scale,
        rule,
        shift,
        bias,
        position_bias,
        blocks,
        dropout,
        generator,
        want_weights,
        want_lse,
    )


def attention_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    visible: Bool[Tensor, "#b #h n m"],
    scores_to_weights: Callable[[Tensor], Tensor],
    scale: float,
    bias: Float[Tensor, "#b #h n m"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the whole score matrix: hidden scores are -inf before `scores_to_weights`."""
    groups = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(groups, 1).mT
    scores = scores if bias is None else scores + bias
    weights = scores_to_weights(scores.masked_fill(~visible, -torch.inf))
    return weights.nan_to_num(0.0) @ v.repeat_interleave(groups, 1)


__all__ = ["Ranks", "Visibility", "attention", "attention_reference", "masked_scores_bias", "ranks"]
