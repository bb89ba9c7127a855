"""Shorter prompts by a small language model: tokens that it expects anyway are dropped (LLMLingua, arXiv 2310.05736).

::

    found = shorten(reads, [(instruction, 1.0), (documents, 0.3), (question, 0.9)])
    found.ids                       # the tokens that stay, in their order
       choose_parts(reads, examples, 500)      # beforehand: the most informative of many examples, up to 500 tokens

The information of a token is -log p(token | what is kept before it) in nats. A prompt is read in segments; in each, a
given share of the tokens is kept, those of the largest information, and the next segment is read after the kept ones
(the paper's iterative token-level compression, Algorithm 2). Each part of a prompt has a share of its own, since
instructions and questions can lose less than examples or documents (its budget controller, Algorithm 1).

Deviations: the authors' code keeps the token before each token of much information instead of that token, and compares
with a threshold of all tokens read so far; this follows the paper.
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
    """The kept tokens of a prompt.

    Attributes:
        ids: (M,) the kept tokens.
        places: (M,) their positions among the tokens of all parts.
        information: (N,) nats of every token of the prompt, as measured; nan for the first, which is always kept.
    """

    ids: Int[Tensor, " m"]
    places: Int[Tensor, " m"]
    information: Float[Tensor, " n"]


@torch.no_grad()
def shorten(reads: Reads, parts: Sequence[tuple[Int[Tensor, " n"], float]], *, segment: int = SEGMENT) -> Shortened:
    """Drop the tokens of a prompt that a model expects anyway.

    Args:
        reads: the model that judges; see :mod:`regard.models.speculation`.
        parts: tokens of each part, with the share of them to keep, above 0 and at most 1. Of a segment of n tokens,
            ceil(share n) are kept; of tokens with equal information, the first.
        segment: tokens that are judged together.

    Raises:
        Unsupported: for a prompt without tokens, and for shares out of range.
    """
    at_least("segment", segment, 1)
    for _, share in parts:
        check_share(share)
    if not sum(len(ids) for ids, _ in parts):
        raise Unsupported("a prompt without tokens", supported="one token or more")
    state: Any = None
    last: Tensor | None = None  # logits after the last kept token
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
    """Choose which of several texts, such as examples in a prompt, to keep whole: the ones with the most information
    per token that fit the budget (the paper's coarse-grained compression).

    Args:
        parts: texts of one token or more.
        tokens: the budget for all chosen texts together.

    Returns:
        Indices of the chosen texts, in order.
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
    """Raise Unsupported unless `share` is in (0, 1]."""
    if not 0 < share <= 1:
        raise Unsupported(f"a share of {share} of the tokens", supported="above 0 and at most 1", nearest="0.5")


def _information(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"], before: Float[Tensor, " vocab"] | None
) -> Float[Tensor, " n"]:
    """-log p of each token given the logits of the token before it; nan for the first if there is none before it."""
    behind = logits[:-1] if before is None else torch.cat([before[None], logits[:-1]])
    known = -wide(behind).log_softmax(-1).gather(1, ids[len(ids) - len(behind) :, None])[:, 0]
    return torch.cat([known.new_full((len(ids) - len(known),), torch.nan), known])


def _largest(information: Float[Tensor, " n"], count: int) -> Int[Tensor, " k"]:
    """Indices of the kept tokens, in order; unknown information (nan) counts as the largest."""
    order = information.nan_to_num(torch.inf).sort(descending=True, stable=True).indices
    return order[:count].sort().values
