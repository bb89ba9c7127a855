"""Side effects of cheaper inference: what scores do not show of a model that was compressed, or that reads a part of its cache.

For every number a model is asked four times, greedily, before and after the same:

- to go on with a text: *repeated* is the share of the 4-grams of what it writes that it has written before (seq-rep-4 of
  Welleck et al., arXiv 1908.04319), beside that of the text itself;
- for a fact among two others, and for the same fact among as many as fit: *lost among others* is the share that is right alone
  and wrong there, less what is the other way round. What is wrong among many is *mixed up*, the value of another key, or
  *invented*, what the context does not have;
- for what the context does not have, after an example of how to decline: *made up* is the share that gets a value.

Facts are those of :class:`regard.tasks.long_context.Facts`. That token reduction should be judged by such effects too is the
proposal of arXiv 2505.18227; the probes are ours.
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
"""Tokens that a model writes after a text."""
GRAM = 4
FEW = 2
"""Facts beside the one that is asked for alone."""
SURE = 1.645
"""A change is told where z is beyond this, one-sided."""
FEWEST = 4
"""Numbers without which no change is judged."""

NAMES = ("repeated", "lost among others", "mixed up", "invented", "made up")
MEASURED = (
    f"Repeated: {GRAM}-grams of {CONTINUED} greedy tokens after a text that were written before.",
    "Lost among others: facts told right beside two others and wrong among as many as fit. Mixed up, invented: of the answers "
    "there, the value of another key, or one that the context does not have.",
    "Made up: questions about what the context does not have that get a value, after an example of how to decline.",
)


@dataclass(frozen=True)
class Answers:
    """What a model has answered to one number.

    Attributes:
        repeated: of what it wrote; text: of the text that is there in its place.
        alone, among, absent: what its answers are, in the words of :meth:`regard.tasks.long_context.Facts.outcome`.
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
    """The answers of one model to numbers 0, 1, ..."""

    answers: tuple[Answers, ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Effects:
        """From answers as dictionaries."""
        return cls(tuple(Answers(**row) for row in rows))

    def mean(self, name: str) -> float:
        """The mean of one of :data:`NAMES`, over the answers."""
        return statistics.fmean(one.shares()[name] for one in self.answers)

    def right(self, where: str) -> float:
        """The share of right answers, ``alone`` or ``among`` many."""
        return statistics.fmean(getattr(one, where) == RIGHT for one in self.answers)

    def grown(self, before: Effects) -> dict[str, float]:
        """What has grown beyond chance, and by how much: z of the differences by number is above :data:`SURE`."""
        pairs = list(zip(before.answers, self.answers, strict=False))
        found = {}
        for name in NAMES if len(pairs) >= FEWEST else ():
            changes = [new.shares()[name] - old.shares()[name] for old, new in pairs]
            mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
            if mean > 0 and mean > SURE * error:
                found[name] = mean
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: means, and all answers."""
        return {
            **{name.replace(" ", "_"): self.mean(name) for name in NAMES},
            "right_alone": self.right("alone"),
            "right_among": self.right("among"),
            "text_repeated": statistics.fmean(one.text for one in self.answers),
            "answers": [asdict(one) for one in self.answers],
        }


class Probes:
    """What models of one tokenizer are asked.

    Args:
        reader: one of them.
        length: tokens of a context.
        data: text that is gone on with; Python's language reference when None.

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
        self.present.sample(0, length, lambda text: len(reader.encode(text)))  # refused before anything is asked

    def ask(self, reader: Reader, number: int) -> Answers:
        """The answers of a model, as it is now, to a number."""

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
    """The share of n-grams that came before; 0 of fewer tokens than one has."""
    grams = [tuple(tokens[i : i + gram]) for i in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


HEADINGS = [*NAMES, "right alone", "right among others"]


def cells(effects: Effects) -> list[str]:
    """In the order of :data:`HEADINGS`."""
    shares = [effects.mean(name) for name in NAMES] + [effects.right("alone"), effects.right("among")]
    return [f"{share:.0%}" for share in shares]


def rows(original: str, found: Mapping[str, Effects]) -> list[list[str]]:
    """A row for each model, and one for the text."""
    text = statistics.fmean(one.text for one in found[original].answers)
    return [*([name, *cells(one)] for name, one in found.items()), ["the text", f"{text:.0%}", *[""] * 6]]


def sentence(original: str, found: Mapping[str, Effects]) -> str:
    """What has grown beyond chance, in words; empty where nothing was compared."""
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
