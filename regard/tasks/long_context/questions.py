"""Questions about documents: SQuAD's own if given, otherwise gaps in a text.

A gap is identified by the three words before it, which occur only once in the whole text, so that a question is the
same at every length.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from regard.contract import Unsupported
from regard.tasks.documents import Paths, names_of, read_documents
from regard.tasks.long_context.samples import Exhausted, LongTask, Sample, draws

BEFORE = 3
"""Number of words before a gap that identify it."""
LETTERS = "ABCD"
FEWEST = 8
STEP = 8
"""Number of words by which a context grows."""


class Documents(LongTask):
    """The documents of a text, and a gap in one of them.

    Args:
        data: text files or folders, whose paragraphs are the documents; None for Python's language reference.
        first: index of the first paragraph to use, so that earlier ones can be used for training.
    """

    words: ClassVar[tuple[int, int]] = (30, 120)
    """Smallest and largest number of words per document: shorter ones are joined with the next, longer ones are cut."""
    choices: ClassVar[bool] = False

    def __init__(self, wording: str = "full", *, data: Paths | None = None, first: int = 0) -> None:
        super().__init__(wording)
        self.data = data
        given = None if data is None else (str(data),) if isinstance(data, str | Path) else tuple(map(str, data))
        self.documents = paragraphs(given, *self.words)[first:]
        self.whole = "\n".join(self.documents)
        if len(self.documents) < FEWEST:
            raise Unsupported(
                f"{self.name} on {len(self.documents)} documents of {self.words[0]} words or more",
                supported=f"{FEWEST} documents or more",
                nearest="more text",
            )

    def build(self, seed: int, parts: int) -> Sample:
        # the document in question is the same at every length; the last of the other documents is cut
        order = draws(seed, "documents").sample(self.documents, len(self.documents))
        shown, room = [order[0]], parts * STEP
        for document in order[1:]:
            if not room:
                break
            words = document.split()[:room]
            shown.append(" ".join(words))
            room -= len(words)
        if room:
            raise Exhausted
        place = draws(seed, "place").randrange(len(shown))
        shown[0], shown[place] = shown[place], shown[0]
        words = shown[place].split()
        rng = draws(seed, "gap")
        for at in rng.sample(range(BEFORE, len(words)), len(words) - BEFORE):
            before, answer = " ".join(words[at - BEFORE : at]), words[at]
            bare = answer.strip(",.;:()\"'")
            if bare.isalpha() and len(bare) > 2 and _words(bare) and self.whole.count(before) == 1:
                break
        else:
            raise Exhausted
        question = f'In document {place + 1}, which word comes after "{before}"?'
        form = "WORD"
        written = bare
        if self.choices:
            others = sorted({w for w in re.findall(r"[A-Za-z]{3,}", shown[place]) if w.lower() != bare.lower()})
            shuffled = [bare, *rng.sample(others, len(LETTERS) - 1)]
            rng.shuffle(shuffled)
            question += " " + " ".join(f"{letter}) {word}" for letter, word in zip(LETTERS, shuffled, strict=True))
            form, written = "LETTER", LETTERS[shuffled.index(bare)]
        context = "\n\n".join(f"Document {i}: {document}" for i, document in enumerate(shown, 1))
        prompt = self.frame("The context has several documents.", [question], context, form)
        return Sample(prompt, self.told(written), [written])

    def score(self, reply: str, sample: Sample) -> float:
        answer = self.read(reply)
        if self.choices:
            return float("".join(sorted(set(re.findall(r"\b[A-D]\b", answer)))) == sample.facts[0])
        return max(f1(answer, gold) for gold in sample.facts)

    def solve(self, prompt: str) -> str:
        question, context = self.context_of(prompt)
        before = re.findall(r'after "(.*?)"\?', question)[0]
        bare = context.partition(f"{before} ")[2].split()[0].strip(",.;:()\"'")
        if not self.choices:
            return self.told(bare)
        return self.told(dict((word, letter) for letter, word in re.findall(r"([A-D])\) (\w+)", question))[bare])


class SquadQuestions(Documents):
    """qa_squad: a question about one of many short documents, scored by word overlap.

    Args:
        data: text, or one file in SQuAD's format (.json), whose questions are then used.
    """

    name = "qa_squad"
    metric = "F1 of words"

    def __init__(self, wording: str = "full", *, data: Paths | None = None, first: int = 0) -> None:
        self.asked = squad(data)
        if self.asked is None:
            super().__init__(wording, data=data, first=first)
            return
        LongTask.__init__(self, wording)
        self.data, self.asked = data, self.asked[first:]

    def build(self, seed: int, parts: int) -> Sample:
        if self.asked is None:
            return super().build(seed, parts)
        order = draws(seed, "documents").sample(range(len(self.asked)), len(self.asked))
        gold, question, answers = self.asked[order[0]]
        others = list(dict.fromkeys(self.asked[i][0] for i in order if self.asked[i][0] != gold))
        if parts >= len(others):
            raise Exhausted
        place = draws(seed, "place").randrange(parts + 1)
        shown = others[:parts]
        shown.insert(place, gold)
        context = "\n\n".join(f"Document {i}: {document}" for i, document in enumerate(shown, 1))
        asked = f"About document {place + 1}: {question}"
        prompt = self.frame("The context has several documents.", [asked], context, "A FEW WORDS OF THE DOCUMENT")
        return Sample(prompt, self.told(answers[0]), answers)

    def solve(self, prompt: str) -> str:
        if self.asked is not None:
            raise Unsupported("a reader that answers questions of people", supported="gaps in a text")
        return super().solve(prompt)


class ShortDocuments(Documents):
    """qa_toefl: a question with four choices about one of several documents of a page."""

    name = "qa_toefl"
    metric = "exact letter"
    words: ClassVar = (100, 300)
    choices: ClassVar = True


class LongDocument(Documents):
    """qa_quality: a question with four choices about one long document among others."""

    name = "qa_quality"
    metric = "exact letter"
    words: ClassVar = (300, 900)
    choices: ClassVar = True


@lru_cache
def paragraphs(data: tuple[str, ...] | None, fewest: int, most: int) -> list[str]:
    """The paragraphs of a text, each on one line."""
    if data is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        documents, _ = read_documents(list(data), "text")
        text = "\n\n".join(document.text.decode("utf-8", "replace") for document in documents)
    found: list[str] = []
    held: list[str] = []
    for part in re.split(r"\n\s*\n", text):
        held += part.split()
        if len(held) >= fewest:
            found.append(" ".join(held[:most]))
            held = []
    return list(dict.fromkeys(found))


def squad(data: Paths | None) -> list[tuple[str, str, list[str]]] | None:
    """Paragraph, question and answers from a file in SQuAD's format; None if `data` is not a .json file.

    Raises:
        Unsupported: for a .json file in another format.
    """
    if data is None:
        return None
    paths = [data] if isinstance(data, str | Path) else list(data)
    if len(paths) != 1 or Path(paths[0]).suffix != ".json":
        return None
    try:
        articles = json.loads(Path(paths[0]).read_text(encoding="utf-8"))["data"]
        found = [
            (paragraph["context"], one["question"], sorted({answer["text"] for answer in one["answers"]}))
            for article in articles
            for paragraph in article["paragraphs"]
            for one in paragraph["qas"]
            if one["answers"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unsupported(
            f"{names_of(data)} as questions ({type(error).__name__}: {error})", supported="SQuAD's format, or text"
        ) from None
    if len({context for context, *_ in found}) < 2:
        raise Unsupported(f"{names_of(data)} with less than two paragraphs that have answers", supported="two or more")
    return found


def f1(found: str, gold: str) -> float:
    """F1 of the sets of words, ignoring case, punctuation and articles."""
    a, b = (_words(text) for text in (found, gold))
    common = len(a & b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _words(text: str) -> set[str]:
    return set(re.sub(r"[^\w\s]", "", text.lower()).split()) - {"a", "an", "the", "and", "or", "about", "to"}
