from __future__ import annotations

import math

import pytest
import torch
from model_checks import check_comes_back_from_disk, made, ragged, read_by, small, without_gradient
from support import WANT_STATE, read_in_pieces
from torch.nn import functional as F

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported
from regard.models import EncoderDecoder
from regard.models.generation import beam_search

CROSSING = [n for n in list_mechanisms(pattern="causal-cross") if get_mechanism(n).prepare is None]


def make_model(cross="softmax", **options) -> EncoderDecoder:
    return made("encoder-decoder", **{"num_layers": 2, "cross_plan": cross, **options})


def batch(**sizes):
    return read_by(small("encoder-decoder"), **sizes)


@pytest.fixture(params=CROSSING)
def model(request) -> EncoderDecoder:
    return make_model(request.param)


def test_gradients_are_finite_with_padding_and_with_a_memory_without_tokens(model):
    model = make_model(model.config.cross_plan, dropout=0.1).train()
    ids, memory = batch()
    memory_valid = ragged(memory.shape)
    memory_valid[1] = False
    context = Context(mask=Mask(valid=ragged(ids.shape)), memory_mask=Mask(valid=memory_valid))
    loss = model.loss(ids, memory, context=context)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_first_token_sees_all_of_the_memory_and_its_order(model):
    ids, memory = batch(rows=1, n=2)[0], torch.arange(8)[None]
    other = torch.cat([memory[:, :-1], torch.tensor([[8]])], 1)
    output = model(ids, memory).output
    assert not torch.allclose(output[:, 0], model(ids, other).output[:, 0])
    assert not torch.allclose(output, model(ids, memory.flip(1)).output)


@pytest.mark.parametrize("positions", ["auto", "none", "rotary", "sinusoidal", "learned", "seqpe", "seqpe_scalar"])
def test_absorbing_the_memory_and_splitting_the_tokens_equals_the_whole(positions):
    model = make_model(["linear", ("softmax", {"positions": "rotary"})], positions=positions)
    ids, memory = batch()
    context = Context(memory_mask=Mask(valid=ragged(memory.shape)))
    whole = model(ids, memory, context=context).output
    for cut in (0, 1, 4, 6):
        output, state = read_in_pieces(model, ids, [cut, 6 - cut], model.encode_memory(memory, context=context))
        torch.testing.assert_close(output, whole)
        assert state.length.tolist() == [6] * 3
    at_once = model(ids[:, :4], memory, context=context.replace(want=WANT_STATE.want))
    torch.testing.assert_close(model(ids[:, 4:], state=at_once.state).output, whole[:, 4:])


def test_decoding_through_the_state_equals_recomputing(model):
    ids, memory = batch()
    masks = {"mask": Mask(valid=ragged(ids.shape)), "memory_mask": Mask(valid=ragged(memory.shape))}
    context = Context(memory_mask=masks["memory_mask"])
    output, _ = read_in_pieces(model, ids, 1, model.encode_memory(memory, context=context))
    torch.testing.assert_close(output, model(ids, memory, context=context).output)
    for beams in (1, 3):
        new = model.generate(ids, 4, memory=memory, beams=beams, **masks)
        again = model.generate(ids, 4, memory=memory, beams=beams, use_state=False, **masks)
        assert new.tolist() == again.tolist()


def test_a_memory_of_floats_and_explicit_positions():
    model = make_model(memory_vocab_size=None, memory_features=3)
    ids, memory = read_by(model.config)
    plain = model(ids, memory).output
    rows = torch.arange(8).expand(3, -1)
    torch.testing.assert_close(model(ids, memory, context=Context(memory_positions=rows)).output, plain)
    assert not torch.allclose(model(ids, memory, context=Context(memory_positions=rows * 3)).output, plain)
    later = Context(positions=torch.arange(6).expand(3, -1) + 5)
    assert not torch.allclose(model(ids, memory, context=later).output, plain)


def test_generated_tokens_are_the_likeliest_by_the_logits():
    model = make_model("linear")
    ids, memory = batch()
    new = model.generate(ids, 8, memory=memory)
    assert torch.equal(new, model(torch.cat([ids, new], 1), memory).output[:, 5:-1].argmax(-1))


