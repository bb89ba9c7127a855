"""`regard compress`: recipes measured on a model, the one model that results, and its use."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil

import pytest
import torch
from byte_tokenizer import save_byte_tokenizer
from command_line import answer, run

from regard.backends.native import library
from regard.cli.console import console
from regard.compression import compress, text_windows
from regard.compression.recipes import read_recipes
from regard.compression.sparse import at_compression, sparsely, written
from regard.compression.tokens.applied import InTurn
from regard.contract import Unsupported
from regard.measurement.budget import Budget
from regard.workbench.lighter import evaluated
from regard.workbench.lighter import study as studies
from regard.workbench.lighter.report import cells
from regard.workbench.lighter.study import Row, Study, caution, loss_of, recommend, study
from regard.workbench.lighter.subjects import open_subject
from regard.workbench.lighter.subjects.language import CausalModel, perplexity

TEXT = "the quick brown fox jumps over the lazy dog and runs\n" * 400


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(studies, "MOST_ITEMS", 3)
    monkeypatch.setattr(studies, "MOST_CALIBRATION", 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A regard language model in its folder, and its text."""
    place = tmp_path_factory.mktemp("trained")
    (place / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["regard"])
        from regard.tasks import create_task
        from regard.workbench.comparison.settings import CompareSettings
        from regard.workbench.trained.run import train_model

        task = create_task("text", data=str(place / "text.txt"), length=32)
        sizes = {"dim": 32, "layers": 2, "heads": 2, "seeds": 1, "rates": (1e-2,), "lengths": (32,), "batch_tokens": 64}
        settings = CompareSettings(mechanisms=("softmax",), budget=Budget.parse("20 steps"), frames=("bare",), **sizes)
        train_model(task, settings, place / "model")
    return place / "model", place / "text.txt"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A causal transformers language model in its folder, and a text."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("causal")
    save_byte_tokenizer(place / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=256, num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=None, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    (place / "text.txt").write_text(TEXT)
    return place / "model", place / "text.txt"


def test_a_study_measures_every_recipe_and_goes_on_where_it_was_stopped(trained, tmp_path, monkeypatch):
    subject = open_subject(trained[0], None, None)
    recipes = read_recipes("int8,gptq,int4")
    done = []

    def stop(doing, index, count):
        done.append(doing)
        if doing == "int4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(subject, recipes, tmp_path, Budget.parse("1h"), on_progress=stop)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2
    done.clear()
    found = study(subject, recipes, tmp_path, Budget.parse("1h"), on_progress=lambda doing, *_: done.append(doing))
    assert not any(doing.startswith(("int8", "gptq", "the original")) for doing in done)
    assert [row.recipe for row in found.rows] == ["int8", "gptq", "int4"] and not found.refused
    expected = subject.quality(subject.load(), found.items)
    assert found.original.quality == expected and found.original.speedup == {"decode": 1.0, "prefill": 1.0}
    for row in found.rows:
        assert row.bytes < found.original.bytes / 2 and row.loss == loss_of(
            row.quality, expected, higher_is_better=False
        )
        assert set(row.speedup) == {"decode", "prefill"} and all(value > 0 for value in row.speedup.values())


def test_recipes_that_change_no_weights_need_no_linear_layers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    save_byte_tokenizer(tmp_path / "model")
    config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    subject, load = CausalModel(tmp_path / "model", [str(tmp_path / "text.txt")], 32), CausalModel.load
    tokens = "tokens:method=snapkv,capacity=8"
    found = study(subject, read_recipes(f"int8,{tokens}"), tmp_path / "gpt2", Budget.parse("1h"))
    assert [row.recipe for row in found.rows] == ["int8", tokens] and found.rows[0].layers == 6

    def without_linear_layers(subject):
        model = load(subject)
        for module in model.transformer.modules():
            module.register_forward_hook(lambda *given: None)
        return model

    monkeypatch.setattr(CausalModel, "load", without_linear_layers)
    found = study(subject, read_recipes(f"int8,{tokens}"), tmp_path / "hooks", Budget.parse("1h"))
    assert [row.recipe for row in found.rows] == [tokens] and "without linear layers" in found.refused["int8"]
    with pytest.raises(Unsupported, match="without linear layers"):
        study(subject, read_recipes("int8,wanda"), tmp_path / "hooks", Budget.parse("1h"))


def test_recipes_that_the_budget_has_no_time_for_are_named(trained, tmp_path):
    found = study(open_subject(trained[0], None, None), read_recipes("int8"), tmp_path, Budget("seconds", 1e-6))
    assert found.rows == [] and "budget" in found.refused["int8"]
    assert recommend(found)[0] is None


def test_a_study_knows_its_data_again_and_keeps_no_refusals(causal, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:4000])
    recipes = read_recipes("int8,gptq")
    budget = Budget.parse("1h")

    def refuse(*given, **told):
        raise Unsupported("this recipe")

    with monkeypatch.context() as patch:
        patch.setattr(studies, "compress", refuse)
        found = study(CausalModel(causal[0], [str(text)], 64), recipes, tmp_path / "out", budget)
    assert list(found.refused) == ["int8", "gptq"]
    found = study(CausalModel(causal[0], [str(text)], 64), recipes, tmp_path / "out", budget)
    assert [row.recipe for row in found.rows] == ["int8", "gptq"] and not found.refused
    for changed in (TEXT[:3990] + TEXT[:10], "b" + TEXT[1:4000]):
        text.write_text(changed)
        with pytest.raises(Unsupported, match="other data"):
            study(CausalModel(causal[0], [str(text)], 64), recipes, tmp_path / "out", budget)


