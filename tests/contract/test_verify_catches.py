"""For every property of the matrix a deliberately broken mechanism, which `verify` must catch."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from regard import get_mechanism
from regard.contract import Pattern, Result, State, Waiver, state_field
from regard.core.ragged import Gathering
from regard.engines import recurrent_forms
from regard.engines.recurrent_forms import MatrixState
from regard.layers.parts import Projection
from regard.mechanisms import linear, softmax
from regard.workbench.verify import PROPERTIES, Place, check

CAUSAL, NONCAUSAL, CROSS = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS
LINEAR, SOFTMAX = get_mechanism("linear"), get_mechanism("softmax")


def with_forms(card, **forms):
    return dataclasses.replace(card, forms={**card.forms, **forms})


def with_output(card, change):
    """Every fast form's output changed."""

    def changed(form):
        def run(call, **inputs):
            found = form(call, **inputs)
            result = found if isinstance(found, Result) else Result(found)
            result.output = change(result.output, inputs, call)
            return result

        return run

    return with_forms(card, **{n: changed(f) for n, f in card.forms.items() if n not in ("reference", "absorb")})


def status(card, property_name, pattern, dtype=None):
    prop = next(p for p in PROPERTIES if p.name == property_name)
    cells = [check(Place(card, pattern, prop, d)) for d in (prop.dtypes if dtype is None else (dtype,))]
    return [c.status for c in cells if c is not None]


def slightly_wrong_form():
    return with_output(LINEAR, lambda o, inputs, call: o * (1 + 1e-9)), CAUSAL


def queries_that_are_scaled_in_place():
    def parallel(call, q, k, v):
        q.mul_(1 + 1e-15)
        return linear.parallel(call, q, k, v)

    return with_forms(LINEAR, parallel=parallel), CAUSAL


def forgets_between_chunks():
    def chunked(call, q, k, v):
        result = linear.chunked(call, q, k, v)
        size = call.chunk_size or 64
        pieces = [
            linear.chunked(call.replace(state=None), a, b, c).output
            for a, b, c in zip(q.split(size, 2), k.split(size, 2), v.split(size, 2), strict=True)
        ]
        result.output = torch.cat(pieces, 2) if pieces else result.output
        return result

    return with_forms(LINEAR, chunked=chunked), CAUSAL


def step_that_does_not_write():
    def step(call, q, k, v):
        result = linear.step(call, q, k, v)
        result.state = dataclasses.replace(result.state, memory=call.state.memory)
        return result

    return with_forms(LINEAR, step=step), CAUSAL


def step_that_writes_into_the_state_before():
    def step(call, q, k, v):
        result = linear.step(call, q, k, v)
        call.state.memory.copy_(result.state.memory)
        return result

    return with_forms(LINEAR, step=step), CAUSAL


def resume_that_starts_again():
    return with_forms(LINEAR, chunked=lambda call, q, k, v: linear.chunked(call.replace(state=None), q, k, v)), CAUSAL


def padding_that_counts_in_the_normaliser():
    def parallel(call, q, k, v):
        return linear.parallel(call.replace(memory_lengths=None), q, k, v)

    return with_forms(LINEAR, parallel=parallel), NONCAUSAL


def padding_that_decays_the_state():
    def chunked(call, q, k, v):
        queries, (keys, values) = linear._map_queries(call, q), linear._write(call, k, v)
        decay = torch.zeros_like(keys[..., :1])
        valid = call.valid_keys(k.shape[2])
        if valid is not None:
            decay = torch.where(valid[:, None, :, None], 0.0, -1.0)
        output, state = recurrent_forms.chunked(call, queries, keys, values, decay)
        return Result(linear._divide(call, output, v), state)

    return with_forms(LINEAR, chunked=chunked), CAUSAL


def state_of_the_first_document_for_all():
    def chunked(call, q, k, v):
        result = linear.chunked(call, q, k, v)
        first = torch.zeros(k.shape[0], dtype=torch.long)
        result.state = dataclasses.replace(result.state.select(first), length=result.state.length)
        return result

    return with_forms(LINEAR, chunked=chunked), CAUSAL


def rows_that_mix():
    return with_output(LINEAR, lambda o, inputs, call: o + 1e-6 * o.mean(0, keepdim=True)), CAUSAL


def leak_of_the_future():
    return with_output(LINEAR, lambda o, inputs, call: o + 1e-6 * inputs["v"].mean(2, keepdim=True)), CAUSAL


def leak_between_queries_in_causal_cross():
    return with_output(LINEAR, lambda o, inputs, call: o * (1 + 1e-6 * inputs["q"].mean())), Pattern.CAUSAL_CROSS


def top_left_alignment():
    def parallel(call, q, k, v):
        return softmax.parallel(call, q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]])

    return with_forms(SOFTMAX, parallel=parallel), CAUSAL


def zero_over_zero():
    return with_output(LINEAR, lambda o, inputs, call: o + 0 / inputs["k"].abs().sum((1, 2, 3), keepdim=True)), CROSS


