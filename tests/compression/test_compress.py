"""`regard.compress`: models of regard, transformers and timm compressed in place, restored, saved, loaded and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import refused
from torch import Tensor, nn

import regard
from regard.compression import calibration, load_compressed, quantize, text_windows
from regard.compression.calibration import Chain, Statistics
from regard.compression.layer_work import compress_layer
from regard.compression.layers import find_layers, run_batch
from regard.compression.recipes import ALL, read_recipe
from regard.layers.quantized import Format, QuantizedEmbedding, QuantizedLinear, replace_module
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig, from_pretrained
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig

VOCABULARY = 40


def language_model(**options: Any) -> LanguageModel:
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "num_heads": 2, "num_layers": 3} | options
    return LanguageModel(LanguageModelConfig(**sizes)).eval()


def windows(count: int = 3, length: int = 40) -> list[Tensor]:
    return [torch.randint(0, VOCABULARY, (2, length)) for _ in range(count)]


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **sizes, **options)
    return transformers.LlamaForCausalLM(config).eval()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize(
    "recipe",
    [
        *(name for name in ALL if name != "tokens"),
        "gptq:bits=8",
        "gptq:order=columns,symmetric=false",
        "int4:bits=3,calibrate=kl",
    ],
)
def test_a_language_model_is_compressed_saved_loaded_and_undone(recipe, tmp_path):
    model, data = language_model(), windows()
    before = model(data[0]).output
    layers = list(model.modules())
    small = regard.compress(model, recipe, data)
    assert small.model is model and small.report.bytes_after < 0.6 * small.report.bytes_before
    assert all(isinstance(model.get_submodule(layer.name), QuantizedLinear) for layer in small.report.layers)
    after = model(data[0]).output
    bits = read_recipe(recipe).rounding.format.bits
    assert 0 < distance(after, before) < (0.02 if bits == 8 else 0.3)
    tokens = model.generate(data[0][:, :5], 6)
    small.save(tmp_path)
    refused("saved or undone", small.undo)
    for read in (load_compressed, from_pretrained):
        again: Any = read(tmp_path)
        assert torch.equal(again(data[0]).output, after) and torch.equal(again.generate(data[0][:, :5], 6), tokens)
    model = language_model()
    before = model(data[0]).output
    assert torch.equal(regard.compress(model, recipe, data).undo()(data[0]).output, before)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in layers]


def test_gptq_loses_less_than_rounding_and_reports_what_each_layer_loses():
    model, data = language_model(), windows(8)
    errors = {}
    for recipe in ("int4", "gptq"):
        small = regard.compress(model, recipe, data)
        x: list[Tensor] = []
        name = "blocks.0.feed_forward.down"
        made: Any = model.get_submodule(name)
        errors[recipe] = [layer.output_error or layer.error for layer in small.report.layers]
        small.undo()
        original: Any = model.get_submodule(name)
        handle = original.register_forward_pre_hook(lambda module, given, x=x: x.append(given[0].flatten(0, 1)))
        model(data[0])
        handle.remove()
        expected = x[0] @ original.weight.T
        errors[f"{recipe} of a layer"] = distance(x[0] @ made.weight.T, expected)
        report = next(layer for layer in small.report.layers if layer.name == name)
        assert report.error == pytest.approx(distance(made.weight, original.weight), rel=1e-4)
    assert errors["gptq of a layer"] < errors["int4 of a layer"]
    assert max(errors["gptq"][:-1]) < max(errors["int4"][:-1])


def test_statistics_of_a_chain_of_blocks_are_those_of_the_model_so_far():
    """Blocks run once for each batch, on the outputs of the quantized blocks before them, as if everything ran again."""
    recipe = read_recipe("int4:bits=2")
    for model in (language_model(), llama()):
        data = windows()
        layers = find_layers(model).body
        chain = Chain.of(model, layers, data, run_batch)
        assert len(chain.blocks) == len(chain.groups) == 3
        slow = Chain(model, data, run_batch, chain.groups, [], chain.calls)
        for i, (_, stages) in enumerate(chain.groups):
            for stage, names in enumerate(stages):
                found, expected = (c.statistics(i, stage, layers, second=True) for c in (chain, slow))
                assert found.keys() == set(names)
                for name in names:
                    assert found[name].rows == expected[name].rows == 3 * 80
                    assert torch.allclose(found[name].second, expected[name].second, rtol=1e-4, atol=1e-4)
                    assert torch.allclose(found[name].largest, expected[name].largest, rtol=1e-5, atol=1e-6)
                for name in names:
                    made, _ = compress_layer(name, layers[name], recipe, None)
                    replace_module(model, layers[name], made)
            chain.finish(i)


def test_awq_alone_ends_its_grids_where_the_outputs_lose_less():
    x, linear = torch.randn(400, 64) * torch.logspace(-1, 1, 64), nn.Linear(64, 128, bias=False)
    statistics = Statistics(64, True)
    statistics.update(x)
    made = [compress_layer("x", linear, read_recipe(recipe), statistics) for recipe in ("awq", "awq + int4")]
    expected = x @ linear.weight.detach().T
    lost = [distance(layer(x), expected) for layer, _ in made]
    assert lost[0] < lost[1]
    assert [report.output_error for _, report in made] == pytest.approx(lost, rel=1e-3)


def test_a_layer_sees_what_the_quantized_layers_before_it_in_its_block_give():
    model, data = llama(), windows()
    layers = find_layers(model).body
    for _, stages in Chain.of(model, layers, data, run_batch).groups:
        kinds = [{name.rpartition(".")[2] for name in stage} for stage in stages]
        assert kinds == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    small = regard.compress(model, "gptq:bits=2", data)
    lost = {layer.name: layer.output_error for layer in small.report.layers}
    for name, layer in layers.items():
        made: Any = model.get_submodule(name)
        seen: list[Tensor] = []
        handle = made.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0].flatten(0, 1)))
        for batch in data:
            run_batch(model, batch)
        handle.remove()
        x = torch.cat(seen)
        assert lost[name] == pytest.approx(distance(x @ made.dequantized().T, x @ layer.weight.T), rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_model_of_transformers_has_its_head_and_tied_table_in_8_bits(tied, tmp_path):
    model, data = llama(tie_word_embeddings=tied), windows()
    before = model(data[0]).logits
    small = regard.compress(model, "gptq:group=64", data)
    assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.format == Format(8)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding) == tied
    after = model(data[0]).logits
    assert 0 < distance(after, before) < 0.2
    tokens = model.generate(data[0][:1, :5], max_new_tokens=5, do_sample=False, pad_token_id=0)
    small.save(tmp_path)
    again: Any = load_compressed(tmp_path)
    assert type(again) is type(model) and torch.equal(again(data[0]).logits, after)
    assert torch.equal(again.generate(data[0][:1, :5], max_new_tokens=5, do_sample=False, pad_token_id=0), tokens)
    record = json.loads((tmp_path / "compression.json").read_text())
    assert record["report"]["steps"] == [
        {
            "gptq": {
                "calibrate": "mse",
                "head": "int8",
                "bits": 4,
                "group": 64,
                "symmetric": True,
                "order": "activations",
                "damping": 0.05,
            }
        }
    ]
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert stored < 1.2 * record["report"]["bytes_after"] + 20_000
    kept = llama(tie_word_embeddings=tied)
    before_head = kept.lm_head
    found = regard.compress(kept, "int8:head=keep")
    assert kept.lm_head is before_head and found.report.kept == {"lm_head": "head=keep"}


def scaled(kind: str) -> Any:
    """A model of transformers whose embedding is the head and multiplies what it looks up."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "Bart":
        half = {"attention_heads": 2, "ffn_dim": 64}
        sizes |= {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "scale_embedding": True}
        sizes |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in half.items()}
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).eval()
    config = getattr(transformers, f"{kind}Config")(num_key_value_heads=1, head_dim=16, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["Gemma", "Gemma3Text", "Bart"])
