"""Position schemes of each mechanism: those that a card accepts work, the others are refused with a reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import ALL

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import ACTS_LIKE, TURNED_BEFORE, Kind, Pattern, Unsupported
from regard.create import create_layer
from regard.positions import SCHEMES, list_positions
from regard.workbench.verification.properties.layers import LAYER_PROPERTIES, LayerSubject
from regard.workbench.verification.subjects import Subject
from regard.workbench.verification.verify import Place, check

ATTENTION = list_mechanisms(kind=Kind.ATTENTION)
INSIDE = [name for name in list_positions() if SCHEMES[name].rotate is not None or SCHEMES[name].bias is not None]
ACCEPTED = [
    (name, scheme) for name in ATTENTION for scheme in INSIDE if scheme in get_mechanism(name).accepts_positions
]
REFUSED = [(name, s) for name in ATTENTION for s in list_positions() if s not in get_mechanism(name).accepts_positions]


(DECODING,) = (p for p in LAYER_PROPERTIES if p.name == "layer_decoding")


def decoded(name, scheme, patterns):
    """One of the patterns that decode, a different one for each scheme, so that each pattern meets all kinds of schemes."""
    some = [pattern for pattern in patterns if pattern is not Pattern.NONCAUSAL_SELF]
    if ALL or not some:
        return some
    return [some[(ATTENTION.index(name) + INSIDE.index(scheme)) % len(some)]]


@pytest.mark.parametrize(("name", "scheme"), ACCEPTED)
def test_an_accepted_scheme_changes_the_output_of_every_pattern_and_decodes(name, scheme):
    card = get_mechanism(name)
    card = dataclasses.replace(card, layer_defaults={**card.layer_defaults, "positions": scheme})
    turned = card.maps_before_rotation and SCHEMES[scheme].rotate is not None
    patterns = [pattern for pattern in card.patterns if not (turned and pattern.cross)]  # patterns that refuse it
    for pattern in patterns:
        layer = LayerSubject(Subject(card, pattern), torch.float64)
        given, roles = (layer.x(9), layer.memory(9) if pattern.cross else None), layer.roles(9)
        whole = layer(*given, roles=roles).output
        layer.layer.positions = SCHEMES["none"]()
        assert (layer(*given, roles=roles).output - whole).abs().max() > 1e-6
    for pattern in decoded(name, scheme, patterns):
        cell = check(Place(card, pattern, DECODING, torch.float64))
        assert cell is None or cell.status == "waived" or cell.error < 1e-10


@pytest.mark.parametrize(("name", "scheme"), REFUSED)
def test_a_scheme_that_is_not_accepted_is_refused_with_the_reason(name, scheme):
    expected = rf"^not supported: {scheme} positions with {name} \(.+\); supported: none"
    with pytest.raises(Unsupported, match=expected) as refusal:
        create_layer(name, 16, 2, pattern=get_mechanism(name).patterns[0], positions=scheme)
    assert refusal.value.nearest == "none"


@pytest.mark.parametrize("name", ATTENTION)
def test_schemes_that_act_at_the_same_place_are_accepted_alike(name):
    card = get_mechanism(name)
    accepted = set(card.accepts_positions)
    for place in ("rotate", "bias"):
        alike = {s for s in INSIDE if getattr(SCHEMES[s], place) is not None and s not in TURNED_BEFORE}
        if place == "bias" and accepted & alike:
            assert "bias" in card.honours
        assert accepted >= alike or not accepted & alike


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("scheme", TURNED_BEFORE)
def test_what_turns_queries_and_keys_before_the_call_is_not_accepted_where_they_are_rotated_again(name, scheme):
    card = get_mechanism(name)
    fits = set(ACTS_LIKE[scheme]) <= set(card.accepts_positions)
    assert (scheme in card.accepts_positions) == (fits and "rotate" not in card.honours)
