"""Retrofits of encoders with and without a masked-token head, by command and in Python."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import answer, run
from kills import undisturbed_and_killed
from small_encoders import SIZES, WORDS, WORK, bert, text, tokenizer, tokens

import regard
from regard import Unsupported
from regard.integrations import swap
from regard.integrations.encoders import UNASKED
from regard.measurement.budget import Budget
from regard.retrofit import open_host
from regard.retrofit.corpus import Corpus
from regard.retrofit.folder import Folder
from regard.retrofit.hosts import EncoderHost
from regard.retrofit.measures.encoder import neighbours, quality
from regard.retrofit.pace import plan
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Stage
from regard.retrofit.transfer import begin_at_scale, transfer, transfer_losses
from regard.workbench.reports.retrofit_report import render_retrofit
from regard.workbench.retrofits import recommend, rows

transformers = pytest.importorskip("transformers")
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder, its tokenizer and a text."""
    place = tmp_path_factory.mktemp("place")
    tokenizer().save_pretrained(place / "bert")
    bert().save_pretrained(place / "bert")
    (place / "one.txt").write_text(text())
    return place


def test_a_folder_of_a_masked_language_model_becomes_one_that_loads(capsys, place):
    line = (
        f"retrofit {place}/bert --mechanism linear --keep-layers 1 --data {place}/one.txt --budget '28 steps' --length 24 "
        f"--batch-size 1 --lengths 32,512 --evaluation-blocks 4 --output {place}/out"
    )
    found = answer(capsys, line)
    assert (found["kind"], found["swapped"], found["unit"]) == ("encoder", [0], "nats a masked token")
    judged = found["results"]["quality"]["one.txt, held out"]
    assert judged["blocks"] == 4 and judged["length"] == 24 and len(judged["by_layer"]) == 2
    assert judged["change"] == pytest.approx(judged["retrofit"] / judged["original"] - 1)
    assert found["results"]["left_out"] == [512] and list(found["results"]["time"]) == ["32"]
    operations = found["results"]["operations"]["32"]
    assert operations["retrofit"] != operations["original"]
    page = (place / "out" / "report.html").read_text()
    assert found["recommendation"]["text"] in page.replace("&#39;", "'") and "nats a masked token" in page
    assert "AutoModelForMaskedLM.from_pretrained" in (place / "out" / "README.md").read_text()
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(place / "out")
    assert loaded.bert.encoder.layer[0].attention.self.regard.card.name == "linear"
    again = open_host(str(place / "bert")).load(place / "out")
    ids = tokens(20)[None]
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(place / "out").mask_token_id == WORDS.index("[MASK]")
    scored = answer(capsys, f"evaluate {place}/out {place}/one.txt")
    assert scored["metric"] == "masked perplexity" and scored["score"] > 1
    code, told, _ = run(capsys, line)
    assert code == 0 and "perplexity of masked tokens" in told


