from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported
from regard.models import (
    EncoderDecoder,
    EncoderDecoderConfig,
    count_parameters,
    from_pretrained,
    match_parameters,
    save_pretrained,
)
from regard.models.encoder_decoder import count_layers
from regard.models.generation import beam_search

CROSSING = [n for n in list_mechanisms(pattern="causal-cross") if get_mechanism(n).prepare is None]
VOCAB, MEMORY_VOCAB = 11, 9
WANT_STATE = Context(want=frozenset({"state"}))


def make_model(cross="softmax", **options) -> EncoderDecoder:
    sizes = {"memory_vocab_size": MEMORY_VOCAB, "dim": 16, "num_heads": 2, "num_layers": 2}
    return EncoderDecoder(EncoderDecoderConfig(VOCAB, **{**sizes, "cross_plan": cross, **options})).double().eval()


def ragged(shape):
    """Padding left, inside and right; every row keeps a token."""
    valid = torch.rand(shape) < 0.6
    valid[:, shape[1] // 2] = True
    return valid


def batch(rows=3, n=6, m=8):
    return torch.randint(VOCAB, (rows, n)), torch.randint(MEMORY_VOCAB, (rows, m))


@pytest.fixture(params=CROSSING)
def model(request) -> EncoderDecoder:
    return make_model(request.param)


def test_padding_anywhere_equals_no_padding(model):
    ids, memory = batch(rows=4)
    valid, memory_valid = ragged(ids.shape), ragged(memory.shape)
    context = Context(mask=Mask(valid=valid), memory_mask=Mask(valid=memory_valid))
    output = model(ids, memory, context=context).output
    for row in range(4):
        alone = model(ids[row][valid[row]][None], memory[row][memory_valid[row]][None]).output[0]
        torch.testing.assert_close(output[row][valid[row]], alone)
    assert (output[~valid] == 0).all()


def test_packed_equals_separate():
    model = make_model("linear")
    ids, memory = batch(rows=1, n=7, m=9)
    masks = [Mask(cu_seqlens=torch.tensor(borders)) for borders in ([0, 3, 7], [0, 5, 9])]
    output = model(ids, memory, context=Context(mask=masks[0], memory_mask=masks[1])).output
    torch.testing.assert_close(output[:, :3], model(ids[:, :3], memory[:, :5]).output)
    torch.testing.assert_close(output[:, 3:], model(ids[:, 3:], memory[:, 5:]).output)


def test_a_memory_without_tokens_gives_finite_logits_and_gradients(model):
    ids, memory = batch()
    context = Context(memory_mask=Mask(lengths=torch.tensor([8, 0, 3])))
    loss = model.train().loss(ids, memory, context=context)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_token_does_not_see_later_ones_but_all_of_the_memory(model):
    ids, memory = batch(rows=2)
    changed, other = ids.clone(), memory.clone()
    changed[:, 3] = (ids[:, 3] + 1) % VOCAB
    other[:, -1] = (memory[:, -1] + 1) % MEMORY_VOCAB
    before, after = model(ids, memory).output, model(changed, memory).output
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)
    assert not torch.allclose(before[:, 3:], after[:, 3:])
    assert not torch.allclose(before[:, 0], model(ids, other).output[:, 0])


def test_the_decoder_tells_the_order_of_the_memory(model):
    ids, memory = batch(rows=1)
    memory = torch.arange(8)[None]
    assert not torch.allclose(model(ids, memory).output, model(ids, memory.flip(1)).output)


@pytest.mark.parametrize("positions", ["auto", "none", "rotary", "sinusoidal", "learned", "seqpe", "seqpe_scalar"])
def test_absorbing_the_memory_and_splitting_the_tokens_equals_the_whole(positions):
    model = make_model(["linear", ("softmax", {"positions": "rotary"})], positions=positions)
    ids, memory = batch()
    context = Context(memory_mask=Mask(valid=ragged(memory.shape)))
    whole = model(ids, memory, context=context).output
    for cut in (0, 1, 4, 6):
        state = model.encode_memory(memory, context=context)
        first = model(ids[:, :cut], state=state)
        second = model(ids[:, cut:], state=first.state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole)
        assert second.state.length.tolist() == [6] * 3
    at_once = model(ids[:, :4], memory, context=context.replace(want=frozenset({"state"})))
    torch.testing.assert_close(model(ids[:, 4:], state=at_once.state).output, whole[:, 4:])


