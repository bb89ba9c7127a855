"""Budgets in words: ``2M tokens``, ``30m``, ``2h``, ``5e13 flops``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from regard.contract import Unsupported

_UNITS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("m", "min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **dict.fromkeys(("step", "steps"), ("steps", 1.0)),
    **dict.fromkeys(("token", "tokens"), ("tokens", 1.0)),
    **dict.fromkeys(("flop", "flops"), ("flops", 1.0)),
}
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
_FORM = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([kMGBTP]?)\s*([a-zA-Z]+)\s*")
ACCEPTED = (
    "a time for the whole command (90s, 8m, 2h), or work for each training run (500 steps, 2M tokens, 5e13 flops)"
)


@dataclass(frozen=True)
class Budget:
    """The amount of work that a command does.

    Attributes:
        unit: ``seconds`` for the whole command, or ``steps``, ``tokens`` or ``flops`` for each training run.
        amount: amount in this unit.
    """

    unit: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a budget; raises Unsupported unless it is a positive amount of time, steps, tokens or FLOPs."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise Unsupported(f"budget {text!r}", supported=ACCEPTED, nearest="8m")
        number, factor, word = match.groups()
        if factor == "M" and word.lower() in ("in", "inutes"):  # "5Min"
            factor, word = "", "m" + word
        if word.lower() not in _UNITS:
            raise Unsupported(f"budget {text!r} in {word!r}", supported=ACCEPTED, nearest=f"{number}m")
        unit, size = _UNITS[word.lower()]
        if unit == "seconds" and factor:
            raise Unsupported(f"budget {text!r}", supported=ACCEPTED, nearest=f"{number}h")
        amount = float(number.replace("_", "")) * _FACTORS[factor] * size
        if amount <= 0 or not math.isfinite(amount):
            what = "nothing" if amount <= 0 else "more than a number holds"
            raise Unsupported(f"budget {text!r} of {what}", supported=ACCEPTED, nearest="8m")
        return cls(unit, amount)

    def __str__(self) -> str:
        if self.unit == "tokens":
            size, factor = next(
                ((s, f) for s, f in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if self.amount >= s), (1.0, "")
            )
            return f"{self.amount / size:.6g}{factor} tokens"
        if self.unit != "seconds":
            return f"{self.amount:.4g} {self.unit}" if self.unit == "flops" else f"{self.amount:.0f} {self.unit}"
        if self.amount < 120:
            return f"{self.amount:.0f}s"
        return f"{self.amount / 60:.4g}m" if self.amount < 7200 else f"{self.amount / 3600:.3g}h"
