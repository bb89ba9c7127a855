"""Recipe steps that concern the whole model: distillation, fewer tokens, export."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support import close, refused
from torch import Tensor, nn

import regard
from regard.compression import load_compressed
from regard.compression.distillation.cached import FILE
from regard.compression.recipes import read_recipe
from regard.compression.sparse import METHODS as SPARSE
from regard.compression.sparse import at_compression
from regard.compression.sparse.catalogue import make
from regard.compression.sparse.paging import Quest
from regard.compression.sparse.rounding import RoundedKeys
from regard.compression.tokens.applied import read_in_turn, tokens_record
from regard.contract import Context
from regard.layers.quantized import QuantizedLinear
from regard.models import LanguageModel, LanguageModelConfig, from_pretrained
from regard.models.image_model import ImageModel, ImageModelConfig

transformers = pytest.importorskip("transformers")

VOCABULARY = 30
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def language_model(layers: int = 2) -> LanguageModel:
    return LanguageModel(LanguageModelConfig(vocab_size=VOCABULARY, dim=32, num_heads=2, num_layers=layers)).eval()


def llama(layers: int = 2) -> Any:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_key_value_heads=1, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def bert(kind: str = "BertForSequenceClassification") -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=40, initializer_range=0.3, **SIZES
    )
    return getattr(transformers, kind)(config).eval()


def vit() -> Any:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()


def windows(count: int = 2, length: int = 24) -> list[Tensor]:
    return [torch.randint(0, VOCABULARY, (2, length)) for _ in range(count)]


def images() -> list[Tensor]:
    return [torch.randn(2, 3, 64, 64)]


@torch.no_grad()
def answers(model: Any, batch: Any) -> Tensor:
    found = model(batch)
    return getattr(found, "output", getattr(found, "logits", found))


def divergence(model: nn.Module, expected: list[Tensor], data: list[Tensor]) -> float:
    """KL divergence of a model's answers from the expected ones, averaged over tokens."""
    pairs = zip(expected, data, strict=True)
    return sum(
        float(
            nn.functional.kl_div(answers(model, x).log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="sum")
        )
        for y, x in pairs
    )


@pytest.mark.parametrize("recipe", ["wanda:ratio=0.7", "structured:neurons=0.5", "gptq:bits=2"])
def test_distillation_wins_back_a_part_of_what_the_step_before_it_lost(recipe):
    model, data = language_model(), windows(3)
    expected = [answers(model, x) for x in data]
    small = regard.compress(model, recipe, data)
    lost = divergence(model, expected, data)
    zeros = {r.name: model.get_submodule(r.name).weight == 0 for r in small.report.layers if r.zeros}
    small.undo()
    kind = "features" if recipe.startswith("gptq") else "response"
    again = regard.compress(model, f"{recipe} + distil:steps=25,learning_rate=0.003,kind={kind}", data)
    assert divergence(model, expected, data) < 0.8 * lost
    assert any("distilled from the original in 25 steps" in note for note in again.report.notes)
    assert all(torch.equal(model.get_submodule(name).weight == 0, where) for name, where in zeros.items())
    assert ("wanda" in recipe) == bool(zeros)
    again.undo()
    assert all(torch.equal(answers(model, x), y) for x, y in zip(data, expected, strict=True))


@pytest.mark.parametrize("kind", ["response", "features", "patient"])
@pytest.mark.parametrize(
    ("make", "kept"), [(lambda: language_model(4), "head"), (lambda: llama(4), "head"), (bert, "answers")]
)
def test_a_cache_of_the_teachers_answers_changes_no_weight_and_is_read_by_later_runs(make, kept, kind, tmp_path):
    model, data = make(), windows(2)
    recipe = f"magnitude + distil:steps=5,learning_rate=0.003,kind={kind}"
    small = regard.compress(model, recipe, data)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small.undo()
    for said in ("7 answers of the teacher read", "9 answers of the teacher read"):
        found = regard.compress(model, f"{recipe},cache={tmp_path}", data)
        assert any(f"{said} from {tmp_path}" in note for note in found.report.notes), found.report.notes
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        found.undo()
    with sqlite3.connect(tmp_path / FILE) as table:
        rows = [load(blob) for (blob,) in table.execute("SELECT tensors FROM answers")]
    table.close()
    assert len(rows) == 2 and all((kept in row) and (len(row) > 1) == (kind != "response") for row in rows)