def test_decoding_through_the_state_equals_recomputing(model):
    ids, memory = batch()
    masks = {"mask": Mask(valid=ragged(ids.shape)), "memory_mask": Mask(valid=ragged(memory.shape))}
    context = Context(memory_mask=masks["memory_mask"])
    steps, state = [], model.encode_memory(memory, context=context)
    for token in ids.unbind(1):
        result = model(token[:, None], state=state)
        steps, state = [*steps, result.output], result.state
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, memory, context=context).output)
    for beams in (1, 3):
        new = model.generate(ids, 7, memory=memory, beams=beams, **masks)
        again = model.generate(ids, 7, memory=memory, beams=beams, use_state=False, **masks)
        assert new.tolist() == again.tolist()


def test_a_memory_of_floats_and_explicit_positions():
    model = make_model(memory_vocab_size=None, memory_features=3)
    ids, memory = batch()[0], torch.randn(3, 8, 3, dtype=torch.float64)
    plain = model(ids, memory).output
    rows = torch.arange(8).expand(3, -1)
    torch.testing.assert_close(model(ids, memory, context=Context(memory_positions=rows)).output, plain)
    assert not torch.allclose(model(ids, memory, context=Context(memory_positions=rows * 3)).output, plain)
    later = Context(positions=torch.arange(6).expand(3, -1) + 5)
    assert not torch.allclose(model(ids, memory, context=later).output, plain)


def test_the_likeliest_tokens_are_those_of_the_logits_until_a_stop_token(model):
    ids, memory = batch()
    free = model.generate(ids, 8, memory=memory)
    sequence = ids
    for token in free.unbind(1):
        assert model(sequence, memory).output[:, -1].argmax(-1).tolist() == token.tolist()
        sequence = torch.cat([sequence, token[:, None]], 1)
    stop = int(free[0, 3])
    for row, unstopped in zip(model.generate(ids, 8, memory=memory, stop_tokens=[stop]).tolist(), free, strict=True):
        kept = unstopped.tolist()
        end = kept.index(stop) + 1 if stop in kept else 8
        assert row[:end] == kept[: min(end, len(row))]
        assert all(token == stop for token in row[end:])


def test_sampling_follows_the_generator():
    model = make_model()
    ids, memory = batch()
    draw = {
        seed: model.generate(
            ids, 12, memory=memory, temperature=2.0, top_k=5, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        for seed in (1, 2)
    }
    again = model.generate(
        ids, 12, memory=memory, temperature=2.0, top_k=5, generator=torch.Generator().manual_seed(1)
    ).tolist()
    assert draw[1] == again != draw[2]


def reader(table):
    """A model whose next token depends on the last one alone, by a table of probabilities."""
    logits = torch.tensor(table, dtype=torch.float64).log()
    return lambda ids, last, mask, state: (logits[ids[torch.arange(len(last)), last]], None)


def search(table, steps, **options):
    new = beam_search(reader(table), torch.tensor([[0]]), steps, use_state=False, **options)
    return new[0].tolist()


GARDEN_PATH = [[0.01, 0.54, 0.45], [0.34, 0.33, 0.33], [0.01, 0.01, 0.98]]
"""The likelier first step, to 1, leads nowhere in particular; after 2 all is clear."""


def test_a_beam_search_finds_what_the_likeliest_token_hides():
    assert search(GARDEN_PATH, 3, beams=1)[0] == 1
    assert search(GARDEN_PATH, 3, beams=2) == [2, 2, 2]


def test_a_beam_search_over_all_hypotheses_finds_the_best_sequence():
    table = torch.rand(4, 4, dtype=torch.float64).softmax(-1)
    sequences = torch.cartesian_prod(*[torch.arange(4)] * 4)
    before = F.pad(sequences, (1, 0))[:, :-1]
    best = sequences[table[before, sequences].log().sum(1).argmax()]
    assert search(table.tolist(), 4, beams=64) == best.tolist()


def test_beams_of_one_take_the_likeliest_token_each_time():
    model = make_model()
    ids, memory = batch()
    stop = int(model.generate(ids, 8, memory=memory)[1, 4])
    for options in ({}, {"stop_tokens": [stop]}):
        greedy = model.generate(ids, 8, memory=memory, **options)
        read, state = one_by_one(model, memory)
        assert beam_search(read, ids, 8, beams=1, state=state, **options).tolist() == greedy.tolist()


def one_by_one(model, memory):
    def read(ids, last, mask, state):
        result = model(ids, state=state)
        return result.output[torch.arange(len(last)), last], result.state

    return read, model.encode_memory(memory)


def test_a_wider_search_finds_likelier_sequences_and_rows_do_not_meet():
    model = make_model(tie_embeddings=True)
    ids, memory = batch(rows=16, n=1)

    def likelihood(new):
        logits = model(torch.cat([ids, new[:, :-1]], 1), memory).output
        return -F.cross_entropy(logits.transpose(1, 2), new, reduction="none").sum(1)

    greedy, found = (model.generate(ids, 6, memory=memory, beams=beams) for beams in (1, 5))
    assert likelihood(found).mean() > likelihood(greedy).mean()
    alone = [model.generate(a[None], 6, memory=b[None], beams=5)[0].tolist() for a, b in zip(ids, memory, strict=True)]
    assert found.tolist() == alone


def test_the_length_penalty_decides_between_short_and_long():
    stops = [[0.0, 0.6, 0.4], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]]  # 2 ends; going on by 1 costs little a token
    short = search(stops, 6, beams=3, length_penalty=0.0, stop_tokens=[2])
    assert short == [2]
    for beams in (3, 64):  # among 64 the short one is kept to the end
        assert search(stops, 6, beams=beams, length_penalty=1.0, stop_tokens=[2]) == [1] * 6
    assert math.log(0.4) > math.log(0.6) + 5 * math.log(0.9)
    assert math.log(0.4) < (math.log(0.6) + 5 * math.log(0.9)) / 6


