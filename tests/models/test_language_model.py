from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.blocks import evaluation_mode, input_positions, read_plan
from regard.models.generation import beam_search, sample
from regard.models.language_model import next_tokens

PLANS = {
    "softmax": ["softmax"] * 2,
    "linear": ["linear"] * 2,
    "mixer": ["mamba2", "gated_linear"],
    "hybrid": ["linear", ("softmax", {"positions": "none", "num_heads": 4, "feed_forward": 0})],
}
WANT_STATE = Context(want=frozenset({"state"}))


def make_model(plan=PLANS["hybrid"], **options) -> LanguageModel:
    config = LanguageModelConfig(vocab_size=13, dim=16, plan=plan, num_heads=2, **options)
    return LanguageModel(config).double().eval()


def ragged(ids: torch.Tensor) -> torch.Tensor:
    """Padding left, inside and right; every row keeps a token."""
    valid = torch.rand(ids.shape) < 0.6
    valid[:, ids.shape[1] // 2] = True
    return valid


@pytest.fixture(params=PLANS)
def model(request) -> LanguageModel:
    return make_model(PLANS[request.param])


@pytest.mark.parametrize("positions", ["auto", "none", "rotary", "sinusoidal", "learned", "seqpe", "seqpe_mul"])
def test_split_and_resume_equals_whole(positions):
    model = make_model(["linear", "softmax"], positions=positions)
    ids = torch.randint(13, (3, 11))
    whole = model(ids).output
    for cut in (0, 1, 5, 11):
        first = model(ids[:, :cut], context=WANT_STATE)
        second = model(ids[:, cut:], state=first.state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole)
        assert second.state.length.tolist() == [11] * 3


def test_padding_anywhere_equals_no_padding(model):
    ids = torch.randint(13, (4, 9))
    valid = ragged(ids)
    output = model(ids, context=Context(mask=Mask(valid=valid))).output
    for row in range(4):
        alone = model(ids[row][valid[row]][None]).output[0]
        torch.testing.assert_close(output[row][valid[row]], alone)
    assert (output[~valid] == 0).all()


def test_packed_equals_separate(model):
    ids = torch.randint(13, (1, 10))
    borders = [0, 4, 4, 5, 10]
    mask = Mask(cu_seqlens=torch.tensor(borders))
    result = model(ids, context=Context(mask=mask, want=frozenset({"state"})))
    for start, end in itertools.pairwise(borders):
        torch.testing.assert_close(result.output[:, start:end], model(ids[:, start:end]).output)
    assert result.state.length.tolist() == [4, 0, 1, 5]


def test_a_token_does_not_see_later_ones(model):
    ids = torch.randint(13, (2, 8))
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 13
    before, after = model(ids).output, model(changed).output
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_order_of_tokens_matters_without_layer_positions():
    model = make_model(["softmax"], positions="sinusoidal")
    assert model.positions is not None
    ids = torch.tensor([[1, 2, 3, 4], [3, 2, 1, 4]])
    first, second = model(ids).output[:, -1]
    assert not torch.allclose(first, second)


def test_auto_positions_come_from_the_cards():
    model = make_model(["softmax", ("softmax", {"positions": "none"})])
    schemes = [block.mixer.positions.name for block in model.blocks]
    assert schemes == ["rotary", "none"]
    assert model.positions is None
    gated, wrapped = make_model(["gated_linear", ("mixture_of_heads", {"mechanism": "gated_linear"})]).blocks
    assert gated.mixer.positions.name == wrapped.mixer.attention.positions.name == "none"


def test_generation_equals_recomputing_from_scratch(model):
    ids = torch.randint(13, (3, 6))
    valid = ragged(ids)
    new = model.generate(ids, 7, mask=Mask(valid=valid))
    again = model.generate(ids, 7, mask=Mask(valid=valid), use_state=False)
    assert new.tolist() == again.tolist()
    for row in range(3):
        sequence = ids[row][valid[row]][None]
        for token in new[row]:
            assert int(model(sequence).output[0, -1].argmax()) == int(token)
            sequence = torch.cat([sequence, token.view(1, 1)], 1)


def test_generation_of_a_row_does_not_depend_on_the_others(model):
    ids = torch.randint(13, (3, 6))
    together = model.generate(ids, 5)
    alone = torch.cat([model.generate(row[None], 5) for row in ids])
    assert together.tolist() == alone.tolist()


def test_generation_stops_at_stop_tokens(model):
    ids = torch.randint(13, (4, 5))
    free = model.generate(ids, 8)
    stop = int(free[0, 3])
    stopped = model.generate(ids, 8, stop_tokens=[stop])
    for row, unstopped in zip(stopped.tolist(), free.tolist(), strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else 8
        assert row[:end] == unstopped[: min(end, len(row))]
        assert all(token == stop for token in row[end:])
    assert model.generate(ids[:1], 8, stop_tokens=[stop]).shape[1] == free[0].tolist().index(stop) + 1


def test_stream_yields_what_generate_returns_without_dropout_or_lasting_change():
    model = make_model(dropout=0.5).train()
    ids = torch.randint(13, (2, 5))
    streamed = torch.stack(list(model.generate_stream(ids, 4)), 1)
    assert streamed.tolist() == model.generate(ids, 4).tolist()
    assert model.training and model.blocks[0].training


def test_sampling_is_reproducible_and_follows_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, -1)
    draws = sample(logits, temperature=2.0, generator=torch.Generator().manual_seed(1))
    again = sample(logits, temperature=2.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draws, again)
    frequency = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(frequency, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)


def test_top_k_and_top_p_keep_the_likeliest():
    probability = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probability.log().expand(2_000, -1)
    assert set(sample(logits, temperature=1.0, top_k=2).tolist()) == {1, 3}
    assert set(sample(logits, temperature=1.0, top_p=0.6).tolist()) == {1, 3}
    assert set(sample(logits, temperature=1.0, top_p=0.4).tolist()) == {1}
    assert set(sample(logits, temperature=1.0, top_k=3, top_p=1.0).tolist()) == {1, 2, 3}


def test_loss_is_the_mean_over_valid_next_tokens(model):
    ids = torch.randint(13, (3, 7))
    valid = ragged(ids)
    nats = []
    for row in range(3):
        tokens = ids[row][valid[row]][None]
        logits = model(tokens).output[0, :-1]
        nats.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    expected = torch.cat(nats).mean()
    torch.testing.assert_close(model.loss(ids, context=Context(mask=Mask(valid=valid))), expected)


def test_next_tokens_stop_at_document_borders():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_tokens(ids).tolist() == [[6, 7, 8, 9, -100]]
    packed = next_tokens(ids, Mask(cu_seqlens=torch.tensor([0, 2, 5])))
    assert packed.tolist() == [[6, -100, 8, 9, -100]]


def test_beams_share_a_prefix_through_state_select(model):
    ids = torch.randint(13, (2, 4))
    state = model(ids, context=WANT_STATE).state.select(torch.tensor([1, 1, 0]))
    tail = torch.randint(13, (3, 2))
    expected = model(torch.cat([ids[[1, 1, 0]], tail], 1)).output[:, 4:]
    torch.testing.assert_close(model(tail, state=state).output, expected)


def likelihood(model, ids, new):
    logits = model(torch.cat([ids, new[:, :-1]], 1)).output[:, ids.shape[1] - 1 :]
    return -F.cross_entropy(logits.transpose(1, 2), new, reduction="none").sum(1)


def test_one_beam_takes_the_likeliest_token_each_time(model):
    ids = torch.randint(13, (3, 5))
    greedy = model.generate(ids, 9)
    assert torch.equal(model.generate(ids, 9, beams=1), greedy)
    assert torch.equal(beam_search(model._reader(True), ids, 9, beams=1), greedy)


def test_beams_for_all_hypotheses_find_the_likeliest_continuation(model):
    ids = torch.randint(13, (1, 4))
    every = torch.cartesian_prod(*[torch.arange(13)] * 3)
    best = every[likelihood(model, ids.expand(len(every), -1), every).argmax()]
    found = model.generate(ids, 3, beams=13 * 13)
    assert torch.equal(found[0], best)
    assert likelihood(model, ids, found) >= likelihood(model, ids, model.generate(ids, 3))


def test_beams_read_padding_nowhere_and_go_on_from_states_as_from_the_whole(model):
    ids = torch.randint(13, (5, 8))
    valid = ragged(ids)
    found = model.generate(ids, 6, beams=3, mask=Mask(valid=valid))
    alone = [model.generate(row[kept][None], 6, beams=3)[0] for row, kept in zip(ids, valid, strict=True)]
    assert torch.equal(found, torch.stack(alone))
    assert torch.equal(found, model.generate(ids, 6, beams=3, mask=Mask(valid=valid), use_state=False))


def test_beams_go_on_from_the_state_of_inserted_tokens():
    model = make_model([("landmark", {"block": 3})] * 2)
    ids = torch.randint(13, (4, 7))
    assert torch.equal(model.generate(ids, 7, beams=3), model.generate(ids, 7, beams=3, use_state=False))


def test_a_beam_search_refuses_what_it_cannot_honour(model):
    ids = torch.randint(13, (1, 4))
    for options, words in (
        ({"beams": 2, "temperature": 1.0}, "temperature in a beam search"),
        ({"beams": 0}, "beams"),
        ({"length_penalty": 0.5}, "without a beam search"),
    ):
        with pytest.raises(Unsupported, match=words):
            model.generate(ids, 3, **options)


def test_gradients_reach_every_parameter():
    model = make_model(tie_embeddings=False, positions="learned", max_length=9).train()
    model.loss(torch.arange(13)[None, :9]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_draws_from_the_calls_generator():
    model = make_model(dropout=0.4).train()
    ids = torch.randint(13, (2, 6))
    first, second, third = (
        model(ids, context=Context(generator=torch.Generator().manual_seed(seed))).output for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "sofmax"}, "try softmax"),
        ({"plan": [("softmax", 3)]}, "plan entry"),
        ({"plan": "token_parameter"}, "softmax.*linear.*token_parameter"),
        ({"plan": "low_rank_pooling"}, "pool="),
        ({"plan": []}, "0 layers"),
        ({"plan": ["softmax"], "num_layers": 2}, "num_layers=1"),
        ({"positions": "rotry"}, "try rotary"),
        ({"plan": [("softmax", {"positions": "learned"})]}, "for one layer"),
        ({"plan": [("softmax", {"windw": 3})]}, "windw"),
        ({"norm": "batch"}, "norm"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_bad_configs_are_refused_with_the_nearest(options, words):
    with pytest.raises(Unsupported, match=words):
        LanguageModel(LanguageModelConfig(**{"vocab_size": 5, "dim": 8, "num_heads": 2, **options}))


@pytest.mark.parametrize("scheme", ["sinusoidal", "learned", "seqpe"])
def test_positions_at_the_input_that_a_mechanism_does_not_take_are_refused_with_its_reason(scheme):
    layers = list_mechanisms(where=lambda c: c.kind in ("attention", "mixer", "wrapper"))
    refusing = [get_mechanism(name) for name in layers if scheme not in get_mechanism(name).accepts_positions]
    assert {card.name for card in refusing} >= {"compressive", "transformer_xl", "positional_attention"}
    for card in refusing:
        with pytest.raises(Unsupported) as caught:
            input_positions(read_plan(card.name, 1), scheme)
        assert card.refused_positions and card.refused_positions in caught.value.asked


def test_bad_calls_are_refused(model):
    ids = torch.randint(13, (2, 3))
    for options in ({"top_k": 3}, {"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}):
        with pytest.raises(Unsupported):
            model.generate(ids, 2, **options)
    with pytest.raises(Unsupported, match="without tokens"):
        model.generate(ids, 2, mask=Mask(lengths=torch.tensor([3, 0])))
    with pytest.raises(Unsupported, match="integers"):
        model(torch.randn(2, 3))
    with pytest.raises(Unsupported, match="roles"):
        model(ids, context=Context(roles=torch.zeros_like(ids)))


@pytest.mark.parametrize("mode", [True, False])
def test_generation_leaves_every_module_in_its_mode(mode):
    model = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, num_layers=2)).train(mode)
    model.blocks[0].train(not mode)  # a frozen part, for example
    before = [module.training for module in model.modules()]
    model.generate(torch.zeros(1, 3, dtype=torch.long), 2)
    assert [module.training for module in model.modules()] == before


def test_a_loss_needs_a_target_for_each_token():
    model = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, num_layers=1))
    assert model.loss(torch.zeros(2, 0, dtype=torch.long)) == 0
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(Unsupported, match="a target for each token"):
        model.loss(ids, ids[:, 1:])


def test_a_model_in_training_mode_stays_without_dropout_until_the_last_thread_is_done():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3).eval())
    modes = [module.training for module in model.modules()]
    first, second = evaluation_mode(model), evaluation_mode(model[1])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model[1].training and model.training
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == modes
