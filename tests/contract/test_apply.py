"""Mechanisms called as functions: no argument is ignored, and states can be continued wherever possible."""

from __future__ import annotations

import pytest
import torch
from support import close, qkv
from torch.fx.experimental.proxy_tensor import make_fx

from regard import BlockMask, Mask, Unsupported, functional, get_mechanism, list_mechanisms
from regard.apply import absorb, apply
from regard.apply.forms import choose_form
from regard.contract import Pattern
from regard.workbench.verification.subjects import Subject

CONTINUING = list_mechanisms(kind="attention", pattern="causal-self", where=lambda card: card.state is not None)
UNEVEN = [name for name in CONTINUING if get_mechanism(name).uneven]
LINEAR, SOFTMAX = get_mechanism("linear"), get_mechanism("softmax")


def continued(name, n, m):
    """The output of `n` queries with `m` new keys that continue a state of 7 keys, and the definition on all keys."""
    subject = Subject(get_mechanism(name), Pattern.CAUSAL_SELF)
    whole, past = subject.inputs(n, 7 + m), subject.inputs(7, 7, seed=1)
    new = dict(whole)
    for key in whole:
        axes = subject.positions(key)
        if "n" not in axes:
            past[key] = whole[key].narrow(axes["m"], 0, 7) if axes else whole[key]
            new[key] = whole[key].narrow(axes["m"], 7, m) if axes else whole[key]
    state = subject.run(past, return_state=True).state
    return subject.run(new, state=state).output, subject.reference(whole)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *[(name, sizes) for name in UNEVEN for sizes in ((1, 3), (2, 4), (0, 3))],
        *[(name, sizes) for name in ("softmax", "sigmoid") for sizes in ((1, 0), (4, 2))],  # read the state's keys
    ],
)
def test_queries_continue_a_state_beside_another_number_of_new_keys(name, sizes):
    found, expected = continued(name, *sizes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in UNEVEN if get_mechanism(name).recurrent])
def test_queries_from_before_the_end_of_a_state_are_refused_where_it_has_forgotten_them(name):
    for sizes in ((1, 0), (4, 2)):
        with pytest.raises(Unsupported, match="more queries than keys"):
            continued(name, *sizes)


def test_a_bias_on_absorbed_memory_reaches_its_pairs_wherever_queries_are_padded():
    inputs, valid = qkv(5, 7), torch.tensor([[False, True, True, False, True], [True] * 5])
    call = {"pattern": "noncausal-cross", "mask": Mask(valid=valid, bias=torch.randn(1, 2, 5, 7, dtype=torch.float64))}
    state = absorb(SOFTMAX, inputs, pattern="noncausal-cross")
    close(apply(SOFTMAX, {"q": inputs["q"]}, state=state, **call).output, apply(SOFTMAX, inputs, **call).output)


@pytest.mark.parametrize("name", list_mechanisms(where=lambda card: "absorb" in card.forms))
def test_memory_is_absorbed_at_the_scale_of_its_reads(name):
    subject = Subject(get_mechanism(name), Pattern.NONCAUSAL_CROSS)
    inputs = subject.inputs(5, 9)
    of_memory = {n: x for n, x in inputs.items() if "n" not in subject.positions(n)}
    reading = {n: x for n, x in inputs.items() if "m" not in subject.positions(n)}
    expected = subject.run(inputs, scale=0.3)
    state = subject.absorb(of_memory, scale=0.3)
    found = subject.run(reading, state=state, scale=0.3).output
    torch.testing.assert_close(found, expected.output, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name", ["landmark", "transformer_xl", "compressive"])
def test_a_query_that_is_nan_is_not_hidden(name, backend):
    for pattern in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF):
        subject = Subject(get_mechanism(name), pattern)
        inputs = subject.inputs(40, dtype=torch.float32)
        inputs["q"][0, 1, 17] = torch.nan
        output = subject.run(inputs, backend=backend).output.isnan().any(-1)
        expected = torch.zeros_like(output)
        expected[0, 1, 17] = True
        assert torch.equal(output, expected)


@pytest.mark.parametrize("name", list_mechanisms(where=lambda card: "bias" in card.honours))
def test_a_bias_that_does_not_fit_is_refused(name):
    card = get_mechanism(name)
    subject = Subject(card, card.patterns[0])
    inputs = subject.inputs(6, batch=3)
    for shape in ((2, 1, 6, 6), (1, 3, 6, 6), (1, 1, 7, 6), (1, 1, 6, 7), (1, 1, 6, 5)):
        with pytest.raises(Unsupported, match="bias of shape"):
            subject.run(inputs, mask=Mask(bias=torch.zeros(shape, dtype=torch.float64)))
    if card.state is not None and Pattern.CAUSAL_SELF in card.patterns:
        subject = Subject(card, Pattern.CAUSAL_SELF)
        state = subject.run(inputs, return_state=True).state
        with pytest.raises(Unsupported, match="bias"):
            subject.run(inputs, state=state, mask=Mask(bias=torch.zeros(1, 1, 6, 6, dtype=torch.float64)))