def test_a_cache_that_is_no_folder_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("mine")
    model, done = language_model(), list[str]()
    refused(
        "is a file",
        regard.compress,
        model,
        f"magnitude + distil:cache={tmp_path / 'file'}",
        windows(),
        on_layer=lambda name, *_: done.append(name),
    )
    assert not done and (tmp_path / "file").read_text() == "mine"


def test_zeros_stay_through_distillation_and_rounding():
    model, data = language_model(), windows()
    small = regard.compress(model, "wanda + distil:steps=3,learning_rate=0.01 + gptq", data)
    for report in small.report.layers:
        layer = model.get_submodule(report.name)
        assert isinstance(layer, QuantizedLinear)
        if report.zeros is not None:
            assert report.zeros == pytest.approx(0.5, abs=0.02) and float((layer.weight == 0).float().mean()) >= 0.5
    assert [report.name for report in small.report.layers if report.zeros is None] == ["head"]


def test_a_recipe_that_begins_with_distillation_makes_a_student_of_half_the_layers():
    for model in (language_model(4), llama(4)):
        data = windows()
        expected, before = answers(model, data[0]), sum(p.numel() for p in model.parameters())
        small = regard.compress(model, "distil:steps=2", data)
        assert sum(p.numel() for p in model.parameters()) < 0.7 * before
        assert not torch.equal(answers(model, data[0]), expected)
        assert torch.equal(answers(small.undo(), data[0]), expected)
    refused("a student of 4 layers", regard.compress, language_model(4), "distil:layers=4", windows())
    assert len(regard.compress(vit(), "distil:steps=1", images()).model.blocks) == 1
    other = pytest.importorskip("timm").create_model("test_resnet")
    refused("a student by distil.*makes weights 0", regard.compress, other, "distil", images())