def row(recipe: str, quality: float, size: int, speed: float) -> Row:
    return Row(recipe, quality, quality / 10 - 1, size, {"decode": 1 / speed}, {"decode": speed}, 1.0, {}, 3)


@pytest.mark.parametrize(
    ("rows", "chosen", "words"),
    [
        (
            [row("a", 10.05, 250, 2.0), row("b", 10.09, 125, 3.0), row("c", 10.5, 100, 9.0)],
            "b",
            "8 times smaller and 3 times faster",
        ),
        (
            [row("a", 10.05, 250, 0.5), row("b", 10.0, 300, 0.9)],
            "a",
            "where size matters: 4 times smaller, but 2 times slower",
        ),
        ([row("a", 10.05, 250, 1.03)], "a", "4 times smaller, but no faster .* 10.05 perplexity against 10 "),
        ([row("a", 10.2, 250, 2.0), row("b", 11.0, 125, 3.0)], None, "Keep the original.*a loses least"),
    ],
)
def test_the_fastest_is_recommended_of_those_that_lose_little(rows, chosen, words):
    found = Study("x", "perplexity", False, 3, 3, row("original", 10.0, 1000, 1.0), rows, {}, None, 1)
    best, sentence = recommend(found, 0.01)
    assert best == chosen and re.search(words, sentence)
    assert not caution(found, 0.01), "perplexity is no count of items"


def test_times_in_the_table_are_those_of_the_ratios_and_no_loss_is_below_zero_by_rounding():
    slowed = Row("a", 10.0, -1e-6, 250, {"decode": 3.0}, {"decode": 2.0}, 1.0, {}, 3)  # the original took 6
    found = Study("x", "perplexity", False, 3, 3, row("original", 10.0, 1000, 1.0), [slowed], {}, None, 1)
    assert cells(found, slowed)[2:] == ["0.00%", "250 B, 4.00x", "500 µs, 2.00x"]


