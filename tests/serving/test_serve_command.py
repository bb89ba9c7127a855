"""`regard serve` on the command line: what cannot be served is refused in a sentence, and loads are measured and plotted."""

import json
import re
import socket

import pytest
import torch
from command_line import answer, run

import regard
from regard.backends.native import library
from regard.cli.serve import listen
from regard.contract import Unsupported
from regard.measurement import units
from regard.models import LanguageModel, LanguageModelConfig, save_pretrained
from regard.serving.engine import Engine, Request, Row
from regard.serving.language import LanguageReader
from regard.serving.opened import open_model

pytest.importorskip("uvicorn")

from regard.serving.app import Server
from regard.serving.run import Running
from regard.serving.service import Service


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(LanguageModel(LanguageModelConfig(256, dim=8, plan=["linear", "softmax"], num_heads=1)), folder)
    record = {"state": "finished", "mechanism": "linear+softmax", "layers": [], "tokenizer": "bytes"}
    record["settings"] = {"length": 32}
    (folder / "training.json").write_text(json.dumps(record | {"task": {"name": "text", "options": {}}}))
    return folder


def test_a_folder_of_train_is_opened_with_its_text(trained):
    opened = open_model(trained, rows=2, context=64)
    assert opened.name == "tiny" and opened.described.startswith("linear+softmax") and opened.reader.context == 64
    assert opened.described.endswith("trained on 32 tokens at a time")
    assert "trained on" not in open_model(trained, rows=2, context=32).described
    assert opened.text.decode(opened.text.encode("aé")) == "aé"


