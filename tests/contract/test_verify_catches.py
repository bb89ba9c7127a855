"""For every property of the matrix there is a deliberately broken mechanism that `verify` must catch."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from regard import get_mechanism
from regard.contract import Pattern, Projection, Result, State, Waiver, state_field
from regard.core.ragged import Gathering
from regard.engines import recurrent_forms
from regard.engines.recurrent_forms import MatrixState
from regard.mechanisms import linear, softmax
from regard.workbench.verification.verify import PROPERTIES, Place, check

CAUSAL, NONCAUSAL, CROSS = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS
LINEAR, SOFTMAX = get_mechanism("linear"), get_mechanism("softmax")
BROKEN = []
"""Parameters of the test: a property, a sound card, a broken card and the pattern in which the fault shows."""


def with_forms(card, **forms):
    return dataclasses.replace(card, forms={**card.forms, **forms})


def with_output(card, change):
    """A card whose fast forms all have their output changed."""

    def changed(form):
        def run(call, **inputs):
            found = form(call, **inputs)
            result = found if isinstance(found, Result) else Result(found)
            result.output = change(result.output, inputs, call)
            return result

        return run

    return with_forms(card, **{n: changed(f) for n, f in card.forms.items() if n not in ("reference", "absorb")})


def add(properties, name, sound, broken, pattern):
    BROKEN.extend(pytest.param(p, sound, broken, pattern, id=f"{p}-{name}") for p in properties)


def breaks(*properties, of=LINEAR, pattern=CAUSAL, form=None):
    """Decorate a function that replaces a form, or changes the output of all forms, and so breaks these properties."""

    def told(function):
        broken = with_output(of, function) if form is None else with_forms(of, **{form: function})
        add(properties, function.__name__, of, broken, pattern)
        return function

    return told


def breaks_layer(*properties):
    """Decorate a projection class that breaks these properties of the softmax layer."""

    def told(projection):
        for name in properties:
            one_length = (Waiver("layer_lengths", "so that `layer_export` has something to say"),)
            card = dataclasses.replace(SOFTMAX, waivers=one_length if name == "layer_export" else ())
            sound, broken = (dataclasses.replace(card, projection=p) for p in (PassesOn, projection))
            add([name], projection.__name__, sound, broken, CAUSAL)
        return projection

    return told


def status(card, property_name, pattern):
    prop = next(p for p in PROPERTIES if p.name == property_name)
    cells = [check(Place(card, pattern, prop, dtype)) for dtype in prop.dtypes]
    return [c.status for c in cells if c is not None]


# Functions.


@breaks("reference")
def slightly_wrong_form(o, inputs, call):
    return o * (1 + 1e-9)


@breaks("reference", form="parallel")
def queries_that_are_scaled_in_place(call, q, k, v):
    q.mul_(1 + 1e-15)
    return linear.parallel(call, q, k, v)


@breaks("chunk_size", form="chunked")
def forgets_between_chunks(call, q, k, v):
    result = linear.chunked(call, q, k, v)
    pieces = zip(*(x.split(call.chunk_size or 64, 2) for x in (q, k, v)), strict=True)
    outputs = [linear.chunked(call.replace(state=None), *piece).output for piece in pieces]
    result.output = torch.cat(outputs, 2) if outputs else result.output
    return result


@breaks("step", form="step")
def step_that_does_not_write(call, q, k, v):
    result = linear.step(call, q, k, v)
    result.state = dataclasses.replace(result.state, memory=call.state.memory)
    return result


@breaks("step", form="step")
def step_that_writes_into_the_state_before(call, q, k, v):
    result = linear.step(call, q, k, v)
    call.state.memory.copy_(result.state.memory)
    return result


@breaks("split_resume", form="chunked")
def resume_that_starts_again(call, q, k, v):
    return linear.chunked(call.replace(state=None), q, k, v)


@breaks("padding", form="parallel", pattern=NONCAUSAL)
def padding_that_counts_in_the_normaliser(call, q, k, v):
    return linear.parallel(call.replace(memory_lengths=None), q, k, v)


@breaks("split_resume", form="chunked")
def padding_that_decays_the_state(call, q, k, v):
    queries, (keys, values) = linear._map_queries(call, q), linear._write(call, k, v)
    decay = torch.zeros_like(keys[..., :1])
    valid = call.valid_keys(k.shape[2])
    if valid is not None:
        decay = torch.where(valid[:, None, :, None], 0.0, -1.0)
    output, state = recurrent_forms.chunked(call, queries, keys, values, decay)
    return Result(linear._divide(call, output, v), state)


@breaks("packing", form="chunked")
def state_of_the_first_document_for_all(call, q, k, v):
    result = linear.chunked(call, q, k, v)
    first = torch.zeros(k.shape[0], dtype=torch.long)
    result.state = dataclasses.replace(result.state.select(first), length=result.state.length)
    return result


@breaks("row_alone")
def rows_that_mix(o, inputs, call):
    return o + 1e-6 * o.mean(0, keepdim=True)


@breaks("causality")
def leak_of_the_future(o, inputs, call):
    return o + 1e-6 * inputs["v"].mean(2, keepdim=True)


@breaks("causality", pattern=Pattern.CAUSAL_CROSS)
def leak_between_queries_in_causal_cross(o, inputs, call):
    return o * (1 + 1e-6 * inputs["q"].mean())


@breaks("alignment", of=SOFTMAX, form="parallel")
def top_left_alignment(call, q, k, v):
    return softmax.parallel(call, q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]])


@breaks("hidden_row", "nothing", pattern=CROSS)
def zero_over_zero(o, inputs, call):
    return o + 0 / inputs["k"].abs().sum((1, 2, 3), keepdim=True)


@breaks("gradient")
def half_of_the_gradient(o, inputs, call):
    return o.detach() + (o - o.detach()) / 2


@breaks("state_dtype", form="chunked")
def state_in_low_precision(call, q, k, v):
    result = linear.chunked(call, q, k, v)
    if call.state is not None:
        result.state = MatrixState(result.state.memory.to(v.dtype), result.state.length)
    return result


@breaks("memory", form="absorb", pattern=CROSS)
def memory_that_replaces_memory(call, k, v):
    return linear.absorb(call.replace(state=None), k, v)


@breaks("compile")
def graph_break(o, inputs, call):
    return o if o.sum().item() > -1e9 else -o


@breaks("grouped_heads", of=SOFTMAX, form="parallel")
def heads_in_the_wrong_groups(call, q, k, v):
    times = q.shape[1] // k.shape[1]
    return softmax.parallel(call, q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))


@breaks("pair_masks", of=SOFTMAX, form="parallel")
def bias_that_is_ignored(call, q, k, v):
    return softmax.parallel(call.replace(bias=None), q, k, v)


@breaks("pair_masks", of=SOFTMAX, form="parallel")
def bias_that_is_scaled_in_place(call, q, k, v):
    result = softmax.parallel(call, q, k, v)
    if call.bias is not None:
        call.bias.mul_(1 + 1e-15)
    return result


@breaks("defaults")
def constant_on_the_default_device(o, inputs, call):
    return o + torch.zeros(1, dtype=o.dtype)


@breaks("defaults")
def constant_of_the_default_dtype(o, inputs, call):
    return o + torch.full((), 0.1, device=o.device) / 1e3


@breaks("forward_derivative")
def value_that_forward_mode_differentiates(o, inputs, call):
    with torch.no_grad():
        constant = 2 * o
    return o + constant - constant.detach()


@breaks("second_derivative")
def curvature_of_its_own(o, inputs, call):
    return o + (o - o.detach()).square()


@breaks("nan")
def nan_that_is_hidden(o, inputs, call):
    return o.nan_to_num()


@breaks("extremes")
def exponential_without_a_maximum(o, inputs, call):
    return o + 0 * inputs["q"].exp().sum()


SHARED = {}


@breaks("threads")
def output_that_threads_share(o, inputs, call):
    SHARED["output"] = o
    time.sleep(0.005)
    return SHARED["output"]


@dataclass(frozen=True)
class Ones(State):
    """A state that resets to ones."""

    memory: torch.Tensor = state_field(fill=1.0)
    length: torch.Tensor = state_field()


def with_ones(form):
    def run(call, **inputs):
        result = form(call, **inputs)
        result.state = Ones(result.state.memory, result.state.length)
        return result

    return run


RESET = with_forms(LINEAR, chunked=with_ones(linear.chunked), step=with_ones(linear.step))
add(["state"], "state_that_is_reset_to_ones", LINEAR, dataclasses.replace(RESET, state=Ones), CAUSAL)
add(["refusals"], "no_reason", LINEAR, dataclasses.replace(LINEAR, patterns=(CAUSAL,)), CAUSAL)


def test_a_hundredth_of_one_number_s_gradient_that_the_definition_lacks_too_is_caught():
    def lossy(form):
        def run(call, q, k, v):
            one = torch.zeros_like(v)
            one[..., :1, :1] = 0.01
            return form(call, q, k, v + one * (v.detach() - v))

        return run

    card = with_forms(SOFTMAX, **{name: lossy(SOFTMAX.forms[name]) for name in ("reference", "parallel")})
    assert status(SOFTMAX, "gradient", NONCAUSAL) == ["pass"]
    assert status(card, "gradient", NONCAUSAL) == ["fail"]


def test_gradient_into_padding_is_caught(monkeypatch):
    card = with_output(LINEAR, lambda o, inputs, call: o + inputs["v"].mean(2, keepdim=True))
    assert status(card, "padding_gradient", NONCAUSAL) == ["pass"]
    monkeypatch.setattr(Gathering, "gather", lambda self, x, axis=-2, batch_axis=0: x)
    assert status(card, "padding_gradient", NONCAUSAL) == ["fail"]


# Layers.


class PassesOn(Projection):
    """Leaves the shell's heads as they are; the broken subclasses change them."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def inputs(self, heads, call):
        return heads