def test_killed_at_any_stage_and_resumed_it_equals_one_that_was_not(tmp_path, monkeypatch):
    model = bert("BertModel", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    settings = {"keep_layers": "auto:1", "data": tokens(), "budget": "54 steps", **WORK}
    whole, again = undisturbed_and_killed(monkeypatch, tmp_path, model, "gated_linear", **settings)
    assert again.record["unit"] == "of the outputs' square"
    losses = whole.record["losses"]["tune"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    loaded, ids = transformers.AutoModel.from_pretrained(again.folder), tokens(20)[None]
    assert torch.equal(loaded(ids).last_hidden_state, again.model(ids).last_hidden_state)
    beside = {"a": whole.record, "b": again.record}
    assert "hidden states is kept" in recommend(beside)
    assert [row["attention"] for row in rows(beside)] == ["original", "a", "b"]
    assert "of the outputs&#39; square" in render_retrofit(again.record)


@pytest.fixture(scope="module")
def host():
    return open_host(bert(layers=2), tokenizer())


def of(host, **options):
    return host.begun(RetrofitSettings("linear", **{**WORK, **options}))


def corpus():
    return Corpus(tokens(), tokens(200), None, "data", None)


def test_a_window_shorter_than_the_lengths_is_refused_before_anything_is_trained(tmp_path):
    sizes = {**SIZES, "local_attention": 80, "layer_types": ["full_attention", "sliding_attention"]}
    del sizes["initializer_range"]
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**sizes, num_hidden_layers=2, **ENDS)).eval()
    settings = {**WORK, "lengths": (32, 64), "keep_layers": "none", "data": tokens(), "budget": "60 steps"}
    with pytest.raises(Unsupported, match=r"texts of 64 tokens .* window of 40.*try lengths=\(40,\) or keep_layers"):
        regard.retrofit(model, "linear", output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    host = open_host(model)
    host.check_longest(corpus(), host.begun(RetrofitSettings("linear", length=24, lengths=(64,))), [0])


def test_the_same_tokens_are_asked_for_in_each_row_and_never_the_frame(host):
    settings = of(host)
    batch = host.batch(corpus(), 3, 0, settings, rows=5)
    asked = batch.targets != UNASKED
    assert batch.inputs.shape == (5, 24) and (asked.sum(1) == 4).all()
    assert (batch.inputs[asked] == WORDS.index("[MASK]")).all()
    assert not asked[:, [0, -1]].any() and (batch.inputs[:, 0] == WORDS.index("[CLS]")).all()
    data = corpus()
    same = host.batch(data, 3, 0, settings)
    assert torch.equal(same.inputs, host.batch(data, 3, 0, settings).inputs)
    assert not torch.equal(same.inputs, host.batch(data, 4, 0, settings).inputs)
    ids = torch.where(same.targets == UNASKED, same.inputs, same.targets)
    with torch.no_grad():
        logits = host.model(same.inputs).logits
    found = host.own_loss(host.answers(host.model, same), same)
    torch.testing.assert_close(
        found, torch.nn.functional.cross_entropy(logits.flatten(0, 1), same.targets.flatten(), ignore_index=UNASKED)
    )
    assert not (ids == WORDS.index("[MASK]")).any()


def test_heads_without_a_projection_begin_at_the_scale_of_the_old_ones(host):
    made, _ = host.copy_with([0, 1], "linear:normalize=False", 0)
    modules = {n: made.get_submodule(host.layers[n].path) for n in (0, 1)}
    batch = host.batch(corpus(), 0, 0, of(host)).inputs
    before = transfer_losses(host, modules, batch)
    begin_at_scale(host, modules, batch)
    assert all(a < 1.1 and a < b / 5 for a, b in zip(transfer_losses(host, modules, batch), before, strict=True))


def test_dropout_does_not_disturb_a_transfer(tmp_path):
    host = open_host(bert("BertModel", attention_probs_dropout_prob=0.5))
    made, learned = host.copy_with([0, 1], "softmax", 0)
    modules = {n: made.get_submodule(host.layers[n].path) for n in (0, 1)}
    stage, folder = Stage("transfer", "attention transfer", 8, 1e-9, 1), Folder(tmp_path, {})
    curve = transfer(host, modules, learned, corpus(), of(host), stage, folder, lambda _: None)
    assert len(curve) == 8 and max(map(max, curve)) < 1e-10


def test_the_same_model_keeps_everything_and_another_does_not(host):
    blocks = host.of_text(tokens(400), 5, of(host))
    found = quality({"original": host.model, "retrofit": host.model}, blocks)
    assert found["kept"] == found["agreement"] == found["neighbours"] == 1 and found["change"] == 0
    other, _ = host.copy_with([0, 1], "local:window=2", 0)
    found = quality({"original": host.model, "retrofit": other}, blocks)
    assert found["kept"] < 0.99 and found["change"] != 0
    assert found["by_layer"][-1] == found["kept"] and found["kept_error"] > 0


def test_a_time_is_planned(host):
    settings = of(host, budget=Budget.parse("20m"))
    found = plan(host, corpus(), settings)
    assert min(found.warm, found.transfer, found.tune) >= 8 and found.windows == 4


def test_neighbours_are_those_of_each_text():
    means = torch.randn(6, 8)
    assert neighbours(means, 3 * means + 1) == 1
    assert neighbours(means[:3], means[:3]) is None
    moved = means.clone()
    moved[0], moved[1] = means[1], means[0]
    assert neighbours(means, moved) < 1


def test_positions_kept_for_padding_are_not_counted():
    config = transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}, num_hidden_layers=1)
    assert open_host(transformers.RobertaForMaskedLM(config)).longest == 62
    assert open_host(bert(layers=1)).longest == 64


