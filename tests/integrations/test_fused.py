"""Transformers decoders fused into one native call, their layers into two, and hybrids into either or both: results are
unchanged, and fusion steps aside when it must."""

from __future__ import annotations

import copy
import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import GREEDY, LEFT, SIZES, disturb, gpt2, ids, llama, mistral, near
from support import GRAPH

import regard
from regard.backends.native import library
from regard.compression.folders import load_causal_model
from regard.compression.pruning.anatomy import Cut, find_host
from regard.compression.sparse import sparsely
from regard.compression.sparse.rounding import Block
from regard.contract import Recurrence
from regard.engines.decoder_layer import Eviction, Places, Reading, SlotRotation, State, Weight, unfit
from regard.integrations.collecting import collect_losses
from regard.layers.linear import Linear

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("regard.integrations.transformers")
pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason="no native library")


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)).eval()


@pytest.fixture
def calls(monkeypatch):
    """The kernels that ran, in order."""
    seen, run = [], library.call

    def call(arguments):
        seen.append(arguments.kernel)
        run(arguments)

    monkeypatch.setattr(library, "call", call)
    return seen


def stepped(model, tokens, **options):
    """Logits of all tokens, decoded one at a time."""
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
    # sizes that are multiples of the groups: 32 and 64
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
    # the first token has no cache yet; the kernel does not take a window's cache
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


@pytest.mark.parametrize(
    ("method", "fused"),
    [
        ("dense", 78),
        ("block_sparse:size=8,blocks=3", 78),
        ("local_sinks:window=16", 78),
        ("snapkv:capacity=24,window=8,local=4,prefix=1", 78),
        ("block_sparse:size=8,blocks=3 + snapkv:capacity=24,window=8,local=4,prefix=1", 78),
        ("pyramidkv:capacity=24,window=8,local=4,prefix=1", 78),  # layers of different lengths
        ("streaming:capacity=24,sinks=2", 77),  # full: one token at a time
        ("streaming:capacity=24,sinks=2,positions=text", 77),
        ("streaming:capacity=90,sinks=2", 78),  # full later
        ("quest:budget=16,page=8", 77),  # one token at a time
        ("quest:budget=16,page=8,share=false", 77),
        ("local_sinks:window=16 + quest:budget=80,page=16", 77),  # all pages at first
        ("tova:capacity=24", 77),
        ("h2o:capacity=24,recent=0", 77),
        ("h2o:capacity=24,recent=0.25", 77),
        ("h2o:capacity=24,recent=1.0", 77),
        ("local_sinks:window=16 + h2o:capacity=90", 77),
        ("int8:block=16,window=5", 77),
        ("int8:block=40,window=70", 77),  # no block at first
    ],
)
def test_sparse_models_decode_in_one_native_call(method, fused, calls):
    # whole vectors and a rest of one
    model, tokens = llama(head_dim=40) if method.startswith("int8") else llama(), ids(2, 150)
    disturb(model)

    def run():
        with sparsely(model, method) as sparse, torch.inference_mode():
            found = [model(tokens[:, :60], use_cache=True)]
            cache = getattr(found[0], bridge.CACHE)
            for end in (61, *range(63, 140), 150):  # beyond the reserved memory, several at once
                start = cache.get_seq_length()
                found.append(model(tokens[:, start:end], **{bridge.CACHE: cache}, use_cache=True))
            left = cache.layers[0].state.mechanism.select(torch.tensor([1]))
        return torch.cat([x.logits for x in found], 1), sparse.measured(), left

    expected, counted, state = run()
    bridge.fuse_layers(model)
    calls.clear()
    found, again, left = run()
    near(found, expected)
    assert again == pytest.approx(counted)
    assert calls.count("decoder_layers") == fused  # 22 new tokens are more than the kernel takes
    least = 24
    if method.startswith("int8"):
        left, state, least = left.recent, state.recent, 5
    held = int(left.counts[0, 0])
    assert held == int(state.counts[0, 0]) >= least
    assert torch.equal(left.ranks[..., :held], state.ranks[..., :held])
    for name in ("k", "v", "weight", "low", "high"):
        if (kept := getattr(state, name)) is not None:
            near(getattr(left, name)[:, :, :held], kept[:, :, :held])
    bridge.unfuse_layers(model)


