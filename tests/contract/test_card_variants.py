"""The variants of a card reach every option: what no variant changes would be outside the matrix."""

from __future__ import annotations

import pytest

from regard import get_mechanism, list_mechanisms
from regard.create import build_layer
from regard.workbench.layer_properties import DIM, HEADS
from regard.workbench.random_cases import unreached_options
from regard.workbench.subjects import Subject


@pytest.mark.parametrize("name", list_mechanisms())
def test_every_option_has_another_value_in_some_variant(name):
    assert not unreached_options(get_mechanism(name))


@pytest.mark.parametrize("name", list_mechanisms())
def test_variants_are_accepted_in_their_patterns(name):
    card = get_mechanism(name)
    for variant, options in card.variants.items():
        assert set(card.patterns_of(variant)) <= set(card.patterns)
        for pattern in card.patterns_of(variant):
            build_layer(card, DIM, pattern=pattern, **{"num_heads": HEADS, **options})
            if variant not in card.layer_variants:
                subject = Subject.of(card, pattern, variant)
                subject.run(subject.inputs(12))
