"""One fact among few or many, and questions about missing facts: what a model loses, mixes up or invents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

from regard.tasks.long_context.samples import SYLLABLES, Exhausted, LongTask, Sample, draws, names

UNKNOWN = "unknown"
RIGHT, DECLINED, MIXED_UP, INVENTED, SILENT = "right", "declined", "mixed up", "invented", "silent"
VALUES = range(1000, 10000)


class Facts(LongTask):
    """Ask for the value of a key, in the brief wording, after two questions with answers: one about another key of the
    context, and one about a key that it lacks, with the answer ``unknown``.

    The key, its value and the share of the context before it depend only on the seed, whatever else is in the context.

    Args:
        absent: whether the context lacks the key.
    """

    name = "facts"
    metric = "fraction right"
    least: ClassVar = 2

    def __init__(self, *, absent: bool = False) -> None:
        super().__init__("brief")
        self.absent = absent

    def build(self, seed: int, parts: int) -> Sample:
        if parts + 2 > len(_keys()):
            raise Exhausted
        asked, lacking, *others = _distinct(draws(seed, "keys"), _keys(), parts + 2)
        value, *values = _distinct(draws(seed, "values"), VALUES, parts + 1)
        pairs = list(zip(others, values, strict=True))
        example = pairs[0]
        if not self.absent:
            pairs.insert(int(draws(seed, "place").random() * (parts + 1)), (asked, value))
        prompt = "\n".join(
            (
                *(f"The value for {key} is {number} ." for key, number in pairs),
                f"{_question(example[0])} {example[1]}",
                f"{_question(lacking)} {UNKNOWN}",
                _question(asked),
            )
        )
        facts = frozenset(str(number) for _, number in pairs)
        return Sample(prompt, UNKNOWN if self.absent else str(value), facts)

    def outcome(self, reply: str, sample: Sample) -> str:
        """Classify a reply by the first number or ``unknown`` in its first line: ``right``; ``declined`` for unknown;
        ``mixed up`` for the value of another key; ``invented`` for one that is not in the context; ``silent`` for
        neither."""
        words = re.findall(rf"\d+|{UNKNOWN}", self.read(reply).lower())
        if not words:
            return SILENT
        if words[0] == sample.answer:
            return RIGHT
        if words[0] == UNKNOWN:
            return DECLINED
        return MIXED_UP if words[0] in sample.facts else INVENTED

    def score(self, reply: str, sample: Sample) -> float:
        return float(self.outcome(reply, sample) == RIGHT)

    def solve(self, prompt: str) -> str:
        known = dict(re.findall(r"The value for (\w+) is (\d+) \.", prompt))
        return known.get(re.findall(r"the value for (\w+) \?", prompt)[-1], UNKNOWN)


def _question(key: str) -> str:
    return f"Question : what is the value for {key} ?\nAnswer :"


@lru_cache
def _keys() -> list[str]:
    return names(0, len(SYLLABLES) ** 2)


def _distinct(rng: Random, every: Sequence[Any], count: int) -> list[Any]:
    """Draw `count` distinct values; a smaller `count` gives a prefix of the same values."""
    found: dict[Any, None] = {}
    while len(found) < count:
        found[rng.choice(every)] = None
    return list(found)