@pytest.mark.skipif(library.why_missing() is not None, reason="few rows are in bfloat16 without the native library")
def test_a_compressed_model_is_served_as_it_computes_alone_whatever_else_is_in_the_batch(tmp_path, trained):
    model = LanguageModel(LanguageModelConfig(256, dim=32, plan=["gated_linear", "softmax"], num_heads=2)).eval()
    regard.compress(model, "int8", []).save(tmp_path)
    (tmp_path / "training.json").write_text((trained / "training.json").read_text())
    opened = open_model(tmp_path, rows=32, context=64)
    assert "compressed by int8" in opened.described
    prompts = [torch.randint(256, (9,)).tolist() for _ in range(6)]
    rows = [Row(Request(str(i), prompt, 1), i, prompt, None, pages=[i]) for i, prompt in enumerate(prompts)]
    alone = [model(torch.tensor([prompt])).output[:, -1].detach() for prompt in prompts]
    for some in ([0], range(6)):  # few tokens multiply the codes, many a dequantized copy
        read = opened.reader.read([rows[i] for i in some], [prompts[i] for i in some])
        wanted = torch.cat([alone[i] for i in some])
        assert float((read - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    with pytest.raises(Unsupported, match="compressed model in bfloat16"):
        open_model(tmp_path, dtype=torch.bfloat16)


def test_what_cannot_be_served_is_said_before_anything_starts(capsys, tmp_path, trained):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "bare").mkdir()
    save_pretrained(LanguageModel(LanguageModelConfig(9, dim=8, plan=["linear"], num_heads=1)), tmp_path / "bare")
    template = tmp_path / "template.txt"
    template.write_text("{% for %}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in {
            "": "no model to serve",
            f"{tmp_path}/nothing": "does not exist",
            f"{tmp_path}": "holds no model",
            f"{tmp_path}/other": "the model in",
            f"{tmp_path}/bare": "without its tokenizer",
            f"{trained} --port {port}": f"try --port {port + 1}",
            f"{trained} --host 192.0.2.1": "try --host 127.0.0.1",
            f"{trained} --url http://a": "one of them",
            f"{trained} --chat-template {template}": "cannot be read",
            f"{trained} --chat-template {tmp_path}/none": "chat template",
            f"{trained} --rows 0": "rows >= 1",
            f"{trained} --timeout 0": "seconds >= 0.001",
            f"{trained} --dtype int8": "float32, bfloat16",
            f"{trained} --bench --clients none": "whole numbers",
            f"{trained} --bench --output {template}/load": "is a file",
            f"{trained} --bench --shared-tokens 9 --prompt-tokens 3": "0 to 3",
            "--url http://127.0.0.1:1 --bench": "no server tells",
            "--url nowhere --bench": "http://HOST:PORT",
            "--url http://127.0.0.1:1": "try --bench",
            f"{trained} --output {tmp_path}": "--output without --bench",
        }.items():
            code, out, errors = run(capsys, f"serve --port 0 {words}")
            assert code == 2 and out == "" and message in errors and errors.count("\n") == 1, (words, errors)


def test_a_model_of_another_kind_is_refused(tmp_path, trained):
    from regard.models import Encoder, EncoderConfig

    save_pretrained(Encoder(EncoderConfig(num_classes=2, vocab_size=9, dim=8, plan=["softmax"], num_heads=1)), tmp_path)
    (tmp_path / "training.json").write_text((trained / "training.json").read_text())
    with pytest.raises(Unsupported, match="answers from an Encoder"):
        open_model(tmp_path)


def test_a_server_says_where_it_is_when_clients_may_come(capsys, trained, monkeypatch):
    served = []

    def run_(server, listening, drain):
        socket.create_connection(listening.getsockname(), 1).close()
        served.append((server, drain))

    monkeypatch.setattr("regard.serving.run.run", run_)
    found = answer(capsys, f"serve {trained} --port 0 --name mine --drain 3 --context 99")
    assert found["url"].startswith("http://127.0.0.1:") and found["model"] == "mine" and found["context"] == 99
    assert served[0][0].name == "mine" and served[0][1] == 3
    code, out, messages = run(capsys, f"serve {trained} --port 0")
    assert code == 0 and out == "" and "/v1 · model tiny · linear+softmax" in messages


def test_a_load_is_measured_and_drawn(capsys, tmp_path, trained):
    words = "--bench --clients 1,3 --requests 1 --prompt-tokens 9 --new-tokens 4 --shared-tokens 5 --rows 2"
    found = answer(capsys, f"serve {trained} {words} --output", tmp_path / "load")
    assert [row["clients"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert row["answers"] == row["clients"] and row["errors"] == 0
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(4 * row["clients"])
        assert 0 < row["first_p50"] <= row["first_p99"] and 0 < row["between_p50"] <= row["between_p99"]
    page = (tmp_path / "load" / "load.html").read_text()
    assert found["picture"].endswith("load.html") and len(re.findall("<svg class=.chart", page)) == 3
    assert "--paper" in page and ".k7" in page and "tiny under load" in page
    for row in found["rows"]:
        assert f">{units.milliseconds(1e3 * row['first_p99'])}<" in page, "the page gives times in another unit"
    assert json.loads((tmp_path / "load" / "load.json").read_text())["rows"] == found["rows"]


def test_another_server_is_measured_with_tokens_that_it_knows_and_its_key(trained, capsys, monkeypatch):
    opened = open_model(trained, rows=2, context=64)
    server = Server(Service(Engine(opened.reader)), opened.text, "mine", key="secret")
    listening = listen("127.0.0.1", 0)
    line = f"serve --bench --url http://127.0.0.1:{listening.getsockname()[1]} --clients 2 --requests 2"
    line += " --prompt-tokens 40 --new-tokens 2"
    with Running(server, listening):
        code, _, errors = run(capsys, line)
        assert code == 2 and "without its key" in errors and "REGARD_API_KEY" in errors
        monkeypatch.setenv("REGARD_API_KEY", "secret")
        monkeypatch.setattr("regard.serving.bench.FOREIGN_TOKENS", range(256, 900))  # all unknown to the model
        (row,) = answer(capsys, line)["rows"]
    assert (row["answers"], row["errors"]) == (4, 0)


def test_a_load_is_measured_with_attention_in_another_process(capsys, trained):
    words = "--offload 1 --bench --clients 2 --requests 1 --prompt-tokens 9 --new-tokens 4"
    (row,) = answer(capsys, f"serve {trained} {words}")["rows"]
    assert row["answers"] == 2 and row["errors"] == 0
    code, _, messages = run(capsys, f"serve {trained} --offload -1")
    assert code == 2 and "--offload" in messages


def test_a_tokenizer_of_transformers_is_read_beside_its_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    from regard.tasks.tokenizer import BpeTokenizer

    BpeTokenizer.train([b"some text to learn from, some text"], 270).save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}",
            }
        )
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=270, num_key_value_heads=1, eos_token_id=7, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    opened = open_model(tmp_path, rows=1, context=50)
    assert opened.text.decode(opened.text.chat([{"role": "user", "content": "some text"}])) == "<some text>"
    assert opened.text.stop_tokens == {7} and opened.reader.vocab_size == 270
    from regard.integrations.transformers import RegardConfig, RegardForCausalLM

    with pytest.raises(Unsupported, match="offloaded attention of LlamaForCausalLM"):
        open_model(tmp_path, rows=1, offload=1)

    own = RegardForCausalLM(RegardConfig(270, dim=8, plan=["linear", "softmax"], num_heads=1))
    own.save_pretrained(tmp_path)
    opened = open_model(tmp_path, rows=1, context=50, dtype=torch.bfloat16)
    assert isinstance(opened.reader, LanguageReader)
    engine = Engine(opened.reader)
    engine.submit(Request("a", opened.text.encode("some text"), 3))
    assert len([event for _ in range(4) for event in engine.step() if event.token is not None]) == 3
    assert opened.reader._pools.layers[1][0].dtype == torch.bfloat16