def test_distillation_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    model, data = language_model(), windows()
    recipe = "magnitude + distil:steps=6,learning_rate=0.003"
    whole = regard.compress(model, recipe, training=data)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole.undo()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[int] = []

    def stop(name: str, done: int, count: int) -> None:
        if name == "distil step" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regard.compress(model, recipe, training=data, work=tmp_path, on_layer=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    count = lambda name, done, of: seen.append(done) if name == "distil step" else None  # noqa: E731
    regard.compress(model, recipe, training=data, work=tmp_path, on_layer=count)
    assert seen == [5, 6]
    for name, tensor in model.state_dict().items():
        close(tensor, expected[name], 1e-6)


@pytest.mark.parametrize(
    ("make", "data", "recipe"),
    [
        (vit, images, "int8 + tokens:method=evit,keep=0.5"),
        (vit, images, "tokens:remove=2"),
        (bert, windows, "int8 + tokens:keep=0.5"),
        (bert, windows, "tokens:threshold=0.04"),
        (language_model, windows, "int8 + tokens:keep=0.5"),
        (llama, windows, "tokens:method=h2o,capacity=6"),
        (language_model, windows, "int8 + tokens:method=int8,block=4,window=2"),
        (llama, windows, "int4 + tokens:method=int8,window=3"),
        (language_model, windows, "tokens:method=quest,keep=0.5"),
        (llama, windows, "int8 + tokens:budget=4,page=2,share=false"),
    ],
)
def test_fewer_tokens_are_saved_loaded_and_undone(make, data, recipe, tmp_path):
    model, batches = make(), data()
    before = answers(model, batches[0])
    small = regard.compress(model, recipe, batches)
    found = answers(read_in_turn(model), batches[0])
    assert not torch.allclose(found, before, atol=1e-6) and small.report.tokens == tokens_record(model)
    small.save(tmp_path)
    assert tokens_record(model) == small.report.tokens, "a model goes on as it was when it is saved"
    again: Any = load_compressed(tmp_path, into=make() if make is vit else None)
    assert torch.equal(answers(read_in_turn(again), batches[0]), found)
    if make is language_model:
        refused("fewer tokens.*load_compressed", from_pretrained, tmp_path)
    model = make()
    before = answers(model, batches[0])
    assert torch.equal(answers(regard.compress(model, recipe, batches).undo(), batches[0]), before)
    assert tokens_record(model) is None


def test_methods_for_a_cache_have_their_own_options_and_need_no_data_for_them():
    expected = {
        "tokens:method=int8": RoundedKeys(),
        "tokens:block=32": RoundedKeys(block=32),
        "tokens:method=int8,block=32,window=8": RoundedKeys(32, 8),
        "tokens:budget=64": Quest(64),
        "tokens:method=quest,page=8": Quest(page=8),
        "tokens:budget=8,page=4,share=false": Quest(8, 4, False),
    }
    for recipe, method in expected.items():
        small = regard.compress(language_model(1), f"int8 + {recipe}")
        assert make(SPARSE[small.report.tokens["method"]], small.report.tokens["options"]) == method
        assert read_recipe(small.report.recipe).name == small.report.recipe == f"int8 + {recipe}"
    refused("without data", regard.compress, language_model(1), "tokens:method=quest")
    shared = regard.compress(language_model(1), "tokens:method=quest,keep=0.5", windows(length=64)).report.tokens
    assert shared == {"method": "quest", "options": asdict(at_compression("quest", 2, 32))}
    for name in (name for name, kind in SPARSE.items() if "decode" in kind.phases):
        small = regard.compress(language_model(1), f"tokens:method={name}", windows(length=64))
        assert small.report.tokens["method"] == name


def test_a_sequence_read_in_turn_is_decoded_token_by_token_through_the_smaller_cache():
    model, data = language_model(), windows()
    exact = answers(model, data[0])
    regard.compress(model, "tokens:method=snapkv,capacity=5", data)
    found = model(data[0][:, :12], context=Context(want=frozenset({"state"})))
    expected = [found.output]
    for i in range(12, 24):
        found = model(data[0][:, i : i + 1], state=found.state)
        expected.append(found.output)
    in_turn = answers(read_in_turn(model), data[0])
    close(in_turn, torch.cat(expected, 1).detach(), 1e-5)
    close(in_turn[:, :12], exact[:, :12], 1e-5)
    other = language_model()
    regard.compress(other, "tokens:method=snapkv,capacity=500")
    close(answers(read_in_turn(other), data[0]), answers(other, data[0]), 1e-5)


def test_a_saved_program_gives_the_answers_of_the_model_for_other_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = language_model(1)
    small = regard.compress(model, "int4 + export", windows())
    small.save(tmp_path)
    program = small.report.program
    assert program["file"] == "model.onnx" and program["inputs"] == {"input": [None, None]}
    assert any("model.onnx" in note for note in small.report.notes)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for ids in (torch.randint(0, VOCABULARY, (1, 9)), torch.randint(0, VOCABULARY, (3, 31))):
        found = session.run(None, {"input": ids.numpy()})[0]
        close(torch.from_numpy(found), answers(model, ids), 1e-5)
    other = language_model()
    regard.compress(other, "int8").save(tmp_path)
    assert not (tmp_path / "model.onnx").exists(), "a program of another save"


def test_a_program_made_of_one_short_item_takes_more_and_longer_ones(tmp_path):
    model = language_model(1)
    regard.compress(model, "int8 + export:format=torch", [torch.randint(0, VOCABULARY, (1, 6))]).save(tmp_path)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for sizes in ((1, 6), (1, 3), (3, 21)):
        ids = torch.randint(0, VOCABULARY, sizes)
        close(program(ids).detach(), answers(model, ids), 1e-5)


@pytest.mark.parametrize("tokens", ["tokens:remove=3", "tokens:method=evit"])
def test_a_program_of_fewer_patches_is_that_of_the_reduced_model_for_any_number_of_images(tokens, tmp_path):
    model, data = vit(), images()
    small = regard.compress(model, f"{tokens} + export:format=torch", data)
    small.save(tmp_path)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 4):
        more = torch.randn(count, *data[0].shape[1:])
        close(program(more).detach(), answers(model, more), 1e-5)


