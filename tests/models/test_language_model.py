from __future__ import annotations

import pytest
import torch
from model_checks import made, ragged
from support import WANT_STATE, read_in_pieces
from torch import nn

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported
from regard.models import LanguageModel
from regard.models.evaluating import evaluation_mode
from regard.models.generation import beam_search, sample
from regard.models.language_model import next_tokens
from regard.models.layer_plan import read_plan
from regard.models.placing import input_positions

HYBRID = ["linear", ("softmax", {"positions": "none", "num_heads": 4, "feed_forward": 0})]


def make_model(plan=HYBRID, **options) -> LanguageModel:
    return made("language model", plan=plan, vocab_size=13, **options)


@pytest.fixture(params=[HYBRID, ["mamba2", "gated_linear"]], ids=["hybrid", "mixers"])
def model(request) -> LanguageModel:
    return make_model(request.param)


@pytest.mark.parametrize("positions", ["auto", "none", "rotary", "sinusoidal", "learned", "seqpe", "seqpe_mul"])
def test_split_and_resume_equals_whole(positions):
    model = make_model(["linear", "softmax"], positions=positions)
    ids = torch.randint(13, (3, 11))
    whole = model(ids).output
    for cut in (0, 1, 5, 11):
        output, state = read_in_pieces(model, ids, [cut, 11 - cut])
        torch.testing.assert_close(output, whole)
        assert state.length.tolist() == [11] * 3


def test_the_state_of_a_packed_row_has_a_row_for_each_document(model):
    mask = Mask(cu_seqlens=torch.tensor([0, 4, 4, 5, 10]))
    state = model(torch.randint(13, (1, 10)), context=WANT_STATE.replace(mask=mask)).state
    assert state.length.tolist() == [4, 0, 1, 5]


def test_auto_positions_come_from_the_cards():
    wrapped = ("mixture_of_heads", {"mechanism": "gated_linear"})
    model = make_model(["softmax", ("softmax", {"positions": "none"}), "gated_linear", wrapped])
    mixers = [block.mixer for block in model.blocks]
    schemes = [mixer.positions.name for mixer in (*mixers[:3], mixers[3].attention)]
    assert schemes == ["rotary", "none", "none", "none"] and model.positions is None


def test_generation_equals_recomputing_each_row_from_scratch(model):
    ids = torch.randint(13, (3, 6))
    valid = ragged(ids.shape)
    new = model.generate(ids, 7, mask=Mask(valid=valid))
    assert torch.equal(new, model.generate(ids, 7, mask=Mask(valid=valid), use_state=False))
    for row in range(3):
        sequence = torch.cat([ids[row][valid[row]], new[row]])[None]
        assert torch.equal(model(sequence).output[0, -8:-1].argmax(-1), new[row])


def test_generation_stops_at_stop_tokens(model):
    ids = torch.randint(13, (4, 5))
    free = model.generate(ids, 8).tolist()
    stop = free[0][3]
    for row, unstopped in zip(model.generate(ids, 8, stop_tokens=[stop]).tolist(), free, strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else 8
        assert row[:end] == unstopped[: min(end, len(row))]
        assert all(token == stop for token in row[end:])
    assert model.generate(ids[:1], 8, stop_tokens=[stop]).shape[1] == free[0].index(stop) + 1


def test_stream_yields_what_generate_returns_without_dropout_and_leaves_every_module_in_its_mode():
    model = make_model(dropout=0.5).train()
    model.blocks[0].eval()  # such as a frozen part
    before = [module.training for module in model.modules()]
    ids = torch.randint(13, (2, 5))
    streamed = torch.stack(list(model.generate_stream(ids, 4)), 1)
    assert torch.equal(streamed, model.generate(ids, 4))
    assert [module.training for module in model.modules()] == before


def test_sampling_is_reproducible_and_follows_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, -1)
    draws, again = (sample(logits, temperature=2.0, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(draws, again)
    frequency = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(frequency, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)


def test_draws_near_temperature_zero_are_the_likeliest():
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 2.9], [-5.0, -9.0, -6.0, -torch.inf]])
    for temperature in (1e-30, 1e-39, 1e-45, 1e-320):
        assert sample(logits, temperature=temperature).tolist() == [2, 0]


