"""Swapped transformers models generate from the state of their mechanism: beams, padding, chats, prefixes, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from models import GREEDY, KEPT, LEFT, bart, disturb, gpt2, ids, llama, mistral, near, t5

import regard
from regard import Unsupported

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("regard.integrations.transformers")
attending = pytest.importorskip("regard.integrations.transformers.attending")

CORES = "core_context:group=2,window=3"
UNTURNED = f"{CORES},pool_keys=pre_rope"
MECHANISMS = [
    CORES,
    UNTURNED,
    "gated_linear",
    "delta_rule",
    "local:window=3",
    "selective_temperature",
    "mixture_of_heads",
    "sea",
]


def swapped(make, mechanism):
    model = make()
    regard.swap(model, mechanism)
    disturb(model)
    return model


def new_cache(model):
    return transformers.DynamicCache(config=model.config)


def after(model, tokens, cache=None, **options):
    """Logits of the tokens, and the cache after them."""
    with torch.no_grad():
        result = model(tokens, use_cache=True, **{bridge.CACHE: cache}, **options)
    return result.logits, getattr(result, bridge.CACHE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_generation_from_the_state_is_generation_from_the_whole(mechanism, make, options):
    if options and make is gpt2 and mechanism != CORES:
        return
    model = swapped(make, mechanism)
    settings = {"attention_mask": LEFT, "max_new_tokens": 7, **GREEDY, **options}
    tokens = ids()
    found = model.generate(tokens, **settings)
    assert torch.equal(found, model.generate(tokens, **settings, use_cache=False))
    filled = new_cache(model)
    assert torch.equal(model.generate(tokens, **settings, **{bridge.CACHE: filled}), found)
    assert all(type(layer) is bridge.StateLayer for layer in filled.layers)


@pytest.mark.parametrize("mechanism", ["gated_linear", "local:window=2"])
def test_the_state_stays_small(mechanism):
    model = swapped(llama, mechanism)
    _, few = after(model, ids(length=5))
    sizes = [layer.state.nbytes for layer in few.layers]
    _, many = after(model, ids(length=40), few)
    assert [layer.state.nbytes for layer in many.layers] == sizes
    assert many.get_seq_length() == 45


@pytest.mark.parametrize("mechanism", [CORES, UNTURNED, "gated_linear", "mixture_of_heads"])
def test_a_chat_goes_on_and_a_prefix_is_used_again(mechanism):
    model = swapped(llama, mechanism)
    prefix, first, second = ids(1, 6), ids(1, 3), ids(1, 5)
    _, cache = after(model, prefix)
    for turn in (first, second):
        whole, _ = after(model, torch.cat([prefix, turn], 1))
        found, _ = after(model, turn, copy.deepcopy(cache))
        near(found, whole[:, 6:])
    chat = model.generate(prefix, max_new_tokens=4, **GREEDY, **{bridge.CACHE: (kept := new_cache(model))})
    chat = torch.cat([chat, first], 1)
    found = model.generate(chat, max_new_tokens=4, **GREEDY, **{bridge.CACHE: kept})
    assert torch.equal(found, model.generate(chat, max_new_tokens=4, **GREEDY, use_cache=False))


@pytest.mark.parametrize("mechanism", ["linear", "sigmoid"])
def test_a_cache_may_keep_more_than_the_window_of_the_model(mechanism):
    model, tokens = swapped(mistral, mechanism), ids(2, 7)
    assert model.config.sliding_window < 7
    every, windows = transformers.DynamicCache(), new_cache(model)
    for at in range(7):
        found, _ = after(model, tokens[:, at : at + 1], every)
        near(found, after(model, tokens[:, at : at + 1], windows)[0])
    assert every.layers[0].keys.shape[2] > windows.layers[0].keys.shape[2]


def test_rows_of_a_state_are_chosen_and_repeated():
    model = swapped(llama, CORES)
    tokens, more = ids(), ids(length=2)
    _, cache = after(model, tokens, attention_mask=LEFT)
    rows = torch.tensor([2, 0])
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(rows)
    ones = torch.ones(3, 2, dtype=torch.long)
    mask = torch.cat([LEFT, ones], 1)
    found, _ = after(model, more[rows], chosen, attention_mask=mask[rows])
    expected, _ = after(model, more, copy.deepcopy(cache), attention_mask=mask)
    near(found, expected[rows])
    cache.batch_repeat_interleave(2)
    found, _ = after(model, more.repeat_interleave(2, 0), cache, attention_mask=mask.repeat_interleave(2, 0))
    near(found, expected.repeat_interleave(2, 0))
    cache.reset()
    near(after(model, tokens, cache)[0], after(model, tokens)[0])


def test_an_encoder_decoder_generates_from_states_too():
    model = swapped(bart, "gated_linear")
    tokens, settings = ids(), {"attention_mask": KEPT, "max_new_tokens": 6, "num_beams": 2, **GREEDY}
    found = model.generate(tokens, **settings, return_dict_in_generate=True)
    assert torch.equal(found.sequences, model.generate(tokens, **settings, use_cache=False))
    cache = getattr(found, bridge.CACHE)
    assert [type(layer) for layer in cache.self_attention_cache.layers] == [bridge.StateLayer]


@pytest.mark.parametrize("mechanism", ["complex_rotary", "sea"])
def test_a_decoder_that_counts_its_tokens_to_read_an_encoder_generates_from_the_whole(mechanism):
    model = bart()
    report = regard.swap(model, mechanism, only="*encoder_attn")
    disturb(model)
    assert any("use_cache is off" in note for note in report.notes)
    tokens, settings = ids(), {"attention_mask": KEPT, "max_new_tokens": 6, "num_beams": 2, **GREEDY}
    assert torch.equal(model.generate(tokens, **settings), model.generate(tokens, **settings, use_cache=False))
    with pytest.raises(Unsupported, match=rf"{mechanism}, which counts the queries.*try use_cache=False"):
        model.generate(tokens, **settings, use_cache=True)


@pytest.mark.parametrize("mechanism", ["sigmoid", "selective_temperature", "differential", "mixture_of_heads"])
def test_a_decoder_with_relative_positions_generates_with_its_own_cache(mechanism):
    model = swapped(t5, mechanism)
    settings = {"attention_mask": LEFT, "max_new_tokens": 5, **GREEDY}
    tokens = ids()
    expected = model.generate(tokens, **settings, use_cache=False)
    assert torch.equal(model.generate(tokens, **settings), expected)


@pytest.mark.parametrize("mechanism", [CORES, UNTURNED, "local:window=3"])
def test_long_after_a_prompt_tokens_are_those_of_the_whole(mechanism):
    """Windows and cores move to new memory several times."""
    model, tokens = swapped(llama, mechanism), ids(2, 70)
    _, cache = after(model, tokens[:, :9])
    found = []
    for t in range(9, 70):
        logits, cache = after(model, tokens[:, t : t + 1], cache)
        found.append(logits)
    near(torch.cat(found, 1), after(model, tokens)[0][:, 9:])


@pytest.mark.parametrize("mechanism", [CORES, "local:window=3"])
def test_a_token_has_its_angles_computed_once_in_all_layers(mechanism, monkeypatch):
    model, count = swapped(llama, mechanism), []
    _, cache = after(model, ids())
    own = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb, "forward", lambda *given, **told: count.append(1) or own(*given, **told)
    )
    after(model, ids(length=1), cache)
    assert len(count) == 1


def test_layers_beside_states_do_not_copy_their_keys_at_each_token():
    model = llama()
    regard.swap(model, {"*.layers.1.*": "local:window=3", "*": None})
    tokens, places = ids(2, 40), set()
    whole = model(tokens, use_cache=False).logits
    _, cache = after(model, tokens[:, :20])
    for t in range(20, 40):
        logits, cache = after(model, tokens[:, t : t + 1], cache)
        near(logits[:, 0], whole[:, t])
        places.add(cache.layers[0].keys.untyped_storage().data_ptr())
    assert len(places) <= 6
    found = model.generate(tokens[:, :9], max_new_tokens=5, num_beams=2, **GREEDY)
    assert torch.equal(found, model.generate(tokens[:, :9], max_new_tokens=5, num_beams=2, **GREEDY, use_cache=False))


def test_a_mask_is_read_once_for_all_layers(monkeypatch):
    model, read = swapped(llama, "local:window=3"), []
    own = attending.read_mask
    monkeypatch.setattr(attending, "read_mask", lambda *given, **told: read.append(1) or own(*given, **told))
    tokens = ids()
    with torch.no_grad():
        for mask in (LEFT, KEPT, LEFT):
            read.clear()
            found = model(tokens, attention_mask=mask, use_cache=False).logits
            assert len(read) == 1
            rows = [
                model(row[kept.bool()][None], use_cache=False).logits[0] for row, kept in zip(tokens, mask, strict=True)
            ]
            near(torch.cat([x[kept.bool()] for x, kept in zip(found, mask, strict=True)]), torch.cat(rows))


def test_the_slots_of_a_mask_are_counted_once_for_all_layers(monkeypatch):
    model, counted = llama(attn_implementation="regard:softmax"), []
    own = attending._filled
    monkeypatch.setattr(attending, "_filled", lambda *given: counted.append(1) or own(*given))
    _, cache = after(model, ids(), new_cache(model), attention_mask=LEFT)
    for tokens in (1, 2):
        seen = torch.cat([LEFT, torch.ones(3, tokens, dtype=torch.long)], 1)
        after(model, ids(length=tokens), copy.deepcopy(cache), attention_mask=seen)
        assert len(counted) == tokens


def test_pieces_with_padding_anywhere_are_the_whole():
    model = swapped(llama, CORES)
    tokens, positions = ids(), (KEPT.cumsum(-1) - 1).clamp(min=0)
    whole = model(tokens, attention_mask=KEPT, position_ids=positions, use_cache=False).logits
    cache, found = None, []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        given = {"attention_mask": KEPT[:, :end], "position_ids": positions[:, start:end]}
        logits, cache = after(model, tokens[:, start:end], cache, **given)
        found.append(logits)
    near(torch.cat(found, 1)[KEPT.bool()], whole[KEPT.bool()])


class TestRefused:
    """Requests that a state cannot serve are refused with the reason."""

    def test_taking_tokens_out(self):
        model = swapped(llama, "gated_linear")
        _, cache = after(model, ids())
        with pytest.raises(Unsupported, match="out of the state of a mechanism"):
            cache.crop(-2)
        with pytest.raises((Unsupported, ValueError)):
            model.generate(ids(1), max_new_tokens=6, prompt_lookup_num_tokens=2, **GREEDY)

    def test_caches_of_other_kinds_and_models(self):
        model, other = swapped(llama, "gated_linear"), llama()
        fixed = transformers.StaticCache(config=model.config, max_cache_len=20)
        with pytest.raises(Unsupported, match="StaticLayer for the state of gated_linear"):
            after(model, ids(), fixed)
        with pytest.raises(Unsupported, match="that another attention filled"):
            after(model, ids(), after(other, ids())[1])
        with pytest.raises(Unsupported, match="holds the states of mechanisms"):
            after(other, ids(), after(model, ids())[1])
        with pytest.raises(Unsupported, match="state of"):
            after(swapped(llama, "local:window=2"), ids(), after(model, ids())[1])

    def test_going_on_from_a_training_pass(self):
        model = swapped(llama, "gated_linear").train()
        cache = getattr(model(ids(), use_cache=True), bridge.CACHE)
        with pytest.raises(Unsupported, match="cache of a training pass"):
            model(ids(length=1), use_cache=True, **{bridge.CACHE: cache})

    def test_a_mask_that_hides_what_was_read(self):
        model = swapped(llama, "gated_linear")
        _, cache = after(model, ids())
        mask = torch.ones(3, 10, dtype=torch.long)
        mask[1, 2] = 0
        with pytest.raises(Unsupported, match="neither causality nor missing keys"):
            after(model, ids(length=1), cache, attention_mask=mask)
        _, cache = after(model, ids(), attention_mask=LEFT)
        with pytest.raises(Unsupported, match="hides tokens which a state has read"):
            after(model, ids(length=1), cache, attention_mask=mask)

    def test_positions_that_do_not_count_where_keys_are_placed_later(self):
        model, tokens = swapped(llama, UNTURNED), ids()
        skipping = torch.arange(9)[None] * 2
        with pytest.raises(Unsupported, match="positions that do not count tokens"):
            model(tokens, position_ids=skipping)
        _, cache = after(model, tokens)
        with pytest.raises(Unsupported, match="positions that do not count tokens"):
            after(model, ids(length=1), cache, position_ids=torch.full((1, 1), 12))
        for mechanism in (CORES, "local:window=3"):
            assert swapped(llama, mechanism)(tokens, position_ids=skipping).logits.isfinite().all()

    def test_frequencies_that_follow_the_length(self):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
        model = swapped(lambda: llama(rope_parameters=rope), UNTURNED)
        with pytest.raises(Unsupported, match="frequencies that follow the length"):
            model(ids())


def test_a_mask_of_pairs_is_honoured_beside_a_state_by_mechanisms_with_scores():
    model = swapped(llama, "sigmoid")
    tokens = ids(2, 8)
    seen = torch.ones(8, 8, dtype=torch.bool).tril() & (torch.rand(2, 1, 8, 8) > 0.3)
    seen |= torch.eye(8, dtype=torch.bool)
    with torch.no_grad():
        whole = model(tokens, attention_mask=seen, use_cache=False).logits
    first, cache = after(model, tokens[:, :5], attention_mask=seen[:, :, :5, :5])
    second, _ = after(model, tokens[:, 5:], cache, attention_mask=seen[:, :, 5:])
    near(torch.cat([first, second], 1), whole)
