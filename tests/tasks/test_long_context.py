"""Long-context tasks: samples of the requested length, gold answers with the full score, readers that solve them."""

from __future__ import annotations

import json

import pytest

from regard import Unsupported
from regard.tasks.long_context import LONG_TASKS, WORDINGS, brief_words, create_long_task
from regard.tasks.long_context.questions import f1
from regard.tasks.long_context.samples import names, numbered
from regard.tasks.long_context.story import tell, understood


def words(text):
    return len(text.split())


def length_for(name, wording):
    return 500 if wording == "brief" and not name.startswith("qa") else 2400


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", LONG_TASKS)
def test_samples_fill_their_length_are_the_same_again_and_are_solved_by_a_reader(name, wording):
    task, length = create_long_task(name, wording), length_for(name, wording)
    samples = [task.sample(number, length, words) for number in range(4)]
    for number, sample in enumerate(samples):
        assert 0.9 * length <= words(sample.prompt) <= length
        assert create_long_task(name, wording).sample(number, length, words) == sample
        assert task.score(sample.answer, sample) == 1.0
        assert task.score(task.solve(sample.prompt), sample) == 1.0
        assert task.score("", sample) == 0.0
    others = [task.score(samples[i - 1].answer, sample) for i, sample in enumerate(samples)]
    assert sum(others) / len(others) <= (0.5 if name in ("qa_quality", "qa_toefl", "story_filtering") else 0.1)
    assert len({sample.prompt for sample in samples}) == 4


@pytest.mark.parametrize("name", LONG_TASKS)
def test_a_full_answer_without_tags_has_no_score(name):
    task = create_long_task(name)
    sample = task.sample(0, length_for(name, "full"), words)
    bare = sample.answer.replace("<answer>", "").replace("</answer>", "")
    assert task.score(bare, sample) == 0.0
    assert task.score(f"<explanation>\nIt says so.\n</explanation>\n{sample.answer.upper()}", sample) == (
        1.0 if name != "ruler_niah" else task.score(sample.answer.upper(), sample)
    )


def test_partial_answers_have_a_part_of_the_score():
    task = create_long_task("ruler_niah")
    sample = task.sample(1, 1200, words)
    lines = numbered(task.read(sample.answer))
    swapped = "\n".join(f"{i}. {lines[j]}" for i, j in ((1, 2), (2, 1), (3, 3), (4, 4)))
    assert task.score(f"<answer>{swapped}</answer>", sample) == 0.5
    task = create_long_task("ruler_vt")
    sample = task.sample(1, 1200, words)
    assert task.score(f"<answer>VAR {sample.facts[0]}, {sample.facts[1]} WRONG</answer>", sample) == pytest.approx(
        2 / 6
    )
    assert f1("The red fox", "a red dog") == 0.5


def test_counts_are_those_of_the_benchmark_and_chains_keep_their_order():
    sample = create_long_task("ruler_cwe").sample(0, 2000, words)
    listed = list(numbered(sample.prompt.partition("<context>")[2].partition("</context>")[0]).values())
    often = {word: listed.count(word) for word in set(listed)}
    assert sorted(often.values())[-10:] == [30] * 10 and set(often.values()) == {3, 30}
    task = create_long_task("ruler_vt")
    sample = task.sample(2, 2000, words)
    places = [sample.prompt.index(f"VAR {name} =") for name in sample.facts]
    assert len(places) == 5 and places == sorted(places) and sample.prompt.count("VAR ") == 8 * (1 + 4 * 2)


@pytest.mark.parametrize("brief", [True, False])
def test_stories_tell_what_their_chapters_hold_and_longer_ones_begin_alike(brief):
    story = tell(7, 30, brief=brief)
    text = "\n\n".join("".join(chapter.text.values()) for chapter in story)
    read = understood(text, brief=brief)
    for told, found in zip(story, read, strict=True):
        assert (told.number, told.place, told.person, told.bought, told.sold) == (
            found.number,
            found.place,
            found.person,
            found.bought,
            found.sold,
        )
    assert len({(c.place, c.person) for c in story}) == len({c.bought for c in story}) == 30
    bought: list[str] = []
    for chapter in story:
        assert chapter.sold is None or chapter.sold in bought
        bought = [item for item in bought if item != chapter.sold] + [chapter.bought]
    assert 5 < sum(chapter.sold is not None for chapter in story) < 25
    assert [c.text for c in tell(7, 12, brief=brief)] == [c.text for c in story[:12]]


def test_brief_prompts_are_made_of_few_words():
    known = set(brief_words())
    assert len(known) <= 800 and len(set(names(0, 3600))) == 3600
    for name in LONG_TASKS:
        if not name.startswith("qa"):
            sample = create_long_task(name, "brief").sample(3, 500, words)
            assert set((sample.prompt + " " + sample.answer).split()) <= known


def test_questions_are_asked_of_the_users_text_and_of_squad_files(tmp_path):
    text = "\n\n".join(
        " ".join(f"{a}{b}{c}" for c in "kmnprt" for b in "aeiou") + f" closing words of part {a}" for a in names(0, 40)
    )
    (tmp_path / "own.txt").write_text(text)
    task = create_long_task("qa_squad", "brief", data=str(tmp_path / "own.txt"))
    sample = task.sample(0, 400, words)
    assert task.score(task.solve(sample.prompt), sample) == 1.0 and sample.answer in text
    asked = [
        {
            "context": f"Person {i} lives in house {i}.",
            "qas": [{"question": "Where?", "answers": [{"text": f"house {i}"}]}],
        }
        for i in range(60)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    task = create_long_task("qa_squad", "brief", data=str(tmp_path / "squad.json"))
    shorter, longer = task.sample(5, 100, words), task.sample(5, 300, words)
    assert shorter.facts == longer.facts and task.score(longer.answer, longer) == 1.0


def test_what_cannot_be_made_is_refused(tmp_path):
    for name, wording, length, match in (
        ("ruler_niah", "full", 50, "tokens or more"),
        ("ruler_cwe", "brief", 5000, "shorter contexts"),
        ("qa_toefl", "full", 10**6, "more material"),
    ):
        with pytest.raises(Unsupported, match=match):
            create_long_task(name, wording).sample(0, length, words)
    with pytest.raises(Unsupported, match="ruler_niah"):
        create_long_task("ruler_nia")
    with pytest.raises(Unsupported, match="wording"):
        create_long_task("ruler_niah", "short")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(Unsupported, match="SQuAD"):
        create_long_task("qa_squad", data=str(tmp_path / "bad.json"))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(Unsupported, match="documents"):
        create_long_task("qa_squad", data=str(tmp_path / "short.txt"))