@pytest.mark.parametrize(("items", "careful"), [(30, True), (300, False)])
def test_scores_of_few_items_come_with_a_caution(items, careful):
    found = Study("x", "accuracy", True, items, 3, row("original", 0.5, 1000, 1.0), [], {}, None, 1)
    assert caution(found, 0.01) == "" or careful
    assert ("a single one is worth 6.7% of the accuracy" in caution(found, 0.01)) == careful


def test_what_is_lost_is_counted_in_the_direction_of_the_metric():
    assert loss_of(11.0, 10.0, higher_is_better=False) == pytest.approx(0.1)
    assert loss_of(0.9, 1.0, higher_is_better=True) == pytest.approx(0.1)


def test_a_model_of_regard_train_is_compressed_and_used_on_the_command_line(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)  # otherwise names wrap if times have many digits
    model, _ = trained
    found = answer(capsys, "compress --recipe gptq:group=64 --calibration 4", model, "--output", tmp_path / "small")
    assert found["recipe"] == "gptq:group=64" and found["bytes_after"] < found["bytes_before"] / 2
    assert not (tmp_path / "small" / ".work").exists()
    scores = [answer(capsys, "evaluate", folder)["score"] for folder in (model, tmp_path / "small")]
    assert scores[0] != scores[1] and abs(scores[1] / scores[0] - 1) < 0.1
    assert answer(capsys, "generate --tokens 5", tmp_path / "small", "the")["text"]
    again = answer(capsys, "compress --recipe int8", model, "--output", tmp_path / "plain" / "small")
    assert again["bytes_after"] > found["bytes_after"]
    assert answer(capsys, "evaluate", tmp_path / "plain" / "small")["items"] > 0
    found = answer(capsys, "compress --recipes int8,awq --budget 1h", model, "--output", tmp_path / "study")
    page = (tmp_path / "study" / "report.html").read_text()
    assert found["recommendation"]["text"] in page.replace("&#34;", '"') and page.count('<svg class="chart"') == 3
    code, out, _ = run(capsys, "compress --recipes int8,awq --budget 1h", model, "--output", tmp_path / "study")
    assert code == 0 and "original" in out and "awq + int4" in out and "Report:" in out


def test_a_model_of_transformers_is_compressed_and_used_on_the_command_line(capsys, causal, tmp_path):
    model, text = causal
    found = answer(
        capsys,
        "compress --recipes int8,gptq --budget 1h --length 64",
        model,
        "--data",
        text,
        "--output",
        tmp_path / "study",
    )
    assert found["metric"] == "perplexity" and [one["recipe"] for one in found["rows"]] == ["int8", "gptq"]
    line = (
        f"compress {model} --recipes gptq --tolerance 9 --budget 1h --length 64 --data {text} --output {tmp_path}/study"
    )
    told = run(capsys, line)[1]
    assert f'--data {text} --length 64 --recipe "gptq" --output small/' in told, "the command needs the same data"
    assert (
        answer(capsys, "compress --recipe int8", model, "--output", tmp_path / "small")["layers"][-1]["name"]
        == "model.embed_tokens"
    )
    first, second = (answer(capsys, "generate --tokens 6", tmp_path / "small", "the quick")["text"] for _ in range(2))
    assert first == second != ""
    score = answer(capsys, "evaluate", tmp_path / "small", text)
    assert score["loss"] == pytest.approx(math.log(score["score"])) and set(score["milliseconds"]) == {
        "decode",
        "prefill",
    }
    assert score["metric"] == "perplexity" and abs(score["score"] / found["original"]["quality"] - 1) < 0.1
    original = answer(capsys, "evaluate", model, text)
    assert original["score"] != score["score"] and abs(original["score"] / score["score"] - 1) < 0.1