@breaks_layer("layer_padding", "layer_packing")
class CountsPadding(PassesOn):
    def inputs(self, heads, call):
        return {**heads, "q": heads["q"] + call.x.mean((1, 2))[:, None, None, None]}


@breaks_layer("layer_decoding")
class NumbersTheCall(PassesOn):
    def inputs(self, heads, call):
        number = torch.arange(call.x.shape[1], dtype=call.x.dtype)[:, None]
        return {**heads, "q": heads["q"] + number}


@dataclass(frozen=True)
class LastToken(State):
    kept: torch.Tensor


@breaks_layer("layer_ragged")
class RemembersTheLastPlace(PassesOn):
    """Adds the previous token, and keeps the last column for the next call, ignoring the lengths."""

    def forward(self, heads, call):
        kept = call.x.new_zeros(call.x.shape[0], 1, call.x.shape[2]) if call.state is None else call.state.kept
        before = torch.cat([kept, call.x], 1)
        shifted = before[:, :-1].sum(-1)[:, None, :, None]
        return {**heads, "v": heads["v"] + shifted}, LastToken(before[:, -1:])


@breaks_layer("layer_causality")
class SeesTheFuture(PassesOn):
    def inputs(self, heads, call):
        return {**heads, "v": heads["v"] + 1e-6 * heads["v"].mean(2, keepdim=True)}


