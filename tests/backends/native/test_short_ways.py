"""Calls with only tensors take a fast path to the kernels, with the same results as the general path."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import close, qkv

from regard import Context, Mask, create_layer, functional
from regard.contract import Unsupported
from regard.engines.attention import native_form as attention
from regard.engines.gated_recurrence import gated_recurrence, gated_recurrence_step, step
from regard.engines.gated_recurrence import native_form as recurrence
from regard.engines.layers.native_form import rotation
from regard.engines.linear_attention import native_form as linear_attention

SIZES = [(4, 4), (3, 9), (9, 3), (1, 70), (70, 70), (300, 300)]
FUNCTIONS = {
    "softmax": (functional.softmax_attention, {}),
    "softmax, both ways": (functional.softmax_attention, {"pattern": "noncausal-self"}),
    "a window": (functional.softmax_attention, {"window": (5, 0)}),
    "a window on both sides": (functional.softmax_attention, {"window": (2, 6), "pattern": "noncausal-self"}),
    "linear": (functional.linear_attention, {}),
    "linear without a denominator": (functional.linear_attention, {"feature_map": "silu", "normalize": False}),
}


@pytest.fixture
def taken(monkeypatch):
    """How often each engine's fast path was taken."""
    counts = {}
    ways = [(form, "plain") for form in (attention, linear_attention, recurrence)]
    for form, way in [*ways, (step, "plain"), (rotation, "plain")]:

        def counting(short, name, *arguments):
            found = short(*arguments)
            counts[name] = counts.get(name, 0) + (found is not None)
            return found

        monkeypatch.setattr(form, way, partial(counting, getattr(form, way), f"{form.__name__}.{way}"))
    return counts


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_float64(taken, name, dtype):
    function, options = FUNCTIONS[name]
    for n, m in SIZES if options.get("pattern") != "noncausal-self" else [(n, n) for n, _ in SIZES]:
        inputs = qkv(n, m, heads=4, groups=2 if "softmax" in name else None, dim=8, value_dim=5, dtype=dtype)
        inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)  # any strides but for features
        expected = function(**{x: t.double() for x, t in inputs.items()}, **options)
        close(function(**inputs, **options).double(), expected, 4e-6 if dtype == torch.float32 else 1e-2)
    general = function(**inputs, **options, mask=Mask(lengths=torch.full((2,), n)))
    close(function(**inputs, **options), general, 0.0 if "softmax" in name else 1e-6)
    assert sum(taken.values()) >= len(SIZES) - 2 * (
        "linear" in name
    )  # recurrences with n != m align their queries with the keys first


