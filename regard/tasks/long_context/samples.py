"""The common base of the long tasks: samples that fill a length, the frame of a prompt, and how replies are read."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from regard.contract import Unsupported, at_least, one_of

WORDINGS = ("full", "brief")
SEED = 43
"""Seed of the first sample, as in the benchmark."""
SHORTEST = 0.9
"""Smallest share of the target length that a prompt fills."""
MOST = 1 << 20

Count = Callable[[str], int]
"""Counts the tokens of a text."""

SYLLABLES = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
NUMBERS = [str(number) for number in range(10, 100)]


def names(first: int, count: int) -> list[str]:
    """Made-up words by index, always the same: number `first` and the following ones."""
    every = len(SYLLABLES)
    # a step coprime to the number of pairs visits all of them
    return [
        SYLLABLES[(i * 1307) % every**2 // every] + SYLLABLES[(i * 1307) % every] for i in range(first, first + count)
    ]


def brief_words() -> list[str]:
    """All words that occur in prompts and answers in the brief wording, except those of documents."""
    words = set(names(0, 300)) | set(NUMBERS) | {str(number) for number in range(1, 100)}
    frames = "Question Answer : . ? , The value for is what are the values VAR = which variables have occur most words "
    frames += (
        "Chapter Arion meets in buys and sells nothing where whom does see Arion's item what before last chapters buy"
    )
    return sorted(words | set(frames.split()))


@dataclass(frozen=True)
class Sample:
    """A question about a long context.

    Attributes:
        prompt: what a model reads.
        answer: the expected reply.
        facts: the answer in the form that scores need.
    """

    prompt: str
    answer: str
    facts: Any


class LongTask:
    """A task that generates samples of one kind.

    Args:
        wording: ``full`` or ``brief``.

    Attributes:
        name, metric: names for tables.
        reply: largest number of tokens in a reply, in the full wording.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    least: ClassVar[int] = 0
    """Smallest number of other parts in a context, in addition to those asked about."""
    reply: ClassVar[int] = 1024

    def __init__(self, wording: str = "full") -> None:
        one_of("wording", wording, WORDINGS)
        self.brief = wording == "brief"

    def sample(self, number: int, length: int, count: Count) -> Sample:
        """The sample with a given number, always the same, of 90 to 100 % of `length` tokens (fewer if adding a single
        chapter or document would exceed the length).

        Raises:
            Unsupported: if the length is too short for the question, or too long for the available words.
        """
        at_least("length", length, 1)
        seed = SEED + number

        exhausted = False

        def fits(parts: int) -> bool:
            nonlocal exhausted
            try:
                return count(self.build(seed, parts).prompt) <= length
            except Exhausted:
                exhausted = True
                return False

        low = self.least
        if not fits(low):
            raise Unsupported(
                f"{self.name} in {length} tokens",
                supported=f"{count(self.build(seed, low).prompt)} tokens or more",
                nearest="" if self.brief else "the wording 'brief'",
            )
        high = low + 1
        while high < MOST and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        sample = self.build(seed, low)
        exhausted = False
        if count(sample.prompt) < SHORTEST * length and not fits(low + 1) and exhausted:
            raise Unsupported(
                f"{self.name} in {length} tokens, of which its material fills {count(sample.prompt)}",
                supported="shorter contexts, or more material",
                nearest=f"a length of {count(sample.prompt)}",
            )
        return sample

    def build(self, seed: int, parts: int) -> Sample:
        """The sample with `parts` parts in its context; raises Exhausted if there are not that many."""
        raise NotImplementedError

    def score(self, reply: str, sample: Sample) -> float:
        """The score of a reply, 0 to 1."""
        raise NotImplementedError

    def solve(self, prompt: str) -> str:
        """The reply of a solver that knows how prompts are made, from the prompt alone."""
        raise NotImplementedError

    def new_tokens(self, sample: Sample, count: Count) -> int:
        """Largest number of tokens in a reply."""
        return count(sample.answer) + 4 if self.brief else self.reply

    def frame(self, intro: str, questions: Sequence[str], context: str, form: str) -> str:
        """A prompt: the questions, the context, the questions again, and how to answer."""
        asked = "\n".join(questions)
        if self.brief:
            return f"Question : {asked}\n{context}\nQuestion : {asked}\nAnswer :"
        return (
            f"{intro}\n\nThe question comes before the context and again after it.\n\n<question>\n{asked}\n</question>\n\n"
            f"<context>\n{context}\n</context>\n\n<question>\n{asked}\n</question>\n\n"
            "Explain in a few sentences where the context has what is needed. After that write the answer, and nothing but "
            f"the answer, between tags:\n<answer>\n{form}\n</answer>\n"
        )

    def told(self, answer: str) -> str:
        """A gold answer in the form in which it should be written."""
        return answer if self.brief else f"<answer>\n{answer}\n</answer>"

    def read(self, reply: str) -> str:
        """The answer in a reply: the text between the tags, "" without tags; in the brief wording, the first line."""
        if self.brief:
            lines = reply.strip().splitlines()
            return lines[0].strip() if lines else ""
        found = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL | re.IGNORECASE)
        return found[1].strip() if found else ""

    def context_of(self, prompt: str) -> tuple[str, str]:
        """The question and the context of a prompt."""
        if self.brief:
            found = re.fullmatch(r"Question : (.*?)\n(.*)\nQuestion : .*\nAnswer :", prompt, re.DOTALL)
        else:
            found = re.search(r"<question>\n(.*?)\n</question>\n\n<context>\n(.*)\n</context>", prompt, re.DOTALL)
        assert found is not None, "a prompt of another task"
        return found[1], found[2]


class Exhausted(Exception):
    """Raised when there is no more material for a context."""


def draws(seed: int, part: str) -> random.Random:
    """Random numbers for one part of a sample, independent of the other parts."""
    return random.Random(f"{seed} {part}")


def overlap(found: Collection[str], gold: Collection[str]) -> float:
    """Intersection over union; 1 if both are empty."""
    union = set(found) | set(gold)
    return len(set(found) & set(gold)) / len(union) if union else 1.0


def numbered(text: str) -> dict[int, str]:
    """Numbered lines, by their number; the first line for each number."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\d+)\s*[.:)\-]\s*(.+?)\s*$", line)
        if match:
            found.setdefault(int(match[1]), match[2])
    return found


def plain(text: str) -> str:
    """Normalise a text: lower case, single spaces, no leading article and no trailing full stop."""
    text = re.sub(r"\s+", " ", text.lower()).strip().rstrip(".").strip()
    return re.sub(r"^(the|a|an) ", "", text)
