"""Needles, variables and common words, as in RULER (arXiv 2404.06654), with the counts of The Sparse Frontier."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from random import Random
from typing import ClassVar

from regard.tasks.long_context.samples import (
    MOST,
    NUMBERS,
    Exhausted,
    LongTask,
    Sample,
    draws,
    names,
    numbered,
    overlap,
)
from regard.tasks.protocol import check_integer

NOISE = "The road is long. The wind is calm. The stones are grey. On we walk."
BRIEF_NOISE = "The value is nothing ."


class Needles(LongTask):
    """ruler_niah: find the values of some keys among many key-value pairs.

    Args:
        queries: number of keys to look up; by default 4, or 2 in the brief wording.
    """

    name = "ruler_niah"
    metric = "fraction right"

    def __init__(self, wording: str = "full", *, queries: int | None = None) -> None:
        super().__init__(wording)
        self.queries = check_integer("queries", (2 if self.brief else 4) if queries is None else queries, 1, MOST)

    def build(self, seed: int, parts: int) -> Sample:
        rng = draws(seed, "pairs")
        total = self.queries + parts
        if self.brief:
            keys = rng.sample(names(0, 300), total) if total <= 300 else _none()
            values = [rng.choice(NUMBERS) for _ in keys]
        else:
            keys, values = (list(dict.fromkeys(_code(rng) for _ in range(total))) for _ in range(2))
            if min(len(keys), len(values)) < total:
                raise Exhausted
        pairs = list(zip(keys, values, strict=True))
        asked = pairs[: self.queries]
        shuffled = pairs[:]
        draws(seed, "order").shuffle(shuffled)
        form = "The value for {} is {} ." if self.brief else "The value for the key {} is {}."
        wanted = ", ".join(key for key, _ in asked) if not self.brief else " ".join(key for key, _ in asked)
        question = (
            f"what are the values for {wanted} ?" if self.brief else f"Which values do these keys have: {wanted}?"
        )
        prompt = self.frame(
            "The context has many pairs of a key and a value.",
            [question],
            " ".join(form.format(*pair) for pair in shuffled),
            "1. KEY = VALUE\n2. KEY = VALUE\n(one line for each key, in the order of the question)",
        )
        return Sample(prompt, self.told(self._written(asked)), asked)

    def _written(self, pairs: list[tuple[str, str]]) -> str:
        if self.brief:
            return " ".join(value for _, value in pairs)
        return "\n".join(f"{i}. {key} = {value}" for i, (key, value) in enumerate(pairs, 1))

    def score(self, reply: str, sample: Sample) -> float:
        answer, right = self.read(reply), 0
        if self.brief:
            found = answer.split()
            right = sum(i < len(found) and found[i] == value for i, (_, value) in enumerate(sample.facts))
        else:
            lines = numbered(answer)
            for i, (key, value) in enumerate(sample.facts, 1):
                match = re.match(r"(\S+)\s*(?:=|:|is:?)\s*(\S+?)\.?$", lines.get(i, ""))
                right += match is not None and (match[1].lower(), match[2].lower()) == (key, value)
        return right / len(sample.facts)

    def solve(self, prompt: str) -> str:
        question, context = self.context_of(prompt)
        pattern = r"The value for (\S+) is (\S+) \." if self.brief else r"The value for the key (\S+) is (\S+)\."
        known = dict(re.findall(pattern, context))
        asked = re.findall(r"[\w-]+", question.partition(" for " if self.brief else ": ")[2])
        return self.told(self._written([(key, known[key]) for key in asked]))


def _none() -> list[str]:
    raise Exhausted


def _code(rng: Random) -> str:
    return "-".join("".join(rng.choices(string.ascii_lowercase + string.digits, k=8)) for _ in range(4))


class Variables(LongTask):
    """ruler_vt: find all variables that have a given value, among chains of assignments and noise.

    Args:
        chains, hops: number of chains, and of assignments in each after the first; by default 8 and 4, or 2 and 2 in
            the brief wording.
    """

    name = "ruler_vt"
    metric = "intersection over union"

    def __init__(self, wording: str = "full", *, chains: int | None = None, hops: int | None = None) -> None:
        super().__init__(wording)
        self.chains = check_integer("chains", (2 if self.brief else 8) if chains is None else chains, 1, MOST)
        self.hops = check_integer("hops", (2 if self.brief else 4) if hops is None else hops, 1, MOST)

    def build(self, seed: int, parts: int) -> Sample:
        rng = draws(seed, "chains")
        count = self.chains * (self.hops + 1)
        if self.brief:
            variables = rng.sample(names(0, 300), count)
            values = rng.sample(NUMBERS, self.chains)
        else:
            variables = list({"".join(rng.choices(string.ascii_uppercase, k=5)): None for _ in range(count + 20)})[
                :count
            ]
            values = [str(number) for number in rng.sample(range(10000, 100000), self.chains)]
        chains = [variables[i :: self.chains] for i in range(self.chains)]
        queues = []
        for chain, value in zip(chains, values, strict=True):
            sources = [value, *(f"VAR {name}" for name in chain[:-1])]
            queues.append([f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=True)])
        # each chain in its own order, but chains and noise interleaved at random
        order = [i for i, queue in enumerate(queues) for _ in queue] + [-1] * parts
        draws(seed, "order").shuffle(order)
        end = " ." if self.brief else "."
        noise = BRIEF_NOISE if self.brief else NOISE
        context = " ".join(noise if i < 0 else queues[i].pop(0) + end for i in order)
        question = (
            f"which variables have the value {values[0]} ?"
            if self.brief
            else f"Which variables have the value {values[0]}, directly or by way of others?"
        )
        prompt = self.frame(
            "The context assigns values to variables, and variables to each other, between other sentences.",
            [question],
            context,
            "NAME NAME ...",
        )
        return Sample(prompt, self.told(" ".join(chains[0])), tuple(chains[0]))

    def score(self, reply: str, sample: Sample) -> float:
        found = re.findall(r"\w+", self.read(reply) if self.brief else self.read(reply).upper())
        return overlap([word for word in found if word != "VAR"], sample.facts)

    def solve(self, prompt: str) -> str:
        question, context = self.context_of(prompt)
        value = re.findall(r"\d+", question)[0]
        has: dict[str, str] = {}
        for name, of, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", context):
            has[name] = has.get(of, "") if of else number
        return self.told(" ".join(name for name, found in has.items() if found == value))


class CommonWords(LongTask):
    """ruler_cwe: find the words that occur most often in a list.

    Args:
        common: number of these words; by default 10, or 3 in the brief wording.
        often, seldom: how often these and all other words occur; by default 30 and 3, or 6 and 2 in the brief wording.
    """

    name = "ruler_cwe"
    metric = "intersection over union"
    least: ClassVar = 1

    def __init__(
        self, wording: str = "full", *, common: int | None = None, often: int | None = None, seldom: int | None = None
    ) -> None:
        super().__init__(wording)
        self.common = check_integer("common", (3 if self.brief else 10) if common is None else common, 1, MOST)
        self.seldom = check_integer("seldom", (2 if self.brief else 3) if seldom is None else seldom, 1, MOST)
        self.often = check_integer(
            "often", (6 if self.brief else 30) if often is None else often, self.seldom + 1, MOST
        )

    def build(self, seed: int, parts: int) -> Sample:
        every = names(0, 300) if self.brief else english_words()
        if self.common + parts > len(every):
            raise Exhausted
        words = draws(seed, "words").sample(every, len(every))
        common, others = words[: self.common], words[self.common : self.common + parts]
        listed = common * self.often + others * self.seldom
        draws(seed, "order").shuffle(listed)
        if self.brief:
            common = list(dict.fromkeys(word for word in listed if word in common))
            context, written = " ".join(listed), " ".join(common)
            question = "which words occur most ?"
        else:
            context = "\n".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
            written = "\n".join(f"{i}. {word}" for i, word in enumerate(common, 1))
            question = (
                f"In the list {self.common} words come {self.often} times each, all others {self.seldom} times. "
                f"Which are those {self.common} words?"
            )
        form = f"1. WORD\n2. WORD\n(and so on, {self.common} words)"
        prompt = self.frame("The context is a list of words with numbers.", [question], context, form)
        return Sample(prompt, self.told(written), tuple(common))

    def score(self, reply: str, sample: Sample) -> float:
        answer = self.read(reply)
        found = answer.split() if self.brief else [word.lower() for word in numbered(answer).values()]
        return overlap(found, sample.facts)

    def solve(self, prompt: str) -> str:
        question, context = self.context_of(prompt)
        words = context.split() if self.brief else list(numbered(context).values())
        count = self.common if self.brief else int(re.findall(r"list (\d+)", question)[0])
        common = [word for word, _ in Counter(words).most_common(count)]
        return self.told(" ".join(common) if self.brief else "\n".join(f"{i}. {w}" for i, w in enumerate(common, 1)))


@lru_cache
def english_words() -> list[str]:
    """Words of Python's language reference, which ships with Python, in alphabetical order."""
    from pydoc_data.topics import topics

    return sorted({word for text in topics.values() for word in re.findall(r"\b[a-z]{4,12}\b", text)})