@pytest.mark.skipif(library.why_missing() is not None, reason="no native library")
def test_recipes_are_timed_as_the_commands_decode_with_all_layers_in_one_native_call(causal, monkeypatch):
    subject = CausalModel(causal[0], [str(causal[1])], 64)
    original, seen, call = subject.load(), [], library.call
    small = compress(copy.deepcopy(original), "int8").model
    monkeypatch.setattr(library, "call", lambda arguments: (seen.append(arguments.kernel), call(arguments)))
    for model in (original, small):
        decode = subject.timed(model)["decode"]
        seen.clear()
        decode()
        assert seen.count("decoder_layers") == 1 and "attention" not in " ".join(seen)


def test_times_are_those_of_the_device_that_is_asked_for(causal, monkeypatch):
    asked = []
    own = evaluated.interleaved
    monkeypatch.setattr(evaluated, "TIMING_SECONDS", 0.01)
    monkeypatch.setattr(evaluated, "interleaved", lambda *given, **told: asked.append(told) or own(*given, **told))
    evaluated.evaluate(causal[0], str(causal[1]), device="cpu:0")
    assert [told["device"] for told in asked] == [torch.device("cpu:0")]


def test_a_compressed_model_of_transformers_is_itself_wherever_models_are_read(capsys, trained, causal, tmp_path):
    pytest.importorskip("starlette")
    from regard.compression import load_compressed
    from regard.serving.engine import Engine, Request
    from regard.serving.opened import open_model
    from regard.workbench.sparse.readers import open_reader

    answer(capsys, "compress --recipe int8", causal[0], "--output", tmp_path / "small")
    model = load_compressed(tmp_path / "small")
    prompt = torch.randint(256, (1, 9))
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    opened = open_model(tmp_path / "small", rows=2, context=64)
    assert opened.described == "LlamaForCausalLM of transformers, compressed by int8"
    engine = Engine(opened.reader)
    engine.submit(Request("a", prompt[0].tolist(), 6))
    assert [event.token for _ in range(9) for event in engine.step() if event.token is not None] == expected
    logits, _ = open_reader(tmp_path / "small").step(prompt, None)
    torch.testing.assert_close(logits, model(prompt).logits[0, -1])
    with pytest.raises(Unsupported, match="bfloat16"):
        open_model(tmp_path / "small", dtype=torch.bfloat16)
    code, _, said = run(
        capsys, "retrofit --mechanism linear --output", tmp_path / "out", tmp_path / "small", "--data", causal[1]
    )
    assert code == 2 and "which is compressed" in said
    code, _, said = run(capsys, "compress --recipe int8", trained[0], "--output", tmp_path / "small")
    assert code == 2 and "another library" in said


@pytest.mark.parametrize("kind", ["trained", "causal"])
@pytest.mark.parametrize(
    ("step", "cache"),
    [
        ("tokens:capacity=12", written(at_compression("snapkv", 2, 24))),
        ("tokens:method=int8,block=8,window=4", "int8:block=8,window=4"),
        ("tokens:budget=8,page=4,share=false", "quest:budget=8,page=4,share=False"),
    ],
)
def test_the_cache_of_a_recipe_is_that_of_text_that_is_written_and_served(kind, step, cache, capsys, request, tmp_path):
    pytest.importorskip("starlette")
    from regard.cli.generate import _opened, _read
    from regard.serving.engine import Engine, Limits, Request
    from regard.serving.opened import open_model

    original, _ = request.getfixturevalue(kind)
    for name, recipe in (("plain", "int8"), ("small", f"int8 + {step}")):
        answer(capsys, "compress --output", tmp_path / name, "--recipe", recipe, original)
    line, prompt = "generate --temperature 0 --tokens 9", TEXT[:70]
    expected = answer(capsys, f"{line} --cache {cache}", tmp_path / "plain", prompt)["text"]
    assert answer(capsys, line, tmp_path / "small", prompt)["text"] == expected
    model, tokenizer = _opened(tmp_path / "small", "cpu")
    ids = _read(model, tokenizer, prompt, "cpu")[0].tolist()
    engine = Engine(open_model(tmp_path / "small", rows=2, context=200).reader, Limits(chunk=16))
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for key in tokens:  # beside each other, with a prompt that could be shared
        engine.submit(Request(key, ids, 9))
    while engine.busy:
        for event in engine.step():
            tokens[event.key].append(event.token)
    assert tokenizer.decode(tokens["a"]) == tokenizer.decode(tokens["b"]) == expected
    for refused in (f"{line} --cache quest", f"{line} --draft lookup", "sparse --lengths 16"):
        code, out, said = run(capsys, refused, tmp_path / "small", *([prompt] if "generate" in refused else []))
        assert (code, out) == (2, "") and f"whose recipe (int8 + {step}) has a step tokens" in said
        assert 'try regard compress ORIGINAL --recipe "int8" --output FOLDER' in said