FORMS = [
    ("causal-self", (5, 5), {}, "parallel"),
    ("noncausal-self", (5, 5), {}, "parallel"),
    ("noncausal-cross", (5, 7), {}, "parallel"),
    ("causal-self", (1, 1), {"stateful": True}, "chunked"),
    ("causal-self", (1, 1), {"stateful": True, "continuing": True}, "step"),
    ("causal-self", (1, 2), {"stateful": True, "continuing": True}, "chunked"),
    ("causal-self", (2, 1), {"stateful": True, "continuing": True}, "chunked"),
    ("causal-self", (2, 2), {"stateful": True, "continuing": True}, "chunked"),
    ("causal-cross", (5, 7), {"stateful": True}, "absorb+read"),
    ("noncausal-cross", (5, 7), {"stateful": True, "continuing": True}, "absorb+read"),
    ("noncausal-cross", (5, 0), {"stateful": True, "continuing": True, "has_memory": False}, "read"),
]


@pytest.mark.parametrize(("pattern", "sizes", "call", "form"), FORMS)
def test_one_token_after_a_state_is_a_step_and_whole_sequences_are_parallel(pattern, sizes, call, form):
    call = {"has_memory": True, "stateful": False, "continuing": False, **call}
    assert choose_form(LINEAR, Pattern.parse(pattern), *sizes, **call) == form


@pytest.mark.parametrize("form", ["parallel", "chunked", "step"])
def test_a_form_that_is_asked_for_by_name_takes_padded_rows(form):
    one = form == "step"
    inputs, mask = qkv(1 if one else 5), Mask(lengths=torch.tensor([1, 0] if one else [2, 5]))
    call = {"mask": mask, "state": state_of(LINEAR) if one else None}
    found = apply(LINEAR, inputs, form=form, chunk_size=1, **call).output
    close(found, apply(LINEAR, inputs, **call).output)


def test_rows_may_have_fewer_queries_than_keys_where_there_are_more_places_for_queries():
    inputs, state = qkv(5, 4), state_of(LINEAR)
    for queries, keys in ((torch.tensor([2, 3]), torch.tensor([4, 3])), (torch.tensor([4, 1]), None)):
        masks = {"mask": Mask(lengths=queries), "memory_mask": None if keys is None else Mask(lengths=keys)}
        found = apply(LINEAR, inputs, state=state, **masks).output
        for row, (n, m) in enumerate(zip(queries, (4, 4) if keys is None else keys, strict=True)):
            own = {x: t[row : row + 1, :, : n if x == "q" else m] for x, t in inputs.items()}
            close(found[row : row + 1, :, :n], apply(LINEAR, own, state=state.select(torch.tensor([row]))).output)


def test_a_batch_may_have_any_number_of_rows():
    inputs = qkv(2, batch=300)
    state = apply(LINEAR, inputs, return_state=True, mask=Mask(valid=torch.ones(300, 2, dtype=torch.bool))).state
    assert apply(LINEAR, inputs, state=state, mask=Mask(lengths=torch.full((300,), 2))).output.shape[0] == 300


def test_fewer_heads_are_repeated_and_what_has_no_heads_is_not():
    for name, more in (("softmax", {}), ("performer", {"w": torch.randn(5, 4, dtype=torch.float64)})):
        inputs = qkv(5, groups=1) | more
        repeated = {x: inputs[x].repeat_interleave(2, 1) for x in "kv"}
        call = {"chunk_size": 3, "mask": UNEQUAL}
        for options in ({}, call):
            found, expected = (apply(get_mechanism(name), x, **options) for x in (inputs, inputs | repeated))
            close(found.output, expected.output)


def run(card, **call):
    return apply(card, qkv(5), **call)


def state_of(card, **sizes):
    return apply(card, qkv(5, **sizes), return_state=True).state


CROSS, UNEQUAL = {"pattern": "noncausal-cross"}, Mask(lengths=torch.tensor([2, 5]))
BIAS, VISIBLE = torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 3, 3, dtype=torch.bool)
LATE = {"mask": UNEQUAL, "memory_mask": Mask(lengths=torch.tensor([4, 4]))}
ON_CACHED = Mask(lengths=UNEQUAL.lengths, bias=torch.zeros(1, 1, 5, 10))


def read_absorbed(**call):
    inputs = qkv(5)
    return apply(SOFTMAX, {"q": inputs["q"]}, state=absorb(SOFTMAX, inputs, **CROSS), **CROSS, **call)