def search(table, steps, **options):
    """A beam search in which a table gives the next token's probabilities from the last token only."""
    logits = torch.tensor(table, dtype=torch.float64).log()

    def read(ids, last, mask, state):
        return logits[ids[torch.arange(len(last)), last]], None

    return beam_search(read, torch.tensor([[0]]), steps, use_state=False, **options)[0].tolist()


def test_a_beam_search_finds_what_the_likeliest_token_hides():
    """The likelier first step, to 1, leads to uncertain steps; after 2 the next step is nearly certain."""
    garden_path = [[0.01, 0.54, 0.45], [0.34, 0.33, 0.33], [0.01, 0.01, 0.98]]
    assert search(garden_path, 3, beams=1)[0] == 1
    assert search(garden_path, 3, beams=2) == [2, 2, 2]


def test_a_beam_search_over_all_hypotheses_finds_the_best_sequence():
    table = torch.rand(4, 4, dtype=torch.float64).softmax(-1)
    sequences = torch.cartesian_prod(*[torch.arange(4)] * 4)
    before = F.pad(sequences, (1, 0))[:, :-1]
    best = sequences[table[before, sequences].log().sum(1).argmax()]
    assert search(table.tolist(), 4, beams=64) == best.tolist()


def test_the_length_penalty_decides_between_short_and_long():
    stops = [[0.0, 0.6, 0.4], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]]  # 2 ends; continuing with 1 costs little
    assert math.log(0.6) + 5 * math.log(0.9) < math.log(0.4) < (math.log(0.6) + 5 * math.log(0.9)) / 6
    assert search(stops, 6, beams=3, length_penalty=0.0, stop_tokens=[2]) == [2]
    for beams in (3, 64):  # 64 beams keep the short one to the end
        assert search(stops, 6, beams=beams, length_penalty=1.0, stop_tokens=[2]) == [1] * 6


def test_finished_rows_repeat_their_stop_token_in_a_beam_search():
    model, (ids, memory) = make_model(), batch(rows=8, n=1)
    for row in model.generate(ids, 9, memory=memory, beams=3, stop_tokens=[3, 4]).tolist():
        end = next((i for i, token in enumerate(row) if token in (3, 4)), 8)
        assert set(row[end:]) == {row[end]}
    assert model.generate(ids, 0, memory=memory, beams=3).shape == (8, 0)


def test_auxiliary_losses_of_encoder_and_decoder_are_added():
    moh = "mixture_of_heads"
    cross, everywhere = (
        make_model(moh, num_heads=8, **plans).train()(*batch()).losses["load_balance"][1]
        for plans in ({}, {"encoder_plan": moh, "decoder_plan": moh})
    )
    assert everywhere > 2 * cross