def test_a_tied_table_that_multiplies_its_rows_still_does_in_8_bits(kind, tmp_path):
    model, ids = scaled(kind), windows(1)[0]
    before = model(ids).logits
    small = regard.compress(model, "int8")
    tables = [x for x in model.modules() if isinstance(x, QuantizedEmbedding)]
    assert tables and all(x.factor == pytest.approx(32**0.5) for x in tables)
    after = model(ids).logits
    assert 0 < distance(after, before) < 0.05
    small.save(tmp_path)
    assert torch.equal(load_compressed(tmp_path)(ids).logits, after)
    model = scaled(kind)
    before = model(ids).logits
    assert distance(quantize(model, [ids]).model(ids).logits, before) < 0.1


@pytest.mark.parametrize("recipe", ["int8", "magnitude:ratio=0.5"])
def test_a_language_model_of_regard_for_transformers_is_loaded_from_its_compressed_folder(recipe, tmp_path):
    transformers = pytest.importorskip("transformers")
    from regard.integrations.transformers import RegardConfig, RegardForCausalLM

    config = RegardConfig(64, dim=32, plan="landmark:block=3", num_layers=2, num_heads=4)
    model, ids = RegardForCausalLM(config).eval(), torch.randint(3, 64, (2, 11))
    small = regard.compress(model, recipe)
    small.save(tmp_path)
    for loaded in (load_compressed(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(loaded(ids).logits, small.model(ids).logits)


@pytest.mark.parametrize("mechanism", ["selective_temperature", "complex_rotary"])
def test_a_hybrid_loads_in_a_new_process_whatever_its_memory_held(mechanism: str, tmp_path: Path) -> None:
    model, ids = llama(), torch.randint(VOCABULARY, (1, 9))
    regard.swap(model, mechanism)
    regard.compress(model, "int8").save(tmp_path)
    torch.save({"ids": ids, "logits": load_compressed(tmp_path)(ids).logits.detach()}, tmp_path / "expected.pt")
    poisoned = (
        "import sys, torch\n"
        "from regard.compression import load_compressed\n"
        "torch.use_deterministic_algorithms(True)  # fills memory that is not initialised with NaN\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "found = load_compressed(sys.argv[1])(expected['ids']).logits\n"
        "torch.testing.assert_close(found, expected['logits'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", poisoned, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_head_stays_where_its_table_may_compute_something_else():
    class Turned(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return -super().forward(ids)

    model, data = llama(tie_word_embeddings=True), windows(1)
    table = Turned(VOCABULARY, 32)
    table.weight = model.lm_head.weight
    model.set_input_embeddings(table)
    before = model(data[0]).logits
    small = regard.compress(model, "int8")
    assert model.get_input_embeddings() is table and distance(model(data[0]).logits, before) < 0.05
    assert "a Turned, which may compute something else" in small.report.kept["model.embed_tokens"]
    assert "the table of model.embed_tokens" in small.report.kept["lm_head"]


def test_image_models_of_regard_and_timm_and_encoders_keep_their_heads(tmp_path):
    timm = pytest.importorskip("timm")
    images = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    own = VisionTransformer(
        VisionTransformerConfig(image_size=32, patch=8, dim=32, num_layers=2, num_heads=2, num_classes=5)
    )
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    encoder = Encoder(EncoderConfig(vocab_size=VOCABULARY, dim=32, num_heads=2, num_layers=2, num_classes=3))
    for model, data in ((own, images), (other, images), (encoder, windows())):
        model.eval()
        before = model(data[0])
        small = regard.compress(model, "gptq", data)
        after = model(data[0])
        assert distance(*(getattr(x, "output", x).detach() for x in (after, before))) < 0.3
        assert any("head" in name or "classifier" in name for name in small.report.kept), small.report.kept
        small.save(tmp_path / type(model).__name__)
    into = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    again: Any = load_compressed(tmp_path / type(other).__name__, into=into)
    assert torch.equal(again(images[0]), other(images[0]))


def test_a_run_that_was_stopped_goes_on_at_its_block_to_the_same_codes(tmp_path, monkeypatch):
    data = windows()
    torch.manual_seed(3)
    model = language_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = regard.compress(model, "awq + gptq", data)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole.undo()

    def stop(name: str, done: int, count: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regard.compress(model, "awq + gptq", data, work=tmp_path, on_layer=stop)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(list(tmp_path.glob("block-*.safetensors"))) == 2
    seen = []
    statistics = calibration.Chain.statistics
    monkeypatch.setattr(
        calibration.Chain,
        "statistics",
        lambda self, group, *rest, **more: seen.append(group) or statistics(self, group, *rest, **more),
    )
    regard.compress(model, "awq + gptq", data, work=tmp_path)
    assert set(seen) == {2}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    refused("another run", regard.compress, language_model(), "awq + gptq", data, work=tmp_path)


def test_llm_int8_keeps_no_columns_with_an_infinite_threshold_and_all_with_none():
    data = windows()
    outputs = {}
    for recipe in ("w8a8", "llm_int8:threshold=1e30", "llm_int8:threshold=0", "llm_int8:threshold=1.5"):
        torch.manual_seed(1)
        model = language_model()
        outputs["float"] = model(data[0]).output
        small = regard.compress(model, f"{recipe}{',' if ':' in recipe else ':'}head=keep", data)
        outputs[recipe] = model(data[0]).output
        if recipe.endswith("1.5"):
            counts = {layer.name: layer.float_columns for layer in small.report.layers}
            assert 0 < sum(counts.values()) < sum(model.get_submodule(name).in_features for name in counts)
    assert torch.equal(outputs["w8a8"], outputs["llm_int8:threshold=1e30"])
    assert distance(outputs["llm_int8:threshold=0"], outputs["float"]) < 1e-5
    assert distance(outputs["llm_int8:threshold=1.5"], outputs["float"]) < distance(outputs["w8a8"], outputs["float"])


def test_smoothquant_and_outlier_columns_lose_less_than_plain_8_bits_where_inputs_have_outliers():
    losses = {}
    for recipe in ("w8a8", "smoothquant", "llm_int8:threshold=20"):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        x = torch.randn(300, 64)
        x[:, 7] *= 80
        expected = model(x)
        losses[recipe] = distance(regard.compress(model, recipe, [x]).model(x), expected)
    assert losses["smoothquant"] < losses["w8a8"] / 2 and losses["llm_int8:threshold=20"] < losses["w8a8"] / 2, losses


def test_columns_that_smoothing_tamed_are_rounded_and_the_others_are_kept():
    counts = {}
    for recipe in (
        "llm_int8:threshold=20",
        "smoothquant + llm_int8:threshold=20",
        "smoothquant + llm_int8:threshold=3",
    ):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(64, 64))
        x = torch.randn(300, 64)
        x[:, 7] *= 80
        counts[recipe] = regard.compress(model, recipe, [x]).report.layers[0].float_columns
    assert [*counts.values()] == [1, 0, 1], counts


@pytest.mark.parametrize("recipe", ["int8", "int4:symmetric=false"])
def test_a_model_that_is_given_a_dtype_keeps_its_scales_and_computes_as_before(recipe):
    model, data = language_model(), windows()
    regard.compress(model, recipe, data)
    few, many = data[0][:1, :5], data[1]
    before = [model(ids).output for ids in (few, many)]
    for dtype in (torch.float32, torch.float16):
        model.to(dtype)
        kept = {
            b.dtype
            for m in model.modules()
            if isinstance(m, QuantizedLinear)
            for b in (m.scale, m.offset)
            if b is not None
        }
        assert kept == {torch.bfloat16}
        if dtype == torch.float32:
            assert all(torch.equal(model(ids).output, y) for ids, y in zip((few, many), before, strict=True))


def test_code_that_reads_a_quantized_layers_weight_gets_what_acts_on_its_inputs():
    model = nn.Sequential(nn.Linear(48, 20))
    x = torch.randn(50, 48, dtype=torch.float64)
    for recipe in ("awq", "smoothquant", "llm_int8:threshold=1", "gptq:symmetric=false"):
        small = regard.compress(model, recipe, [x.float()])
        layer: Any = small.model[0]
        expected = x @ layer.dequantized(torch.float64).T + layer.bias.double()
        assert distance(layer.weight.double(), layer.dequantized(torch.float64)) < 1e-6
        assert distance(layer(x), expected) < (1e-6 if recipe in ("awq", "gptq:symmetric=false") else 0.02)
        small.undo()


def test_layers_that_are_not_recognised_are_named_as_kept():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "a": nn.Linear(16, 16),
            "b": Odd(16, 16),
            "c": nn.MultiheadAttention(16, 2),
            "d": nn.Conv1d(16, 16, 3),
            "e": nn.Linear(16, 16),
            "f": nn.Linear(16, 16),
        }
    )
    model["e"].register_forward_hook(lambda *given: None)
    small = regard.compress(model, "int8", keep=lambda name, module: name == "f")
    assert [layer.name for layer in small.report.layers] == ["a"]
    assert {name: reason.split()[0] for name, reason in small.report.kept.items()} == {
        "b": "an",
        "c": "its",
        "d": "a",
        "e": "its",
        "f": "as",
    }


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_matrices_of_experts_are_named_as_kept(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 16}
    sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes)).float()
    small = regard.compress(model, "int8")
    experts = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert experts < small.report.kept.keys() and "Experts, which is not" in small.report.kept[min(experts)]
    quantized = {f"{layer.name}.weight" for layer in small.report.layers}
    left = {name for name, x in model.named_parameters() if x.ndim > 1 and "embed_tokens" not in name}
    assert left == small.report.kept.keys() and not left & quantized


