"""regard inside transformers: attention functions, swapped models, and regard's own models as theirs."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import regard
from regard import Unsupported
from regard.contract import Mask

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("regard.integrations.transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KEPT = torch.ones(3, 9, dtype=torch.long)
KEPT[1, :3] = 0
KEPT[2, 7:] = 0


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options)).eval()


def mistral():
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralForCausalLM(config).eval()


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def ids(batch=3, length=9):
    return torch.randint(1, 64, (batch, length))


@pytest.mark.parametrize("masked", [False, True])
def test_a_llama_swapped_to_softmax_stays_equal(masked):
    model = llama()
    swapped = copy.deepcopy(model)
    assert len(regard.swap(swapped, "softmax").changed) == 2
    tokens, mask = ids(), KEPT if masked else torch.ones_like(KEPT)
    with torch.no_grad():
        found, expected = (m(tokens, attention_mask=mask).logits for m in (swapped, model))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_bert_swapped_to_softmax_stays_equal(masked):
    model = bert()
    swapped = copy.deepcopy(model)
    assert len(regard.swap(swapped, "softmax").changed) == 2
    tokens, mask = ids(), KEPT if masked else torch.ones_like(KEPT)
    with torch.no_grad():
        found, expected = (m(tokens, attention_mask=mask).last_hidden_state for m in (swapped, model))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_by_the_attention_function_gives_the_same_tokens(options):
    model = llama()
    other = copy.deepcopy(model)
    other.set_attn_implementation("regard:softmax")
    mask = torch.ones_like(KEPT)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    tokens = ids()
    assert torch.equal(other.generate(tokens, **settings), model.generate(tokens, **settings))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("make", [llama, mistral])
def test_a_growing_cache_gives_the_same_tokens(make, options):
    model = make()
    tokens = ids(batch=1 if "prompt_lookup_num_tokens" in options else 3)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(tokens, **{bridge.CACHE: bridge.GrowingCache(model.config)}, **settings)
    assert torch.equal(found, model.generate(tokens, **settings))


def test_decoding_goes_the_short_way_where_there_is_one(monkeypatch):
    model = llama(attn_implementation="regard:softmax").eval()
    lengths = []

    def watched(query, key, value, scale):
        lengths.append(key.shape[2])

    monkeypatch.setattr("regard.integrations.transformers.decode", watched)
    model.generate(ids(1, 9), max_new_tokens=4, do_sample=False)
    layers = model.config.num_hidden_layers
    assert lengths == [m for m in (10, 11, 12) for _ in range(layers)]


def test_a_growing_cache_does_not_copy_what_it_holds():
    model, cache, places = llama(), bridge.GrowingCache(), []
    with torch.no_grad():
        model(ids(length=40), **{bridge.CACHE: cache})
        for _ in range(4):
            model(ids(length=1), **{bridge.CACHE: cache})
            places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places[1:])) == 1
    assert cache.get_seq_length() == 44


def test_a_sliding_window_is_honoured():
    model = mistral()
    other = copy.deepcopy(model)
    other.set_attn_implementation("regard:softmax")
    tokens = ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(other.generate(tokens, **settings), model.generate(tokens, **settings))


def test_a_relative_bias_and_cross_attention_are_honoured():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    other = copy.deepcopy(model)
    other.set_attn_implementation("regard:softmax")
    if other.config._attn_implementation != "regard:softmax":
        pytest.skip("this version's T5 does not dispatch through the attention interface")
    source, target = ids(), ids(3, 5)
    with torch.no_grad():
        found, expected = (
            m(input_ids=source, attention_mask=KEPT, decoder_input_ids=target).logits for m in (other, model)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "gated_linear", "delta_rule", "sigmoid", "local"])
@pytest.mark.parametrize("make", [llama, bert])
def test_swapped_to_another_mechanism_a_model_trains(name, make):
    model = make().train()
    report = regard.swap(model, name)
    learned = dict(model.named_parameters())
    assert set(report.learned) <= set(learned)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens, losses = ids(), []
    for _ in range(6):
        output = model(tokens, attention_mask=KEPT)
        loss = output[0][KEPT.bool()].square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(learned[n].grad is not None and learned[n].grad.isfinite().all() for n in report.learned)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_learns_beside_the_projections_needs_a_swap_and_no_cache():
    model = llama()
    model.set_attn_implementation("regard:gated_linear")
    with pytest.raises(Unsupported, match=r'regard\.swap\(model, "gated_linear"\)'):
        model(ids())
    report = regard.swap(model, "gated_linear")
    assert not model.config.use_cache
    assert "use_cache is off" in str(report)
    tokens = model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (3, 12)
    with pytest.raises(Unsupported, match="use_cache=False"):
        model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=True)


def test_padding_has_no_effect_on_a_swapped_model():
    model = llama()
    regard.swap(model, "gated_linear")
    tokens = ids()
    position_ids = (KEPT.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(tokens, attention_mask=KEPT, position_ids=position_ids).logits
        torch.testing.assert_close(found[1, 3:], model(tokens[1:2, 3:]).logits[0], atol=1e-5, rtol=1e-5)


def test_only_some_layers_of_a_transformers_model_are_refused():
    with pytest.raises(Unsupported, match="share one attention function"):
        regard.swap(llama(), "softmax", only="model.layers.0.*")


PLANS = ["gated_linear", "delta_rule", "mamba2", ["softmax", "linear"], [("local", {"window": 3}), "mamba"], "landmark"]


def language_model(plan):
    layers = 2 if isinstance(plan, str) else None
    config = bridge.RegardConfig(vocab_size=64, dim=32, plan=plan, num_layers=layers, num_heads=4)
    return bridge.RegardForCausalLM(config).eval()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_our_language_models_generate_with_their_state(plan):
    model, tokens = language_model(plan), ids()
    mask = torch.ones_like(KEPT)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, **settings)
    assert torch.equal(found, model.generate(tokens, **settings, use_cache=False))
    assert torch.equal(found[:, 9:], model.model.generate(tokens, 6, mask=Mask(valid=mask.bool())))
    beams = model.generate(tokens, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(tokens, **settings, num_beams=3, use_cache=False))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_our_language_models_save_and_load_as_theirs(plan, tmp_path):
    model, tokens = language_model(plan), ids()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    again = transformers.AutoConfig.from_pretrained(tmp_path).language_model()
    assert again == model.config.language_model()


def test_labels_give_the_loss_of_the_next_token():
    model, tokens = language_model("gated_linear"), ids()
    output = model(tokens, labels=tokens)
    logits = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_importing_regard_does_not_import_transformers():
    code = (
        "import sys, regard, regard.models, regard.integrations; regard.swap; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stacks_that_transformers_cannot_hold_are_refused_and_others_are_saved(tmp_path):
    sizes = {"vocab_size": 20, "dim": 16, "num_heads": 2, "num_layers": 2}
    for stack in ({"share": "all"}, {"exits": [1]}):
        with pytest.raises(Unsupported, match="in transformers"):
            bridge.RegardConfig(**sizes, stack=stack)
    model = bridge.RegardForCausalLM(bridge.RegardConfig(**sizes, stack={"reversible": True})).eval()
    model.save_pretrained(tmp_path)
    again = bridge.RegardForCausalLM.from_pretrained(tmp_path)
    assert again.config.language_model().stack.reversible
    tokens = torch.randint(20, (2, 6))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
