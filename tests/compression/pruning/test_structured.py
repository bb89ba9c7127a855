"""The recipe ``structured``: which parts are removed, formats that other libraries read, and losses of items."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from support import close, refused
from test_cuts import (
    VOCABULARY,
    batch,
    bert,
    distilbert,
    encoder,
    gpt2,
    gpt_neox,
    language_model,
    llama,
    open_gpt2,
    opt,
    output,
    vit,
)
from torch import nn
from torch.nn import functional as F

import regard
from regard.compression import load_compressed
from regard.compression.layers import run_batch
from regard.compression.pruning import records
from regard.compression.pruning.anatomy import Cut, find_host
from regard.compression.pruning.checked import compact
from regard.compression.pruning.losses import item_losses
from regard.compression.pruning.scores import choose, layer_likeness
from regard.compression.pruning.steps import Structured
from regard.models import from_pretrained
from regard.tasks.protocol import Batch


@pytest.mark.parametrize("make", [language_model, encoder, llama, bert, gpt2, gpt_neox, opt, distilbert])
def test_a_model_is_made_smaller_saved_loaded_and_undone(make, tmp_path):
    model, ids = make().float(), batch()
    before = output(model, ids)
    small = regard.compress(model, "structured:heads=0.5,neurons=0.25,layers=1", [ids])
    assert small.report.bytes_after < 0.8 * small.report.bytes_before and "parameters are left" in str(small.report)
    after = output(model, ids)
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), ids), after, 1e-6)
    model = make().float()
    before = output(model, ids)
    close(output(regard.compress(model, "structured:heads=0.5,layers=1", [ids]).undo(), ids), before, 0.0)


def test_what_is_left_alike_in_all_layers_loads_in_transformers_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, ids = llama(num_key_value_heads=2).float(), batch()
    small = regard.compress(model, "structured:heads=0.5,neurons=0.25,layers=1", [ids])
    assert not any("cannot represent" in note for note in small.report.notes)
    expected = output(model, ids)
    small.save(tmp_path / "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", local_files_only=True).eval()
    close(output(again, ids), expected, 1e-6)
    assert again.config.intermediate_size == 18 and again.config.num_hidden_layers == 3
    other = bert().float()
    small = regard.compress(other, "structured:neurons=0.5,layers=1", [ids])
    expected = output(other, ids)
    small.save(tmp_path / "bert")
    kind = transformers.AutoModelForSequenceClassification
    close(output(kind.from_pretrained(tmp_path / "bert", local_files_only=True).eval(), ids), expected, 1e-6)
    for make in (gpt2, gpt_neox, opt, distilbert):
        other = make().float()
        small = regard.compress(other, "structured:neurons=0.5,layers=1", [ids])
        expected = output(other, ids)
        small.save(tmp_path / make.__name__)
        again, told = type(other).from_pretrained(tmp_path / make.__name__, output_loading_info=True)
        close(output(again.eval(), ids), expected, 1e-6)
        assert not any(told.values()), told
    assert any(
        "cannot represent" in note for note in regard.compress(bert(), "structured:heads=0.5", [ids]).report.notes
    )


def test_lists_of_a_config_lose_the_entries_of_layers_that_go(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "pad_token_id": 0}
    rope = transformers.SmolLM3Config(
        num_key_value_heads=2, no_rope_layers=[1, 0, 0, 1], eos_token_id=[1, 2, 3, 4], **sizes
    )
    windows = transformers.LongformerConfig(attention_window=[4, 8, 12, 16], bos_token_id=1, **sizes)
    ids = torch.randint(5, VOCABULARY, (2, 16))
    for recipe in ("structured:layers=2,layers_by=even", "distil:layers=2,steps=1"):
        model = transformers.SmolLM3ForCausalLM(copy.deepcopy(rope)).eval()
        small = regard.compress(model, recipe, [ids])
        rotated = [layer.self_attn.use_rope for layer in model.model.layers]
        assert model.config.no_rope_layers == rotated and len(rotated) == 2
        assert model.config.eos_token_id == [1, 2, 3, 4]
        expected = output(model, ids)
        small.save(tmp_path)
        close(output(load_compressed(tmp_path), ids), expected, 1e-6)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
        close(output(loaded, ids), expected, 1e-6)
    model = transformers.LongformerForMaskedLM(windows).eval()
    small = regard.compress(model, "structured:layers=2,layers_by=even", [ids])
    assert model.config.attention_window == [
        2 * layer.attention.self.one_sided_attn_window_size for layer in model.longformer.encoder.layer
    ]
    expected = output(model, ids)
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), ids), expected, 1e-6)
    small = regard.compress(transformers.SmolLM3ForCausalLM(rope), "structured:layers=1,layers_by=even")
    assert small.undo().config.no_rope_layers == [1, 0, 0, 1]


@pytest.mark.parametrize("recipe", ["structured:layers=2,neurons=0.3", "structured:heads=0.5,layers=1"])
def test_a_vision_transformer_of_timm_loses_parts_and_timm_loads_what_it_has_words_for(recipe, tmp_path):
    timm = pytest.importorskip("timm")
    model, images = vit().float(), batch("timm").float()
    before = output(model, images)
    small = regard.compress(model, recipe, [images])
    expected = output(model, images)
    assert small.report.bytes_after < 0.8 * small.report.bytes_before and not torch.allclose(before, expected)
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), images), expected, 1e-6)
    untold = any("cannot represent" in note for note in small.report.notes)
    assert untold == ("heads" in recipe)
    if untold:
        with pytest.raises(RuntimeError, match="Unknown model"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    else:
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        close(output(loaded, images), expected, 1e-6)
        assert (len(loaded.blocks), loaded.blocks[0].mlp.fc1.out_features) == (2, 17)
    model = vit().float()
    before = output(model, images)
    undone: Any = regard.compress(model, recipe + " + int8", [images]).undo()
    close(output(undone, images), before, 0.0)
    assert undone._model_args["depth"] == 4 and undone._model_args["mlp_ratio"] == 1.5


def test_taking_parts_and_rounding_go_together(tmp_path):
    for make in (language_model, llama, gpt2):
        model, ids = make(dim=32).float() if make is language_model else make().float(), batch()
        small = regard.compress(model, "structured:heads=0.25,neurons=0.3 + wanda:ratio=0.2 + int8", [ids])
        expected = output(model, ids)
        small.save(tmp_path / make.__name__)
        close(output(load_compressed(tmp_path / make.__name__), ids), expected, 0.0)
    assert isinstance(from_pretrained(tmp_path / "language_model"), nn.Module)
    for make in (language_model, llama, gpt2):
        model = make().float()
        before = output(model, ids)
        close(output(regard.compress(model, "structured:neurons=0.3,layers=1 + int8", [ids]).undo(), ids), before, 0.0)


def test_a_record_that_is_not_of_the_model_is_refused(tmp_path):
    regard.compress(bert().float(), "structured:heads=0.5,by=magnitude").save(tmp_path)
    record = json.loads((tmp_path / "compression.json").read_text())
    for structure in ({"layers": record["structure"]["layers"][1:]}, {"layers": [{"units": 2}] * 4}, {"layers": 3}):
        (tmp_path / "compression.json").write_text(json.dumps(record | {"structure": structure}))
        refused("compression.json", load_compressed, tmp_path)


def test_parts_that_add_nothing_go_first():
    for by, share in (("activation", 0.5), ("magnitude", 0.5)):
        model, ids = language_model(), batch()
        block = model.blocks[2]
        with torch.no_grad():
            block.mixer.output.weight[:, 4:12] = 0
            block.feed_forward.down.weight[:, ::2] = 0
        (_, _, cut, _) = choose(find_host(model), Structured(heads=share, neurons=share, by=by), [ids], run_batch)
        assert sorted(cut.heads) == [1, 2] and sorted(cut.neurons) == list(range(0, 24, 2))
    with torch.no_grad():
        for linear in (block.mixer.output, block.feed_forward.down):
            linear.weight.zero_()
    likeness = layer_likeness(find_host(model), [ids], run_batch)
    assert likeness[2] == pytest.approx(1) and max(range(4), key=likeness.__getitem__) == 2
    assert choose(find_host(model), Structured(layers=1), [ids], run_batch)[2] == Cut(layer=True)


def test_numbers_that_are_small_by_themselves_may_matter_by_their_inputs():
    """Scores by magnitude consider only the weights."""
    model, ids = language_model(), batch()
    block = model.blocks[0]
    with torch.no_grad():
        block.feed_forward.down.weight[:, 3] *= 1e-3
        block.feed_forward.up.weight[3] *= 1e6
    smallest = {
        by: choose(find_host(model), Structured(neurons=0.05, by=by), [ids], run_batch)[0].neurons
        for by in ("activation", "magnitude")
    }
    assert smallest["magnitude"] == (3,) != smallest["activation"]


def test_layers_that_keep_names_stay_whole():
    model, ids = language_model(), batch()
    before = [block for block in model.blocks]
    step = "structured:neurons=0.5,layers=1,heads=0.5"
    regard.compress(model.float(), step, [ids], keep=lambda name, module: name in ("blocks.0", "blocks.1"))
    assert list(model.blocks)[:2] == before[:2] and len(model.blocks) == 3


def of_transformers(name: str, head: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_key_value_heads": 4, "embedding_size": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **tokens, **options)
    return getattr(transformers, f"{name}For{head}")(config).eval()


@pytest.mark.parametrize(
    ("name", "head", "parts", "options"),
    [
        ("Olmo2", "CausalLM", ("heads",), {}),
        ("Cohere", "CausalLM", ("heads",), {"use_qk_norm": True}),
        ("BitNet", "CausalLM", ("heads", "neurons"), {}),
        ("MegatronBert", "MaskedLM", ("heads",), {}),
        ("BigBird", "MaskedLM", ("heads",), {}),
    ],
)
def test_parts_that_more_belongs_to_are_refused_and_a_search_leaves_them(name, head, parts, options, tmp_path):
    model, ids = of_transformers(name, head, **options), torch.randint(5, VOCABULARY, (2, 11))
    before = output(model, ids)
    for part in ("heads", "neurons"):
        if part in parts:
            refused(f"taking {part} out of", regard.compress, model, f"structured:{part}=0.5,by=magnitude")
        else:
            regard.compress(model, f"structured:{part}=0.5,by=magnitude").undo()
        close(output(model, ids), before, 0.0)
    regard.compress(model, "structured:layers=1", [ids]).undo()
    data = [{"input_ids": ids, "labels": ids}]
    small = regard.compress(model, "axformer:focus=size,slack=0.5,hard=0,groups=2", data)
    expected = output(model, ids)
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), ids), expected, 1e-6)


def test_weights_of_gpt2_fit_what_its_config_and_record_describe():
    model = open_gpt2()
    assert records.why_not_built(model) is None
    compact(find_host(model), [Cut(heads=(1,)), Cut(neurons=(2,)), Cut(attention=True), Cut()], (3,))
    assert records.why_not_built(model) is None
    del model._regard_structure
    assert "another size of transformer.wte" in records.why_not_built(model)


def test_what_a_config_cannot_say_is_recorded_or_refused(tmp_path):
    model, ids = of_transformers("Helium", "CausalLM", head_dim=4), torch.randint(5, VOCABULARY, (2, 11))
    small = regard.compress(model, "structured:heads=0.5,by=magnitude")
    expected = output(model, ids)
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), ids), expected, 1e-6)
    refused(
        "another size of esm.contact_head",
        regard.compress,
        of_transformers("Esm", "MaskedLM"),
        "structured:layers=1,layers_by=even",
    )


def test_a_cut_that_does_not_fit_a_layer_leaves_the_model_as_it_was():
    model, ids = of_transformers("MegatronBert", "MaskedLM"), torch.randint(5, VOCABULARY, (2, 11))
    before = output(model, ids)
    refused(
        "norms come before its branches",
        compact,
        find_host(model),
        [Cut(neurons=(1,)), Cut(attention=True), Cut(), Cut()],
    )
    close(output(model, ids), before, 0.0)
    assert records.structure(model) is None


def test_losses_of_items_are_those_of_torch():
    model, ids = language_model(), batch()
    logits = model(ids).output[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)
    close(item_losses(model, ids, run_batch), expected)
    classifier, classes = bert(), torch.tensor([0, 2])
    expected = F.cross_entropy(classifier(ids).logits, classes, reduction="none")
    close(item_losses(classifier, {"input_ids": ids, "labels": classes}, run_batch), expected)
    own = encoder()
    close(item_losses(own, Batch(ids, classes), run_batch), F.cross_entropy(own(ids).output, classes, reduction="none"))


def test_one_number_for_an_item_is_judged_by_its_square_error():
    """A single logit means regression, so cross entropy does not apply, whatever the labels' dtype."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes)
    model, ids = transformers.BertForSequenceClassification(config).double().eval(), batch()
    found = model(ids).logits[:, 0]
    for labels in (torch.tensor([1.5, -2.0]), torch.tensor([1, 3])):
        close(item_losses(model, {"input_ids": ids, "labels": labels}, run_batch), (found - labels).square())


def test_what_cannot_be_done_is_refused_and_nothing_is_changed():
    model: Any = language_model(positions="alibi")
    names = [name for name, _ in model.named_parameters()]
    refused("differ from head to head", regard.compress, model, "structured:heads=0.5,by=magnitude")
    refused("without data", regard.compress, model, "structured:neurons=0.5")
    refused("fewer than 4", regard.compress, model, "structured:layers=4", [batch()])
    refused("in float64", regard.compress, model, "structured:neurons=0.5,by=magnitude + int8")
    assert [name for name, _ in model.named_parameters()] == names
    refused("losses of a batch", item_losses, model, "text", run_batch)
