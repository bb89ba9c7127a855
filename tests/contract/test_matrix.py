"""The equality matrix for every mechanism in the catalogue: a new mechanism is tested here with no new line."""

from __future__ import annotations

import os

import pytest
import torch

from regard import get_mechanism, list_mechanisms
from regard.contract import Kind, Pattern
from regard.workbench.verify import PROGRAMS, PROPERTIES, Place, check, verified_backends

ALL = bool(os.environ.get("REGARD_TEST_ALL"))
"""Every program in every pattern, as `make test-all` and `make matrix` have it: an hour."""

SHARE = {
    "compile": (4, 1),
    "layer_compile": (3, 0),
    "layer_export": (4, 2),
    "layer_lengths": (4, 3),
    "layer_onnx": (6, 0),
    "layer_recompile": (28, 0),
}
"""Of every so many mechanisms one has a program here, beginning with that number."""


def tried(prop, turn, place, patterns):
    """Programs take seconds each, so here a mechanism has them in one of its patterns, and neighbours in different ones,
    so that the shell of layers is seen in all; the function alone is compiled in another."""
    if ALL or prop.name not in PROGRAMS:
        return True
    every, first = SHARE.get(prop.name, (1, 0))
    if turn % every != first:
        return False
    own = turn % len(patterns)
    if prop.name == "compile":
        return place != own and place == (own + 1) % len(patterns)
    return place == own or prop.name == "layer_onnx"


CELLS = [
    (name, pattern, prop)
    for turn, name in enumerate(list_mechanisms())
    for patterns in [get_mechanism(name).patterns]
    for place, pattern in enumerate(patterns)
    for prop in PROPERTIES
    if tried(prop, turn, place, patterns)
]


@pytest.mark.parametrize(("name", "pattern", "prop"), CELLS, ids=[f"{n}-{p.value}-{q.name}" for n, p, q in CELLS])
def test_property_holds(name, pattern, prop):
    card = get_mechanism(name)
    cells = [
        check(Place(card, pattern, prop, dtype, backend))
        for backend in verified_backends()
        for dtype in prop.dtypes_on(backend)
    ]
    failures = [f"{c.dtype} on {c.backend}: {c.detail}" for c in cells if c is not None and c.status == "fail"]
    assert not failures, "; ".join(failures)


VARIANTS = [(name, variant) for name in list_mechanisms() for variant in get_mechanism(name).variants]


def patterns_tried(name, variant):
    """One pattern by turns, and causal-self, which alone has states and steps. `regard verify NAME --variant all` measures
    all patterns and dtypes."""
    patterns = get_mechanism(name).patterns_of(variant)
    turn = patterns[VARIANTS.index((name, variant)) % len(patterns)]
    return [p for p in patterns if p in (turn, Pattern.CAUSAL_SELF)]


VARIANT_CELLS = [
    (n, v, p) for turn, (n, v) in enumerate(VARIANTS) for p in patterns_tried(n, v) if ALL or turn % 2 == 0
]
"""Every second variant here; `make test-all` and `regard verify NAME --variant all` have all."""


@pytest.mark.parametrize(
    ("name", "variant", "pattern"), VARIANT_CELLS, ids=[f"{n}-{v}-{p.value}" for n, v, p in VARIANT_CELLS]
)
def test_properties_hold_for_every_variant(name, variant, pattern):
    failures = []
    for prop in PROPERTIES:
        for backend in verified_backends() if prop.name not in PROGRAMS else ():
            for dtype in prop.dtypes_on(backend)[:1]:
                cell = check(Place(get_mechanism(name), pattern, prop, dtype, backend, variant))
                if cell is not None and cell.status == "fail":
                    failures.append(f"{prop.name} of {cell.dtype} on {backend}: {cell.detail}")
    assert not failures, f"in {pattern}: " + "; ".join(failures)


@pytest.mark.parametrize("name", list_mechanisms())
def test_card_is_complete(name):
    card = get_mechanism(name)
    assert "reference" in card.forms
    assert set(card.patterns) | set(card.refused) >= set(type(card.patterns[0]))
    assert all(waiver.reason for waiver in card.waivers)
    assert all(w.property in {p.name for p in PROPERTIES} for w in card.waivers)
    assert card.kind is Kind.ATTENTION or card.module is not None
    assert set(card.tolerances) >= {torch.float64, torch.float32, torch.bfloat16, torch.float16}
