"""`regard compress` on transformers encoders and classifiers and on timm models, and loading the results there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from byte_tokenizer import save_byte_tokenizer
from command_line import answer, run
from PIL import Image
from torch.nn import functional as F

import regard
from regard.compression import load_compressed
from regard.compression.layers import answers_of
from regard.compression.resume import digest
from regard.layers.quantized import QuantizedLinear
from regard.models.weights import weights_bytes
from regard.workbench.lighter import evaluated
from regard.workbench.lighter import study as studies
from regard.workbench.lighter.subjects import open_subject
from regard.workbench.lighter.subjects.opened import open_encoder, open_vision

transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
from small_encoders import WORDS, bert, text, tokenizer  # noqa: E402

from regard.integrations import timm_folders  # noqa: E402

CLASSES = ("cats", "dogs", "owls")
NAMED = {"num_labels": 3, "id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}}
LINEAR = {
    "masked": "bert.encoder.layer.0.intermediate.dense",
    "classes": "bert.encoder.layer.0.intermediate.dense",
    "vit": "blocks.0.mlp.fc1",
}
AUTO = {
    "masked": transformers.AutoModelForMaskedLM,
    "bare": transformers.AutoModel,
    "classes": transformers.AutoModelForSequenceClassification,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(studies, "TIMING_SECONDS", 0.01)
    monkeypatch.setattr(evaluated, "TIMING_SECONDS", 0.01)
    monkeypatch.setattr(studies, "MOST_ITEMS", 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders with an encoder of each kind, a wider classifier, a timm model, and data for them."""
    place = tmp_path_factory.mktemp("place")
    kinds = {"masked": "BertForMaskedLM", "bare": "BertModel", "classes": "BertForSequenceClassification"}
    for name, kind in kinds.items():
        bert(kind, **(NAMED if name == "classes" else {})).save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    bert(kinds["classes"], hidden_size=64, **NAMED).save_pretrained(place / "big")
    tokenizer().save_pretrained(place / "big")
    (place / "text.txt").write_text(text(1500))
    draw = np.random.default_rng()
    rows = [(" ".join(draw.choice(WORDS[5:], draw.integers(4, 12))), draw.choice(CLASSES)) for _ in range(60)]
    (place / "labelled.csv").write_text("text,label\n" + "".join(f"{words},{name}\n" for words, name in rows))
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    timm_folders.save(vit, place / "vit")
    for name in CLASSES:
        (place / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{number}.png")
    return place


@pytest.mark.parametrize(
    ("model", "data", "metric", "recipe"),
    [
        ("masked", "text.txt", "masked perplexity", "gptq"),
        ("bare", "text.txt", "variance kept", "gptq"),
        ("classes", "labelled.csv", "accuracy", "tokens"),
        ("classes", "text.txt", "agreement", "axformer"),
        ("vit", "photos", "accuracy", "tokens:method=evit"),
        ("vit", "photos/cats", "agreement", "lsq"),
    ],
)
def test_recipes_are_measured_on_what_the_model_says(capsys, place, tmp_path, model, data, metric, recipe):
    line = (
        f"compress {place}/{model} --data {place}/{data} --budget 1h --output {tmp_path}/out --recipes 'int8,{recipe}'"
    )
    found = answer(capsys, line)
    assert (found["metric"], found["higher_is_better"]) == (metric, metric != "masked perplexity")
    wants_answers = recipe in ("axformer", "lsq")
    rows = {row["recipe"]: row for row in found["rows"]}
    assert list(rows) == (["int8"] if wants_answers else ["int8", recipe])
    assert wants_answers == ("without right answers" in found["refused"].get(recipe, ""))
    if metric in ("agreement", "variance kept"):
        assert found["original"]["quality"] == 1.0 and "beside the original's" in found["described"]
    assert set(rows["int8"]["speedup"]) == {"one item", "16 items"}
    assert rows["int8"]["bytes"] < found["original"]["bytes"] / 2
    assert metric in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("model", "data"), [("masked", "text.txt"), ("classes", "labelled.csv"), ("vit", "photos")])