def test_a_fused_model_refuses_positions_that_do_not_count_where_keys_have_places_in_the_cache(calls):
    model, tokens = llama(), ids(2, 12)
    bridge.fuse_layers(model)
    with sparsely(model, "streaming:capacity=6,sinks=2"), torch.inference_mode():
        cache = getattr(model(tokens, use_cache=True, position_ids=torch.arange(5, 17)[None]), bridge.CACHE)
        model(tokens[:, :1], **{bridge.CACHE: cache}, use_cache=True, position_ids=torch.tensor([[17]]))
        assert calls[-1] == "decoder_layers"
        with pytest.raises(regard.Unsupported, match="positions that do not count"):
            model(tokens[:, :1], **{bridge.CACHE: cache}, use_cache=True, position_ids=torch.tensor([[30]]))


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
        # several at once, single tokens beyond the reserved memory, more than the kernel takes
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
    layers = model.model.forward._last.parts[0].layers
    x, turned = torch.rand(2, 1, 32), torch.rand(1, 1, 8)
    caches = [layer.room(0) for layer in cache.layers]
    before = [x.clone() for pair in caches for x in pair]
    pools = [(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8))] * 2
    table = torch.tensor([[0, 1], [2, 0]])
    ranks = torch.zeros(caches[0][0].shape[:3], dtype=torch.int64)
    keys, numbers = torch.zeros(2, 2, 3, 8, dtype=torch.int8), torch.zeros(2, 2, 8)
    codes = Block(keys, numbers, keys.mT.contiguous(), numbers[..., :3].contiguous())
    other = {"v": keys.mT}, {"k": keys.int()}, {"k_step": numbers[..., :4].contiguous()}
    unlike = [dataclasses.replace(codes, **x) for x in other]
    unfit = (
        Eviction(None, ranks[:, :, 1:].contiguous(), 4, 9),
        Eviction(None, ranks.int(), 4, 9),
        Eviction(ranks.double(), ranks, 4, 9),
        Eviction(None, ranks, 0, 9),
    )
    angles = SlotRotation(torch.zeros(2, 8), torch.zeros(2, 8))
    other_angles = torch.zeros(1, 8), torch.zeros(3, 8), torch.zeros(2, 6), torch.zeros(2, 8).double()
    unturned = [angles._replace(**{name: x}) for x in other_angles for name in ("cosine", "sine")]
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
        (Places(caches, [1, 1], fewer=[0, 2]), "dropped"),
        (Places(caches, [1, 1], fewer=[0, -1]), "dropped"),
        (Places(caches, [1, 1], fewer=[0]), "a number for each cache"),
        (Places(caches, [1, 1], replaced=[-1, 2]), "slots of the caches"),
        (Places(caches, [1, 1], replaced=[-2, 0]), "slots of the caches"),
        (Places(caches, [70, 70], fewer=[0, 69]), "slots of the caches"),
        (Places(caches, [2, 2], fewer=[1, 0], padding=[1, 0]), "without pages and padding"),
        (Places(pools, [4, 4], table, fewer=[1, 0]), "without pages and padding"),
        (Places(caches, [1, 1], readings=[None, Reading(*[caches[0][0]] * 2, 4, 1, True)]), "bounds of their keys"),
        (Places(caches, [1, 1], readings=[None, Reading(*[caches[0][0]] * 2, 0, 1, True)]), "bounds of their keys"),
        *((Places(caches, [1, 1], evictions=[None, x]), "ranks and weights of each of its slots") for x in unfit),
        *((Places(caches, [1, 1], rounded=[[codes], [codes, x]]), "codes and steps of all its rows") for x in unlike),
        (Places(caches, [1, 1], replaced=[0, -1], rounded=[[codes], []]), "reads everything"),
        (Places(caches, [1, 1], replaced=[0, -1], evictions=[Eviction(None, ranks, 4, 9), None]), "reads everything"),
        *((Places(caches, [1, 1], rotations=[None, x]), "angles of all its tokens") for x in unturned),
        (Places(caches, [1, 1], rotations=[angles, None], rounded=[[codes], []]), "read everything"),
    ):
        with pytest.raises(regard.Unsupported, match=said):
            layers(x, turned, turned, places)
    assert all(torch.equal(*pair) for pair in zip(before, [x for pair in caches for x in pair], strict=True))
    assert not any(bool(x.any()) for pair in pools for x in pair)
    table[0, 1] = 99  # this page is not in use yet
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


