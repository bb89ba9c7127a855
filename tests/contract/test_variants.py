"""The variants of a card reach every option: what no variant changes would be outside the matrix."""

from __future__ import annotations

import dataclasses

import pytest

from regard import Unsupported, get_mechanism, list_mechanisms
from regard.create import build_layer
from regard.workbench.layer_properties import DIM, HEADS
from regard.workbench.subjects import Subject


def choices(card, option):
    """Names that an option accepts, by what its refusal of another lists; none where it does not take names."""
    try:
        card.options(**{option: "no such value"})
    except Unsupported as refusal:
        return [] if f"of {card.name}" in refusal.asked else refusal.supported.split(", ")
    return []


@pytest.mark.parametrize("name", list_mechanisms())
def test_every_option_has_another_value_in_some_variant(name):
    card = get_mechanism(name)
    missing = []
    for field in dataclasses.fields(card.config):
        default = getattr(card.config(), field.name)
        values = [options[field.name] for options in card.variants.values() if field.name in options]
        if not any(value != default for value in values):
            missing.append(field.name)
        for value in choices(card, field.name):
            if value not in map(str, [default, *values]):
                missing.append(f"{field.name}={value}")
    assert not missing, f"no variant has {', '.join(missing)}"


@pytest.mark.parametrize("name", list_mechanisms())
def test_variants_are_accepted_in_their_patterns(name):
    card = get_mechanism(name)
    for variant, options in card.variants.items():
        card.options(**options)
        assert set(card.patterns_of(variant)) <= set(card.patterns)
        for pattern in card.patterns_of(variant):
            build_layer(card, DIM, HEADS, pattern=pattern, **options)
            subject = Subject(card, pattern, dict(options))
            subject.run(subject.inputs(12))
