"""regard inside transformers: attention functions, swapped models, and regard's own models as transformers models."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import GREEDY, KEPT, LEFT, SIZES, bart, bert, disturb, ids, llama, mistral, near, t5
from support import GRAPH

import regard
from regard import Unsupported
from regard.contract import Mask
from regard.integrations import change_options

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("regard.integrations.transformers")


@pytest.mark.parametrize("mask", [torch.ones_like(KEPT), KEPT], ids=["whole", "padded"])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_model_swapped_to_softmax_stays_equal(make, mask):
    model, tokens, seen = make(), ids(), mask.bool()
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask)[0]
        assert len(regard.swap(model, "softmax").changed) == 2
        near(model(tokens, attention_mask=mask)[0][seen], expected[seen])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("make", [llama, mistral])
def test_the_attention_function_and_a_growing_cache_give_the_same_tokens(make, options):
    model, alone = make(), "prompt_lookup_num_tokens" in options
    tokens = ids(batch=1 if alone else 3)
    settings = {"attention_mask": LEFT[: len(tokens)], "max_new_tokens": 6, **GREEDY, **options}
    expected, logits = model.generate(tokens, **settings), model(tokens).logits
    assert torch.equal(
        model.generate(tokens, **{bridge.CACHE: bridge.GrowingCache(model.config)}, **settings), expected
    )
    model.set_attn_implementation("regard:softmax")
    assert torch.equal(model.generate(tokens, **settings), expected)
    near(model(tokens).logits, logits)


@pytest.mark.parametrize("kept", [torch.ones_like(LEFT), LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_static_cache_gives_the_same_tokens(swapped, kept):
    model, tokens = llama(), ids()
    if swapped:
        regard.swap(model, "softmax")
    else:
        model.set_attn_implementation("regard:softmax")
    disturb(model)
    settings = {"attention_mask": kept, "max_new_tokens": 4, **GREEDY}
    expected = model.generate(tokens, **settings, use_cache=False)
    assert torch.equal(model.generate(tokens, **settings, cache_implementation="static"), expected)


@pytest.mark.parametrize("make", [llama, t5])
def test_the_empty_slots_of_a_static_cache_are_no_tokens(make):
    model, tokens = make(), ids()
    model.set_attn_implementation("regard:sigmoid")
    if model.config._attn_implementation != "regard:sigmoid":
        pytest.skip("this version's T5 does not dispatch through the attention interface")
    disturb(model)
    begun = {} if make is llama else {"encoder_outputs": model.get_encoder()(tokens)}
    name = "input_ids" if make is llama else "decoder_input_ids"
    cache, found = transformers.StaticCache(model.config, max_cache_len=20), []
    if make is t5:
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    with torch.no_grad():
        for piece in tokens.split([4, 3, 1, 1], 1):
            found.append(model(**{name: piece, bridge.CACHE: cache}, **begun, use_cache=True).logits)
        near(torch.cat(found, 1), model(**{name: tokens}, **begun, use_cache=False).logits)


def test_packed_texts_are_read_as_each_alone():
    model, tokens = llama(), ids(1, 20)
    regard.swap(model, "local:window=4")
    disturb(model)
    seen = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool).tril() for n in (9, 11)))
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    with torch.no_grad():
        alone = torch.cat([model(x, use_cache=False).logits for x in tokens.split([9, 11], 1)], 1)
        for packed in ({"position_ids": positions}, {"attention_mask": seen[None, None]}):
            near(model(tokens, use_cache=False, **packed).logits, alone)


def test_a_causal_mask_of_pairs_means_the_same_with_and_without_a_cache():
    model, tokens = llama(), ids(1, 9)
    regard.swap(model, "selective_temperature:token_features=tokens")
    disturb(model)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[5:, 3] = False
    with torch.no_grad():
        near(*(model(tokens, attention_mask=seen[None, None], use_cache=kept).logits for kept in (False, True)))


def test_a_window_in_a_model_with_a_wider_one_looks_back_only():
    model, tokens = mistral(), ids(1, 9)
    regard.swap(model, "local:window=3")
    with torch.no_grad():
        found = model(tokens, use_cache=False).logits
        near(found[:, :4], model(tokens[:, :4], use_cache=False).logits)


def test_decoding_goes_the_short_way_where_there_is_one(monkeypatch):
    model = llama(attn_implementation="regard:softmax").eval()
    lengths = []

    def watched(query, key, value, scale):
        lengths.append(key.shape[2])

    monkeypatch.setattr("regard.integrations.transformers.attending.decode", watched)
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


def test_a_relative_bias_and_cross_attention_are_honoured():
    model = t5()
    inputs = {"input_ids": ids(), "attention_mask": KEPT, "decoder_input_ids": ids(3, 5)}
    expected = model(**inputs).logits
    model.set_attn_implementation("regard:softmax")
    if model.config._attn_implementation != "regard:softmax":
        pytest.skip("this version's T5 does not dispatch through the attention interface")
    near(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    "mechanism", ["selective_temperature", "bigbird:block=2,first_blocks=0,last_blocks=0,random_blocks=0"]
)
def test_padding_before_a_text_does_not_count_beside_a_relative_bias(mechanism):
    model = t5().encoder.double()
    regard.swap(model, mechanism)
    disturb(model)
    model.eval()
    tokens = ids()
    with torch.no_grad():
        together = model(tokens, attention_mask=LEFT).last_hidden_state
        near(together[1, 3:], model(tokens[1:2, 3:]).last_hidden_state[0])


@pytest.mark.parametrize(("make", "reading"), [(bart, "*encoder_attn"), (t5, "*EncDecAttention")])
def test_a_decoder_reads_an_encoder_without_seeing_later_tokens(make, reading):
    with pytest.raises(Unsupported, match="in the pattern causal-cross"):
        regard.swap(make(), "nystrom", only=reading)
    model = bart().double()
    regard.swap(model, "sea", pattern="causal-cross", only="*encoder_attn")
    disturb(model)
    tokens, target = ids(), ids(length=6)
    with torch.no_grad():
        whole = model(tokens, decoder_input_ids=target).logits
        near(model(tokens, decoder_input_ids=target[:, :4]).logits, whole[:, :4])


def bert_gpt2():
    crossing = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    decoder = transformers.GPT2LMHeadModel(crossing)
    return transformers.EncoderDecoderModel(encoder=bert(), decoder=decoder).eval()


def bert_bert():
    crossing = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderModel(encoder=bert(), decoder=transformers.BertLMHeadModel(crossing)).eval()


@pytest.mark.parametrize("make", [bart, bert_gpt2, bert_bert])
def test_an_implementation_whose_queries_see_later_ones_is_refused_where_a_decoder_reads_an_encoder(make):
    model = make()
    disturb(model)
    tokens, target = ids(), ids(length=6)
    model.set_attn_implementation("regard:linear")
    with torch.no_grad():
        whole = model(input_ids=tokens, decoder_input_ids=target).logits
        near(model(input_ids=tokens, decoder_input_ids=target[:, :4]).logits, whole[:, :4])
    model.set_attn_implementation("regard:flow_attention")
    with pytest.raises(Unsupported, match=r"flow_attention\" in an? \w+, where queries would see later ones"):
        model(input_ids=tokens, decoder_input_ids=target)


def test_queries_that_are_no_text_read_an_encoder_all_at_once():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.DetrConfig(
        **sizes, **heads, use_timm_backbone=False, backbone_config=transformers.ResNetConfig()
    )
    with torch.device("meta"):
        model = transformers.models.detr.modeling_detr.DetrDecoder(config)
    report = regard.swap(model, "linear")
    assert {told.rpartition(" ")[2] for told in report.changed.values()} == {"noncausal-self", "noncausal-cross"}


def test_a_mechanism_without_a_bias_is_refused_where_a_model_adds_one_before_anything_is_changed():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    beit = [
        transformers.BeitConfig(**sizes, image_size=16, patch_size=8, **{kind: True})
        for kind in ("use_relative_position_bias", "use_shared_relative_position_bias")
    ]
    models = [t5(), *map(transformers.BeitModel, beit)]
    for model in models:
        with pytest.raises(Unsupported, match=r"linear, whose scores take no bias, in a \w+Attention"):
            regard.swap(model, "linear")
        assert not [name for name, _ in model.named_modules() if name.endswith("regard")]
        assert regard.swap(model, "softmax").changed
    plain = transformers.BeitModel(transformers.BeitConfig(**sizes, image_size=16, patch_size=8)).eval()
    assert len(regard.swap(plain, "linear").changed) == 2
    assert plain(torch.randn(1, 3, 16, 16)).last_hidden_state.isfinite().all()


def gemma():
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=50.0)
    return transformers.Gemma2ForCausalLM(config).eval()


def gpt_oss():
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).eval()


@pytest.mark.parametrize(("make", "told"), [(gemma, "caps scores at 50.0"), (gpt_oss, "has attention sinks")])
def test_a_softcap_and_sinks_are_taken_over_or_the_swap_is_refused(make, told):
    model, tokens = make(), ids()
    expected = model(tokens).logits
    with pytest.raises(Unsupported, match=told):
        regard.swap(model, "local")
    regard.swap(model, "softmax")
    near(model(tokens).logits, expected)


def test_a_text_model_that_is_called_causally_is_planned_so():
    sizes = {**SIZES, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)).eval()
    with pytest.raises(Unsupported, match="nystrom in the pattern causal-self"):
        regard.swap(model, "nystrom")
    report = regard.swap(model, "agent")
    assert not report.notes
    assert model(ids()).last_hidden_state.isfinite().all()


def test_what_learns_beside_the_projections_needs_a_swap():
    model = llama()
    model.set_attn_implementation("regard:gated_linear")
    with pytest.raises(Unsupported, match=r'regard\.swap\(model, "gated_linear"\)'):
        model(ids())
    assert "Generation goes on from the state of gated_linear" in str(regard.swap(model, "gated_linear"))
    assert model.generate(ids(), max_new_tokens=3, **GREEDY).shape == (3, 12)


def test_where_no_cache_suffices_it_is_off_until_another_swap():
    model = mistral()
    report = regard.swap(model, "gated_linear")
    assert not model.config.use_cache
    assert "use_cache is off: gated_linear" in str(report)
    assert model.generate(ids(length=2), max_new_tokens=2, **GREEDY).shape == (3, 4)
    with pytest.raises(Unsupported, match="use_cache=False"):
        model.generate(ids(length=2), max_new_tokens=2, **GREEDY, use_cache=True)
    assert "with the model's cache of keys and values" in str(regard.swap(model, "linear"))
    assert model.config.use_cache and model.generation_config.use_cache


def test_a_model_whose_rotation_cannot_be_left_out_refuses_what_would_misread_it():
    for name, told in (
        ("selective_temperature", "reads queries and keys before their rotation"),
        ("complex_rotary", "rotates queries and keys itself"),
        ("norm_linear", "maps queries and keys before their rotation"),
    ):
        with pytest.raises(Unsupported, match=told):
            regard.swap(deepseek(), name)
    with pytest.raises(Unsupported, match="reads keys before their rotation"):
        regard.swap(deepseek(), "core_context", pool_keys="pre_rope")


def test_where_transformers_does_not_say_how_images_are_laid_out_the_swap_is_refused():
    vit = transformers.ViTModel(transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(Unsupported, match="lays tokens out"):
        regard.swap(vit, "agent")


@pytest.mark.parametrize("name", ["complex_rotary", "selective_temperature", "sea"])
def test_shifted_positions_change_nothing_for_mechanisms_that_know_only_distances(name):
    """If queries were rotated before the mechanism reads them, it would see absolute positions."""
    model, tokens = llama(), ids()
    regard.swap(model, name)
    disturb(model)
    places = torch.arange(9)[None]
    with torch.no_grad():
        found, expected = (model(tokens, position_ids=places + shift).logits for shift in (7, 0))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_threads_do_not_see_each_other_s_tokens():
    model = llama()
    regard.swap(model, "gated_linear")
    both = threading.Barrier(2)

    def meet(*_):
        both.wait(timeout=60)

    def run(tokens):
        with torch.no_grad():
            return model(tokens).logits

    inside = model.model.layers[1].self_attn.v_proj.register_forward_hook(meet)
    texts = ids(2, 9), ids(2, 9)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, texts))
    inside.remove()
    for tokens, logits in zip(texts, found, strict=True):
        torch.testing.assert_close(logits, run(tokens))


HYBRID = {"*.0.*": None, "*": ("local", {"window": 2})}
ROUTED = {"*": ("mixture_of_heads", {"shared_heads": 0, "mechanism": "selective_temperature"})}
SAVED = ["gated_linear", "performer", "sigmoid", "core_context:group=3,window=4", HYBRID, ROUTED]


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("asked", SAVED, ids=str)
def test_a_swapped_model_is_saved_and_loaded_with_its_mechanisms(asked, make, tmp_path):
    model = make()
    regard.swap(model, asked)
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    tokens = ids()
    with torch.no_grad():
        expected = model(tokens, attention_mask=KEPT, use_cache=False)[0]
        for other in (loaded, again):
            assert torch.equal(other(tokens, attention_mask=KEPT, use_cache=False)[0], expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.config.use_cache == model.config.use_cache
    if make is llama:
        base = transformers.AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
        assert torch.equal(*(m.generate(tokens, max_new_tokens=3, **GREEDY) for m in (loaded, model)))


def siglip():
    text = {**SIZES, "projection_size": 32, "eos_token_id": 2}
    vision = {name: n for name, n in SIZES.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def deepseek():
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(**SIZES, **ranks, num_key_value_heads=4, first_k_dense_replace=2)
    return transformers.DeepseekV3ForCausalLM(config)


MORE = {
    bart: lambda: {"input_ids": ids(), "attention_mask": KEPT, "decoder_input_ids": ids(3, 5)},
    siglip: lambda: {"input_ids": ids(), "pixel_values": torch.randn(3, 3, 16, 16)},
    deepseek: lambda: {"input_ids": ids()},
}


@pytest.mark.parametrize("make", MORE)
def test_cross_attention_pooling_and_heads_of_two_widths_are_swapped_saved_and_given_back(make, tmp_path):
    model, inputs = make().eval(), MORE[make]()

    def outputs(model):
        with torch.no_grad():
            return next(x for x in model(**inputs).to_tuple() if torch.is_tensor(x) and x.ndim > 1)

    before = outputs(model)
    regard.swap(model, "softmax")
    near(outputs(model), before)
    regard.swap(model, "gated_linear")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    changed = outputs(model)
    assert torch.equal(outputs(loaded), changed) and not torch.allclose(changed, before, atol=1e-5)
    regard.unswap(loaded)
    assert torch.equal(outputs(loaded), before)


def test_a_saved_model_is_not_loaded_as_another(tmp_path, monkeypatch):
    model = llama()
    regard.swap(model, "linear")
    model.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="saved with other mechanisms"):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.regard["modules"].pop("layers.1.self_attn")
    partly = transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    with pytest.raises(Unsupported, match="names no mechanism"):
        partly(ids())
    monkeypatch.delitem(
        transformers.AttentionInterface._global_mapping, bridge.SWAPPED
    )  # as if regard was not imported
    with pytest.raises(ValueError, match=bridge.SWAPPED):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [llama, bert])
def test_unswap_gives_back_the_model_and_a_second_swap_is_as_the_first(make):
    model, tokens = make(), ids()
    before, once = copy.deepcopy(model), copy.deepcopy(model)
    weights, settings = set(model.state_dict()), model.config.to_dict()
    regard.swap(model, "gated_linear")
    regard.swap(model, "local", window=2)
    regard.swap(once, "local", window=2)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], once(tokens)[0])
        report = regard.unswap(model, only="*0*")
        assert len(report.changed) == len(report.kept) == 1
        regard.swap(once, {"*0*": "softmax"})
        assert torch.equal(model(tokens)[0], once(tokens)[0])
        assert list(regard.unswap(model).changed) == report.kept
        assert torch.equal(model(tokens)[0], before(tokens)[0])
    assert set(model.state_dict()) == weights
    assert model.config.to_dict() == settings
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(Unsupported, match="without swapped modules"):
        regard.unswap(model)


@pytest.mark.parametrize("second", ["complex_rotary", "sea:top_k=4,estimate_length=16,length=32"])
@torch.no_grad()
def test_a_second_swap_gets_queries_before_their_rotation_as_a_first_one_does(second):
    model, tokens = llama(), ids()
    twin = copy.deepcopy(model)
    for mechanism in ("linear", second):
        torch.manual_seed(0)
        regard.swap(model, mechanism)
    torch.manual_seed(0)
    regard.swap(twin, second)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(tokens).logits, twin(tokens).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_all_that_is_learned_is_trained_and_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    model, tokens = llama().train(), ids()
    learned = regard.swap(model, {"*.0.*": "gated_linear", "*": "local"}).learned
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(tokens, attention_mask=KEPT, labels=tokens).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert learned and all(found[0][name].isfinite().all() and found[0][name].any() for name in learned)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's warning about names in transformers
def test_peft_trains_and_saves_what_a_mechanism_learns(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokens = llama(), ids()
    regard.swap(model, "gated_linear")
    base = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[bridge.PLACE]))
    gates = {name: p for name, p in wrapped.named_parameters() if "key_gate" in name and p.requires_grad}
    wrapped(tokens, labels=tokens).loss.backward()
    assert gates and all(p.grad.abs().max() > 0 for p in gates.values())
    with torch.no_grad():
        for parameter in gates.values():
            parameter.normal_()
        wrapped.save_pretrained(tmp_path)
        expected = wrapped.eval()(tokens).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(tokens).logits, expected)
        near(loaded.merge_and_unload()(tokens).logits, expected)


PLANS = ["gated_linear", "delta_rule", "mamba2", ["softmax", "linear"], [("local", {"window": 3}), "mamba"], "landmark"]


def language_model(plan):
    layers = 2 if isinstance(plan, str) else None
    config = bridge.RegardConfig(vocab_size=64, dim=32, plan=plan, num_layers=layers, num_heads=4)
    return bridge.RegardForCausalLM(config).eval()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_our_language_models_generate_with_their_state_and_are_saved_and_loaded_as_theirs(plan, tmp_path):
    model, tokens = language_model(plan), ids()
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, **GREEDY}
    found = model.generate(tokens, **settings)
    assert torch.equal(found, model.generate(tokens, **settings, use_cache=False))
    assert torch.equal(found[:, 9:], model.model.generate(tokens, 6, mask=Mask(valid=LEFT.bool())))
    beams = model.generate(tokens, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(tokens, **settings, num_beams=3, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.language_model() == model.config.language_model()


def test_our_language_models_read_a_known_beginning_once_and_refuse_caches_of_others():
    config = bridge.RegardConfig(48, plan="gated_linear", dim=16, num_layers=1, num_heads=2)
    model, ids = bridge.RegardForCausalLM(config).eval(), torch.randint(1, 48, (2, 9))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 9).long()}
    with torch.no_grad():
        known = getattr(model(ids[:, :5], use_cache=True), bridge.CACHE)
    found = model.generate(ids, **settings, **{bridge.CACHE: known})
    assert torch.equal(found, model.generate(ids, **settings, use_cache=False))
    with pytest.raises(Unsupported, match="with a cache that has read 9"):
        model.generate(
            ids[:, :4], max_new_tokens=2, **{bridge.CACHE: getattr(model(ids, use_cache=True), bridge.CACHE)}
        )
    with pytest.raises(Unsupported, match="a DynamicCache for a language model of regard"):
        model(ids, **{bridge.CACHE: transformers.DynamicCache()})


def test_labels_give_the_loss_of_the_next_token():
    model, tokens = language_model("gated_linear"), ids()
    output = model(tokens, labels=tokens)
    logits = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tied", [False, True])
def test_our_language_models_get_another_number_of_tokens(tied, tmp_path):
    config = bridge.RegardConfig(64, dim=32, plan="linear", num_layers=1, num_heads=4, tie_embeddings=tied)
    model, tokens = bridge.RegardForCausalLM(config).eval(), ids()
    before = model(tokens).logits
    assert model.resize_token_embeddings(70).num_embeddings == 70
    found = model(tokens, labels=tokens)
    assert found.loss.isfinite()
    near(found.logits[..., :64], before)
    assert found.logits.shape[-1] == 70
    model.save_pretrained(tmp_path)
    near(bridge.RegardForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, found.logits)


@pytest.mark.parametrize("options", [{"embedding_dim": 8}, {"plan": "landmark"}], ids=str)
def test_a_number_of_tokens_that_cannot_change_is_refused_before_anything_changes(options):
    settings = {"dim": 32, "plan": "linear", "num_layers": 1, "num_heads": 4, **options}
    model, tokens = bridge.RegardForCausalLM(bridge.RegardConfig(64, **settings)).eval(), ids()
    with pytest.raises(Unsupported, match="another number of tokens"):
        model.resize_token_embeddings(70)
    assert model(tokens).logits.shape[-1] == model.config.vocab_size == 64


def test_our_language_models_refuse_what_they_would_not_honour():
    model, tokens = language_model("linear"), ids()
    ranks = (LEFT.cumsum(-1) - 1).clamp(min=0)
    expected = model(tokens, attention_mask=LEFT).logits
    near(model(tokens, attention_mask=LEFT, position_ids=ranks, output_hidden_states=False).logits, expected)
    begun = model(tokens[:, :5], use_cache=True)
    model(tokens[:, 5:], position_ids=torch.arange(5, 9)[None], **{bridge.CACHE: getattr(begun, bridge.CACHE)})
    with pytest.raises(Unsupported, match="do not count its tokens"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    with pytest.raises(Unsupported, match="output_hidden_states for a language model of regard"):
        model(tokens, output_hidden_states=True)


def test_labels_of_several_calls_are_counted_together():
    model, tokens = language_model("linear"), ids()
    whole = model(tokens, labels=tokens).loss
    parts = [model(row, labels=row, num_items_in_batch=24).loss for row in tokens.split(1)]
    torch.testing.assert_close(sum(parts), whole)


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
    again, tokens = bridge.RegardForCausalLM.from_pretrained(tmp_path), torch.randint(20, (2, 6))
    assert again.config.language_model().stack.reversible
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_options_change_and_what_was_learned_stays():
    model, other = llama(), llama()
    for one, top_k in ((model, 2), (other, 3)):
        regard.swap(one, "sea", top_k=top_k, estimate_length=16)
    disturb(model)
    other.load_state_dict(model.state_dict())
    tokens = ids(2, 12)
    with torch.no_grad():
        before, expected = model(tokens).logits, other(tokens).logits
        with pytest.raises(Unsupported, match="learns other parameters"):
            change_options(model, estimate_length=32)
        assert torch.equal(model(tokens).logits, before) and not torch.equal(before, expected)
        change_options(model, top_k=3)
        assert torch.equal(model(tokens).logits, expected)
    assert {entry["options"]["top_k"] for entry in model.config.regard["modules"].values()} == {3}


@pytest.mark.parametrize("make", [llama, bert])
def test_other_attention_of_a_swapped_model_is_refused_where_it_is_called(make):
    model, x = make(), ids()
    regard.swap(model, "linear")
    expected = model(x)[0]
    model.set_attn_implementation("sdpa")
    with pytest.raises(Unsupported, match=r'attn_implementation="sdpa" in .* with linear.*try regard.unswap'):
        model(x)
    model.set_attn_implementation(bridge.SWAPPED)
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("name", ["gated_linear", "performer", "complex_rotary", "differential"])
def test_mechanisms_that_add_to_a_model_are_refused_where_nothing_can_be_added(name):
    model = llama()
    model.set_attn_implementation(f"regard:{name}")
    with pytest.raises(Unsupported, match=f"alone, since {name} learns more.*try regard.swap"):
        model(ids())


def test_another_model_of_the_same_config_does_not_see_a_swap():
    changed = llama()
    other = type(changed)(changed.config).eval()
    x = ids()
    expected = other(x).logits
    regard.swap(changed, "linear")
    near(other(x).logits, expected)
    regard.unswap(changed)
    assert changed.config.to_dict() == other.config.to_dict()


@pytest.mark.parametrize("change", [regard.unswap, lambda model: change_options(model, top_k=3)])
def test_another_model_of_a_swapped_config_keeps_its_mechanisms(change, tmp_path):
    first = llama()
    regard.swap(first, "sea", top_k=2)
    change(type(first)(first.config))
    first.save_pretrained(tmp_path)
    x = ids()
    near(type(first).from_pretrained(tmp_path).eval()(x).logits, first(x).logits)


def test_a_model_of_which_a_part_was_swapped_is_saved_with_its_mechanisms_or_not_at_all(tmp_path):
    model, x = llama(), ids()
    regard.swap(model.model, "linear")
    for change in (lambda: None, lambda: regard.unswap(model.model)):
        change()
        expected = model(x).logits
        for save in (model.save_pretrained, regard.compress(copy.deepcopy(model), "int8").save):
            with pytest.raises(Unsupported, match=r"a part was swapped .*try model.config = model.model.config"):
                save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        model.config = model.model.config
        model.save_pretrained(tmp_path / "saved")
        near(type(model).from_pretrained(tmp_path / "saved").eval()(x).logits, expected)


def test_a_swapped_model_is_compiled_whole_and_in_parts_where_it_has_to_look_at_a_mask():
    model, x = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})), ids()
    disturb(model)
    regard.swap(model, "linear")
    whole, parts = (torch.compile(model, fullgraph=full, backend=GRAPH) for full in (True, False))
    with torch.no_grad():
        near(whole(x).logits, model(x).logits)
        near(parts(x, attention_mask=KEPT).logits[KEPT == 1], model(x, attention_mask=KEPT).logits[KEPT == 1])
        regard.swap(model, "local:window=3")
        packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3), "use_cache": False}
        near(torch.compile(model, backend=GRAPH)(x, **packed).logits, model(x, **packed).logits)