def test_a_distilbert_takes_one_too(tmp_path):
    sizes = {"vocab_size": len(WORDS), "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}
    model = transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(**sizes, max_position_embeddings=64)
    ).eval()
    made = regard.retrofit(
        model,
        "gated_linear",
        tokenizer=tokenizer(),
        keep_layers="0",
        data=tokens(),
        budget="28 steps",
        output=tmp_path / "out",
        distil=0.5,
        train="new",
        **WORK,
    )
    assert "distillation and masked-token training" in (made.folder / "README.md").read_text()
    before, changed = model.state_dict(), set()
    for name, tensor in made.model.state_dict().items():
        changed |= set() if name in before and torch.equal(tensor, before[name]) else {name}
    assert changed and all(name.startswith("distilbert.transformer.layer.1.attention.") for name in changed)


def causal(_):
    return {"mechanism": "lolcats"}


def shared(_):
    sizes = {**SIZES, "embedding_size": 16, "num_hidden_layers": 2}
    return {"model": transformers.AlbertModel(transformers.AlbertConfig(**sizes))}


def classifier(path):
    bert("BertForSequenceClassification", layers=1).save_pretrained(path / "model")
    return {"model": path / "model"}


def headless(_):
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1)
    return {"model": transformers.LlamaModel(config)}


def images(path):
    (path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (path / "photos" / name).write_bytes(b"no image")
    return {"data": [path / "photos"]}


def swapped(_):
    swap(model := bert("BertModel"), "linear")
    return {"model": model}


def quantized(_):
    model = bert("BertModel")
    model.quantization_method = "int4"
    return {"model": model}


BAD = {
    "a mechanism that is causal alone": (causal, "noncausal-self"),
    "inserted tokens": (lambda _: {"mechanism": "landmark"}, "landmark"),
    "one layer called twice": (shared, "calls .* 2 times"),
    "a head of another kind": (classifier, "BertForSequenceClassification, whose head is of another kind"),
    "a causal model without a head": (headless, "LlamaModel, which is causal but has no language-model head"),
    "images": (images, "a folder of images, as data of a BertModel"),
    "swapped before": (swapped, "swapped before"),
    "quantized weights": (quantized, "quantized"),
    "masked tokens without a mask": (lambda _: {"model": bert()}, "without a tokenizer that has a mask token"),
    "tokens that are not said": (lambda _: {"distil": 0.5}, "no head that predicts tokens.*try distil=1"),
    "long blocks": (lambda _: {"length": 80}, "80 tokens for a model of 64 positions"),
    "long lengths": (lambda _: {"lengths": (512,)}, "at most 64"),
    "a layer of its own": (lambda _: {"mechanism": "mamba2:d_state=16"}, "a layer of its own.*gated_linear:gate=step"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_will_not_do_is_refused_before_anything_is_trained(tmp_path, what):
    make, message = BAD[what]
    there = {"mechanism": "linear", "data": tokens(), "budget": "60 steps", "output": tmp_path / "out", **WORK}
    given = {"model": bert("BertModel"), **there, **make(tmp_path)}
    with pytest.raises(Unsupported, match=message):
        regard.retrofit(given.pop("model"), given.pop("mechanism"), **given, watch=unexpected)
    assert not (tmp_path / "out").exists()


def unexpected(progress):
    assert progress.doing == "looking at the model"


def test_a_model_is_of_the_kind_that_it_was_saved_as(place):
    assert isinstance(open_host(str(place / "bert")), EncoderHost)
    config = json.loads((place / "bert" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