@pytest.mark.parametrize("make", [llama, qwen2])
def test_hard_layers_stay_hard_whether_they_were_so_before_or_after_the_model_was_fused(make, calls):
    model, tokens = make(), ids()
    disturb(model)
    bridge.fuse_layers(model)
    with torch.inference_mode():
        soft = model(tokens).logits
    near(stepped(model, tokens), soft)
    undo = find_host(model).compact([Cut(), Cut(hard=2)])
    with torch.inference_mode():
        hard = model(tokens).logits
    assert not torch.allclose(hard, soft, atol=1e-2)
    near(stepped(model, tokens), hard)
    bridge.unfuse_layers(model)
    bridge.fuse_layers(model)
    near(stepped(model, tokens), hard)
    undo()
    calls.clear()
    near(stepped(model, tokens), soft)
    assert calls.count("decoder_layers") == tokens.shape[1] - 1


def test_a_layer_steps_aside_for_hooks_gradients_and_parts_that_are_others(calls):
    model, tokens = llama(), ids()
    expected = stepped(model, tokens)
    bridge.fuse_layers(model)
    calls.clear()
    seen = []
    hook = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    near(stepped(model, tokens), expected)
    assert len(seen) == tokens.shape[1] == calls.count("decoder_inputs")  # the other layer stays fused
    hook.remove()
    calls.clear()
    model(tokens[:, :1]).logits.sum().backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None and not calls
    near(stepped(copy.deepcopy(model).double(), tokens), expected.double())


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
        near(torch.compile(model, backend=GRAPH)(tokens).logits, expected)
        near(torch.compile(model, backend=GRAPH)(tokens[:1, :5]).logits, expected[:1, :5])


UNTURNED = "core_context:group=2,window=3,pool_keys=pre_rope"
MECHANISMS = [UNTURNED, "gated_linear:value_gate=true", "mixture_of_heads", "selective_temperature"]
RECURRENCES = [
    "gated_linear",
    "gated_linear:gate=scalar,clamp_min=-0.5,gate_normalizer=1",
    "gated_linear:gate=step",
    "gated_linear:gate=fixed",
    "gated_linear:gate=none,feature_map=relu_squared",
    "delta_rule",
    "delta_rule:allow_negative_eigenvalues=true,normalize_queries=false,feature_map=silu",
    "delta_rule:gated=true",
    "delta_rule:gated=true,gate=diagonal",
    *(f"linear:feature_map={name}" for name in ("elu", "relu,eps=0.1", "sigmoid", "exp", "silu,normalize=false")),
    "lolcats",
    "lolcats:window=3,features=5",
    "hedgehog",
]
ALONE = ["decoder_inputs", "decoder_outputs"]


def hybrid(monkeypatch, mechanism="gated_linear", swapped=(2, 4)):
    """A Llama with five layers, some of them swapped."""
    monkeypatch.setitem(SIZES, "num_hidden_layers", 5)
    model = llama()
    regard.swap(model, {f"*.layers.{i}.*": mechanism for i in swapped})
    disturb(model)
    return model


def of_decoders(calls):
    return [kernel for kernel in calls if kernel.startswith("decoder")]