def test_finished_rows_repeat_their_stop_token_in_a_beam_search():
    model = make_model()
    ids, memory = batch(rows=8, n=1)
    stop = [3, 4]
    for row in model.generate(ids, 9, memory=memory, beams=3, stop_tokens=stop).tolist():
        ends = [i for i, token in enumerate(row) if token in stop]
        assert not ends or set(row[ends[0] :]) == {row[ends[0]]}
    assert model.generate(ids, 0, memory=memory, beams=3).shape == (8, 0)


def test_loss_is_the_mean_over_valid_next_tokens():
    model = make_model()
    ids, memory = batch()
    valid = ragged(ids.shape)
    nats = []
    for row in range(3):
        tokens = ids[row][valid[row]][None]
        logits = model(tokens, memory[row : row + 1]).output[0, :-1]
        nats.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    found = model.loss(ids, memory, context=Context(mask=Mask(valid=valid)))
    torch.testing.assert_close(found, torch.cat(nats).mean())
    with pytest.raises(Unsupported, match="a target for each token"):
        model.loss(ids, memory, ids[:, 1:])


def test_auxiliary_losses_of_encoder_and_decoder_are_added():
    everywhere = {f"{place}_plan": "mixture_of_heads" for place in ("encoder", "decoder", "cross")}
    ids, memory = batch()
    counts = {}
    for name, plans in {"cross": {"cross": "mixture_of_heads"}, "all": {**everywhere, "num_layers": 2}}.items():
        options = {"num_heads": 8, **plans}
        model = make_model(options.pop("cross", "mixture_of_heads"), **{**options, "cross_plan": "mixture_of_heads"})
        counts[name] = model.train()(ids, memory).losses["load_balance"][1]
    one = counts["cross"] / 2
    assert counts["all"] > 2 * 2 * one


def test_gradients_reach_every_parameter():
    model = make_model(positions="learned", max_length=9).train()
    model.loss(torch.arange(9)[None], torch.arange(9)[None]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", CROSSING)
def test_gradients_are_finite(name):
    model = make_model(name, dropout=0.1).train()
    ids, memory = batch()
    context = Context(mask=Mask(valid=ragged(ids.shape)), memory_mask=Mask(valid=ragged(memory.shape)))
    model.loss(ids, memory, context=context).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_half_precision_is_near_single(model):
    ids, memory = batch()
    exact = model(ids, memory).output
    half = model.to(torch.bfloat16)
    output = half(ids, memory).output
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).abs().max() < 0.06 * exact.abs().max()
    assert half.generate(ids, 4, memory=memory).shape == (3, 4)