def test_a_study_knows_its_data_by_their_contents(place, model, data):
    first, again = (digest(open_subject(place / model, str(place / data), None).looked_at()) for _ in range(2))
    assert first == again
    subject = open_subject(place / model, str(place / data), None)
    held_out = subject.held_out.batch([0])
    next(iter(held_out.values())).view(-1)[-1] += 1
    other = replace(subject, held_out=Changed(subject.held_out, held_out))
    assert digest(other.looked_at()) != first


def test_causal_classifiers_learn_their_padding_from_the_tokenizer(place, tmp_path, capsys):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": len(tokenizer())}
    config = transformers.GPT2Config(**sizes, id2label=dict(enumerate(CLASSES)), initializer_range=0.5)
    transformers.GPT2ForSequenceClassification(config).eval().save_pretrained(tmp_path / "causal")
    words = tokenizer()
    words.save_pretrained(tmp_path / "causal")
    subject = open_subject(tmp_path / "causal", str(place / "labelled.csv"), 16)
    model, texts = subject.load(), [item.texts[0] for item in subject.held_out.items]
    alone = [int(model(**words(x, return_tensors="pt")).logits.argmax()) for x in texts]
    right = [one == number for one, number in zip(alone, subject.held_out.classes, strict=True)]
    assert subject.quality(model, subject.items) == pytest.approx(sum(right) / len(right))
    distil = f"distil:steps=2,teacher={tmp_path}/causal"
    for recipe in ("int8", distil):
        line = (
            f"compress {tmp_path}/causal --recipe {recipe} --data {place}/labelled.csv --output {tmp_path}/{recipe[:4]}"
        )
        code, told, said = run(capsys, line)
        assert code == 0, (told, said)
        assert answer(capsys, f"evaluate {tmp_path}/{recipe[:4]} {place}/labelled.csv")["metric"] == "accuracy"


class Changed:
    """Items of which the first is another one."""

    def __init__(self, items, first):
        self.items, self.first = items, first

    def __len__(self):
        return len(self.items)

    def batch(self, numbers):
        return self.first if 0 in numbers else self.items.batch(numbers)


def test_scores_are_those_of_the_models_own_library(place):
    subject = open_subject(place / "classes", str(place / "labelled.csv"), None)
    model, words = subject.load(), tokenizer()
    right = 0
    for item, number in zip(subject.held_out.items, subject.held_out.classes, strict=True):
        said = model(**words(item.texts[0], return_tensors="pt")).logits.argmax(-1)
        right += int(said == number == CLASSES.index(item.label))
    assert subject.quality(model, subject.items) == pytest.approx(right / 30) and subject.items == 30
    subject = open_subject(place / "masked", str(place / "text.txt"), 24)
    batch, model = subject.held_out.batch(range(9)), subject.load()
    assert subject.quality(model, 9) == pytest.approx(model(**batch).loss.exp().item(), rel=1e-5)
    asked = batch["labels"] != -100
    assert bool((batch["input_ids"][asked] == words.mask_token_id).all()) and not bool(asked[:, [0, -1]].any())
    assert not set(subject.before.ids.flatten().tolist()) <= set(words.all_special_ids)


@pytest.mark.parametrize("model", ["masked", "bare", "classes", "vit"])
def test_what_a_library_has_words_for_it_loads_and_the_rest_it_refuses(capsys, place, tmp_path, model):
    inputs = torch.randn(2, 3, 16, 16) if model == "vit" else torch.randint(5, len(WORDS), (2, 9))

    def loaded(folder):
        if model == "vit":
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return AUTO[model].from_pretrained(folder)

    def said(network):
        found = network(inputs)
        return (found if model == "vit" else found[0]).detach()

    for name, recipe in (("zeros", "magnitude"), ("codes", "int8")):
        answer(capsys, f"compress {place}/{model} --recipe {recipe} --output {tmp_path}/{name}")
    expected = said(load_compressed(tmp_path / "zeros"))
    assert torch.equal(said(loaded(tmp_path / "zeros")), expected)
    assert not torch.equal(said(loaded(place / model)), expected)
    if model == "vit":
        with pytest.raises(RuntimeError, match="Unknown model"):
            loaded(tmp_path / "codes")
    else:
        assert torch.equal(said(loaded(tmp_path / "codes")), said(load_compressed(tmp_path / "codes")))
    code, _, told = run(capsys, f"retrofit {tmp_path}/zeros --mechanism linear --data {place} --output {tmp_path}/out")
    assert code == 2 and "which is compressed" in told
    original = said(loaded(place / model))
    assert 0 < float((said(load_compressed(tmp_path / "codes")) - original).abs().max() / original.abs().max()) < 0.1


