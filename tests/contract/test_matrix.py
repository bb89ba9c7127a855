"""The equality matrix for every mechanism in the catalogue: a new mechanism is tested here without a new line of code."""

from __future__ import annotations

import pytest
import torch
from support import ALL

from regard import get_mechanism, list_mechanisms
from regard.contract import Kind, Pattern, Unsupported
from regard.workbench.verification.verify import PROGRAMS, PROPERTIES, Place, check, plan, verified_backends

SHARE = {
    "compile": (16, 1),
    "layer_compile": (12, 0),
    "layer_export": (9, 2),
    "layer_lengths": (12, 3),
    "layer_onnx": (12, 0),
    "layer_recompile": (64, 6),
}
"""(every, first): of each `every` mechanisms, the one numbered `first` is compiled."""


def failures_of(name, pattern, properties, variant="", dtypes=None):
    """The properties that fail on any backend, in all dtypes or in the first `dtypes` of them."""
    places = (
        Place(get_mechanism(name), pattern, prop, dtype, backend, variant)
        for prop in properties
        for backend in verified_backends()
        for dtype in prop.dtypes_on(backend)[:dtypes]
    )
    asked = {}
    cells = [check(place, asked=asked) for place in places]
    return [f"{c.property} of {c.dtype} on {c.backend}: {c.detail}" for c in cells if c and c.status == "fail"]


def tried(prop, turn, place, patterns):
    """Programs take seconds each, so a mechanism is compiled in one of its patterns, and its neighbours in others, so that
    the layer shell is covered in all patterns; the bare function is compiled in a different pattern."""
    if ALL:
        return True
    every, first = SHARE[prop.name]
    if turn % every != first:
        return False
    if prop.name == "layer_recompile":  # needs a state after the tokens
        return patterns[place] is Pattern.CAUSAL_SELF
    own = turn % len(patterns)
    if prop.name == "compile":
        return place != own and place == (own + 1) % len(patterns)
    return place == own


OF_CALLS, OF_PROGRAMS = ([p for p in PROPERTIES if (p.name in PROGRAMS) == chosen] for chosen in (False, True))
CELLS = [(name, pattern) for name in list_mechanisms() for pattern in get_mechanism(name).patterns]


def calls_tried(name, pattern):
    """The layer shell is the same in all patterns, so a mechanism's layer properties are checked in only two of them: one
    that varies by mechanism, and causal-self, the only one with states and steps."""
    patterns = get_mechanism(name).patterns
    turn = patterns[list_mechanisms().index(name) % len(patterns)]
    layers = ALL or pattern in (turn, Pattern.CAUSAL_SELF)
    return [prop for prop in OF_CALLS if layers or prop.level == "function"]


@pytest.mark.parametrize(("name", "pattern"), CELLS, ids=[f"{n}-{p.value}" for n, p in CELLS])
def test_every_property_holds(name, pattern):
    """To check a single property: `regard verify NAME --property PROPERTY`."""
    failures = failures_of(name, pattern, calls_tried(name, pattern))
    assert not failures, "; ".join(failures)


PROGRAM_CELLS = [
    (name, pattern, prop)
    for turn, name in enumerate(list_mechanisms())
    for patterns in [get_mechanism(name).patterns]
    for place, pattern in enumerate(patterns)
    for prop in OF_PROGRAMS
    if tried(prop, turn, place, patterns)
]


@pytest.mark.parametrize(
    ("name", "pattern", "prop"), PROGRAM_CELLS, ids=[f"{n}-{p.value}-{q.name}" for n, p, q in PROGRAM_CELLS]
)
def test_programs_hold(name, pattern, prop):
    failures = failures_of(name, pattern, [prop])
    assert not failures, "; ".join(failures)


VARIANTS = [(name, variant) for name in list_mechanisms() for variant in get_mechanism(name).variants]


def patterns_tried(turn, name, variant):
    """Every fifth variant is tried in one pattern: half of them in causal-self, the only one with states and steps, the
    others in varying patterns. `make test-all` and `regard verify NAME --variant all` try everything."""
    patterns = get_mechanism(name).patterns_of(variant)
    if ALL:
        return patterns
    if turn % 5:
        return ()
    if turn % 10 == 0 and Pattern.CAUSAL_SELF in patterns:
        return (Pattern.CAUSAL_SELF,)
    return (patterns[turn // 10 % len(patterns)],)


VARIANT_CELLS = [(n, v, p) for turn, (n, v) in enumerate(VARIANTS) for p in patterns_tried(turn, n, v)]


@pytest.mark.parametrize(
    ("name", "variant", "pattern"), VARIANT_CELLS, ids=[f"{n}-{v}-{p.value}" for n, v, p in VARIANT_CELLS]
)
def test_properties_hold_for_every_variant(name, variant, pattern):
    failures = failures_of(name, pattern, OF_CALLS, variant, dtypes=1)
    assert not failures, f"in {pattern}: " + "; ".join(failures)


@pytest.mark.parametrize(("name", "variant"), VARIANTS if ALL else ())
def test_programs_hold_for_every_variant(name, variant):
    """In `make test-all`, each in the last of its patterns."""
    card = get_mechanism(name)
    places = [
        Place(card, card.patterns_of(variant)[-1], prop, prop.dtypes_on("torch")[0], "torch", variant)
        for prop in OF_PROGRAMS
    ]
    assert not [f"{c.property}: {c.detail}" for c in map(check, places) if c and c.status == "fail"]


@pytest.mark.parametrize("name", list_mechanisms())
def test_card_is_complete(name):
    card = get_mechanism(name)
    assert "reference" in card.forms
    assert set(card.patterns) | set(card.refused) >= set(type(card.patterns[0]))
    assert not set(card.patterns) & set(card.refused)
    assert all(waiver.reason for waiver in card.waivers)
    assert all(w.property in {p.name for p in PROPERTIES} for w in card.waivers)
    assert card.kind is Kind.ATTENTION or card.module is not None
    assert set(card.tolerances) >= {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def test_programs_of_a_variant_that_only_layers_have_need_no_function():
    card, program = get_mechanism("bidirectional_mamba"), next(p for p in OF_PROGRAMS if p.name == "layer_recompile")
    assert card.layer_variants
    for variant in card.layer_variants:  # whose tokens lie on a grid, for which there is no such program
        assert check(Place(card, Pattern.NONCAUSAL_SELF, program, torch.float64, "torch", variant)) is None


def test_one_word_is_one_name_and_nothing_to_verify_is_refused():
    places = list(plan("linear", patterns="causal-self", properties="step", variants="relu"))
    assert places and {(p.card.name, p.pattern, p.prop.name, p.variant) for p in places} == {
        ("linear", Pattern.CAUSAL_SELF, "step", "relu")
    }
    with pytest.raises(Unsupported, match="fnet in the pattern causal-self"):
        list(plan(["fnet"], patterns=["causal-self"]))
    with pytest.raises(Unsupported, match="property='stp'"):
        list(plan(properties=["stp"]))
