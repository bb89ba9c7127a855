"""Shorter prompts by a small language model: what it expects anyway is left out (LLMLingua, arXiv 2310.05736).

::

    found = shorten(reads, [(instruction, 1.0), (documents, 0.3), (question, 0.9)])
    found.ids                       # the tokens that stay, in their order
    choose_parts(reads, examples, 500)      # first, of many examples: those that tell the most, in 500 tokens

The information of a token is -log p(token | what stays before it) in nats. A prompt is read in segments; in each the tokens of
the largest information stay, a given share of them, and the next segment is read behind what stayed (the paper's iterative
token-level compression, Algorithm 2). Each part of a prompt has a share of its own, since an instruction and a question can lose
less than examples or documents (its budget controller, Algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.core.precision import wide
from regard.models.speculation import Reads

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SEGMENT = 100
"""Tokens that are judged together."""


@dataclass(frozen=True)
class Shortened:
    """What stays of a prompt.

    Attributes:
        ids: (M,) its tokens.
        places: (M,) where each stood among those of all parts.
        information: (N,) nats of every token of the prompt, as it was judged; nan of the first, which always stays.
    """

    ids: Int[Tensor, " m"]
    places: Int[Tensor, " m"]
    information: Float[Tensor, " n"]


@torch.no_grad()
def shorten(reads: Reads, parts: Sequence[tuple[Int[Tensor, " n"], float]], *, segment: int = SEGMENT) -> Shortened:
    """Leave out of a prompt what a model expects anyway.

    Args:
        reads: the model that judges; see :mod:`regard.models.speculation`.
        parts: tokens of the model, each with the share of them that stays, above 0 and at most 1. Of a segment of n tokens
            ceil(share n) stay; of those of equal information the first.
        segment: tokens that are judged together.

    Raises:
        Unsupported: for a prompt without tokens, and for shares that are none.
    """
    at_least("segment", segment, 1)
    for _, share in parts:
        check_share(share)
    if not sum(len(ids) for ids, _ in parts):
        raise Unsupported("a prompt without tokens", supported="one token or more")
    state: Any = None
    last: Tensor | None = None  # logits behind what stayed so far
    kept, places, told, at = [], [], [], 0
    for ids, share in parts:
        for piece in ids.split(segment) if len(ids) else ():
            logits, after = reads(piece[None], state)
            found = _information(logits, piece, last)
            told.append(found)
            stays = _largest(found, math.ceil(share * len(piece)))
            own = piece[stays]
            if len(own) < len(piece):
                logits, after = reads(own[None], state)
            state, last = after, logits[-1]
            kept.append(own)
            places.append(at + stays)
            at += len(piece)
    return Shortened(torch.cat(kept), torch.cat(places), torch.cat(told))


@torch.no_grad()
def choose_parts(reads: Reads, parts: Sequence[Int[Tensor, " n"]], tokens: int) -> list[int]:
    """Which of several texts, as examples in a prompt, to keep whole: those with the most information a token, as long as they
    fit (the paper's coarse-grained compression).

    Args:
        parts: of one token or more.
        tokens: that they may have together.

    Returns:
        Their numbers, in their order.
    """
    if any(not len(ids) for ids in parts):
        raise Unsupported("a part without tokens", supported="one token or more in each")
    means = []
    for ids in parts:
        logits, _ = reads(ids[None], None)
        found = _information(logits, ids, None)[1:]
        means.append(float(found.mean()) if len(found) else -math.inf)
    chosen, left = [], tokens
    for i in sorted(range(len(parts)), key=lambda i: -means[i]):
        if len(parts[i]) <= left:
            chosen.append(i)
            left -= len(parts[i])
    return sorted(chosen)


def check_share(share: float) -> None:
    """Raise Unsupported for what is no share of tokens that stay."""
    if not 0 < share <= 1:
        raise Unsupported(f"a share of {share} of the tokens", supported="above 0 and at most 1", nearest="0.5")


def _information(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"], before: Float[Tensor, " vocab"] | None
) -> Float[Tensor, " n"]:
    """-log p of each token by the logits behind the one before it; nan of the first where nothing is before."""
    behind = logits[:-1] if before is None else torch.cat([before[None], logits[:-1]])
    known = -wide(behind).log_softmax(-1).gather(1, ids[len(ids) - len(behind) :, None])[:, 0]
    return torch.cat([known.new_full((len(ids) - len(known),), torch.nan), known])


def _largest(information: Float[Tensor, " n"], count: int) -> Int[Tensor, " k"]:
    """Numbers of the tokens that stay, in their order; an unknown one counts as the largest."""
    order = information.nan_to_num(torch.inf).sort(descending=True, stable=True).indices
    return order[:count].sort().values