@pytest.mark.parametrize("recipe", ["", "int8"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_hybrid_decodes_its_kept_layers_in_runs_and_each_other_in_two_calls(mechanism, recipe, monkeypatch, calls):
    model, tokens = hybrid(monkeypatch, mechanism), ids()
    if recipe:
        regard.compress(model, recipe, [ids(2, 8)])
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "num_beams": 2, **GREEDY}
    expected, written = stepped(model, tokens), model.generate(tokens, **settings)
    assert bridge.fuse_layers(model) == 5
    calls.clear()
    near(stepped(model, tokens), expected)
    # the first token has no cache yet
    others = ["decoder_layers", *ALONE] * 2 * (tokens.shape[1] - 1)
    assert of_decoders(calls) == 5 * ALONE + others
    assert torch.equal(model.generate(tokens, **settings), written)
    bridge.unfuse_layers(model)
    near(stepped(model, tokens), expected)


@pytest.mark.parametrize(
    ("mechanism", "recipe"),
    [(x, "") for x in RECURRENCES] + [("gated_linear", "int8"), ("delta_rule", "int4:group=32")],
)
def test_a_hybrid_of_recurrences_decodes_in_one_call(mechanism, recipe, monkeypatch, calls):
    if recipe:  # sizes that are multiples of the groups
        monkeypatch.setitem(SIZES, "hidden_size", 64)
        monkeypatch.setitem(SIZES, "intermediate_size", 96)
    model, tokens = hybrid(monkeypatch, mechanism), ids()
    if recipe:
        regard.compress(model, recipe, [ids(2, 8)])
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "num_beams": 2, **GREEDY}
    expected, written = stepped(model, tokens), model.generate(tokens, **settings)
    assert bridge.fuse_layers(model) == 5
    calls.clear()
    near(stepped(model, tokens), expected)
    # the first token has no state yet
    assert of_decoders(calls) == 5 * ALONE + ["decoder_layers"] * (tokens.shape[1] - 1)
    assert torch.equal(model.generate(tokens, **settings), written)
    calls.clear()
    del settings["attention_mask"]
    assert model.generate(tokens, **settings).shape == (3, 15) and of_decoders(calls) == ["decoder_layers"] * 5


@pytest.mark.parametrize("mechanism", ["softmax", "gated_linear", "lolcats:window=4"])
def test_padded_prompts_are_gone_on_from_in_one_call(mechanism, monkeypatch, calls):
    model, tokens, more = hybrid(monkeypatch, mechanism), ids(3, 9), ids(3, 4)
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[1, :3], mask[2, :9] = 0, 0  # a row whose prompt is all padding

    def read():
        with torch.inference_mode():
            options = {"use_cache": True, "attention_mask": mask[:, :9], "position_ids": ranks[:, :9]}
            cache, found = getattr(model(tokens, **options), bridge.CACHE), []
            for some in (slice(9, 10), slice(10, 11), slice(11, 13)):
                options = {"attention_mask": mask[:, : some.stop], "position_ids": ranks[:, some]}
                here = model(
                    more[:, some.start - 9 : some.stop - 9], **{bridge.CACHE: cache}, use_cache=True, **options
                )
                cache = getattr(here, bridge.CACHE)
                found.append(here.logits)
        return torch.cat(found, 1)

    ranks = (mask.cumsum(1) - 1).clamp(min=0)
    expected = read()
    bridge.fuse_layers(model)
    calls.clear()
    near(read(), expected)
    assert of_decoders(calls) == ["decoder_layers"] * 3


