"""Helpers for the figures of all kinds of models: pairs of models, times, and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Shape
from regard.measurement import units
from regard.retrofit.hosts import Host

if TYPE_CHECKING:
    from jaxtyping import Float

ORIGINAL, RETROFIT, SOFTMAX = "original", "retrofit", "softmax"
"""The models; the last is the original with regard's softmax, which is only timed, as a baseline at regard's speed."""
MODELS = (ORIGINAL, RETROFIT)
CLOSE = 0.9
"""The least share of the hidden states' variance that a retrofit must keep to be recommended."""
LESS = 0.95
"""A time or a size is clearly less below this share."""

Loss = tuple[float, float | None, str]
"""The loss, its standard error, and a description of both."""
Models = dict[str, Any]
Row = tuple[str, str, str]
"""A table row: a label, the original's value, the retrofit's value."""


def change(its: dict[str, Any]) -> str:
    """Describe how perplexity changed, with its standard error."""
    value, error = its["change"], its["standard_error"]
    if abs(value) < 5e-4:
        said = "unchanged"
    elif value < 10:
        said = f"{abs(value):.1%} {'higher' if value > 0 else 'lower'}"
    else:
        said = f"{1 + value:.3g} times as high"
    return said if error is None or value >= 10 else f"{said} (± {100 * error:.1f})"


def beside(words: str, its: Mapping[str, Any], say: Callable[[Any], str]) -> Row:
    """A row with the value of each model."""
    return words, say(its[ORIGINAL]), say(its[RETROFIT])


def times(words: str, its: Mapping[str, Any]) -> Row:
    """A row with the time of each model."""
    return beside(words, its, lambda timing: units.milliseconds(1000 * timing["median"]))


def longer(its: Mapping[str, Any], model: str, other: str) -> float | None:
    """How many times as long one model takes as another; None unless it clearly takes longer."""
    ratio = its[model]["median"] / its[other]["median"]
    return ratio if ratio > 1 / LESS else None


def times_as_long(ratio: float) -> str:
    """Format a time ratio in words."""
    return f"{ratio:,.1f} times the time" if ratio < 10 else f"{ratio:,.0f} times the time"


def operations(host: Host, model: Any, tokens: int) -> float:
    """Floating-point operations of all attention over `tokens` tokens, by definition of the mechanisms."""
    total = 0.0
    softmax = get_mechanism("softmax")
    for layer in host.layers:
        heads, _, dim_key, dim_value = host.heads(layer.number)
        placed = host.placed(model, layer.number)
        card, config = (softmax, softmax.options()) if placed is None else (placed.card, placed.config)
        total += card.cost(Shape(1, heads, tokens, tokens, dim_key, dim_value), config).flops
    return total


def mean_and_error(items: Float[Tensor, " m"]) -> tuple[float, float | None]:
    """The mean of numbers, and its standard error; None for a single number."""
    return float(items.mean()), float(items.std() / len(items) ** 0.5) if len(items) > 1 else None


def rise(gaps: Float[Tensor, " w"]) -> dict[str, float | None]:
    """The relative rise of perplexity, from the loss differences of blocks in nats: ``change``, ``standard_error``."""
    mean, error = mean_and_error(gaps)
    larger = math.expm1(mean)
    return {"change": larger, "standard_error": None if error is None else error * (1 + larger)}


class Closeness:
    """How much of the variance of vectors is kept by vectors that replace them, over several batches."""

    def __init__(self) -> None:
        self.count, self.squares, self.sum = 0, 0.0, torch.zeros(())
        self.distances: list[float] = []

    def add(self, found: Float[Tensor, "m c"], expected: Float[Tensor, "m c"]) -> None:
        found, expected = found.double(), expected.double()
        self.count += len(expected)
        self.squares += float(expected.square().sum())
        self.sum = self.sum + expected.sum(0)
        self.distances.append(float((found - expected).square().sum()))

    def share(self) -> tuple[float, float | None]:
        """1 less the squared distance as a share of the variance, and its standard error over the batches."""
        variance = max(self.squares - float(self.sum.square().sum()) / self.count, 1e-30)
        shares = torch.tensor(self.distances).double() * len(self.distances) / variance
        distance, error = mean_and_error(shares)
        return 1 - distance, error


def kept(share: float, error: float | None) -> str:
    """Format a share, such as of variance, with its standard error."""
    return f"{share:.1%}" + ("" if error is None else f" (± {100 * error:.1f})")


def judgement(close: bool, cost: str, gain: str | None, delay: str | None) -> dict[str, Any]:
    """The recommendation for or against a retrofit: ``take`` (bool) and ``text``.

    Args:
        cost: the loss, in words.
        gain: what takes less time, in words; None if nothing does.
        delay: what takes more time.
    """
    but = f", but {delay}" if delay else ""
    if close and gain:
        text = f"Take the retrofit: {cost}, and {gain}{but}."
    elif close:
        text = f"Keep the original: {cost}, but {delay or 'it is not clearly faster here'}."
    else:
        text = f"Keep the original, or train the retrofit longer: {cost}" + (f", though {gain}." if gain else ".")
    return {"take": bool(close and gain), "text": text}


def source_notes(sources: Mapping[str, Any], blocks: int, what: str) -> list[str]:
    """Notes on the limits of the figures."""
    notes = []
    if len(sources) == 1:
        notes.append("measured only on the training source; use --validation for data from another.")
    if blocks < 8:
        notes.append(f"the figures come from {blocks} {what}; a larger budget or more data makes them more precise.")
    return notes
