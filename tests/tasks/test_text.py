"""Text: splits, windows, tokenizers, and messages for whatever is wrong with a user's files."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys

import numpy as np
import pytest
import torch
from task_data import refused, save_json, words

from regard.contract import Unsupported
from regard.tasks import check_task, create_task
from regard.tasks.documents import OWN, RECORDS, Document, walk
from regard.tasks.text import split
from regard.tasks.tokenizer import BpeTokenizer


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def corpus(tmp_path):
    for i in range(20):
        write(tmp_path / "corpus" / f"part{i % 3}" / f"{i:02}.txt", f"<{i:02}> {words(60, i)}".encode())
    return tmp_path / "corpus"


def text(data, length=16, **options):
    return create_task("text", data=data, length=length, **options)


def documents(task):
    return task.training_documents + task.held_out_documents


def held_out_bytes(task):
    return b"".join(document.text for document in task.held_out_documents)


def test_split_is_by_document_and_complete_wherever_the_folder_is(corpus):
    task = text(corpus)
    names = [document.name for document in documents(task)]
    assert sorted(names) == sorted(p.relative_to(corpus).as_posix() for p in corpus.rglob("*.txt"))
    share = len(held_out_bytes(task)) / sum(p.stat().st_size + 1 for p in corpus.rglob("*.txt"))
    assert share == pytest.approx(0.1, abs=0.03)
    assert text(corpus, seed=1).held_out_documents != task.held_out_documents
    assert text(corpus.rename(corpus.parent / "moved")).held_out_documents == task.held_out_documents


def test_training_windows_come_from_training_documents_only(corpus):
    task = text(corpus, 64)
    stream, held_out = b"".join(document.text for document in task.training_documents), held_out_bytes(task)
    for step in range(20):
        for row in task.training_batch(step, 0, 16).inputs:
            window = bytes(row.tolist())
            assert window in stream
            assert window not in held_out


def test_held_out_windows_predict_each_token_once_and_the_next_one(corpus):
    task = text(corpus, 32, evaluation_items=1000)
    batches = list(task.evaluation_batches(3))
    inputs, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "targets"))
    held_out = held_out_bytes(task)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(targets.flatten().tolist()) == held_out[1 : 1 + targets.numel()]
    assert len(targets) == (len(held_out) - 1) // 32


def test_single_file_is_cut_at_a_blank_line(tmp_path):
    path = write(tmp_path / "book.txt", "\n\n".join(f"{i} {words(20, i)}" for i in range(100)).encode() + b"\n")
    task = text(path)
    (head,), (tail,) = task.training_documents, task.held_out_documents
    assert head.text + tail.text == path.read_bytes()
    assert head.text.endswith(b"\n\n")
    assert len(tail.text) / len(path.read_bytes()) == pytest.approx(0.1, abs=0.02)
    assert "the end of book.txt, is held out" in task.describe()


@pytest.mark.parametrize("content", ["é" * 997, "a" * 1000, "中" * 333 + "\n", "\n" * 3 + "x" * 500])
def test_a_cut_never_divides_a_character(content):
    (head,), (tail,), _ = split([Document("a", content.encode())], 0.1, 0)
    assert head.text.decode() + tail.text.decode() == content
    assert head.text
    assert tail.text


def test_a_document_that_dominates_is_cut_and_small_ones_are_trained_on():
    small = [Document(str(i), f"{i}".encode() * 50) for i in range(5)]
    training, held_out, rule = split([*small, Document("large", b"line of text\n" * 1000)], 0.1, 3)
    assert {d.name for d in training} == {"0", "1", "2", "3", "4", "large"}
    assert [d.name for d in held_out] == ["large (end)"]
    assert "large" in rule


def test_split_holds_out_enough_even_when_small_documents_come_first():
    given = [Document(str(i), bytes([65 + i]) * (100_000 if i < 3 else 10)) for i in range(6)]
    for seed in range(8):
        training, held_out, _ = split(given, 0.1, seed)
        assert 7_500 <= sum(len(d.text) for d in held_out) <= 100_020
        assert len(training) + len(held_out) == 6


def test_conversations_are_text(tmp_path):
    talks = []
    for i in range(9):
        parts = [{"type": "text", "text": words(30, i)}]
        talks.append([{"role": "user", "content": "how?"}, {"role": "tool", "content": None}])
        talks[-1].append({"role": "assistant", "content": parts})
        talks.append([{"from": "human", "value": "how?"}, {"from": "gpt", "value": words(30, 50 + i)}])
    path = save_json(tmp_path / "chats.jsonl", [{"n": 1, "messages": talk} for talk in talks])
    told = {d.text.decode() for d in documents(text(path, field="messages", held_out=0.5))}
    assert f"user: how?\nassistant: {words(30, 3)}\n" in told
    assert f"human: how?\ngpt: {words(30, 53)}\n" in told
    refused(lambda: text(path), "line 1 has no text in the field 'text'", "messages; try field=messages")
    save_json(path, [{"a": [{"role": "user"}], "b": [1], "c": []}])
    refused(lambda: text(path, field="a"), "line 1 has no text in the field", "none on this line")


@pytest.mark.usefixtures("whole_standard_library")
def test_default_corpus_is_the_standard_library_without_tests():
    task = check_task(create_task("text"))
    names = {d.name for d in documents(task)}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert len(names) > 300
    assert sum(len(b.inputs) for b in task.evaluation_batches(16)) == 64


def test_bpe_round_trips_and_counts_bytes(corpus, tmp_path):
    trained = text(corpus, tokenizer="bpe:400")
    tokenizer = trained.tokenizer
    given = "new text, é 中\n\n\t  (x) 😀 <s>"
    tokens = tokenizer.encode([given.encode()])
    assert tokenizer.decode(tokens) == given
    assert int(tokenizer.token_bytes[torch.from_numpy(tokens.astype(np.int64))].sum()) == len(given.encode())
    assert 256 < tokenizer.vocab_size <= 400
    tokenizer.save(tmp_path / "bpe.json")
    assert torch.equal(BpeTokenizer.load(tmp_path / "bpe.json").token_bytes, tokenizer.token_bytes)
    from_file = text(corpus, tokenizer=str(tmp_path / "bpe.json"))
    assert torch.equal(from_file.training_batch(0, 0, 4).inputs, trained.training_batch(0, 0, 4).inputs)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_bits_per_byte_of_a_uniform_model(corpus, tokenizer):
    task = text(corpus, tokenizer=tokenizer)
    (batch,) = task.evaluation_batches(64)
    bits, weights = task.score(torch.zeros(*batch.targets.shape, task.vocab_size, dtype=torch.float64), batch)
    assert weights.tolist() == [len(task.tokenizer.decode(row.tolist())) for row in batch.targets]
    assert float(bits.sum()) == pytest.approx(math.log2(task.vocab_size) * batch.targets.numel())
    if tokenizer == "bytes":
        assert float(bits.sum() / weights.sum()) == pytest.approx(8.0) == task.chance


def test_bpe_learns_from_the_training_documents_only(tmp_path):
    training, held_out = (write(tmp_path / f"{c}.txt", f"{c * 4} {c * 4} ".encode() * 100) for c in "az")
    task = text(training, 8, validation=held_out, tokenizer="bpe:300")
    assert len(task.tokenizer.encode([b"zzzzzzzz"])) == 8
    assert len(task.tokenizer.encode([b"aaaaaaaa"])) < 8


def test_a_folder_says_what_is_repeated_empty_or_not_read(corpus):
    write(corpus / "copy.txt", (corpus / "part0" / "00.txt").read_bytes())
    write(corpus / "picture.png", b"\0\1")
    write(corpus / "empty.txt", b" \n")
    write(corpus / ".hidden.txt", b"hidden")
    task = text(corpus)
    assert len(documents(task)) == 20
    for told in ("1 repeated document", "1 file with other suffixes not read (.png: 1)", "1 empty file left out"):
        assert told in task.describe()


def test_a_folder_without_a_known_suffix_is_read_by_its_contents(corpus):
    for path in list(corpus.rglob("*.txt")):
        path.rename(path.with_suffix(".0" if path.name < "1" else ""))
    write(corpus / "picture", b"\xff\xd8" * 99)
    write(corpus / "late", b"a" * (1 << 16) + b"\xff")
    task = text(corpus)
    assert len(documents(task)) == 20
    assert "corpus: no file has a suffix of text, so that all were read which are UTF-8 text" in task.describe()
    assert "corpus: 2 other files not read (no suffix: 2)" in task.describe()
    write(corpus / "one.txt", b"one " * 900)
    assert [d.name for d in text(corpus).training_documents] == ["one.txt"]


def test_what_a_folder_links_to_elsewhere_is_not_read(corpus):
    outside = write(corpus.parent / "outside" / "secret.txt", b"secret " * 9)
    (corpus / "file.txt").symlink_to(outside)
    (corpus / "folder").symlink_to(outside.parent)
    (corpus / "inside.txt").symlink_to("part0/00.txt")
    task = text(corpus)
    assert not any(b"secret" in d.text for d in documents(task))
    assert "corpus: 2 links out of it not followed" in task.describe()
    assert "1 repeated document left out" in task.describe()


def test_results_of_regard_in_a_folder_are_not_its_text(corpus):
    before = {d.digest for d in documents(text(corpus))}
    for folder, record, content in (
        ("runs/compare", "results.db", b""),
        ("model", "training.json", b'{\n "state": "begun",\n "regard": "0.1.0"}'),
        ("hybrid", "retrofit.json", b"{}"),
    ):
        write(corpus / folder / record, content)
        write(corpus / folder / "sub" / "report.html", b"results " * 9)
    task = text(corpus)
    assert {d.digest for d in documents(task)} == before
    assert "corpus: 3 folders with results of regard not read" in task.describe()
    write(corpus / "mine" / "training.json", b'{"text": "an example"}')
    assert len(documents(text(corpus))) == len(before) + 1
    asked_for = corpus / "runs" / "compare"
    assert asked_for / "sub" / "report.html" in walk(asked_for)[0]


def test_the_records_of_results_are_those_that_commands_write():
    commands = ("retrofit.folder", "workbench.retrofits", "workbench.trained.folder", "compression.folders")
    names = [importlib.import_module(f"regard.{command}").RECORD for command in commands]
    assert sorted(["results.db", *names]) == sorted([*OWN, *RECORDS])


def test_folders_may_be_deeper_than_the_stack(corpus):
    write(corpus.joinpath(*["d"] * 80) / "low.txt", b"low " * 99)
    before, frames = sys.getrecursionlimit(), len(inspect.stack(0))
    try:
        sys.setrecursionlimit(frames + 60)
        paths, _ = walk(corpus)
    finally:
        sys.setrecursionlimit(before)
    assert len(paths) == 21


def test_names_of_files_are_told_in_text_that_can_be_stored(corpus):
    os.rename(corpus / "part0" / "00.txt", os.fsencode(corpus) + b"/\xff\x1b[2J.txt")
    names = [document.name for document in text(corpus, validation=corpus / "part1").training_documents]
    assert r"\udcff\x1b[2J.txt" in names
    "".join(names).encode()


def folder(path):
    path.mkdir()
    return path


def pipe(path):
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda t: t / "corpus.tx", ["does not exist", "try ", "corpus.txt"]),
        (lambda t: t / "corpora" / "deep" / "a.txt", ["does not exist"]),
        (lambda t: write(t / "e.txt", b""), ["holds no text"]),
        (lambda t: write(t / "e.txt", b" \n\n"), ["holds no text"]),
        (lambda t: write(t / "b.txt", b"ab\0cd"), ["a zero byte at offset 2"]),
        (lambda t: write(t / "l.txt", b"caf\xe9 au lait"), ["byte 0xe9 at offset 3", "iconv -f LATIN1"]),
        (lambda t: write(t / "u.txt", "hello".encode("utf-16")), ["not UTF-8", "iconv -f UTF-16"]),
        (lambda t: folder(t / "f"), ["holds no text"]),
        (lambda t: write(t / "f" / "a.bin", b"x\0").parent, ["other files: .bin: 1"]),
        (lambda t: write(t / "f" / "a.txt", b"\0").parent, ["a.txt, which is not UTF-8"]),
        (lambda t: 3, ["data=3"]),
        (lambda t: "", ["data=''"]),
        (lambda t: [], ["no data at all"]),
        (lambda t: pipe(t / "pipe"), ["neither a file nor a folder"]),
        (lambda t: write(t / "j.jsonl", b'{"text": "a"}\n{oops\n'), ["line 2 is not JSON"]),
        (lambda t: write(t / "j.jsonl", b'{"text": "\\ud800"}\n'), ["surrogate"]),
        (lambda t: write(t / "s.txt", b"word " * 40), ["try length=", "held-out tokens"]),
        (lambda t: write(t / "s.txt", b"a"), ["supported: more text"]),
    ],
)
def test_unusable_data_is_refused_with_what_is_wrong(tmp_path, make, told):
    write(tmp_path / "corpus.txt", b"text")
    refused(lambda: create_task("text", data=make(tmp_path)), *told)


def test_the_length_that_is_named_as_nearest_fits(tmp_path):
    path = write(tmp_path / "s.txt", b"word word\n" * 50)
    with pytest.raises(Unsupported) as error:
        create_task("text", data=path)
    largest = int(error.value.nearest.removeprefix("length="))
    assert len(list(text(path, largest).evaluation_batches(4))) == 1
    text(path, largest).training_batch(0, 0, 4)
    refused(lambda: text(path, largest + 1), "held-out tokens")


def test_tokenizers_that_hide_bytes_are_refused(corpus, tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    path = tmp_path / "tokenizer.json"
    lower = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    exact, spaced = (pre_tokenizers.ByteLevel(add_prefix_space=prefix) for prefix in (False, True))
    for normaliser, pre_tokenizer in ((lower, exact), (None, spaced), (None, pre_tokenizers.Whitespace())):
        tokenizer = Tokenizer(models.BPE(unk_token="?"))
        if normaliser:
            tokenizer.normalizer = normaliser
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.train_from_iterator(["some text"], trainers.BpeTrainer(special_tokens=["?"], show_progress=False))
        tokenizer.save(str(path))
        refused(lambda: text(corpus, tokenizer=str(path)), "countable number of bytes")
    write(path, b"{}")
    refused(lambda: text(corpus, tokenizer=str(path)), "cannot be loaded")