def test_patches_go_where_no_class_token_is_but_not_by_its_attention(tmp_path):
    options = {"dim": 12, "num_layers": 2, "num_heads": 2, "pool": "mean"}
    model = ImageModel(ImageModelConfig("vit_nano", 2, (4, 4), 4, options=options)).eval()
    patches = torch.randn(2, 16, 48)
    refused("without a class token", regard.compress, model, "tokens:method=evit")
    whole = model(patches).output
    small = regard.compress(model, "tokens:remove=3")
    found = small.model(patches).output
    assert not torch.equal(found, whole)
    small.save(tmp_path)
    assert torch.equal(load_compressed(tmp_path)(patches).output, found)


def test_a_causal_model_whose_cache_cannot_be_made_cheaper_is_refused_with_the_reason():
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_key_value_heads": 1, **SIZES}
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(head_dim=16, **sizes)).eval()
    for step in ("tokens:capacity=8", "int8 + tokens:method=int8"):
        refused("a Gemma3Attention; supported: .* no window", regard.compress, gemma, step)
    assert not any(isinstance(module, QuantizedLinear) for module in gemma.modules())
    swapped = llama()
    regard.swap(swapped, "sigmoid")
    refused(r"attention was swapped; .*unswap", regard.compress, swapped, "tokens:capacity=8")
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=8)
    translator = transformers.T5ForConditionalGeneration(config)
    refused("which has an encoder", regard.compress, translator, "tokens:capacity=8")


def test_what_a_model_does_not_take_is_refused_with_what_it_takes_and_nothing_is_changed():
    data = windows()
    refused("tome in a LanguageModel.*snapkv", regard.compress, language_model(), "tokens:remove=2")
    refused("snapkv in a Bert.*power_bert", regard.compress, bert(), "tokens:capacity=5")
    refused("vision transformers", regard.compress, nn.Sequential(nn.Linear(3, 3)), "tokens:remove=1")
    refused("keeps no cache", regard.compress, language_model(), "tokens + export", data)
    refused("keeps no cache", read_recipe, "tokens:budget=16 + export")
    refused("keep of int8; supported: block or window", read_recipe, "tokens:method=int8,keep=0.5")
    refused("capacity of quest; supported: keep or budget", read_recipe, "tokens:method=quest,capacity=8")
    refused("keep and budget of tokens; supported: one", read_recipe, "tokens:keep=0.5,budget=16")
    refused("block of quest", read_recipe, "tokens:budget=16,block=8")
    refused("budget=15 with pages of 16; .*budget=16", read_recipe, "tokens:budget=15")
    refused("block=0", read_recipe, "tokens:block=0")
    refused("page of snapkv", read_recipe, "tokens:method=snapkv,page=8")
    refused("without data", regard.compress, language_model(), "export")
    tagger = bert("BertForTokenClassification")
    before = answers(tagger, data[0])
    refused("one output per token", regard.compress, tagger, "tokens:keep=0.5", data)
    assert torch.equal(answers(tagger, data[0]), before) and tokens_record(tagger) is None

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if float(x.sum()) > 0 else x

    refused(
        "a program of this Branching", regard.compress, Branching().eval(), "export:format=torch", [torch.ones(2, 4)]
    )
