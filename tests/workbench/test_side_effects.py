"""Side effects: repetition, facts lost among others, and invented answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from regard import Unsupported
from regard.models import LanguageModel, LanguageModelConfig
from regard.tasks.tokenizer import ByteTokenizer
from regard.workbench.side_effects import Answers, Effects, Probes, repeated, rows, sentence
from regard.workbench.sparse.readers import OfRegard


class Scripted:
    """A character-level reader whose replies are a function of the prompt."""

    name, longest, stops = "scripted", None, frozenset[int]()

    def __init__(self, answer, text="abcabc") -> None:
        self.answer, self.text, self.model = answer, text, nn.Identity()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def prompt(self, text: str) -> str:
        return text

    def check_positions(self, tokens: int) -> None:
        pass

    def step(self, ids: Tensor, state):
        if state is None:
            prompt = self.decode(ids[0].tolist())
            state = [*(self.answer(prompt) if prompt.endswith("Answer :") else self.text * 100).encode()]
        logits = torch.zeros(256)
        logits[state[0]] = 1
        return logits, state[1:]


def read(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """The facts in a prompt, and the requested key."""
    return re.findall(r"The value for (\w+) is (\d+) \.", prompt), re.findall(r"value for (\w+) \?", prompt)[-1]


def solving(facts_read: int):
    """A reader that knows the last `facts_read` facts of a context, and answers 4321 otherwise."""

    def answer(prompt: str) -> str:
        facts, key = read(prompt)
        return f" {dict(facts[-facts_read:]).get(key, 4321)}\n"

    return answer


def declining(prompt: str) -> str:
    facts, key = read(prompt)
    return f" {dict(facts).get(key, 'unknown')}\n"


def test_repetition_is_the_share_of_grams_that_came_before():
    assert repeated([1, 2, 3, 4, 5]) == 0 == repeated([1, 2])
    assert repeated([1] * 10) == pytest.approx(1 - 1 / 7)
    assert repeated([1, 2, 3, 1, 2, 3, 1], gram=3) == pytest.approx(1 - 3 / 5)


def test_what_a_reader_loses_mixes_up_and_makes_up_is_told_apart():
    perfect = Scripted(declining)
    probes = Probes(perfect, 1500)
    before = Effects(tuple(probes.ask(perfect, number) for number in range(6)))
    assert before.right("alone") == before.right("among") == 1
    assert [before.mean(name) for name in ("lost among others", "mixed up", "invented", "made up")] == [0] * 4
    assert before.mean("repeated") == pytest.approx(1 - 3 / 61)
    assert 0 <= before.answers[0].text < 0.5

    forgetting = Scripted(solving(3), text="".join(chr(33 + i) for i in range(90)))
    after = Effects(tuple(probes.ask(forgetting, number) for number in range(6)))
    assert after.right("alone") == 1 and after.right("among") < 0.7
    assert after.mean("lost among others") == 1 - after.right("among") == after.mean("invented")
    assert after.mean("made up") == 1 and after.mean("repeated") == 0
    assert after.grown(before).keys() == {"lost among others", "invented", "made up"}
    assert before.grown(after).keys() == {"repeated"} and before.grown(before) == {}

    def confused(prompt: str) -> str:
        return f" {read(prompt)[0][0][1]}\n"

    mixed = Effects(tuple(probes.ask(Scripted(confused), number) for number in range(4)))
    assert mixed.mean("made up") == 1 and mixed.mean("mixed up") > 0.7 and mixed.mean("invented") == 0


def answers(count: int, **changed) -> Effects:
    usual = {"repeated": 0.1, "text": 0.05, "alone": "right", "among": "right", "absent": "right"}
    return Effects(tuple(Answers(**usual | {name: value(i) for name, value in changed.items()}) for i in range(count)))


def test_changes_are_told_where_they_are_beyond_chance_alone():
    before = answers(12)
    rare = answers(12, among=lambda i: "invented" if i == 3 else "right")
    often = answers(12, among=lambda i: "invented" if i % 2 else "right", repeated=lambda i: 0.3)
    assert rare.grown(before) == {}
    assert often.grown(before) == pytest.approx({"repeated": 0.2, "lost among others": 0.5, "invented": 0.5})
    told = sentence("dense", {"dense": before, "rare": rare, "often": often})
    assert "often: repeated by 20%" in told and "rare" not in told and "12 samples" in told
    assert "none has grown" in sentence("dense", {"dense": before, "rare": rare})
    assert "too few" in sentence("dense", {"dense": answers(3), "often": answers(3, absent=lambda i: "invented")})
    table = rows("dense", {"dense": before, "often": often})
    assert [row[:2] for row in table] == [["dense", "10%"], ["often", "30%"], ["the text", "5%"]]
    assert often.as_dict()["right_among"] == 0.5 and len(often.as_dict()["answers"]) == 12


def test_a_model_is_asked_as_it_is_now():
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(vocab_size=256, dim=16, plan="softmax", num_layers=1, num_heads=2)).eval()
    reader = OfRegard(model, ByteTokenizer(), "small")
    probes = Probes(reader, 300)
    first = probes.ask(reader, 0)
    assert probes.ask(reader, 0) == first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert probes.ask(reader, 0).repeated == pytest.approx(1 - 1 / 61)  # always token 0


def test_lengths_that_hold_no_context_are_refused():
    with pytest.raises(Unsupported, match="128 tokens or more"):
        Probes(Scripted(declining), 100)
    with pytest.raises(Unsupported, match="tokens or more"):
        Probes(Scripted(declining), 150)
    short = Scripted(declining)
    short.longest = 512
    with pytest.raises(Unsupported, match="512"):
        Probes(short, 1000)
