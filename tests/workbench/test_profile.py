"""Profiles of functions: the fit of their growth with length."""

import dataclasses

import pytest
import torch

from regard import Pattern, Unsupported, create_layer, get_mechanism, list_mechanisms
from regard.contract import Kind, Shape
from regard.workbench.profile import ProfileSettings, _inputs, growth, profile
from regard.workbench.verification.subjects import Subject

CARDS = map(get_mechanism, list_mechanisms())
TOLD = [card.name for card in CARDS if card.axis_sizes is not None and card.kind is not Kind.PROJECTION]
AS_CALLED = {
    "mamba": {"expand": 1.0},
    "bidirectional_mamba": {"expand": 1.0},
    "mlp_mixer": {"length": 32},
    "ninformer": {"length": 32},
}
"""Options with which a layer's inner width or length equals that of the call, as for functions."""

SMALL = ProfileSettings(("linear", "softmax"), lengths=(64, 128, 256), heads=2, head_dim=8, seconds=0.01)


def test_growth_has_the_cards_exponents_beside_the_measured_ones_which_are_of_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = growth(SMALL)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert list(found) == ["linear", "softmax"]
    assert [p.time_by_cost for p in found.values()] == pytest.approx([1, 2], abs=1e-9)
    assert all(p.low <= p.time <= p.high for p in found.values())


def test_a_name_for_settings_is_refused_with_the_settings():
    with pytest.raises(Unsupported, match=r"a profile of 'linear'; .*try ProfileSettings"):
        profile("linear")


def test_memory_grows_as_what_is_stored():
    long = dataclasses.replace(SMALL, mechanisms=("linear", "synthesizer"), lengths=(1024, 2048, 4096))
    assert [p.memory for p in growth(long).values()] == pytest.approx([1, 2], abs=0.1)


def test_a_length_that_does_not_fit_takes_nothing_of_those_that_do():
    found = profile(dataclasses.replace(SMALL, lengths=(16, 10**14), what=("forward", "decode")))
    assert {(m.mechanism, m.what, m.length) for m in found.measurements} == {
        (name, what, 16) for name in ("linear", "softmax") for what in ("forward", "decode")
    }
    assert found.skipped["linear forward at 100000000000000"].endswith("needs more memory than there is")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": True}, "growth of layers"),
        ({"lengths": (512,)}, "two lengths or more"),
        ({"dim": 64}, "layer=True"),
    ],
)
def test_growth_of_what_has_none_and_the_width_of_functions_are_refused(change, message):
    with pytest.raises(Unsupported, match=message):
        growth(dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize("layer", [False, True])
def test_only_training_is_profiled_in_training_mode(layer, monkeypatch):
    forms, seen = get_mechanism("stochastic_subsampling").forms, {}
    for form, function in forms.items():

        def run(call, *args, function=function, **inputs):
            seen.setdefault(what, set()).add(call.training)
            return function(call, *args, **inputs)

        monkeypatch.setitem(forms, form, run)
    short = dataclasses.replace(SMALL, mechanisms=("stochastic_subsampling",), lengths=(16,), layer=layer)
    for what in ("forward", "training"):
        profile(dataclasses.replace(short, what=(what,)))
    assert seen == {"forward": {False}, "training": {True}}


def test_a_wrapper_is_profiled_with_what_it_wraps_or_not_at_all():
    """A wrapper's function alone, such as the gates of heads, does not attend and would seem a hundred times faster."""
    short = dataclasses.replace(SMALL, mechanisms=("mixture_of_heads",), lengths=(16,), what=("forward",))
    with pytest.raises(Unsupported, match="try --layer"):
        profile(short)
    found = profile(dataclasses.replace(short, layer=True))
    assert {m.mechanism for m in found.measurements} == {"softmax", "mixture_of_heads"}


@pytest.mark.parametrize("name", TOLD)
def test_what_is_timed_has_the_sizes_of_a_layer_with_the_same_options(name, monkeypatch):
    card = get_mechanism(name)
    heads, width, n, seen = 4, 16, 32, {}

    def recorded(form):
        def run(call, *args, **inputs):
            seen.update(inputs)
            return form(call, *args, **inputs)

        return run

    for form, function in card.forms.items():
        monkeypatch.setitem(card.forms, form, recorded(function))
    pattern = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in card.patterns else Pattern.NONCAUSAL_SELF
    options = AS_CALLED.get(name, {})
    create_layer(name, dim=heads * width, num_heads=heads, pattern=pattern, **options)(torch.randn(1, n, heads * width))
    told = card.axis_sizes(Shape(1, heads, n, n, width, width), card.options(**options))
    timed = _inputs(Subject(card, pattern), n, ProfileSettings((name,), pattern, heads=heads, head_dim=width))
    for tensors in (seen, timed):
        sizes = [pair for key, x in tensors.items() for pair in zip(card.axes[key], x.shape, strict=True)]
        assert {letter: size for letter, size in sizes if letter in told} == dict(told)