@pytest.mark.parametrize("name", ["softmax", "gated_linear"])
def test_compiled_whole_equals_eager(name):
    model = make_model(name, num_layers=1)
    ids, memory = batch()
    context = Context(mask=Mask(valid=ragged(ids.shape)), memory_mask=Mask(valid=ragged(memory.shape)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, memory, context=context).output
        torch.testing.assert_close(compiled(ids, memory, context=context).output, expected)
        state = model.encode_memory(memory)
        torch.testing.assert_close(compiled(ids[:, :1], state=state).output, model(ids[:, :1], state=state).output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_bit_for_bit(dtype, tmp_path):
    model = make_model(["linear", ("softmax", {"feed_forward": 5})], encoder_layers=1).to(dtype)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is EncoderDecoder and loaded.config == model.config
    ids, memory = batch()
    assert torch.equal(loaded(ids, memory).output, model(ids, memory).output)


def test_parameters_are_counted_and_matched():
    config = EncoderDecoderConfig(50, memory_vocab_size=40, dim=32, num_heads=2, num_layers=2, cross_plan="mamba2")
    assert count_parameters(config) == count_parameters(EncoderDecoder(config))
    target = count_parameters(EncoderDecoderConfig(50, memory_vocab_size=40, dim=32, num_heads=2, num_layers=2))
    assert abs(count_parameters(match_parameters(config, target)) - target) <= 0.02 * target
    with pytest.raises(Unsupported, match="2 layers"):
        match_parameters(config, 1000)


def test_depth_comes_from_the_number_or_from_the_lists():
    config = EncoderDecoderConfig(5, memory_vocab_size=5, cross_plan=["softmax"] * 3, encoder_plan=["linear"])
    assert (config.num_layers, config.encoder_layers) == (3, 1)
    assert [name for name, _ in config.decoder_plan] == ["softmax"] * 3
    assert EncoderDecoderConfig(5, memory_vocab_size=5).encoder_layers == 4
    assert EncoderDecoderConfig(5, memory_vocab_size=5, num_layers=2, encoder_layers=1).encoder_layers == 1
    assert count_layers(None, "softmax", default=7) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cross_plan": "flow_attention"}, "causal-cross.*queries"),
        ({"cross_plan": "landmark"}, "inserts tokens"),
        ({"decoder_plan": "landmark"}, "inserts tokens"),
        ({"cross_plan": [("mixture_of_heads", {"mechanism": "flow_attention"})]}, "causal-cross"),
        ({"cross_plan": "token_parameter"}, "softmax.*linear"),
        ({"cross_plan": ["softmax"], "num_layers": 2}, "num_layers=1"),
        ({"cross_plan": ["softmax"], "decoder_plan": ["softmax"] * 2}, "layers"),
        ({"memory_vocab_size": None}, "None for the other"),
        ({"memory_features": 2}, "None for the other"),
    ],
)
def test_what_cannot_be_built_is_refused_by_the_config(options, words):
    with pytest.raises(Unsupported, match=words):
        EncoderDecoderConfig(5, **{"memory_vocab_size": 5, **options})


def test_an_encoder_layer_for_grids_is_refused_when_the_model_is_built():
    with pytest.raises(Unsupported, match=r"large_kernel for grids of 2 axes .* which has no grids") as caught:
        make_model(encoder_plan=["softmax", "large_kernel"], encoder_layers=2)
    assert caught.value.nearest.startswith("('large_kernel', {'axes': 1})")
    make_model(encoder_plan=["softmax", ("large_kernel", {"axes": 1})], encoder_layers=2)


def test_bad_calls_are_refused():
    model = make_model()
    ids, memory = batch()
    state = model.encode_memory(memory)
    for call, words in (
        (lambda: model(ids), "encode_memory"),
        (lambda: model(ids, memory, state=state), "beside a state"),
        (lambda: model(ids[:2], memory), "one memory for each"),
        (lambda: model(ids[:2], state=state), "one memory for each"),
        (lambda: model(ids.float(), memory), "ids of dtype"),
        (lambda: model(ids, memory.float()), "memory of dtype"),
        (lambda: model(ids, state=state, context=Context(memory_mask=Mask(valid=memory > 2))), "not given"),
        (lambda: model(ids, memory, context=Context(grid=(2, 3))), "a grid"),
        (lambda: model(ids, memory, context=Context(mask=Mask(bias=torch.zeros(1, 1, 6, 6)))), "a bias"),
        (lambda: model.generate(ids, 3, memory=memory, beams=2, temperature=1.0), "temperature in a beam search"),
        (lambda: model.generate(ids, 3, memory=memory, beams=0), "beams"),
        (lambda: model.generate(ids, 3, memory=memory, length_penalty=0.5), "without a beam search"),
        (lambda: model.generate(ids, 3, memory=memory, beams=2, length_penalty=-1.0), "length_penalty"),
        (lambda: model.generate(ids, 3, memory=memory, mask=Mask(lengths=torch.tensor([3, 0, 1]))), "without tokens"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()