def gradient_that_forgets_the_values():
    def parallel(call, q, k, v):
        return linear.parallel(call, q, k, v.detach() + 0 * v)

    return with_forms(
        LINEAR, parallel=parallel, chunked=lambda c, q, k, v: linear.chunked(c, q, k, v.detach() + 0 * v)
    ), CAUSAL


def state_that_is_reset_to_ones():
    @dataclass(frozen=True)
    class Ones(State):
        memory: torch.Tensor = state_field(fill=1.0)
        length: torch.Tensor = state_field()

    def retyped(form):
        def run(call, **inputs):
            result = form(call, **inputs)
            result.state = Ones(result.state.memory, result.state.length)
            return result

        return run

    card = with_forms(LINEAR, chunked=retyped(linear.chunked), step=retyped(linear.step))
    return dataclasses.replace(card, state=Ones), CAUSAL


def state_in_low_precision():
    def chunked(call, q, k, v):
        result = linear.chunked(call, q, k, v)
        if call.state is not None:
            result.state = MatrixState(result.state.memory.to(v.dtype), result.state.length)
        return result

    return with_forms(LINEAR, chunked=chunked), CAUSAL


def memory_that_replaces_memory():
    return with_forms(LINEAR, absorb=lambda call, k, v: linear.absorb(call.replace(state=None), k, v)), CROSS


def graph_break():
    return with_output(LINEAR, lambda o, inputs, call: o if o.sum().item() > -1e9 else -o), CAUSAL


def heads_in_the_wrong_groups():
    def parallel(call, q, k, v):
        times = q.shape[1] // k.shape[1]
        return softmax.parallel(call, q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))

    return with_forms(SOFTMAX, parallel=parallel), CAUSAL


def bias_that_is_ignored():
    def parallel(call, q, k, v):
        return softmax.parallel(call.replace(bias=None), q, k, v)

    return with_forms(SOFTMAX, parallel=parallel), CAUSAL


def bias_that_is_scaled_in_place():
    def parallel(call, q, k, v):
        result = softmax.parallel(call, q, k, v)
        if call.bias is not None:
            call.bias.mul_(1 + 1e-15)
        return result

    return with_forms(SOFTMAX, parallel=parallel), CAUSAL


def refusal_without_a_reason():
    return dataclasses.replace(LINEAR, patterns=(CAUSAL,)), CAUSAL


def constant_on_the_default_device():
    return with_output(LINEAR, lambda o, inputs, call: o + torch.zeros(1, dtype=o.dtype)), CAUSAL


def constant_of_the_default_dtype():
    return with_output(LINEAR, lambda o, inputs, call: o + torch.full((), 0.1, device=o.device) / 1e3), CAUSAL


def value_that_forward_mode_differentiates():
    def change(o, inputs, call):
        with torch.no_grad():
            constant = 2 * o
        return o + constant - constant.detach()

    return with_output(LINEAR, change), CAUSAL


def curvature_of_its_own():
    return with_output(LINEAR, lambda o, inputs, call: o + (o - o.detach()).square()), CAUSAL


def nan_that_is_hidden():
    return with_output(LINEAR, lambda o, inputs, call: o.nan_to_num()), CAUSAL


def exponential_without_a_maximum():
    return with_output(LINEAR, lambda o, inputs, call: o + 0 * inputs["q"].exp().sum()), CAUSAL


def output_that_threads_share():
    kept = {}

    def change(o, inputs, call):
        kept["output"] = o
        time.sleep(0.005)
        return kept["output"]

    return with_output(LINEAR, change), CAUSAL


BROKEN_FUNCTIONS = [
    ("reference", slightly_wrong_form),
    ("reference", queries_that_are_scaled_in_place),
    ("chunk_size", forgets_between_chunks),
    ("step", step_that_does_not_write),
    ("step", step_that_writes_into_the_state_before),
    ("split_resume", resume_that_starts_again),
    ("padding", padding_that_counts_in_the_normaliser),
    ("split_resume", padding_that_decays_the_state),
    ("packing", state_of_the_first_document_for_all),
    ("row_alone", rows_that_mix),
    ("causality", leak_of_the_future),
    ("causality", leak_between_queries_in_causal_cross),
    ("alignment", top_left_alignment),
    ("hidden_row", zero_over_zero),
    ("gradient", gradient_that_forgets_the_values),
    ("state", state_that_is_reset_to_ones),
    ("state_dtype", state_in_low_precision),
    ("memory", memory_that_replaces_memory),
    ("compile", graph_break),
    ("grouped_heads", heads_in_the_wrong_groups),
    ("pair_masks", bias_that_is_ignored),
    ("pair_masks", bias_that_is_scaled_in_place),
    ("defaults", constant_on_the_default_device),
    ("defaults", constant_of_the_default_dtype),
    ("forward_derivative", value_that_forward_mode_differentiates),
    ("second_derivative", curvature_of_its_own),
    ("nothing", zero_over_zero),
    ("nan", nan_that_is_hidden),
    ("extremes", exponential_without_a_maximum),
    ("threads", output_that_threads_share),
    ("refusals", refusal_without_a_reason),
]


