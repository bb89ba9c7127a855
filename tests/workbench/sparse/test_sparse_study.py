"""`regard sparse`: analyses, the hand-made model, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from byte_tokenizer import save_byte_tokenizer
from command_line import answer, run
from support import refused

from regard import Unsupported
from regard.compression.sparse.constructed import cost, retrieval
from regard.measurement.store import Store
from regard.models import LanguageModel, LanguageModelConfig, save_pretrained
from regard.tasks.long_context import create_long_task
from regard.tasks.tokenizer import ByteTokenizer
from regard.workbench.sparse import study as study_module
from regard.workbench.sparse import tiny
from regard.workbench.sparse.analysis import (
    Observation,
    Point,
    crossing_length,
    frontier,
    larger_and_sparse,
    loss_z,
    noticeable_loss,
    safe_compression,
    scaling_law,
)
from regard.workbench.sparse.constructed import isoflops
from regard.workbench.sparse.readers import OfRegard, OfTransformers


def test_a_compression_is_safe_while_no_smaller_one_loses():
    dense = [0.8, 1.0, 0.9, 1.0, 0.8, 0.9]
    bad = [0.1, 0.2, 0.0, 0.1, 0.3, 0.2]
    assert safe_compression(dense, {2: dense, 4: dense[::-1], 8: bad, 16: dense}) == 4
    assert safe_compression(dense, {2: bad, 4: dense}) == 1 and safe_compression(dense, {}) == 1
    # the definition, with unbiased variances
    m, n = sum(dense) / 6, sum(bad) / 6
    error = math.sqrt(sum((x - m) ** 2 for x in dense) / 5 / 6 + sum((x - n) ** 2 for x in bad) / 5 / 6)
    assert loss_z(dense, bad) == pytest.approx((m - n) / error)
    assert loss_z([1, 1], [1, 1]) == 0 and loss_z([1, 1], [0, 0]) == math.inf
    at_the_border = [x - noticeable_loss(dense) for x in dense]
    assert loss_z(dense, at_the_border) == pytest.approx(1.645)


def test_the_frontier_has_what_nothing_cheaper_beats():
    points = [Point(1, 1, cost, (score,)) for cost, score in ((1, 0.2), (2, 0.1), (3, 0.6), (3, 0.5), (4, 0.6))]
    assert [(p.cost, p.score) for p in frontier(points)] == [(1, 0.2), (3, 0.6)]


def test_larger_sparse_models_are_compared_at_the_cost_of_dense_ones():
    dense, dear, cheap = Point(1, 1, 10, (0.0, 0.2) * 9), Point(2, 4, 11, (1.0,) * 18), Point(2, 8, 9, (0.5, 0.6) * 9)
    assert larger_and_sparse([dense, dear, cheap]) == [(dense, cheap)]
    assert larger_and_sparse([dense, dear]) == [(dense, None)]
    assert crossing_length({256: [dense, dear], 512: [dense, cheap], 1024: [dense, cheap]}) == 512
    assert crossing_length({256: [dense, dear]}) is None


def test_a_law_that_holds_is_found_and_holds_beyond_what_it_was_fitted_to():
    def score(p, n, c):
        return math.exp(-2 + 0.1 * math.log(p) - 0.05 * math.log(n) - 0.2 * math.log(c))

    seen = [
        Observation(p, n, c, score(p, n, c)) for p in (1e6, 1e7, 1e8) for n in (256, 512, 1024) for c in (1, 2, 4, 8)
    ]
    law = scaling_law(seen)
    assert (law.constant, law.parameters, law.length, law.compression) == pytest.approx((-2, 0.1, -0.05, -0.2))
    assert law.held_out == pytest.approx({"parameters": 1, "length": 1, "compression": 1})
    assert law.predict(Observation(1e9, 4096, 16, 0)) == pytest.approx(score(1e9, 4096, 16))
    assert scaling_law(seen[:3]) is None


def test_made_by_hand_a_wide_sparse_layer_beats_a_narrow_dense_one_where_contexts_are_long():
    dense, sparse = retrieval(4096, 16, 1, 40, seed=1), retrieval(4096, 64, 16, 40, seed=1)
    assert cost(4096, 64, 16) < cost(4096, 16, 1)
    assert sum(dense) / 40 < 0.6 < 0.9 < sum(sparse) / 40
    # if a page's keys have nothing in common, its bounds say little
    assert sum(retrieval(4096, 64, 16, 40, seed=1, topics=False)) / 40 < 0.6
    found = isoflops((256,), 3, widths=(16, 32), ratios=(1, 4))
    assert [(p.size, p.ratio) for p in found[256]] == [(16, 1), (16, 4), (32, 1), (32, 4)]
    with pytest.raises(Unsupported, match="multiples"):
        retrieval(100, 16, 1, 1, 0)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A causal transformers language model in its folder, trained only to know one text by heart."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("causal")
    tokenizer = save_byte_tokenizer(place / "model")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=None, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    line = torch.tensor(tokenizer.encode("one and two and "))
    for _ in range(120):
        loss = model(line.repeat(1, 6), labels=line.repeat(1, 6)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place / "model")
    (place / "text.txt").write_text("one and two and " * 400)
    return place / "model", place / "text.txt"


def test_the_largest_safe_compression_is_recommended_and_of_methods_about_as_fast_the_better_one():
    def cell(method, ratio, scores, seconds):
        return study_module.Cell(method, ratio, "text", 64, "", scores, 0.0, 0.5, 1.0, 1.0, seconds, 1.0, 1.0, 1.0)

    def answered(*cells):
        dense = cell("dense", 1.0, (0.5, 0.6, 0.5, 0.6), 1.0)
        names = tuple(dict.fromkeys(x.method for x in cells))
        plan = study_module.Plan((64,), names, tasks=("text",))
        return study_module.recommend(study_module.Found("model", 1, plan, (dense, *cells)))[1]

    worse, better, bad = (0.5, 0.6, 0.5, 0.58), (0.5, 0.6, 0.5, 0.59), (0.0, 0.1, 0.0, 0.1)
    tova, h2o = cell("tova", 4.0, worse, 0.8), cell("h2o", 4.0, better, 0.82)
    assert "use h2o, safe up to 4x" in answered(tova, h2o)
    assert "use tova, safe up to 4x" in answered(tova, cell("h2o", 4.0, better, 0.9))
    assert "use snapkv, safe up to 8x" in answered(tova, h2o, cell("snapkv", 8.0, worse, 0.95))
    assert "use h2o, safe up to 4x" in answered(tova, h2o, cell("snapkv", 8.0, bad, 0.1))


def test_a_folder_is_asked_judged_and_reported_and_goes_on_where_it_was_stopped(causal, tmp_path, monkeypatch, capsys):
    folder, text = causal
    line = (
        "sparse --lengths 128 --methods snapkv,block_sparse,quest --ratios 2,4 --tasks text,ruler_niah --wording brief"
    )
    more = "--samples", 4, "--data", text, "--output", tmp_path, folder
    asked, original = [], study_module._asked

    def watched(reader, task, prepared, method, ratio, length):
        if len(asked) == 10:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append((method, ratio))
        return original(reader, task, prepared, method, ratio, length)

    monkeypatch.setattr(study_module, "_asked", watched)
    assert run(capsys, line, *more)[0] == 130
    found = answer(capsys, line, *more)
    # a niah sample does not fit into 128 bytes: this is reported, and the rest is asked once
    assert len(asked) == 1 + 4 * 7
    cells = {(c["method"], c["ratio"]): c for c in found["cells"]}
    assert len(cells) == 7 and all(c["samples"] == 4 for c in cells.values())
    dense = cells["dense", 1.0]
    assert dense["score"] > 0.9 and dense["prefill"] == dense["decode"] == 0
    assert cells["block_sparse", 4.0]["prefill"] > 0.6 and cells["block_sparse", 4.0]["decode"] == 0
    assert cells["snapkv", 4.0]["cache"] == pytest.approx(0.25, abs=0.1)
    assert cells["quest", 4.0]["token_bytes"] < dense["token_bytes"]
    errors = {(e["method"], e["ratio"]): e["error"] for e in found["attention_error"] if e["length"] == 128}
    assert set(errors) == set(cells) - {("dense", 1.0)}
    assert all(0 < errors[method, 2.0] < errors[method, 4.0] for method in ("snapkv", "block_sparse"))
    assert set(found["safe"]) == {"snapkv", "block_sparse", "quest"}
    assert "ruler_niah at 128" in found["refused"] and "At 128 tokens" in found["recommendation"]["text"]
    page = (tmp_path / "report.html").read_text()
    assert (
        "Safe compressions" in page
        and "Error of attention" in page
        and "<script" not in page
        and "block_sparse" in page
    )
    _, shown, _ = run(capsys, line, *more)
    assert "safe at 128" in shown and "Report" in shown and len(asked) == 29


def test_a_method_that_always_compresses_by_the_same_is_left_out_at_other_ratios(causal, tmp_path, capsys):
    folder, text = causal
    line = "sparse --lengths 64 --tasks text --samples 1 --methods"
    more = "--data", text, "--output", tmp_path, folder
    found = answer(capsys, f"{line} streaming,int8 --ratios 2,4", *more)
    asked = {(cell["method"], cell["ratio"]) for cell in found["cells"]}
    assert asked == {("dense", 1), ("streaming", 2), ("streaming", 4), ("int8", 4)}
    assert "int8 at 2x" in found["refused"]
    code, out, _ = run(capsys, f"{line} streaming,int8 --ratios 2", *more)
    assert code == 0 and "left out: int8 at 2x: it always compresses by the same" in " ".join(out.split())
    code, _, said = run(capsys, f"{line} int8 --ratios 2", *more)
    assert code == 2 and "which it always is" in said


def test_the_bytes_of_a_token_are_those_of_codes_where_the_model_or_its_cache_has_them(causal, tmp_path, capsys):
    folder, text = causal
    line = "sparse --lengths 128 --tasks text --samples 1 --methods int8 --ratios 4"
    assert run(capsys, f"compress --recipe int8 --output {tmp_path}/small", folder)[0] == 0
    found = {}
    for place in (folder, tmp_path / "small"):
        told = answer(capsys, line, "--data", text, "--output", tmp_path / f"{place.name}.out", place)
        found[place.name] = told["weights"], *(cell["token_bytes"] for cell in told["cells"])
    entries = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)  # of the layers
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
    weights = {"model": 4 * (entries + 256 * 32), "small": entries + 256 * 32 + 2 * (rows + 256)}
    for name, (count, dense, rounded) in found.items():
        assert count == entries + 256 * 32
        n = (dense - weights[name]) / (2 * 2 * 2 * 8 * 4)  # the tokens that it sees
        assert n == int(n) and n - 65 > 20  # those in codes
        steps = 2 * 2 * (n - 65 + 8) * 4
        assert rounded - weights[name] == 2 * 2 * 2 * 8 * (n - 65 + 4 * 65) + steps


def test_a_method_that_the_model_cannot_run_is_left_out_and_the_others_are_asked(tmp_path):
    config = LanguageModelConfig(vocab_size=256, dim=16, num_layers=1, num_heads=2, positions="learned", max_length=64)
    reader = OfRegard(LanguageModel(config).eval(), ByteTokenizer(), "small")
    (tmp_path / "text.txt").write_text("one and two and " * 40)
    sizes = {"ratios": (2.0,), "tasks": ("text",), "samples": 1, "data": tmp_path / "text.txt"}
    with Store(tmp_path / "store") as store:
        found = study_module.study(reader, study_module.Plan((64,), ("streaming", "tova"), **sizes), store)
        assert {cell.method for cell in found.cells} == {"dense", "tova"}
        assert "positions=text" in found.refused["streaming"]
        refused("positions=text", study_module.study, reader, study_module.Plan((64,), ("streaming",), **sizes), store)


@pytest.mark.parametrize("library", ["regard", "transformers"])
def test_a_task_whose_replies_go_beyond_a_table_of_positions_is_left_out(library, tmp_path):
    if library == "regard":
        sizes = {"vocab_size": 256, "dim": 16, "num_layers": 1, "num_heads": 2}
        config = LanguageModelConfig(**sizes, positions="learned", max_length=400)
        reader = OfRegard(LanguageModel(config).eval(), ByteTokenizer(), "small")
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=400)
        model = transformers.GPT2LMHeadModel(config).eval()
        reader = OfTransformers(model, save_byte_tokenizer(tmp_path / "tokens"), "small")
    (tmp_path / "text.txt").write_text("one and two and " * 60)
    asked = {"tasks": ("ruler_vt", "text"), "wording": "brief", "samples": 1, "data": tmp_path / "text.txt"}
    plan = study_module.Plan((320, 400), ("tova",), (2.0,), **asked, effects=1)
    with Store(tmp_path / "store") as store:
        found = study_module.study(reader, plan, store)
    assert {(cell.task, cell.length) for cell in found.cells} == {("ruler_vt", 320), ("text", 320), ("text", 400)}
    for what in ("ruler_vt at 400", "side effects"):
        assert "prompt and reply together" in found.refused[what]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("nowhere", "does not exist"),
        ("constructed --lengths 0k", "lengths"),
        ("constructed --lengths 100", "multiples"),
        ("nowhere --ratios 1", "above 1"),
        ("nowhere --methods quest2", "quest"),
        ("nowhere --tasks niah", "ruler_niah"),
        ("nowhere --budget '5 steps'", "a time"),
        ("nowhere --samples 0", "samples"),
        ("constructed --effects 3", "--effects of constructed; supported: --lengths"),
        ("constructed --methods quest", "--methods of constructed"),
        ("tiny --wording brief", "--wording of tiny"),
    ],
)
def test_what_cannot_be_asked_ends_with_one_sentence(line, match, tmp_path, capsys):
    code, _, messages = run(capsys, f"sparse {line}", "--output", tmp_path / "out")
    assert code == 2 and match in messages and not (tmp_path / "out").exists()


def test_a_folder_comes_before_a_preset_of_the_same_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--tasks of constructed" in " ".join(run(capsys, "sparse constructed --tasks text")[2].split())
    (tmp_path / "constructed").mkdir()
    code, _, messages = run(capsys, "sparse constructed --tasks text")
    assert code == 2 and "of constructed" not in messages and "constructed" in messages


def test_side_effects_are_asked_where_they_are_wanted_stored_and_told(causal, tmp_path, monkeypatch, capsys):
    folder, text = causal
    line = "sparse --lengths 400 --methods quest --ratios 4 --tasks text --samples 1 --effects 2"
    more = "--data", text, "--output", tmp_path, folder
    found = answer(capsys, line, *more)["side_effects"]
    assert found["length"] == 400 and list(found["rows"]) == ["dense", "quest 4x"]
    dense = found["rows"]["dense"]
    # it knows a line with 14 different 4-grams, and repeats it
    assert dense["text_repeated"] == pytest.approx(1 - 14 / 61) and dense["repeated"] == pytest.approx(
        1 - 14 / 61, abs=0.1
    )
    assert len(dense["answers"]) == 2 and dense["right_alone"] == 0
    monkeypatch.setattr(study_module.Probes, "ask", None)
    assert answer(capsys, line, *more)["side_effects"] == found
    _, shown, _ = run(capsys, line, *more)
    assert "repeated" in shown and "the text" in shown and "too few" in " ".join(shown.split())
    assert "Side effects" in (tmp_path / "report.html").read_text()
    assert answer(capsys, line.replace("--effects 2", ""), *more)["side_effects"] is None


def test_lengths_beyond_the_positions_of_a_model_are_refused(causal, tmp_path, capsys):
    code, _, messages = run(capsys, "sparse --lengths 1k", "--output", tmp_path / "out", causal[0])
    assert code == 2 and "512" in messages


def test_lengths_beyond_what_a_model_was_trained_on_are_told(causal, tmp_path, capsys):
    folder = tmp_path / "model"
    save_pretrained(LanguageModel(LanguageModelConfig(256, dim=8, plan=["softmax"], num_heads=1)), folder)
    record = {"state": "finished", "mechanism": "softmax", "layers": [], "tokenizer": "bytes"}
    record |= {"settings": {"length": 64}, "task": {"name": "text", "options": {}}}
    (folder / "training.json").write_text(json.dumps(record))
    line = "sparse --lengths {} --methods quest --ratios 2 --tasks text --samples 1"
    more = "--data", causal[1], "--output", tmp_path, folder
    assert answer(capsys, line.format(64), *more)["beyond"] == ""
    said = answer(capsys, line.format("64,96"), *more)["beyond"]
    assert "trained on 64 tokens at a time" in said and said in (tmp_path / "report.html").read_text()
    assert said in " ".join(run(capsys, line.format("64,96"), *more)[1].split())


def test_the_layer_made_by_hand_is_reported(tmp_path, capsys):
    found = answer(capsys, "sparse constructed --lengths 256 --samples 2", "--output", tmp_path)
    assert len(found["groups"]["pages with a topic"]["256"]) == 16 and "256" in found["text"][0]
    assert "At equal cost" in (tmp_path / "report.html").read_text()


def test_decoders_of_words_are_trained_go_on_and_are_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "CHECK_EVERY", 2)
    monkeypatch.setattr(tiny, "BATCH", 2)
    losses = []

    def stop(step, loss):
        losses.append(loss)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.train("S", tmp_path / "stopped", 6, on_step=stop)
    model = tiny.train("S", tmp_path / "stopped", 6, on_step=lambda step, loss: losses.append(loss))
    whole = []
    other = tiny.train("S", tmp_path / "whole", 6, on_step=lambda step, loss: whole.append(loss))
    # steps after the last checkpoint are repeated
    assert losses == pytest.approx([*whole[:4], *whole[2:]])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b)
    reader = tiny.WordReader(model, "S")
    task = create_long_task("ruler_niah", "brief")
    sample = task.sample(0, 200, lambda text: len(reader.encode(text)))
    assert reader.decode(reader.encode(sample.prompt)).split() == sample.prompt.replace("\n", " ").split()
    monkeypatch.setattr(tiny, "SIZES", {"S": tiny.SIZES["S"]})
    monkeypatch.setattr(tiny, "PRESETS", {"tiny": (6, 60.0)})
    line = "sparse tiny --lengths 128 --methods quest --ratios 4 --tasks ruler_niah --samples 2"
    found = answer(capsys, line, "--output", tmp_path / "out")
    assert set(found["sizes"]) == {"S"} and len(found["groups"]["quest"]["128"]) == 2
