"""`regard retrofit` and `regard report` on a folder with a tokenizer and files of text."""

from __future__ import annotations

import json

import pytest
from command_line import answer, run
from small_llama import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from regard import Unsupported
from regard.retrofit import RetrofitSettings, open_host
from regard.tasks.documents import Document, read_documents

WORDS = ["<end>", "<unknown>", *(f"{a}{b}" for a in "bdfgklm" for b in "aeiou")]
SMALL = "--mechanism local:window=8 --keep-layers 1 --budget '30 steps' --length 32 --batch-size 1 --lengths 64"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer and two texts."""
    place = tmp_path_factory.mktemp("place")
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>").save_pretrained(
        place / "model"
    )
    llama(2).save_pretrained(place / "model")
    for name, step in (("one.txt", 3), ("other.txt", 5)):
        (place / name).write_text(" ".join(WORDS[2 + (step * at * at) % 35] for at in range(1500)))
    return place


def test_a_folder_becomes_a_hybrid_with_a_page(capsys, place):
    line = (
        f"retrofit {place}/model {SMALL} --data {place}/one.txt --validation {place}/other.txt --output {place}/hybrid"
    )
    found = answer(capsys, line)
    assert found["swapped"] == [0] and found["kept"] == [1]
    assert list(found["results"]["perplexity"]) == ["one.txt, held out", "other.txt, another source"]
    page = (place / "hybrid" / "report.html").read_text()
    assert found["recommendation"]["text"] in page.replace("&#39;", "'")
    assert page.count("<svg") == 7
    assert "sensitivity" not in page.split("Where it comes from")[0]  # it was not measured
    assert found["results"]["generates_with_cache"] and "generate does not continue" not in page
    assert AutoTokenizer.from_pretrained(place / "hybrid").encode("ba de") == [WORDS.index("ba"), WORDS.index("de")]
    told = [answer(capsys, f"evaluate {place}/{name} {place}/other.txt") for name in ("hybrid", "model")]
    assert [one["metric"] for one in told] == ["perplexity"] * 2 and told[0]["score"] != told[1]["score"]
    assert all(1 < one["score"] < 1e4 and one["standard_error"] > 0 for one in told)
    assert run(capsys, f"evaluate {place}/hybrid")[0] == 2
    (place / "hybrid" / "report.html").unlink()
    code, _, _ = run(capsys, f"report {place}/hybrid")
    assert code == 0 and (place / "hybrid" / "report.html").read_text() == page
    code, told, _ = run(capsys, line)
    assert code == 0 and found["recommendation"]["text"] in " ".join(told.split())


def test_without_an_output_the_result_has_a_folder_of_its_own_in_runs(capsys, monkeypatch):
    def taken(model, mechanism, *, output, **_):
        raise Unsupported(str(output))

    monkeypatch.setattr("regard.retrofit.retrofit", taken)
    for model, folder in (("a/smollm2/", "smollm2"), ("b/tiny.gguf", "tiny"), ("timm:vit", "timm-vit")):
        code, _, message = run(capsys, f"retrofit {model} --mechanism local:window=8 --data one.txt")
        output = f"runs/{folder}-local-window=8"
        assert code == 2 and f"the result goes to {output}" in message and message.strip().endswith(f": {output}")


def test_text_that_is_not_given_is_that_of_the_standard_library(monkeypatch, place):
    documents = read_documents(str(place / "one.txt"), "text")[0]
    documents = [Document(str(part), documents[0].text[part:]) for part in range(20)]
    monkeypatch.setattr("regard.retrofit.corpus.read_standard_library", lambda: (documents, []))
    host = open_host(place / "model")
    read = host.read(None, None, host.begun(RetrofitSettings("linear", length=32, lengths=(32,))))
    assert read.name == "Python's standard library" and read.size > 1000


def test_bad_input_is_one_sentence_and_leaves_nothing(capsys, place):
    line = f"retrofit {place}/model {SMALL} --data {place}/one.txt --output {place}/bad"
    code, out, message = run(capsys, f"{line} --keep-layers 0,9")
    assert (code, out) == (2, "")
    assert message == ("regard: not supported: layer 9 of a model of 2 layers; supported: layers from 0 to 1\n")
    assert not (place / "bad").exists()
    record = json.loads((place / "model" / "config.json").read_text())
    assert "regard" not in record