@pytest.mark.parametrize(
    "mask",
    [[[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]],
    ids=["a gap", "a new token"],
)
def test_padding_elsewhere_is_for_the_models_own_way(mask, monkeypatch, calls):
    model, tokens = llama(), ids(2, 5)
    bridge.fuse_layers(model)
    with torch.inference_mode():
        cache = getattr(model(tokens[:, :4], use_cache=True), bridge.CACHE)
        calls.clear()
        model(tokens[:, 4:], **{bridge.CACHE: cache}, attention_mask=torch.tensor(mask))
    assert of_decoders(calls) == ALONE * 2


@pytest.mark.parametrize("mechanism", ["gated_linear", "lolcats:window=4"])
def test_a_state_is_not_changed_by_the_tokens_after_it(mechanism, monkeypatch, calls):
    model, tokens = hybrid(monkeypatch, mechanism), ids(2, 12)
    with torch.inference_mode():
        expected = model(tokens).logits
    bridge.fuse_layers(model)

    def read(cache, given):
        with torch.inference_mode():
            return model(given, **{bridge.CACHE: cache}, use_cache=True).logits

    cache = transformers.DynamicCache(config=model.config)
    read(cache, tokens[:, :6])
    read(cache, tokens[:, 6:7])
    state = cache.layers[2].state.mechanism
    kept, other = copy.deepcopy(vars(state)), copy.deepcopy(cache)
    near(read(cache, tokens[:, 7:9]), expected[:, 7:9])
    assert all(torch.equal(vars(state)[name], x) for name, x in kept.items())
    assert torch.equal(cache.layers[4].state.length, torch.tensor([9, 9])) and cache.get_seq_length() == 9
    near(read(other, tokens[:, 7:12]), expected[:, 7:12])
    near(read(cache, tokens[:, 9:12]), expected[:, 9:12])
    cache.reorder_cache(torch.tensor([1, 1]))
    again = torch.cat([tokens[[1, 1]], tokens[:, :1]], 1)
    with torch.inference_mode():
        near(read(cache, tokens[:, :1]), model(again, use_cache=False).logits[:, 12:])
    assert calls.count("decoder_layers") == 5


@pytest.mark.parametrize(
    ("mechanism", "parameter", "module"),
    [("gated_linear:gate=step", "A_log", "step"), ("lolcats:window=4", "log_window_weight", None)],
)
def test_what_a_recurrence_has_now_is_what_it_computes_with(mechanism, parameter, module, monkeypatch, calls):
    model, tokens = hybrid(monkeypatch, mechanism), ids()
    bridge.fuse_layers(model)
    stepped(model, tokens)
    projection = model.model.layers[2].self_attn.regard.projection
    other = hybrid(monkeypatch, mechanism).model.layers[4].self_attn.regard.projection
    matrix = getattr(projection, module).weight if module else projection.k_map
    for change in (
        lambda: getattr(projection, parameter).data.add_(0.3),
        lambda: setattr(projection, parameter, getattr(other, parameter)),
        lambda: setattr(matrix, "data", torch.randn_like(matrix)),
        lambda: module and setattr(projection, module, getattr(other, module)),
        lambda: model.double().float(),
    ):
        change()
        calls.clear()
        found = stepped(model, tokens)
        assert calls.count("decoder_layers") == tokens.shape[1] - 1
        with torch.inference_mode():
            near(found, model(tokens, use_cache=False).logits)


def test_states_of_other_recurrences_are_refused(monkeypatch):
    model = hybrid(monkeypatch, "lolcats:window=2", swapped=(0, 1, 2, 3, 4))
    bridge.fuse_layers(model)
    stepped(model, ids(2, 2))
    layers = model.model.forward._last.parts[0].layers
    x, turned = torch.rand(2, 1, 32), torch.rand(1, 1, 8)

    def state(slots=3, width=8, **options):
        memory, window = (torch.rand(2, 4, 16, 9) for _ in range(2)), (torch.rand(2, 4, slots, width) for _ in range(2))
        return State(*memory, (*window,), torch.tensor([2, 1]))._replace(**options)

    def read(*states):
        return layers(x, turned, turned, Places([], [0, 0], states=states))

    assert read(*(state() for _ in range(5))).shape == x.shape
    for wrong, said in (
        (state(after=torch.rand(2, 4, 16, 8)), "a state .2, 4, 16, 8."),
        (state(before=torch.rand(2, 4, 16, 9).double()), "float64"),
        (state(window=None), "without its window"),
        (state(lengths=None), "without its window"),
        (state(lengths=torch.tensor([2])), "without its window"),
        (state(slots=2), "without its window"),
        (state(width=7), "without its window"),
    ):
        with pytest.raises(regard.Unsupported, match=said):
            read(*(state() for _ in range(4)), wrong)
    with pytest.raises(regard.Unsupported, match="4 states of 5 layers"):
        read(*(state() for _ in range(4)))


def test_hybrids_of_other_dtypes_go_their_usual_way(monkeypatch, calls):
    model, tokens = hybrid(monkeypatch), ids()
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        bridge.unfuse_layers(model)
        expected = stepped(model, tokens)
        bridge.fuse_layers(model)
        assert torch.equal(stepped(model, tokens), expected) and not of_decoders(calls)


def test_recurrences_that_the_kernel_does_not_have_are_told():
    model = llama()
    bridge.fuse_layers(model)
    stepped(model, ids(1, 2))
    layer = model.model.forward._last.seen.natives[0]  # 32 features, two key heads of width 8
    to_heads, to_features, rates = Weight(torch.rand(2, 32)), Weight(torch.rand(16, 32)), torch.rand(2)
    low, high = Weight(torch.rand(3, 32)), Weight(torch.rand(16, 3))
    maps = torch.rand(4, 8, 5), torch.rand(4, 8, 5)
    windowed = Recurrence(maps=maps, divisor=0.0, window=3, log_window_weights=torch.rand(4))
    for taken in (
        windowed,
        windowed._replace(window=0, log_window_weights=None, divisor=None),
        Recurrence(feature_map="silu", log_rates=rates, divisor=0.1),
        Recurrence(),
        Recurrence(log_rates=rates),
        Recurrence((low, high), rates),
        Recurrence((to_heads,), rates, steps=True, beta=to_heads, gate_bias=torch.rand(2)),
    ):
        assert not unfit(taken, layer)
    for refused in (
        Recurrence((to_heads,)),
        Recurrence((low,), rates),
        Recurrence((high,), rates),
        Recurrence((to_heads,), rates, gate_bias=torch.rand(16)),
        Recurrence((to_heads,), rates, gate_bias=torch.rand(2).double()),
        Recurrence(log_rates=rates, gate_bias=rates),
        Recurrence((low, high, high), rates),
        Recurrence((to_features,), rates, steps=True),
        Recurrence(log_rates=rates, steps=True),
        Recurrence(log_rates=rates.double()),
        Recurrence(log_rates=torch.rand(4)),
        Recurrence(beta=to_features),
        Recurrence(beta=Weight(torch.rand(2, 32).double())),
        Recurrence(beta=Weight(torch.rand(32, 2).T)),
        Recurrence(feature_map="cosine"),
        windowed._replace(divisor=None),
        windowed._replace(maps=None),
        windowed._replace(maps=(maps[0], torch.rand(4, 8, 6))),
        windowed._replace(maps=(maps[0][:2], maps[1][:2])),
        windowed._replace(maps=(torch.rand(4, 9, 5), torch.rand(4, 9, 5))),
        windowed._replace(maps=(maps[0].mT, maps[1].mT)),
        windowed._replace(log_window_weights=torch.rand(4).double()),
        windowed._replace(log_rates=rates),
        windowed._replace(feature_map="elu"),
    ):
        assert unfit(refused, layer)


@pytest.mark.parametrize(
    ("mechanism", "seen"),
    [
        ("local:window=3", 2),
        ("longformer:window=4,global_tokens=3", 6),
        ("longformer:window=2,global_tokens=0,separate_projections=False", 1),
    ],
)
def test_windows_that_follow_each_other_take_one_call_once_they_are_full(mechanism, seen, monkeypatch, calls):
    model, tokens = hybrid(monkeypatch, mechanism, swapped=(1, 2, 4)), ids(2, 30)
    settings = {"max_new_tokens": 9, "num_beams": 3, **GREEDY}
    expected, written = stepped(model, tokens), model.generate(tokens[:, :5], **settings)
    bridge.fuse_layers(model)
    calls.clear()
    near(stepped(model, tokens), expected)
    second = ["decoder_layers", *ALONE, *ALONE, "decoder_layers", *ALONE]
    assert of_decoders(calls) == 5 * ALONE + (seen - 1) * second + 4 * (30 - seen) * ["decoder_layers"]
    assert torch.equal(model.generate(tokens[:, :5], **settings), written)
    cache = bridge.GrowingCache(model.config)
    with torch.inference_mode():
        model(tokens[:, :9], **{bridge.CACHE: cache}, use_cache=True)
        kept = copy.deepcopy(cache)
        for other in (cache, kept):  # neither sees what the other writes
            near(model(tokens[:, 9:12], **{bridge.CACHE: other}, use_cache=True).logits, expected[:, 9:12])
        assert all(layer.get_seq_length() == 12 for layer in cache.layers)
        calls.clear()
        hook = model.model.layers[2].self_attn.regard.register_forward_hook(lambda *_: calls.append("seen"))
        near(model(tokens[:, 12:13], **{bridge.CACHE: cache}, use_cache=True).logits, expected[:, 12:13])
        assert calls.count("seen") == 1
        hook.remove()
        with collect_losses(model, want=frozenset({"weights"})) as collected:
            model(tokens[:, 13:14], **{bridge.CACHE: cache}, use_cache=True)
        assert len(collected.extras) == (3 if mechanism.startswith("local") else 0)  # longformer has no weights to tell


@pytest.mark.parametrize("swapped", [(0,), (1, 2), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("mechanism", ["gated_linear", "selective_temperature"])
def test_the_last_norm_comes_once_whatever_the_last_layer_is(mechanism, swapped, monkeypatch, calls):
    model, tokens = hybrid(monkeypatch, mechanism, swapped), ids()
    expected = stepped(model, tokens)
    bridge.fuse_layers(model)
    near(stepped(model, tokens), expected)
    runs = 1 if mechanism == "gated_linear" else {(0,): 1, (1, 2): 2}.get(swapped, 0)
    assert of_decoders(calls).count("decoder_layers") == runs * (tokens.shape[1] - 1)


@pytest.mark.parametrize(
    ("mechanism", "runs"),
    [
        (UNTURNED, 10),
        ("gated_linear", 5),
        ("delta_rule", 5),
        ("linear", 5),
        ("lolcats:window=5", 5),
        ("local:window=3", 20),
        ("longformer:window=4,global_tokens=1", 12),  # its windows for single tokens alone
    ],
)
def test_several_tokens_of_a_hybrid_at_once_are_those_of_the_whole(mechanism, runs, monkeypatch, calls):
    model, tokens = hybrid(monkeypatch, mechanism), ids(2, 31)
    with torch.inference_mode():
        expected = model(tokens).logits
    bridge.fuse_layers(model)
    cache, at, found = transformers.DynamicCache(config=model.config), 0, []
    for count in (3, 1, 4, 8, 1, 9, 5):
        given = {"position_ids": torch.arange(at, at + count)[None], "attention_mask": torch.ones(2, at + count)}
        with torch.inference_mode():
            found.append(model(tokens[:, at : at + count], **{bridge.CACHE: cache}, use_cache=True, **given).logits)
        at += count
    near(torch.cat(found, 1), expected)
    # not for the first call, nor for 18 rows
    assert calls.count("decoder_layers") == runs


def test_mechanisms_that_are_put_in_taken_out_or_changed_are_those_that_decode(monkeypatch, calls):
    model, tokens = hybrid(monkeypatch), ids()
    bridge.fuse_layers(model)
    stepped(model, tokens)
    for change, runs in (
        (lambda: regard.swap(model, "delta_rule", only="*.layers.2.*"), 1),
        (lambda: regard.swap(model, "selective_temperature", only="*.layers.2.*"), 2),
        (lambda: regard.integrations.change_options(model, "*.layers.4.*", gate_normalizer=8.0), 2),
        (lambda: regard.unswap(model, "*.layers.4.*"), 2),
        (lambda: regard.swap(model, "softmax", only="*.layers.2.*"), 1),
        (lambda: regard.swap(model, "linear"), 1),
        (lambda: regard.swap(model, "selective_temperature"), 0),
        (lambda: regard.unswap(model), 1),
    ):
        change()
        calls.clear()
        found = stepped(model, tokens)
        assert calls.count("decoder_layers") == runs * (tokens.shape[1] - 1)
        with torch.inference_mode():
            near(found, model(tokens, use_cache=False).logits)


def test_hooks_in_a_hybrid_are_called_and_turn_fusing_off_for_what_they_see(monkeypatch, calls):
    model, tokens, seen = hybrid(monkeypatch), ids(), []
    expected = stepped(model, tokens)
    bridge.fuse_layers(model)
    layer = model.model.layers[2]
    for part in (layer.self_attn.regard, layer.self_attn.regard.projection.key_gate[0]):  # hooks still run
        seen.clear()
        calls.clear()
        hook = part.register_forward_hook(lambda *_: seen.append(1))
        near(stepped(model, tokens), expected)
        assert len(seen) == tokens.shape[1] and calls.count("decoder_layers") == 2 * (tokens.shape[1] - 1)
        hook.remove()
    calls.clear()
    with collect_losses(model):
        near(stepped(model, tokens), expected)
    assert calls.count("decoder_layers") == 2 * (tokens.shape[1] - 1)
    for part in (layer, layer.self_attn, layer.self_attn.q_proj):
        seen.clear()
        calls.clear()
        hook = part.register_forward_pre_hook(lambda *_: seen.append(1))
        near(stepped(model, tokens), expected)
        assert len(seen) == tokens.shape[1] and "decoder_layers" not in calls
        assert calls.count("decoder_inputs") == (4 if part is not layer else 5) * tokens.shape[1]
        hook.remove()


def test_windows_of_the_model_stay_in_a_hybrid(calls):
    model, tokens = mistral(), ids(2, 12)
    regard.swap(model, "clipped_softmax", only="*.layers.1.*")
    disturb(model)

    def pieces():
        cache, found, at = transformers.DynamicCache(config=model.config), [], 0
        for count in (3, 1, 3, 1, 4):
            with torch.inference_mode():
                here = model(tokens[:, at : at + count], **{bridge.CACHE: cache}, use_cache=True)
            found.append(here.logits)
            at += count
        return torch.cat(found, 1)

    expected = pieces()
    bridge.fuse_layers(model)
    near(pieces(), expected)


@pytest.mark.parametrize(("mechanism", "runs"), [(UNTURNED, 2), ("gated_linear", 1), ("lolcats:window=4", 1)])
def test_hybrids_that_are_saved_copied_or_trained_give_the_same(mechanism, runs, monkeypatch, calls, tmp_path):
    model, tokens = hybrid(monkeypatch, mechanism), ids()
    expected = stepped(model, tokens)
    bridge.fuse_layers(model)
    stepped(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert bridge.fuse_layers(loaded) == 5
    for other in (copy.deepcopy(model), loaded):
        calls.clear()
        near(stepped(other, tokens), expected)
        assert calls.count("decoder_layers") == runs * (tokens.shape[1] - 1)
    calls.clear()
    model(tokens[:, :1]).logits.sum().backward()
    assert model.model.layers[2].self_attn.q_proj.weight.grad is not None and not of_decoders(calls)


def test_other_architectures_stay_as_they_are():
    assert bridge.fuse_layers(gpt2()) == 0
    assert bridge.fuse_layers(llama(hidden_act="gelu")) == 0


@pytest.mark.parametrize("make", [llama, mistral, qwen2])
def test_models_that_commands_open_have_fast_kernels_and_the_same_weights_and_answers(make, tmp_path, calls):
    model, tokens = make(), ids()
    disturb(model)
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "num_beams": 2, **GREEDY}
    expected, written = model(tokens).logits, model.generate(tokens, **settings)
    model.save_pretrained(tmp_path)
    opened = load_causal_model(tmp_path)
    assert {type(x) for x in opened.modules() if isinstance(x, torch.nn.Linear)} == {Linear}
    calls.clear()
    with torch.inference_mode():
        near(opened(tokens).logits, expected)
    assert {"attention"} <= {*calls}
    assert torch.equal(opened.generate(tokens, **settings), written)
    opened.save_pretrained(tmp_path / "again")
    assert "regard" not in (tmp_path / "again" / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
