"""Side effects of cheaper inference: what scores do not show about a model that was compressed or that reads only part
of its cache.

For every sample number a model answers four prompts greedily, the same ones before and after the change:

- to continue a text: *repeated* is the share of 4-grams in the continuation that it has already written (seq-rep-4 of
  Welleck et al., arXiv 1908.04319), reported next to that of the text itself;
- for a fact among two others, and for the same fact among as many as fit: *lost among others* is the share answered
  right only among few, minus the share answered right only among many. A wrong answer among many is *mixed up*, the
  value of another key, or *invented*, a value that the context does not have;
- for something the context does not have, after an example of how to decline: *made up* is the share that gets a value.

The facts come from :class:`regard.tasks.long_context.Facts`. arXiv 2505.18227 proposes to judge token reduction by such
effects too; the probes are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regard.contract import Unsupported
from regard.tasks.documents import Paths
from regard.tasks.long_context import Facts
from regard.tasks.long_context.facts import INVENTED, MIXED_UP, RIGHT
from regard.tasks.long_context.samples import SEED
from regard.workbench.sparse.readers import Reader, reply
from regard.workbench.sparse.texts import Continuation

CONTINUED = 64
"""Tokens that a model writes to continue a text."""
GRAM = 4
FEW = 2
"""Number of other facts in the prompt with few facts."""
SURE = 1.645
"""A change is reported if its z is beyond this (one-sided test)."""
FEWEST = 4
"""The fewest samples for which a change is judged."""

NAMES = ("repeated", "lost among others", "mixed up", "invented", "made up")
MEASURED = (
    f"Repeated: {GRAM}-grams of {CONTINUED} greedy tokens after a text that were written before.",
    "Lost among others: facts recalled correctly next to two others but wrongly among as many as fit. Mixed up, invented: of the answers "
    "there, the value of another key, or one that the context does not have.",
    "Made up: questions about what the context does not have that get a value, after an example of how to decline.",
)


@dataclass(frozen=True)
class Answers:
    """A model's answers for one sample number.

    Attributes:
        repeated: the repetition in what the model wrote.
        text: the repetition in the true continuation of the text.
        alone, among, absent: outcomes of the answers, in the words of :meth:`regard.tasks.long_context.Facts.outcome`.
    """

    repeated: float
    text: float
    alone: str
    among: str
    absent: str

    def shares(self) -> dict[str, float]:
        """The value of each of :data:`NAMES`."""
        lost = float(self.alone == RIGHT) - float(self.among == RIGHT)
        wrong = {"mixed up": self.among == MIXED_UP, "invented": self.among == INVENTED}
        wrong |= {"made up": self.absent in (MIXED_UP, INVENTED)}
        return {"repeated": self.repeated, "lost among others": lost, **{name: float(x) for name, x in wrong.items()}}


@dataclass(frozen=True)
class Effects:
    """The answers of one model to sample numbers 0, 1, ..."""

    answers: tuple[Answers, ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Effects:
        """Build the effects from answers stored as dictionaries."""
        return cls(tuple(Answers(**row) for row in rows))

    def mean(self, name: str) -> float:
        """The mean of one of :data:`NAMES`, over the answers."""
        return statistics.fmean(one.shares()[name] for one in self.answers)

    def right(self, where: str) -> float:
        """The share of right answers, with ``alone`` (few) or ``among`` (many) other facts."""
        return statistics.fmean(getattr(one, where) == RIGHT for one in self.answers)

    def grown(self, before: Effects) -> dict[str, float]:
        """The effects that have grown beyond chance (z of paired differences above :data:`SURE`), and by how much."""
        pairs = list(zip(before.answers, self.answers, strict=False))
        found = {}
        for name in NAMES if len(pairs) >= FEWEST else ():
            changes = [new.shares()[name] - old.shares()[name] for old, new in pairs]
            mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
            if mean > 0 and mean > SURE * error:
                found[name] = mean
        return found

    def as_dict(self) -> dict[str, Any]:
        """The means and all answers, for JSON."""
        return {
            **{name.replace(" ", "_"): self.mean(name) for name in NAMES},
            "right_alone": self.right("alone"),
            "right_among": self.right("among"),
            "text_repeated": statistics.fmean(one.text for one in self.answers),
            "answers": [asdict(one) for one in self.answers],
        }


class Probes:
    """The prompts for models that share one tokenizer.

    Args:
        reader: one of the models.
        length: tokens of a context.
        data: text to continue; Python's language reference when None.

    Raises:
        Unsupported: for a length beyond the model's positions, or too short for a fact or a continuation.
    """

    def __init__(self, reader: Reader, length: int, data: Paths | None = None) -> None:
        if reader.longest is not None and length > reader.longest:
            raise Unsupported(
                f"side effects in {length} tokens with {reader.name}", supported=f"its positions, {reader.longest}"
            )
        if length < 2 * CONTINUED:
            raise Unsupported(f"side effects in {length} tokens", supported=f"{2 * CONTINUED} tokens or more")
        self.length, self.text = length, Continuation(reader, data, CONTINUED)
        self.present, self.absent = Facts(), Facts(absent=True)

        def count(text: str) -> int:
            return len(reader.encode(text))

        sample = self.present.sample(0, length, count)  # refused before anything is asked
        reader.check_positions(length + self.present.new_tokens(sample, count))

    def ask(self, reader: Reader, number: int) -> Answers:
        """The answers of a model, in its current state, for one sample number."""

        def count(text: str) -> int:
            return len(reader.encode(text))

        prompt, following = self.text.sample(number, self.length)
        written = reply(reader, prompt, CONTINUED).tokens
        found = {"alone": (self.present, self.present.build(SEED + number, FEW))}
        for name, task in (("among", self.present), ("absent", self.absent)):
            found[name] = task, task.sample(number, self.length, count)
        outcomes = {}
        for name, (task, sample) in found.items():
            answer = reply(reader, reader.encode(sample.prompt), task.new_tokens(sample, count), until="\n")
            outcomes[name] = task.outcome(reader.decode(answer.tokens), sample)
        return Answers(repeated(written), repeated(following), **outcomes)


def repeated(tokens: Sequence[int], gram: int = GRAM) -> float:
    """The share of n-grams that occurred before; 0 for fewer tokens than one n-gram."""
    grams = [tuple(tokens[i : i + gram]) for i in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


HEADINGS = [*NAMES, "right alone", "right among others"]


def cells(effects: Effects) -> list[str]:
    """The table cells of a model, in the order of :data:`HEADINGS`."""
    shares = [effects.mean(name) for name in NAMES] + [effects.right("alone"), effects.right("among")]
    return [f"{share:.0%}" for share in shares]


def rows(original: str, found: Mapping[str, Effects]) -> list[list[str]]:
    """A row for each model, and one for the text."""
    text = statistics.fmean(one.text for one in found[original].answers)
    return [*([name, *cells(one)] for name, one in found.items()), ["the text", f"{text:.0%}", *[""] * 6]]


def sentence(original: str, found: Mapping[str, Effects]) -> str:
    """A sentence that says which effects have grown beyond chance; empty if nothing was compared."""
    before = found[original]
    several = {name: one.grown(before) for name, one in found.items() if name != original}
    if not several:
        return ""
    count = min(len(one.answers) for one in found.values())
    if count < FEWEST:
        return f"Side effects: {count} samples are too few to judge."
    worse = [
        f"{name}: {', '.join(f'{what} by {share:.0%}' for what, share in grown.items())}"
        for name, grown in several.items()
        if grown
    ]
    told = "; ".join(worse) or "none has grown beyond chance"
    return f"Side effects with {count} samples, beside {original}: {told}."