@pytest.mark.parametrize(
    "function",
    [
        functional.softmax_attention,
        functional.linear_attention,
        functional.gated_linear_attention,
        functional.delta_rule_attention,
    ],
)
def test_what_somebody_watches_or_differentiates_goes_the_general_way(taken, function):
    inputs = qkv(6, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        function(**inputs)
    torch.func.vmap(function)(*(x[None] for x in inputs.values()))
    torch.func.jvp(lambda q: function(q, inputs["k"], inputs["v"]), (inputs["q"],), (inputs["q"],))
    learning = {name: x.requires_grad_() for name, x in inputs.items()}
    function(**learning).sum().backward()
    assert sum(taken.values()) == 0
    with torch.no_grad():
        function(**learning)
    assert sum(taken.values()) == 1


def test_a_call_is_checked_whatever_calls_of_its_shape_came_before():
    q, k, v = qkv(6, dtype=torch.float32).values()
    for _ in range(2):
        functional.linear_attention(q, k, v)
        for wrong in ({"k": k[..., :3]}, {"v": v[:, :, :5]}, {"k": k.long()}, {"q": q[0]}):
            with pytest.raises(Unsupported):
                functional.linear_attention(**{"q": q, "k": k, "v": v, **wrong})


def recurrent(n, *, heads=4, groups=4, gates=8, beta=False, state=False, dtype=torch.float32):
    """Arguments of a gated recurrence by name."""
    inputs = qkv(n, heads=groups, dim=8, dtype=dtype)
    inputs["v"] = torch.randn(2, n, heads, 5, dtype=dtype).transpose(1, 2)
    inputs["log_decay"] = -torch.rand(2, heads, n, gates, dtype=dtype) if gates else None
    inputs["beta"] = torch.rand(2, n, heads, dtype=dtype).mT if beta else None
    inputs["state"] = torch.randn(2, heads, 8, 5) if state else None
    return inputs


def in_float64(inputs):
    return {name: None if x is None else x.double() for name, x in inputs.items()}


RECURRENCES = {
    "gates of features": {},
    "gates of heads, shared queries and keys": {"gates": 1, "groups": 2},
    "no gates": {"gates": 0},
    "delta rule": {"beta": True, "gates": 0},
    "delta rule with gates": {"beta": True},
}


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrences_and_their_steps_are_those_of_float64(taken, name, state, dtype):
    tolerance = 4e-6 if dtype == torch.float32 else 1e-2
    for n in (1, 70):
        inputs = recurrent(n, state=state, dtype=dtype, **RECURRENCES[name])
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        if inputs["beta"] is not None:
            inputs["beta"] = inputs["beta"].float()  # its kernel takes rates and gates in float32
            inputs["log_decay"] = None if inputs["log_decay"] is None else inputs["log_decay"].float()
        for inclusive in (True, False):
            found = gated_recurrence(**inputs, inclusive=inclusive)
            expected = gated_recurrence(**in_float64(inputs), inclusive=inclusive)
            for one, other in zip(found, expected, strict=True):
                close(one.double(), other, tolerance)
    assert taken[f"{recurrence.__name__}.plain"] == 4
    inputs = recurrent(1, state=True, dtype=dtype, **RECURRENCES[name])
    token = {x: t if t is None or x == "state" else t.select(2, 0) for x, t in inputs.items()}
    found = gated_recurrence_step(**token)
    for one, other in zip(found, gated_recurrence_step(**in_float64(token)), strict=True):
        close(one.double(), other, tolerance)
    assert taken[f"{step.__name__}.plain"] == 1


def test_a_step_takes_tensors_whose_heads_come_before_their_rows(taken):
    usual = recurrent(1, state=True)
    token = {x: t if t is None or x == "state" else t.select(2, 0) for x, t in usual.items()}
    for name in ("q", "k", "v", "log_decay"):
        token[name] = token[name].transpose(0, 1).contiguous().transpose(0, 1)
    for _ in range(2):
        for one, other in zip(gated_recurrence_step(**token), gated_recurrence_step(**in_float64(token)), strict=True):
            close(one.double(), other, 4e-6)
    assert taken[f"{step.__name__}.plain"] == 2


@pytest.mark.parametrize("beta", [False, True])
def test_tensors_that_kernels_do_not_read_as_they_are_go_the_general_way(taken, beta):
    usual = recurrent(6, beta=beta, state=True)
    gated_recurrence(**usual)
    assert sum(taken.values()) == 1
    for name, changed in {
        "q": usual["q"].mT.contiguous().mT,
        "state": usual["state"].bfloat16(),
        "v": usual["v"].double(),
    }.items():
        inputs = {**usual, name: changed}
        found, expected = gated_recurrence(**inputs)[0], gated_recurrence(**in_float64(inputs))[0]
        close(found.double(), expected, 1e-2)
    assert sum(taken.values()) == 1
    with pytest.raises(Unsupported):
        gated_recurrence(**{**usual, "state": usual["state"][:, :, :3]}, backend="native")


@pytest.mark.parametrize("name", ["softmax", "linear", "gated_linear", "delta_rule"])
def test_a_layer_decodes_by_the_short_ways_what_it_does_by_the_general_ones(taken, name):
    layer, x = create_layer(name, 16, 2, positions="rotary").eval(), torch.randn(3, 9, 16)
    with torch.no_grad():
        state = layer(x[:, :6], context=Context(want=frozenset({"state"}))).state
        taken.clear()
        for t in range(6, 9):
            output, state = layer.step(x[:, t], state)
        assert sum(taken.values()) == 3 * 3, taken
        close(output, layer(x).output[:, -1], 2e-6)


def test_caches_with_empty_slots_keep_their_ranks(taken):
    layer, x = create_layer("softmax", 16, 2, positions="rotary").eval(), torch.randn(2, 8, 16)
    with torch.no_grad():
        mask = Mask(lengths=torch.tensor([5, 3]))
        state = layer(x[:, :5], context=Context(mask=mask, want=frozenset({"state"}))).state
        output, _ = layer.step(x[:, 5], state)
        shorter = torch.cat([x[1:, :3], x[1:, 5:6]], 1)
        close(output[1:], layer(shorter).output[:, -1], 2e-6)
