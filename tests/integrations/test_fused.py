"""Decoder layers of transformers in two native calls: what they give, and when they step aside."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import GREEDY, LEFT, SIZES, disturb, gpt2, ids, llama, mistral, near

import regard
from regard.backends.native import library

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
    assert calls.count("decoder_inputs") == calls.count("decoder_outputs") == 2 * tokens.shape[1]
    assert torch.equal(model.generate(tokens, **settings), written)
    bridge.unfuse_layers(model)
    calls.clear()
    near(stepped(model, tokens), expected)
    assert "decoder_inputs" not in calls


def _wide(make):
    before = dict(SIZES)
    SIZES.update(hidden_size=64, intermediate_size=96)
    try:
        return make()
    finally:
        SIZES.update(before)


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
        assert calls.count("decoder_inputs") == 2 * tokens.shape[1]
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
        assert calls.count("decoder_inputs") == 2 * tokens.shape[1]
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