def test_recipes_for_the_cache_are_compared_by_what_is_decoded_through_it(causal, tmp_path):
    subject = open_subject(causal[0], [str(causal[1])], 64)
    methods = ("int8:block=8,window=4", "quest:budget=4,page=4")
    recipes = read_recipes("tokens:method=int8,block=8,window=4,tokens:method=quest,budget=4,page=4")
    found = study(subject, recipes, tmp_path, Budget.parse("1h"))
    for row, method in zip(found.rows, methods, strict=True):
        with sparsely(subject.load(), method) as sparse:
            expected = perplexity(InTurn(sparse.model), text_windows(subject.held_out, 64, found.items))
        assert row.quality == pytest.approx(expected, rel=1e-6) != found.original.quality


def test_a_table_of_positions_is_not_read_beyond_its_end(capsys, causal, tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for file in causal[0].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert answer(capsys, f"generate {tmp_path} the --tokens 2 --temperature 0")["text"] is not None
    code, out, said = run(capsys, f"generate {tmp_path} the --tokens 30")
    assert (code, out) == (2, "") and "of a GPT2LMHeadModel; supported: as many as it has positions, 8" in said


def test_windows_are_not_longer_than_a_table_of_positions(capsys, causal, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(studies, "TIMING_SECONDS", 0.1)
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=24, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    save_byte_tokenizer(tmp_path / "opt")
    line = f"compress {tmp_path}/opt --data {causal[1]}"
    found = answer(capsys, f"{line} --recipe gptq --output {tmp_path}/small")
    assert found["bytes_after"] < found["bytes_before"]
    found = answer(capsys, f"{line} --recipes int8 --budget 1h --output {tmp_path}/study")
    assert "windows of 24)" in found["described"] and set(found["rows"][0]["speedup"]) == {"decode", "prefill"}
    code, out, said = run(capsys, f"{line} --recipe gptq --length 25 --output {tmp_path}/other")
    assert (code, out) == (2, "") and "length=25 of a model of 24 positions" in " ".join(said.split())
    assert answer(capsys, "evaluate", tmp_path / "small", causal[1])["score"] > 0


def test_a_shortened_text_keeps_one_start_token_which_is_not_shown(capsys, causal, tmp_path, monkeypatch):
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from regard.cli import generate

    tokenizer = PreTrainedTokenizerFast.from_pretrained(causal[0])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(causal[0])
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "model")
    seen, stream = [], generate._stream
    monkeypatch.setattr(generate, "_stream", lambda *given: seen.append(given[1]) or stream(*given))
    for more in ("", f"--shorten-by {tmp_path}/model"):
        found = answer(capsys, f"generate {tmp_path}/model --tokens 3 --shorten 0.5 {more}", "the quick brown fox")
        ids = seen.pop()[0].tolist()
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert found["shortened"] == {"tokens": 20, "kept": 10} and len(found["prompt"]) == len(ids) - 1 == 9
        assert "<s>" not in found["prompt"]


def test_drafts_have_the_tokens_and_the_positions(capsys, causal, tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    for name in ("short", "other"):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        save_byte_tokenizer(tmp_path / name)
    line = f"generate {causal[0]} the --temperature 0"
    alone = answer(capsys, f"{line} --tokens 8")["text"]
    assert answer(capsys, f"{line} --tokens 8 --draft {tmp_path}/short")["text"] == alone
    code, out, said = run(capsys, f"{line} --tokens 30 --draft {tmp_path}/short")
    assert (code, out) == (2, "") and "of a GPT2LMHeadModel; supported: as many as it has positions, 16" in said
    file = tmp_path / "other" / "tokenizer.json"
    own = json.loads(file.read_text())
    own["model"]["vocab"]["a"], own["model"]["vocab"]["b"] = own["model"]["vocab"]["b"], own["model"]["vocab"]["a"]
    file.write_text(json.dumps(own))
    code, out, said = run(capsys, f"{line} --tokens 8 --draft {tmp_path}/other")
    assert (code, out) == (2, "") and "with other tokens than the model" in " ".join(said.split())


def test_texts_are_not_shortened_by_a_model_that_drops_tokens(capsys, causal, tmp_path):
    line = (
        f'compress --length 64 --recipe "tokens:capacity=20" --data {causal[1]} {causal[0]} --output {tmp_path}/fewer'
    )
    answer(capsys, line)
    code, out, said = run(capsys, f"generate {tmp_path}/fewer --tokens 3 --shorten 0.5 'the quick brown fox'")
    assert (code, out) == (2, "") and "shortening a text with a LlamaForCausalLM" in " ".join(said.split())


def test_files_that_lack_weights_of_the_model_are_refused(capsys, causal, tmp_path):
    from safetensors.torch import load_file, save_file

    place = tmp_path / "model"
    shutil.copytree(causal[0], place)
    weights = load_file(place / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    for command in (
        "generate {} the",
        "serve {} --port 0",
        "compress {} --recipe int8 --output {}/out",
        f"evaluate {{}} {text}",
    ):
        code, out, said = run(capsys, command.replace("{}", str(place)))
        assert (code, out) == (2, "") and "lacks 1 weights of a LlamaForCausalLM" in said, command
    assert not (place / "out").exists()
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-100])
    code, _, said = run(capsys, f"generate {place} the")
    assert code == 2 and "transformers cannot load" in said and said.count("\n") == 1


def test_weights_in_pickles_are_not_read(capsys, causal, tmp_path):
    from safetensors.torch import load_file

    shutil.copytree(causal[0], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    code, out, said = run(capsys, f"compress {tmp_path}/model --recipe int8 --output {tmp_path}/out")
    assert (code, out) == (2, "") and "no file named model.safetensors" in said and not (tmp_path / "out").exists()


def test_a_save_that_was_stopped_is_told_and_begun_again(capsys, trained, tmp_path, monkeypatch):
    def stop(*_, **__):
        (tmp_path / "small" / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    line = f"compress {trained[0]} --recipe int8 --output {tmp_path}/small"
    with monkeypatch.context() as patch:
        patch.setattr("regard.compression.folders.save_pretrained", stop)
        assert run(capsys, line)[0] not in (0, 2)
    code, out, said = run(capsys, f"evaluate {tmp_path}/small")
    assert (code, out) == (2, "") and said.count("regard: ") == 1
    assert answer(capsys, line)["recipe"] == "int8" and not (tmp_path / "small" / ".work").exists()
    assert answer(capsys, f"evaluate {tmp_path}/small")["items"] > 0


def test_models_lose_parts_on_the_command_line_and_go_on_working(capsys, trained, causal, tmp_path):
    model, _ = trained
    found = answer(capsys, 'compress --recipe "axformer:groups=2,hard=4"', model, "--output", tmp_path / "small")
    assert "evaluations" in found["notes"][0] and not (tmp_path / "small" / ".work").exists()
    assert answer(capsys, "evaluate", tmp_path / "small")["items"] > 0
    assert answer(capsys, "generate --tokens 5", tmp_path / "small", "the")["text"]
    other, text = causal
    parts = "structured:neurons=0.5,layers=1"
    line = f'compress --length 64 --recipe "{parts} + int8" --data'
    found = answer(capsys, line, text, other, "--output", tmp_path / "other")
    assert any("all of it" in note for note in found["notes"])
    assert answer(capsys, "generate --tokens 6", tmp_path / "other", "the quick")["text"]
    line = f'compress --length 64 --budget 1h --recipes "{parts},wanda" --data'
    found = answer(capsys, line, text, other, "--output", tmp_path / "study")
    assert [row["recipe"] for row in found["rows"]] == [parts, "wanda"]
    assert found["rows"][0]["bytes"] < found["original"]["bytes"] == found["rows"][1]["bytes"]


def test_side_effects_of_a_recipe_are_beside_the_originals(capsys, trained, tmp_path):
    line = "compress --budget 1h --effects 1 --recipes int8"
    found = answer(capsys, line, trained[0], "--output", tmp_path / "study")["side_effects"]
    assert list(found) == ["original", "int8"] and len(found["int8"]["answers"]) == 1
    assert 0 <= found["original"]["repeated"] <= 1
    assert "Side effects" in (tmp_path / "study" / "report.html").read_text()
    line = "compress --effects 1 --recipe int8"
    assert answer(capsys, line, trained[0], "--output", tmp_path / "small")["side_effects"] == found


def test_a_search_goes_by_items_that_the_score_leaves_out(trained):
    (searching,) = read_recipes("axformer")
    plain, subject = (open_subject(trained[0], None, None, recipes) for recipes in ([], [searching]))
    chosen = sum(batch.size for batch in subject.choosing())
    assert subject.first >= chosen > 0 and subject.items + subject.first == plain.items + plain.first
    every = [batch.inputs for batch in subject.task.evaluation_batches(subject.batch_size)]
    scored = torch.cat(every)[subject.first :]
    assert len(scored) == subject.items and torch.equal(
        torch.cat([batch.inputs for batch in subject.choosing()]), torch.cat(every)[:chosen]
    )


def test_bad_requests_are_one_sentence_and_write_nothing(capsys, trained, causal, tmp_path):
    model, text = trained
    other, out = causal[0], tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for line, more, words in (
        ("compress --recipe int8 --recipes all", (model,), "both --recipe"),
        ("compress --recipe int8", (model,), "--output small/"),
        ("compress --recipes int8 --calibration 4", (model, "--output", out), "--calibration without --recipe"),
        ("compress --recipe int8", (model, "--output", model), "the model itself"),
        ("compress --recipe int8", (model, "--output", tmp_path / "full"), "other files in it"),
        ('compress --recipe "axformer:focus=small"', (model, "--output", out), "focus"),
        ('compress --recipe "structured:layers=9"', (model, "--output", out), "fewer than 2 layers"),
        ("compress --recipe int9", (model, "--output", out), "try int"),
        ("compress --recipes all --budget soon", (model, "--output", out), "budget"),
        ('compress --recipes all --budget "5 steps"', (model, "--output", out), "a time"),
        ("compress --recipe int8", (tmp_path / "nothing", "--output", out), "does not exist"),
        ("compress --recipe int8", (tmp_path / "full", "--output", out), "neither config.json"),
        ("compress --recipe gptq", (other, "--output", out), "without a text"),
        ("compress --recipe gptq --length 12000", (other, "--data", text, "--output", out), "--length"),
        ("compress --recipe gptq --length 64", (model, "--output", out), "the length of its task"),
        ("generate", (tmp_path / "full", ""), "an empty text"),
    ):
        code, _, messages = run(capsys, line, *more)
        said = " ".join(messages.split())
        assert code == 2 and words in said and said.count("regard: ") == 1, (line, messages)
    assert not out.exists() and torch.is_grad_enabled()
