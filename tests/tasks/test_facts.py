"""One fact among few or many: what stays the same, the form of replies, and a reader that solves the task."""

from __future__ import annotations

import pytest

from regard import Unsupported
from regard.tasks.long_context import Facts
from regard.tasks.long_context.facts import UNKNOWN


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("absent", [False, True])
def test_a_reader_of_prompts_answers_all_of_them_and_prompts_fill_their_length(absent):
    task = Facts(absent=absent)
    for number, length in ((0, 60), (1, 300), (2, 2000)):
        sample = task.sample(number, length, count)
        assert 0.9 * length <= count(sample.prompt) <= length or length == 60
        assert task.score(task.solve(sample.prompt), sample) == 1
        assert (sample.answer == UNKNOWN) == absent and (sample.answer in sample.facts) != absent
        assert sample == task.sample(number, length, count)


def test_a_fact_is_the_same_whatever_stands_beside_it_and_in_the_same_place():
    task = Facts()
    few, many = task.build(7, 2), task.build(7, 200)
    assert few.answer == many.answer and few.prompt.splitlines()[-2] == many.prompt.splitlines()[-2]
    assert few.facts < many.facts
    lines = many.prompt.splitlines()
    asked = next(i for i, line in enumerate(lines) if line.endswith(f"is {many.answer} ."))
    for parts in (50, 800):
        prompt = task.build(7, parts).prompt.splitlines()
        assert next(
            i for i, line in enumerate(prompt) if line.endswith(f"is {many.answer} .")
        ) / parts == pytest.approx(asked / 200, abs=0.03)


def test_replies_are_right_declined_mixed_up_invented_or_silent():
    task = Facts()
    sample = task.build(3, 5)
    other = next(iter(sample.facts - {sample.answer}))
    strange = next(str(n) for n in range(1000, 1010) if str(n) not in sample.facts)
    for reply, outcome in (
        (f" {sample.answer}\nQuestion", "right"),
        (" Unknown .", "declined"),
        (other, "mixed up"),
        (strange, "invented"),
        ("It is so", "silent"),
        (f"That is {sample.answer}, I think", "right"),
        (" \n", "silent"),
    ):
        assert task.outcome(reply, sample) == outcome
    lacking = Facts(absent=True).build(3, 5)
    assert Facts(absent=True).outcome("unknown", lacking) == "right"
    assert Facts(absent=True).outcome(other, lacking) == "mixed up"


def test_contexts_beyond_the_words_that_there_are_and_too_short_ones_are_refused():
    with pytest.raises(Unsupported, match="material"):
        Facts().sample(0, 10**6, count)
    with pytest.raises(Unsupported, match="tokens or more"):
        Facts().sample(0, 20, count)
