"""What a language model finds in its context: needles hidden in a long text, and the values of keys in lines of pairs.

Both are random tokens of the user's text, so no tokenizer is needed, and nothing but the context gives them away. Each
model reads the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.retrofit.hiding import CUE, hiding, logits_after, spread
from regard.retrofit.measures.shared import Models, mean_and_error

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ASKED, LINE = 16, 3
"""The most keys of a text that are asked for, and the tokens of a line: a key, its value, and the end of the line."""

Shares = dict[str, Any]
"""For each model its share in each text; ``mean`` and ``standard_error``, over the texts, of each model."""


@torch.no_grad()
def needles(models: Models, ids: Int[Tensor, " n"], length: int, texts: int, seed: int) -> Shares | None:
    """The share of needles' tokens that each model predicts after their beginnings are shown again.

    Args:
        ids, length, texts: as in :func:`regard.retrofit.hiding.hiding`.

    Returns:
        The shares, and ``needles``, the number in each text; None if `ids` are too few.
    """
    hidden_in = hiding(ids, length, texts, seed)
    if hidden_in is None:
        return None
    found: dict[str, list[float]] = {name: [] for name in models}
    for text, hidden in hidden_in:
        for name, model in models.items():
            said = logits_after(model, text[:, :-1], hidden.numel()).argmax(-1).view(hidden.shape)
            found[name].append(float((said == hidden)[:, CUE:].double().mean()))
    return {"needles": len(hidden_in[0][1]), **with_errors(found)}


@torch.no_grad()
def pairs(models: Models, ids: Int[Tensor, " n"], length: int, texts: int, seed: int) -> dict[str, Any] | None:
    """How likely each model takes the right value of a key to be, among the values that a text has.

    A text of `length` tokens is lines of a key, its value and the commonest token of `ids`, as many as fit (filler is before
    them if `ids` have too few different tokens), and then some of these lines again, from everywhere in it. No token
    is twice a key or a value. Only the values of the text are compared, so a model need not know that a value has to come.

    Args:
        ids: tokens of a text, from which filler, keys and values are drawn.
        texts: number of texts, each with pairs of its own.

    Returns:
        ``first``, the share of the keys for which the right value is the likeliest; ``rank``, the share of the other values that
        are less likely than the right one, 0.5 by chance; ``pairs``, the number in each text; None if `ids` are too few.
    """
    kinds, often = ids.unique(return_counts=True)
    end = kinds[often.argmax()]
    kinds = kinds[kinds != end]
    asked = min(ASKED, length // LINE // 4)
    count = min(length // LINE - asked, len(kinds) // 2)
    filler = length - LINE * (count + asked)
    if count < max(asked, 2) or filler > len(ids):
        return None
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in models} for what in ("first", "rank")}
    for _ in range(texts):
        start = int(torch.randint(len(ids) - filler + 1, (1,), generator=generator))
        keys, values = kinds[torch.randperm(len(kinds), generator=generator)[: 2 * count]].view(2, count)
        lines = torch.stack([keys, values, end.expand(count)], 1)
        right = spread(asked, count, generator)
        text = torch.cat([ids[start : start + filler], lines.flatten(), lines[right].flatten()])[None]
        for name, model in models.items():
            scores = logits_after(model, text, LINE * asked)[::LINE, values]
            ranks = _ranks(scores, right)
            found["first"][name].append(float((ranks == 1).double().mean()))
            found["rank"][name].append(float(ranks.mean()))
    return {"pairs": count, **{what: with_errors(shares) for what, shares in found.items()}}


def _ranks(scores: Float[Tensor, "m c"], right: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The share of the other scores of each row that are lower than the right one; equal ones count half."""
    own = scores.gather(1, right[:, None])
    lower, equal = (scores < own).sum(1), (scores == own).sum(1) - 1
    return (lower + equal.clamp(min=0) / 2).double() / (scores.shape[1] - 1)


def with_errors(shares: Mapping[str, Sequence[float]]) -> Shares:
    """The shares of each model with their means and standard errors (None for a single text)."""
    found = {name: found_by(shares, name) for name in shares}
    return {
        **shares,
        "mean": {name: mean for name, (mean, _) in found.items()},
        "standard_error": {name: error for name, (_, error) in found.items()},
    }


def found_by(its: Mapping[str, Any], model: str) -> tuple[float, float | None]:
    """The mean share of a model over the texts, and its standard error."""
    return mean_and_error(torch.tensor(its[model], dtype=torch.float64))


def more(its: Mapping[str, Any], model: str, other: str) -> tuple[float, float | None]:
    """How much more one model finds than another in the same texts, and its standard error."""
    first, second = (torch.tensor(its[name], dtype=torch.float64) for name in (model, other))
    return mean_and_error(first - second)


def probed(results: Mapping[str, Any]) -> list[tuple[str, str, Shares]]:
    """What was looked for (``needles``; ``pairs``, of which right values that are the likeliest count), the length of the texts, and
    the shares. Records of earlier versions have one needle a text, under ``recall``, and no pairs.
    """
    hidden, lines = results.get("needles", results.get("recall", {})), results.get("pairs", {})
    found = [("needles", length, its) for length, its in hidden.items() if its is not None]
    return found + [("pairs", length, its["first"]) for length, its in lines.items() if its is not None]


__all__ = ["Shares", "found_by", "more", "needles", "pairs", "probed", "with_errors"]
