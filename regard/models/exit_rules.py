"""Rules for when a token or a sequence leaves a stack early, written as ``entropy:0.3``.

confidence:0.9     the likeliest class has at least this probability
entropy:0.3        the entropy of the class distribution is below this many nats (DeeBERT, Xin et al., arXiv 2004.12993)
patience:2         the likeliest class has stayed the same for this many further exits in a row
                   (PABEE, Zhou et al., arXiv 2006.04152)
layer:2            at the first exit after at least this many layers, whatever the classes, like a shallower network
halting:0.01       the halting probabilities have added up to all but this much of 1 (adaptive computation time, Graves,
                   arXiv 1603.08983); learned with the model, see :mod:`regard.models.exits`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, closest
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

HALTING = "halting"


def _whole(value: float) -> bool:
    return value >= 1 and value % 1 == 0


RULES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "confidence": (lambda value: 0 <= value <= 1, "a probability", "confidence:0.9"),
    "entropy": (lambda value: 0 <= value < math.inf, "nats, 0 or more", "entropy:0.3"),
    "patience": (_whole, "a whole number of exits, 1 or more", "patience:2"),
    "layer": (_whole, "a number of layers, 1 or more", "layer:1"),
    HALTING: (lambda value: 0 <= value < 1, "what is left of a probability, from 0 to below 1", "halting:0.01"),
}
"""For each rule: a check of its value, the accepted values in words, and a typical rule."""


@dataclass(frozen=True)
class ExitRule:
    """A rule and its value; :meth:`read` checks both."""

    name: str
    value: float

    @classmethod
    def read(cls, text: str) -> ExitRule:
        """Parse ``name:value``; raises Unsupported for an unknown name or a value that the rule does not accept."""
        name, _, written = text.partition(":")
        if name not in RULES:
            raise Unsupported(
                f"the exit rule {text!r}",
                supported=", ".join(usual for _, _, usual in RULES.values()),
                nearest=RULES[closest(name, RULES) or "confidence"][2],
            )
        takes, said, usual = RULES[name]
        try:
            value = float(written)
        except ValueError:
            value = math.nan
        if not takes(value):
            raise Unsupported(f"the exit rule {text!r}", supported=f"{name}:VALUE with {said}", nearest=usual)
        return cls(name, value)

    @property
    def halts(self) -> bool:
        """Whether the model's learned halting units decide, instead of its classes."""
        return self.name == HALTING


class Leaving:
    """A rule's decisions at successive exits, for tokens or sequences in a fixed order."""

    def __init__(self, rule: ExitRule) -> None:
        self.rule = rule
        self._said: Int[Tensor, " n"] | None = None
        self._repeated: Int[Tensor, " n"] | None = None

    def decide(self, logits: Float[Tensor, "n classes"], layer: int) -> Bool[Tensor, " n"]:
        """Return which of the remaining items leave after `layer` layers; the next call is about the rest."""
        name, value = self.rule.name, self.rule.value
        if name == "layer":
            return torch.full(logits.shape[:-1], layer >= value, device=logits.device)
        if name == "patience":
            return self._by_patience(logits.argmax(-1))
        chances = wide(logits).softmax(-1)
        if name == "confidence":
            return chances.amax(-1) >= value
        return torch.special.entr(chances).sum(-1) < value

    def _by_patience(self, said: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        if self._said is None or self._repeated is None:
            repeated = torch.zeros_like(said)
        else:
            repeated = torch.where(said == self._said, self._repeated + 1, 0)
        done = repeated >= self.rule.value
        self._said, self._repeated = said[~done], repeated[~done]
        return done
