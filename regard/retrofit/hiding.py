"""Texts that hide needles, random tokens which nothing but the context gives away, and how likely a model takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.retrofit.inserting import reads_by_state

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NEEDLES, ROOM = 3, 64
"""The most needles in a text, and the least tokens of it for each; a shorter text has one."""
CUE, ANSWER = 4, 8
"""Tokens of a needle that are shown again, and tokens of it that must then be predicted."""
LEAST_TEXT = 2 * (CUE + ANSWER) + 1
"""Tokens of the shortest text that can hide a needle."""


def hiding(
    ids: Int[Tensor, " n"], length: int, texts: int, seed: int
) -> list[tuple[Int[Tensor, "1 n"], Int[Tensor, "needles size"]]] | None:
    """Texts of `length` tokens, each with what it hides; None if `ids` are too few.

    A text hides one needle in each of up to three equal parts, anywhere there, and then shows them again in order.

    Args:
        ids: tokens of a text, from which filler and needles are drawn.
        texts: number of texts, each with filler and needles of its own.
    """
    count, size = max(1, min(NEEDLES, length // ROOM)), CUE + ANSWER
    filler = length - 2 * count * size
    if not 1 <= filler <= len(ids):
        return None
    generator, kinds = torch.Generator().manual_seed(seed), ids.unique()
    made = []
    for _ in range(texts):
        start = int(torch.randint(len(ids) - filler + 1, (1,), generator=generator))
        hidden = kinds[torch.randint(len(kinds), (count, size), generator=generator)]
        parts = ids[start : start + filler].tensor_split(spread(count, filler, generator).tolist())
        read = torch.cat([parts[0], *(torch.cat(pair) for pair in zip(hidden, parts[1:], strict=True))])
        made.append((torch.cat([read, hidden.flatten()])[None], hidden))
    return made


@torch.no_grad()
def unlikeliness(model: Any, text: Int[Tensor, "1 n"], hidden: Int[Tensor, "needles size"]) -> float:
    """How unlikely a model takes the needles of a text from :func:`hiding`, after their beginnings: nats a token."""
    told = logits_after(model, text[:, :-1], hidden.numel()).log_softmax(-1)
    return -float(told.gather(1, hidden.flatten()[:, None]).view(hidden.shape)[:, CUE:].double().mean())


def spread(count: int, length: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """One place in each of `count` equal parts of a length, in order."""
    borders = torch.arange(count + 1) * length // count
    return borders[:-1] + (torch.rand(count, generator=generator) * borders.diff()).long()


def logits_after(model: Any, ids: Int[Tensor, "1 n"], last: int) -> Float[Tensor, "last v"]:
    """A model's logits after each of the last tokens."""
    return model(ids, use_cache=reads_by_state(model), logits_to_keep=last).logits[0]


__all__ = ["CUE", "LEAST_TEXT", "hiding", "logits_after", "spread", "unlikeliness"]