def test_bad_calls_are_refused():
    model = make_model()
    ids, memory = batch()
    state = model.encode_memory(memory)
    for call, words in (
        (lambda: model(ids), "encode_memory"),
        (lambda: model(ids, memory, state=state), "together with a state"),
        (lambda: model(ids[:2], memory), "one memory for each"),
        (lambda: model(ids[:2], state=state), "one memory for each"),
        (lambda: model(ids.float(), memory), "ids of dtype"),
        (lambda: model(ids, memory.float()), "memory of dtype"),
        (lambda: model(ids, state=state, context=Context(memory_mask=Mask(valid=memory > 2))), "not given"),
        (lambda: model(ids, memory, context=Context(grid=(2, 3))), "a grid"),
        (lambda: model(ids, memory, context=Context(mask=Mask(bias=torch.zeros(1, 1, 6, 6)))), "a bias"),
        (lambda: model.loss(ids, memory, ids[:, 1:]), "a target for each token"),
        (lambda: model.generate(ids, 3, memory=memory, beams=2, temperature=1.0), "temperature in a beam search"),
        (lambda: model.generate(ids, 3, memory=memory, beams=0), "beams"),
        (lambda: model.generate(ids, 3, memory=memory, length_penalty=0.5), "without a beam search"),
        (lambda: model.generate(ids, 3, memory=memory, beams=2, length_penalty=-1.0), "length_penalty"),
        (lambda: model.generate(ids, 3, memory=memory, mask=Mask(lengths=torch.tensor([3, 0, 1]))), "without tokens"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()


def test_a_cross_layer_reads_as_many_of_the_last_encoder_layers_as_it_says():
    """The inputs of each cross attention, against the encoder's layers run one by one, in another order."""
    plan = [("softmax", {"memory_layers": count, "positions": "rotary"}) for count in (1, 3, 2)]
    model = made("encoder-decoder", cross_plan=plan, encoder_layers=4, encoder_dim=12)
    seen, embedded = [], []
    for block in model.blocks:
        if block.cross:
            block.mixer.register_forward_pre_hook(
                lambda mixer, given, beside: seen.append((mixer, *given, beside["context"])), with_kwargs=True
            )
    model.encoder_blocks[0].mixer_norm.register_forward_pre_hook(lambda norm, given: embedded.append(given[0]))
    ids, memory = batch()
    model(ids, memory)
    hidden = [embedded[0]]
    for block in model.encoder_blocks:
        hidden.append(block(hidden[-1], context=Context()).output)
    for count, (mixer, x, read, context) in zip((1, 3, 2), list(seen), strict=True):
        others = context.replace(memory_positions=torch.arange(8).repeat(3, count))
        expected = torch.cat([model.encoder_norm(h) for h in hidden[-count:]], 1)
        assert read.shape == expected.shape == (3, 8 * count, 12)
        torch.testing.assert_close(mixer(x, read, context=context).output, mixer(x, expected, context=others).output)
        torch.testing.assert_close(read[:, ::count], model.encoder_norm(hidden[-count]))


@pytest.mark.parametrize("name", CROSSING)
def test_several_encoder_layers_are_absorbed_once_and_their_padding_is_not_read(name):
    model = make_model([(name, {"memory_layers": 2}), name], encoder_dim=24)
    ids, memory = batch()
    valid = ragged(memory.shape)
    context = Context(memory_mask=Mask(valid=valid))
    whole = model(ids, memory, context=context).output
    alone = [model(ids[i : i + 1], memory[i : i + 1, valid[i]]).output for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))
    output, _ = read_in_pieces(model, ids, 1, model.encode_memory(memory, context=context))
    torch.testing.assert_close(output, whole)


def test_the_tokens_of_several_encoder_layers_have_the_positions_of_their_token():
    plans = {"cross_plan": [("softmax", {"memory_layers": 2, "positions": "rotary"})] * 2}
    model, (ids, memory) = make_model(**plans), batch()
    rows = torch.arange(8).expand(3, -1)
    output = model(ids, memory).output
    torch.testing.assert_close(model(ids, memory, context=Context(memory_positions=rows)).output, output)
    new = model.generate(ids, 4, memory=memory, beams=3)
    assert new.tolist() == model.generate(ids, 4, memory=memory, beams=3, use_state=False).tolist()


@pytest.mark.parametrize("stack", [{"checkpoint_layers": 1}, {"reversible": True}, {"exits": (1,)}])
def test_several_encoder_layers_learn_with_every_stack(stack, tmp_path):
    plan = [("softmax", {"memory_layers": 2}), "linear"]
    model = make_model(plan, encoder_dim=24, stack=stack)
    ids, memory = batch()
    check_comes_back_from_disk(model, (ids, memory), tmp_path)
    with torch.no_grad():
        expected = model(ids, memory).output
    torch.testing.assert_close(model(ids, memory).output, expected)
    if stack == {"checkpoint_layers": 1}:
        plain = make_model(plan, encoder_dim=24)
        plain.load_state_dict(model.state_dict())
        for one in (model, plain):
            one.train().loss(ids, memory).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    else:
        model.train().loss(ids, memory).backward()
        assert not without_gradient(model)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("encoder-decoder", {"cross_plan": "softmax:memory_layers=3", "num_layers": 2}, "memory has 2 layers"),
        ("encoder-decoder", {"cross_plan": "softmax:memory_layers=0"}, "memory_layers=0"),
        ("encoder-decoder", {"decoder_plan": "softmax:memory_layers=1"}, "without a memory"),
        ("encoder-decoder", {"encoder_dim": 0}, "encoder_dim"),
        ("language model", {"plan": "softmax:memory_layers=2"}, "without a memory"),
        ("forecaster", {"cross_plan": "softmax:memory_layers=2"}, "memory has 1 layer"),
    ],
)
def test_encoder_layers_that_are_not_there_cannot_be_read(kind, options, words):
    with pytest.raises(Unsupported, match=words):
        made(kind, **options)