def test_top_k_and_top_p_keep_the_likeliest():
    probability = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probability.log().expand(2_000, -1)
    assert set(sample(logits, temperature=1.0, top_k=2).tolist()) == {1, 3}
    assert set(sample(logits, temperature=1.0, top_p=0.6).tolist()) == {1, 3}
    assert set(sample(logits, temperature=1.0, top_p=0.4).tolist()) == {1}
    assert set(sample(logits, temperature=1.0, top_k=3, top_p=1.0).tolist()) == {1, 2, 3}


def test_next_tokens_stop_at_document_borders():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_tokens(ids).tolist() == [[6, 7, 8, 9, -100]]
    packed = next_tokens(ids, Mask(cu_seqlens=torch.tensor([0, 2, 5])))
    assert packed.tolist() == [[6, -100, 8, 9, -100]]


def test_one_beam_takes_the_likeliest_token_each_time(model):
    ids = torch.randint(13, (3, 5))
    greedy = model.generate(ids, 9)
    assert torch.equal(model.generate(ids, 9, beams=1), greedy)
    assert torch.equal(beam_search(model.reader(), ids, 9, beams=1), greedy)


def test_beams_read_padding_nowhere_and_go_on_from_states_as_from_the_whole(model):
    ids = torch.randint(13, (5, 8))
    valid = ragged(ids.shape)
    found = model.generate(ids, 6, beams=3, mask=Mask(valid=valid))
    alone = [model.generate(row[kept][None], 6, beams=3)[0] for row, kept in zip(ids, valid, strict=True)]
    assert torch.equal(found, torch.stack(alone))
    assert torch.equal(found, model.generate(ids, 6, beams=3, mask=Mask(valid=valid), use_state=False))


@pytest.mark.parametrize("scheme", ["sinusoidal", "learned", "seqpe"])
def test_positions_at_the_input_that_a_mechanism_does_not_take_are_refused_with_its_reason(scheme):
    layers = list_mechanisms(where=lambda c: c.kind in ("attention", "mixer", "wrapper"))
    refusing = [get_mechanism(name) for name in layers if scheme not in get_mechanism(name).accepts_positions]
    assert {card.name for card in refusing} >= {"compressive", "transformer_xl", "positional_attention"}
    for card in refusing:
        with pytest.raises(Unsupported) as caught:
            input_positions(read_plan(card.name, 1), scheme)
        assert card.refused_positions and card.refused_positions in caught.value.asked


def test_bad_calls_are_refused():
    model, ids = make_model(), torch.randint(13, (2, 5))
    for call, words in (
        (lambda: model.generate(ids, 2, top_k=3), "top_k"),
        (lambda: model.generate(ids, 2, temperature=-1.0), "temperature"),
        (lambda: model.generate(ids, 2, temperature=1.0, top_p=0.0), "top_p"),
        (lambda: model.generate(ids, 2, mask=Mask(lengths=torch.tensor([5, 0]))), "without tokens"),
        (lambda: model.generate(ids, 2, beams=2, temperature=1.0), "temperature in a beam search"),
        (lambda: model.generate(ids, 2, beams=0), "beams"),
        (lambda: model.generate(ids, -1), "max_new_tokens=-1"),
        (lambda: model.generate(ids, -1, beams=2), "max_new_tokens=-1"),
        (lambda: model.generate(ids, 2, length_penalty=0.5), "without a beam search"),
        (lambda: model(torch.randn(2, 3)), "integers"),
        (lambda: model(ids, context=Context(roles=torch.zeros_like(ids))), "roles"),
        (lambda: model.loss(ids, ids[:, 1:]), "a target for each token"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()


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
