"""Stories in chapters, made from templates: where somebody was, whom they met, what they bought and sold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

from regard.tasks.long_context.samples import MOST, Exhausted, LongTask, Sample, draws, names, numbered, overlap, plain
from regard.tasks.protocol import check_integer

HERO = "Arion"
ADJECTIVES = [
    "ancient",
    "broken",
    "carved",
    "curved",
    "dusty",
    "engraved",
    "faded",
    "gilded",
    "hollow",
    "narrow",
    "painted",
    "polished",
    "rusty",
    "shining",
    "twisted",
    "worn",
]
MATERIALS = [
    "amber",
    "bone",
    "brass",
    "bronze",
    "clay",
    "copper",
    "glass",
    "iron",
    "ivory",
    "jade",
    "leather",
    "marble",
    "oak",
    "pearl",
    "silver",
    "stone",
]
THINGS = [
    "amulet",
    "bell",
    "bowl",
    "box",
    "brooch",
    "candlestick",
    "chalice",
    "comb",
    "compass",
    "dagger",
    "flute",
    "goblet",
    "key",
    "lantern",
    "mask",
    "mirror",
    "ring",
    "vase",
]
PLACES = [
    f"{kind} of {name}"
    for kind in ("Harbour", "Market", "Tower", "Garden", "Library", "Bridge", "Forge", "Temple")
    for name in ("Velen", "Ostrad", "Miravel", "Karth", "Solenne", "Dunmar", "Ilvane", "Thoran")
]
PEOPLE = [
    f"{first} the {craft}"
    for first in ("Mira", "Joren", "Selka", "Tamas", "Ysolde", "Bram", "Nerida", "Oskar")
    for craft in ("Weaver", "Sailor", "Scribe", "Mason", "Healer", "Tinker", "Miller", "Guard")
]
ARRIVING = (
    "{hero} came to the {place} in the morning. ",
    "The way led {hero} to the {place}. ",
    "After a day on the road {hero} stood in the {place}. ",
)
HAPPENING = (
    "A fair was being held there. ",
    "The streets were empty because of the rain. ",
    "Children ran after a runaway goat. ",
    "Somebody was repairing the roofs. ",
    "A choir was practising near by. ",
    "The well had run dry that week. ",
)
MEETING = (
    "There {hero} met {person}. ",
    "By the gate waited {person}, and {hero} said hello. ",
    "It was {person} who called out to {hero}. ",
)
TALKING = (
    "They spoke about the weather. ",
    "They laughed about an old joke. ",
    "They wondered how the harvest would be. ",
    "They argued about the price of bread. ",
    "They remembered a journey of long ago. ",
    "They praised the cook of the inn. ",
    "They complained about the state of the roads. ",
    "They shared a pot of tea. ",
    "They compared their boots. ",
    "They watched the clouds for a while. ",
    "They guessed at the age of a tree. ",
    "They traded news from the coast. ",
    "They talked about a lost cat. ",
    "They recalled a song and forgot its ending. ",
    "They agreed that winter was too long. ",
    "They disagreed about how to bake fish. ",
    "They counted the ships on the river. ",
    "They told each other of their dreams. ",
    "They made plans that nobody would keep. ",
    "They spoke of a wedding in the village. ",
    "They looked at a map upside down. ",
    "They discussed whether bees can sleep. ",
    "They mourned a broken cart. ",
    "They tried to name all the stars. ",
    "They talked of taxes and sighed. ",
    "They described the best soup of their lives. ",
    "They wished each other better luck. ",
    "They listened to the bells. ",
    "They spoke softly, since a child was asleep. ",
    "They were silent for some time. ",
)
BUYING = (
    "{hero} bought the {item} from {person}. ",
    "For a few coins {hero} acquired the {item}. ",
    "{person} let {hero} have the {item} at a good price, and so it was purchased. ",
)
SELLING = (
    "In return {hero} sold the {item}. ",
    "{hero} parted with the {item} for money. ",
)
LEAVING = (
    "Then they said goodbye. ",
    "At dusk {hero} went on. ",
    "With a wave {hero} left. ",
)
KINDS = ("location", "character", "item")


@dataclass
class Chapter:
    """The events of a chapter; `bought` is None if nothing was bought."""

    number: int
    place: str
    person: str
    bought: str | None
    sold: str | None
    text: dict[str, str] = field(default_factory=dict)

    def fact(self, kind: str) -> str:
        """The answer to a question of one of the `KINDS`."""
        return {"location": self.place, "character": self.person, "item": self.bought or "nothing"}[kind]


def tell(seed: int, count: int, *, brief: bool) -> list[Chapter]:
    """The first chapters of a story; a longer story begins with the same chapters.

    No two chapters have the same place and person. An item is bought in each, and with probability 1/2 an earlier one
    is sold.
    """
    rng = draws(seed, "story")
    places, people = (names(0, 40), names(40, 40)) if brief else (PLACES, PEOPLE)
    if brief:
        items = names(80, 200)
    else:
        items = [f"{a} {m} {t}" for a in ADJECTIVES for m in MATERIALS for t in THINGS]
    pairs = [(place, person) for place in places for person in people]
    if count > min(len(pairs), len(items), 99 if brief else len(pairs)):
        raise Exhausted
    rng.shuffle(pairs)
    rng.shuffle(items)
    owned: list[str] = []
    story = []
    for i in range(count):
        place, person = pairs[i]
        sold = owned.pop(rng.randrange(len(owned))) if owned and rng.random() < 0.5 else None
        owned.append(items[i])
        chapter = Chapter(i + 1, place, person, items[i], sold)
        words = {"hero": HERO, "place": place, "person": person}
        if brief:
            chapter.text = {
                "before": f"Chapter {i + 1} : {HERO} meets {person} in {place}",
                "bought": f" and buys {items[i]}",
                "sold": f" and sells {sold}" if sold else "",
                "after": " .",
            }
        else:
            talk = "".join(rng.sample(TALKING, 3))
            before = rng.choice(ARRIVING) + rng.choice(HAPPENING) + rng.choice(MEETING) + talk
            chapter.text = {
                "before": f"Chapter {i + 1}:\n" + before.format(**words),
                "bought": rng.choice(BUYING).format(item=items[i], **words),
                "sold": rng.choice(SELLING).format(item=sold, **words) if sold else "",
                "after": rng.choice(LEAVING).format(**words).rstrip(),
            }
        story.append(chapter)
    return story


def printed(story: Sequence[Chapter], *, brief: bool) -> str:
    """The text of a story."""
    return ("\n" if brief else "\n\n").join("".join(chapter.text.values()) for chapter in story)


@lru_cache
def _patterns(templates: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    found = []
    for template in templates:
        text = re.escape(template.strip()).replace(r"\{hero\}", HERO)
        for part in ("place", "person", "item"):
            text = text.replace(rf"\{{{part}\}}", rf"(?P<{part}>[\w ]+?)")
        found.append(re.compile(text))
    return tuple(found)


def understood(context: str, *, brief: bool) -> list[Chapter]:
    """Parse the chapters in a text by the templates."""
    story = []
    for number, text in re.findall(r"Chapter (\d+) ?:\s(.*?)(?=\n+Chapter|\Z)", context, re.DOTALL):
        if brief:
            match = re.match(r"\S+ meets (\S+) in (\S+)(?: and buys (\S+))?(?: and sells (\S+))? \.", text)
            assert match is not None
            story.append(Chapter(int(number), match[2], match[1], match[3], match[4]))
            continue
        sentences = re.split(r"(?<=\.) ", text)
        found: dict[str, str] = {}
        for part, templates in (("place", ARRIVING), ("person", MEETING), ("bought", BUYING), ("sold", SELLING)):
            for sentence in sentences:
                for pattern in _patterns(templates):
                    match = pattern.fullmatch(sentence)
                    if match:
                        found[part] = match["item" if part in ("bought", "sold") else part]
        story.append(Chapter(int(number), found["place"], found["person"], found.get("bought"), found.get("sold")))
    return story


class Story(LongTask):
    """The common base of the tasks about stories."""

    intro: ClassVar = f"The context is a story of {HERO} in chapters."

    def chapters(self, prompt: str) -> tuple[str, list[Chapter]]:
        """The question of a prompt, and the chapters in its context."""
        question, context = self.context_of(prompt)
        return question, understood(context, brief=self.brief)


class StoryRetrieval(Story):
    """story_retrieval: places, people and items of some chapters.

    Args:
        queries: number of questions; by default 16, or 4 in the brief wording.
    """

    name = "story_retrieval"
    metric = "fraction right"

    def __init__(self, wording: str = "full", *, queries: int | None = None) -> None:
        super().__init__(wording)
        self.queries = check_integer("queries", (4 if self.brief else 16) if queries is None else queries, 1, MOST)

    def build(self, seed: int, parts: int) -> Sample:
        story = tell(seed, self.queries + parts, brief=self.brief)
        rng = draws(seed, "questions")
        asked = [(chapter, rng.choice(KINDS)) for chapter in rng.sample(story, self.queries)]
        facts = tuple(chapter.fact(kind) for chapter, kind in asked)
        if self.brief:
            words = {"location": "where", "character": "whom", "item": "what item"}
            questions = [" , ".join(f"Chapter {chapter.number} {words[kind]}" for chapter, kind in asked) + " ?"]
        else:
            asks = {
                "location": "which place did {} come to?",
                "character": "whom did {} meet?",
                "item": "which item did {} acquire?",
            }
            questions = [
                f"{i}. In Chapter {chapter.number}, {asks[kind].format(HERO)}"
                for i, (chapter, kind) in enumerate(asked, 1)
            ]
        form = "1. ANSWER\n2. ANSWER\n(one line for each question)"
        prompt = self.frame(self.intro, questions, printed(story, brief=self.brief), form)
        return Sample(prompt, self.told(self._written(facts)), facts)

    def _written(self, facts: Sequence[str]) -> str:
        return " ".join(facts) if self.brief else "\n".join(f"{i}. {fact}" for i, fact in enumerate(facts, 1))

    def score(self, reply: str, sample: Sample) -> float:
        answer = self.read(reply)
        found = dict(enumerate(answer.split(), 1)) if self.brief else numbered(answer)
        right = sum(plain(found.get(i, "")) == plain(fact) for i, fact in enumerate(sample.facts, 1))
        return right / len(sample.facts)

    def solve(self, prompt: str) -> str:
        question, story = self.chapters(prompt)
        known = {chapter.number: chapter for chapter in story}
        words = {"where": "location", "which place": "location", "whom": "character"}
        asked = re.findall(r"Chapter (\d+),? (where|whom|what item|which place|which item)", question)
        return self.told(self._written([known[int(number)].fact(words.get(kind, "item")) for number, kind in asked]))


class StoryMultihop(Story):
    """story_multihop: the item acquired last before another item."""

    name = "story_multihop"
    metric = "exact"
    least: ClassVar = 2

    def build(self, seed: int, parts: int) -> Sample:
        story = tell(seed, parts, brief=self.brief)
        at = draws(seed, "question").randrange(1, len(story))
        item, answer = story[at].bought, story[at - 1].bought
        assert answer is not None
        if self.brief:
            question = f"what item does {HERO} buy before {item} ?"
        else:
            question = f"Which item did {HERO} acquire last before acquiring the {item}?"
        prompt = self.frame(self.intro, [question], printed(story, brief=self.brief), "ITEM")
        return Sample(prompt, self.told(answer), answer)

    def score(self, reply: str, sample: Sample) -> float:
        return float(plain(self.read(reply)) == plain(sample.facts))

    def solve(self, prompt: str) -> str:
        question, story = self.chapters(prompt)
        item = re.findall(r"before (?:acquiring the )?([\w ]+?) ?\?", question)[0]
        bought = [chapter.bought for chapter in story if chapter.bought]
        return self.told(bought[bought.index(item) - 1])


class StoryFiltering(Story):
    """story_filtering: the chapters in which nothing was bought.

    Args:
        without: number of such chapters; by default 3, or 2 in the brief wording.
    """

    name = "story_filtering"
    metric = "intersection over union"

    def __init__(self, wording: str = "full", *, without: int | None = None) -> None:
        super().__init__(wording)
        self.without = check_integer("without", (2 if self.brief else 3) if without is None else without, 1, MOST)

    def build(self, seed: int, parts: int) -> Sample:
        story = tell(seed, self.without + 1 + parts, brief=self.brief)
        chosen = sorted(draws(seed, "question").sample(range(len(story)), self.without))
        for i in chosen:
            story[i].bought, story[i].text["bought"] = None, ""
        facts = tuple(str(i + 1) for i in chosen)
        if self.brief:
            question = f"in which chapters does {HERO} buy nothing ?"
        else:
            question = f"In which chapters did {HERO} buy nothing? There are exactly {self.without}."
        prompt = self.frame(self.intro, [question], printed(story, brief=self.brief), "NUMBER, NUMBER, ...")
        return Sample(prompt, self.told((" " if self.brief else ", ").join(facts)), facts)

    def score(self, reply: str, sample: Sample) -> float:
        return overlap(re.findall(r"\d+", self.read(reply)), sample.facts)

    def solve(self, prompt: str) -> str:
        _, story = self.chapters(prompt)
        found = [str(chapter.number) for chapter in story if chapter.bought is None]
        return self.told((" " if self.brief else ", ").join(found))