def test_what_cannot_be_compressed_is_refused_and_nothing_is_changed(tmp_path):
    model = language_model()
    refused("without data", regard.compress, model, "gptq")
    refused("batch of type str", regard.compress, model, "gptq", ["text"])
    refused("in float64", regard.compress, language_model().double(), "int8")
    refused("without linear layers", regard.compress, nn.Sequential(nn.Conv2d(3, 3, 3)), "int8")
    refused("one layer itself", regard.compress, nn.Linear(3, 3), "int8")
    diverged = language_model()
    nn.init.constant_(diverged.blocks[1].feed_forward.down.weight, torch.nan)
    refused("not finite", regard.compress, diverged, "int8")
    shared = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    shared[1].weight = shared[0].weight
    refused("share a weight", regard.compress, shared, "int8")
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    small = regard.compress(model, "int8")
    refused("quantized already", regard.compress, model, "int8")
    small.save(tmp_path)
    refused("shorter|tokens for windows", text_windows, torch.arange(10), 11, 1)
    (tmp_path / "compression.json").unlink()
    refused("a save that was stopped", load_compressed, tmp_path)
    refused("without compression.json", load_compressed, tmp_path / "nowhere")


def test_files_of_different_saves_are_refused(tmp_path):
    for name, recipe in (("a", "int8"), ("b", "int4")):
        model = llama()
        regard.compress(model, recipe).save(tmp_path / name)
    one, other = (tmp_path / name / "compressed.safetensors" for name in ("a", "b"))
    one.write_bytes(other.read_bytes())
    refused("different saves", load_compressed, tmp_path / "a")
