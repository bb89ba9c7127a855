"""Text: splits, windows, tokenizers, and words for whatever is wrong with a user's files."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.tasks import check_task, create_task
from regard.tasks.documents import Document, walk
from regard.tasks.text import split
from regard.tasks.tokenizer import BpeTokenizer


def words(count, seed):
    generator = np.random.default_rng(seed)
    lexicon = ["".join(chr(97 + c) for c in generator.integers(0, 26, 5)) for _ in range(50)]
    return " ".join(generator.choice(lexicon, count))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    for i in range(20):
        path = folder / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{i:02}> " + words(60, i))
    return folder


def held_out_bytes(task):
    return b"".join(document.text for document in task.held_out_documents)


def test_split_is_by_document_and_complete(corpus):
    task = create_task("text", data=corpus, length=16)
    training = {d.name for d in task.training_documents}
    held_out = {d.name for d in task.held_out_documents}
    assert not training & held_out
    assert training | held_out == {p.relative_to(corpus).as_posix() for p in corpus.rglob("*.txt")}
    share = len(held_out_bytes(task)) / sum(p.stat().st_size + 1 for p in corpus.rglob("*.txt"))
    assert share == pytest.approx(0.1, abs=0.03)
    assert create_task("text", data=corpus, length=16, seed=1).held_out_documents != task.held_out_documents


def test_split_does_not_depend_on_where_the_folder_is(corpus):
    before = create_task("text", data=corpus, length=16)
    moved = corpus.rename(corpus.parent / "moved")
    after = create_task("text", data=moved, length=16)
    assert before.held_out_documents == after.held_out_documents
    assert torch.equal(before.training_batch(2, 3, 4).inputs, after.training_batch(2, 3, 4).inputs)


def test_training_windows_come_from_training_documents_only(corpus):
    task = create_task("text", data=corpus, length=64)
    stream = b"".join(document.text for document in task.training_documents)
    held_out = held_out_bytes(task)
    for step in range(20):
        for row in task.training_batch(step, 0, 16).inputs:
            window = bytes(row.tolist())
            assert window in stream
            assert window not in held_out


def test_held_out_windows_predict_each_token_once_and_the_next_one(corpus):
    task = create_task("text", data=corpus, length=32, evaluation_items=1000)
    batches = list(task.evaluation_batches(3))
    inputs, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "targets"))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = held_out_bytes(task)
    assert bytes(targets.flatten().tolist()) == text[1 : 1 + targets.numel()]
    assert len(targets) == (len(text) - 1) // 32


def test_capped_windows_are_spread_over_the_held_out_text(corpus):
    whole = create_task("text", data=corpus, length=16, evaluation_items=1000, held_out=0.3)
    some = create_task("text", data=corpus, length=16, evaluation_items=5, held_out=0.3)
    every = [tuple(row.tolist()) for b in whole.evaluation_batches(64) for row in b.inputs]
    chosen = [every.index(tuple(row.tolist())) for b in some.evaluation_batches(64) for row in b.inputs]
    assert len(chosen) == 5
    assert chosen == sorted(set(chosen))
    assert chosen[-1] >= 0.7 * len(every)


def test_training_batch_is_a_function_of_step_seed_and_size(corpus):
    one, other = (create_task("text", data=corpus, length=16) for _ in range(2))
    other.training_batch(1, 2, 3)
    assert torch.equal(one.training_batch(7, 2, 5).inputs, other.training_batch(7, 2, 5).inputs)
    assert not torch.equal(one.training_batch(7, 2, 5).inputs, one.training_batch(8, 2, 5).inputs)
    assert not torch.equal(one.training_batch(7, 2, 5).inputs, one.training_batch(7, 3, 5).inputs)


def test_single_file_is_cut_at_a_blank_line(tmp_path):
    paragraphs = [f"{i} " + words(20, i) for i in range(100)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    task = create_task("text", data=path, length=32)
    (head,), (tail,) = task.training_documents, task.held_out_documents
    assert head.text + tail.text == path.read_bytes()
    assert head.text.endswith(b"\n\n")
    assert len(tail.text) / len(path.read_bytes()) == pytest.approx(0.1, abs=0.02)
    assert "the end of book.txt, is held out" in task.describe()


@pytest.mark.parametrize("text", ["é" * 997, "a" * 1000, "中" * 333 + "\n", "\n" * 3 + "x" * 500])
def test_a_cut_never_divides_a_character(text):
    (head,), (tail,), _ = split([Document("a", text.encode())], 0.1, 0)
    assert head.text.decode() + tail.text.decode() == text
    assert head.text
    assert tail.text


def test_a_document_that_dominates_is_cut_and_small_ones_are_trained_on():
    small = [Document(str(i), f"{i}".encode() * 50) for i in range(5)]
    large = Document("large", b"line of text\n" * 1000)
    training, held_out, rule = split([*small, large], 0.1, 3)
    assert {d.name for d in training} == {"0", "1", "2", "3", "4", "large"}
    assert [d.name for d in held_out] == ["large (end)"]
    assert "large" in rule


@pytest.mark.parametrize("seed", range(8))
def test_split_holds_out_enough_even_when_small_documents_come_first(seed):
    documents = [Document(str(i), bytes([65 + i]) * (100_000 if i < 3 else 10)) for i in range(6)]
    training, held_out, _ = split(documents, 0.1, seed)
    size = sum(len(d.text) for d in held_out)
    assert 7_500 <= size <= 100_020
    assert len(training) + len(held_out) == 6


def test_repeated_documents_count_once(corpus):
    (corpus / "copy.txt").write_bytes((corpus / "part0" / "00.txt").read_bytes())
    task = create_task("text", data=corpus, length=16)
    assert len(task.training_documents) + len(task.held_out_documents) == 20
    assert "1 repeated documents left out" in task.describe()


def test_validation_inside_the_training_folder_is_not_trained_on(corpus):
    task = create_task("text", data=corpus, validation=corpus / "part1", length=16)
    held_out = {d.text for d in task.held_out_documents}
    assert len(held_out) == 7
    assert not held_out & {d.text for d in task.training_documents}
    assert (
        "7 documents of the held-out data (part1) are also in the training data: not trained on; the first: '"
        in task.describe()
    )
    with pytest.raises(Unsupported, match="holds all of the training data"):
        create_task("text", data=corpus, validation=corpus, length=16)


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "mail.jsonl"
    lines = [json.dumps({"body": f"mail {i} é " + words(20, i), "n": i}) for i in range(30)]
    path.write_text("\n".join(lines) + "\n\n")
    task = create_task("text", data=path, field="body", length=16)
    assert len(task.training_documents) + len(task.held_out_documents) == 30
    assert all(d.text.startswith(b"mail") and d.text.endswith(b"\n") for d in task.training_documents)
    with pytest.raises(Unsupported, match=r"no text in the field 'text'.*body; try field=body"):
        create_task("text", data=path)


def test_default_corpus_is_the_standard_library_without_tests():
    task = create_task("text")
    names = {d.name for d in task.training_documents + task.held_out_documents}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert len(names) > 300
    assert sum(len(b.inputs) for b in task.evaluation_batches(16)) == 64
    check_task(task)


def test_bpe_round_trips_and_counts_bytes(corpus, tmp_path):
    tokenizer = BpeTokenizer.train(
        [d.text for d in create_task("text", data=corpus, length=16).training_documents], 400
    )
    text = "new text, é 中\n\n\t  (x) 😀 <s>"
    tokens = tokenizer.encode([text.encode()])
    assert tokenizer.decode(tokens) == text
    assert int(tokenizer.token_bytes[torch.from_numpy(tokens.astype(np.int64))].sum()) == len(text.encode())
    assert 256 < tokenizer.vocab_size <= 400
    tokenizer.save(tmp_path / "bpe.json")
    again = BpeTokenizer.load(tmp_path / "bpe.json")
    assert np.array_equal(again.encode([text.encode()]), tokens)
    assert torch.equal(again.token_bytes, tokenizer.token_bytes)
    from_file = create_task("text", data=corpus, length=16, tokenizer=str(tmp_path / "bpe.json"))
    trained = create_task("text", data=corpus, length=16, tokenizer="bpe:400")
    assert torch.equal(from_file.training_batch(0, 0, 4).inputs, trained.training_batch(0, 0, 4).inputs)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_bits_per_byte_of_a_uniform_model(corpus, tokenizer):
    task = create_task("text", data=corpus, length=16, tokenizer=tokenizer, evaluation_items=1000)
    bits = bytes_seen = tokens = 0.0
    for batch in task.evaluation_batches(64):
        logits = torch.zeros(*batch.targets.shape, task.vocab_size, dtype=torch.float64)
        sums, weights = task.score(logits, batch)
        bits, bytes_seen, tokens = (
            bits + float(sums.sum()),
            bytes_seen + float(weights.sum()),
            tokens + batch.targets.numel(),
        )
    assert bits / bytes_seen == pytest.approx(math.log2(task.vocab_size) * tokens / bytes_seen)
    if tokenizer == "bytes":
        assert bits / bytes_seen == pytest.approx(8.0) == task.chance
    else:
        assert bytes_seen > 1.2 * tokens


def test_bpe_learns_from_the_training_documents_only(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 200)
    (tmp_path / "v.txt").write_text("zzzzzzzz " * 200)
    task = create_task("text", data=tmp_path / "a.txt", validation=tmp_path / "v.txt", tokenizer="bpe:300", length=8)
    z = int(task.tokenizer.encode([b"z"])[0])
    assert len(task.tokenizer.encode([b"zzzzzzzz"])) == 8
    assert int(task.tokenizer.token_bytes[z]) == 1


def test_sample_is_safe_on_a_terminal(tmp_path):
    (tmp_path / "a.txt").write_text("\x1b[31mred\x07 [bold] " * 100)
    assert "\x1b" not in create_task("text", data=tmp_path / "a.txt", length=16).describe()


def test_folder_says_what_it_did_not_read(corpus):
    (corpus / "picture.png").write_bytes(b"\0\1")
    (corpus / "empty.txt").write_text(" \n")
    (corpus / ".hidden.txt").write_text("hidden")
    told = create_task("text", data=corpus, length=16).describe()
    assert "1 files with other suffixes not read (.png: 1)" in told
    assert "1 empty files left out" in told
    assert "20 files" not in told


def test_a_folder_without_a_known_suffix_is_read_by_its_contents(corpus):
    for path in list(corpus.rglob("*.txt")):
        path.rename(path.with_suffix(".0" if path.name < "1" else ""))
    write(corpus / "picture", b"\xff\xd8" * 99)
    write(corpus / "late", b"a" * (1 << 16) + b"\xff")
    told = create_task("text", data=corpus, length=16)
    assert len(told.training_documents) + len(told.held_out_documents) == 20
    assert "corpus: no file has a suffix of text, so that all were read which are UTF-8 text" in told.describe()
    assert "corpus: 2 other files not read (no suffix: 2)" in told.describe()
    write(corpus / "one.txt", b"one " * 900)
    assert [d.name for d in create_task("text", data=corpus, length=16).training_documents] == ["one.txt"]


def test_what_a_folder_links_to_elsewhere_is_not_read(corpus):
    outside = corpus.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret " * 9)
    (corpus / "file.txt").symlink_to(outside / "secret.txt")
    (corpus / "folder").symlink_to(outside)
    (corpus / "inside.txt").symlink_to("part0/00.txt")
    task = create_task("text", data=corpus, length=16)
    assert not any(b"secret" in d.text for d in task.training_documents + task.held_out_documents)
    assert "corpus: 2 links that lead out of it not followed" in task.describe()
    assert "1 repeated documents left out" in task.describe()


def test_folders_may_be_deeper_than_the_stack(corpus):
    deep = corpus
    for _ in range(80):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "low.txt").write_text("low " * 99)
    before = sys.getrecursionlimit()
    frames = len(inspect.stack(0))
    try:
        sys.setrecursionlimit(frames + 60)
        paths, _ = walk(corpus)
    finally:
        sys.setrecursionlimit(before)
    assert len(paths) == 21


def test_names_of_files_are_told_in_text_that_can_be_stored(corpus):
    os.rename(corpus / "part0" / "00.txt", os.fsencode(corpus) + b"/\xff\x1b[2J.txt")
    task = create_task("text", data=corpus, validation=corpus / "part1", length=16)
    names = [document.name for document in task.training_documents]
    assert r"\udcff\x1b[2J.txt" in names
    "".join(names).encode()


def test_conversations_are_text(tmp_path):
    talks = []
    for i in range(9):
        parts = [{"type": "text", "text": words(30, i)}]
        talks.append([{"role": "user", "content": "how?"}, {"role": "tool", "content": None}])
        talks[-1].append({"role": "assistant", "content": parts})
        talks.append([{"from": "human", "value": "how?"}, {"from": "gpt", "value": words(30, 50 + i)}])
    path = write(tmp_path / "chats.jsonl", "\n".join(json.dumps({"n": 1, "messages": t}) for t in talks).encode())
    task = create_task("text", data=path, field="messages", length=16, held_out=0.5)
    told = {d.text.decode() for d in task.training_documents + task.held_out_documents}
    assert f"user: how?\nassistant: {words(30, 3)}\n" in told
    assert f"human: how?\ngpt: {words(30, 53)}\n" in told
    with pytest.raises(Unsupported, match="try field=messages"):
        create_task("text", data=path)
    with pytest.raises(Unsupported, match=r"line 1 has no text in the field .*none on this line"):
        create_task("text", data=write(path, b'{"a": [{"role": "user"}], "b": [1], "c": []}'), field="a")


WRONG = {
    "missing": (lambda t: t / "corpus.tx", "does not exist", "try ", "corpus.txt"),
    "missing folder": (lambda t: t / "corpora" / "deep" / "a.txt", "does not exist"),
    "empty": (lambda t: write(t / "e.txt", b""), "holds no text"),
    "blank": (lambda t: write(t / "e.txt", b" \n\n"), "holds no text"),
    "binary": (lambda t: write(t / "b.txt", b"ab\0cd"), "a zero byte at offset 2"),
    "latin": (
        lambda t: write(t / "l.txt", "caf\xe9 au lait".encode("latin-1")),
        "byte 0xe9 at offset 3",
        "iconv -f LATIN1",
    ),
    "utf-16": (lambda t: write(t / "u.txt", "hello".encode("utf-16")), "not UTF-8", "iconv -f UTF-16"),
    "empty folder": (lambda t: folder(t / "f"), "holds no text"),
    "folder of others": (lambda t: write(folder(t / "f") / "a.bin", b"x\0").parent, "other files: .bin: 1"),
    "binary in folder": (lambda t: write(folder(t / "f") / "a.txt", b"\0").parent, "a.txt, which is not UTF-8"),
    "number": (lambda t: 3, "data=3"),
    "no name": (lambda t: "", "data=''"),
    "nothing": (lambda t: [], "no data at all"),
    "device": (lambda t: pipe(t / "pipe"), "neither a file nor a folder"),
    "json": (lambda t: write(t / "j.jsonl", b'{"text": "a"}\n{oops\n'), "line 2 is not JSON"),
    "deep json": (lambda t: write(t / "j.jsonl", b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "too deep"),
    "json list": (lambda t: write(t / "j.jsonl", b"[1]\n"), "line 1 is not a JSON object"),
    "json surrogate": (lambda t: write(t / "j.jsonl", b'{"text": "\\ud800"}\n'), "surrogate"),
    "short": (lambda t: write(t / "s.txt", b"word " * 40), "try length=", "held-out tokens"),
    "one byte": (lambda t: write(t / "s.txt", b"a"), "supported: more text"),
}


def write(path, content):
    path.write_bytes(content)
    return path


def folder(path):
    path.mkdir()
    return path


def pipe(path):
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("case", WRONG)
def test_unusable_data_is_refused_with_what_is_wrong(case, tmp_path):
    make, *told = WRONG[case]
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(Unsupported) as error:
        create_task("text", data=make(tmp_path))
    assert all(part in str(error.value) for part in told), str(error.value)


def test_the_length_that_is_named_as_nearest_fits(tmp_path):
    path = write(tmp_path / "s.txt", b"word word\n" * 50)
    with pytest.raises(Unsupported) as error:
        create_task("text", data=path)
    largest = int(error.value.nearest.removeprefix("length="))
    assert len(list(create_task("text", data=path, length=largest).evaluation_batches(4))) == 1
    create_task("text", data=path, length=largest).training_batch(0, 0, 4)
    with pytest.raises(Unsupported):
        create_task("text", data=path, length=largest + 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokenizer": "byte"}, "try bytes"),
        ({"tokenizer": "bpe"}, "try bpe:4096"),
        ({"tokenizer": "bpe:100"}, "try the size of tokenizer bpe=257"),
        ({"tokenizer": "bpe:-5"}, "bpe:SIZE"),
        ({"tokenizer": "none.json"}, "does not exist"),
        ({"length": 0}, "try length=1"),
        ({"held_out": 0.9}, "from 0.01 to 0.5"),
        ({"field": ""}, "field of JSON lines"),
        ({"evaluation_windows": 3}, "try evaluation_items"),
    ],
)
def test_nonsense_options_are_refused(corpus, options, told):
    with pytest.raises(Unsupported) as error:
        create_task("text", data=corpus, **options)
    assert told in str(error.value)


def test_tokenizers_that_hide_bytes_are_refused(corpus, tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    for i, (normaliser, prefix) in enumerate([(normalizers.Lowercase(), False), (None, True), (None, None)]):
        tokenizer = Tokenizer(models.BPE(unk_token="?"))
        if normaliser:
            tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normaliser])
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Whitespace() if prefix is None else pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        )
        tokenizer.train_from_iterator(["some text"], trainers.BpeTrainer(special_tokens=["?"], show_progress=False))
        tokenizer.save(str(tmp_path / f"{i}.json"))
        with pytest.raises(Unsupported, match="countable number of bytes"):
            create_task("text", data=corpus, length=16, tokenizer=str(tmp_path / f"{i}.json"))
    write(tmp_path / "broken.json", b"{}")
    with pytest.raises(Unsupported, match="cannot be loaded"):
        create_task("text", data=corpus, length=16, tokenizer=str(tmp_path / "broken.json"))