@pytest.mark.parametrize(("model", "data"), [("masked", "text.txt"), ("classes", "labelled.csv"), ("vit", "photos")])
def test_what_was_compressed_is_scored_on_all_of_the_data(capsys, place, tmp_path, model, data):
    answer(capsys, f"compress {place}/{model} --recipe int8 --output {tmp_path}/small")
    given = str(place / data)
    for folder in (place / model, tmp_path / "small"):
        found = answer(capsys, f"evaluate {folder} {given}")
        if model == "vit":
            subject = open_vision(folder, given, None, held_out=1.0)
        else:
            subject = open_encoder(folder, model, given, None, held_out=1.0)
        network = subject.load()
        assert isinstance(network.get_submodule(LINEAR[model]), QuantizedLinear) == (folder.name == "small")
        batches = [subject.held_out.batch([number]) for number in range(subject.items)]
        with torch.no_grad():
            said = [answers_of(subject.run(network, batch)).double().flatten(0, -2) for batch in batches]
        right = [batch["labels"].flatten() for batch in batches]
        losses = torch.stack([F.cross_entropy(*pair) for pair in zip(said, right, strict=True)])
        assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        n = found["items"]
        if model == "masked":
            assert (n, found["metric"]) == (1500 // 62, "masked perplexity")
            score, error = losses.mean().exp().item(), losses.std().item() * losses.mean().exp().item() / n**0.5
        else:
            assert (n, found["metric"]) == ({"vit": 24, "classes": 60}[model], "accuracy")
            score = sum(int(x.argmax(-1) == y) for x, y in zip(said, right, strict=True)) / n
            error = (score * (1 - score) / (n - 1)) ** 0.5
        assert (found["score"], found["standard_error"]) == pytest.approx((score, error), rel=1e-4)
        assert found["bytes"] == weights_bytes(network) and set(found["milliseconds"]) == {"one item", "16 items"}
    code, told, _ = run(capsys, f"evaluate {tmp_path}/small {given}")
    assert code == 0 and found["metric"] in told and "of weights; one item" in told


def test_a_model_learns_from_a_larger_one(capsys, place, tmp_path):
    recipe = "distil:teacher={},steps=25,learning_rate=0.01"
    line = f"compress {place}/classes --data {place}/labelled.csv --output {tmp_path}/small --recipe"
    found = answer(capsys, line, recipe.format(place / "big"))
    assert f"distilled from the teacher {place / 'big'} in 25 steps" in found["notes"][0]
    subject = open_subject(place / "classes", str(place / "labelled.csv"), None)
    big = AUTO["classes"].from_pretrained(place / "big").eval()
    batch = subject.training(1)[0]

    def distance(model):
        logits = (subject.run(one, batch).logits.detach().log_softmax(-1) for one in (model, big))
        return float(torch.nn.functional.kl_div(*logits, reduction="batchmean", log_target=True))

    assert distance(load_compressed(tmp_path / "small")) < 0.8 * distance(subject.load())
    given = regard.compress(subject.load(), recipe.format(place / "big"), [batch], run=subject.run)
    own = regard.compress(subject.load(), "distil:steps=25,learning_rate=0.01", [batch], run=subject.run, teacher=big)
    pairs = zip(own.model.parameters(), given.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs) and own.report.bytes_after == own.report.bytes_before
    steps = tmp_path / "recipe.yaml"
    steps.write_text(f"- structured: {{layers: 1}}\n- distil: {{teacher: {place / 'big'}, steps: 1}}\n")
    assert len(answer(capsys, f"{line} {steps}")["notes"]) == 3


def test_bad_requests_of_encoders_are_one_sentence_and_write_nothing(capsys, place, tmp_path):
    bert("BertForSequenceClassification", **{**NAMED, "id2label": {0: "dogs", 1: "cats", 2: "owls"}}).save_pretrained(
        tmp_path / "turned"
    )
    bert("BertForMaskedLM", vocab_size=50).save_pretrained(tmp_path / "words")
    bert("BertForTokenClassification").save_pretrained(tmp_path / "tags")
    bert("BertForSequenceClassification").save_pretrained(tmp_path / "unpadded")
    save_byte_tokenizer(tmp_path / "unpadded")
    (tmp_path / "odd.csv").write_text("text,label\n" + "".join(f"ba be {i},{'xy'[i % 2]}\n" for i in range(10)))
    out = tmp_path / "out"
    for line, words in (
        (f"{place}/bare --recipe gptq", "without data"),
        (f"{place}/vit --recipe gptq", "without images"),
        (f"{place}/vit --recipe gptq --length 9 --data {place}/photos", "no length"),
        (f"{place}/vit --recipe gptq --data {place}/text.txt", "not a folder"),
        (f"{place}/masked --recipe gptq --length 65 --data {place}/text.txt", "64 positions"),
        (f"{place}/bare --recipe axformer --data {place}/text.txt", "without right answers"),
        (f"{place}/bare --recipe lsq --data {place}/text.txt", "without right answers"),
        (f"{place}/classes --recipe gptq --data {tmp_path}/odd.csv", "the class x, which the model does not know"),
        (f"{tmp_path}/tags --recipe int8", "head is of another kind"),
        (f"{tmp_path}/unpadded --recipe gptq --data {place}/labelled.csv", "no padding token"),
        ("timm:nothing --recipe int8", "Unknown model"),
        (f"{place}/bare --recipes int8 --effects 1 --data {place}/text.txt", "side effects"),
        (
            f"{place}/classes --recipe distil:teacher={tmp_path}/turned --data {place}/labelled.csv",
            "the classes dogs, cats",
        ),
        (f"{place}/masked --recipe distil:teacher={tmp_path}/words --data {place}/text.txt", "a vocabulary of 50"),
        (f"{place}/classes --recipe distil:teacher={place}/masked --data {place}/labelled.csv", "outputs"),
        (f"{place}/classes --recipe distil:teacher={place}/vit --data {place}/labelled.csv", "of timm"),
        (f"{place}/classes --recipe distil:teacher={tmp_path}/none --data {place}/labelled.csv", "does not exist"),
        (f"{place}/classes --recipe distil:teacher=1 --data {place}/labelled.csv", "teacher=1"),
    ):
        code, _, messages = run(capsys, f"compress {line} --output {out}")
        said = " ".join(messages.split())
        assert code == 2 and words in said and said.count("regard: ") == 1, (line, messages)
        assert not out.exists(), line
    for line, words in (
        ("bare {}/text.txt", "an encoder without a head"),
        ("vit", "without data; supported: behind it a folder of images"),
        ("vit {}/photos/cats", "of which nothing says what is right"),
        ("classes {}/text.txt", "of which nothing says what is right"),
        ("classes {}/labelled.csv --reduce tome:remove=1", "a model of transformers"),
        ("vit {}/photos --exit layer:1", "a model of timm"),
    ):
        code, told, said = run(capsys, f"evaluate {place}/{line.format(place)}")
        assert (code, told) == (2, "") and words in " ".join(said.split()), (line, said)
    code, told, said = run(capsys, f"evaluate {tmp_path}/tags {place}/text.txt")
    assert (code, told) == (2, "") and "head is of another kind" in said
    for name in ("bare", "classes", "masked", "vit"):
        code, _, said = run(capsys, f"sparse {place}/{name} --output {out}")
        assert code == 2 and ("which does not go on from a text" in said or "a model of images" in said)
    assert not out.exists()
