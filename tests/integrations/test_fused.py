"""Decoders of transformers in one native call, and their layers in two: what they give, and when they step aside."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import GREEDY, LEFT, SIZES, disturb, gpt2, ids, llama, mistral, near

import regard
from regard.backends.native import library
from regard.engines.decoder_layer import Places

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("regard.integrations.transformers")
pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason="no native library")


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)).eval()


@pytest.fixture
def calls(monkeypatch):
    """Kernels in the order in which they ran."""
    seen, run = [], library.call

    def call(arguments):
        seen.append(arguments.kernel)
        run(arguments)

    monkeypatch.setattr(library, "call", call)
    return seen


def stepped(model, tokens, **options):
    """Logits of the tokens behind the first, one at a time."""
    with torch.inference_mode():
        cache, found = None, []
        for t in range(tokens.shape[1]):
            here = model(tokens[:, t : t + 1], **{bridge.CACHE: cache}, use_cache=True, **options)
            cache = getattr(here, bridge.CACHE)
            found.append(here.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "recipe",
    ["", "int8", "int4:group=32", "int4:group=32,symmetric=false", "awq + gptq:group=32", "smoothquant + w8a8"],
)
@pytest.mark.parametrize("make", [llama, mistral, qwen2])
def test_a_fused_model_gives_what_it_gave_token_by_token_and_in_generate(make, recipe, calls):
    # sizes at which groups fill rows: 32 and 64
    model = make() if not recipe else _wide(make)
    disturb(model)
    model.tie_weights()
    if recipe:
        regard.compress(model, recipe, [ids(2, 8)])
    tokens = ids()
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "num_beams": 2, **GREEDY}
    expected, written = stepped(model, tokens), model.generate(tokens, **settings)
    calls.clear()
    assert bridge.fuse_layers(model) == 2
    near(stepped(model, tokens), expected)
    # the first token has no cache yet; a window's cache is not for the kernel
    first = tokens.shape[1] if make is mistral else 1
    assert calls.count("decoder_inputs") == calls.count("decoder_outputs") == 2 * first
    assert calls.count("decoder_layers") == tokens.shape[1] - first
    assert torch.equal(model.generate(tokens, **settings), written)
    bridge.unfuse_layers(model)
    calls.clear()
    near(stepped(model, tokens), expected)
    assert not {"decoder_inputs", "decoder_layers"} & {*calls}


def _wide(make):
    before = dict(SIZES)
    SIZES.update(hidden_size=64, intermediate_size=96)
    try:
        return make()
    finally:
        SIZES.update(before)


@pytest.mark.parametrize("make", [llama, mistral, qwen2])
def test_caches_of_every_kind_are_gone_on_from(make, calls):
    model, tokens = make(), ids(2, 60)
    disturb(model)
    with torch.inference_mode():
        expected = model(tokens).logits
    bridge.fuse_layers(model)
    config = model.config if make is not mistral else None
    for cache in (transformers.DynamicCache(config=config), bridge.GrowingCache(config)):
        at, found = 0, []
        calls.clear()
        # some at once, token by token beyond the room that was made, more than the kernel takes
        for count in (3, *[1] * 30, 2, 9, 15, 1):
            with torch.inference_mode():
                here = model(tokens[:, at : at + count], **{bridge.CACHE: cache}, use_cache=True)
            found.append(here.logits)
            at += count
        near(torch.cat(found, 1), expected)
        assert calls.count("decoder_layers") == 32 and cache.get_seq_length() == at == 60
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape == (2, 2, 60, 8)


def test_a_cache_that_was_cut_copied_or_put_in_another_order_is_gone_on_from(calls):
    model, tokens = llama(), ids(2, 12)
    disturb(model)
    bridge.fuse_layers(model)

    def read(cache, given):
        with torch.inference_mode():
            return model(given, **{bridge.CACHE: cache}, use_cache=True).logits

    cache = bridge.GrowingCache(model.config)
    read(cache, tokens[:, :6])
    read(cache, tokens[:, 6:7])
    kept = cache.layers[0].keys, cache.layers[0].keys.clone()
    expected = read(copy.deepcopy(cache), tokens[:, 7:9])
    near(read(cache, tokens[:, 7:9]), expected)
    read(cache, tokens[:, 9:10])
    cache.crop(-3)
    other = ids(2, 2)
    near(read(cache, other), read(bridge.GrowingCache(), torch.cat([tokens[:, :7], other], 1))[:, 7:])
    cache.reorder_cache(torch.tensor([1, 0]))
    whole = torch.cat([tokens[:, :7], other, tokens[:, :1]], 1)
    swapped = torch.cat([whole[[1, 0], :9], tokens[:, :1]], 1)
    near(read(cache, tokens[:, :1]), read(bridge.GrowingCache(), swapped)[:, 9:])
    assert torch.equal(*kept)
    assert calls.count("decoder_layers") == 6


def test_a_layer_that_shares_its_memory_with_another_leaves_it_what_it_has():
    cache = bridge.GrowingCache()
    new = [torch.rand(1, 1, 1, 2) for _ in range(4)]
    for x in new[:2]:
        cache.update(x, x, 0)
    other = copy.copy(cache.layers[0])
    cache.update(new[2], new[2], 0)
    other.update(new[3], new[3])
    assert torch.equal(cache.layers[0].keys, torch.cat(new[:3], 2))
    assert torch.equal(other.values, torch.cat([*new[:2], new[3]], 2))


def test_threads_with_caches_of_their_own_do_not_meet():
    model, texts = llama(), [ids(1, 40) for _ in range(4)]
    disturb(model)
    expected = [stepped(model, text) for text in texts]
    bridge.fuse_layers(model)
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda text: stepped(model, text), texts), expected, strict=True):
            near(found, wanted)


def test_places_that_a_cache_lacks_are_refused_before_anything_is_written():
    model, cache = llama(), bridge.GrowingCache()
    bridge.fuse_layers(model)
    for _ in range(2):
        with torch.inference_mode():
            model(ids(2, 1), **{bridge.CACHE: cache}, use_cache=True)
    layers = model.model.forward._layers
    x, turned = torch.rand(2, 1, 32), torch.rand(1, 1, 8)
    caches = [layer.room(0) for layer in cache.layers]
    before = [x.clone() for pair in caches for x in pair]
    pools = [(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8))] * 2
    table = torch.tensor([[0, 1], [2, 0]])
    for places, said in (
        (Places(caches, [9, 2]), "9"),
        (Places(caches, [2]), "1 lengths"),
        (Places(caches, [-1, 2]), "-1"),
        (Places([(k[:1], v[:1]) for k, v in caches], [1, 1]), "1 rows of a cache"),
        (Places([(k.double(), v) for k, v in caches], [1, 1]), "float64"),
        (Places([(k[:, :1], v) for k, v in caches], [1, 1]), "cache"),
        (Places(pools, [4, 8], table), "8"),
        (Places(pools, [4, 4], table + 1), "pages that do not exist"),
        (Places(pools, [4, 4], table - 1), "pages that do not exist"),
        (Places([pools[0], caches[0]], [1, 1], table), "pages that do not exist"),
    ):
        with pytest.raises(regard.Unsupported, match=said):
            layers(x, turned, turned, places)
    assert all(torch.equal(*pair) for pair in zip(before, [x for pair in caches for x in pair], strict=True))
    assert not any(bool(x.any()) for pair in pools for x in pair)
    table[0, 1] = 99  # nothing is there yet
    assert layers(x, turned, turned, Places(pools, [3, 4], table)).shape == x.shape


def test_what_is_asked_beside_the_answer_is_given(calls):
    model, tokens = llama(), ids()
    bridge.fuse_layers(model)
    model.set_attn_implementation("eager")
    cache = bridge.GrowingCache(model.config)

    def read(**options):
        calls.clear()
        with torch.no_grad():
            return model(**{"input_ids": tokens[:, :1]} | options, **{bridge.CACHE: cache})

    read()
    read()
    assert calls == ["decoder_layers"]
    seen = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(1))
    read()
    assert seen and "decoder_layers" not in calls
    hook.remove()
    model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)
    read()
    assert "decoder_layers" not in calls
    del model.model.norm.forward
    assert isinstance(read(return_dict=False), tuple) and calls == ["decoder_layers"]
    found = [read(position_ids=torch.tensor([[50]]), attention_mask=torch.ones(3, 6)).logits]
    assert calls == ["decoder_layers"]
    cache.crop(-1)
    bridge.unfuse_layers(model)
    near(found[0], read(position_ids=torch.tensor([[50]])).logits)
    bridge.fuse_layers(model)
    model.set_attn_implementation("regard:local")
    read()
    assert "decoder_layers" not in calls
    model.set_attn_implementation("eager")
    assert len(read(output_hidden_states=True).hidden_states) == 3 and "decoder_layers" not in calls
    assert read(output_attentions=True).attentions[0].shape == (3, 4, 1, 9) and "decoder_layers" not in calls


def test_what_a_layer_has_now_is_what_it_computes_with(calls):
    model, tokens = llama(), ids()
    bridge.fuse_layers(model)
    stepped(model, tokens)
    layer, other = model.model.layers[0], llama().model.layers[0]
    for change in (
        lambda: setattr(layer.mlp, "up_proj", other.mlp.up_proj),
        lambda: setattr(layer.mlp.down_proj.weight, "data", torch.randn_like(layer.mlp.down_proj.weight)),
        lambda: layer.input_layernorm.load_state_dict({"weight": torch.rand(32)}, assign=True),
        lambda: model.double().float(),
    ):
        change()
        calls.clear()
        found = stepped(model, tokens)
        assert calls.count("decoder_layers") == tokens.shape[1] - 1
        with torch.inference_mode():
            near(found, model(tokens).logits)


def test_a_layer_steps_aside_for_hooks_gradients_and_parts_that_are_others(calls):
    model, tokens = llama(), ids()
    expected = stepped(model, tokens)
    bridge.fuse_layers(model)
    calls.clear()
    seen = []
    hook = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    near(stepped(model, tokens), expected)
    assert len(seen) == tokens.shape[1] == calls.count("decoder_inputs")  # the other layer goes on
    hook.remove()
    calls.clear()
    model(tokens[:, :1]).logits.sum().backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None and not calls
    near(stepped(copy.deepcopy(model).double(), tokens), expected.double())
    regard.swap(model, "linear")
    calls.clear()
    stepped(model, tokens)
    assert "decoder_inputs" not in calls


def test_copies_and_saved_models_compute_with_their_own_weights(calls):
    model, tokens = llama(), ids()
    bridge.fuse_layers(model)
    expected = stepped(model, tokens)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        near(stepped(other, tokens), expected)
        disturb(other)
        calls.clear()
        with torch.inference_mode():
            near(stepped(other, tokens), other(tokens).logits)
        assert calls.count("decoder_layers") == tokens.shape[1] - 1
        near(stepped(model, tokens), expected)


def test_compiled_models_do_not_notice(calls):
    model, tokens = llama(), ids()
    with torch.inference_mode():
        expected = model(tokens).logits
        bridge.fuse_layers(model)
        torch._dynamo.reset()
        near(torch.compile(model, backend="aot_eager")(tokens).logits, expected)
        near(torch.compile(model, backend="aot_eager")(tokens[:1, :5]).logits, expected[:1, :5])


def test_other_architectures_stay_as_they_are():
    assert bridge.fuse_layers(gpt2()) == 0
    assert bridge.fuse_layers(llama(hidden_act="gelu")) == 0