MISTAKES = [
    (lambda: run(SOFTMAX, dropout=1.0), "0 <= dropout < 1"),
    (lambda: run(SOFTMAX, dropout=-0.5), "0 <= dropout < 1"),
    (lambda: run(LINEAR, chunk_size=0), "chunk_size >= 1"),
    (lambda: run(SOFTMAX, want={"weight"}), "try weights"),
    (lambda: run(get_mechanism("sigmoid"), want={"lse"}), "log-sum-exp"),
    (lambda: run(LINEAR, rotate=lambda x, ranks: x), "rotation"),
    (lambda: run(LINEAR, backend="native", pattern="noncausal-self"), "torch"),
    (lambda: run(get_mechanism("landmark"), backend="native"), "torch"),  # lacks kernels for this dtype
    (lambda: run(SOFTMAX, form="reference", state=state_of(SOFTMAX)), "whole sequences"),
    (lambda: run(SOFTMAX, form="parallel", return_state=True), "whole sequences"),
    (lambda: run(LINEAR, form="reference", mask=UNEQUAL), "rows of equal length"),
    (lambda: run(SOFTMAX, form="step", state=state_of(SOFTMAX)), "one token"),
    (lambda: run(LINEAR, form="step"), "a state"),
    (lambda: run(LINEAR, form="chunked", pattern="noncausal-self"), "causal-self"),
    (lambda: run(SOFTMAX, mask=Mask(blocks=BlockMask(VISIBLE.expand(3, -1, -1, -1), 2))), "2 or 1"),
    (lambda: run(SOFTMAX, mask=ON_CACHED, state=state_of(SOFTMAX)), "together with padding"),
    (lambda: run(LINEAR, state=state_of(LINEAR), **LATE), "more queries than keys"),
    (lambda: apply(LINEAR, qkv(5, 3), state=state_of(LINEAR)), "more queries than keys"),
    (lambda: read_absorbed(memory_mask=UNEQUAL), "memory mask but no memory"),
    (lambda: run(LINEAR, state=state_of(LINEAR, batch=1)), "state of 1 rows for 2"),
    (lambda: run(SOFTMAX, state=state_of(SOFTMAX, batch=1)), "state of 1 rows for 2"),
    (lambda: absorb(LINEAR, qkv(5), state=absorb(LINEAR, qkv(5, batch=1), **CROSS), **CROSS), "state of 1 rows for 2"),
    (lambda: absorb(SOFTMAX, qkv(5), state=absorb(SOFTMAX, qkv(5, batch=1), **CROSS), **CROSS), "of 1 rows for 2"),
    (lambda: absorb(SOFTMAX, {"q": qkv(5)["q"]}, **CROSS), "without k, v"),
    (lambda: functional.softmax_attention(**qkv(5), bias=BIAS, mask=Mask(bias=BIAS)), r"bias and mask\.bias"),
    (lambda: functional.softmax_attention(qkv(5)["q"], **qkv(5)), "q given twice"),
    (lambda: Mask(max_length=3), "without cu_seqlens"),
    (lambda: Mask(bias=BIAS.bool()), "masked_fill"),
    (lambda: Mask(bias=BIAS[0, 0]), "N or 1"),
    (lambda: BlockMask(VISIBLE[0, 0], 2), "visible blocks"),
    (lambda: BlockMask(VISIBLE.float(), 2), "visible blocks"),
    (lambda: BlockMask(VISIBLE, 0), "block_size >= 1"),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_what_would_be_ignored_or_does_not_fit_is_refused(call, words):
    with pytest.raises(Unsupported, match=words):
        call()


def test_a_max_length_beyond_all_tokens_costs_nothing():
    inputs, borders = qkv(5, batch=1), torch.tensor([0, 2, 2, 5])
    plain, longest = (apply(SOFTMAX, inputs, mask=Mask(cu_seqlens=borders, max_length=m)) for m in (None, 2**40))
    torch.testing.assert_close(longest.output, plain.output)


def test_an_option_of_a_config_is_reached_under_its_own_name():
    """`form` is an option of local attention, and an argument of the call for other mechanisms."""
    inputs = qkv(9)
    options = {"form": "block", "block": 3, "lookback": 0}
    found = functional.local_attention(**inputs, **options)
    expected = apply(get_mechanism("local"), inputs, config=get_mechanism("local").options(**options)).output
    assert torch.equal(found, expected)
    assert not torch.equal(found, functional.local_attention(**inputs))


def test_shapes_that_are_symbols_are_measured_each_time():
    inputs = [torch.randn(2, 3, 7, 4) for _ in range(3)]
    traced = make_fx(lambda q, k, v: functional.linear_attention(q, k, v), tracing_mode="symbolic")(*inputs)
    longer = [torch.randn(5, 2, 11, 6) for _ in range(3)]
    torch.testing.assert_close(traced(*longer), functional.linear_attention(*longer))


def test_a_call_that_was_refused_is_refused_again_and_a_mended_one_runs():
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    for _ in range(2):
        with pytest.raises(Unsupported, match="has d = 3, another input 4"):
            functional.linear_attention(q, k[..., :3], v)
        with pytest.raises(Unsupported, match="has d = 4, another input 3"):
            functional.linear_attention(q[..., :3], k, v)
        with pytest.raises(Unsupported, match="axes"):
            functional.linear_attention(q[0], k, v)
        assert functional.linear_attention(q, k, v).shape == v.shape