@breaks_layer("layer_save")
class HasSecrets(PassesOn):
    def __init__(self, spec):
        super().__init__(spec)
        self.secret = torch.rand(())

    def inputs(self, heads, call):
        return {**heads, "q": heads["q"] * (1 + self.secret)}


@breaks_layer("layer_gradient")
class HasAnUnusedParameter(PassesOn):
    def __init__(self, spec):
        super().__init__(spec)
        self.unused = nn.Parameter(torch.ones(1))


@breaks_layer("layer_save")
class WritesIntoItsInput(PassesOn):
    def inputs(self, heads, call):
        call.x.detach().mul_(2)
        return heads


@breaks_layer("layer_save")
class WritesIntoItsTable(PassesOn):
    def __init__(self, spec):
        super().__init__(spec)
        self.register_buffer("table", torch.ones(1))

    def inputs(self, heads, call):
        self.table.mul_(2)
        return heads


@breaks_layer("layer_compile", "layer_recompile", "layer_export", "layer_lengths", "layer_onnx")
class LooksAtValues(PassesOn):
    def inputs(self, heads, call):
        return heads if call.x.sum().item() > -1e9 else {}


@breaks_layer("layer_threads")
class KeepsItsCall(PassesOn):
    def inputs(self, heads, call):
        self.kept = heads
        time.sleep(0.005)
        return self.kept


@breaks_layer("layer_dtype")
class Widens(PassesOn):
    def inputs(self, heads, call):
        return {n: t * float("inf") if t.dtype == torch.bfloat16 else t for n, t in heads.items()}


@pytest.mark.parametrize(("property_name", "sound", "broken", "pattern"), BROKEN)
def test_what_is_broken_is_caught(property_name, sound, broken, pattern):
    assert set(status(sound, property_name, pattern)) == {"pass"}
    assert "fail" in status(broken, property_name, pattern)


def test_every_property_is_broken_by_something():
    assert {case.values[0] for case in BROKEN} | {"padding_gradient"} == {p.name for p in PROPERTIES}