@pytest.mark.parametrize(("property_name", "broken"), BROKEN_FUNCTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_broken_mechanism_is_caught(property_name, broken):
    card, pattern = broken()
    sound = {"softmax": SOFTMAX, "linear": LINEAR}[card.name]
    assert set(status(sound, property_name, pattern)) == {"pass"}
    assert "fail" in status(card, property_name, pattern)


def test_gradient_into_padding_is_caught(monkeypatch):
    card = with_output(LINEAR, lambda o, inputs, call: o + inputs["v"].mean(2, keepdim=True))
    assert status(card, "padding_gradient", NONCAUSAL) == ["pass"]
    monkeypatch.setattr(Gathering, "gather", lambda self, x, axis=-2, batch_axis=0: x)
    assert status(card, "padding_gradient", NONCAUSAL) == ["fail"]


class PassesOn(Projection):
    """Leaves the shell's heads as they are; broken ones change them."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def inputs(self, heads, call):
        return heads


class CountsPadding(PassesOn):
    def inputs(self, heads, call):
        return {**heads, "q": heads["q"] + call.x.mean((1, 2))[:, None, None, None]}


class NumbersTheCall(PassesOn):
    def inputs(self, heads, call):
        number = torch.arange(call.x.shape[1], dtype=call.x.dtype)[:, None]
        return {**heads, "q": heads["q"] + number}


class RemembersTheLastPlace(PassesOn):
    """Adds the token before, and keeps the last column for the next call, whatever the lengths."""

    def forward(self, heads, call):
        kept = call.x.new_zeros(call.x.shape[0], 1, call.x.shape[2]) if call.state is None else call.state.kept
        before = torch.cat([kept, call.x], 1)
        shifted = before[:, :-1].sum(-1)[:, None, :, None]
        return {**heads, "v": heads["v"] + shifted}, LastToken(before[:, -1:])


@dataclasses.dataclass(frozen=True)
class LastToken(State):
    kept: torch.Tensor


class SeesTheFuture(PassesOn):
    def inputs(self, heads, call):
        return {**heads, "v": heads["v"] + 1e-6 * heads["v"].mean(2, keepdim=True)}


class HasSecrets(PassesOn):
    def __init__(self, spec):
        super().__init__(spec)
        self.secret = torch.rand(())

    def inputs(self, heads, call):
        return {**heads, "q": heads["q"] * (1 + self.secret)}


class HasAnUnusedParameter(PassesOn):
    def __init__(self, spec):
        super().__init__(spec)
        self.unused = nn.Parameter(torch.ones(1))


class WritesIntoItsInput(PassesOn):
    def inputs(self, heads, call):
        call.x.detach().mul_(2)
        return heads


class WritesIntoItsTable(PassesOn):
    def __init__(self, spec):
        super().__init__(spec)
        self.register_buffer("table", torch.ones(1))

    def inputs(self, heads, call):
        self.table.mul_(2)
        return heads


class LooksAtValues(PassesOn):
    def inputs(self, heads, call):
        return heads if call.x.sum().item() > -1e9 else {}


class KeepsItsCall(PassesOn):
    def inputs(self, heads, call):
        self.kept = heads
        time.sleep(0.005)
        return self.kept


class Widens(PassesOn):
    def inputs(self, heads, call):
        return {n: t * float("inf") if t.dtype == torch.bfloat16 else t for n, t in heads.items()}


BROKEN_LAYERS = [
    ("layer_padding", CountsPadding),
    ("layer_packing", CountsPadding),
    ("layer_decoding", NumbersTheCall),
    ("layer_ragged", RemembersTheLastPlace),
    ("layer_causality", SeesTheFuture),
    ("layer_save", HasSecrets),
    ("layer_save", WritesIntoItsInput),
    ("layer_save", WritesIntoItsTable),
    ("layer_gradient", HasAnUnusedParameter),
    ("layer_compile", LooksAtValues),
    ("layer_recompile", LooksAtValues),
    ("layer_export", LooksAtValues),
    ("layer_lengths", LooksAtValues),
    ("layer_onnx", LooksAtValues),
    ("layer_threads", KeepsItsCall),
    ("layer_dtype", Widens),
]


@pytest.mark.parametrize(("property_name", "projection"), BROKEN_LAYERS, ids=lambda x: getattr(x, "__name__", x))
def test_broken_layer_is_caught(property_name, projection):
    one_length = (Waiver("layer_lengths", "so that `layer_export` has something to say"),)
    card = dataclasses.replace(SOFTMAX, waivers=one_length if property_name == "layer_export" else ())
    sound = dataclasses.replace(card, projection=PassesOn)
    assert set(status(sound, property_name, CAUSAL)) == {"pass"}
    broken = dataclasses.replace(card, projection=projection)
    assert "fail" in status(broken, property_name, CAUSAL)


def test_every_property_has_a_broken_mechanism():
    caught = {name for name, _ in [*BROKEN_FUNCTIONS, *BROKEN_LAYERS]} | {"padding_gradient"}
    assert caught == {p.name for p in PROPERTIES}
